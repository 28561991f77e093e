"""An exemplar never gives away the sample's own question, in training or evaluation."""

import pytest

from cores.dataset.conversation import exemplars
from cores.dataset.mixture import EvalDataset, TrainMixture
from tests.dataset_toys import LEVELS, square, write_image, write_json

QUESTIONS = [f"Where is part {i}?" for i in range(4)]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """An image whose two queries, worded as data sets word them, are in the library."""
    pairs = [{"q": question, "a": "It is on the side."} for question in QUESTIONS]
    library = exemplars.ExemplarLibrary(write_json(tmp_path / "exemplars.json", pairs))
    monkeypatch.setattr(exemplars, "default_library", lambda: library)
    for split in ("train", "val"):
        folder = tmp_path / "data" / "reason_seg" / "Own" / split
        write_image(folder / "a.jpg")
        texts = ["where is part 1", "Where is part 2?"]
        record = {"text": texts, "is_sentence": True, "shapes": [square(1, 1, 6, 6)]}
        write_json(folder / "a.json", record)
    return tmp_path / "data"


def test_no_exemplar_of_a_training_sample_is_its_own_question(data):
    mixture = TrainMixture(
        data, "reason_seg", [1], LEVELS, 20, exemplar_count=2, reason_seg_data="Own|train"
    )
    for index in range(20):
        sample = mixture[index]
        assert len(sample.conversations) == 2, "both queries are asked, the second one counts, too"
        assert {question for question, _ in sample.exemplars} == {QUESTIONS[0], QUESTIONS[3]}


def test_no_exemplar_of_an_evaluation_sample_is_its_own_question(data):
    found = set()
    for seed in range(10):
        evaluation = EvalDataset(data, "Own|val", LEVELS, exemplar_count=1, seed=seed, texts="all")
        found |= {question for question, _ in evaluation[0].exemplars}
    assert found == {QUESTIONS[0], QUESTIONS[3]}
