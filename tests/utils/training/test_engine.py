"""The training engine: schedule, order of the samples, several ranks, interruption and resume."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cores import train_ds
from cores.utils.settings.arguments import parse
from cores.utils.training import checkpoint
from cores.utils.training.deepspeed import learning_rate_factor
from cores.utils.training.loader import RankSampler
from cores.utils.training.trainer import Trainer
from tests.backbone_toys import flags, toys, trained_run
from tests.fork_server import RANK_VARIABLES, free_port, server

ROOT = Path(__file__).resolve().parents[3]


def log(run: Path, kind: str = "train") -> list[dict]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in log(run)]


def test_schedule_by_hand():
    s = parse(["--epochs", "2", "--steps_per_epoch", "4", "--warmup_steps", "2"])
    factor = learning_rate_factor(s)
    assert [factor(i) for i in range(9)] == pytest.approx(
        [1 / 2, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]
    )


def test_start_epoch_enters_the_schedule_there():
    s = parse(
        ["--epochs", "2", "--steps_per_epoch", "4", "--warmup_steps", "2", "--start_epoch", "1"]
    )
    assert learning_rate_factor(s)(0) == pytest.approx(4 / 6)


def test_ranks_share_a_step_without_overlap():
    alone = list(RankSampler(12, batch=1, rank=0, world=1))
    two = [list(RankSampler(12, batch=1, rank=rank, world=2)) for rank in (0, 1)]
    assert two == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]]
    assert sorted(two[0] + two[1]) == alone


def test_a_resumed_sampler_continues_where_it_was():
    sampler = RankSampler(12, batch=2, rank=1, world=2)
    assert list(sampler) == [2, 3, 6, 7, 10, 11]
    sampler.first_micro_step = 2
    assert list(sampler) == [10, 11]
    assert len(sampler) == 2


def test_training_lowers_the_loss_and_moves_every_group():
    run = trained_run()
    values = losses(run)
    assert len(values) == 6
    assert values[-1] < values[0] - 0.3
    assert [row["step"] for row in log(run)] == [1, 2, 3, 4, 5, 6]
    assert log(run)[0]["lr"] == pytest.approx(0.005)
    weights = checkpoint.read_weights(run / "ckpt" / "last")
    from safetensors.torch import load_file

    before = load_file(toys() / "sam" / "sam.safetensors")
    decoder = {k: v for k, v in weights.items() if "mask_decoder" in k}
    assert decoder
    changed = [
        k
        for k, v in decoder.items()
        if not torch.equal(v, before[k.removeprefix("segmenting.sam.")])
    ]
    assert len(changed) > 0.9 * len(decoder)
    assert any(v.abs().sum() > 0 for k, v in weights.items() if "lora_B" in k)
    assert any(v.abs().sum() > 0 for k, v in weights.items() if "refiner" in k and "out_proj" in k)


class Stop:
    """Sends SIGTERM to this process after ``step`` steps, as a cluster does."""

    def __init__(self, monkeypatch, step: int):
        original = Trainer._report

        def report(trainer, *args):
            original(trainer, *args)
            if trainer.global_step == step:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(Trainer, "_report", report)


@pytest.mark.parametrize("step", [2, 3])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(monkeypatch, step):
    name = f"stopped-{step}"
    with monkeypatch.context() as patch:
        Stop(patch, step)
        assert train_ds.main(flags(toys(), exp_name=name)) == 130
    run = toys() / "runs" / name
    assert len(losses(run)) == step
    assert train_ds.main(flags(toys(), exp_name=name)) == 0
    assert losses(run) == losses(trained_run())
    ours, theirs = (checkpoint.read_weights(r / "ckpt" / "last") for r in (run, trained_run()))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_a_finished_run_is_not_trained_again(capsys):
    run = trained_run()
    assert train_ds.main(flags(toys(), exp_name="trained")) == 0
    assert len(losses(run)) == 6
    assert "continuing from" in capsys.readouterr().out


def test_other_settings_do_not_continue_a_run(capsys):
    trained_run()
    capsys.readouterr()
    assert train_ds.main(flags(toys(), exp_name="trained", lr=0.5)) == 2
    message = capsys.readouterr().err
    assert "lr was 0.01 and is now 0.5" in message
    assert message.count("\n") == 1


def test_non_finite_loss_stops_before_the_update_and_names_the_samples(monkeypatch, capsys):
    original = Trainer._step
    seen = {}

    def step(trainer, batches):
        parameter = trainer.engine.module.text_projection[0].weight
        if trainer.global_step == 1:
            with torch.no_grad():
                parameter[0, 0] = float("nan")
            seen["before"] = trainer.engine.module.reasoning.llava.lm_head.weight.clone()
            seen["model"] = trainer.engine.module
        return original(trainer, batches)

    monkeypatch.setattr(Trainer, "_step", step)
    assert train_ds.main(flags(toys(), exp_name="nan", no_eval="true")) == 3
    message = capsys.readouterr().err
    assert "step 2" in message
    assert "Toy|train 00" in message
    assert torch.equal(seen["before"], seen["model"].reasoning.llava.lm_head.weight)


@pytest.mark.parametrize(
    "changes", [{"zero_stage": 0}, {"zero_stage": 3}, {"precision": "bf16"}], ids=str
)
def test_other_stages_and_formats_train_and_load(changes):
    name = "-".join(map(str, *changes.items()))
    argv = flags(toys(), exp_name=name, epochs=1, steps_per_epoch=2, no_eval="true", **changes)
    assert train_ds.main(argv) == 0
    run = toys() / "runs" / name
    tolerance = 0.05 if "precision" in changes else 1e-4  # measured: 0.004 and 0
    assert losses(run) == pytest.approx(losses(trained_run())[:2], abs=tolerance)
    from cores.utils.build import build_trained

    model, *_ = build_trained(run)
    assert any(p.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n)


@pytest.mark.filterwarnings("error:.*checkpointing.*:FutureWarning")
def test_gradient_checkpointing_changes_nothing():
    changes = {
        "exp_name": "recompute",
        "gradient_checkpointing": "true",
        "epochs": 1,
        "no_eval": "true",
        "lora_dropout": 0,
    }
    assert train_ds.main(flags(toys(), **changes)) == 0
    assert (
        train_ds.main(
            flags(toys(), **changes | {"exp_name": "keep", "gradient_checkpointing": "false"})
        )
        == 0
    )
    assert losses(toys() / "runs" / "recompute") == pytest.approx(
        losses(toys() / "runs" / "keep"), abs=1e-5
    )  # measured: 0


def clean_environment() -> dict[str, str]:
    """Of a process outside the process group of this one."""
    env = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES}
    env |= {"OMP_NUM_THREADS": "1"}
    return env | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"}


def launch(*command: object) -> subprocess.CompletedProcess:
    """Runs as a user would."""
    words = [str(c) for c in command]
    return subprocess.run(
        words, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=240
    )


@pytest.mark.parametrize(
    "world", [{}, {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}]
)
def test_a_world_of_one_needs_no_port(world):
    """Two runs on one machine, or any program that listens where the process group would."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code = (
            "from utils import distributed as d; d.start();"
            " print(d.gather_lists([d.world_size()])); d.barrier(); d.stop()"
        )
        if not world:
            code = f"import os; [os.environ.pop(name) for name in {RANK_VARIABLES[:4]}]; {code}"
        port = str(taken.getsockname()[1])
        trial = server().run("code", [], code=code, env=world | {"MASTER_PORT": port})
    assert trial.codes == [0] and trial.output == "[1]\n", trial.output


def test_two_ranks_equal_one_rank_with_accumulation():
    """The same four samples per step, dropout off: 2 ranks × 2 images against 1 rank × 2 images × 2
    micro steps."""
    common = {"lora_dropout": 0, "global_batch_size": 4, "epochs": 1, "eval_mode": "teacher_forced"}
    trial = server().run("cores.train_ds", flags(toys(), exp_name="two", **common), ranks=2)
    assert trial.codes == [0, 0], trial.output
    assert train_ds.main(flags(toys(), exp_name="one", **common)) == 0
    one, two = toys() / "runs" / "one", toys() / "runs" / "two"
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)  # measured: 5e-7
    # from one shard and from two
    weights = [checkpoint.read_weights(run / "ckpt" / "last") for run in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    metrics = [
        json.loads((run / "metrics.json").read_text())["teacher_forced"] for run in (one, two)
    ]
    assert metrics[0]["n"] == metrics[1]["n"] == 3  # odd: no image is counted twice


@pytest.mark.parametrize(
    "launcher", ["deepspeed", pytest.param("torchrun", marks=pytest.mark.slow)]
)
def test_a_launcher_starts_ranks_that_know_each_other(launcher):
    """As a user starts it, every process from nothing. Of two ranks with two images each, three per
    step cannot be had: which one line says, so nothing has to be loaded."""
    count = {"deepspeed": "--num_gpus", "torchrun": "--nproc_per_node"}[launcher]
    start = [Path(sys.executable).with_name(launcher), count, 2, "--master_port", free_port()]
    argv = flags(toys(), exp_name="launched", global_batch_size=3)
    result = launch(*start, "train_ds.py", *argv)
    assert result.returncode != 0
    words = "error: --global_batch_size 3 is not divisible by 2 ranks × --batch_size 2"
    assert result.stderr.count(words) + result.stdout.count(words) == 2
    assert "Traceback" not in result.stderr.split(words)[0]


def test_a_global_batch_that_the_ranks_do_not_divide(capsys):
    assert train_ds.main(flags(toys(), exp_name="odd", global_batch_size=3)) == 2
    assert (
        "--global_batch_size 3 is not divisible by 1 ranks × --batch_size 2"
        in capsys.readouterr().err
    )
    assert not (toys() / "runs" / "odd").exists()
