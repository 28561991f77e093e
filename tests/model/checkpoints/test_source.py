"""A checkpoint is opened once: how often a run reads weights and asks the hub, for every layout.

What is counted, with the checkpoint given by its hub name and the hub's cache already filled:

- readings of every file of weights, by the one function that reads any (``weights.read_file``), and
  openings of such files by transformers itself, of which there may be none;
- look-ups that the hub would answer were it there: each call of ``snapshot_download``, which lists
  a repository and takes what is missing, and each file that transformers looks for by a hub name.
  Looking into the folder that was found costs no request and is not counted.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cores import train_ds
from cores.model import CoresForReasoningSegmentation, CoresProcessor, ReasoningSegmenter
from cores.model.build import build_from_backbones
from cores.model.checkpoints import published, source, weights
from cores.model.checkpoints.llava import load_llava
from cores.model.checkpoints.source import Kind, open_source
from cores.model.config import CoresConfig
from cores.model.export import save_published
from tests.backbone_toys import flags, toys

COMMIT = "c0ffee" + "0" * 34  # what the hub calls a version; nothing else is taken for one
LEVELS = {"lisa": ("SEG",), "cores": ("LOC", "SEG")}


class Count:
    """Of the readings and look-ups above."""

    def __init__(self, monkeypatch):
        self.read: Counter[str] = Counter()
        self.hub: list[str] = []

        def read_file(file: Path):
            self.read[str(file)] += 1
            return whole(file)

        def download(name: str, **arguments):
            self.hub.append(f"snapshot of {name}")
            return snapshot(name, **arguments)

        def look(path_or_repo_id, filenames, **arguments):
            if not Path(path_or_repo_id).is_dir():
                self.hub.append(f"{path_or_repo_id}: {filenames}")
            return cached_files(path_or_repo_id, filenames, **arguments)

        from transformers.utils import hub

        whole, snapshot, cached_files = (
            weights.read_file,
            source.snapshot_download,
            hub.cached_files,
        )
        monkeypatch.setattr("cores.model.checkpoints.weights.read_file", read_file)
        monkeypatch.setattr("cores.model.checkpoints.sam.read_file", read_file)
        monkeypatch.setattr("cores.model.checkpoints.source.snapshot_download", download)
        monkeypatch.setattr("transformers.utils.hub.cached_files", look)
        # transformers opens files of weights by these two.
        for name in ("safe_open", "load_state_dict"):
            monkeypatch.setattr(f"transformers.modeling_utils.{name}", None)

    def check(self, files: int) -> None:
        """``files``: of weights that the checkpoint, its CLIP and the SAM have."""
        assert set(self.read.values()) == {1} and len(self.read) == files, self.read
        assert 0 < len(self.hub) <= 8, self.hub


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """The cache of a hub that does not answer."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put(folder: Path, hub: Path, name: str) -> str:
    """Puts a folder into the hub's cache; returns its hub name."""
    there = hub / f"models--owner--{name}"
    shutil.copytree(folder, there / "snapshots" / COMMIT)
    (there / "refs").mkdir()
    (there / "refs" / "main").write_text(COMMIT)
    return f"owner/{name}"


def cut(folder: Path) -> None:
    """The one file of weights in two shards, and an index."""
    tensors = load_file(folder / "model.safetensors")
    index = {}
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file)
        index |= dict.fromkeys(names, file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def finished(folder: Path, hub: Path, layout: str) -> tuple[str, int]:
    """(hub name, files of weights) of a finished model in one of the layouts."""
    kind, _, form = layout.partition(" ")
    refiner = {"kind": "attention+norm", "pooling": "released"} if kind == "cores" else None
    model, processor = build_from_backbones(
        toys() / "llava",
        toys() / "sam",
        LEVELS.get(kind, ("LOC", "SEG")),
        template="tiny",
        exemplar_count=0,
        refiner=refiner,
    )
    if kind == "ours":
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return put(folder, hub, "model"), 1
    save_published(model, processor, folder)
    (folder / "cores_processor.json").unlink()  # The authors of LISA write none.
    if form == "shards":
        cut(folder)
    if form == "pickle":
        as_pickle(folder)
    # CLIP is a repository of its own, as it is for all published ones.
    clip = put(folder / "clip", hub, "clip")
    shutil.rmtree(folder / "clip")
    content = json.loads((folder / "config.json").read_text()) | {"mm_vision_tower": clip}
    (folder / "config.json").write_text(json.dumps(content))
    return put(folder, hub, "model"), 3 if form == "shards" else 2


def publish_llava(folder: Path, hub: Path) -> str:
    """The toy LLaVA in its authors' layout, its CLIP in a repository of its own."""
    backbone = load_llava(toys() / "llava")
    llava = backbone.model
    state = {
        published.their_name(published.LLAVA + name, False): tensor.contiguous()
        for name, tensor in llava.state_dict().items()
        if "vision_tower" not in name
    }
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    backbone.tokenizer.save_pretrained(folder)
    llava.model.vision_tower.save_pretrained(folder / "clip")
    backbone.image_processor.save_pretrained(folder / "clip")
    config = CoresConfig(llava=llava.config, level_token_ids=[0, 1])
    content = published.their_config(
        config, "LlavaLlamaForCausalLM", put(folder / "clip", hub, "clip"), image_marks=False
    )
    shutil.rmtree(folder / "clip")
    (folder / "config.json").write_text(json.dumps(content))
    return put(folder, hub, "llava")


def run_flags(folder: Path, version: str, **changes: object) -> list[str]:
    few = {"epochs": 1, "steps_per_epoch": 1, "no_eval": "true", "log_base_dir": folder / "runs"}
    return flags(toys(), **(few | changes), version=version)


FINISHED = ("ours", "lisa", "lisa shards", "lisa pickle", "cores", "cores shards")


@pytest.mark.parametrize("layout", FINISHED)
def test_chat_opens_a_finished_model_once(tmp_path, hub, monkeypatch, layout):
    name, files = finished(tmp_path / "model", hub, layout)
    count = Count(monkeypatch)
    segmenter = ReasoningSegmenter.from_pretrained(name)
    assert tuple(segmenter.processor.levels) == LEVELS.get(layout.split()[0], ("LOC", "SEG"))
    count.check(files)


@pytest.mark.parametrize("layout", FINISHED)
def test_evaluation_opens_a_finished_model_once(tmp_path, hub, monkeypatch, layout):
    name, files = finished(tmp_path / "model", hub, layout)
    count = Count(monkeypatch)
    argv = run_flags(tmp_path, name, no_eval="false", eval_mode="teacher_forced")
    assert train_ds.main([*argv, "--eval_only"]) == 0
    count.check(files)


@pytest.mark.parametrize("layout", FINISHED)
def test_training_goes_on_from_a_finished_model_opened_once(tmp_path, hub, monkeypatch, layout):
    name, files = finished(tmp_path / "model", hub, layout)
    count = Count(monkeypatch)
    method = "lisa" if layout.startswith("lisa") else "cores"
    assert train_ds.main(run_flags(tmp_path, name, method=method)) == 0
    count.check(files)


def test_training_opens_backbones_once(tmp_path, hub, monkeypatch):
    name = put(toys() / "llava", hub, "llava")
    count = Count(monkeypatch)
    assert train_ds.main(run_flags(tmp_path, name)) == 0
    count.check(files=2)


def test_training_opens_published_backbones_once(tmp_path, hub, monkeypatch):
    name = publish_llava(tmp_path / "llava", hub)
    count = Count(monkeypatch)
    assert train_ds.main(run_flags(tmp_path, name)) == 0
    count.check(files=3)


def test_a_local_folder_never_asks_the_hub(tmp_path, hub, monkeypatch):
    name, _ = finished(tmp_path / "model", hub, "ours")
    count = Count(monkeypatch)
    ReasoningSegmenter.from_pretrained(tmp_path / "model")
    assert not count.hub and list(count.read.values()) == [1]


@pytest.mark.parametrize("layout", [*FINISHED, "llava", "published llava"])
def test_the_kind_is_known_without_reading_weights(tmp_path, hub, monkeypatch, layout):
    if layout == "llava":
        name, kind = put(toys() / "llava", hub, "llava"), Kind.LLAVA
    elif layout == "published llava":
        name, kind = publish_llava(tmp_path / "llava", hub), Kind.PUBLISHED_LLAVA
    else:
        name, _ = finished(tmp_path / "model", hub, layout)
        kind = Kind.CORES if layout == "ours" else Kind.PUBLISHED_CORES
    count = Count(monkeypatch)
    opened = open_source(name)
    assert opened.kind is kind and opened.finished == (kind in (Kind.CORES, Kind.PUBLISHED_CORES))
    # The one format without a header.
    assert len(count.read) == (layout == "lisa pickle")


def test_what_is_no_model_is_something_else(tmp_path):
    assert open_source(tmp_path).kind is Kind.OTHER
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert open_source(tmp_path).kind is Kind.OTHER and not open_source(tmp_path).finished


def test_two_models_of_one_source_share_no_memory(tmp_path, hub):
    """One may be trained in place while the other is used."""
    name, _ = finished(tmp_path / "model", hub, "ours")
    opened = open_source(name)
    first, second = (CoresForReasoningSegmentation.from_pretrained(opened) for _ in range(2))
    before = second.reasoning.llava.lm_head.weight.detach().clone()
    with torch.no_grad():
        first.reasoning.llava.lm_head.weight.zero_()
    assert torch.equal(second.reasoning.llava.lm_head.weight, before)
    assert CoresProcessor.from_pretrained(opened).tokenizer is opened.tokenizer


def test_weights_stay_mapped(tmp_path, hub):
    """A 7B model must not be copied into memory: every parameter lies in the file's mapping."""
    name, _ = finished(tmp_path / "model", hub, "ours")
    model = CoresForReasoningSegmentation.from_pretrained(name)
    file = (open_source(name).folder / "model.safetensors").resolve()
    mapped = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(file))
    ]
    outside = [
        name
        for name, p in model.named_parameters()
        if not any(start <= p.data_ptr() < end for start, end in mapped)
    ]
    assert mapped and not outside


def test_training_says_that_it_needs_posix(tmp_path, monkeypatch, capsys):
    monkeypatch.delattr("signal.alarm")
    assert train_ds.main(run_flags(tmp_path, str(toys() / "llava"))) == 2
    assert "training needs POSIX" in capsys.readouterr().err
