"""What a step of the optimizer does with the gradient, against AdamW written by hand: every setting
of the optimizer acts, and on what it is for."""

import numpy as np
import pytest
import torch
from torch import nn

from cores.utils import distributed
from cores.utils.settings.arguments import parse
from cores.utils.training.deepspeed import make_engine

TOLERANCE = 1e-6  # weights of about 1, float32 against float64; measured: 6e-8
GRADIENTS = np.array([[3.0, -4.0, 0.5], [0.2, 0.1, -0.1], [-6.0, 2.0, 3.0], [0.3, 0.9, 0.1]])
START = np.array([1.0, -2.0, 0.5])
# each far from its default and from what it might be mistaken for
SETTINGS = {
    "lr": 0.1,
    "beta1": 0.5,
    "beta2": 0.8,
    "weight_decay": 0.3,
    "max_grad_norm": 0.7,
    "warmup_steps": 2,
    "epochs": 2,
    "steps_per_epoch": 2,
}


def by_hand(
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    max_grad_norm: float,
    warmup_steps: int,
    epochs: int,
    steps_per_epoch: int,
) -> np.ndarray:
    """The weights after one step for each row of GRADIENTS (Loshchilov and Hutter, algorithm 2)."""
    weight, first, second = START.copy(), 0.0, 0.0
    total = epochs * steps_per_epoch
    for step, gradient in enumerate(GRADIENTS):
        rate = lr * (
            (step + 1) / warmup_steps
            if step < warmup_steps
            else (total - step) / (total - warmup_steps)
        )
        gradient = gradient * min(1.0, max_grad_norm / np.linalg.norm(gradient))
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        m, v = first / (1 - beta1 ** (step + 1)), second / (1 - beta2 ** (step + 1))
        weight = weight * (1 - rate * weight_decay) - rate * m / (np.sqrt(v) + 1e-8)
    return weight


def by_engine(stage: int, **settings: float) -> np.ndarray:
    """Likewise, by the engine that training uses."""
    distributed.start()
    argv = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    s = parse([*argv, "--zero_stage", str(stage), "--precision", "fp32", "--batch_size", "1"])
    s.grad_accumulation_steps = 1
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(START))
    engine = make_engine(model, s)
    for gradient in GRADIENTS:
        engine.backward(engine(torch.from_numpy(gradient).float()[None]).sum())
        engine.step()
    return model.weight.detach().double().numpy()[0]


@pytest.mark.parametrize("stage", [0, 2])
def test_steps_are_adamw_with_clipping_and_warm_up(stage):
    np.testing.assert_allclose(by_engine(stage, **SETTINGS), by_hand(**SETTINGS), atol=TOLERANCE)


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 0.2},
        {"beta1": 0.8},
        {"beta2": 0.5},
        {"beta1": 0.8, "beta2": 0.5},
        {"weight_decay": 0.0},
        {"max_grad_norm": 1e6},
        {"warmup_steps": 1},
        {"epochs": 3},
    ],
    ids=str,
)
def test_each_setting_of_the_optimizer_acts(change):
    """So the test above can fail: no two of these settings have the same weights."""
    assert np.abs(by_hand(**SETTINGS | change) - by_hand(**SETTINGS)).max() > 1000 * TOLERANCE
