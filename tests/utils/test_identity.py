"""What a run is made of is recognised, wherever it lies and in whatever format."""

import shutil

import pytest
import torch

from cores import merge_lora_weights_and_save_hf_model as merging
from cores.utils import identity
from cores.utils.settings.arguments import read_resumed, settings_of
from cores.utils.settings.flags import UsageError
from tests.backbone_toys import toys, trained_run


def test_every_tensor_counts_and_its_float_type_does_not():
    weights = {f"w{i}": torch.randn(50, 40) for i in range(30)}
    found = identity.of_tensors(weights)
    assert identity.of_tensors({k: v.double() for k, v in reversed(weights.items())}) == found
    for name in weights:
        assert identity.of_tensors(weights | {name: weights[name] * 1.001}) != found
    assert identity.of_tensors(weights | {"w0": weights["w0"].reshape(40, 50)}) != found
    assert identity.of_tensors({}) and identity.of_tensors({"a": torch.tensor(1.0)})


def test_a_small_file_counts_whole(tmp_path):
    file = tmp_path / "f"
    content = bytearray(range(256)) * 40
    file.write_bytes(content)
    found = identity.of_file(file)
    for place in (0, 5000, len(content) - 1):
        content[place] ^= 1
        file.write_bytes(content)
        assert identity.of_file(file) != found
        content[place] ^= 1


def test_versions_and_all_changes_are_named(tmp_path):
    s = settings_of(read_resumed(trained_run()))
    last = trained_run() / "ckpt" / "last"
    now = {
        "versions": {"torch": "9", "program": "x", "new": "1"},
        "data": {"Toy|train": {"images": 3}},
    }
    with pytest.raises(UsageError) as error:
        identity.refuse_changes(last, now, s, "going on")
    assert "torch was 2." in str(error.value) and "and is 9; " in str(error.value)
    assert "the program is another version" in str(error.value)
    old = shutil.copytree(last, tmp_path / "old")
    (old / identity.IDENTITY).unlink()
    identity.refuse_changes(old, now, s, "going on")


def test_an_older_checkpoint_without_identity_is_said(tmp_path, caplog):
    run = shutil.copytree(trained_run(), tmp_path / "run")
    for name in (identity.IDENTITY, "settings.json", "files.json"):
        (run / "ckpt" / "best" / name).unlink()
    assert merging.main(["--run", str(run), "--save_path", str(tmp_path / "m")]) == 0
    assert "an older checkpoint without identity.json; whether weights are still" in caplog.text


def test_other_backbones_are_accepted_by_a_flag(tmp_path, caplog):
    other = shutil.copytree(toys() / "sam", tmp_path / "sam")
    content = bytearray((other / "sam.safetensors").read_bytes())
    content[-1] ^= 1  # of a weight
    (other / "sam.safetensors").write_bytes(content)
    argv = ["--run", str(trained_run()), "--vision_pretrained", str(other)]
    assert merging.main([*argv, "--save_path", str(tmp_path / "a")]) == 2
    assert merging.main([*argv, "--save_path", str(tmp_path / "b"), "--accept_changes"]) == 0
    assert "the weights of --vision_pretrained" in caplog.text
