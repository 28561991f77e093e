"""A query that is a sentence is asked as written, in whatever script it ends."""

import pytest

from cores.dataset.conversation.wordings import is_sentence
from cores.dataset.readers.own.formats import with_article


@pytest.mark.parametrize(
    "text",
    [
        "Show the box.",
        "the box?",
        "赤い箱を示してください。",
        "请指出红色的箱子？",
        "「赤い箱を示してください。」",
        "أين الصندوق الأحمر؟",
        "लाल डिब्बा दिखाइए।",
        "ይህ ምንድን ነው፧",
        "the box…",
    ],
)
def test_a_sentence_of_any_script(text):
    assert is_sentence(text)
    assert with_article(text) == text


@pytest.mark.parametrize("text", ["the box", "赤い箱", "box (red)", 'the "box"', "collie, 2"])
def test_a_phrase_is_none(text):
    assert not is_sentence(text)


def test_only_a_name_in_latin_letters_gets_an_article():
    assert with_article("dog") == "the dog"
    assert with_article("2 dogs") == "the 2 dogs"
    assert with_article("éclair") == "the éclair"
    assert with_article("赤い箱") == "赤い箱"
    assert with_article("собака") == "собака"
