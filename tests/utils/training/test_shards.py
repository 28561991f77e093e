"""DeepSpeed's files, read by ourselves: the same weights as DeepSpeed's script finds, whatever the
stage, and nothing executed."""

import contextlib
import io
import os

import pytest
import torch

from cores import train_ds
from cores.utils.settings.flags import UsageError
from cores.utils.training import shards
from tests.backbone_toys import flags, toys
from tests.chaos_toys import command, run_of
from tests.fork_server import server

SHORT = {"no_eval": "true", "epochs": 1, "steps_per_epoch": 2}


def theirs(checkpoint):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()):
        return get_fp32_state_dict_from_zero_checkpoint(
            str(checkpoint), tag="state", exclude_frozen_parameters=True
        )


def assert_equal_to_theirs(checkpoint):
    ours, expected = shards.trained_weights(checkpoint / "state"), theirs(checkpoint)
    assert list(ours) == list(expected) and len(ours) > 20
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert all(ours[name].dtype == expected[name].dtype for name in expected)


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (2, "bf16"), (3, "fp32")])
def test_the_weights_are_those_that_deepspeed_finds(stage, precision):
    name = f"shards-{stage}"
    argv = flags(toys(), exp_name=name, zero_stage=stage, precision=precision, **SHORT)
    assert train_ds.main(argv) == 0
    assert_equal_to_theirs(run_of(name) / "ckpt" / "last")
    assert train_ds.main(argv) == 0, "and the engine reads them, too"


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_shards_of_three_ranks_are_joined(stage):
    argv = command(f"three-{stage}", zero_stage=stage, batch_size=1, **SHORT)
    trial = server().run("cores.train_ds", argv, ranks=3)
    assert trial.codes == [0, 0, 0], trial.output
    assert_equal_to_theirs(run_of(f"three-{stage}") / "ckpt" / "last")


def test_a_model_without_zero():
    assert train_ds.main(flags(toys(), exp_name="no-zero", zero_stage=0, **SHORT)) == 0
    state = run_of("no-zero") / "ckpt" / "last" / "state"
    assert len(shards.trained_weights(state)) > 20
    assert train_ds.main(flags(toys(), exp_name="no-zero", zero_stage=0, **SHORT)) == 0


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("zipped", [True, False])
def test_no_call_in_a_pickle_is_made(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Evil()}, "x.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UsageError, match=r"x\.pt: cannot be read \(it names posix\.mkdir"):
        shards.read_states(tmp_path / "x.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_the_engine_reads_nothing_else(tmp_path, monkeypatch):
    """Neither by its reader nor by a torch.load of its own that asks for everything."""
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Evil()}, "x.pt")

    class Engine:
        class checkpoint_engine:
            @staticmethod
            def load(path, map_location=None):
                return torch.load(path, weights_only=False)

    with shards.restricted(Engine):
        with pytest.raises(UsageError, match="posix.mkdir"):
            Engine.checkpoint_engine.load("x.pt")
        with pytest.raises(Exception, match="posix.mkdir"):
            torch.load("x.pt", weights_only=False)
    assert not (tmp_path / "pwned").exists()
    assert shards.FORCE not in os.environ


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1], "no table of states"),
        ({"optimizer_state_dict": {}}, "partition_count"),
        ({"optimizer_state_dict": {"partition_count": 2}}, "saved by 2 ranks"),
        ({"optimizer_state_dict": 3}, "not a checkpoint of DeepSpeed"),
        ({"optimizer_state_dict": {"partition_count": 1, "zero_stage": 2}}, "is missing"),
    ],
)
def test_odd_tables_are_one_line(tmp_path, content, words):
    torch.save(content, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(UsageError, match=words):
        shards.trained_weights(tmp_path)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["zero_pp_rank_0_mp_rank_01_optim_states.pt"], "models in several parts"),
        (["zero_pp_rank_1_mp_rank_00_optim_states.pt"], "rank 0 has no optim_states"),
        (
            [f"{kind}zero_pp_rank_0_mp_rank_00_optim_states.pt" for kind in ("", "bf16_")],
            "has a second file",
        ),
    ],
)
def test_odd_names_of_files(tmp_path, names, words):
    for name in names:
        torch.save({}, tmp_path / name)
    with pytest.raises(UsageError, match=words):
        shards.optimizer_files(tmp_path)


def test_ranks_count_as_numbers(tmp_path):
    for rank in range(12):
        torch.save({}, tmp_path / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    found = [file.name.split("_")[4] for file in shards.optimizer_files(tmp_path)]
    assert found == [str(rank) for rank in range(12)]
