"""The library of in-context exemplars that comes with the code."""

import re

import pytest

from cores.dataset.conversation.exemplars import LIBRARY_PATH
from cores.dataset.files.text import read_json

ITEMS = read_json(LIBRARY_PATH)


def words(item: dict) -> set[str]:
    return set(re.findall(r"\w+", f"{item['q']} {item['a']}".lower()))


def test_there_are_at_least_200_from_at_least_12_domains():
    assert len(ITEMS) >= 200
    assert len({item["domain"] for item in ITEMS}) >= 12


def test_no_question_is_asked_twice():
    assert len({re.sub(r"\W+", " ", item["q"].lower()).strip() for item in ITEMS}) == len(ITEMS)


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item["q"][:40])
def test_form(item):
    assert item["q"].endswith("?")
    assert 4 <= len(item["q"].split()) <= 20
    assert 8 <= len(item["a"].split()) <= 40
    assert len(re.findall(r"[.](?:\s|$)", item["a"])) == 2, (
        "first where it appears, then what it is"
    )
    text = item["q"] + item["a"]
    assert text.isascii()
    assert not set("[]<>{}") & set(text), "an exemplar has no special tokens"


def test_no_two_are_nearly_the_same():
    sets = [words(item) for item in ITEMS]
    for i, a in enumerate(sets):
        for j in range(i):
            assert len(a & sets[j]) / len(a | sets[j]) <= 0.8, (ITEMS[i], ITEMS[j])
