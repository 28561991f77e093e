"""Batches: padding, images shared by conversations, counting guards."""

import dataclasses
import logging

import numpy as np
import pytest
import torch

from cores.dataset.collate import Batch, collate, collate_prompts
from cores.dataset.conversation.encoding import IGNORE_INDEX
from cores.dataset.conversation.turns import Conversation
from cores.dataset.conversation.wordings import answer
from cores.dataset.files.errors import DataError
from cores.dataset.sample import LoaderOptions, Sample
from tests.dataset_toys import LEVELS, ToyProcessor, word_tokenizer


def conversation(targets: int, size=(6, 8), question="What is the dog?", **fields) -> Conversation:
    masks = np.zeros((targets, *size), bool)
    for k in range(targets):
        masks[k, k, 0] = True
    reply = answer(LEVELS, targets=targets) if targets else ["It is a red bus."]
    return Conversation([(question, reply)], masks, **fields)


def sample(*conversations: Conversation, size=(6, 8), name="a", exemplars=()) -> Sample:
    image = np.full((*size, 3), 7, np.uint8)
    return Sample(
        image, f"{name}.jpg", list(conversations), "reasoning", "Toy", name, list(exemplars)
    )


def build(samples, processor=None, **kwargs) -> Batch:
    return collate(samples, processor or ToyProcessor(), LEVELS, "tiny", **kwargs)


def test_batch_of_two_images_and_three_conversations():
    processor = ToyProcessor(image_token_count=3)
    ignore = np.ones((6, 8), bool)
    first = sample(
        conversation(1, ignore=ignore), conversation(2, question="What is the wheel of a red bus?")
    )
    second = sample(conversation(0, (4, 4), is_sentence=True), size=(4, 4), name="b")
    batch = build([first, second], processor)
    n, length = batch.input_ids.shape
    assert n == 3 and batch.attention_mask.shape == batch.labels.shape == (3, length)
    assert batch.image_index.tolist() == [0, 0, 1]
    assert processor.clip_calls == processor.sam_calls == 2, (
        "pixels are made once per image, not per conversation"
    )
    assert batch.clip_pixels.shape == (2, 3, 4, 4) and batch.sam_pixels.shape == (2, 3, 8, 8)
    assert batch.original_sizes == [(6, 8), (4, 4)] and batch.resized_sizes == [(6, 8), (8, 8)]
    assert [tuple(m.shape) for m in batch.target_masks] == [(1, 6, 8), (2, 6, 8), (0, 4, 4)]
    assert all(m.dtype == torch.bool for m in batch.target_masks)
    assert batch.ignore_masks[0].sum() == 48 and batch.ignore_masks[1:] == [None, None]
    assert batch.host_masks == [None] * 3
    assert [i["conversation"] for i in batch.info] == [0, 1, 0] and batch.info[2][
        "is_sentence"
    ] is True
    assert batch.info[0]["query"] == "What is the dog?" and batch.info[2]["id"] == "b"


def test_padding_is_on_the_right_and_the_mask_comes_from_lengths():
    unknown = conversation(0, question="zebra zebra?")  # unknown words share the id of padding
    processor = ToyProcessor()
    batch = build([sample(unknown, conversation(2))], processor)
    lengths = batch.attention_mask.sum(1).tolist()
    alone = [build([sample(c)]).input_ids.shape[1] for c in (unknown, conversation(2))]
    assert lengths == alone
    for row, length in enumerate(lengths):
        assert batch.attention_mask[row].tolist() == [1] * length + [0] * (
            batch.input_ids.shape[1] - length
        )
        assert (batch.labels[row, length:] == IGNORE_INDEX).all()
        assert batch.labels[row, length - 1] == processor.tokenizer.eos_token_id


def test_prompts_are_padded_on_the_left_and_end_where_the_answer_begins():
    conversations = [conversation(1), conversation(1, question="What is the wheel of a red bus?")]
    whole = build([sample(*conversations)])
    batch = collate_prompts([sample(*conversations)], ToyProcessor(), LEVELS, "tiny")
    assert (batch.labels == IGNORE_INDEX).all() and batch.attention_mask[:, -1].all()
    for row in range(2):
        prompt = batch.input_ids[row][batch.attention_mask[row].bool()]
        full = whole.input_ids[row][whole.attention_mask[row].bool()]
        start = int((whole.labels[row] != IGNORE_INDEX).nonzero()[0])
        assert prompt.tolist() == full[:start].tolist()
    assert torch.equal(batch.target_masks[0], whole.target_masks[0])


def test_prompt_of_several_turns_asks_the_last_and_keeps_its_masks():
    masks = np.zeros((3, 6, 8), bool)
    masks[2, 5, 5] = True
    turns = [("What is the dog?", answer(LEVELS, targets=2)), ("What is the bus?", answer(LEVELS))]
    several = Conversation(turns, masks, host_masks=masks)
    batch = collate_prompts([sample(several)], ToyProcessor(), LEVELS, "tiny")
    assert torch.equal(batch.target_masks[0], torch.from_numpy(masks[2:])) and batch.host_masks[
        0
    ].shape == (1, 6, 8)
    assert batch.info[0]["query"] == "What is the bus?"
    seg = ToyProcessor().tokenizer.convert_tokens_to_ids("[SEG]")
    assert (batch.input_ids == seg).sum() == 2, "the history keeps its tokens"


def test_exemplars_reach_the_tokens():
    plain, guided = (
        build([sample(conversation(1))]),
        build([sample(conversation(1), exemplars=[("What is a kettle?", "It is.")])]),
    )
    assert guided.input_ids.shape[1] > plain.input_ids.shape[1]
    assert (guided.labels != IGNORE_INDEX).sum() == (plain.labels != IGNORE_INDEX).sum()


def test_mismatch_of_tokens_and_masks_names_both_numbers_and_the_sample():
    bad = dataclasses.replace(conversation(2), masks=np.zeros((3, 6, 8), bool))
    with pytest.raises(
        DataError, match=r"Toy a \(a.jpg\), conversation 1: 2 groups .* but 3 target masks"
    ):
        build([sample(conversation(1), bad)])
    with pytest.raises(DataError, match="2 groups .* but 3 target masks"):
        collate_prompts([sample(bad)], ToyProcessor(), LEVELS, "tiny")


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"masks": np.zeros((1, 8, 6), bool)}, "masks"),
        ({"ignore": np.zeros((1, 6, 8), bool)}, "ignore"),
        ({"host_masks": np.zeros((2, 6, 8), bool)}, "host_masks"),
    ],
)
def test_masks_of_another_size_are_refused(fields, name):
    with pytest.raises(DataError, match=f"Toy a .*: {name} has shape"):
        build([sample(dataclasses.replace(conversation(1), **fields))])


def test_too_long_is_an_error_that_names_the_sample_and_the_length():
    processor = ToyProcessor(word_tokenizer(model_max_length=10))
    with pytest.raises(
        DataError, match=r"Toy a .*conversation 0: 23 tokens, but model_max_length is 10"
    ):
        build([sample(conversation(1))], processor)


def test_skip_leaves_out_whole_conversations_and_says_so(caplog):
    processor = ToyProcessor(word_tokenizer(model_max_length=25))
    with caplog.at_level(logging.WARNING):
        batch = build(
            [sample(conversation(2)), sample(conversation(1), name="b")],
            processor,
            on_too_long="skip",
        )
    assert (
        batch.image_index.tolist() == [1] and "Toy a" in caplog.text and "left out" in caplog.text
    )
    assert batch.sam_pixels.shape[0] == 2
    with pytest.raises(DataError, match="no conversation is left"):
        build([sample(conversation(2))], processor, on_too_long="skip")
    with pytest.raises(ValueError, match='must be "raise" or "skip"'):
        build([sample(conversation(2))], processor, on_too_long="cut")


def test_skip_shortens_text_only_conversations_by_whole_turns(caplog):
    turns = [("What is the dog?", ["It is a red bus."])] * 4
    long = Conversation(turns, np.zeros((0, 6, 8), bool))
    two = Conversation(turns[:2], np.zeros((0, 6, 8), bool))
    limit = build([sample(two)]).input_ids.shape[1]
    with caplog.at_level(logging.WARNING):
        batch = build([sample(long)], ToyProcessor(word_tokenizer(limit)), on_too_long="skip")
    assert (
        torch.equal(batch.input_ids, build([sample(two)]).input_ids)
        and "first 2 turns" in caplog.text
    )


def test_to_changes_the_dtype_of_floats_only():
    batch = build([sample(conversation(1, ignore=np.zeros((6, 8), bool)))]).to(
        "cpu", torch.bfloat16
    )
    assert batch.clip_pixels.dtype == batch.sam_pixels.dtype == torch.bfloat16
    assert batch.input_ids.dtype == batch.image_index.dtype == torch.int64
    assert batch.target_masks[0].dtype == batch.ignore_masks[0].dtype == torch.bool
    assert (
        batch.to("meta").target_masks[0].device.type == "meta"
        and batch.to("meta").info == batch.info
    )


@pytest.mark.parametrize(
    "fields",
    [{"levels": ()}, {"levels": ("SEG", "SEG")}, {"num_classes_per_sample": 0}, {"texts": "some"}],
)
def test_options_refuse_contradictions(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        LoaderOptions(**({"levels": LEVELS} | fields))
