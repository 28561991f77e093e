"""The benchmarks of chat at the smallest size: both sides agree, what differs is found, and the
memory table adds up."""

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from benchmarks import chat, memory
from tests.test_repo import ROOT


@pytest.fixture(scope="module")
def large():
    return memory.build_published(*memory.PUBLISHED[memory.CHAT_13B])


def test_both_schedules_agree_and_are_timed(tmp_path, capsys):
    file = tmp_path / "chat.json"
    assert (
        chat.main(
            [
                "--size",
                "tiny",
                "--tokens",
                "9",
                "--queries",
                "3",
                "--repeats",
                "1",
                "--json",
                str(file),
            ]
        )
        == 0
    )
    results = json.loads(file.read_text())["results"]
    words = AutoTokenizer.from_pretrained(ROOT / "assets" / "tiny" / "llava").tokenize(
        " It appears on. It is."
    )
    tokens = {name: row["tokens"] for name, row in results.items()}
    assert tokens == {
        "generation": 8,
        "follow_up": 8,
        "follow_up_alike": len(words) + len(chat.LEVELS),
        "evaluation": 24,
    }
    for row in results.values():
        assert (
            row["ratio"] == row["median_seconds"]["published"] / row["median_seconds"]["ours"] > 0
        )
        assert row.get("pixels_that_differ", 0) <= 1e-4
    assert results["evaluation"]["ratio"] > 1, (
        "three answers at once, against a pass of everything for each token"
    )


def test_a_difference_is_found():
    mask = np.zeros((1, 2, 50, 50), dtype=bool)
    other = mask.copy()
    other[0, 1, :2] = True
    chat.check_answers("follow_up", ([1, 2], mask), ([1, 2], mask))
    same, nothing = ([1, 2], mask), ([1], mask[:0])
    for ours, published in ((same, ([1, 3], mask)), (same, ([1, 2], other)), (nothing, nothing)):
        with pytest.raises(RuntimeError, match="evaluation"):
            chat.check_answers("evaluation", [ours], [published])
    with pytest.raises(RuntimeError, match="generation"):
        chat.check_answers("generation", [1], [2])


def test_stored_ratios_keep_their_promise():
    stored = json.loads(chat.RESULTS.read_text())
    assert "--size small" in stored["command"]
    ratios = {name: row["ratio"] for name, row in stored["results"].items()}
    assert ratios["generation"] >= 8 and ratios["follow_up"] >= 15 and ratios["evaluation"] >= 8
    assert ratios["follow_up_alike"] >= 15


def test_a_13b_model_is_counted_right(large):
    """Vicuna's blocks: four square and three wide layers and two norms, 40 times."""
    assert all(p.is_meta for p in large.parameters())
    d, wide = 5120, 13824
    blocks = 40 * (4 * d * d + 3 * d * wide + 2 * d)
    parts = memory.parts(large)
    assert parts["language model, decoder blocks"] == blocks
    assert parts["SAM"] == pytest.approx(641e6, rel=1e-3), "SAM ViT-H's published size"
    table = memory.chat_memory(large, 1000)
    assert table["bf16"]["language model, decoder blocks"] == 2 * blocks
    assert table["bf16"]["keys and values, 1000 tokens"] == 2 * 2 * 40 * 5120 * 1000
    assert table["fp32"]["SAM"] == 2 * table["bf16"]["SAM"] == 2 * table["4-bit"]["SAM"]
    small = (
        table["4-bit"]["language model, decoder blocks"]
        / table["bf16"]["language model, decoder blocks"]
    )
    assert 0.25 < small < 0.26, "half a byte and 3 % of scales instead of two bytes"


def test_the_table_of_the_docs_is_the_computed_one(large):
    assert memory.chat_table(large, 2048) in (ROOT / "docs" / "chat.md").read_text(encoding="utf-8")


def test_marks_that_are_missing_are_said(tmp_path, capsys):
    (tmp_path / "a.md").write_text("no marks")
    with pytest.raises(SystemExit, match="2"):
        memory.main(["--chat", "--write", str(tmp_path / "a.md")])
    assert "has no marks" in capsys.readouterr().err
