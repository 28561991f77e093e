"""The chat template of a saved processor gives the ids and the labels that
``dataset.conversation.encoding`` gives."""

from pathlib import Path

import numpy as np
import pytest
from transformers import CLIPImageProcessor

from cores.dataset.conversation.encoding import IGNORE_INDEX, encode_conversation
from cores.dataset.conversation.templates import TEMPLATES
from cores.dataset.conversation.turns import AnswerToken, Conversation, answer_text
from cores.model.checkpoints.source import load_tokenizer
from cores.model.processor import CoresProcessor
from tests.dataset_toys import IMAGE, SHARED, metaspace_tokenizer

ROOT = Path(__file__).resolve().parents[3]
LOC, SEG = AnswerToken("LOC"), AnswerToken("SEG")
MARKS = ("<im_start>", "<im_end>")
CHATS = {
    "one turn": [("What is the dog?", ["It appears on ", LOC, ". It is ", SEG, "."])],
    "text first": [
        ("What is the wheel?", ["It is a red bus."]),
        ("And the dog?", ["Sure, ", LOC, " ", SEG, " because it is red."]),
        ("Why?", [LOC, SEG]),
    ],
    "white space": [("  What?\n", ["  It is ", LOC, SEG, ".\n"]), ("The bus?", [SEG, "  It is."])],
}


def recorded(folder):
    if not (folder / "tokenizer.model").exists():
        pytest.skip(f"the tokenizer is not at {folder}")
    return load_tokenizer(str(folder))


TOKENIZERS = {
    "metaspace": metaspace_tokenizer,
    "bytes": lambda: load_tokenizer(str(ROOT / "assets" / "tiny" / "llava")),
    "llama": lambda: recorded(SHARED / "samples" / "tokenizers" / "llama"),
    "legacy": lambda: recorded(SHARED / "reference" / "collate_LISA"),
}


def messages(turns, as_parts: bool) -> list[dict]:
    chat = []
    for index, (question, reply) in enumerate(turns):
        image = [] if index else [{"type": "image"}]
        chat.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
        text = answer_text(reply)
        chat.append(
            {"role": "assistant", "content": [{"type": "text", "text": text}] if as_parts else text}
        )
    return chat


def saved(tokenizer, folder, **fields) -> CoresProcessor:
    tokenizer.add_tokens(["[LOC]", "[SEG]", *MARKS, IMAGE], special_tokens=True)
    processor = CoresProcessor(tokenizer, CLIPImageProcessor(), 64, 1, ["LOC", "SEG"], **fields)
    processor.save_pretrained(folder)
    return CoresProcessor.from_pretrained(folder)


SPACES = [(False, None), (True, None), (True, MARKS)]
# the tokenizers of real models are slow to save: they meet every template once, the way they were
# published
FAST = [
    (kind, name, *spaces)
    for kind in ("metaspace", "bytes")
    for name in TEMPLATES
    for spaces in SPACES
]
REAL = [("llama", name, False, None) for name in TEMPLATES] + [
    ("legacy", name, True, MARKS) for name in TEMPLATES
]


@pytest.mark.parametrize(("kind", "name", "strip", "marks"), FAST + REAL)
def test_a_chat_template_gives_the_ids_and_labels_of_training(tmp_path, kind, name, strip, marks):
    fields = {"template": name, "strip_at_tokens": strip, "image_marks": marks}
    saved(TOKENIZERS[kind](), tmp_path / "a", **fields)
    # the second time is no different
    processor = saved(load_tokenizer(str(tmp_path / "a")), tmp_path / "b", **fields)
    tokenizer = processor.tokenizer
    for label, turns in CHATS.items():
        conversation = Conversation(turns, np.zeros((0, 1, 1), bool))
        encoded = encode_conversation(
            conversation, [], processor.tokenizer, processor.conversation, IMAGE, 1, ["LOC", "SEG"]
        )
        for as_parts in (False, True):
            chat = messages(turns, as_parts)
            found = tokenizer.apply_chat_template(
                chat, return_dict=True, return_assistant_tokens_mask=True
            )
            expected = tokenizer.convert_ids_to_tokens(encoded.input_ids)
            assert tokenizer.convert_ids_to_tokens(found["input_ids"]) == expected, label
            labels = [
                i if m else IGNORE_INDEX
                for i, m in zip(found["input_ids"], found["assistant_masks"], strict=True)
            ]
            assert labels == encoded.labels, label


@pytest.mark.parametrize("system", ["", "Be brief, \U0001f600 and 'kind' <<USER>>."])
def test_the_system_text_is_part_of_the_chat_template(tmp_path, system):
    given = {"role": "system", "content": [{"type": "text", "text": system}]}
    own = saved(metaspace_tokenizer(), tmp_path / "a", system=system).tokenizer
    other = saved(metaspace_tokenizer(), tmp_path / "b", system="another").tokenizer
    chat = messages(CHATS["one turn"], False)
    text = own.apply_chat_template(chat, tokenize=False)
    assert text.startswith(
        f"<s> {system} USER:".replace("  ", " ")
    ) and text == other.apply_chat_template([given, *chat], tokenize=False)
