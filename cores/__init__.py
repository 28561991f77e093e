"""CoReS: reasoning segmentation by a chain of reasoning and a chain of segmenting.

    from cores import ReasoningSegmenter
    segmenter = ReasoningSegmenter.from_pretrained("runs/demo/model")
    result = segmenter("dog.jpg", "with which part can the dog smell?")

All code is imported below this name, so that a program with a ``model.py`` or ``utils.py`` of its
own is no trouble. In the repository the parts lie at the top, and links here lead to them; a wheel
holds them here."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cores.model import ReasoningSegmenter, Result, Session

__all__ = ["ReasoningSegmenter", "Result", "Session"]
__version__ = "0.2.0"

if not (Path(__file__).parent / "model").is_dir():
    # A checkout on a system without symbolic links has files in their place.
    __path__.insert(0, str(Path(__file__).parents[1]))


def __getattr__(name: str) -> Any:
    """The names of ``cores.model``, imported when they are first used."""
    # Not ``from cores import model``, which asks here for the name.
    model = import_module("cores.model")
    if name in model.__all__:
        return getattr(model, name)
    raise AttributeError(f"module 'cores' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *import_module("cores.model").__all__})
