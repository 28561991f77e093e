"""The benchmark of the page, in small: memory is flat, and answers do not mix."""

import pytest

from benchmarks.page import measure, mixed
from tests.scripted import scripted_model


@pytest.mark.slow
def test_nothing_is_mixed_and_nothing_is_left(tmp_path):
    pytest.importorskip("gradio", reason="the page needs gradio (requirements-optional.txt)")
    report = measure(str(scripted_model()), tmp_path, conversations=20, at_once=12)
    assert (report["wrong_answers"], report["different_masks"]) == (0, 12)
    assert report["files_left"] == 0, "SIGTERM ends it in order"
    rows = report["in_sequence"]["rows"]
    assert rows[-1]["conversations"] == 20
    assert rows[-1]["memory_mb"] - rows[0]["memory_mb"] < 60


def test_an_answer_of_another_is_noticed():
    right = [{"said": ["where is alone0?", "there"], "masks": [1]}]
    mine = [{"said": ["where is visitor1x?", "there"], "masks": [1]}]
    assert not mixed(mine, right, "visitor1x")
    for other in (
        {"said": ["where is visitor2x?", "there"], "masks": [1]},
        {"said": ["where is visitor1x?", "here"], "masks": [1]},
        {"said": ["where is visitor1x?", "there"], "masks": [2]},
        {"said": ["hi", "x", "where is visitor1x?", "there"], "masks": [1]},
    ):
        assert mixed([other], right, "visitor1x")
