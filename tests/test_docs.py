"""The documentation site: it is built strictly, so that a page outside its index, a broken link and
a name that is gone are errors, and it loads nothing from elsewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return folder


def test_a_page_loads_nothing_from_elsewhere(site):
    loaded = re.compile(r"<(?:script|link|img|iframe)[^>]*\s(?:src|href)=\"?(?:https?:)?//", re.I)
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        assert not loaded.search(page.read_text(encoding="utf-8")), page.name


def test_the_interfaces_have_their_docstrings(site):
    page = (site / "api" / "inference.html").read_text(encoding="utf-8")
    assert "A model that answers questions about pictures in words and masks." in page
    assert 'id="cores.model.inference.segmenter.ReasoningSegmenter.from_pretrained"' in page
