"""The model: one file per box of the paper's figure, assembled in ``cores.py``.

The names below are imported when they are first used: a command that only reads its flags does not
wait for torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cores.model.config import CoresConfig, RefinerConfig
    from cores.model.cores import CoresForReasoningSegmentation, CoresOutput
    from cores.model.inference.results import AnswerMask, Result, Stream
    from cores.model.inference.segmenter import ReasoningSegmenter, Session
    from cores.model.masks import Generation, Segmentation
    from cores.model.processor import CoresProcessor
    from cores.model.reasoning.generation import Decoding

__all__ = [
    "AnswerMask",
    "CoresConfig",
    "CoresForReasoningSegmentation",
    "CoresOutput",
    "CoresProcessor",
    "Decoding",
    "Generation",
    "ReasoningSegmenter",
    "RefinerConfig",
    "Result",
    "Segmentation",
    "Session",
    "Stream",
]

_HOMES = {
    "config": ("CoresConfig", "RefinerConfig"),
    "cores": ("CoresForReasoningSegmentation", "CoresOutput"),
    "inference.results": ("AnswerMask", "Result", "Stream"),
    "inference.segmenter": ("ReasoningSegmenter", "Session"),
    "masks": ("Generation", "Segmentation"),
    "processor": ("CoresProcessor",),
    "reasoning.generation": ("Decoding",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"cores.model.{module}"), name)
    raise AttributeError(f"module 'model' has no attribute {name!r}")
