"""What trains: LoRA in the language model, and in full the token embeddings, lm_head, the text
projection, SAM's mask decoder and the refiner.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from model.checkpoints import published
from model.checkpoints.precision import quantized_bits
from model.checkpoints.weights import compare


def add_lora(
    model: nn.Module,
    r: int = 8,
    alpha: int = 16,
    dropout: float = 0.05,
    target_modules: Sequence[str] = ("q_proj", "v_proj"),
) -> None:
    """Puts LoRA adapters of rank ``r`` (0: none) and scale α/r into the language model only.

    CLIP has layers of the same names, which stay as they are. Raises ValueError if no layer has one
    of ``target_modules``'s names.
    """
    if r == 0:
        return
    language_model = model.reasoning.llava.model.language_model
    if bits := quantized_bits(language_model):
        setattr(language_model, f"is_loaded_in_{bits}bit", True)  # PEFT reads it there.
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(target_modules),
        bias="none",
    )
    try:
        inject_adapter_in_model(config, language_model)
    except ValueError as error:
        raise ValueError(f"--lora_target_modules {','.join(target_modules)}: {error}") from error
    # The new dropout layers are in training mode, whatever the mode of the model around them.
    language_model.train(language_model.training)


def load_adapter(model: nn.Module, weights: Mapping[str, Tensor], source: Path | str) -> None:
    """Puts the weights of a PEFT adapter, in the names of this program or of a published LISA, into
    ``model``'s LoRA.

    ``source``: where they come from. Raises ValueError naming every one that is missing, unexpected
    or wrongly shaped.
    """
    expected = {name: p for name, p in model.named_parameters() if "lora_" in name}
    found = {our_name(name): weight for name, weight in weights.items()}
    compare({name: p.shape for name, p in expected.items()}, found, source)
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(found[name])


def our_name(name: str, linear_projector: bool = True) -> str | None:
    """Our name of a weight that PEFT saved, in our names or a published LISA's: without PEFT's
    wrappers, with the name of its adapter. None for a constant that needs no loading.
    """
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    if re.search(r"\.lora_[AB]\.weight$", name):
        name = f"{name.removesuffix('.weight')}.default.weight"
    return published.our_name(name, linear_projector)


def trainable_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The groups of parameters that training changes, by name."""
    llava = model.reasoning.llava
    groups = {
        "LoRA": [p for name, p in llava.named_parameters() if "lora_" in name],
        "token embeddings": list(llava.get_input_embeddings().parameters()),
        "lm_head": list(llava.get_output_embeddings().parameters()),
        "text projection": list(model.text_projection.parameters()),
    }
    if model.selecting is not None:
        groups["selector"] = model.selecting.trained()
    if model.config.decodes:  # Otherwise SAM stays as it is, because it made the proposals.
        groups["mask decoder"] = list(model.segmenting.sam.mask_decoder.parameters())
    if model.segmenting.refiner is not None:
        groups["refiner"] = list(model.segmenting.refiner.parameters())
    return groups


def set_trainable(
    model: nn.Module, lora: bool = True, train_mask_decoder: bool = True
) -> dict[str, int]:
    """Freezes everything but the trainable groups and returns their sizes in parameters.

    ``lora`` False: a model without adapters. Raises ValueError if a group is empty, because a part
    that is left frozen by mistake fails silently: the published refiner was never trained.
    """
    model.requires_grad_(False)
    groups = trainable_groups(model)
    if not lora:
        groups.pop("LoRA")
    if not train_mask_decoder:
        groups.pop("mask decoder", None)
    empty = [name for name, parameters in groups.items() if not parameters]
    if empty:
        raise ValueError(f"nothing to train in: {', '.join(empty)}")
    for parameters in groups.values():
        for parameter in parameters:
            parameter.requires_grad_(True)
    # The single-mask output uses neither the other mask tokens' heads nor SAM's IoU prediction: no
    # loss reaches them.
    decoder = model.segmenting.sam.mask_decoder
    decoder.iou_prediction_head.requires_grad_(False)
    for head in decoder.output_hypernetworks_mlps[1:]:
        head.requires_grad_(False)
    return {
        name: sum(p.numel() for p in parameters if p.requires_grad)
        for name, parameters in groups.items()
    }


def has_lora(model: nn.Module) -> bool:
    return any(isinstance(module, LoraLayer) for module in model.modules())


def merge_lora(model: nn.Module) -> nn.Module:
    """Folds the adapters into the weights, W' = W + (α/r)·B·A, and removes them, in place; returns
    the model.

    Raises ValueError if there are none, and for weights that are not finite.
    """
    layers = [
        (name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)
    ]
    if not layers:
        raise ValueError(
            "the model has no LoRA adapters: it is merged already, or was never given any"
        )
    if bits := quantized_bits(model):
        raise ValueError(
            f"the model is held in {bits} bits; merge into its weights in full precision"
        )
    for name, layer in layers:
        base = layer.get_base_layer()
        delta = sum(layer.get_delta_weight(adapter).float() for adapter in layer.active_adapters)
        # The sum is rounded once, however coarse the stored format is.
        weight = (base.weight.data.float() + delta).to(base.weight.dtype)
        if not weight.isfinite().all():
            raise ValueError(
                f"{name}: the merged weight is not finite in {weight.dtype}; the adapter is"
                " damaged, or fp16 too small"
            )
        base.weight.data = weight
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, base)
    return model
