"""Pictures of what changed between two results whose evaluations kept their masks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from cores.dataset.files.errors import DataError
from cores.dataset.files.rle import decode_rle
from cores.dataset.files.text import read_json
from cores.dataset.mixture import EvalDataset
from cores.dataset.sample import Sample
from cores.utils.metrics import mask_iou
from cores.utils.report.compare import Change, Comparison, Key, Targets
from cores.utils.report.gallery import TILE, encode_jpeg
from cores.utils.report.visualize import Example, errors, panels

HOW_TO = "measure both with --save_masks, which keeps them"


def draw_changes(found: Comparison) -> tuple[dict[Key, list[tuple[str, bytes]]], str]:
    """Target -> (caption, JPEG) of the picture, the ground truth and both answers, for the largest
    gains and losses; and why there are none."""
    try:
        masks = [_masks(targets) for targets in (found.a, found.b)]
        data = _data(found.a)
    except DataError as error:
        return {}, str(error)
    changes = [*found.gains, *found.losses]
    samples = _samples(data, {change.a.id for change in changes})
    drawn = {
        change.key: _tiles(change, samples[change.a.id], masks)
        for change in changes
        if change.a.id in samples
    }
    return drawn, "" if drawn else "the pictures of these targets were not found any more"


def _masks(targets: Targets) -> dict[tuple[str, int, int], Any]:
    """(id, conversation, target) -> run lengths."""
    file = targets.path.with_name(f"predictions-{targets.mode}.json")
    if not file.is_file():
        raise DataError(f"{targets.path.parent} has no masks; {HOW_TO}.")
    return {
        (str(entry["image_id"]), entry["conversation"], entry["target"]): entry["segmentation"]
        for entry in read_json(file)
    }


def _data(targets: Targets) -> EvalDataset:
    """The data set that was measured, where it is still there."""
    file = targets.path.with_name("metrics.json")
    config = (read_json(file) if file.is_file() else {}).get("config", {})
    try:
        return EvalDataset(
            config["dataset_dir"],
            targets.dataset,
            ("SEG",),
            exemplar_count=0,
            texts=targets.texts,
            follow_links=bool(config.get("follow_links")),
        )
    except (KeyError, ValueError, OSError) as error:
        raise DataError(f"the data set {targets.dataset} cannot be opened ({error}).") from None


def _samples(data: EvalDataset, wanted: Iterable[str]) -> dict[str, Sample]:
    """Only images whose file is called like a sample that is wanted are read."""
    names = {id.rpartition("/")[2] for id in wanted}
    found = {}
    for index in range(len(data)):
        path = Path(str(data.loader.path(index)))
        if path.stem in names or path.name in names:
            sample = data[index]
            found[sample.id] = sample
    return found


def _tiles(
    change: Change, sample: Sample, masks: list[dict[tuple[str, int, int], Any]]
) -> list[tuple[str, bytes]]:
    conversation = sample.conversations[change.a.conversation]
    target, ignore = conversation.masks[change.a.target], conversation.ignore
    example = Example(sample.image, "", "", [], None, target, ignore, "")
    tiles = panels(example, TILE)[:2]  # the picture and the ground truth
    for name, kept in zip("AB", masks, strict=True):
        rle = kept.get(change.key[1:])
        mask = None if rle is None else decode_rle(rle, target.shape, "predictions", name)
        caption = f"{name}: no mask"
        if mask is not None:
            caption = f"{name}: IoU {100 * mask_iou(np.asarray(mask), target, ignore):.0f}"
        tiles.append((caption, errors(sample.image, mask, target, ignore, TILE)))
    return [(caption, encode_jpeg(tile)) for caption, tile in tiles]
