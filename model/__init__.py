"""The model: one file per box of the paper's figure, assembled in ``cores.py``."""

from model.config import CoresConfig, RefinerConfig
from model.cores import CoresForReasoningSegmentation, CoresOutput
from model.inference.results import AnswerMask, Result, Stream
from model.inference.segmenter import ReasoningSegmenter, Session
from model.masks import Generation, Segmentation
from model.processor import CoresProcessor
from model.reasoning.generation import Decoding

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
