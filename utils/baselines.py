"""What no reasoning at all would score. A benchmark is worth something only if these are low."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from dataset.images import decode_rle, read_json
from utils.metrics import ciou, giou, intersection_and_union, iou


def scene_baselines(record: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    """(IoU, intersection, union) of each trivial answer to one SynthReason record, which lists every object and part of its scene.

    Random answers are expectations over all candidates, so they need no seed: ``random part of the right name`` draws one part
    instance of the target's name among all objects of the scene, ``random object's parts of the right name`` draws an object and
    takes all its parts of that name.
    """
    objects = record["scene"]["objects"]
    decode = lambda rle: decode_rle(rle, tuple(rle["size"]), record["image"], "scene")  # noqa: E731
    masks = [decode(o["rle"]) for o in objects]
    parts = [[(p["name"], decode(p["rle"])) for p in o["parts"]] for o in objects]
    wanted = record["target"]["part"]
    truth = np.any([mask for name, mask in parts[record["target"]["object"]] if name == wanted], axis=0)
    named = [[mask for name, mask in own if name == wanted] for own in parts]
    instances = [mask for own in named for mask in own]
    unions = [np.any(own, axis=0) for own in named if own]
    return {
        "largest object": _mean([max(masks, key=lambda m: m.sum())], truth),
        "random part of the right name": _mean(instances, truth),
        "random object's parts of the right name": _mean(unions, truth),
    }


def _mean(candidates: list[np.ndarray], truth: np.ndarray) -> tuple[float, float, float]:
    pairs = np.array([intersection_and_union(c, truth) for c in candidates], dtype=float)
    return float(iou(pairs[:, 0], pairs[:, 1]).mean()), float(pairs[:, 0].mean()), float(pairs[:, 1].mean())


def baselines(data: Dataset) -> dict[str, dict[str, float]]:
    """name -> {"giou", "ciou"} (fractions) over an evaluation set. Data without scene descriptions have ``whole image`` only."""
    whole: list[tuple[int, int]] = []
    other: dict[str, list[tuple[float, float, float]]] = {}
    for index in tqdm(range(len(data)), desc="trivial baselines", leave=False, disable=None):
        sample = data[index]
        for conversation in sample.conversations:
            for truth in conversation.masks:
                whole.append(intersection_and_union(np.ones_like(truth), truth, conversation.ignore))
        for record in scene_records(Path(sample.image_path)):
            for name, row in scene_baselines(record).items():
                other.setdefault(name, []).append(row)
    pairs = np.array(whole, dtype=float).reshape(-1, 2)
    out = {"whole image": {"giou": giou(pairs[:, 0], pairs[:, 1]), "ciou": ciou(pairs[:, 0], pairs[:, 1])}}
    for name, rows in other.items():
        table = np.array(rows)
        out[name] = {"giou": float(table[:, 0].mean()), "ciou": float(table[:, 1].sum() / table[:, 2].sum())}
    return out


def scene_records(image: Path) -> list[dict[str, Any]]:
    """The SynthReason records of an image: the JSON files beside it, NAME_0.json and so on, that describe a scene."""
    records = [read_json(path) for path in sorted(image.parent.glob(f"{image.stem}_*.json"))]
    return [record for record in records if isinstance(record, dict) and "scene" in record]
