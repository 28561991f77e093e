"""What belongs to a model between files and tensors: tokenizer, CLIP's and SAM's image transforms, prompt format."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessor

from model.sam import preprocess

FILE = "cores_processor.json"


class CoresProcessor:
    """Saved beside the model, so that whoever loads it prepares inputs as training did."""

    def __init__(
        self,
        tokenizer,
        image_processor: CLIPImageProcessor,
        image_size: int,
        image_token_count: int,
        levels: list[str],
        template: str = "llava_v1",
        exemplar_count: int = 1,
        image_token: str = "<image>",
    ):
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.image_size = image_size
        """Side S of SAM's padded input."""
        self.image_token_count = image_token_count
        """Image tokens P that CLIP gives for one image."""
        self.levels = list(levels)
        self.template = template
        self.exemplar_count = exemplar_count
        self.image_token = image_token
        self.proposals = None
        """A dataset.proposals.ProposalSource for a model that selects (``model.proposal_source``); not saved."""

    @property
    def image_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(self.image_token)

    def clip(self, image: np.ndarray) -> Tensor:
        """uint8 (H, W, 3) RGB -> float (3, h, w), CLIP's input."""
        out = self.image_processor(images=image, return_tensors="pt", input_data_format="channels_last")
        return out["pixel_values"][0]

    def sam(self, image: np.ndarray) -> tuple[Tensor, tuple[int, int]]:
        """uint8 (H, W, 3) RGB -> float (3, S, S) padded, and the (height, width) of the image inside."""
        return preprocess(image, self.image_size)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes cores_processor.json, the tokenizer and preprocessor_config.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        fields = ("image_size", "image_token_count", "levels", "template", "exemplar_count", "image_token")
        (folder / FILE).write_text(json.dumps({name: getattr(self, name) for name in fields}, indent=1) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> CoresProcessor:
        """Raises FileNotFoundError where ``folder`` holds no processor, ValueError naming a field that does not fit."""
        file = Path(folder) / FILE
        if not file.is_file():
            raise FileNotFoundError(f"{file}: not found; --version needs the folder of a merged model")
        try:
            fields = json.loads(file.read_text())
            return cls(AutoTokenizer.from_pretrained(folder), CLIPImageProcessor.from_pretrained(folder), **fields)
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{file}: {error}; save the processor again") from error
