"""Recipes: their configs parse and keep their word; torchrun, several nodes, offloading and
evaluation on several ranks."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cores import train_ds
from cores.utils import distributed
from cores.utils.settings.arguments import parse
from cores.utils.settings.flags import UsageError
from tests.backbone_toys import flags, toys, trained_run
from tests.utils.training.test_engine import ROOT, clean_environment, free_port, launch
from tests.utils.training.test_global_counts import arguments, the_same, whole

RECIPES = ROOT / "configs" / "recipes"
TORCHRUN = Path(sys.executable).with_name("torchrun")
PAPER = {
    "lr": 3e-4,
    "beta1": 0.9,
    "beta2": 0.95,
    "weight_decay": 0.0,
    "warmup_steps": 100,
    "max_grad_norm": 1.0,
    "lora_r": 8,
    "lora_alpha": 16,
    "epochs": 10,
    "steps_per_epoch": 500,
    "num_classes_per_sample": 3,
}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_parses_and_states_its_batch(path, monkeypatch):
    s = parse(["--config", str(path)])
    assert {name: getattr(s, name) for name in PAPER} == PAPER
    gpus = re.match(r"(\d+)x\d+gb-(7b|13b)", path.stem)
    world = int(gpus[1]) if gpus else 1
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    train_ds.check_ranks(s)
    images = s.batch_size * s.grad_accumulation_steps * world
    assert f"{images} images a step" in path.read_text()
    if gpus:
        assert gpus[2] in s.version and s.loss_normalisation == "global"


def test_the_paper_averages_micro_batches():
    s = parse(["--config", str(RECIPES / "paper.yaml")])
    assert (s.batch_size, s.grad_accumulation_steps, s.loss_normalisation) == (2, 10, "micro")


def test_the_document_names_every_recipe():
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert [path.name for path in RECIPES.iterdir() if path.name not in text] == []


@pytest.mark.parametrize("stage", [1, 2])
def test_an_optimizer_on_the_host_takes_the_same_steps(stage):
    name = f"offload-{stage}"
    argv = arguments(name, 4, 1, offload="optimizer", zero_stage=stage)
    assert train_ds.main(argv) == 0
    assert the_same(whole(), toys() / "runs" / name)


def test_offloading_without_zero_is_refused():
    with pytest.raises(UsageError, match="--offload optimizer needs --zero_stage 1, 2 or 3"):
        parse(["--offload", "optimizer", "--zero_stage", "0"])


def test_zero_3_with_a_cache_on_several_ranks_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(UsageError, match="with --sam_cache only some ranks ask"):
        train_ds.check_ranks(parse(["--zero_stage", "3", "--sam_cache", "x", "--no_eval"]))


@pytest.mark.slow
def test_two_nodes_are_two_ranks():
    """Two torchrun agents that meet at one address, as two machines do."""
    port, argv = free_port(), [str(a) for a in arguments("nodes", 2, 1)]
    agents = []
    for node in (0, 1):
        where = [str(TORCHRUN), "--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(node)]
        where += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
        agents.append(
            subprocess.Popen(
                [*where, "train_ds.py", *argv],
                cwd=ROOT,
                env=clean_environment(),
                stderr=subprocess.PIPE,
            )
        )
    errors = [agent.communicate(timeout=240)[1].decode() for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], errors
    assert the_same(whole(), toys() / "runs" / "nodes")


@pytest.mark.slow
def test_evaluation_on_two_ranks_gives_the_same_tables():
    """Three images on two ranks: same targets, same scores, same summaries, to the last digit."""
    common = {"eval_only": "true", "resume": trained_run(), "examples": 2}
    argv = {n: flags(toys(), exp_name=f"evaluated-{n}", **common) for n in (1, 2)}
    found = []
    for ranks in (1, 2):
        result = launch(
            TORCHRUN,
            "--nproc_per_node",
            ranks,
            "--master_port",
            free_port(),
            "train_ds.py",
            *argv[ranks],
        )
        assert result.returncode == 0, result.stdout + result.stderr
        run = toys() / "runs" / f"evaluated-{ranks}"
        metrics = json.loads((run / "metrics.json").read_text())
        tables = [(run / f"targets-{mode}.csv").read_text() for mode in ("free", "teacher_forced")]
        found.append((metrics["free"], metrics["teacher_forced"], tables))
    assert found[0] == found[1]
    assert found[0][1]["n"] == 3
