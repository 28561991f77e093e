"""Scores of predicted masks: gIoU, cIoU, their intervals, emission, and where the chain went wrong.

H, W an image in the original frame · n scored targets. All scores are fractions in [0, 1]; only
tables print percent.

gIoU  mean over targets of intersection / union, where "nothing predicted, nothing there" is 1 (LISA, section 4.1)
cIoU  sum of all intersections / sum of all unions: large targets weigh more
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

Mask = TypeVar("Mask", np.ndarray, torch.Tensor)


@dataclass(frozen=True)
class TargetScore:
    """One target of one conversation. Areas are pixels of the original frame that are not
    ignored."""

    dataset: str
    id: str
    conversation: int
    """Index of the conversation in its sample."""
    target: int
    """Index of the target in its conversation."""
    query: str
    is_sentence: bool | None
    """ReasonSeg's long (True) or short (False) query; None where the data do not say."""
    inter: int
    union: int
    iou: float
    """Where the answer held no mask for this target: 0, or 1 where the target is empty."""
    emitted: bool
    """Whether the answer held a mask for this target; always True in teacher-forced evaluation."""
    surplus: int
    """Masks of the answer beyond the targets of the conversation; counted with its first target
    only."""
    target_area: int
    image_area: int | None = None
    """Pixels of the image, ignored ones included."""
    answer: str = ""
    """What the model said; "" in teacher-forced evaluation."""
    first_iou: float | None = None
    """IoU of the first level's mask with the target; None without a mask or with one level only."""
    first_host_iou: float | None = None
    """IoU of the first level's mask with the object that holds the target; None without a mask or a
    host."""
    inside_host: float | None = None
    """Share of the final mask that lies on the host; None without a host or with an empty mask."""

    @property
    def place(self) -> str:
        """The sample, with what tells its targets apart where there are several: "000", "000,
        conversation 1"."""
        extra = [
            f"{word} {value}"
            for word, value in (("conversation", self.conversation), ("target", self.target))
            if value
        ]
        return ", ".join([self.id, *extra])


def intersection_and_union(
    prediction: Mask, target: Mask, ignore: Mask | None = None
) -> tuple[Mask, Mask]:
    """Pixel counts int64 (...) of masks bool (..., H, W); ``ignore``, bool (H, W), takes pixels out
    of both."""
    both, either = prediction & target, prediction | target
    if ignore is not None:
        both, either = both & ~ignore, either & ~ignore
    return both.sum((-2, -1)), either.sum((-2, -1))


def iou(inter: float | np.ndarray, union: float | np.ndarray) -> np.ndarray:
    """inter / union, and 1 where both masks are empty."""
    inter, union = np.asarray(inter, dtype=float), np.asarray(union, dtype=float)
    return np.where(union > 0, inter / np.maximum(union, 1), 1.0)


def mask_iou(prediction: Mask, target: Mask, ignore: Mask | None = None) -> float:
    """IoU of two masks bool (H, W)."""
    inter, union = intersection_and_union(prediction, target, ignore)
    return float(iou(int(inter), int(union)))


def giou(scores: Sequence[float] | np.ndarray) -> float:
    """The exact mean of the IoU of every target (the published average adds 1e-5 to the count)."""
    return float(np.mean(scores))


def ciou(inter: Sequence[int] | np.ndarray, union: Sequence[int] | np.ndarray) -> float:
    """Sum of intersections over sum of unions; 1 if every union is empty."""
    return float(iou(np.sum(inter), np.sum(union)))


def bootstrap(
    inter: np.ndarray,
    union: np.ndarray,
    scores: np.ndarray,
    groups: Sequence | None = None,
    draws: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Percentile intervals {"giou": [low, high], "ciou": [low, high]} of n targets, the same for
    the same seed.

    ``groups``: n keys; targets of one key (an image) are drawn together, as they rise and fall
    together. None draws every target by itself. Raises ValueError without targets.
    """
    if len(scores) == 0:
        raise ValueError("no target was scored, so there is no interval; check the evaluation set")
    columns = np.stack(
        [np.asarray(c, dtype=float) for c in (scores, np.ones(len(scores)), inter, union)], axis=1
    )
    score, count, inters, unions = _resample(columns, groups, draws, seed).T
    return {
        "giou": _tails(score / count, confidence),
        "ciou": _tails(iou(inters, unions), confidence),
    }


def _resample(
    columns: np.ndarray, groups: Sequence[Hashable] | None, draws: int, seed: int
) -> np.ndarray:
    """Sums of the columns (n, c) over ``draws`` bootstrap samples of the groups: (draws, c)."""
    if groups is not None:
        index = {key: i for i, key in enumerate(dict.fromkeys(groups))}
        sums = np.zeros((len(index), columns.shape[1]))
        np.add.at(sums, [index[key] for key in groups], columns)
        columns = sums
    # how often each group is drawn: a matrix product then does all draws at once
    times = np.random.default_rng(seed).multinomial(
        len(columns), np.full(len(columns), 1 / len(columns)), size=draws
    )
    return times @ columns


def _tails(values: np.ndarray, confidence: float) -> list[float]:
    return np.percentile(values, [50 * (1 - confidence), 50 * (1 + confidence)]).tolist()


def paired_bootstrap(
    a: Sequence[TargetScore],
    b: Sequence[TargetScore],
    draws: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """{"giou": …, "ciou": …} of b minus a, where a[i] and b[i] are answers to the same target.

    Each entry holds ``difference``, its percentile interval ``ci95`` over images, drawn together
    for both sides, and ``share_above_zero`` of the draws. Raises ValueError for no or unequal
    numbers of targets.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"paired bootstrap: {len(a)} and {len(b)} targets cannot be paired")
    columns = np.array(
        [[1.0, x.iou, x.inter, x.union, y.iou, y.inter, y.union] for x, y in zip(a, b, strict=True)]
    )
    sums = _resample(columns, [(x.dataset, x.id) for x in a], draws, seed)

    def differences(table: np.ndarray) -> dict[str, np.ndarray]:
        n, iou_a, inter_a, union_a, iou_b, inter_b, union_b = table.T
        return {"giou": (iou_b - iou_a) / n, "ciou": iou(inter_b, union_b) - iou(inter_a, union_a)}

    found, drawn = differences(columns.sum(0)[None]), differences(sums)
    return {
        name: {
            "difference": float(found[name][0]),
            "ci95": _tails(drawn[name], confidence),
            "share_above_zero": float((drawn[name] > 0).mean()),
        }
        for name in found
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def summarise(scores: Sequence[TargetScore], seed: int = 0, draws: int = 1000) -> dict:
    """The numbers of a report. None stands for what the data do not tell. Raises ValueError without
    targets.

    ==================  ===========================================================================================
    unit                "fraction"
    n                   scored targets
    giou, ciou          targets without a mask count as IoU 0 (1 if empty), with their area in the union
    giou_ci95, ciou_…   bootstrap 95 % intervals over images
    giou_short, _long   gIoU of short and of long queries
    emission_rate       share of targets that got a mask
    surplus_rate        masks beyond the targets, per target
    first_iou           mean IoU of the first level's mask with the target
    first_host_iou      mean IoU of the first level's mask with the host
    wrong_host_rate     share of non-empty final masks that lie for more than half outside the host
    ==================  ===========================================================================================
    """
    if not scores:
        raise ValueError(
            "no target was scored; check the evaluation set: it holds no query with a mask"
        )
    return {
        "unit": "fraction",
        **_core_summary(scores, seed, draws),
        "giou_short": _mean([s.iou for s in scores if s.is_sentence is False]),
        "giou_long": _mean([s.iou for s in scores if s.is_sentence is True]),
        "emission_rate": _mean([s.emitted for s in scores]),
        "surplus_rate": _mean([s.surplus for s in scores]),
        "first_iou": _mean([s.first_iou for s in scores]),
        "first_host_iou": _mean([s.first_host_iou for s in scores]),
        "wrong_host_rate": _mean(
            [None if s.inside_host is None else float(s.inside_host < 0.5) for s in scores]
        ),
    }


# class -> [from, below)
QUERY_LENGTHS = {
    "1–8 words": (0, 9),
    "9–12 words": (9, 13),
    "13–16 words": (13, 17),
    "17–24 words": (17, 25),
    "25 words and more": (25, np.inf),
}
QUERY_KINDS = {"short (phrases)": (0, 1), "long (sentences)": (1, 2)}  # ReasonSeg's own
TARGET_SIZES = {
    "no target": (0, 1e-12),
    "under 1 % of the image": (1e-12, 0.01),
    "1–5 % of the image": (0.01, 0.05),
    "5–20 % of the image": (0.05, 0.2),
    "20 % of the image and more": (0.2, np.inf),
}  # fmt: skip


def breakdown(scores: Sequence[TargetScore], seed: int = 0) -> dict[str, dict[str, dict[str, Any]]]:
    """{"query_length", "query_kind", "target_size"} -> class -> {n, giou, giou_ci95, ciou,
    ciou_ci95}; empty classes are left out.

    The length of a query counts the words of the question as it was asked, the request for a mask
    included.
    """
    words = [len(score.query.split()) for score in scores]
    shares = [
        np.nan if score.image_area is None else score.target_area / score.image_area
        for score in scores
    ]
    return {
        "query_length": _by_class(scores, words, QUERY_LENGTHS, seed),
        "query_kind": _by_class(
            scores,
            [np.nan if s.is_sentence is None else s.is_sentence for s in scores],
            QUERY_KINDS,
            seed,
        ),
        "target_size": _by_class(scores, shares, TARGET_SIZES, seed),
    }


def _by_class(
    scores: Sequence[TargetScore], values: Sequence[float], classes: dict[str, tuple], seed: int
) -> dict[str, dict]:
    members = {
        name: [score for score, value in zip(scores, values, strict=True) if low <= value < high]
        for name, (low, high) in classes.items()
    }
    return {name: _core_summary(found, seed) for name, found in members.items() if found}


def _core_summary(scores: Sequence[TargetScore], seed: int, draws: int = 1000) -> dict[str, Any]:
    inter, union = np.array([s.inter for s in scores]), np.array([s.union for s in scores])
    ious = np.array([s.iou for s in scores])
    intervals = bootstrap(
        inter, union, ious, [(s.dataset, s.id) for s in scores], draws=draws, seed=seed
    )
    return {
        "n": len(scores),
        "giou": giou(ious),
        "giou_ci95": intervals["giou"],
        "ciou": ciou(inter, union),
        "ciou_ci95": intervals["ciou"],
    }


def score_target(
    masks: torch.Tensor | None,
    target: torch.Tensor,
    ignore: torch.Tensor | None,
    host: torch.Tensor | None,
) -> dict:
    """The measured fields of a TargetScore.

    ``masks``: bool (T, H, W), coarse to fine, or None if the answer holds none for this target,
    which is as good as an empty mask: wrong, unless nothing was meant (gRefCOCO); ``target``,
    ``ignore`` and ``host``: bool (H, W) on the same device.
    """
    kept = target if ignore is None else target & ~ignore
    areas = {"target_area": int(kept.sum()), "image_area": target.shape[-2] * target.shape[-1]}
    if masks is None:
        return {
            "inter": 0,
            "union": areas["target_area"],
            "iou": float(not target.any()),
            "emitted": False,
            **areas,
        }
    inter, union = (int(count) for count in intersection_and_union(masks[-1], target, ignore))
    found = {
        "inter": inter,
        "union": union,
        "iou": float(iou(inter, union)),
        "emitted": True,
        **areas,
    }
    if len(masks) > 1:
        found["first_iou"] = mask_iou(masks[0], target, ignore)
    if host is not None:
        found["first_host_iou"] = mask_iou(masks[0], host, ignore)
        final = masks[-1] if ignore is None else masks[-1] & ~ignore
        if final.any():
            found["inside_host"] = float((final & host).sum() / final.sum())
    return found
