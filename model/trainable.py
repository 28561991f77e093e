"""What trains: LoRA in the language model, and in full the token embeddings, lm_head, the text
projection, SAM's mask decoder, the refiner and a selector. Everything else is frozen.
"""

from __future__ import annotations

from torch import nn

from cores.model.cores import CoresForReasoningSegmentation


def trainable_groups(model: CoresForReasoningSegmentation) -> dict[str, list[nn.Parameter]]:
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
    model: CoresForReasoningSegmentation, lora: bool = True, train_mask_decoder: bool = True
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
