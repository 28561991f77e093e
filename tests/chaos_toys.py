"""Runs to be killed or stopped, and what must be true of them afterwards: see
tests/fork_server.py."""

import json
import time
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import torch

from cores.dataset.files.index import CocoIndex
from cores.utils.training import checkpoint
from cores.utils.training.log import read_log
from tests.backbone_toys import flags, toys
from tests.dataset_toys import write_json
from tests.fork_server import Trial, server

CHANGES = {
    "save_every": 1,
    "eval_mode": "teacher_forced",
    "dataset": "coco||reason_seg",
    "sample_rates": "1,1",
    "coco_data": "toy",
    "examples": 0,
    "gallery": 0,
}


@cache
def data() -> Path:
    """Adds images with COCO annotations and their index to the data of ``toys``."""
    root = toys() / "data" / "coco"
    images, annotations = [], []
    for i in range(4):
        picture = np.random.default_rng(i).integers(0, 120, (24, 32, 3), dtype=np.uint8)
        picture[4 : 12 + i, 6:16] = 230
        (root / "toy").mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(root / "toy" / f"{i}.jpg"), picture)
        images.append({"id": i, "file_name": f"{i}.jpg", "height": 24, "width": 32})
        corners = [6, 4, 15, 4, 15, 11 + i, 6, 11 + i]
        annotations.append(
            {"id": i, "image_id": i, "category_id": 1, "segmentation": [corners], "iscrowd": 0}
        )
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "dog"}],
    }
    CocoIndex.open(write_json(root / "annotations" / "instances_toy.json", content))
    return root


def command(name: str, **changes: object) -> list[str]:
    data()
    return flags(toys(), exp_name=name, **CHANGES | changes)


def run_of(name: str) -> Path:
    return toys() / "runs" / name


def whole(ranks: int = 1, **changes: object) -> tuple[Path, Trial, float]:
    """A run that nothing happened to, and how many seconds it took."""
    return _whole(ranks, tuple(changes.items()))


@cache
def _whole(ranks: int, changes: tuple) -> tuple[Path, Trial, float]:
    name = f"whole-{ranks}-{len(changes)}"
    server()
    started = time.perf_counter()
    trial = server().run("cores.train_ds", command(name, **dict(changes)), ranks=ranks)
    assert set(trial.codes) == {0}, trial.output
    return run_of(name), trial, time.perf_counter() - started


def rows(run: Path) -> list[dict]:
    """The log without what depends on the clock."""
    return [
        {k: v for k, v in row.items() if k != "samples_per_second"}
        for row in read_log(run / "log.jsonl")
    ]


def assert_same(run: Path, reference: Path) -> None:
    assert rows(run) == rows(reference)
    assert (run / "log.jsonl").read_text().count("\n") == len(rows(run)), (
        "no damaged line in the log"
    )
    for which in ("last", "best"):
        ours, theirs = run / "ckpt" / which, reference / "ckpt" / which
        assert checkpoint.faults(ours) == []
        assert checkpoint.read_progress(ours) == checkpoint.read_progress(theirs)
        weights, expected = checkpoint.read_weights(ours), checkpoint.read_weights(theirs)
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in weights)
    scores = [
        json.loads((r / "metrics.json").read_text())["teacher_forced"]["giou"]
        for r in (run, reference)
    ]
    assert scores[0] == scores[1]
