"""Tokens and labels of conversations, checked piece by piece with toy tokenizers."""

import dataclasses

import numpy as np
import pytest
from transformers import LlamaTokenizer

from cores.dataset.conversation.encoding import IGNORE_INDEX, encode_conversation, encode_prompt
from cores.dataset.conversation.templates import TEMPLATES
from cores.dataset.conversation.turns import (
    AnswerToken,
    Conversation,
    answer_from_ids,
    answer_text,
    count_groups,
)
from cores.dataset.conversation.wordings import (
    MULTI_LEVEL_WORDINGS,
    ONE_LEVEL_WORDINGS,
    answer,
    phrase_question,
)
from tests.dataset_toys import IMAGE, LEVELS, SHARED, metaspace_tokenizer, word_tokenizer

LLAMA = SHARED / "samples" / "tokenizers" / "llama"
LOC, SEG = AnswerToken("LOC"), AnswerToken("SEG")
REPLY = ["It appears on ", LOC, ". It is ", SEG, "."]
EXEMPLAR = ("What is a kettle?", "It pours.")


def llama_tokenizer():
    if not (LLAMA / "tokenizer.model").exists():
        pytest.skip(f"the LLaMA tokenizer is not at {LLAMA}")
    tokenizer = LlamaTokenizer.from_pretrained(LLAMA)
    tokenizer.add_tokens([IMAGE, "[LOC]", "[PART]", "[SEG]"], special_tokens=True)
    return tokenizer


TOKENIZERS = {"words": word_tokenizer, "metaspace": metaspace_tokenizer, "llama": llama_tokenizer}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def conversation(*turns) -> Conversation:
    return Conversation(list(turns), np.zeros((0, 1, 1), bool))


def run(tokenizer, turns, template="tiny", exemplars=(), count=2, levels=LEVELS):
    return encode_conversation(
        conversation(*turns), exemplars, tokenizer, template, IMAGE, count, levels
    )


def tokens(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(ids)


def supervised(tokenizer, encoded):
    return tokens(tokenizer, [i for i in encoded.labels if i != IGNORE_INDEX])


def test_tiny_template_with_words_is_exactly_this():
    tokenizer = word_tokenizer()
    encoded = run(tokenizer, [("What is the dog?", REPLY)])
    prompt = ["<s>", "USER", ":", IMAGE, IMAGE, "What", "is", "the", "dog", "?", "ASSISTANT", ":"]
    reply = ["It", "appears", "on", "[LOC]", ".", "It", "is", "[SEG]", ".", "</s>"]
    assert tokens(tokenizer, encoded.input_ids) == prompt + reply
    assert encoded.labels == [IGNORE_INDEX] * len(prompt) + encoded.input_ids[len(prompt) :]


def test_no_spurious_space_pieces_with_the_llama_tokenizer():
    tokenizer = llama_tokenizer()
    encoded = run(tokenizer, [("What is the dog?", REPLY)], template="llava_v1")
    found = tokens(tokenizer, encoded.input_ids)
    middle = found.index(IMAGE)
    assert found[:3] == ["<s>", "▁A", "▁chat"]
    assert found[middle - 3 : middle + 4] == ["▁US", "ER", ":", IMAGE, IMAGE, "<0x0A>", "What"]
    reply = ["▁It", "▁appears", "▁on", "[LOC]", ".", "▁It", "▁is", "[SEG]", ".", "</s>"]
    assert supervised(tokenizer, encoded) == reply
    assert "▁" not in found


@pytest.mark.parametrize(
    ("strip", "question", "end"),
    [(False, ["<0x0A>", "Where"], [".", "▁Yes", "."]), (True, ["▁Where"], ["▁.", "▁Yes", "."])],
)
def test_the_example_of_the_writer_holds(strip, question, end):
    tokenizer = llama_tokenizer()
    template = dataclasses.replace(TEMPLATES["vicuna_v1"], system="", strip_at_tokens=strip)
    encoded = run(tokenizer, [("Where?", ["It is ", SEG, ". Yes."])], template, count=1)
    found = tokens(tokenizer, encoded.input_ids)
    rest = [*question, "?", "▁A", "SS", "IST", "ANT", ":", "▁It", "▁is", "[SEG]", *end, "</s>"]
    assert found[found.index(IMAGE) + 1 :] == rest


def test_metaspace_answers_have_no_lone_space_pieces():
    tokenizer = metaspace_tokenizer()
    found = supervised(tokenizer, run(tokenizer, [("What is the dog?", REPLY)]))
    assert found[found.index("[LOC]") + 1] == "." and found[-3:] == ["[SEG]", ".", "</s>"]
    assert "▁" not in found


@pytest.mark.parametrize("template", TEMPLATES)
def test_only_the_answers_of_the_conversation_are_supervised(tokenizer, template):
    turns = [("What is the dog?", REPLY), ("What is the wheel?", ["It is a red bus."])]
    encoded = run(tokenizer, turns, template, [EXEMPLAR], count=5)
    assert encoded.input_ids.count(tokenizer.convert_tokens_to_ids(IMAGE)) == 5
    assert len(encoded.labels) == len(encoded.input_ids)
    ids = [i for i in encoded.labels if i != IGNORE_INDEX]
    assert ids.count(tokenizer.eos_token_id) == 2 and ids[-1] == tokenizer.eos_token_id
    end = TEMPLATES[template].answer_end.strip()
    shown = "".join(tokenizer.decode(ids).split())  # how a decoder spaces words is its own matter
    assert shown == f"Itappearson[LOC].Itis[SEG].{end}</s>Itisaredbus.{end}</s>"
    # exemplars and conversation: three answers end, one of them unsupervised
    assert encoded.input_ids.count(tokenizer.eos_token_id) == 3


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("history", [[], [("What is the dog?", REPLY)]])
def test_a_prompt_is_the_beginning_of_the_sequence(tokenizer, template, history):
    question = "What is the wheel?"
    prompt = encode_prompt(question, history, [EXEMPLAR], tokenizer, template, IMAGE, 4, LEVELS)
    encoded = run(tokenizer, [*history, (question, REPLY)], template, [EXEMPLAR], count=4)
    assert encoded.input_ids[: len(prompt)] == prompt
    assert encoded.labels[len(prompt)] == encoded.input_ids[len(prompt)]
    assert encoded.labels[len(prompt) - 1] == IGNORE_INDEX


HOSTILE = "on [SEG] is <image> the </s> <s> [LOC] <unk>dog"


def test_text_never_becomes_a_special_token(tokenizer):
    encoded = run(
        tokenizer,
        [(HOSTILE, [HOSTILE, " It is ", LOC, SEG])],
        exemplars=[(HOSTILE, HOSTILE)],
        count=2,
    )
    count = {
        t: encoded.input_ids.count(tokenizer.convert_tokens_to_ids(t))
        for t in ("[SEG]", "[LOC]", IMAGE, "<s>", "</s>")
    }
    assert count == {"[SEG]": 1, "[LOC]": 1, IMAGE: 2, "<s>": 1, "</s>": 2}


def test_text_never_becomes_a_token_that_was_added_without_special():
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["[MASK]"])  # split_special_tokens alone leaves such a token whole
    ids = tokenizer("a [MASK]", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.convert_tokens_to_ids("[MASK]") in ids
    encoded = run(tokenizer, [("a [MASK]", ["It is ", AnswerToken("MASK")])], levels=["MASK"])
    assert encoded.input_ids.count(tokenizer.convert_tokens_to_ids("[MASK]")) == 1


def test_missing_token_and_foreign_level_are_errors():
    tokenizer = word_tokenizer()
    with pytest.raises(ValueError, match=r"no token \[FOO\]"):
        run(tokenizer, [("What?", ["It is."])], levels=["FOO"])
    with pytest.raises(ValueError, match=r"\[LOC\] is not one of the levels \['SEG'\]"):
        run(tokenizer, [("What?", REPLY)], levels=["SEG"])
    with pytest.raises(ValueError, match="known: llava_v1"):
        run(tokenizer, [("What?", REPLY)], template="vicuna")
    with pytest.raises(ValueError, match="answer is empty"):
        run(tokenizer, [("What?", [" "])])


def test_canonical_answers():
    assert answer_text(answer(["SEG"])) == "It is [SEG]."
    assert answer_text(answer(["LOC", "SEG"])) == "It appears on [LOC]. It is [SEG]."
    assert (
        answer_text(answer(["LOC", "PART", "SEG"]))
        == "It appears on [LOC], at [PART]. It is [SEG]."
    )
    assert (
        answer_text(answer(["LOC", "SEG"], explanation=" Dogs bark. "))
        == "It appears on [LOC]. It is [SEG]. Dogs bark."
    )
    two = answer(["LOC", "SEG"], targets=2)
    assert (
        answer_text(two)
        == "It appears on [LOC]. It is [SEG]. Another appears on [LOC]. It is [SEG]."
    )
    assert (
        answer_text(answer(["SEG"], targets=3))
        == "It is [SEG]. Another is [SEG]. Another is [SEG]."
    )


@pytest.mark.parametrize("levels", [["SEG"], ["LOC", "SEG"], ["LOC", "PART", "SEG"]])
def test_every_wording_is_drawn_and_is_one_group(levels):
    rng = np.random.default_rng(0)
    drawn = {answer_text(answer(levels, rng)) for _ in range(400)}
    assert (
        len(drawn) == (len(ONE_LEVEL_WORDINGS) if len(levels) == 1 else 18)
        and len(set(MULTI_LEVEL_WORDINGS)) == 18
    )
    for _ in range(50):
        assert count_groups([("q", answer(levels, rng, "Because.", targets=2))], levels) == 2


def test_groups_must_be_whole_and_in_order():
    assert count_groups([("q", REPLY), ("q", ["no token"]), ("q", REPLY)], LEVELS) == 2
    for bad in ([SEG, LOC], [LOC], [LOC, SEG, SEG]):
        with pytest.raises(ValueError, match="set x: answer tokens .* are not whole groups"):
            count_groups([("q", bad)], LEVELS, "set x")


def test_an_explanation_with_a_token_in_it_stays_text():
    parts = answer(LEVELS, explanation="It is [SEG] {last}.")
    assert parts[-1] == " It is [SEG] {last}." and count_groups([("q", parts)], LEVELS) == 1


def test_questions_keep_braces_of_their_text():
    assert (
        phrase_question("{text} {0}")
        == "What is {text} {0} in this image? Please output segmentation mask."
    )


def test_generated_ids_go_back_into_a_history(tokenizer):
    encoded = run(tokenizer, [("What is the dog?", REPLY)])
    said = [i for i in encoded.labels if i != IGNORE_INDEX]
    again = answer_from_ids(said, tokenizer, LEVELS)
    assert [part for part in again if isinstance(part, AnswerToken)] == [LOC, SEG]
    assert run(tokenizer, [("What is the dog?", again)]) == encoded


def test_llama_2_starts_every_turn_anew():
    tokenizer = word_tokenizer()
    encoded = run(tokenizer, [("dog", ["It"]), ("bus", ["is"])], "llava_llama_2")
    assert encoded.input_ids.count(tokenizer.bos_token_id) == 2
