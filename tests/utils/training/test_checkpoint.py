"""Checkpoints: all or nothing, strict, and readable without the settings being typed again."""

import shutil

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cores import train_ds
from cores.dataset.files.sealed import read_sealed, write_sealed
from cores.utils.build import build_trained
from cores.utils.settings.arguments import read_resumed, settings_of
from cores.utils.settings.flags import UsageError
from cores.utils.training import checkpoint
from tests.backbone_toys import flags, toys, trained_run


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 2, bias=False)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.register_buffer("constant", torch.zeros(1))


def weights_of(run, which="last"):
    return checkpoint.read_weights(run / "ckpt" / which)


def test_frozen_weights_of_a_consolidated_file_load_too(tmp_path):
    model = Small()
    checkpoint.put_weights(
        model, {"a.weight": torch.eye(2), "frozen.weight": 2 * torch.eye(2)}, tmp_path
    )
    assert torch.equal(model.frozen.weight, 2 * torch.eye(2))


def test_exactly_the_trainable_weights_load(tmp_path):
    model = Small()
    save_file({"a.weight": torch.eye(2), "constant": torch.ones(1)}, tmp_path / "w.safetensors")
    checkpoint.load_weights(model, tmp_path / "w.safetensors")
    assert torch.equal(model.a.weight, torch.eye(2))
    assert model.constant == 0


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({}, "missing: a.weight"),
        ({"a.weight": torch.eye(2), "b.weight": torch.eye(2)}, "unexpected: b.weight"),
        (
            {"a.weight": torch.eye(2), "constant": torch.zeros(1), "a.bias": torch.eye(2)},
            "unexpected: a.bias",
        ),
        ({"a.weight": torch.eye(3)}, "wrong shape: a.weight"),
    ],
)
def test_missing_unexpected_and_misshapen_weights_are_listed(weights, words, tmp_path):
    with pytest.raises(UsageError, match=words):
        checkpoint.put_weights(Small(), weights, tmp_path)


def test_a_file_that_is_no_weights(tmp_path):
    (tmp_path / "w.bin").write_text("hello")
    with pytest.raises(UsageError, match=r"w\.bin: not a file of weights"):
        checkpoint.read_weights(tmp_path / "w.bin")


def test_a_run_remembers_its_settings():
    s = settings_of(read_resumed(trained_run()))
    assert (s.lora_r, s.lr, s.refiner, s.exp_name) == (8, 0.01, "foreground+background", "trained")
    assert s.run_dir == trained_run().resolve()


@pytest.mark.parametrize("part", [".", "ckpt", "ckpt/best", "ckpt/last"])
def test_a_run_is_found_from_any_of_its_folders(part):
    assert read_resumed(trained_run() / part)["exp_name"] == "trained"
    assert checkpoint.find_checkpoint(trained_run() / part, "last").parent.name == "ckpt"


def test_a_trained_model_is_rebuilt_with_its_weights():
    model, processor, _ = build_trained(trained_run(), "last")
    own, saved = dict(model.named_parameters()), weights_of(trained_run())
    trained = [name for name in saved if name in own]
    assert len(trained) > 20
    assert all(torch.equal(own[name], saved[name]) for name in trained)
    assert processor.levels == ["LOC", "SEG"]


@pytest.fixture
def run(tmp_path):
    return shutil.copytree(trained_run(), tmp_path / "run")


def test_a_save_that_was_cut_short_is_invisible(run):
    (run / "ckpt" / "last.partial").mkdir()
    (run / "ckpt" / "last.partial" / "state").write_text("half")
    assert checkpoint.find_checkpoint(run).name == "last"


def test_readers_leave_a_replacement_alone_that_its_training_finishes(run):
    (run / "ckpt" / "last").rename(run / "ckpt" / "last.old")
    assert checkpoint.find_checkpoint(run) == run / "ckpt" / "last.old"
    assert checkpoint.read_weights(checkpoint.find_checkpoint(run))
    checkpoint.recover_all(run)
    assert checkpoint.find_checkpoint(run) == run / "ckpt" / "last"


def test_a_missing_shard_is_one_clear_line(run):
    (run / "ckpt" / "best" / "state" / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(UsageError, match=r"mp_rank_00_model_states\.pt: missing"):
        checkpoint.read_weights(run / "ckpt" / "best")
    (run / "ckpt" / "best" / "files.json").unlink()
    with pytest.raises(UsageError, match="incomplete checkpoint"):
        checkpoint.read_weights(run / "ckpt" / "best")


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_read_again(run, monkeypatch):
    """Never a mixture of the old one's files and the new one's."""
    last, whole = run / "ckpt" / "last", checkpoint.read_weights(run / "ckpt" / "last")
    shutil.copytree(last, run / "ckpt" / "next")
    real, times = checkpoint.shards.trained_weights, []

    def read(state):
        times.append(state)
        if len(times) == 1:
            shutil.rmtree(last)
            (run / "ckpt" / "next").rename(last)
            raise UsageError("half of it is gone")
        return real(state)

    monkeypatch.setattr(checkpoint.shards, "trained_weights", read)
    found = checkpoint.read_weights(last)
    assert len(times) == 2 and all(torch.equal(found[name], whole[name]) for name in whole)


def test_no_checkpoint(tmp_path):
    with pytest.raises(UsageError, match="no checkpoint here"):
        checkpoint.find_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"world_size": 2}, "saved by 2 ranks, but the optimizer's state is not in 2 files"),
        ({"images_per_step": 8}, "a step had 8 images and would now have 2"),
    ],
    ids=str,
)
def test_a_checkpoint_that_these_ranks_cannot_continue(run, facts, words, capsys):
    file = run / "ckpt" / "last" / checkpoint.PROGRESS
    write_sealed(file, read_sealed(file) | facts)
    assert train_ds.main(flags(toys(), log_base_dir=run.parent, exp_name="run")) == 2
    assert words in capsys.readouterr().err


def test_write_text_replaces_whole_files(tmp_path):
    checkpoint.write_text(tmp_path / "deep" / "f", "one")
    checkpoint.write_text(tmp_path / "deep" / "f", "two")
    assert (tmp_path / "deep" / "f").read_text() == "two"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["f"]


def test_every_bit_of_the_progress_counts(run):
    """The run goes on from what was written, or not at all."""
    file = run / "ckpt" / "last" / checkpoint.PROGRESS
    whole, progress = file.read_bytes(), checkpoint.read_progress(file.parent)
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        assert checkpoint.read_progress(file.parent) in (None, progress), bit
