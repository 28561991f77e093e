"""DeepSpeed: its configuration, the learning rate, and the engine around a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cores.model.cores import CoresForReasoningSegmentation
from cores.model.reasoning.lora import fast_parameters
from cores.utils.settings.arguments import Settings


def deepspeed_config(s: Settings) -> dict[str, Any]:
    """The optimizer is not part of it: ``make_engine`` gives torch's AdamW, even for offloading, as
    DeepSpeed's own would have to be compiled on the user's machine."""
    cuda = torch.cuda.is_available()
    zero: dict[str, Any] = {
        "stage": s.zero_stage,
        "contiguous_gradients": True,
        "overlap_comm": cuda,
    }
    if s.offload == "optimizer":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    return {
        "train_micro_batch_size_per_gpu": s.batch_size,
        "gradient_accumulation_steps": s.grad_accumulation_steps,
        "gradient_clipping": s.max_grad_norm,
        "bf16": {"enabled": s.precision == "bf16"},
        "fp16": {"enabled": s.precision == "fp16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def learning_rate_factor(s: Settings) -> Callable[[int], float]:
    """Optimizer step, from 0 on -> share of every group's peak: linear warm-up to 1, then linear
    decay to 0 after the last step. A run with --start_epoch begins in the middle."""
    total = s.epochs * s.steps_per_epoch

    def factor(step: int) -> float:
        step += s.start_epoch * s.steps_per_epoch
        if step < s.warmup_steps:
            return (step + 1) / s.warmup_steps
        return max(0.0, (total - step) / max(1, total - s.warmup_steps))

    return factor


def parameter_groups(model: nn.Module, s: Settings) -> list[dict[str, Any]]:
    """The trainable weights as torch's optimizers take them: one group, or with LoRA+ a second one
    with the higher learning rate."""
    fast = fast_parameters(model) if s.loraplus_lr_ratio != 1 else []
    known = {id(p) for p in fast}
    slow = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups: list[dict[str, Any]] = [{"params": slow}]
    if fast:
        groups.append({"params": fast, "lr": s.lr * s.loraplus_lr_ratio})
    return groups


def make_engine(model: CoresForReasoningSegmentation, s: Settings):
    """The DeepSpeed engine around ``model``, with an optimizer of its trainable weights."""
    import deepspeed

    # Without this, DeepSpeed would compile an extension at run time; gloo does the same job.
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    groups = parameter_groups(model, s)
    optimizer = torch.optim.AdamW(
        groups, lr=s.lr, betas=(s.beta1, s.beta2), weight_decay=s.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(s))
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        model_parameters=[p for group in groups for p in group["params"]],
        lr_scheduler=schedule,
        config=deepspeed_config(s),
    )
    return engine
