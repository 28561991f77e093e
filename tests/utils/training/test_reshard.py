"""A run goes on with another number of ranks as if it had had that number all along."""

import math
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch

from cores import train_ds
from cores.dataset.files.sealed import read_sealed, write_sealed
from cores.utils import distributed
from cores.utils.settings.arguments import settings_of
from cores.utils.settings.flags import UsageError
from cores.utils.training import checkpoint, reshard
from tests.backbone_toys import flags, toys, trained_run
from tests.fork_server import server
from tests.utils.training.test_engine import Stop, losses
from tests.utils.training.test_global_counts import arguments, the_same

SHARD = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"


def cut(parts: list[torch.Tensor], total: int, world: int) -> list[torch.Tensor]:
    """As ZeRO cuts: equal parts of an even size, so that the last ones may hold padding only."""
    size = 2 * math.ceil(total / (2 * world))
    return [reshard.partition(parts, total, size, rank) for rank in range(world)]


@pytest.mark.parametrize("total", [1, 5, 12, 13, 1000])
def test_parts_are_joined_and_cut_anew(total):
    """3 → 2 → 5 → 1 ranks, with padding in between, even with parts that hold nothing else."""
    flat = torch.randn(total, generator=torch.Generator().manual_seed(total))
    parts = [flat]
    for world in (3, 2, 5, 1):
        parts = cut(parts, total, world)
        sizes = {len(part) for part in parts}
        assert len(parts) == world and len(sizes) == 1 and sizes.pop() % 2 == 0
        joined = torch.cat(parts)
        assert torch.equal(joined[:total], flat) and not joined[total:].any()
    assert torch.equal(parts[0][:total], flat)


def test_padding_may_be_left_out():
    """ZeRO saves the weights without padding and the moments with it."""
    padded = cut([torch.arange(1.0, 6)], 5, 3)
    lean = [padded[0], padded[1], padded[2][:1]]
    for world in (1, 2, 4):
        assert all(map(torch.equal, cut(padded, 5, world), cut(lean, 5, world)))


def test_random_states_of_new_ranks(tmp_path):
    """Kept where there is one, otherwise new, different and the same every time."""
    for rank in (0, 1):
        torch.save(
            {"torch": torch.Generator().manual_seed(rank).get_state()},
            tmp_path / f"random_{rank}.pt",
        )
    states = [
        [reshard.random_state(tmp_path, 2, rank)["torch"] for rank in range(5)] for _ in range(2)
    ]
    assert all(map(torch.equal, *states))
    assert all(
        torch.equal(states[0][rank], torch.Generator().manual_seed(rank).get_state())
        for rank in (0, 1)
    )
    draws = [
        float(torch.rand((), generator=torch.Generator().set_state(state))) for state in states[0]
    ]
    assert len(set(draws)) == 5


def settings(**changes):
    return settings_of({"batch_size": 2, "grad_accumulation_steps": 6} | changes)


@pytest.mark.parametrize("world", [1, 3, 4])
def test_the_images_of_a_step_must_stay_as_many(world, monkeypatch, tmp_path):
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    progress, earlier = {"world_size": 2}, settings()  # 2 × 2 × 6 = 24
    fitting = settings(global_batch_size=24)
    train_ds.check_ranks(fitting)
    fitting.refuse_changes(earlier, tmp_path)
    reshard.refuse(tmp_path, progress, fitting, earlier)
    with pytest.raises(UsageError, match="24 images .* add --global_batch_size 24"):
        reshard.refuse(tmp_path, progress, earlier, earlier)
    # another process may have saved its settings since, but no checkpoint
    with pytest.raises(UsageError, match="24 images"):
        reshard.refuse(
            tmp_path,
            progress | {"images_per_step": 24},
            earlier,
            settings(grad_accumulation_steps=1),
        )


def test_means_of_micro_batches_need_their_size(tmp_path):
    larger = {"batch_size": 4, "grad_accumulation_steps": 3}
    settings(**larger).refuse_changes(settings(), tmp_path)
    with pytest.raises(UsageError, match="batch_size was 2 and is now 4"):
        settings(**larger, loss_normalisation="micro").refuse_changes(
            settings(loss_normalisation="micro"), tmp_path
        )


def test_zero_3_keeps_its_ranks(tmp_path):
    s = settings(zero_stage=3)
    with pytest.raises(UsageError, match=r"saved by 2 ranks, this run has 1; .* docs/recipes\.md"):
        reshard.refuse(tmp_path, {"world_size": 2}, s, s)
    reshard.refuse(tmp_path, {"world_size": 1}, s, s)


def write_as(folder: Path, world: int) -> None:
    """Makes the ZeRO checkpoint ``folder`` of one rank one of ``world`` ranks, as DeepSpeed would
    have written it."""
    saved = reshard._read_parts(folder, 1)[0]
    saved = {
        k: v
        for k, v in saved.items()
        if k not in ("loss_scaler", "zero_stage", "param_slice_mappings")
    }
    weights, base = (
        saved["single_partition_of_fp32_groups"][0].detach(),
        saved["base_optimizer_state"],
    )
    total = len(weights)
    moments = {
        k: cut([v], total, world) if v.dim() else [v] * world for k, v in base["state"][0].items()
    }
    weights = cut([weights], total, world)
    (folder / "state" / SHARD.format(0)).unlink()
    for rank, part in enumerate(weights):
        lean = part[: max(0, total - rank * len(part))]
        state = base | {"state": {0: {k: v[rank] for k, v in moments.items()}}}
        state = saved | {"single_partition_of_fp32_groups": [lean], "base_optimizer_state": state}
        torch.save({"optimizer_state_dict": state}, folder / "state" / SHARD.format(rank))
        if rank:
            shutil.copy(folder / "random_0.pt", folder / f"random_{rank}.pt")
    (folder / checkpoint.FILES).unlink()
    file = folder / checkpoint.PROGRESS
    write_sealed(file, read_sealed(file) | {"world_size": world})


def test_one_rank_goes_on_for_three_bit_for_bit(monkeypatch):
    """Also with dropout, as rank 0 keeps its random state; and the checkpoint says who saved it
    until it is replaced."""
    with monkeypatch.context() as patch:
        Stop(patch, 2)
        assert train_ds.main(flags(toys(), exp_name="three")) == 130
    run = toys() / "runs" / "three"
    write_as(run / "ckpt" / "last", 3)
    checkpoint.write_progress(
        run / "ckpt" / "last", checkpoint.read_progress(run / "ckpt" / "last") | {"world_size": 1}
    )
    assert checkpoint.read_progress(run / "ckpt" / "last")["world_size"] == 3
    assert train_ds.main(flags(toys(), exp_name="three", global_batch_size=2)) == 0
    assert losses(run) == losses(trained_run())
    ours, theirs = (checkpoint.read_weights(r / "ckpt" / "last") for r in (run, trained_run()))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert checkpoint.read_progress(run / "ckpt" / "last")["world_size"] == 1


# --------------------------------------------------------------------------------------- real ranks


def run_on(name: str, *parts: tuple[int, int], **changes: object) -> Path:
    """Trains in ``parts``: numbers of ranks, each with the step after which it is stopped, 0 for
    the end."""
    data = {"dataset": "reason_seg", "sample_rates": "1"}
    argv = arguments(name, 1, 1, global_batch_size=4, steps_per_epoch=4, **data, **changes)
    for ranks, stop in parts:
        faults = {"stop_at_step": [stop, 0]} if stop else {}
        trial = server().run("cores.train_ds", argv, ranks=ranks, faults=faults)
        assert set(trial.codes) == {130 if stop else 0}, trial.output
    return toys() / "runs" / name


@cache
def whole(stage: int) -> Path:
    return run_on(f"reshard-{stage}-whole", (1, 0), zero_stage=stage)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [((2, 2), (1, 0)), ((1, 2), (2, 0))], ids=str)
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_other_ranks_go_on_as_one_rank_would(stage, parts):
    name = "-".join(str(ranks) for ranks, _ in parts)
    assert the_same(
        whole(stage), run_on(f"reshard-{stage}-{name}", *parts, zero_stage=stage), steps=4
    )


@pytest.mark.slow
def test_many_changes():
    assert the_same(
        whole(2), run_on("reshard-many", (2, 1), (1, 2), (4, 3), (2, 0), zero_stage=2), steps=4
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_bf16_goes_on(stage):
    """The float32 weights behind it, too: the losses stay those of one rank up to its rounding."""
    changes = {"zero_stage": stage, "precision": "bf16"}
    alone, changed = (
        run_on(f"bf16-{stage}", (1, 0), **changes),
        run_on(f"bf16-{stage}-2-1", (2, 2), (1, 0), **changes),
    )
    assert losses(changed) == pytest.approx(losses(alone), abs=0.05)
