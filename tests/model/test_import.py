"""The package in a process of its own, as another program imports it, on a system without what only
POSIX has: inference runs on Windows, too."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cores.model import ReasoningSegmenter
from tests.scripted import scripted_model

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import builtins, sys

real = builtins.__import__
POSIX = ("fcntl", "resource", "termios", "pwd", "grp", "tty", "pty")

def without_posix(name, globals=None, *args, **kwargs):
    # other packages decide by the system what they import, and here they are on a POSIX one
    importer = (globals or {}).get("__name__", "").split(".")[0]
    if name in POSIX and importer == "cores":
        raise ImportError(f"{importer} imports {name}, which only POSIX systems have")
    return real(name, globals, *args, **kwargs)

builtins.__import__ = without_posix

from cores.model import ReasoningSegmenter
from transformers import AutoModel, AutoProcessor, GenerationConfig

folder, photo = sys.argv[1:]
loaded, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
assert type(loaded).__name__ == "CoresForReasoningSegmentation"
assert type(processor).__name__ == "CoresProcessor"
assert GenerationConfig.from_pretrained(folder).eos_token_id == processor.tokenizer.eos_token_id
result = ReasoningSegmenter.from_pretrained(folder, max_new_tokens=12)(photo, "where?")
print(result.text, len(result.masks))
"""


def test_every_public_name_is_found_and_torch_only_with_the_first():
    program = """
import sys
from cores import model
import cores.utils.settings.arguments
assert not {"torch", "transformers", "peft"} & sys.modules.keys(), "a command line waits for torch"
assert all(getattr(model, name).__name__ == name for name in model.__all__)
assert "peft" not in sys.modules
assert not hasattr(model, "Nobody")
"""
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("module", ["fcntl", "pwd"])
def test_the_program_refuses_what_only_posix_has(module, tmp_path):
    """So the test below can fail."""
    (tmp_path / "cores.py").write_text(f"import {module}")
    found = start(tmp_path, cwd=tmp_path)
    assert f"cores imports {module}" in found.stderr


def test_a_saved_model_answers_in_another_process_without_posix(tmp_path):
    """Found by its auto classes, too; the answer is that of this process."""
    folder, photo = scripted_model(), tmp_path / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(photo)
    found = start(folder, photo, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    result = ReasoningSegmenter.from_pretrained(folder, max_new_tokens=12)(photo, "where?")
    assert len(result.masks) == 1
    assert found.stdout.splitlines()[-1] == f"{result.text} {len(result.masks)}"


def start(*argv: object, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", PROGRAM, *map(str, argv)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240)
