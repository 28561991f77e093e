"""A user's own data: every form and field, to the pixel; what is the same in all forms; what
training and evaluation make of it."""

import base64
import json

import cv2
import numpy as np
import pytest

from cores.dataset.conversation.turns import answer_text
from cores.dataset.files.errors import DataError, MissingDataError
from cores.dataset.mixture import EvalDataset
from cores.dataset.readers.own.dataset import OwnData
from cores.dataset.readers.reasoning import ReasoningSegmentation
from cores.dataset.sample import LoaderOptions, check_sample
from tests.dataset_toys import LEVELS, square, write_image, write_json
from tests.own_toys import (
    RECTANGLE,
    SIZE,
    box,
    runs,
    write_coco,
    write_labelme,
    write_lines,
    write_mask,
    write_table,
)

TRAIN = LoaderOptions(LEVELS)
EVAL = LoaderOptions(LEVELS, training=False)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def only(root, spec, options=EVAL, seed=0):
    """The conversations of a data set with one image."""
    loader = OwnData(root, spec, options)
    assert len(loader) == 1
    sample = loader.sample(0, rng(seed))
    check_sample(sample, LEVELS)
    return sample.conversations


def asked(conversation) -> str:
    return conversation.turns[0][0].removesuffix(" Please output segmentation mask.")


def replied(conversation) -> str:
    return answer_text(conversation.turns[0][1])


ONE = {"image": "0.jpg", "query": "the dog"}
FLAT = [2, 2, 6, 2, 6, 5, 2, 5]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ({"mask": "m.png"}, box(1, 1, 4, 4)),
        ({"rle": runs(box(5, 2, 9, 8))}, box(5, 2, 9, 8)),
        ({"polygons": [FLAT]}, box(2, 2, 6, 5)),
        ({"polygons": FLAT}, box(2, 2, 6, 5)),
        ({"polygons": RECTANGLE}, box(2, 2, 6, 5)),
        (
            {"polygons": [RECTANGLE, [8, 8, 10, 8, 10, 10, 8, 10]]},
            box(2, 2, 6, 5) | box(8, 8, 10, 10),
        ),
        ({"polygons": []}, box(0, 0, 0, 0)),
        ({"targets": [{"mask": "m.png"}]}, box(1, 1, 4, 4)),
    ],
    ids=["mask", "rle", "flat", "one flat", "one of points", "two", "empty", "targets"],
)
def test_a_target_is_exact_however_it_is_written(tmp_path, shape, expected):
    write_table(tmp_path, [ONE | shape], images=1)
    (conversation,) = only(tmp_path, "table")
    assert (conversation.masks == expected[None]).all() and conversation.ignore is None


def test_csv_holds_the_same(tmp_path):
    write_table(tmp_path, images=1).unlink()
    lines = [
        "image,query,mask,polygons,targets,ignore,answer,is_sentence,split",
        '0.jpg,"the dog, sitting\nupright",m.png,,,,,,',
        (
            f'0.jpg,"[""a cat"", ""an animal""]",,"{FLAT}",,"[[0, 0, 3, 0, 3,'
            ' 3]]",Because.,False,train'
        ),
        '0.jpg,both,,,"[{""mask"": ""m.png""}, {""polygons"": []}]",,,,val',
    ]
    (tmp_path / "own" / "table" / "any.csv").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    first, second = only(tmp_path, "table")
    assert (
        asked(first) == "What is the dog, sitting upright in this image?"
        and (first.masks == box(1, 1, 4, 4)).all()
    )
    assert (
        asked(second) == "What is a cat in this image?"
        and second.is_sentence is False
        and second.ignore.sum() == 3
    )
    (third,) = only(tmp_path, "table|val")
    assert third.masks.shape == (2, *SIZE) and third.masks.sum(axis=(1, 2)).tolist() == [9, 0]


def test_several_targets_have_a_token_and_a_mask_each(tmp_path):
    targets = [{"polygons": FLAT}, {"mask": "m.png"}, {"polygons": []}]
    write_table(tmp_path, [ONE | {"targets": targets}], images=1)
    (conversation,) = only(tmp_path, "table")
    assert [mask.sum() for mask in conversation.masks] == [12, 9, 0]
    assert replied(conversation).count("[SEG]") == replied(conversation).count("[LOC]") == 3


def test_rows_with_the_same_text_are_one_query(tmp_path):
    rows = [
        ONE | {"polygons": FLAT},
        ONE | {"mask": "m.png"},
        ONE | {"query": "the cat", "polygons": []},
    ]
    write_table(tmp_path, rows, images=1)
    dog, cat = only(tmp_path, "table")
    assert (dog.masks[0] == box(2, 2, 6, 5) | box(1, 1, 4, 4)).all() and not cat.masks.any()


def test_ignored_pixels_are_never_target(tmp_path):
    write_mask(tmp_path / "own" / "table" / "masks" / "i.png", box(0, 0, 12, 3), value=1)
    write_table(tmp_path, [ONE | {"polygons": FLAT, "ignore": "i.png"}], images=1)
    (conversation,) = only(tmp_path, "table")
    assert (conversation.ignore == (box(0, 0, 12, 3) & ~box(2, 2, 6, 5))).all()


def test_wordings_are_drawn_in_training_and_explanations_follow_the_token(tmp_path):
    write_table(
        tmp_path,
        [ONE | {"query": ["a dog", "an animal"], "polygons": FLAT, "answer": "It barks."}],
        images=1,
    )
    assert {len(only(tmp_path, "table", TRAIN, seed)) for seed in range(5)} == {2}
    one = LoaderOptions(LEVELS, num_classes_per_sample=1, explanatory=1.0)
    drawn = [only(tmp_path, "table", one, seed)[0] for seed in range(20)]
    assert len({"dog" in asked(c) for c in drawn}) == 2
    assert all(
        replied(c).endswith(" It barks.") and ("expla" in asked(c) or "reason" in asked(c))
        for c in drawn
    )
    assert not any("barks" in replied(c) for c in only(tmp_path, "table", TRAIN))
    every = LoaderOptions(LEVELS, training=False, texts="all", explanatory=1.0)
    assert [asked(c) for c in only(tmp_path, "table", every)] == [
        f"What is {t} in this image?" for t in ("a dog", "an animal")
    ]
    assert replied(only(tmp_path, "table", every)[0]) == "It appears on [LOC]. It is [SEG]."


@pytest.mark.parametrize(
    ("text", "is_sentence", "question"),
    [
        ("the dog", None, "What is the dog in this image?"),
        ("Who barks?", None, "Who barks?"),
        ("show the dog", True, "show the dog"),
        ("the dog.", False, "the dog."),
    ],
)
def test_a_phrase_is_put_into_a_question(tmp_path, text, is_sentence, question):
    write_table(
        tmp_path,
        [{"image": "0.jpg", "query": text, "polygons": FLAT, "is_sentence": is_sentence}],
        images=1,
    )
    (conversation,) = only(tmp_path, "table")
    assert asked(conversation) == question and conversation.is_sentence is is_sentence


def test_splits_of_a_table(tmp_path):
    rows = [
        {"image": f"{i}.jpg", "query": "q", "polygons": FLAT} | ({"split": "val"} if i else {})
        for i in range(3)
    ]
    write_table(tmp_path, rows, images=3).rename(tmp_path / "own" / "table" / "data.jsonl")
    assert {
        s: len(OwnData(tmp_path, f"table{s}", EVAL)) for s in ("", "|train", "|val", "|all")
    } == {
        "": 1,
        "|train": 1,
        "|val": 2,
        "|all": 3,
    }
    with pytest.raises(
        MissingDataError, match="no query belongs to the split 'test'; there are: train, val, all"
    ):
        OwnData(tmp_path, "table|test", EVAL)


def test_splits_as_files(tmp_path):
    path = write_table(tmp_path)
    write_lines(path.with_name("val.jsonl"), [ONE | {"polygons": FLAT}])
    assert [len(OwnData(tmp_path, spec, EVAL)) for spec in ("table", "table|val", "table|all")] == [
        2,
        1,
        2,
    ]
    assert OwnData(tmp_path, "table", EVAL).dataset == "own:table|train"
    with pytest.raises(MissingDataError, match="no split 'test'; there are: train, val, all"):
        OwnData(tmp_path, "table|test", EVAL)


def test_one_file_beside_its_images(tmp_path):
    write_image(tmp_path / "own" / "pets" / "sub" / "a.jpg", SIZE)
    write_lines(
        tmp_path / "own" / "pets.jsonl", [{"image": "sub/a.jpg", "query": "q", "polygons": FLAT}]
    )
    assert OwnData(tmp_path, "pets", EVAL).path(0) == tmp_path / "own" / "pets" / "sub" / "a.jpg"


# --------------------------------------------------------------------------------------------- coco


def note(number, segmentation, **more):
    return {"id": number, "image_id": 1, "segmentation": segmentation} | more


def test_coco_texts_and_categories(tmp_path):
    other = [8, 6, 11, 6, 11, 9, 8, 9]
    annotations = [
        note(1, [FLAT], category_id=0),
        note(2, [other], category_id=0),
        note(3, [[0, 0, 12, 0, 12, 2, 0, 2]], category_id=0, iscrowd=1),
        note(
            4,
            runs(box(1, 1, 4, 4)),
            category_id=0,
            caption=["the small one", "smallest"],
            answer="It is 9 pixels.",
        ),
        note(5, [], query="nothing"),
        note(6, [[0, 0, 12, 0, 12, 2, 0, 2]], category_id=1, iscrowd=1),
    ]
    write_coco(
        tmp_path,
        annotations=annotations,
        categories=[{"id": 0, "name": "dog"}, {"id": 1, "name": "the cat"}],
    )
    dogs, small, nothing = only(tmp_path, "coco")
    assert (
        asked(dogs) == "What is the dog in this image?"
        and asked(small) == "What is the small one in this image?"
    )
    assert (dogs.masks[0] == box(2, 2, 6, 5) | box(8, 6, 11, 9)).all() and dogs.ignore.sum() == 24
    assert (small.masks[0] == box(1, 1, 4, 4)).all() and small.ignore is None
    assert asked(nothing) == "What is nothing in this image?" and not nothing.masks.any()
    explained = only(
        tmp_path, "coco", LoaderOptions(LEVELS, num_classes_per_sample=9, explanatory=1.0)
    )
    assert sum(replied(c).endswith("It is 9 pixels.") for c in explained) == 2


def test_coco_text_of_an_image(tmp_path):
    images = [
        {"id": 1, "file_name": "a.jpg", "expression": "all that barks"},
        {"id": 2, "file_name": "b.jpg", "query": "a unicorn"},
    ]
    write_image(tmp_path / "own" / "coco" / "b.jpg", SIZE)
    write_coco(
        tmp_path,
        images=images,
        annotations=[
            note(1, [FLAT], category_id=0),
            note(2, [FLAT], caption="it"),
            note(3, [FLAT]),
        ],
    )
    loader = OwnData(tmp_path, "coco", EVAL)
    found = {loader.sample(i, rng()).id: loader.sample(i, rng()).conversations for i in range(2)}
    assert [asked(c) for c in found["a"]] == [
        "What is all that barks in this image?",
        "What is it in this image?",
    ]
    (unicorn,) = found["b"]
    assert not unicorn.masks.any() and found["a"][0].masks.sum() == 12


# ------------------------------------------------------------------------------------------ labelme


def test_labels_of_labelme(tmp_path):
    png = cv2.imencode(".png", np.array([[255, 0, 255], [0, 255, 0]], np.uint8))[1].tobytes()
    shapes = [
        {"label": "dog", "points": RECTANGLE},
        {"label": "dog", "points": [[11, 9], [9, 8]], "shape_type": "rectangle"},
        {"label": "the ball", "points": [[5, 5], [7, 5]], "shape_type": "circle"},
        {
            "label": "tail",
            "points": [[1, 7], [4, 9]],
            "shape_type": "mask",
            "mask": base64.b64encode(png).decode(),
        },
        {"label": "ignore", "points": [[0, 0], [11, 0], [11, 3], [0, 3]]},
        {"label": "flag", "points": [[0, 0]], "shape_type": "point"},
        {"label": "_background_", "points": []},
    ]
    write_labelme(tmp_path, shapes=shapes, imagePath="..\\photos\\a.jpg")
    dog, ball, tail = only(tmp_path, "labelme")
    assert [asked(c) for c in (dog, ball, tail)] == [
        f"What is the {w} in this image?" for w in ("dog", "ball", "tail")
    ]
    assert (dog.masks[0] == box(2, 2, 7, 6) | box(9, 8, 12, 10)).all()
    assert (dog.ignore == (box(0, 0, 12, 4) & ~dog.masks[0])).all()
    assert (ball.masks[0] == (np.hypot(*np.mgrid[-5:5, -5:7]) <= 2.25)).all(), (
        "radius 2 and what its outline touches"
    )
    expected = box(0, 0, 0, 0)
    expected[7:9, 1:4] = [[True, False, True], [False, True, False]]
    assert (tail.masks[0] == expected).all()


def test_labelme_with_a_text_is_read_as_reason_seg_reads_it(tmp_path):
    record = {"text": ["Who barks?", "Who is loud?"], "is_sentence": True}
    record["shapes"] = [square(0, 0, 9, 9), square(2, 2, 4, 4, "ignore"), square(3, 3, 3, 3)]
    write_labelme(tmp_path, **record)
    write_image(tmp_path / "reason_seg" / "R" / "train" / "a.jpg", SIZE)
    write_json(tmp_path / "reason_seg" / "R" / "train" / "a.json", record)
    (ours,) = only(tmp_path, "labelme")
    theirs = ReasoningSegmentation(tmp_path, "R|train", EVAL).sample(0, rng()).conversations[0]
    assert (ours.masks == theirs.masks).all() and (ours.ignore == theirs.ignore).all()
    assert ours.turns == theirs.turns and ours.is_sentence is theirs.is_sentence


def test_labelme_without_folders_for_splits_and_without_image_path(tmp_path):
    path = write_labelme(tmp_path, split=".")
    record = json.loads(path.read_text())
    del record["imagePath"]
    write_json(path, record)
    assert len(only(tmp_path, "labelme")) == 1
    path.with_name("a.jpg").rename(path.with_name("a.png"))
    assert OwnData(tmp_path, "labelme", EVAL).path(0).name == "a.png"


# ---------------------------------------------------------------------------------------- all forms


def test_the_three_forms_agree(tmp_path):
    """The same triangle-free scene in each form; labelme draws its outline, too, so its corners are
    one pixel smaller."""
    write_table(tmp_path, [{"image": "0.jpg", "query": "the dog", "polygons": FLAT}], images=1)
    write_coco(tmp_path)
    write_labelme(tmp_path, shapes=[{"label": "dog", "points": [[2, 2], [5, 2], [5, 4], [2, 4]]}])
    found = [only(tmp_path, name)[0] for name in ("table", "coco", "labelme")]
    assert len({asked(c) for c in found}) == len({replied(c) for c in found}) == 1
    assert all((c.masks == found[0].masks).all() for c in found)


def test_a_sample_is_a_function_of_the_generator(tmp_path):
    write_table(
        tmp_path,
        [ONE | {"query": [f"thing {i}a", f"thing {i}b"], "polygons": FLAT} for i in range(6)],
        images=1,
    )
    first, second = (OwnData(tmp_path, "table", TRAIN) for _ in range(2))
    assert [asked(c) for c in first.sample(0, rng(3)).conversations] == [
        asked(c) for c in second.sample(0, rng(3)).conversations
    ]
    assert (
        len({tuple(asked(c) for c in first.sample(0, rng(s)).conversations) for s in range(20)})
        > 10
    )
    for seed in range(10):
        drawn = [c.turns[0][0] for c in first.sample(0, rng(seed)).conversations]
        assert (
            len(drawn) == 3
            and len({next(i for i in range(6) if f"thing {i}" in d) for d in drawn}) == 3
        )


def test_what_is_not_there_is_listed(tmp_path):
    with pytest.raises(
        MissingDataError,
        match="own: does not exist; the folder of your own data sets is expected there",
    ):
        OwnData(tmp_path, "x", EVAL)
    write_table(tmp_path)
    with pytest.raises(MissingDataError, match="own/x: no such data set; .* holds: table"):
        OwnData(tmp_path, "x", EVAL)
    (tmp_path / "own" / "x").mkdir()
    with pytest.raises(DataError, match="own/x: holds no data; it needs train.json"):
        OwnData(tmp_path, "x", EVAL)
    write_lines(tmp_path / "own" / "table" / "train.csv", [])
    with pytest.raises(
        DataError, match="has train.jsonl and train.csv; keep the one that is to be used"
    ):
        OwnData(tmp_path, "table", EVAL)
    with pytest.raises(ValueError, match='write it as "name" or "name|split"'):
        OwnData(tmp_path, "a|b|c", EVAL)


def test_a_path_and_a_name_without_its_kind_say_what_to_give(tmp_path):
    write_image(tmp_path / "own" / "mine" / "a.png")
    (tmp_path / "own" / "mine" / "val.jsonl").write_text(
        json.dumps({"image": "a.png", "query": "it", "polygons": [[[1, 1], [9, 1], [9, 9]]]})
    )
    with pytest.raises(DataError, match="copy or link .*own/mine, then give its name 'mine'"):
        OwnData(tmp_path, f"{tmp_path}/own/mine|val", LoaderOptions(("SEG",), False))
    with pytest.raises(ValueError, match='write "own:mine|val"'):
        EvalDataset(tmp_path, "mine|val", ["SEG"])
