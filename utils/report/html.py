"""The templates of the pages, utils/report/templates. Whatever a template writes is escaped, so no
text of a data set or a model can become markup."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cores.dataset.drawing import printable
from cores.utils.report.tables import interval, percent, score_text, signed, signed_interval, words


def _one_line(value: object) -> str:
    """What a template writes of a value: one line without control characters, which Jinja then
    escapes. Markup, which only templates make, stays as it is."""
    return value if isinstance(value, Markup) else printable(str(value))


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _data_uri(jpeg: bytes) -> Markup:
    return Markup("data:image/jpeg;base64," + base64.b64encode(jpeg).decode())


TEMPLATES_FOLDER = Path(__file__).parent / "templates"
TEMPLATES = Environment(
    loader=FileSystemLoader(TEMPLATES_FOLDER),
    autoescape=True,
    finalize=_one_line,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters |= {
    "data_uri": _data_uri,
    "duration": _duration,
    "interval": interval,
    "json": json.dumps,
    "percent": percent,
    "score_text": score_text,
    "signed": signed,
    "signed_interval": signed_interval,
    "words": words,
}


def render(template: str, **values: Any) -> str:
    """The page that a file of utils/report/templates makes of ``values``."""
    return TEMPLATES.get_template(template).render(values)
