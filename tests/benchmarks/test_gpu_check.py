"""What is prepared for a GPU: the parts run on this machine, and the model follows its device."""

import contextlib
import inspect
import json

import pytest
import torch

from benchmarks import chat, gpu_check
from benchmarks.sizes import STEP_SIZES
from benchmarks.train_step import build_batch, build_model
from cores.model import CoresForReasoningSegmentation
from cores.model.inference import segmenter
from cores.model.masks import MaskBranch


@contextlib.contextmanager
def another_default_device():
    """As on a GPU, a tensor that is made without a device is not where the model is."""
    with torch.device("meta"):
        yield


@pytest.fixture(autouse=True)
def nothing_is_in_new_memory_by_chance():
    """An index that lies elsewhere reads nothing, so that memory stays as it is: here not a
    number."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def test_the_trick_finds_a_tensor_without_a_device():
    x = torch.ones(3, device="cpu")
    with another_default_device(), pytest.raises(RuntimeError, match="device"):
        torch.stack([x, torch.zeros(3)])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_follows_the_device(checkpointing):
    model = build_model(STEP_SIZES["toy"], checkpointing)
    batch = build_batch(STEP_SIZES["toy"], "cpu", torch.float32)
    with another_default_device():
        loss = model(batch).loss
        loss.backward()
    assert loss.device.type == "cpu" and loss.isfinite()
    assert all(p.grad.device.type == "cpu" for p in model.parameters() if p.grad is not None)


def elsewhere(function):
    """``function`` under another default device, step by step if it is a generator."""

    def steps(generator):
        while True:
            with another_default_device():
                try:
                    item = next(generator)
                except StopIteration as end:
                    return end.value
            yield item

    def run(*args, **kwargs):
        with another_default_device():
            result = function(*args, **kwargs)
        return steps(result) if inspect.isgenerator(result) else result

    return run


def test_answers_follow_the_device(monkeypatch):
    """A first answer, a follow-up with drafts, and questions in a batch. What prepares a picture
    or a prompt works on the processor, and is left out."""
    both = chat.BothSchedules(chat.SIZES["tiny"], 20, 2)
    both.force(chat.free_tokens(19, both.level_ids, both.end))
    ours = CoresForReasoningSegmentation
    places = [(ours, name) for name in ("generate", "segment", "hidden_states", "group_prompts")]
    places += [(MaskBranch, "encode"), (MaskBranch, "segment"), (segmenter, "decode")]
    for owner, name in places:
        monkeypatch.setattr(owner, name, elsewhere(getattr(owner, name)))
    session = both.segmenter.open(both.image)
    results = [session.ask("Where is the dog?"), session.ask("And the cat?")]
    results += both.segmenter([both.image], [["Where is the dog?", "Where is the cat?"]])[0]
    assert [len(result.masks) for result in results] == [1, 1, 1, 1]
    assert all(result.masks[0].mask.shape == (480, 640) for result in results)


@pytest.mark.slow
def test_a_second_call_goes_on(tmp_path, monkeypatch, capsys):
    """Also after a part that took too long, and one that failed."""
    out = tmp_path / "gpu.json"
    argv = ["--size", "toy", "--json", str(out), "--only", "machine", "exactness"]
    parts = gpu_check.PARTS | {"exactness": gpu_check.PARTS["exactness"]._replace(limit=0.2)}
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    assert gpu_check.main(argv) == 1
    first = json.loads(out.read_text())["parts"]
    assert first["exactness"] == {"failed": "it took more than 0.2 s"}
    assert first["machine"]["result"]["packages"]["torch"]
    assert "exactness     failed: it took" in capsys.readouterr().out
    monkeypatch.undo()
    assert gpu_check.main(argv) == 0
    second = json.loads(out.read_text())["parts"]
    assert second["machine"] == first["machine"]  # It was not taken again.
    found = second["exactness"]["result"]
    assert found["fp32"]["gradient"] <= 1e-3 and found["bf16"]["gradient"] > 0


def test_what_a_part_needs_and_the_time_are_looked_at_first(tmp_path, monkeypatch, capsys):
    lacking = gpu_check.Part(gpu_check.machine, 60, ("no_such_package",))
    step = gpu_check.PARTS["step"]
    monkeypatch.setattr(gpu_check, "PARTS", {"ranks": lacking})
    assert gpu_check.run_part("ranks", "toy") == {"left_out": "no_such_package is not installed"}
    done = {"result": {"card": "NVIDIA H200"}, "seconds": 1.0}
    (tmp_path / "gpu.json").write_text(json.dumps({"parts": {"machine": done}}))
    monkeypatch.setattr(gpu_check, "PARTS", {"step": step})
    argv = ["--size", "toy", "--json", str(tmp_path / "gpu.json"), "--minutes", "0"]
    assert gpu_check.main(argv) == 0
    assert "step: no time left" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("card", "peak"),
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L40S", 362)]
    + [("cpu", None), ("NVIDIA L400", None)],
)
def test_the_peak_is_that_of_the_card(card, peak):
    assert gpu_check.peak_tflops(card) == peak


def test_goals_are_those_of_a_7b():
    parts = {"answer": {"result": {"first_seconds": 0.5, "follow_up_seconds": 0.3}, "seconds": 9}}
    judged = gpu_check.summary(parts, True).splitlines()
    assert judged[1].endswith("goal ≤ 0.6: met") and judged[2].endswith("goal ≤ 0.25: missed")
    assert "goal" not in gpu_check.summary(parts, False)
