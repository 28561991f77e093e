"""The model: one file per box of the paper's figure, assembled in ``cores.py``."""

from model.config import CoresConfig, RefinerConfig
from model.cores import CoresForReasoningSegmentation, CoresOutput, Generation, Segmentation
from model.processor import CoresProcessor

__all__ = [
    "CoresConfig",
    "CoresForReasoningSegmentation",
    "CoresOutput",
    "CoresProcessor",
    "Generation",
    "RefinerConfig",
    "Segmentation",
]
