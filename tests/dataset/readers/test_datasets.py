"""Loaders against hand-made files, golden masks and, where they are there, real samples."""

import json

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle_codec

from cores.dataset.annotations.masks import annotation_mask, paint_shapes
from cores.dataset.conversation.exemplars import ExemplarLibrary
from cores.dataset.conversation.turns import answer_text
from cores.dataset.files.errors import DataError, MissingDataError
from cores.dataset.files.images import probe_images, read_image, read_label
from cores.dataset.files.packed import PackedRecords
from cores.dataset.files.paths import resolve_inside
from cores.dataset.files.rle import decode_rle
from cores.dataset.files.text import read_json
from cores.dataset.readers.coco import CocoInstances
from cores.dataset.readers.reasoning import ReasoningSegmentation, read_record, record_masks
from cores.dataset.readers.semantic import ADE20K_CLASSES, SemanticSegmentation
from cores.dataset.readers.vqa import VisualQuestionAnswering
from cores.dataset.sample import LoaderOptions
from tests.dataset_toys import SAMPLES, SHARED, square, write_image, write_json, write_reason_seg

GOLDEN = SHARED / "reference" / "utils"
# The goldens were drawn by an older OpenCV; 4.14 leaves out so many pixels of the outline
# (measured).
DRAWN_OTHERWISE = {"cp1252": 1, "flag_dropped": 1, "simple": 1, "out_of_bounds": 26}
KERNEL = np.ones((5, 5), np.uint8)
TRAIN = LoaderOptions(("LOC", "SEG"))
EVAL = LoaderOptions(("LOC", "SEG"), training=False)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def questions(sample) -> list[str]:
    return [conversation.turns[0][0] for conversation in sample.conversations]


def rle(mask: np.ndarray) -> dict:
    encoded = rle_codec.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode()}


def real(path):
    if not path.exists():
        pytest.skip(f"the real samples are not at {path}")
    return path


# -------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "CMYK", "I;16", "1"])
def test_every_kind_of_picture_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    if mode == "I;16":
        Image.fromarray(np.full((5, 7), 100 * 257, np.uint16)).save(path)
    else:
        Image.new("L", (7, 5), 100).convert("RGBA" if mode == "LA" else "L").convert(mode).save(
            path
        )
    image = read_image(path)
    assert image.shape == (5, 7, 3) and image.dtype == np.uint8
    expected = {"1": (0, 255)}.get(mode, (98, 102))
    assert expected[0] <= image.min() <= image.max() <= expected[1]


def test_floating_point_pixels_are_refused_and_not_black(tmp_path):
    Image.fromarray(np.full((5, 7), 0.5, np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(
        DataError,
        match="a.tiff: cannot be converted to RGB .floating-point pixels have no known range",
    ):
        read_image(tmp_path / "a.tiff")


def test_transparent_pixels_are_paper(tmp_path):
    picture = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    picture.putpixel((1, 0), (10, 20, 30, 0))
    picture.save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    Image.new("RGB", (8, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").shape == (8, 4, 3)


def test_channels_are_rgb(tmp_path):
    # OpenCV writes BGR
    cv2.imwrite(str(tmp_path / "a.png"), np.full((2, 2, 3), (1, 2, 3), np.uint8))
    assert read_image(tmp_path / "a.png")[0, 0].tolist() == [3, 2, 1]


def test_broken_pictures_are_named(tmp_path):
    whole = write_image(tmp_path / "whole.jpg", (200, 200))
    whole.write_bytes(
        cv2.imencode(".jpg", rng().integers(0, 255, (200, 200, 3)).astype(np.uint8))[1].tobytes()
    )
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    text = tmp_path / "text.jpg"
    text.write_text("not a picture")
    tail = tmp_path / "tail.jpg"  # a camera's trailer: unusual, but all pixels are there
    tail.write_bytes(whole.read_bytes() + b"\0" * 100)
    probe_images([whole, tail])
    for path, kind in (
        (cut, "broken image"),
        (text, "not a readable image"),
        (tmp_path / "no.jpg", "does not exist"),
    ):
        for read in (read_image, lambda p: probe_images([p])):
            with pytest.raises(DataError, match=f"{path.name}: .*{kind}") as error:
                read(path)
            assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "no.jpg")


def test_label_maps_keep_their_values(tmp_path):
    values = np.array([[0, 1, 150], [255, 3, 4]])
    Image.fromarray(values.astype(np.uint8)).save(tmp_path / "grey.png")
    palette = Image.fromarray(values.astype(np.uint8), "L")
    palette.putpalette(list(range(255, -1, -1)) * 3)
    palette.save(tmp_path / "palette.png")
    Image.fromarray((values * 100).astype(np.uint16)).save(tmp_path / "deep.png")
    Image.new("RGB", (2, 2), (0, 0, 9)).save(tmp_path / "colour.png")
    for mode in ("RGB", "LA", "RGBA"):
        Image.fromarray(values.astype(np.uint8)).convert(mode).save(tmp_path / "equal.png")
        assert read_label(tmp_path / "equal.png").tolist() == values.tolist()
    assert read_label(tmp_path / "grey.png").tolist() == values.tolist()
    assert read_label(tmp_path / "palette.png").tolist() == values.tolist()
    assert read_label(tmp_path / "deep.png").tolist() == (values * 100).tolist()
    with pytest.raises(DataError, match="colour.png: a label map must have one channel"):
        read_label(tmp_path / "colour.png")


def test_names_from_files_stay_inside(tmp_path):
    inside, outside = tmp_path / "in", write_image(tmp_path / "out" / "secret.jpg")
    write_image(inside / "sub" / "a.jpg")
    (inside / "link.jpg").symlink_to(outside)
    (inside / "near.jpg").symlink_to(inside / "sub" / "a.jpg")
    assert resolve_inside(inside, "sub/a.jpg") == inside / "sub" / "a.jpg"
    assert resolve_inside(inside, "near.jpg").is_file()
    for name in (
        "",
        "/etc/passwd",
        "../out/secret.jpg",
        "sub/../../out/secret.jpg",
        "link.jpg",
        "a\0.jpg",
    ):
        with pytest.raises(DataError):
            resolve_inside(inside, name)


def test_json_in_utf8_and_windows_1252(tmp_path):
    for encoding in ("utf-8", "utf-8-sig", "cp1252"):
        (tmp_path / "a.json").write_bytes('{"t": "café — naïve"}'.encode(encoding))
        assert read_json(tmp_path / "a.json") == {"t": "café — naïve"}
    (tmp_path / "a.json").write_text("{oops")
    with pytest.raises(DataError, match="a.json: not valid JSON"):
        read_json(tmp_path / "a.json")


def test_run_lengths(tmp_path):
    mask = rng().random((5, 7)) > 0.5
    assert (decode_rle(rle(mask), (5, 7), "f", "m") == mask).all()
    runs = {"size": [2, 3], "counts": [1, 2, 3]}  # column by column: 0 11 000
    assert decode_rle(runs, (2, 3), "f", "m").tolist() == [
        [False, True, False],
        [True, False, False],
    ]
    for bad in (
        None,
        {},
        {"size": [2, 3]},
        {"size": [2, 3], "counts": [1, 2]},
        {"size": [3, 2], "counts": [1, 2, 3]},
    ):
        with pytest.raises(DataError, match='^f: "m"'):
            decode_rle(bad, (2, 3), "f", "m")
    with pytest.raises(DataError, match='^f: "m" is not a valid run-length mask'):
        decode_rle({"size": [2, 3], "counts": "zzzzzzzzzz"}, (2, 3), "f", "m")


def test_packed_records_are_a_list():
    records = PackedRecords([{"a": 1}, [], "é"])
    assert len(records) == 3 and [records[i] for i in range(3)] == [{"a": 1}, [], "é"]
    with pytest.raises(IndexError):
        records[3]


# ---------------------------------------------------------------------------------------- reasoning


def test_shapes_by_hand():
    shapes = [
        square(2, 2, 4, 4, "ignore"),
        square(0, 0, 9, 9),
        {"label": "Flag", "points": [[0, 0], [9, 9]]},
        square(3, 3, 3, 3, "flagged"),  # only exactly "flag" is skipped
    ]
    target, ignore = paint_shapes(shapes, (10, 12))
    assert ignore.sum() == 9 - 1 and target.sum() == 100 - 9 + 1 and not (target & ignore).any()
    assert paint_shapes([], (3, 4))[0].sum() == 0


def test_masks_equal_the_published_reader():
    load = pytest.importorskip("safetensors.numpy").load_file
    expected = load(real(GOLDEN / "outputs.safetensors"))
    files = sorted((GOLDEN / "json").glob("*.json"))
    assert len(files) == 10
    values = json.loads((GOLDEN / "values.json").read_text(encoding="utf-8"))
    for path in files:
        record = read_record(path)
        target, ignore = paint_shapes(record["shapes"], (80, 100))
        found = target.astype(np.uint8) + 255 * ignore.astype(np.uint8)
        golden = expected[f"json.{path.stem}.mask"]
        wrong, edge = found != golden, cv2.dilate(golden, KERNEL) != cv2.erode(golden, KERNEL)
        assert wrong.sum() <= DRAWN_OTHERWISE.get(path.stem, 0) and not (wrong & ~edge).any(), (
            path.name
        )
        assert record["text"] == values[f"json.{path.stem}"]["comments"]
        assert record["is_sentence"] == values[f"json.{path.stem}"]["is_sentence"]


def test_real_reason_seg_pair():
    real(SAMPLES / "reason_seg")
    loader = ReasoningSegmentation(SAMPLES, "ReasonSeg|train", EVAL)
    sample = loader.sample(0, rng())
    (only,) = sample.conversations
    assert len(loader) == 1 and sample.image.shape == (533, 685, 3) and only.is_sentence is True
    # two generations of OpenCV draw the same polygons differently
    assert (only.masks.sum(), only.ignore.sum()) in ((43427, 1590), (43377, 1586))
    assert only.turns[0][0].endswith("attracting mates? Please output segmentation mask.")
    every = ReasoningSegmentation(
        SAMPLES, "ReasonSeg|train", LoaderOptions(("SEG",), training=False, texts="all")
    )
    assert len(every.sample(0, rng()).conversations) == 5
    # asking for explanations reads the real explanatory file; this photo has none
    keen = ReasoningSegmentation(
        SAMPLES, "ReasonSeg|train", LoaderOptions(("SEG",), explanatory=1.0)
    )
    assert len(keen.sample(0, rng()).conversations) == 3


def test_training_draws_and_evaluation_is_canonical(tmp_path):
    write_reason_seg(tmp_path)
    loader = ReasoningSegmentation(tmp_path, "ReasonSeg|train", TRAIN)
    assert len(loader) == 3 and loader.sample(1, rng()).conversations[0].masks.sum() == 8
    assert {len(loader.sample(0, rng(s)).conversations) for s in range(5)} == {2}, (
        "two texts, three wanted"
    )
    assert len({tuple(questions(loader.sample(0, rng(s)))) for s in range(20)}) > 2
    again = [questions(loader.sample(0, rng(3))) for _ in range(2)]
    assert again[0] == again[1]
    evaluated = ReasoningSegmentation(tmp_path, "ReasonSeg|train", EVAL).sample(2, rng())
    assert questions(evaluated) == ["query 2.0? Please output segmentation mask."]
    assert (
        answer_text(evaluated.conversations[0].turns[0][1]) == "It appears on [LOC]. It is [SEG]."
    )
    assert (
        evaluated.id == "002"
        and evaluated.dataset == "ReasonSeg|train"
        and evaluated.image.max() == 42
    )


def test_a_short_query_is_put_into_a_sentence(tmp_path):
    folder = tmp_path / "reason_seg" / "R" / "val"
    for stem, text in (("a", "the dog's nose"), ("b", "segment the nose.")):
        write_image(folder / f"{stem}.jpg")
        write_json(folder / f"{stem}.json", {"text": text, "is_sentence": False, "shapes": []})
    loader = ReasoningSegmentation(tmp_path, "R|val", EVAL)
    assert questions(loader.sample(0, rng())) == [
        "What is the dog's nose in this image? Please output segmentation mask."
    ]
    assert questions(loader.sample(1, rng())) == [
        "segment the nose. Please output segmentation mask."
    ]


def test_length_splits_and_joined_splits(tmp_path):
    write_reason_seg(tmp_path, split="test", count=3)
    write_reason_seg(tmp_path, split="train", count=2)
    sizes = {}
    for spec in ("test", "testshort", "testlong", "train|test", "trainshort"):
        sizes[spec] = len(ReasoningSegmentation(tmp_path, f"ReasonSeg|{spec}", EVAL))
    assert sizes == {"test": 3, "testshort": 1, "testlong": 2, "train|test": 5, "trainshort": 1}
    long = ReasoningSegmentation(tmp_path, "ReasonSeg|testlong", EVAL)
    assert all(long.sample(i, rng()).conversations[0].is_sentence for i in range(2))


def test_jsons_that_share_an_image_and_exact_masks(tmp_path):
    folder = tmp_path / "reason_seg" / "Synth" / "train"
    write_image(folder / "000.jpg")
    host = np.zeros((10, 12), bool)
    host[2:8, 2:8] = True
    for number in range(4):
        target = np.zeros((10, 12), bool)
        target[2, 2 : 3 + number] = True
        record = {
            "image": "000.jpg",
            "text": [f"q{number} a?", f"q{number} b?"],
            "is_sentence": True,
        }
        record |= {
            "shapes": [square(0, 0, 9, 9), square(2, 2, 3, 5, "ignore")],
            "target_rle": rle(target),
            "host_rle": rle(host),
        }
        write_json(folder / f"000_{number}.json", record)
    loader = ReasoningSegmentation(tmp_path, "Synth|train", EVAL)
    sample = loader.sample(0, rng())
    assert len(loader) == 1 and [c.masks.sum() for c in sample.conversations] == [1, 2, 3, 4]
    assert all((c.host_masks[0] == host).all() for c in sample.conversations)
    first = sample.conversations[0]
    assert first.ignore.sum() == 8 - 1 and not (first.ignore & first.masks[0]).any()
    training = ReasoningSegmentation(tmp_path, "Synth|train", TRAIN)
    for seed in range(10):
        drawn = [q.split()[0] for q in questions(training.sample(0, rng(seed)))]
        assert len(drawn) == len(set(drawn)) == 3, (
            "different queries come before other wordings of the same"
        )
    many = ReasoningSegmentation(
        tmp_path, "Synth|train", LoaderOptions(("SEG",), num_classes_per_sample=6)
    )
    assert len(set(" ".join(q.split()[:2]) for q in questions(many.sample(0, rng())))) == 6


def test_host_polygons(tmp_path):
    record = {
        "shapes": [square(1, 1, 2, 2)],
        "host_shapes": [square(0, 0, 4, 4, "host")],
        "text": "q",
    }
    target, ignore, host = record_masks(record, (10, 10), tmp_path)
    assert (target.sum(), ignore.sum(), host.sum()) == (4, 0, 25)


def test_explanations_follow_the_tokens(tmp_path):
    folder = write_reason_seg(tmp_path, count=2)
    entry = {"query": "q", "outputs": "Because it is red.", "image": "001.jpg", "json": "001.json"}
    write_json(folder.parent / "explanatory" / "train.json", [entry])

    def replies(probability, index):
        options = LoaderOptions(("SEG",), explanatory=probability)
        sample = ReasoningSegmentation(tmp_path, "ReasonSeg|train", options).sample(index, rng())
        return [(c.turns[0][0], answer_text(c.turns[0][1])) for c in sample.conversations]

    for question, reply in replies(1.0, 1):
        assert "expla" in question or "reason" in question
        assert "[SEG]" in reply and reply.endswith(" Because it is red.")
    assert not any(
        "Because" in reply
        for probability, index in ((1.0, 0), (0.0, 1), (-1, 1))
        for _, reply in replies(probability, index)
    )
    write_json(folder.parent / "explanatory" / "train.json", [{"json": "001.json"}])
    with pytest.raises(DataError, match='entry 0 needs the texts "json" and "outputs"'):
        replies(1.0, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shapes": None}, '"shapes" must be a list'),
        ({"shapes": [{"points": []}]}, r'"shapes"\[0\] has no text "label"'),
        ({"shapes": [{"label": "target", "points": [1, 2]}]}, r'"shapes"\[0\] needs "points"'),
        (
            {"shapes": [{"label": "target", "points": [[1, float("nan")]]}]},
            r'"shapes"\[0\] needs "points"',
        ),
        ({"text": []}, '"text" must be a list'),
        ({"text": ["ok", " "]}, '"text" must be a list'),
        ({"is_sentence": "yes"}, '"is_sentence" must be true or false'),
        ({"image": "../../x.jpg"}, "its image ../../x.jpg is not in"),
        ({"image": 3}, '"image" must be a file name'),
    ],
)
def test_broken_jsons_are_named_at_construction(tmp_path, change, message):
    path = write_reason_seg(tmp_path, count=1) / "000.json"
    write_json(path, json.loads(path.read_text()) | change)
    with pytest.raises(DataError, match=f"000.json: .*{message}") as error:
        ReasoningSegmentation(tmp_path, "ReasonSeg|train", TRAIN)
    assert "\n" not in str(error.value)


def test_bad_folders_are_one_line_each(tmp_path):
    def fails(message, spec="ReasonSeg|train", kind=DataError):
        with pytest.raises(kind, match=message):
            ReasoningSegmentation(tmp_path, spec, TRAIN)

    fails("reason_seg: does not exist", kind=MissingDataError)
    folder = write_reason_seg(tmp_path, count=2)
    fails("no such data set; .* holds: ReasonSeg", "Other|train", FileNotFoundError)
    fails("no such split of ReasonSeg; there are: train", "ReasonSeg|val", FileNotFoundError)
    fails("names no split", "ReasonSeg", ValueError)
    fails("refused", "../x|train")
    (folder / "001.json").unlink()
    fails("001.jpg: no JSON belongs to this image")
    (folder / "001.jpg").unlink()
    fails("no query of the length", "ReasonSeg|trainshort")
    write_json(folder / "000.json", {"text": ["q"]})
    fails('000.json: has no "shapes"')
    write_json(folder / "000.json", {"text": ["q"], "shapes": []})
    fails('000.json: has no "is_sentence"', "ReasonSeg|trainlong")
    (folder / "000.jpg").write_bytes(b"\xff\xd8\xff")
    fails("000.jpg: not a readable image")
    (folder / "000.jpg").unlink()
    fails("000.json: its image 000.jpg is not in", kind=FileNotFoundError)
    (folder / "000.json").unlink()
    fails("split ReasonSeg|train is empty".replace("|", r"\|"))


# --------------------------------------------------------------------------------------------- coco


def write_coco(root, annotations, split="train2017", images=None):
    images = images or [{"id": 1, "file_name": "a.jpg", "height": 10, "width": 12}]
    categories = [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}]
    for image in images:
        write_image(root / "coco" / split / image["file_name"])
    content = {"images": images, "annotations": annotations, "categories": categories}
    return write_json(root / "coco" / "annotations" / f"instances_{split}.json", content)


def instance(number, category, segmentation, crowd=0):
    return {
        "id": number,
        "image_id": 1,
        "category_id": category,
        "segmentation": segmentation,
        "iscrowd": crowd,
    }


def test_the_dog_is_all_dogs_without_the_crowd(tmp_path):
    crowd = np.zeros((10, 12), bool)
    crowd[0:6, 0:6] = True
    runs = {"size": [10, 12], "counts": [0, 6, 4, 6, 4, 6, 4, 6, 4, 6, 4, 6, 64]}
    write_coco(
        tmp_path,
        [
            instance(1, 18, [[0, 0, 4, 0, 4, 4, 0, 4]]),
            instance(2, 18, [[6, 6, 9, 6, 9, 9, 6, 9], [10, 0, 12, 0, 12, 2, 10, 2]]),
            instance(3, 18, runs, crowd=1),
            instance(4, 1, rle(crowd), crowd=1),
        ],
    )
    sample = CocoInstances(tmp_path, "train2017", EVAL).sample(0, rng())
    (dogs,) = sample.conversations
    assert dogs.turns[0][0] == "What is the dog in this image? Please output segmentation mask."
    assert dogs.masks.shape == (1, 10, 12) and dogs.masks.sum() == 16 + 9 + 4
    assert dogs.ignore.sum() == 36 - 16 and not (dogs.ignore & dogs.masks[0]).any()
    assert (dogs.ignore | dogs.masks[0])[:6, :6].all() and sample.kind == "semantic"


def test_real_coco_sample():
    real(SAMPLES / "coco")
    loader = CocoInstances(SAMPLES, "train2017", EVAL)
    content = json.loads(
        (SAMPLES / "coco" / "annotations" / "instances_train2017.json").read_text()
    )
    pairs = {(a["image_id"], a["category_id"]) for a in content["annotations"] if not a["iscrowd"]}
    assert len(content["annotations"]) == 939 and len(loader) == len({image for image, _ in pairs})
    counted = sum(
        len({a["category_id"] for a in loader.index.annotations(i) if not a["iscrowd"]})
        for i in loader.positions.tolist()
    )
    assert counted == len(pairs)
    masks = [
        c.masks for i in range(0, len(loader), 12) for c in loader.sample(i, rng()).conversations
    ]
    assert all(mask.any() for mask in masks)
    # a mask's area is the annotated one (measured: within 3 % for large instances)
    single = next(a for a in content["annotations"] if a["image_id"] == 9 and a["area"] > 50_000)
    image = next(i for i in content["images"] if i["id"] == 9)
    mask = annotation_mask(single["segmentation"], (image["height"], image["width"]), SAMPLES, "x")
    assert mask.sum() == pytest.approx(single["area"], rel=0.03)


def test_coco_errors(tmp_path, caplog):
    with pytest.raises(MissingDataError, match="coco: does not exist"):
        CocoInstances(tmp_path, "train2017", TRAIN)
    two = [{"id": i, "file_name": f"{i}.jpg", "height": 10, "width": 12} for i in (1, 2)]
    box = [[0, 0, 4, 0, 4, 4]]
    source = write_coco(
        tmp_path, [instance(1, 18, box), instance(2, 18, box) | {"image_id": 2}], images=two
    )
    with pytest.raises(MissingDataError, match="instances_val2017.json: does not exist"):
        CocoInstances(tmp_path, "val2017", TRAIN)
    (tmp_path / "coco" / "train2017" / "2.jpg").unlink()
    with pytest.raises(MissingDataError, match="1 of 2 images are not in .*, for example 2.jpg"):
        CocoInstances(tmp_path, "train2017", TRAIN)
    assert (
        len(CocoInstances(tmp_path, "train2017", LoaderOptions(("SEG",), skip_missing=True))) == 1
    )
    assert "left out" in caplog.text
    write_coco(tmp_path, [instance(1, 18, [[0, 0, 4, 4]])])
    with pytest.raises(DataError, match='annotation 1 "segmentation" must be polygons'):
        CocoInstances(tmp_path, "train2017", TRAIN).sample(0, rng())
    write_coco(tmp_path, [instance(1, 99, box)])
    with pytest.raises(DataError, match="annotation 1 names an unknown image or category"):
        CocoInstances(tmp_path, "train2017", TRAIN)
    write_coco(tmp_path, [instance(1, 18, box, crowd=1)])
    with pytest.raises(DataError, match="split train2017 is empty"):
        CocoInstances(tmp_path, "train2017", TRAIN)
    write_coco(
        tmp_path,
        [instance(1, 18, box)],
        images=[{"id": 1, "file_name": "../x.jpg", "height": 10, "width": 12}],
    )
    with pytest.raises(DataError, match="refused"):
        CocoInstances(tmp_path, "train2017", TRAIN)
    write_coco(
        tmp_path,
        [instance(1, 18, box)],
        images=[{"id": 1, "file_name": "a.jpg", "height": 9, "width": 12}],
    )
    with pytest.raises(DataError, match="a.jpg: .* is 9×12 .* but its image is 10×12"):
        CocoInstances(tmp_path, "train2017", TRAIN).sample(0, rng())
    write_json(source, {"images": []})
    with pytest.raises(DataError, match='has no list "annotations"'):
        CocoInstances(tmp_path, "train2017", TRAIN)


# ----------------------------------------------------------------------------------------- semantic


def write_semantic(root, label, folder="synth_sem", split="train", classes=("dog", "cat")):
    write_image(root / folder / "images" / split / "a.jpg")
    (root / folder / "annotations" / split).mkdir(parents=True, exist_ok=True)
    Image.fromarray(label).save(root / folder / "annotations" / split / "a.png")
    write_json(root / folder / "classes.json", list(classes))


def label_map() -> np.ndarray:
    label = np.zeros((10, 12), np.uint8)
    label[:2], label[5:] = 1, 2
    return label


@pytest.mark.parametrize(
    ("name", "folder", "split", "classes", "void"),
    [
        ("synthreason", "synth_sem", "train", ["dog", "cat"], None),
        ("ade20k", "ade20k", "training", ["wall", "building"], 36),
    ],
)
def test_classes_of_a_label_map(tmp_path, name, folder, split, classes, void):
    write_semantic(tmp_path, label_map(), folder, split)
    sample = SemanticSegmentation(tmp_path, name, EVAL, split).sample(0, rng())
    assert questions(sample) == [
        f"What is the {c} in this image? Please output segmentation mask." for c in classes
    ]
    assert [c.masks.sum() for c in sample.conversations] == [24, 60]
    # background of a drawn scene is in no class; an unlabelled pixel of a photo could be anything
    assert [None if c.ignore is None else c.ignore.sum() for c in sample.conversations] == [
        void
    ] * 2
    one = SemanticSegmentation(tmp_path, name, LoaderOptions(("SEG",), num_classes_per_sample=1))
    drawn = [one.sample(0, rng(seed)) for seed in range(40)]
    assert {len(s.conversations) for s in drawn} == {1} and len(
        {questions(s)[0] for s in drawn}
    ) > 6


def test_real_ade20k_samples():
    real(SAMPLES / "ade20k")
    loader = SemanticSegmentation(SAMPLES, "ade20k", EVAL)
    expected = [
        {1, 2, 3, 5, 7, 10, 18},
        {1, 2, 3, 5, 14, 18},
        {1, 2, 3, 5, 7, 12, 21, 44, 81, 88, 97, 103},
    ]
    names = json.loads(ADE20K_CLASSES.read_text())
    assert len(loader) == 3 and len(names) == len(set(names)) == 150
    assert [names[i] for i in (0, 2, 12, 149)] == ["wall", "sky", "person", "flag"]
    for index, ids in enumerate(expected):
        sample = loader.sample(index, rng())
        assert questions(sample) == [
            f"What is the {names[i - 1]} in this image? Please output segmentation mask."
            for i in sorted(ids)
        ]
        covered = np.any([c.masks[0] for c in sample.conversations], axis=0)
        assert (covered ^ sample.conversations[0].ignore).all(), (
            "every pixel is in a class or void, never both"
        )


def test_semantic_errors(tmp_path):
    def build(name="synthreason"):
        return SemanticSegmentation(tmp_path, name, TRAIN)

    with pytest.raises(
        ValueError,
        match="unknown semantic data set 'mars'; known: ade20k, cocostuff, mapillary, synthreason",
    ):
        build("mars")
    with pytest.raises(MissingDataError, match="synth_sem: does not exist"):
        build()
    write_semantic(tmp_path, label_map() * 2)
    with pytest.raises(DataError, match="a.png: holds the value 4, but there are only 2 classes"):
        build().sample(0, rng())
    write_semantic(tmp_path, np.zeros((10, 12), np.uint8))
    with pytest.raises(DataError, match="a.png: holds no class"):
        build().sample(0, rng())
    write_semantic(tmp_path, np.ones((5, 12), np.uint8))
    with pytest.raises(DataError, match="a.png: the label map is 5×12 .* but its image is 10×12"):
        build().sample(0, rng())
    (tmp_path / "synth_sem" / "annotations" / "train" / "a.png").unlink()
    with pytest.raises(MissingDataError, match="label map .*a.png does not exist"):
        build()
    (tmp_path / "synth_sem" / "images" / "train" / "a.jpg").unlink()
    with pytest.raises(DataError, match="is empty"):
        build()
    write_json(tmp_path / "synth_sem" / "classes.json", {})
    with pytest.raises(DataError, match="classes.json: must be a non-empty list"):
        build()


# ---------------------------------------------------------------------------------------------- vqa


def write_vqa(root, messages, image="a.jpg"):
    write_image(root / "coco" / "train2017" / "a.jpg")
    spoken = [{"from": speaker, "value": text} for speaker, text in messages]
    write_json(
        root / "llava_dataset" / "toy.json", [{"id": "7", "image": image, "conversations": spoken}]
    )
    return VisualQuestionAnswering(root, "toy", TRAIN)


def test_turns_of_a_vqa_record(tmp_path):
    talk = [
        ("human", "What is it?\n<image>"),
        ("gpt", "A dog."),
        ("human", "Is <image> a tag?"),
        ("gpt", "It is."),
    ]
    sample = write_vqa(tmp_path, talk).sample(0, rng())
    (only,) = sample.conversations
    assert only.turns == [("What is it?", ["A dog."]), ("Is <image> a tag?", ["It is."])]
    assert only.masks.shape == (0, 10, 12) and sample.kind == "vqa" and sample.id == "7"


def test_vqa_errors(tmp_path):
    good = [("human", "q"), ("gpt", "a")]
    for bad in (
        [],
        good[:1],
        good[::-1],
        [("human", "<image>"), ("gpt", "a")],
        [("human", "q"), ("gpt", None)],
    ):
        with pytest.raises(DataError, match="toy.json: record 0: "):
            write_vqa(tmp_path, bad)
    with pytest.raises(MissingDataError, match="1 of 1 images are not in .*, for example b.jpg"):
        write_vqa(tmp_path, good, image="b.jpg")
    with pytest.raises(MissingDataError, match="nothing is left"):
        VisualQuestionAnswering(tmp_path, "toy", LoaderOptions(("SEG",), skip_missing=True))
    with pytest.raises(DataError, match="refused"):
        write_vqa(tmp_path, good, image="../../secret.jpg")


def test_the_real_vqa_record_lacks_its_image_and_says_so():
    real(SAMPLES / "llava_dataset")
    with pytest.raises(MissingDataError, match="for example 000000033471.jpg"):
        VisualQuestionAnswering(SAMPLES, "llava_instruct_150k", TRAIN)


# ---------------------------------------------------------------------------------------- exemplars


def write_library(root, *pairs):
    return ExemplarLibrary(write_json(root / "library.json", [{"q": q, "a": a} for q, a in pairs]))


def test_exemplars_are_different_and_never_the_query(tmp_path):
    library = write_library(tmp_path, *[(f"Where is part {i}?", f"On {i}.") for i in range(5)])
    for seed in range(20):
        drawn = library.draw(rng(seed), 4, "where is PART 3? Please output segmentation mask.")
        assert len(set(drawn)) == 4 and ("Where is part 3?", "On 3.") not in drawn
    assert library.draw(rng(1), 3) == library.draw(rng(1), 3) and library.draw(rng(1), 0) == []
    assert len({tuple(library.draw(rng(s), 1)) for s in range(60)}) == 5
    with pytest.raises(ValueError, match="5 exemplars wanted, only 4 to draw from"):
        library.draw(rng(), 5, ["Where is part 3?", "other"])


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("q", " ")], "entry 0 needs non-empty"),
        ([("q", "a"), ("Q?", "b")], "entry 1 asks the same question as entry 0"),
        ([("q", "It is [SEG].")], r"entry 0 contains '\[SEG\]'"),
        ([("<image> q", "a")], "entry 0 contains '<image>'"),
        ([], "must be a non-empty list"),
    ],
)
def test_a_bad_library_is_refused(tmp_path, pairs, message):
    with pytest.raises(DataError, match=f"library.json: .*{message}"):
        write_library(tmp_path, *pairs)


def test_the_library_that_comes_with_the_code():
    assert len(ExemplarLibrary()) >= 200
