"""Losses against numbers worked out by hand: empty, full and ignored masks."""

from math import exp, inf, isclose, log, log1p

import pytest
import torch

from cores.model.losses import bce_per_mask, dice_per_mask, pointing_per_token, text_loss

SURE = 40.0  # a logit whose sigmoid is 1 in float32


def masks(*rows) -> torch.Tensor:
    """(1, H, W) of nested lists."""
    return torch.tensor(rows, dtype=torch.float32)[None]


def test_bce_is_the_mean_over_pixels():
    logits, target = masks([0.0, 2.0], [-1.0, 0.0]), masks([1.0, 1.0], [0.0, 0.0])
    expected = (log(2) + log1p(exp(-2)) + log1p(exp(-1)) + log(2)) / 4
    assert bce_per_mask(logits, target).tolist() == pytest.approx([expected])


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_bce_of_empty_and_full_targets(fill, balance):
    """Undecided everywhere costs ln 2, also where one half of the balanced form is missing."""
    target = torch.full((2, 3, 4), fill)
    assert bce_per_mask(torch.zeros(2, 3, 4), target, balance=balance).tolist() == pytest.approx(
        [log(2)] * 2
    )
    assert bce_per_mask((2 * target - 1) * SURE, target, balance=balance).tolist() == pytest.approx(
        [0.0] * 2, abs=1e-6
    )


def test_balanced_bce_gives_each_half_half():
    """One target pixel of four, all predicted empty: the plain mean is content, the balanced one is
    not."""
    logits, target = torch.full((1, 2, 2), -1.0), masks([1.0, 0.0], [0.0, 0.0])
    miss, right = log1p(exp(1)), log1p(exp(-1))
    assert bce_per_mask(logits, target).item() == pytest.approx((miss + 3 * right) / 4)
    assert bce_per_mask(logits, target, balance=True).item() == pytest.approx((miss + right) / 2)


def test_ignored_pixels_count_nowhere():
    logits, target = masks([0.0, 9.0], [5.0, 0.0]), masks([1.0, 0.0], [0.0, 0.0])
    ignore = torch.tensor([[False, True], [True, False]])
    assert bce_per_mask(logits, target, ignore).item() == pytest.approx(log(2))
    assert bce_per_mask(logits, target, ignore, balance=True).item() == pytest.approx(log(2))
    # p = 0.5 on the two pixels that count, one of them target: 1 - (2·0.0005 + ε) / (0.001 + 0.001
    # + ε)
    assert dice_per_mask(logits, target, ignore).item() == pytest.approx(
        1 - (0.001 + 1e-6) / (0.002 + 1e-6), rel=1e-5
    )


def test_ignore_of_a_target_leaves_its_rest():
    logits, target = masks([SURE, -SURE]), masks([1.0, 1.0])
    ignore = torch.tensor([[False, True]])
    assert dice_per_mask(logits, target, ignore).item() == pytest.approx(0, abs=1e-6)
    assert dice_per_mask(logits, target).item() == pytest.approx(
        1 - (0.002 + 1e-6) / (0.003 + 1e-6), rel=1e-5
    )


def test_ignore_may_differ_per_mask():
    logits, target = torch.zeros(2, 1, 2), torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]])
    logits[:, :, 1] = SURE  # wrong on the second pixel
    ignore = torch.tensor([[[False, True]], [[False, False]]])
    assert bce_per_mask(logits, target, ignore).tolist() == pytest.approx(
        [log(2), (log(2) + SURE) / 2]
    )


def test_everything_ignored_is_nothing_and_has_a_gradient():
    logits = torch.zeros(1, 2, 2, requires_grad=True)
    ignore = torch.ones(2, 2, dtype=torch.bool)
    target = torch.ones(1, 2, 2)
    total = bce_per_mask(logits, target, ignore) + bce_per_mask(
        logits, target, ignore, balance=True
    )
    total = total + dice_per_mask(logits, target, ignore)
    total.sum().backward()
    assert total.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_dice_by_hand():
    """p = (1, 0.5), y = (1, 0): 1 - (2·1 / 1000 + ε) / (1.5 / 1000 + 1 / 1000 + ε)."""
    expected = 1 - (0.002 + 1e-6) / (0.0025 + 1e-6)
    assert dice_per_mask(masks([SURE, 0.0]), masks([1.0, 0.0])).item() == pytest.approx(
        expected, rel=1e-5
    )


def test_dice_of_empty_and_full():
    empty, full = torch.zeros(1, 4, 5), torch.ones(1, 4, 5)
    # both empty: ε / ε
    assert dice_per_mask(full * -SURE * 3, empty).item() == pytest.approx(0, abs=1e-4)
    assert dice_per_mask(full * SURE, full).item() == pytest.approx(0, abs=1e-6)
    assert dice_per_mask(full * SURE, empty).item() == pytest.approx(
        1 - 1e-6 / (0.02 + 1e-6), rel=1e-5
    )
    assert dice_per_mask(full * -SURE, full).item() == pytest.approx(
        1 - 1e-6 / (0.02 + 1e-6), rel=1e-5
    )


def test_masks_are_independent():
    generator = torch.Generator().manual_seed(0)
    logits, target = (
        torch.randn(3, 5, 6, generator=generator),
        (torch.rand(3, 5, 6, generator=generator) > 0.5).float(),
    )
    for loss in (bce_per_mask, dice_per_mask):
        together = loss(logits, target)
        assert torch.allclose(
            together, torch.cat([loss(logits[i : i + 1], target[i : i + 1]) for i in range(3)])
        )


def test_pointing_by_hand():
    """Two cells with encodings (2, 0) and (0, 2), C = 2: the logits of token (a, b) are √2·(a,
    b)."""
    position = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    token = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    # the amount of area does not matter, its share does
    area = torch.tensor([[0.5, 0.0], [0.1, 0.3], [0.0, 1.0]])
    first, second = 2**0.5 - log(exp(2**0.5) + 1), -log(exp(2**0.5) + 1)
    expected = [-first, -(0.25 * first + 0.75 * second), log(2)]
    assert pointing_per_token(token, position, area).tolist() == pytest.approx(expected, rel=1e-5)


def test_pointing_at_nothing_costs_nothing():
    token = torch.ones(1, 2, requires_grad=True)
    loss = pointing_per_token(token, torch.eye(2), torch.zeros(1, 2))
    loss.sum().backward()
    assert loss.item() == 0
    assert torch.equal(token.grad, torch.zeros(1, 2))
    assert pointing_per_token(torch.zeros(0, 2), torch.eye(2), torch.zeros(0, 2)).shape == (0,)


def test_text_loss_is_the_mean_over_tokens():
    logits = torch.tensor([[0.0, 0.0], [log(3), 0.0]])
    assert text_loss(logits, torch.tensor([0, 1])).item() == pytest.approx((log(2) + log(4)) / 2)
    assert text_loss(logits.bfloat16(), torch.tensor([0, 1])).dtype == torch.float32


def test_text_loss_without_labels_keeps_the_graph():
    weight = torch.ones(3, 2, requires_grad=True)
    loss = text_loss(torch.zeros(0, 3) @ weight, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(weight.grad, torch.zeros(3, 2))


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[[1e4, -1e4]]], requires_grad=True)
    total = (
        bce_per_mask(logits, masks([0.0, 1.0])) + dice_per_mask(logits, masks([0.0, 1.0]))
    ).sum()
    total.backward()
    assert isclose(total.item(), 1e4, rel_tol=1e-3)
    assert total.item() < inf
    assert logits.grad.isfinite().all()
