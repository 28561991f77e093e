"""Writing a model in LISA's own layout (model/checkpoints/published.py), so that the tools made for
LISA read it."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import CLIPVisionModel

from cores.model.checkpoints import published
from cores.model.cores import CoresForReasoningSegmentation
from cores.model.processor import CoresProcessor
from cores.model.reasoning.lora import refuse_apart_or_packed

CLIP_FOLDER = "clip"


def save_published(
    model: CoresForReasoningSegmentation, processor: CoresProcessor, folder: str | Path
) -> None:
    """Writes config.json, safetensors in shards, the tokenizer, and CLIP with its image transform
    beside them.

    The weights keep their bits; ``from_pretrained`` of this program reads the folder, too. Raises
    ValueError for a model that the layout has no place for: adapters apart, quantised weights, a
    selector, a refiner or a projection that LISA lacks.
    """
    refuse_unpublishable(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    linear = published.has_linear_projector(model.config.llava)
    weights = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(published.TOWER)
    }
    named: dict[str, Tensor] = {
        published.their_name(name, linear): tensor.contiguous() for name, tensor in weights.items()
    }
    save_torch_state_dict(named, folder, metadata={"format": "pt"})
    tower: CLIPVisionModel = model.reasoning.llava.model.vision_tower
    tower.save_pretrained(folder / CLIP_FOLDER)
    processor.image_processor.save_pretrained(folder / CLIP_FOLDER)
    architecture = "LISAForCausalLM" if len(model.config.levels) == 1 else "CORESForCausalLM"
    config = published.their_config(
        model.config, architecture, CLIP_FOLDER, processor.image_marks is not None
    )
    dtype = str(model.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(
        json.dumps(config | {"torch_dtype": dtype}, indent=1) + "\n"
    )
    processor.save_pretrained(folder)
    added = {token: index for token, index in processor.tokenizer.get_added_vocab().items()}
    (folder / "added_tokens.json").write_text(json.dumps(added, indent=1) + "\n")
    model.generation_config.save_pretrained(folder)


def refuse_unpublishable(model: CoresForReasoningSegmentation) -> None:
    """Raises ValueError naming what LISA's layout cannot hold."""
    config = model.config
    refuse_apart_or_packed(model)
    if config.selector is not None:
        raise ValueError(
            "LISA's layout has no place for a selector, which this model has; keep it in its own"
            " layout (cores)"
        )
    if config.text_projection_norm is not None:
        raise ValueError(
            "LISA's layout has no norm behind the text projection (text_projection_norm); this"
            " model has one"
        )
    if config.refiner["kind"] == "attention":
        raise ValueError(
            'LISA\'s layout has a refiner of the kind "attention+norm" only; this model has'
            ' "attention"'
        )
