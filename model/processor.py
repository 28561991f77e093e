"""What belongs to a model between files and tensors: tokenizer, CLIP's and SAM's image transforms,
prompt format."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import AutoProcessor
from transformers.utils import PushToHubMixin

from cores.dataset.conversation.templates import ConversationTemplate, get_template
from cores.dataset.proposals import ProposalSource
from cores.model.checkpoints.llava import add_image_token, set_spaces
from cores.model.checkpoints.source import (
    IMAGE_TOKEN,
    PROCESSOR_FILE,
    CLIPImageProcessor,
    Kind,
    Source,
    open_source,
)
from cores.model.checkpoints.weights import blaming, read_json_file
from cores.model.config import CoresConfig
from cores.model.hub import push_folder
from cores.model.segmenting.embedding_cache import SamCache
from cores.model.segmenting.frames import preprocess, resized_size

FIELDS = (
    "image_size",
    "image_token_count",
    "levels",
    "template",
    "exemplar_count",
    "image_token",
    "system",
    "image_marks",
    "strip_at_tokens",
)


class CoresProcessor(PushToHubMixin):
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
        image_token: str = IMAGE_TOKEN,
        system: str | None = None,
        image_marks: Sequence[str] | None = None,
        strip_at_tokens: bool = False,
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
        self.system = system
        """System text in place of the template's, None for its own."""
        self.image_marks: tuple[str, str] | None = None
        if image_marks:
            self.image_marks = (image_marks[0], image_marks[1])
        self.strip_at_tokens = strip_at_tokens
        self.sam_cache: SamCache | None = None
        """Where embeddings of SAM are looked up."""
        self.proposals: ProposalSource | None = None
        """For a model that selects (``model.proposal_source``); not saved."""

    @property
    def conversation(self) -> ConversationTemplate:
        """The template with what belongs to this checkpoint: system text, marks around the image,
        white space."""
        template = get_template(self.template)
        system = template.system if self.system is None else self.system
        return replace(
            template,
            system=system,
            image_marks=self.image_marks,
            strip_at_tokens=self.strip_at_tokens,
        )

    def refuse_other_types(self) -> None:
        """Raises ValueError for fields of other types than the constructor's, and KeyError or
        ValueError for a template that is not known."""
        texts = [*self.levels, *(self.image_marks or ()), self.image_token, self.system or ""]
        sizes = self.image_size, self.image_token_count, self.exemplar_count
        for values, kind in ((texts, str), (sizes, int)):
            for value in values:
                if type(value) is not kind:
                    raise ValueError(f"{value!r} is no {kind.__name__}")
        get_template(self.template)

    @property
    def image_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(self.image_token)

    def clip(self, image: np.ndarray) -> Tensor:
        """uint8 (H, W, 3) RGB -> float (3, h, w), CLIP's input."""
        out = self.image_processor(
            images=image, return_tensors="pt", input_data_format="channels_last"
        )
        return out["pixel_values"][0]

    def sam(self, image: np.ndarray) -> tuple[Tensor, tuple[int, int]]:
        """uint8 (H, W, 3) RGB -> float (3, S, S) padded, and the (height, width) of the image
        inside."""
        return preprocess(image, self.image_size)

    def sam_size(self, image: np.ndarray) -> tuple[int, int]:
        """The (height, width) that ``sam`` gives an image uint8 (H, W, 3)."""
        height, width = image.shape[:2]
        return resized_size(height, width, self.image_size)

    def save_pretrained(self, folder: str | Path, **unused: Any) -> None:
        """Writes cores_processor.json, the tokenizer with its chat template, and
        preprocessor_config.json.

        ``unused``: what transformers' ``push_to_hub`` says about shards.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._write_chat_template()
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        fields = {name: getattr(self, name) for name in FIELDS}
        (folder / PROCESSOR_FILE).write_text(json.dumps(fields, indent=1) + "\n")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        **commit: Any,
    ) -> str:
        """Puts its files on the hub, and no model card; see the model's ``push_to_hub``, which
        takes the processor along."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            commit |= {"private": private, "token": token}
            message = commit_message or "Upload processor"
            return push_folder(Path(folder), repo_id, message=message, **commit)

    def _write_chat_template(self) -> None:
        tokens = [f"[{level}]" for level in self.levels]
        if self.strip_at_tokens:
            tokens += [self.image_token, *(self.image_marks or ())]
        space_first = set_spaces(self.tokenizer, self.strip_at_tokens, tokens)
        self.tokenizer.chat_template = self.conversation.chat_template(
            self.image_token, space_first
        )

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | Source,
        template: str = "llava_v1",
        vision_tower: str | None = None,
        **unused: Any,
    ) -> CoresProcessor:
        """Of a folder or hub name with one of our models, or with a published LISA or CoReS, or of
        what ``open_source`` made of one; all processors of one Source share its tokenizer.

        ``template``, ``vision_tower``: for a published one, whose files do not say. Raises
        FileNotFoundError where there is no processor, ValueError naming a field that does not fit.
        """
        source = open_source(source, vision_tower, **unused)
        file = source.file(PROCESSOR_FILE)
        if file is not None and source.kind is not Kind.ADAPTER:
            fields = read_json_file(source.folder, PROCESSOR_FILE)
            tokenizer, image_processor = source.tokenizer, source.image_processor
            with blaming(file):
                processor = cls(tokenizer, image_processor, **fields)
                processor.refuse_other_types()
            return processor
        if source.kind is not Kind.PUBLISHED_CORES:
            raise source.refuse("a merged model is needed")
        add_image_token(source.llava, source.tokenizer)
        return cls(
            source.tokenizer,
            source.image_processor,
            source.sam_dims.image_size,
            source.llava.image_seq_length,
            source.levels,
            template,
            exemplar_count=0,
            image_marks=source.image_marks,
            strip_at_tokens=True,
        )


AutoProcessor.register(CoresConfig, CoresProcessor)
