"""Checkpoints as people have them: damaged, with too few rows or files, with a tokenizer of its
own."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from cores.model.build import build_from_backbones
from cores.model.checkpoints.llava import load_llava
from cores.model.checkpoints.sam import load_sam
from cores.model.checkpoints.source import open_source
from tests.helpers import LEVELS, backbones


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the tiny LLaVA in transformers' layout, under a name with a space and a letter
    beyond ASCII."""
    return Path(shutil.copytree(backbones()[0], tmp_path / "mein Ordner ü"))


def build(folder: Path):
    return build_from_backbones(str(folder), backbones()[1], LEVELS, template="tiny")


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def name_a_missing_shard(file: Path) -> None:
    index = {"weight_map": dict.fromkeys(load_file(file), "gone.safetensors")}
    file.with_name("model.safetensors.index.json").write_text(json.dumps(index))
    file.unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, r"model\.safetensors: not a file of weights"),
        (name_a_missing_shard, r"index\.json: names the shard gone\.safetensors"),
        (Path.unlink, "no weights here"),
    ],
)
def test_a_damaged_llava_of_transformers_layout_is_named(folder, damage, words):
    damage(folder / "model.safetensors")
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        load_llava(str(folder))


def test_an_index_that_was_left_behind_beside_a_whole_file_is_not_read(folder):
    shutil.copy(folder / "model.safetensors", folder / "kept")
    name_a_missing_shard(folder / "model.safetensors")
    (folder / "kept").rename(folder / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"another format, damaged")
    assert load_llava(str(folder)).model.dtype == torch.float32


def test_a_folder_without_a_tokenizer_is_named(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="mein Ordner ü: has no tokenizer"):
        load_llava(str(folder))


def test_a_config_that_names_no_architecture_is_of_the_layout_that_its_fields_are(folder):
    config = json.loads((folder / "config.json").read_text())
    config.pop("architectures")
    (folder / "config.json").write_text(json.dumps(config))
    assert load_llava(str(folder)).image_marks is None


@pytest.fixture
def offline_hub(tmp_path, monkeypatch) -> Path:
    """The empty cache of a hub that does not answer."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_hub_that_cannot_be_asked_is_no_hub_that_lacks_the_file(offline_hub):
    with pytest.raises(FileNotFoundError, match="owner/name: the hub cannot be reached"):
        open_source("owner/name")


def test_what_the_cache_has_of_a_model_is_enough_without_the_hub(offline_hub):
    snapshot = offline_hub / "models--owner--name" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("c0ffee")
    source = open_source("owner/name")
    assert source.file("config.json") == snapshot / "config.json"
    assert source.file("cores_processor.json") is None


@pytest.mark.parametrize("extra", [["[SEG]"], [f"<extra{i}>" for i in range(5)]])
def test_every_row_that_a_token_lacked_starts_as_the_mean(folder, extra):
    old = load_llava(str(folder)).model.get_input_embeddings().weight
    tokenizer = AutoTokenizer.from_pretrained(folder)
    known = sorted(i for i in tokenizer.get_vocab().values() if i < len(old))
    tokenizer.add_tokens(extra)
    tokenizer.save_pretrained(folder)
    model, _ = build(folder)
    rows = model.get_input_embeddings().weight
    assert len(rows) == len(tokenizer) + len({"[LOC]", "[SEG]"} - set(extra))
    assert torch.equal(rows[: len(old)], old)
    assert torch.allclose(
        rows[len(old) :], old[known].mean(0).expand(len(rows) - len(old), -1), atol=1e-6
    )


def test_no_code_in_a_pickle_is_run(tmp_path, folder):
    marker = tmp_path / "marker"

    class Code:
        def __reduce__(self):
            return Path.touch, (marker,)

    torch.save({"image_encoder.pos_embed": Code()}, tmp_path / "sam.pth")
    with pytest.raises(ValueError, match=r"sam\.pth: not a file of weights"):
        load_sam(tmp_path / "sam.pth")
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Code()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: not a file of weights"):
        load_llava(str(folder))
    assert not marker.exists()
