"""The model: one file per box of the paper's figure, assembled in ``cores.py``."""

from model.config import CoresConfig, RefinerConfig
from model.cores import CoresForReasoningSegmentation, CoresOutput
from model.generation import Decoding, Generation
from model.pipeline import AnswerMask, ReasoningSegmenter, Result, Session, Stream
from model.processor import CoresProcessor
from model.scene import Segmentation

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
