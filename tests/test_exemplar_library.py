"""The library of in-context exemplars that comes with the code."""

import re

import pytest

from dataset.exemplars import LIBRARY_PATH
from dataset.images import read_json

ITEMS = read_json(LIBRARY_PATH)
HEDGE = "(typically|usually|commonly|often)"
PLACE = rf"It ({HEDGE} (appears|grows|hangs|runs|stands)|is {HEDGE} (found|fitted|mounted)) "
LOOK = rf"It is {HEDGE} "


def words(item: dict) -> set[str]:
    return set(re.findall(r"\w+", f"{item['q']} {item['a']}".lower()))


def test_there_are_at_least_200_from_at_least_15_domains():
    assert len(ITEMS) >= 200
    assert len({item["domain"] for item in ITEMS}) >= 15


def test_they_are_sorted_by_domain():
    domains = [item["domain"] for item in ITEMS]
    assert domains == sorted(domains)


def test_no_question_is_asked_twice():
    assert len({re.sub(r"\W+", " ", item["q"].lower()).strip() for item in ITEMS}) == len(ITEMS)


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item["q"][:40])
def test_form(item):
    assert set(item) == {"domain", "q", "a"}
    assert item["q"].endswith("?")
    assert 4 <= len(item["q"].split()) <= 20
    assert 8 <= len(item["a"].split()) <= 40
    text = item["q"] + item["a"]
    assert text.isascii() and text.isprintable()
    assert not set("[]<>{}()|") & set(text), "an exemplar has no special tokens"


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item["q"][:40])
def test_the_answer_goes_from_the_place_to_the_thing(item):
    sentences = re.split(r"(?<=[.!?])\s+", item["a"])
    assert len(sentences) == 2 and all(sentence.endswith(".") for sentence in sentences)
    assert re.match(PLACE, sentences[0]), "the first sentence says where it appears"
    assert re.match(LOOK, sentences[1]), "the second sentence says what it is"


def test_no_two_are_nearly_the_same():
    sets = [words(item) for item in ITEMS]
    for i, a in enumerate(sets):
        for j in range(i):
            assert len(a & sets[j]) / len(a | sets[j]) <= 0.8, (ITEMS[i], ITEMS[j])
