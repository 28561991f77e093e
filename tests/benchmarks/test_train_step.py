"""The benchmark of a training step measures what it says, at a size for tests."""

import json
from functools import cache

import pytest
import torch

from benchmarks import published_schedule, train_step
from benchmarks.sizes import STEP_SIZES
from benchmarks.train_step import (
    UNKNOWN_TO_TORCH,
    Bench,
    build_model,
    check_losses,
    count_flops,
)
from cores.dataset.collate import collate
from cores.dataset.synthetic.write import write_synthreason
from cores.utils import build
from cores.utils.settings.arguments import parse


@cache
def counted(checkpointing: bool) -> dict:
    """Counting takes seconds, and every time the same is counted."""
    return count_flops(STEP_SIZES["toy"], checkpointing)


def bench(folder, *flags):
    return Bench(
        STEP_SIZES["toy"], train_step.parser().parse_args(["--size", "toy", *flags]), str(folder)
    )


@pytest.mark.parametrize("flags", [(), ("--gradient_checkpointing",)])
def test_schedules_have_equal_losses_and_gradients(tmp_path, flags):
    subject = bench(tmp_path, *flags)
    published, ours = (subject.step(name)["losses"] for name in ("published", "ours"))
    check_losses(published, ours, 1e-5)
    with pytest.raises(ValueError, match="disagree: bce"):
        check_losses(published, ours | {"bce": 1.01 * ours["bce"]}, 1e-5)
    theirs, own = subject.gradients("published"), subject.gradients("ours")
    largest = max(float(g.abs().max()) for g in theirs)
    for a, b in zip(theirs, own, strict=True):
        assert (a - b).abs().max() <= 1e-4 * max(float(a.abs().max()), largest / 1000)


def test_time_and_flops_are_measured_and_written(tmp_path, capsys):
    file = tmp_path / "out.json"
    train_step.measure(
        [
            "--size",
            "toy",
            "--only",
            "time",
            "flops",
            "--repeats",
            "1",
            "--peak_tflops",
            "0.1",
            "--json",
            str(file),
        ]
    )
    found = json.loads(file.read_text())
    assert {"time", "time_cached", "flops"} <= found["ratio"].keys()
    assert (
        found["ratio"]["time"]
        == found["seconds"]["ours"]["total"] / found["seconds"]["published"]["total"]
    )
    assert found["flops"]["cached"]["SAM encoder"] == 0
    assert (
        found["rate"]["tokens_per_second"]["ours"]
        == 2 * 3 * (10 + 16 + 12) / found["seconds"]["ours"]["total"]
    )
    done = sum(found["flops"]["published"].values()) / found["seconds"]["published"]["total"]
    assert found["rate"]["utilisation"]["published"] == pytest.approx(done / 1e11)
    assert "ratio.time_cached" in capsys.readouterr().out


@pytest.mark.slow  # a process for each schedule
def test_memory_is_measured():
    found = train_step.measure(["--size", "toy", "--only", "memory"])
    assert all(
        memory["peak_bytes"] > memory["weight_bytes"] > 0 for memory in found["memory"].values()
    )
    assert found["ratio"]["peak_memory"] > 0


def test_counted_parts_are_the_whole_step(tmp_path):
    """The parts, counted on no device, against a real step counted at once."""
    subject = bench(tmp_path)
    parts = counted(checkpointing=False)
    for name in ("published", "ours"):
        whole = train_step.flops(lambda name=name: subject.losses(name)["loss"])
        assert sum(parts[name].values()) == pytest.approx(whole, rel=0.02)


def test_what_torch_does_not_count_is_counted():
    q = torch.zeros(1, 2, 8, 4, requires_grad=True)
    forward = 2 * 2 * 8 * 8 * (4 + 4)
    attend = torch.nn.functional.scaled_dot_product_attention
    with torch.no_grad():
        assert train_step.flops(lambda: attend(q, q, q)) == forward
        assert (
            train_step.flops(lambda: torch.zeros(3, 5).addmm_(torch.ones(3, 4), torch.ones(4, 5)))
            == 2 * 3 * 4 * 5
        )
    assert train_step.flops(lambda: attend(q, q, q)) == forward * 7 // 2
    assert len(UNKNOWN_TO_TORCH) == 5


def test_checkpointing_is_counted():
    plain, again = (counted(checkpointing)["published"]["LLM"] for checkpointing in (False, True))
    assert 1.3 * plain < again < 1.6 * plain
    assert build_model(
        STEP_SIZES["toy"], True
    ).reasoning.llava.model.language_model.gradient_checkpointing


def test_the_demo_has_the_losses_of_the_published_schedule(tmp_path):
    """Its own weights and data: what speed changed is below what rounding changes."""
    write_synthreason(tmp_path, train=4, val=1, semantic=1, queries=3)
    flags = ["--config", "configs/tiny.yaml", "--dataset_dir", str(tmp_path), "--lora_dropout", "0"]
    settings = parse([*flags, "--dataset", "reason_seg", "--sample_rates", "1"])
    model, processor = build.build_model(settings)
    build.make_trainable(model, settings)
    data = build.build_mixture(settings, processor)
    batch = collate([data[0], data[1]], processor, processor.levels, processor.template)
    assert len(batch.input_ids) > 2
    ours = {name: float(value.detach()) for name, value in model.train()(batch).losses.items()}
    published = {
        name: float(value.detach())
        for name, value in published_schedule.forward(model, batch).items()
    }
    check_losses({name: published[name] for name in ("text", "bce", "dice")}, ours, 2e-5)
