"""ReasoningSegmenter and its sessions, on a model that answers by rule (tests/scripted.py) and on
random ones."""

import base64
import contextlib
import gc
import html
import io
import json
import re
import tracemalloc
import warnings
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from cores.dataset.collate import collate_prompts
from cores.dataset.files.errors import DataError
from cores.dataset.files.rle import decode_rle
from cores.model import ReasoningSegmenter, Session
from cores.model.inference.inputs import clean_question, load_image
from tests.helpers import conversation, sample, tiny_model
from tests.scripted import scripted_model

ANSWER = "It is [LOC] on [SEG]"


@pytest.fixture(scope="module")
def segmenter() -> ReasoningSegmenter:
    return ReasoningSegmenter.from_pretrained(scripted_model(), max_new_tokens=12)


@pytest.fixture(scope="module")
def random_segmenter() -> ReasoningSegmenter:
    """Every token of its answers depends on all that was said before."""
    return ReasoningSegmenter(*tiny_model(), max_new_tokens=8)


def picture(seed: int = 0, size: tuple[int, int] = (50, 40)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def same(a, b) -> bool:
    return a.text == b.text and all(
        np.array_equal(x.mask, y.mask) for x, y in zip(a.masks, b.masks, strict=True)
    )


# ------------------------------------------------------------------------------------------ answers


def test_an_answer_has_text_masks_and_numbers(segmenter):
    result = segmenter(picture(), "where is the dog?")
    assert result.text == ANSWER and result.finished
    (found,) = result.masks
    assert list(found.levels) == ["LOC", "SEG"] and list(found.coarse) == ["LOC"]
    assert found.mask.dtype == bool and found.mask.shape == (50, 40)
    assert 0 < found.area == found.mask.sum() < found.mask.size
    x0, y0, x1, y1 = found.box
    assert found.mask[y0:y1, x0:x1].sum() == found.area
    assert (
        found.mask[y0].any()
        and found.mask[y1 - 1].any()
        and found.mask[:, x0].any()
        and found.mask[:, x1 - 1].any()
    )
    assert np.array_equal(decode_rle(found.rle, (50, 40), "answer", "rle"), found.mask)
    assert found.predicted_iou == found.ious["SEG"]


def test_no_token_no_mask_and_several_tokens_several_masks(segmenter):
    nothing = segmenter(picture(), "hello?")
    assert (nothing.text, nothing.masks, nothing.finished) == ("there", [], True)
    assert np.array_equal(nothing.overlay(), picture())
    assert nothing.to_coco()["annotations"] == []
    many = segmenter(picture(), "the wheel")
    assert many.text.count("[SEG]") == len(many.masks) == 2
    assert not many.finished, "cut at the limit"


def test_masks_are_those_of_the_model(segmenter):
    batch = collate_prompts(
        [sample(conversation(0, question="where?"))], segmenter.processor, ["LOC", "SEG"], "tiny"
    )
    expected = segmenter.model.generate(batch, segmenter.processor.tokenizer)[0]
    result = segmenter(picture(), "where?")
    assert np.array_equal(result.masks[0].levels["LOC"], expected.masks[0, 0].numpy())
    assert np.array_equal(result.masks[0].mask, expected.masks[0, 1].numpy())


def test_overlay_marks_the_mask_and_with_coarse_the_chain(segmenter):
    result = segmenter(picture(), "where?")
    found, shown = result.masks[0], result.overlay()
    assert (shown[found.mask] != result.image[found.mask]).any(-1).mean() > 0.95
    assert result.image is not shown and np.array_equal(result.image, picture())
    assert not np.array_equal(result.overlay(coarse=True), shown)


def test_a_notebook_shows_an_answer_and_a_prompt_prints_it_in_short(segmenter):
    large = np.tile(picture(), (20, 20, 1))  # 1000 × 800
    result = segmenter(large, "which <b>part</b>?")
    assert len(repr(result)) < 400 and "array" not in repr(result)
    assert f"SEG: {result.masks[0].area} pixels" in repr(result)
    page = result._repr_html_()
    assert "<b>which &lt;b&gt;part&lt;/b&gt;?</b>" in page and html.escape(result.text) in page
    figures = re.findall(r'base64,([^"]+)"', page)
    assert len(figures) == len(result.masks[0].levels) == 2
    shown = np.array(Image.open(io.BytesIO(base64.b64decode(figures[-1]))))
    assert shown.shape == (480, 384, 3)
    halves = replace(result, masks=[], finished=False, text="It is [SEG] on [LOC]")
    assert halves.why_no_mask == (
        "the answer says [SEG] [LOC], and a mask needs [LOC] [SEG], in this order"
    )
    silent = halves._repr_html_()
    assert f"No mask: {halves.why_no_mask}" in silent and "was cut" in silent
    assert result.why_no_mask is None
    small = replace(result, image=picture(), masks=[])
    assert np.array(Image.open(io.BytesIO(small._repr_png_()))).shape == picture().shape


def test_what_is_saved_is_the_answer(segmenter, tmp_path):
    result = segmenter(picture(), "the wheel")
    first, second = result.save(tmp_path / "out"), result.save(tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == 10, (
        "two masks of two levels and the overlay, twice"
    )
    for files, found in zip(first["masks"], result.masks, strict=True):
        for level, mask in found.levels.items():
            assert np.array_equal(np.array(Image.open(files[level])), 255 * mask.astype(np.uint8))
    assert np.array_equal(np.array(Image.open(second["overlay"])), result.overlay())
    report = json.loads(json.dumps(result.to_dict(first)))
    assert report["text"] == result.text
    assert [row["files"] for row in report["masks"]] == first["masks"]
    assert [step["level"] for step in report["masks"][0]["chain"]] == ["LOC"]


def test_a_long_name_of_many_bytes_can_be_saved(segmenter, tmp_path):
    photo = tmp_path / f"{'漢' * 80}.png"
    Image.fromarray(picture()).save(photo)
    files = segmenter(photo, "where?").save(tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == 3 and files["overlay"]


def test_coco_is_read_by_pycocotools(segmenter, tmp_path, capsys):
    from pycocotools.coco import COCO

    result = segmenter(picture(), "where is the dog?")
    (tmp_path / "coco.json").write_text(json.dumps(result.to_coco()))
    coco = COCO(tmp_path / "coco.json")
    (row,) = coco.loadAnns(coco.getAnnIds())
    assert np.array_equal(coco.annToMask(row).astype(bool), result.masks[0].mask)
    x0, y0, x1, y1 = result.masks[0].box
    assert row["bbox"] == [x0, y0, x1 - x0, y1 - y0]
    assert coco.loadCats(1)[0]["name"] == "where is the dog?"


# ------------------------------------------------------------------------ several pictures, streams


def test_lists_answer_as_single_calls_do(segmenter):
    pictures = [picture(0), picture(1, (30, 60)), picture(2)]
    questions = ["where?", "hello", "the wheel"]
    alone = [segmenter(p, q) for p, q in zip(pictures, questions, strict=True)]
    for batch_size in (1, 2, 4):
        together = segmenter(pictures, questions, batch_size=batch_size)
        assert all(same(a, b) for a, b in zip(alone, together, strict=True))
    for_all = segmenter(pictures[:2], "where?")
    assert [r.text for r in for_all] == [ANSWER] * 2 and same(for_all[0], alone[0])
    nested = segmenter(pictures[:2], [questions, "where?"])
    assert [r.text for r in nested[0]] == [r.text for r in alone] and same(nested[1], for_all[1])
    many = segmenter(pictures[0], questions * 4)
    assert len(many) == 12 and same(many[11], segmenter(pictures[0], "the wheel"))
    assert segmenter(pictures[0], []) == []


@pytest.mark.parametrize("question", ["where?", "hello", "the wheel"])
def test_a_stream_joins_to_the_answer(segmenter, question):
    stream = segmenter.stream(picture(), question)
    pieces = list(stream)
    assert len(pieces) > 1 or question == "hello"
    assert "".join(pieces) == stream.result.text
    assert same(stream.result, segmenter(picture(), question))


def test_kinds_of_images(segmenter, tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    results = [
        segmenter(p, "where?")
        for p in (
            tmp_path / "a.png",
            str(tmp_path / "a.png"),
            Image.open(tmp_path / "a.png"),
            picture(),
        )
    ]
    assert all(same(results[0], other) for other in results[1:])
    assert [r.name for r in results] == [str(tmp_path / "a.png")] * 3 + ["image"]


# ----------------------------------------------------------------------------------------- sessions


def test_a_session_answers_as_the_whole_conversation_read_anew(random_segmenter):
    """Cached or not: the same. What was said before changes the answer."""
    cached, questions = (
        random_segmenter.open(picture()),
        ["where is the dog?", "a b c", "what is red?", "Please segment a dog"],
    )
    for number, question in enumerate(questions):
        fresh = Session(random_segmenter, picture(), "image")
        fresh.turns = list(cached.turns)
        expected, found = fresh.ask(question), cached.ask(question)
        assert same(expected, found)
        assert len(cached.turns) == number + 1
        assert torch.allclose(
            fresh._cache.cache.layers[1].keys, cached._cache.cache.layers[1].keys, atol=1e-5
        )
    alone = random_segmenter(picture(), questions[-1])
    assert alone.text != found.text, "the history is read"


def test_a_further_question_reads_its_own_tokens_only(segmenter):
    session = segmenter.open(picture())
    model, seen = segmenter.model, {"clip": 0, "sam": 0, "tokens": 0}

    def count(name, size):
        def hook(module, args, kwargs, output):
            seen[name] += size(kwargs)

        return hook

    llava = model.reasoning.llava.model
    handles = [
        llava.vision_tower.register_forward_hook(count("clip", lambda k: 1), with_kwargs=True),
        model.segmenting.sam.image_encoder.register_forward_hook(
            count("sam", lambda k: 1), with_kwargs=True
        ),
        llava.language_model.register_forward_hook(
            count("tokens", lambda k: k["inputs_embeds"].shape[1]), with_kwargs=True
        ),
    ]
    try:
        session.ask("where?")
        first = dict(seen)
        session.ask("where is the dog?")
    finally:
        for handle in handles:
            handle.remove()
    assert (seen["clip"], seen["sam"]) == (0, 0), "both were read when the picture was opened"
    own = [
        "</s>",
        "USER",
        ":",
        "where",
        "is",
        "the",
        "dog",
        "?",
        "ASSISTANT",
        ":",
        "It",
        "is",
        "[LOC]",
        "on",
        "[SEG]",
    ]
    assert seen["tokens"] - first["tokens"] == len(own)


def test_undo_and_reset(random_segmenter):
    session = random_segmenter.open(picture())
    first = session.ask("where is the dog?")
    second = session.ask("a b c")
    assert session.undo() == "a b c"
    assert same(session.ask("a b c"), second)
    session.reset()
    assert session.turns == [] and same(session.ask("where is the dog?"), first)
    assert [session.undo(), session.undo()] == ["where is the dog?", None]


# with drafts this answer takes two passes
@pytest.mark.parametrize(("drafted", "passes"), [(0, (0, 1, 3)), (8, (0, 1))])
def test_an_interrupted_answer_changes_nothing(random_segmenter, monkeypatch, drafted, passes):
    decoding = replace(random_segmenter.decoding, prompt_lookup_num_tokens=drafted)
    monkeypatch.setattr(random_segmenter, "decoding", decoding)
    session = random_segmenter.open(picture())
    session.ask("where is the dog?")
    turns = list(session.turns)
    expected = session.ask("a b c")
    session.undo()
    layer = random_segmenter.model.reasoning.llava.model.language_model.layers[1]
    for calls in passes:  # the first layer has read what the second has not
        left = calls

        def stop(*_):
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1

        handle = layer.register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            session.ask("what is red?")
        handle.remove()
        assert session.turns == turns
        assert same(session.ask("a b c"), expected)
        session.undo()


def test_a_stream_that_is_given_up(random_segmenter):
    session = random_segmenter.open(picture())
    expected = session.ask("a b c")
    session.reset()
    stream = session.stream("where is the dog?")
    next(stream)
    assert same(session.ask("a b c"), expected)
    with pytest.raises(ValueError, match="interrupted"):
        _ = stream.result
    assert len(session.turns) == 1


@pytest.mark.parametrize("kind", [{}, {"selecting": True, "chain": True}])
def test_a_session_that_is_over_is_freed_at_once(kind):
    """Not when Python looks for circles: its features and KV cache are large, and CUDA's memory is
    nothing that Python would look for."""
    segmenter = ReasoningSegmenter.from_pretrained(scripted_model(**kind), max_new_tokens=12)

    def half(session: Session) -> None:
        next(session.stream("where?"))

    def refused(session: Session) -> None:
        with contextlib.suppress(ValueError):
            session.ask("")

    def failing(session: Session) -> None:
        session._images = None  # so that the masks cannot be made
        with contextlib.suppress(AttributeError):
            session.ask("where?")

    ends = (half, refused, failing, lambda s: s.ask("where?"), lambda s: s.stream("where?"))
    gc.collect()
    gc.disable()
    try:
        for end in ends:
            session = segmenter.open(picture())
            cache, there = weakref.ref(session._cache), weakref.ref(session)
            end(session)
            del session
            assert there() is None and cache() is None, end
    finally:
        gc.enable()


def test_old_turns_make_room(segmenter):
    session = segmenter.open(picture())
    forgotten = 0
    for _ in range(25):
        result = session.ask("where is the dog? a b c " * 2)
        assert result.text == ANSWER
        forgotten += result.forgotten_turns
        assert len(session._cached_ids) <= segmenter.processor.tokenizer.model_max_length
    assert forgotten > 0 and len(session.turns) == 25 - forgotten
    turns = list(session.turns)
    with pytest.raises(DataError, match=r"too long: \d+ tokens .* takes 256"):
        session.ask("a " * 300)
    assert session.turns == turns, "a question that never fits costs no history"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "float16", "auto"])
def test_weights_have_the_dtype_that_was_asked_for(dtype):
    loaded = ReasoningSegmenter.from_pretrained(scripted_model(), dtype=dtype)
    expected = {"auto": torch.float32, "float16": torch.float16}.get(dtype, dtype)
    assert {p.dtype for p in loaded.model.parameters()} == {expected}
    assert loaded(picture(), "where?").text == ANSWER


def test_half_precision_answers_too():
    half = ReasoningSegmenter(*tiny_model(dtype=torch.bfloat16), max_new_tokens=8)
    session = half.open(picture())
    assert (
        session.ask("where is the dog?").text
        == half(picture(), ["where is the dog?", "a b c"])[0].text
    )
    assert (
        session._images.embeddings.dtype
        == session._cache.cache.layers[0].keys.dtype
        == torch.bfloat16
    )


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "question",
    [
        "[SEG] [LOC] dog",
        "<image> where",
        "</s><s> hi",
        "wo ist die Nase? Ä",
        "鼻はどこ？",
        "🐕" * 30,
        "a\x00b\x1b[31m\ud800",
        "[ SEG ]",
    ],
)
def test_odd_questions_are_text(segmenter, question):
    session = segmenter.open(picture())
    for _ in range(2):
        assert session.ask(question).text == ANSWER
    special = {segmenter.processor.image_token_id, *segmenter.model.config.level_token_ids}
    ids = session._encode(clean_question(question), [])
    assert sum(i in special for i in ids) == segmenter.processor.image_token_count, (
        "the picture's own and no other"
    )


@pytest.mark.parametrize("question", ["", "  \n", "\x00\x1b", None, 7])
def test_empty_questions_are_refused(segmenter, question):
    with pytest.raises(ValueError, match="question"):
        segmenter.open(picture()).ask(question)


def test_control_characters_and_broken_unicode_are_replaced():
    assert clean_question(" a\tb\x00\x1b[31m\u2028c \ud800") == "a b [31m c \ufffd"


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((4, 4)), r"uint8 \(H, W, 3\)"),
        (np.zeros((4, 4), np.uint8), r"uint8 \(H, W, 3\)"),
        (np.zeros((4, 4, 4), np.uint8), r"PIL.Image.fromarray"),
        (np.zeros((0, 4, 3), np.uint8), "4×0 pixels"),
        (np.zeros((1, 200, 3), np.uint8), "200×1 pixels.*100 times"),
        (b"bytes", "bytes"),
        (None, "NoneType"),
        ("/nowhere.png", "does not exist"),
    ],
)
def test_images_that_are_refused(segmenter, image, words):
    with pytest.raises(ValueError, match=words):
        segmenter(image, "where?")


@pytest.mark.parametrize(
    ("query", "words"),
    [
        (None, "query: give a text or a list of texts, got NoneType"),
        (7, "query: give a text or a list of texts, got int"),
        (b"where?", "query: give a text or a list of texts, got bytes"),
        ({"where?": 1}, "query: give a text or a list of texts, got dict"),
        (["where?", 7], "query: a question must be a text, got int 7"),
        ([["where?"]], r"query: a question must be a text, got list"),
        (["where?", " "], "query: the question is empty"),
    ],
)
def test_queries_that_are_refused(segmenter, query, words):
    with pytest.raises(ValueError, match=words):
        segmenter(picture(), query)


@pytest.mark.parametrize(
    ("images", "query", "words"),
    [
        (
            2,
            None,
            "query: give a text for all images or a list with an entry for each, got NoneType",
        ),
        (2, ["where?", None], r"query\[1\]: give a text or a list of texts, got NoneType"),
        (2, ["where?", ["where?", 1.5]], r"query\[1\]: a question must be a text, got float 1.5"),
        (1, ["a", "b"], "1 images but 2 entries"),
    ],
)
def test_queries_of_several_pictures_that_are_refused(segmenter, images, query, words):
    with pytest.raises(ValueError, match=words):
        segmenter([picture()] * images, query)


def test_the_picture_that_is_refused_is_named(segmenter):
    with pytest.raises(ValueError, match=r"image\[1\]: give a path.*got NoneType"):
        segmenter([picture(), None], "where?")
    with pytest.raises(ValueError, match=r"image\[0\]: an array must be uint8"):
        segmenter([np.zeros((4, 4)), picture()], "where?")
    for size in (0, "2", None, 1.5):
        with pytest.raises(ValueError, match="batch_size is .* whole number"):
            segmenter([picture()], "where?", batch_size=size)


def test_a_view_of_an_array_is_a_picture(segmenter):
    """Mirrored, as torch cannot take it, and not writable."""
    pixels = np.array(picture())
    pixels.setflags(write=False)
    copy = np.ascontiguousarray(pixels[:, ::-1])
    assert np.array_equal(
        segmenter(pixels[:, ::-1], "where?").masks[0].mask, segmenter(copy, "where?").masks[0].mask
    )


def test_a_decompression_bomb_is_refused_with_the_limit(tmp_path):
    """100 megapixels of one colour are a few kilobytes on disk; they are never decoded."""
    bomb = Image.new("1", (10_000, 10_000))
    bomb.save(tmp_path / "bomb.png")
    tracemalloc.start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for source in (tmp_path / "bomb.png", bomb):
            with pytest.raises(DataError, match="limit of 89478485 pixels"):
                load_image(source)
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_files_are_read_or_refused(tmp_path, kind):
    """Bytes changed or cut off at random: never another error than the one line."""
    rng, whole = np.random.default_rng(0), io.BytesIO()
    Image.fromarray(picture()).save(whole, kind)
    messages = []
    for _ in range(80):
        data = bytearray(whole.getvalue())
        for place in rng.integers(0, min(len(data), 400), rng.integers(1, 8)):
            data[place] = rng.integers(0, 256)
        (tmp_path / "damaged").write_bytes(
            data[: rng.integers(0, len(data)) if rng.random() < 0.2 else None]
        )
        try:
            load_image(tmp_path / "damaged")
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 8
    assert not any("\n" in message for message in messages)


def test_files_of_every_mode(tmp_path):
    grey = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (32, 1))
    colour = np.stack([grey, 255 - grey, grey // 2], -1)
    alpha = np.dstack(
        [colour, np.where(np.arange(64) < 32, 255, 0).astype(np.uint8)[None].repeat(32, 0)]
    )
    kinds = {
        "grey.png": (Image.fromarray(grey), np.stack([grey] * 3, -1)),
        "deep.png": (Image.fromarray(grey.astype(np.uint16) * 257), np.stack([grey] * 3, -1)),
        "alpha.png": (
            Image.fromarray(alpha),
            np.where(np.arange(64)[None, :, None] < 32, colour, 255),
        ),
        "cmyk.tif": (Image.fromarray(colour).convert("CMYK"), colour),
    }
    for name, (image, expected) in kinds.items():
        image.save(tmp_path / name)
        for source in (tmp_path / name, image):
            found, _ = load_image(source)
            assert found.dtype == np.uint8 and np.abs(found.astype(int) - expected).max() <= 1, name
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to show
    Image.fromarray(colour).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(load_image(tmp_path / "turned.png")[0], np.rot90(colour, -1))
    (tmp_path / "cut.png").write_bytes((tmp_path / "grey.png").read_bytes()[:-30])
    with pytest.raises(DataError, match=r"cut\.png: broken image"):
        load_image(tmp_path / "cut.png")
