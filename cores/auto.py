"""``import cores.auto`` tells transformers' Auto classes of the model.

    import cores.auto
    from transformers import AutoModel, AutoProcessor
    model = AutoModel.from_pretrained("runs/demo/model")
    processor = AutoProcessor.from_pretrained("runs/demo/model")

``import cores`` alone does not: it takes hundredths of a second, and the classes that are
registered here are made of torch and transformers, which take seconds. A hook that registers them
when somebody imports transformers would import the model in the middle of that, when half of
either is there.
"""

from cores.model.config import CoresConfig
from cores.model.cores import CoresForReasoningSegmentation
from cores.model.processor import CoresProcessor

__all__ = ["CoresConfig", "CoresForReasoningSegmentation", "CoresProcessor"]
