"""Free answers: groups of tokens, the key-value cache, hidden states, and masks like those of
teacher forcing."""

from functools import cache

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessor, LogitsProcessorList

from cores.dataset.collate import collate, collate_prompts
from cores.model.masks import complete_groups
from cores.model.reasoning.generation import (
    Decoding,
    KVCache,
    decode,
    draft,
    prefill,
    unpadded_prompts,
)
from tests.helpers import LEVELS, TEMPLATE, conversation, randomise, sample, tiny_model


class Say(LogitsProcessor):
    """Makes row n say ``rows[n]``, token by token, and the end token after that."""

    def __init__(self, rows: list[list[int]], end: int):
        self.rows, self.end, self.step = rows, end, 0

    def __call__(self, input_ids, scores):
        scores = torch.full_like(scores, -torch.inf)
        for n, row in enumerate(self.rows):
            scores[n, row[self.step] if self.step < len(row) else self.end] = 0.0
        self.step += 1
        return scores


@pytest.fixture(scope="module")
def scene():
    """A model, its processor and two pictures with questions of three lengths. Not to be
    changed."""
    model, processor = tiny_model()
    randomise(model.segmenting.refiner, seed=7, scale=0.2)
    samples = [
        sample(
            conversation(1),
            conversation(2, question="Please segment the red wheel. what is the dog?"),
            name="0",
        ),
        sample(
            conversation(1, question="a b c? the dog", size=(30, 60)),
            name="1",
            size=(30, 60),
            seed=2,
        ),
    ]
    return model, processor, samples


def prompts_and_answers(scene):
    """The prompts of the scene, its teacher-forced batch, and the ids of its answers without the
    end token."""
    _, processor, samples = scene
    prompts = collate_prompts(samples, processor, LEVELS, TEMPLATE)
    batch = collate(samples, processor, LEVELS, TEMPLATE)
    answers = [row[row >= 0].tolist()[:-1] for row in batch.labels]
    assert len({int(n) for n in prompts.attention_mask.sum(1)}) == 3
    return prompts, batch, answers


def say(processor, answers):
    return LogitsProcessorList([Say(answers, processor.tokenizer.eos_token_id)])


@pytest.mark.parametrize(
    ("answer", "groups"),
    [
        ([], []),
        ([5, 6, 7], []),
        ([8, 5, 9, 6], [[0, 2]]),
        ([8, 9, 8, 5, 9], [[0, 1], [2, 4]]),
        ([9, 5], []),  # [SEG] without [LOC]
        ([9, 8, 9], [[1, 2]]),
        ([8, 8, 9], [[1, 2]]),  # the later [LOC] starts over
        ([8, 9, 9], [[0, 1]]),  # the second [SEG] has no [LOC]
        ([8, 5], []),
    ],
)
def test_complete_groups(answer, groups):
    assert complete_groups(answer, [8, 9]) == groups


def test_groups_of_one_and_three_levels():
    assert complete_groups([9, 5, 9], [9]) == [[0], [2]]
    assert complete_groups([1, 2, 3, 1, 3, 1, 2, 3], [1, 2, 3]) == [[0, 1, 2], [5, 6, 7]]


def test_forced_answers_give_the_masks_of_teacher_forcing(scene):
    """Left-padded prompts of three lengths against right-padded full sequences: same masks, texts
    and estimates."""
    model, processor, _ = scene
    prompts, batch, answers = prompts_and_answers(scene)
    results = model.generate(prompts, processor.tokenizer, logits_processor=say(processor, answers))
    expected = model.segment(batch)
    assert [len(r.masks) for r in results] == [1, 2, 1]
    assert results[0].text.split() == [
        "It",
        "appears",
        "on",
        "[LOC]",
        ".",
        "It",
        "is",
        "[SEG]",
        ".",
    ]
    for result, truth, ids in zip(results, expected, answers, strict=True):
        assert result.emitted and result.finished
        assert result.token_ids == ids
        assert result.masks.dtype == torch.bool
        assert result.masks.shape == truth.masks.shape
        assert (result.masks != truth.masks).float().mean() < 1e-3  # measured: no pixel differs
        assert torch.allclose(result.iou, truth.iou, atol=1e-4)


def generated(model, prompts, processor, **options):
    """(ids (N, M), states (N, M, d)) of free answers, before any mask is made."""
    features = model.reasoning.image_features(prompts.clip_pixels)
    cache, hidden = prefill(model.reasoning, prompts, features)
    steps = decode(
        cache,
        hidden,
        processor.tokenizer.eos_token_id,
        Decoding.of(**options),
        unpadded_prompts(prompts),
    )
    ids, states = zip(*steps, strict=True)
    return torch.stack(ids, 1), torch.stack(states, 1)


@torch.no_grad()
def test_states_equal_those_of_one_pass(scene):
    """Step by step with the cache, or over the whole sequence at once: the same hidden states.
    Measured: 1e-6."""
    model, processor, _ = scene
    prompts, batch, answers = prompts_and_answers(scene)
    ids, states = generated(model, prompts, processor, logits_processor=say(processor, answers))
    hidden = model.hidden_states(batch)
    assert states.shape[:2] == ids.shape
    for row, answer in enumerate(answers):
        end = int(batch.attention_mask[row].sum()) - 1  # of the end token
        start = end - len(answer)
        assert (
            batch.input_ids[row, start:end].tolist() == ids[row, : len(answer)].tolist() == answer
        )
        assert torch.allclose(
            states[row, : len(answer) + 1], hidden[row, start - 1 : end], atol=1e-5
        )


@torch.no_grad()
def test_cache_and_shared_prefix_change_nothing(scene):
    """Against the whole sequence read anew for every token, each row alone."""
    model, processor, samples = scene
    prompts, _, _ = prompts_and_answers(scene)
    ids, states = generated(model, prompts, processor, max_new_tokens=12)
    assert len(ids.unique()) > 1
    features = model.reasoning.image_features(prompts.clip_pixels)
    for row, image in enumerate(prompts.image_index.tolist()):
        text = prompts.input_ids[row, prompts.attention_mask[row].bool()].tolist()
        for step, token in enumerate(ids[row].tolist()):
            embeddings = model.reasoning.embed(
                torch.tensor([text]), features, torch.tensor([image])
            )
            last = model.reasoning.hidden_states(
                embeddings, torch.ones(1, len(text), dtype=torch.int64)
            )[0, -1]
            assert torch.allclose(states[row, step], last, atol=1e-5)
            assert int(model.reasoning.llava.lm_head(last).argmax()) == token
            if token == processor.tokenizer.eos_token_id:
                break
            text.append(token)


def test_vision_runs_once_and_steps_are_short(scene):
    """One pass of CLIP over the pictures, one of the language model over what questions of an image
    share, one over the rest, then one position a step."""
    model, processor, _ = scene
    prompts, _, answers = prompts_and_answers(scene)
    vision, language = [], []  # the shape of each output
    llava = model.reasoning.llava.model
    handles = [
        part.register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(output.last_hidden_state.shape)
        )
        for part, seen in ((llava.vision_tower, vision), (llava.language_model, language))
    ]
    try:
        model.generate(
            prompts,
            processor.tokenizer,
            logits_processor=say(processor, answers),
            prompt_lookup_num_tokens=0,
        )
    finally:
        for handle in handles:
            handle.remove()
    steps = max(len(a) for a in answers)
    shared, rest = (n for _, n, _ in language[:2])
    assert [tuple(shape[:2]) for shape in vision] == [(2, 5)]
    assert [shape[0] for shape in language] == [2, 3] + [3] * steps
    assert [shape[1] for shape in language[2:]] == [1] * steps
    assert shared > 4 and shared + rest == prompts.input_ids.shape[1], (
        "the picture is in the shared part"
    )


def passes_of(model, run):
    """(what ``run()`` returns, how many positions each pass of the language model read)."""
    lengths = []
    language = model.reasoning.llava.model.language_model
    handle = language.register_forward_hook(
        lambda module, args, output: lengths.append(output.last_hidden_state.shape[1])
    )
    try:
        return run(), lengths
    finally:
        handle.remove()


# An answer that repeats its question; one that leaves it after five words; one of a row that ends
# before the others; one that repeats itself and hits the limit of 12 in a draft.
WORDS = [
    [[5, 6, 7, 8, 9, 10, 11]],
    [[5, 6, 7, 8, 9, 20, 21, 22]],
    [[5, 6], [5, 6, 7, 8, 9, 10, 11]],
    [[30, 31] * 10],
]


@torch.no_grad()
@pytest.mark.parametrize("answers", WORDS)
@pytest.mark.parametrize("known", [[5, 6, 7, 8, 9, 10, 11], [6, 7, 5, 6, 20]])
def test_drafts_change_nothing_but_the_number_of_passes(scene, answers, known):
    """Tokens, states and what the cache keeps, with drafts that are right, right at first, and
    wrong."""
    model, processor, _ = scene
    reasoning, end = model.reasoning, processor.tokenizer.eos_token_id
    ids = torch.tensor([[1, *known, 2]] * len(answers))
    found = {}
    for count in (0, 1, 4, 8):
        decoding = Decoding(
            12, prompt_lookup_num_tokens=count, logits_processor=(Say(answers, end),)
        )
        cache = KVCache(reasoning)
        hidden = cache.extend(reasoning.llava.get_input_embeddings()(ids), torch.ones_like(ids))[
            :, -1
        ]
        steps, lengths = passes_of(
            model, lambda c=cache, h=hidden, d=decoding: list(decode(c, h, end, d, ids.tolist()))
        )
        tokens, states = (torch.stack(part, dim=1) for part in zip(*steps, strict=True))
        keys = [
            layer.keys[:, :, : ids.shape[1] + tokens.shape[1] - 1] for layer in cache.cache.layers
        ]
        found[count] = tokens, states, torch.stack(keys), len(lengths)
    tokens, states, keys, passes = found[0]
    assert passes == tokens.shape[1] - 1
    for count, (ids_, states_, keys_, passes_) in found.items():
        assert torch.equal(ids_, tokens), count
        for row, answer in enumerate(answers):  # what a row reads after its end is nothing
            own = slice(len(answer) + 1)
            assert torch.allclose(states_[row, own], states[row, own], atol=1e-5)
            own = slice(ids.shape[1] + len(answer))
            assert torch.allclose(keys_[:, row, :, own], keys[:, row, :, own], atol=1e-5)
        assert passes_ <= passes
    if known[:2] == [5, 6] and len(answers) == 1 and answers[0][-1] == 11:
        assert found[8][3] == 3, "5, then 6, then 7 and all the rest"


class Favour:
    """Keeps state: every call makes another word likelier, in place. ``calls``: the shapes of what
    was found by then."""

    def __init__(self):
        self.calls: list[tuple[int, ...]] = []

    def __call__(self, input_ids, scores):
        self.calls.append(tuple(input_ids.shape))
        scores[:, 7 * len(self.calls) % scores.shape[1]] += 5
        return scores


@cache
def language_model():
    model, processor = tiny_model()
    randomise(model)
    return model.reasoning, processor.tokenizer.eos_token_id


FEW = st.integers(4, 5)  # two words, so that everything was found before


# a failure is short enough as it is
@settings(max_examples=40, deadline=None, phases=(Phase.generate,))
@given(st.lists(st.lists(FEW, min_size=8, max_size=16), min_size=1, max_size=2), st.data())
@torch.no_grad()
def test_whatever_is_read_and_said_drafts_change_nothing(prompts, data):
    """Rows of other lengths that end at other steps, scripted or drawn at random, cut at any
    length, drafts of any length."""
    reasoning, end = language_model()
    width, draw = max(map(len, prompts)), data.draw
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    answers = (
        None
        if draw(st.booleans())
        else [draw(st.lists(FEW, min_size=4, max_size=12)) for _ in prompts]
    )
    limit, count, found = draw(st.integers(5, 14)), draw(st.integers(1, 20)), []
    for drafted in (0, count):
        torch.manual_seed(0)
        favour = Favour()
        processors = (favour,) if answers is None else (favour, Say(answers, end))
        decoding = Decoding(limit, answers is None, 0.5, 0.9, drafted, processors)
        cache = KVCache(reasoning)
        hidden = cache.extend(reasoning.llava.get_input_embeddings()(ids), mask)[:, -1]
        tokens, states = (
            torch.stack(part, 1)
            for part in zip(*decode(cache, hidden, end, decoding, prompts), strict=True)
        )
        assert cache.length < width + limit, "nothing is read beyond the longest answer"
        found.append((tokens, states, favour.calls))
    (tokens, states, calls), (tokens_, states_, calls_) = found
    assert torch.equal(tokens, tokens_) and calls == calls_
    for row, own in enumerate(tokens.tolist()):
        until = own.index(end) + 1 if end in own else len(own)
        torch.testing.assert_close(states[row, :until], states_[row, :until], atol=1e-5, rtol=1e-4)


def test_sampling_with_drafts_draws_the_same(scene):
    model, processor, _ = scene
    prompts, _, _ = prompts_and_answers(scene)
    drawn = []
    for count in (0, 8):
        torch.manual_seed(0)
        run = lambda n=count: model.generate(  # noqa: E731
            prompts,
            processor.tokenizer,
            max_new_tokens=24,
            do_sample=True,
            temperature=0.3,
            prompt_lookup_num_tokens=n,
        )
        drawn.append(passes_of(model, run))
    assert [r.token_ids for r in drawn[0][0]] == [r.token_ids for r in drawn[1][0]]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([0, 1, 2, 3, 4, 0, 1, 2], [3, 4, 0]),  # what followed 0 1 2
        ([0, 1, 2, 3, 0, 1, 2, 4, 0, 1, 2], [4, 0, 1]),  # the last time
        ([7, 0, 1, 2, 3, 0, 1, 2, 4, 7, 0, 1, 2], [3, 0, 1]),  # 7 0 1 2 says more than 0 1 2
        ([1, 2, 3, 1, 2], []),  # two ids say too little
        ([1, 2, 3, 4], []),
        ([0, 1, 2, 9, 3, 0, 1, 2], []),  # 9 is the end
        ([0, 1, 2, 3, 9, 0, 1, 2], [3]),
        ([4, 4, 4, 4], [4]),
        ([1], []),
        ([], []),
    ],
)
def test_a_draft_is_what_followed_before(ids, expected):
    assert draft(ids, 3, never=(9,)) == expected
    assert draft(ids, 0, never=(9,)) == []


@torch.no_grad()
def test_a_picture_is_never_drafted(scene, monkeypatch):
    """The words before it, found again: its tokens stand beyond the table of embeddings in a
    published LLaVA."""
    model, processor, _ = scene
    reasoning, end = model.reasoning, processor.tokenizer.eos_token_id
    embed = reasoning.llava.get_input_embeddings()
    image = embed.num_embeddings
    monkeypatch.setattr(type(reasoning), "image_token_id", image)
    answers = [[5, 6, 7, 8, 9, 10]]
    cache = KVCache(reasoning)
    read = torch.tensor([[1, 5, 6, 7, 8, 2, 2, 4]])
    hidden = cache.extend(embed(read), torch.ones_like(read))[:, -1]
    decoding = Decoding(8, logits_processor=(Say(answers, end),))
    found = [
        int(token)
        for token, _ in decode(cache, hidden, end, decoding, [[1, 5, 6, 7, 8, image, image, 4]])
    ]
    assert found == [*answers[0], end]


def test_masks_need_one_pass_of_sam(scene):
    model, processor, _ = scene
    prompts, _, answers = prompts_and_answers(scene)
    shapes = []
    handle = model.segmenting.sam.image_encoder.register_forward_hook(
        lambda module, args, output: shapes.append(len(output))
    )
    try:
        model.generate(
            prompts, processor.tokenizer, logits_processor=say(processor, [[7], [7], [7]])
        )
        assert shapes == [], "nothing to segment"
        model.generate(prompts, processor.tokenizer, logits_processor=say(processor, answers))
        assert shapes == [2]
    finally:
        handle.remove()


def test_rows_answer_alone_as_together(scene):
    model, processor, samples = scene
    prompts, _, _ = prompts_and_answers(scene)
    together = model.generate(prompts, processor.tokenizer, max_new_tokens=8)
    alone = model.generate(
        collate_prompts(samples[1:], processor, LEVELS, TEMPLATE),
        processor.tokenizer,
        max_new_tokens=8,
    )
    assert alone[0].token_ids == together[2].token_ids


def test_incomplete_answers_have_no_masks(scene):
    """[SEG] without [LOC], [LOC] without [SEG] and no token at all count as not emitted, beside a
    row with a mask."""
    model, processor, samples = scene
    loc, seg = model.config.level_token_ids
    prompts, _, _ = prompts_and_answers(scene)
    results = model.generate(
        prompts,
        processor.tokenizer,
        logits_processor=say(processor, [[6, seg], [loc, 6, seg, seg], [6, loc]]),
    )
    assert [r.emitted for r in results] == [False, True, False]
    assert [tuple(r.masks.shape) for r in results] == [
        (0, 2, 50, 40),
        (1, 2, 50, 40),
        (0, 2, 30, 60),
    ]
    assert [tuple(r.iou.shape) for r in results] == [(0, 2), (1, 2), (0, 2)]
    nothing = model.generate(
        prompts, processor.tokenizer, logits_processor=say(processor, [[], [6], [7, 8]])
    )
    assert [r.emitted for r in nothing] == [False] * 3
    assert [r.token_ids for r in nothing] == [[], [6], [7, 8]]
    assert nothing[0].text == ""


def test_answers_stop_at_the_limit(scene):
    model, processor, _ = scene
    prompts, _, answers = prompts_and_answers(scene)
    results = model.generate(
        prompts, processor.tokenizer, max_new_tokens=4, logits_processor=say(processor, answers)
    )
    assert [r.token_ids for r in results] == [a[:4] for a in answers]
    assert not any(r.finished for r in results)


def test_sampling_follows_the_seed(scene):
    model, processor, _ = scene
    prompts, _, _ = prompts_and_answers(scene)
    answers = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results = model.generate(
            prompts, processor.tokenizer, max_new_tokens=12, do_sample=True, temperature=2.0
        )
        answers.append([r.token_ids for r in results])
    assert answers[0] == answers[1] != answers[2]


def test_top_p_leaves_the_likeliest_tokens(scene):
    """With almost no probability left, only the likeliest token is, and so it is near temperature
    0; at a high temperature, all of them are drawn."""
    model, processor, _ = scene
    prompts, _, _ = prompts_and_answers(scene)

    def drawn(**options) -> list[list[int]]:
        torch.manual_seed(0)
        answers = model.generate(prompts, processor.tokenizer, max_new_tokens=12, **options)
        return [answer.token_ids for answer in answers]

    hot = {"do_sample": True, "temperature": 5.0}
    assert drawn(**hot, top_p=1e-6) == drawn() != drawn(**hot)
    assert drawn(do_sample=True, temperature=1e-4) == drawn()


def test_top_p_is_the_share_that_is_drawn_from():
    """Of 0.5, 0.3, 0.15 and 0.05: three quarters are the first two, which together have as much."""
    logits = torch.tensor([0.05, 0.5, 0.15, 0.3]).log().expand(400, 4)
    said = torch.zeros((400, 0), dtype=torch.int64)
    torch.manual_seed(0)
    for top_p, tokens in ((0.4, {1}), (0.75, {1, 3}), (0.9, {1, 2, 3}), (1.0, {0, 1, 2, 3})):
        decoding = Decoding(do_sample=True, top_p=top_p)
        assert set(decoding.choose(said, logits).tolist()) == tokens


def test_what_would_mix_up_states_is_refused(scene):
    model, processor, _ = scene
    prompts, _, _ = prompts_and_answers(scene)
    for options, words in (
        ({"num_beams": 2}, "no such option of generation: num_beams"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"prompt_lookup_num_tokens": -1}, "prompt_lookup_num_tokens is -1"),
    ):
        with pytest.raises(ValueError, match=words):
            model.generate(prompts, processor.tokenizer, **options)
    try:
        model.train()
        with pytest.raises(ValueError, match="evaluation mode"):
            model.generate(prompts, processor.tokenizer)
    finally:
        model.eval()
