"""The notebooks run from their first cell to their last."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.scripted import scripted_model

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def run(name: str, tmp_path: Path, monkeypatch, **variables: str) -> nbformat.NotebookNode:
    """The notebook as it is, in its own process and a folder of its own."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("CORES_WORK", str(tmp_path / "work"))
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    book = read(ROOT / "examples" / f"{name}.ipynb")
    NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    return book


def shown(book: nbformat.NotebookNode) -> str:
    return "".join(
        output.get("text", "") + output.get("data", {}).get("text/html", "")
        for cell in book.cells
        for output in cell.get("outputs", [])
    )


def test_they_are_committed_without_outputs():
    assert {path.stem for path in NOTEBOOKS} == {
        "ask_a_picture",
        "own_pictures",
        "score_other_masks",
    }
    for path in NOTEBOOKS:
        for cell in read(path).cells:
            assert not cell.get("outputs") and cell.get("execution_count") is None


def test_asking_a_picture(tmp_path, monkeypatch):
    book = run("ask_a_picture", tmp_path, monkeypatch, CORES_MODEL=str(scripted_model()))
    assert "It is [LOC] on [SEG]" in shown(book) and "data:image/png;base64," in shown(book)
    assert list((tmp_path / "answers").glob("*.png"))


@pytest.mark.slow
def test_scoring_other_masks(tmp_path, monkeypatch):
    book = run("score_other_masks", tmp_path, monkeypatch)
    assert "colourful on SynthReason|val" in shown(book)
    assert (tmp_path / "work" / "result" / "report.html").is_file()


@pytest.mark.slow
def test_own_pictures(tmp_path, monkeypatch):
    """Two steps from a model that answers by rule; what sixty from the demo's do is for readers."""
    model = str(scripted_model())
    book = run("own_pictures", tmp_path, monkeypatch, CORES_MODEL=model, CORES_STEPS="2")
    assert "gIoU" in shown(book) and " → " in shown(book)
    assert (tmp_path / "work" / "after" / "ckpt").is_dir()
