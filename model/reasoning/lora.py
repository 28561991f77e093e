"""LoRA in the language model: adding adapters, loading them, and folding them into the weights."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cores.model.checkpoints import published
from cores.model.checkpoints.precision import quantized_bits
from cores.model.checkpoints.weights import refuse_mismatch

ALL_LINEAR = "all-linear"
"""PEFT's word for every linear layer of the language model, in place of names of layers."""


def add_lora(
    model: nn.Module,
    r: int = 8,
    alpha: int = 16,
    dropout: float = 0.05,
    target_modules: Sequence[str] = ("q_proj", "v_proj"),
    use_dora: bool = False,
    use_rslora: bool = False,
) -> None:
    """Puts adapters of rank ``r`` (0: none) into the language model only, as PEFT makes them: LoRA,
    or with ``use_dora`` DoRA, which also learns the length of every row of W + B·A.

    CLIP has layers of the same names, which stay as they are; so do the word tables, which are
    trained in full. The scale is α/r, with ``use_rslora`` α/√r. ``target_modules``: names of
    layers, or ALL_LINEAR alone. Raises ValueError for a name that no layer has.
    """
    if r == 0:
        return
    from peft import LoraConfig, inject_adapter_in_model  # This takes seconds, and few need it.

    language_model = model.get_submodule("reasoning.llava.model.language_model")
    flag = f"--lora_target_modules {','.join(target_modules)}"
    everything = list(target_modules) == [ALL_LINEAR]
    if not everything:
        layers = {name.rpartition(".")[2] for name, _ in language_model.named_modules()}
        for name in target_modules:
            if name.rpartition(".")[2] not in layers:
                linear = (n for n, m in language_model.named_modules() if isinstance(m, nn.Linear))
                known = sorted({n.rpartition(".")[2] for n in linear})
                raise ValueError(
                    f"{flag}: the language model has no layer {name!r}; it has {', '.join(known)},"
                    f" and {ALL_LINEAR} stands for all of them"
                )
    if bits := quantized_bits(language_model):
        setattr(language_model, f"is_loaded_in_{bits}bit", True)  # PEFT reads it there.
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=ALL_LINEAR if everything else list(target_modules),
        bias="none",
        use_dora=use_dora,
        use_rslora=use_rslora,
    )
    try:
        inject_adapter_in_model(config, language_model)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from error
    # The new dropout layers are in training mode, whatever the mode of the model around them.
    language_model.train(language_model.training)


def fast_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The weights of adapters that LoRA+ trains with a higher learning rate: those that PEFT's
    ``create_loraplus_optimizer`` chooses, B and the lengths of DoRA."""
    return [
        parameter
        for name, parameter in model.named_parameters()
        if ".lora_B." in name or ".lora_magnitude_vector." in name
    ]


def load_adapter(model: nn.Module, weights: Mapping[str, Tensor], source: Path | str) -> None:
    """Puts the weights of a PEFT adapter, in the names of this program or of a published LISA, into
    ``model``'s LoRA.

    ``source``: where they come from. Raises ValueError naming every one that is missing, unexpected
    or wrongly shaped.
    """
    expected = {name: p for name, p in model.named_parameters() if "lora_" in name}
    found = {ours: weight for name, weight in weights.items() if (ours := our_name(name))}
    refuse_mismatch({name: p.shape for name, p in expected.items()}, found, source)
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(found[name])


def adapted_layers(weights: Iterable[str]) -> list[str]:
    """The last parts of the names of the layers that the weights of an adapter, by name, are
    for."""
    found = (re.search(r"([^.]+)\.lora_[AB]\.", name) for name in weights)
    return sorted({match[1] for match in found if match})


def our_name(name: str, linear_projector: bool = True) -> str | None:
    """Our name of a weight that PEFT saved, in our names or a published LISA's: without PEFT's
    wrappers, with the name of its adapter. None for a constant that needs no loading.
    """
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    if re.search(r"\.lora_[AB]\.weight$", name):
        name = f"{name.removesuffix('.weight')}.default.weight"
    if name.endswith(".lora_magnitude_vector"):
        name += ".default.weight"
    return published.our_name(name, linear_projector)


def lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """(name, layer of PEFT's) for each layer with adapters."""
    if "peft" not in sys.modules:
        return []  # Whoever adds an adapter imports it first.
    from peft.tuners.lora import LoraLayer

    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer)]


def has_lora(model: nn.Module) -> bool:
    return bool(lora_layers(model))


def refuse_apart_or_packed(model: nn.Module) -> None:
    """Raises ValueError for a model whose weights are not whole tensors of their own: with adapters
    apart, or packed in 4 or 8 bits."""
    if has_lora(model):
        raise ValueError(
            "the model has LoRA adapters; merge them with `merge_lora` before it is saved"
        )
    if bits := quantized_bits(model):
        raise ValueError(f"the model is held in {bits} bits; load it in full precision to save it")


def merge_lora(model: nn.Module) -> nn.Module:
    """Folds the adapters into the weights, W' = W + s·B·A with the scale s, and removes them, in
    place; returns the model. DoRA's rows then get the lengths that were learnt.

    Raises ValueError if there are none, and for weights that are not finite.
    """
    layers = lora_layers(model)
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
        weight = base.weight.data.float()
        for adapter in layer.active_adapters:
            weight = weight + layer.get_delta_weight(adapter).float()
            if adapter in layer.lora_magnitude_vector:
                length = layer.lora_magnitude_vector[adapter].weight.float()
                weight *= (length / torch.linalg.norm(weight, dim=1))[:, None]
        # It is rounded once, however coarse the stored format is.
        weight = weight.to(base.weight.dtype)
        if not weight.isfinite().all():
            raise ValueError(
                f"{name}: the merged weight is not finite in {weight.dtype}; the adapter is"
                " damaged, or fp16 too small"
            )
        base.weight.data = weight
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, base)
    return model
