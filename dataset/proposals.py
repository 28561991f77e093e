"""The proposals of an image: run-length encoded masks, a store on disk, and what a model gets of
them.

The store has one small file per image, written in one step::

    <store>/<settings and SAM>/<2 digits>/<hash of the pixels>.json

Each file ends with its checksum, and what is read is proved to be masks of its image before it is
used. One that is damaged is computed again where SAM is at hand.

K proposals of one image · (h, w) the frame of the proposals: the original one, or smaller where the
longer side was over the generator's limit · P side of the pooling weights, which lie over the
padded square frame.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from pycocotools import mask as rle

from cores.dataset.files.errors import DamagedRecords, DataError
from cores.dataset.files.rle import run_lengths
from cores.dataset.files.sealed import seal, unseal
from cores.dataset.files.write import all_or_nothing

logger = logging.getLogger(__name__)


@dataclass
class Found:
    """All masks that the generator found in one image, not yet ranked or cut to a number."""

    size: tuple[int, int]
    """(h, w) of the masks."""
    masks: list[str]
    """COCO's compressed run lengths, one per mask."""
    areas: list[int]
    """In pixels of ``size``."""
    quality: list[float]
    """Predicted IoU × stability, each 0…1."""

    def refuse_other(self, image: tuple[int, ...]) -> None:
        """Raises ValueError for anything but masks of an image of this (H, W): pycocotools, to
        which they go, would loop for ever over runs of another length."""
        height, width = self.size
        full_height, full_width = image[:2]
        whole = all(type(side) is int and side > 0 for side in (height, width))
        # Masks of a large image are smaller, but of its shape; each side was rounded by itself.
        off = height * full_width - width * full_height if whole else 0
        if not whole or height > full_height or abs(off) > full_height + full_width:
            raise ValueError(f"size {self.size} is not that of the image")
        if not len(self.masks) == len(self.areas) == len(self.quality):
            raise ValueError("masks, areas and quality differ in number")
        for number, (counts, area, quality) in enumerate(
            zip(self.masks, self.areas, self.quality, strict=True)
        ):
            if not isinstance(counts, str):
                raise ValueError(f"mask {number} is no text of run lengths")
            run = run_lengths(counts)
            if run.sum() != height * width or not (run[1:] > 0).all():
                raise ValueError(f"the runs of mask {number} do not fill the image")
            if type(area) is not int or run[1::2].sum() != area:
                raise ValueError(f"mask {number} has another area than it says")
            if isinstance(quality, bool) or not isinstance(quality, (int, float)):
                raise ValueError(f"quality {number} is no number")
            if not math.isfinite(quality):
                raise ValueError(f"quality {number} is not finite")

    def ranked(self, ranking: str, count: int) -> list[int]:
        """Indices of the best ``count`` masks: the largest for "area" (published), those of the
        highest quality for "quality", both in turns for "mixed"."""
        by_area = sorted(range(len(self.masks)), key=lambda i: (-self.areas[i], i))
        by_quality = sorted(range(len(self.masks)), key=lambda i: (-self.quality[i], i))
        if ranking == "mixed":
            order = list(
                dict.fromkeys(i for pair in zip(by_area, by_quality, strict=True) for i in pair)
            )
        else:
            order = by_area if ranking == "area" else by_quality
        return order[:count]


@dataclass
class Proposals:
    """The proposals of one image as the model takes them."""

    size: tuple[int, int]
    """(h, w) of the masks."""
    masks: list[dict]
    """K × COCO run lengths, {"size", "counts"}."""
    weights: torch.Tensor
    """float32 (K, P, P): the share of each cell of the padded square frame that a proposal covers
    (anti-aliased)."""

    def __len__(self) -> int:
        return len(self.masks)

    def to(self, device: torch.device | str | None) -> Proposals:
        return dataclasses.replace(self, weights=self.weights.to(device))


def encode_counts(masks: np.ndarray) -> list[str]:
    """bool (K, h, w) -> the "counts" of K COCO run lengths, as ``Found.masks`` has them."""
    return [run["counts"].decode("ascii") for run in runs(masks)]


def runs(masks: np.ndarray) -> list[dict]:
    """bool (K, h, w) -> K × COCO run lengths."""
    return rle.encode(np.asfortranarray(masks.transpose(1, 2, 0), dtype=np.uint8))


def union(masks: list[dict], size: tuple[int, int]) -> np.ndarray:
    """Run lengths -> bool (h, w): where any of them is; all False without masks."""
    return rle.decode(rle.merge(masks)).astype(bool) if masks else np.zeros(size, dtype=bool)


def overlaps(
    proposals: list[dict], targets: np.ndarray, ignore: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """IoU and IoP (share of the proposal inside the target), float32 (T, K) each.

    ``proposals``: K run lengths of the frame of ``targets`` bool (T, h, w); ``ignore`` bool (h, w):
    pixels that count nowhere. Of two empty masks the IoU is 0, as nothing would be gained by
    choosing one.
    """
    if not proposals or not len(targets):
        return (np.zeros((len(targets), len(proposals)), dtype=np.float32),) * 2
    if ignore is not None and ignore.any():
        counted = runs(~ignore[None])[0]
        proposals = [rle.merge([mask, counted], intersect=True) for mask in proposals]
        targets = targets & ~ignore
    ground_truth = runs(targets)
    iou = rle.iou(proposals, ground_truth, [0] * len(targets))
    # Against a "crowd", COCO divides the intersection by the area of the proposal alone.
    iop = rle.iou(proposals, ground_truth, [1] * len(targets))
    return np.nan_to_num(iou.T).astype(np.float32), np.nan_to_num(iop.T).astype(np.float32)


def pooling_weights(masks: list[dict], size: tuple[int, int], side: int) -> torch.Tensor:
    """Run lengths of frame ``size`` -> float32 (K, side, side), see ``Proposals.weights``."""
    longest = max(size)
    out = np.zeros((len(masks), side, side), dtype=np.float32)
    square = np.zeros((longest, longest), dtype=np.float32)
    for weights, mask in zip(out, masks, strict=True):
        square[: size[0], : size[1]] = rle.decode(mask)
        method = cv2.INTER_AREA if longest >= side else cv2.INTER_LINEAR
        weights[:] = cv2.resize(square, (side, side), interpolation=method)
    return torch.from_numpy(out)


class ProposalStore:
    """Reads and writes one file per image; keeps nothing in memory."""

    def __init__(self, folder: str | Path, settings: str):
        """``settings``: the name of generator settings and weights, which is made by
        ``proposals_fingerprint`` in model/selecting/proposals.py."""
        self.folder = Path(folder) / settings

    def path(self, image: np.ndarray) -> Path:
        """The file of uint8 (H, W, 3); it depends on the pixels, not on where they came from."""
        digest = hashlib.blake2b(str(image.shape).encode(), digest_size=16)
        digest.update(np.ascontiguousarray(image).data)
        name = digest.hexdigest()
        return self.folder / name[:2] / f"{name}.json"

    def read_or_none(self, image: np.ndarray) -> Found | None:
        """As ``read``, for who can compute it again: None for a damaged file, too, which is said
        once and replaced by what is written next."""
        try:
            return self.read(image)
        except DataError as error:
            logger.warning("%s; it is computed again", str(error).partition("; delete it")[0])
            return None

    def read(self, image: np.ndarray) -> Found | None:
        """None where nothing is stored. Raises DataError naming a file that cannot be read or holds
        anything but what was written for this image."""
        path = self.path(image)
        try:
            values = unseal(path.read_bytes())
            found = Found(**(values | {"size": tuple(values["size"])}))
            found.refuse_other(image.shape)
            return found
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, DamagedRecords) as error:
            raise DataError(
                f"{path}: not a file of proposals ({error}); delete it and compute it again"
                " (python -m utils.precompute_proposals with the flags of the run)"
            ) from error

    def write(self, image: np.ndarray, found: Found) -> None:
        """Writes all or nothing: a killed process leaves no half file, and two processes that write
        the same image use different partial files."""
        path = self.path(image)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        with all_or_nothing(path, partial):
            partial.write_bytes(seal(dataclasses.asdict(found)))
            partial.replace(path)


@dataclass
class ProposalSource:
    """Where a collator gets proposals from: the store, or else the generator, if there is one."""

    ranking: str = "area"
    count: int = 50
    """Proposals kept per image."""
    side: int = 256
    """P."""
    store: ProposalStore | None = None
    generate: Callable[[np.ndarray], Found] | None = None
    """Computes what the store lacks; the result is stored. None in data loading processes, which
    have no SAM."""

    def none(self, image: np.ndarray) -> Proposals:
        """No proposals, for an image without targets."""
        return Proposals(image.shape[:2], [], torch.zeros((0, self.side, self.side)))

    def __call__(self, image: np.ndarray, name: str) -> Proposals:
        """Proposals of uint8 (H, W, 3). ``name`` says in a DataError which image has none
        stored."""
        found = None
        if self.store is not None:
            can_compute = self.generate is not None
            found = self.store.read_or_none(image) if can_compute else self.store.read(image)
        if found is None:
            if self.generate is None:
                where = "no store is given (--proposals)"
                if self.store is not None:
                    where = f"{self.store.folder} has none"
                raise DataError(
                    f"{name}: no proposals, {where}; run python -m utils.precompute_proposals with"
                    " the flags of this run first"
                )
            found = self.generate(image)
            if self.store is not None:
                self.store.write(image, found)
        masks = [
            {"size": list(found.size), "counts": found.masks[i]}
            for i in found.ranked(self.ranking, self.count)
        ]
        return Proposals(found.size, masks, pooling_weights(masks, found.size, self.side))
