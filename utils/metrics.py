"""Scores of predicted masks: gIoU, cIoU, their intervals, emission, and where the chain went wrong.

H, W an image in the original frame · n scored targets. All scores are fractions in [0, 1]; only
tables print percent.

gIoU  mean over targets of intersection / union, where an empty prediction of an empty target
      counts as 1 (LISA, section 4.1)
cIoU  sum of all intersections / sum of all unions: large targets weigh more
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

Mask = TypeVar("Mask", np.ndarray, "torch.Tensor")

CONFIDENCE = 0.95  # The level of all intervals.
DRAWS, PAIRED_DRAWS = 1000, 10_000  # bootstrap samples of one system, and of two that are compared


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
    extra_masks: int
    """Masks of the answer beyond the targets of the conversation; the first target carries the
    count, the others 0."""
    target_area: int
    image_area: int | None = None
    """Pixels of the image, ignored ones included."""
    answer: str = ""
    """The generated text; "" in teacher-forced evaluation."""
    first_iou: float | None = None
    """IoU of the first level's mask with the target; None without a mask or with one level only."""
    first_host_iou: float | None = None
    """IoU of the first level's mask with the object that holds the target; None without a mask or a
    host."""
    inside_host: float | None = None
    """Share of the final mask that lies on the host; None without a host or with an empty mask."""

    @property
    def place(self) -> str:
        """Names the target within its data set, without the indices that are 0: "000", or "000,
        conversation 1, target 2"."""
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
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> dict[str, list[float]]:
    """95 % percentile intervals {"giou": [low, high], "ciou": [low, high]} of n targets, the same
    for the same seed.

    ``inter``, ``union``, ``scores``: (n,), pixels, pixels and IoUs. ``groups``: n keys; the targets
    of one key (an image) are drawn together, because their scores are correlated. None draws every
    target by itself. Raises ValueError without targets.
    """
    if len(scores) == 0:
        raise ValueError("no target was scored, so there is no interval; check the evaluation set")
    columns = np.stack(
        [np.asarray(c, dtype=float) for c in (scores, np.ones(len(scores)), inter, union)], axis=1
    )
    score, count, inters, unions = _resample(columns, groups, DRAWS, seed).T
    return {"giou": _interval(score / count), "ciou": _interval(iou(inters, unions))}


def overlap_summary(
    overlaps: Sequence[tuple[float, float, float]], groups: Sequence[Hashable], seed: int = 0
) -> dict[str, Any]:
    """{n, giou, giou_ci95, ciou, ciou_ci95} (fractions) of ``overlaps``, the intersection, union
    and IoU of every target. ``groups``, ``seed``: see ``bootstrap``."""
    inter, union, ious = np.asarray(overlaps, dtype=float).reshape(-1, 3).T
    intervals = bootstrap(inter, union, ious, groups, seed)
    return {
        "n": len(ious),
        "giou": giou(ious),
        "giou_ci95": intervals["giou"],
        "ciou": ciou(inter, union),
        "ciou_ci95": intervals["ciou"],
    }


def _score_summary(scores: Sequence[TargetScore], seed: int) -> dict[str, Any]:
    overlaps = [(s.inter, s.union, s.iou) for s in scores]
    return overlap_summary(overlaps, [(s.dataset, s.id) for s in scores], seed)


def _resample(
    columns: np.ndarray, groups: Sequence[Hashable] | None, draws: int, seed: int
) -> np.ndarray:
    """Sums of the columns (n, c) over ``draws`` bootstrap samples of the groups: (draws, c)."""
    if groups is not None:
        index = {key: i for i, key in enumerate(dict.fromkeys(groups))}
        sums = np.zeros((len(index), columns.shape[1]))
        np.add.at(sums, [index[key] for key in groups], columns)
        columns = sums
    # A draw is a row of counts, how often each group was drawn, so that one matrix product sums up
    # all draws.
    times = np.random.default_rng(seed).multinomial(
        len(columns), np.full(len(columns), 1 / len(columns)), size=draws
    )
    return times @ columns


def _interval(values: np.ndarray) -> list[float]:
    """[low, high]: what lies outside are 2.5 % of the values on either side."""
    return np.percentile(values, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)]).tolist()


def paired_bootstrap(
    a: Sequence[TargetScore],
    b: Sequence[TargetScore],
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
    sums = _resample(columns, [(x.dataset, x.id) for x in a], PAIRED_DRAWS, seed)

    def differences(table: np.ndarray) -> dict[str, np.ndarray]:
        n, iou_a, inter_a, union_a, iou_b, inter_b, union_b = table.T
        return {"giou": (iou_b - iou_a) / n, "ciou": iou(inter_b, union_b) - iou(inter_a, union_a)}

    found, drawn = differences(columns.sum(0)[None]), differences(sums)
    return {
        name: {
            "difference": float(found[name][0]),
            "ci95": _interval(drawn[name]),
            "share_above_zero": float((drawn[name] > 0).mean()),
        }
        for name in found
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def summarise_scores(scores: Sequence[TargetScore], seed: int = 0) -> dict[str, Any]:
    """The numbers of a report; None stands for what the data do not tell.

    ===================  ==========================================================================
    unit                 "fraction"
    n                    scored targets
    giou, ciou           a target without a mask counts as IoU 0 (1 if it is empty), with its area
                         in the union
    giou_ci95, ciou_…    bootstrap 95 % intervals over images
    giou_short, …_long   gIoU of short and of long queries
    emission_rate        share of targets that got a mask
    extra_masks_rate     masks beyond the targets, per target
    first_iou            mean IoU of the first level's mask with the target
    first_host_iou       mean IoU of the first level's mask with the host
    wrong_host_rate      share of non-empty final masks of which more than half lies outside the
                         host
    ===================  ==========================================================================

    Raises ValueError without targets.
    """
    if not scores:
        raise ValueError(
            "no target was scored; check the evaluation set: it holds no query with a mask"
        )
    return {
        "unit": "fraction",
        **_score_summary(scores, seed),
        "giou_short": _mean([s.iou for s in scores if s.is_sentence is False]),
        "giou_long": _mean([s.iou for s in scores if s.is_sentence is True]),
        "emission_rate": _mean([s.emitted for s in scores]),
        "extra_masks_rate": _mean([s.extra_masks for s in scores]),
        "first_iou": _mean([s.first_iou for s in scores]),
        "first_host_iou": _mean([s.first_host_iou for s in scores]),
        "wrong_host_rate": _mean(
            [None if s.inside_host is None else float(s.inside_host < 0.5) for s in scores]
        ),
    }


# The classes of a breakdown: name -> (lowest value, first value beyond it).
QUERY_LENGTHS = {
    "1–8 words": (0, 9),
    "9–12 words": (9, 13),
    "13–16 words": (13, 17),
    "17–24 words": (17, 25),
    "25 words and more": (25, np.inf),
}
QUERY_KINDS = {"short (phrases)": (0, 1), "long (sentences)": (1, 2)}  # ReasonSeg's is_sentence
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
    kinds = [np.nan if s.is_sentence is None else float(s.is_sentence) for s in scores]
    lengths = [float(len(s.query.split())) for s in scores]
    sizes = [np.nan if s.image_area is None else s.target_area / s.image_area for s in scores]
    return {
        "query_length": _by_class(scores, lengths, QUERY_LENGTHS, seed),
        "query_kind": _by_class(scores, kinds, QUERY_KINDS, seed),
        "target_size": _by_class(scores, sizes, TARGET_SIZES, seed),
    }


def _by_class(
    scores: Sequence[TargetScore], values: Sequence[float], classes: dict[str, tuple], seed: int
) -> dict[str, dict]:
    members = {
        name: [score for score, value in zip(scores, values, strict=True) if low <= value < high]
        for name, (low, high) in classes.items()
    }
    return {name: _score_summary(found, seed) for name, found in members.items() if found}


def score_target(
    masks: torch.Tensor | None,
    target: torch.Tensor,
    ignore: torch.Tensor | None,
    host: torch.Tensor | None,
) -> dict:
    """The measured fields of a TargetScore.

    ``masks``: bool (T, H, W), coarse to fine, or None if the answer holds none for this target,
    which scores like an empty mask: 0, or 1 where the target is empty (gRefCOCO). ``target``,
    ``ignore`` and ``host``: bool (H, W) on the same device.
    """
    counted = target if ignore is None else target & ~ignore
    area = int(counted.sum())
    areas = {"target_area": area, "image_area": target.shape[-2] * target.shape[-1]}
    if masks is None:
        return {"inter": 0, "union": area, "iou": float(not target.any()), "emitted": False} | areas
    inter, union = (int(count) for count in intersection_and_union(masks[-1], target, ignore))
    found = {"inter": inter, "union": union, "iou": float(iou(inter, union)), "emitted": True}
    if len(masks) > 1:
        found["first_iou"] = mask_iou(masks[0], target, ignore)
    if host is not None:
        found["first_host_iou"] = mask_iou(masks[0], host, ignore)
        final = masks[-1] if ignore is None else masks[-1] & ~ignore
        if final.any():
            found["inside_host"] = float((final & host).sum() / final.sum())
    return found | areas
