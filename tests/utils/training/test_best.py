"""Which epoch becomes ``best``, and when epochs are measured."""

import json
from types import SimpleNamespace

import pytest
import torch

from cores import train_ds
from cores.dataset.mixture import TrainMixture
from cores.utils.training import checkpoint
from tests.backbone_toys import flags, toys

STEPS = 1  # of an epoch


def train(monkeypatch, name: str, giou: list[float], **changes: object) -> None:
    """A run of one step an epoch whose n-th evaluation finds ``giou[n]``."""
    found = iter(giou)

    def evaluate(model, *_: object, **__: object) -> SimpleNamespace:
        assert not model.training
        return SimpleNamespace(summary={"giou": next(found)}, line=lambda: "")

    monkeypatch.setattr(train_ds, "evaluate", evaluate)
    monkeypatch.setattr(train_ds, "final_evaluation", lambda *_: {})
    settings = {"epochs": len(giou), "steps_per_epoch": STEPS, "lr": 0.01, "warmup_steps": 0}
    argv = flags(toys(), exp_name=name, **settings | changes)
    assert train_ds.main(argv) == 0


@pytest.mark.parametrize(
    ("giou", "epoch"),
    [([0.2, 0.5, 0.3], 2), ([0.4, 0.4, 0.1], 1)],
    ids=str,
)
def test_best_is_the_epoch_with_the_highest_giou(monkeypatch, giou, epoch):
    """The first one of several."""
    name = f"best-{'-'.join(map(str, giou))}"
    train(monkeypatch, name, giou)
    run = toys() / "runs" / name
    best, last = (checkpoint.read_progress(run / "ckpt" / which) for which in ("best", "last"))
    assert best["epoch"] == epoch and best["best"] == max(giou)
    assert last["epoch"] == 3 and last["best"] == max(giou) and last["best_step"] == epoch * STEPS
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["giou"] for row in rows if row["kind"] == "val"] == giou
    name = "text_projection.0.weight"
    weights = [checkpoint.read_weights(run / "ckpt" / which)[name] for which in ("best", "last")]
    assert torch.equal(*weights) == (epoch == 3)


def test_epochs_between_evaluations(monkeypatch):
    """--eval_every 2 of five epochs: after the second, the fourth, and the last one always."""
    name = "every-second"
    settings = {"epochs": 5, "eval_every": 2}
    train(monkeypatch, name, [0.1, 0.2, 0.3], **settings)
    rows = [
        json.loads(line) for line in (toys() / "runs" / name / "log.jsonl").read_text().splitlines()
    ]
    assert [row["epoch"] for row in rows if row["kind"] == "val"] == [2, 4, 5]


def test_a_run_that_starts_at_a_later_epoch(monkeypatch):
    """--start_epoch 1 of three: two epochs are trained, on the data of the second and third."""
    name, drawn = "starts-later", []
    set_epoch = TrainMixture.set_epoch
    monkeypatch.setattr(
        TrainMixture, "set_epoch", lambda data, e: drawn.append(e) or set_epoch(data, e)
    )
    train(monkeypatch, name, [0.1, 0.2], epochs=3, start_epoch=1)
    assert drawn == [1, 2]
    log = (toys() / "runs" / name / "log.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in log if json.loads(row)["kind"] == "train"] == [2, 3]
