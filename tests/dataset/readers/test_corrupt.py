"""Every kind of broken input that we could think of: one line names the file and the trouble, in
the loaders and in the check.

Each case breaks a healthy set of two images, in the form of a table, COCO's, labelme's or
ReasonSeg's, and says what is reported. Other kinds have their tests in test_datasets.py.
"""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from cores.dataset import check
from cores.dataset.files.errors import DataError
from cores.dataset.files.faults import Faults, read_skip_list
from cores.dataset.readers.own.dataset import OwnData
from cores.dataset.readers.reasoning import ReasoningSegmentation
from cores.dataset.sample import LoaderOptions
from tests.dataset_toys import LEVELS, write_image, write_json, write_reason_seg
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

EVAL = LoaderOptions(LEVELS, training=False)
FLAT = [2, 2, 6, 2, 6, 5, 2, 5]
ROW = {"image": "0.jpg", "query": "q", "polygons": FLAT}
HEALTHY = {"image": "1.jpg", "query": "healthy", "polygons": FLAT}


def open_all(loader) -> None:
    for index in range(len(loader)):
        loader.sample(index, np.random.default_rng(0))


# ------------------------------------------------------------------------------------- how to break


def photo(path: Path, side: int = 64) -> bytes:
    """A noisy image, so that its bytes cannot be cut without loss."""
    noise = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    return cv2.imencode(path.suffix, noise)[1].tobytes()


def image_as(content: bytes | None, name: str = "0.jpg"):
    """The table's first image with other content; None: a folder of that name."""

    def apply(root: Path) -> None:
        write_table(root, [ROW | {"image": name}, HEALTHY])
        path = root / "own" / "table" / "images" / name
        path.unlink(missing_ok=True)
        path.mkdir() if content is None else path.write_bytes(content)

    return apply


def mask_as(write):
    def apply(root: Path) -> None:
        row = {k: v for k, v in ROW.items() if k != "polygons"}
        write_table(root, [row | {"mask": "x.png"}, HEALTHY])
        write(root / "own" / "table" / "masks" / "x.png")

    return apply


def row(line: str | None = None, **changes: object):
    """The table's first line as it is given, or with changed columns (None removes one)."""
    merged = {k: v for k, v in (ROW | changes).items() if v is not None}

    def apply(root: Path) -> None:
        path = write_table(root, [merged, HEALTHY])
        if line is not None:
            path.write_text(line + "\n" + json.dumps(HEALTHY) + "\n", encoding="utf-8")

    return apply


def table_bytes(change):
    def apply(root: Path) -> None:
        path = write_table(root)
        path.write_bytes(change(path.read_bytes()))

    return apply


def csv_text(*lines: str):
    def apply(root: Path) -> None:
        write_table(root).unlink()
        (root / "own" / "table" / "train.csv").write_text(
            "\n".join([*lines, f'1.jpg,healthy,"{FLAT}"']), encoding="utf-8"
        )

    return apply


def coco(**changes: object):
    """Two images, the second one healthy."""

    def apply(root: Path) -> None:
        write_image(root / "own" / "coco" / "train" / "b.jpg", SIZE)
        annotations = [{"id": 7, "image_id": 1, "category_id": 0, "segmentation": [FLAT]}]
        healthy = {"id": 8, "image_id": 2, "category_id": 0, "segmentation": [FLAT]}
        image, annotation = changes.get("image", {}), changes.get("annotation", {})
        rest = {k: v for k, v in changes.items() if k not in ("image", "annotation")}
        content = {
            "images": [PAIR[0] | image, PAIR[1]],
            "annotations": [annotations[0] | annotation, healthy],
        }
        write_coco(root, **content | rest)

    return apply


def labelme(**changes: object):
    """Two JSONs, the second one healthy."""

    def apply(root: Path) -> None:
        path = write_labelme(root)
        write_image(path.with_name("b.jpg"), SIZE)
        write_json(path.with_name("b.json"), {"shapes": [{"label": "cat", "points": RECTANGLE}]})
        write_labelme(root, **changes)

    return apply


def shape(**changes: object):
    return labelme(shapes=[{"label": "dog", "points": RECTANGLE} | changes])


def file_bytes(name: str, content: bytes | None):
    """labelme's first JSON with other content; None: a folder."""

    def apply(root: Path) -> None:
        labelme()(root)
        path = root / "own" / "labelme" / "train" / name
        path.unlink()
        path.mkdir() if content is None else path.write_bytes(content)

    return apply


def reason_seg(change):
    def apply(root: Path) -> None:
        change(write_reason_seg(root, count=2))

    return apply


def rle(**changes: object) -> dict:
    return runs(box(2, 2, 6, 5)) | changes


def write_bytes(content: bytes):
    return lambda path: path.write_bytes(content)


def outside(root: Path) -> None:
    """An image that is a link to a file beyond the data folder."""
    secret = write_image(root / "secret.jpg", SIZE)
    row()(root)
    path = root / "own" / "table" / "images" / "0.jpg"
    path.unlink()
    path.symlink_to(secret)


PAIR = [{"id": 1, "file_name": "a.jpg", "height": 10, "width": 12}, {"id": 2, "file_name": "b.jpg"}]
NOT_FINITE = '{"image": "0.jpg", "query": "q", "polygons": [[0, 0, NaN, 3, 3, 3]]}'
INFINITE = '{"image": "0.jpg", "query": "q", "polygons": [[0, 0, 1e999, 3, 3, 3]]}'
CUT = '{"image": "0.jpg", "query": "q", "polyg'
T, C, L, R = "own:table", "own:coco", "own:labelme", "ReasonSeg"
# name: (data set, how it is broken, the item to blame, what is said about it)
CASES = {
    # images
    "jpeg cut in half": (T, image_as(photo(Path("a.jpg"))[:2000]), "images/0.jpg", "broken image"),
    "png cut in half": (
        T,
        image_as(photo(Path("a.png"))[:4000], "0.png"),
        "images/0.png",
        "broken image",
    ),
    "png with a bad checksum": (
        T,
        image_as(photo(Path("a.png"))[:16] + b"\1" + photo(Path("a.png"))[17:], "0.png"),
        "images/0.png",
        "image",
    ),
    "image without bytes": (T, image_as(b""), "images/0.jpg", "not a readable image"),
    "text called jpg": (T, image_as(b"<html>404</html>"), "images/0.jpg", "not a readable image"),
    "folder called jpg": (T, image_as(None), "train.jsonl:1", "0.jpg is not there"),
    "image that is not there": (
        T,
        row(image="9.jpg"),
        "train.jsonl:1",
        "9.jpg is not there; looked in .*images",
    ),
    "image above the folder": (
        T,
        row(image="../../secret.jpg"),
        "train.jsonl:1",
        r"absolute names and '\.\.' are refused",
    ),
    "image with an absolute name": (
        T,
        row(image="/etc/passwd"),
        "train.jsonl:1",
        "absolute names and '..' are refused",
    ),
    "image linked to the outside": (T, outside, "train.jsonl:1", "is a link that leaves"),
    # masks
    "mask of another size": (
        T,
        mask_as(lambda p: write_mask(p, np.ones((9, 12), bool))),
        "train.jsonl:1",
        "the mask is 9×12 .* its image is 10×12",
    ),
    "mask in colour": (
        T,
        mask_as(lambda p: cv2.imwrite(str(p), np.arange(360, dtype=np.uint8).reshape(10, 12, 3))),
        "train.jsonl:1",
        "holds 120 values besides 0",
    ),
    "mask with many values": (
        T,
        mask_as(lambda p: cv2.imwrite(str(p), np.arange(120, dtype=np.uint8).reshape(SIZE))),
        "train.jsonl:1",
        "holds 119 values besides 0",
    ),
    "mask cut in half": (
        T,
        mask_as(write_bytes(photo(Path("a.png"))[:3000])),
        "train.jsonl:1",
        "broken image",
    ),
    "mask that is not there": (
        T,
        mask_as(lambda p: None),
        "train.jsonl:1",
        "x.png is not there; looked in .*masks",
    ),
    "mask as jpeg": (T, row(polygons=None, mask="m.jpg"), "train.jsonl:1", "a mask must be a PNG"),
    # rows of a table
    "line cut": (T, row(CUT), "train.jsonl:1", "not valid JSON"),
    "line that is a list": (T, row("[1, 2]"), "train.jsonl:1", "must be an object"),
    "no image": (T, row(image=None), "train.jsonl:1", '"image" must be the name of an image'),
    "image is a number": (T, row(image=3), "train.jsonl:1", '"image" must be the name of an image'),
    "no query": (T, row(query=None), "train.jsonl:1", '"query" must be a text'),
    "empty query": (T, row(query=" "), "train.jsonl:1", '"query" must be a text'),
    "query with an empty wording": (
        T,
        row(query=["q", ""]),
        "train.jsonl:1",
        '"query" must be a text',
    ),
    "no target": (
        T,
        row(polygons=None),
        "train.jsonl:1",
        "needs one of mask, rle and polygons, none is given",
    ),
    "two kinds of target": (T, row(mask="m.png"), "train.jsonl:1", "mask and polygons are given"),
    "targets beside a target": (
        T,
        row(targets=[{"mask": "m.png"}]),
        "train.jsonl:1",
        'has "targets" and',
    ),
    "empty list of targets": (
        T,
        row(polygons=None, targets=[]),
        "train.jsonl:1",
        '"targets" must be a list of objects',
    ),
    "targets without shape": (
        T,
        row(polygons=None, targets=[{}]),
        "train.jsonl:1",
        r"targets\[0\] needs one of",
    ),
    "points that are no numbers": (
        T,
        row(polygons=[["a", "b", "c", "d", "e", "f"]]),
        "train.jsonl:1",
        '"polygons" must be a list of polygons .*no coordinate',
    ),
    "NaN in a polygon": (T, row(NOT_FINITE), "train.jsonl:1", "no coordinate"),
    "infinity in a polygon": (T, row(INFINITE), "train.jsonl:1", "no coordinate"),
    "coordinate beyond any image": (
        T,
        row(polygons=[[0, 0, 1e12, 3, 3, 3]]),
        "train.jsonl:1",
        "no coordinate",
    ),
    "polygon of two points": (
        T,
        row(polygons=[[0, 0, 3, 3]]),
        "train.jsonl:1",
        "polygon 0 needs at least three points",
    ),
    "polygon of an odd length": (
        T,
        row(polygons=[[0, 0, 3, 3, 1, 2, 3]]),
        "train.jsonl:1",
        "polygon 0 needs at least three points",
    ),
    "polygons as text": (T, row(polygons="0,0"), "train.jsonl:1", '"polygons" must be a list'),
    "runs that are too few": (
        T,
        row(polygons=None, rle=rle(counts=[5, 7])),
        "train.jsonl:1",
        "runs do not add up to 120",
    ),
    "runs that are negative": (
        T,
        row(polygons=None, rle=rle(counts=[130, -10])),
        "train.jsonl:1",
        "runs do not add up",
    ),
    "compressed runs that are too few": (
        T,
        row(polygons=None, rle=rle(counts="`")),
        "train.jsonl:1",
        "not a valid run-length",
    ),
    "compressed runs cut": (
        T,
        row(polygons=None, rle=rle(counts="52")),
        "train.jsonl:1",
        "add up to 7 pixels, the image has 120",
    ),
    "compressed runs that are none": (
        T,
        row(polygons=None, rle=rle(counts="é~")),
        "train.jsonl:1",
        "not compressed run lengths",
    ),
    "run lengths of another size": (
        T,
        row(polygons=None, rle=runs(box(0, 0, 1, 1)[:9])),
        "train.jsonl:1",
        '"rle" is 9×12',
    ),
    "run lengths without size": (
        T,
        row(polygons=None, rle={"counts": [120]}),
        "train.jsonl:1",
        r'"rle" must be {"size"',
    ),
    "answer that is a number": (
        T,
        row(answer=5),
        "train.jsonl:1",
        '"answer" must be a text, or be left out',
    ),
    "is_sentence as text": (
        T,
        row(is_sentence="yes"),
        "train.jsonl:1",
        '"is_sentence" must be true or false',
    ),
    "ignore that is nothing": (
        T,
        row(ignore=3),
        "train.jsonl:1",
        '"ignore" must be a list of polygons',
    ),
    "row that repeats another": (
        T,
        row(json.dumps(HEALTHY)),
        "train.jsonl:2",
        "repeats line 1; remove one of the two",
    ),
    "csv row with too few cells": (
        T,
        csv_text("image,query,polygons", "0.jpg,q"),
        "train.csv:2",
        "has 2 cells, the first line has 3",
    ),
    "csv cell with broken JSON": (
        T,
        csv_text("image,query,polygons", '0.jpg,q,"[[0, 0"'),
        "train.csv:2",
        '"polygons" is not valid JSON',
    ),
    # COCO's format
    "annotation of an unknown image": (
        C,
        coco(annotation={"image_id": 99}),
        "train.json:annotation 7",
        '"image_id" is 99, and there is no such',
    ),
    "annotation of an unknown category": (
        C,
        coco(annotation={"category_id": 9}),
        "train.json:annotation 7",
        '"category_id" is 9, and there',
    ),
    "category that is negative": (
        C,
        coco(annotation={"category_id": -1}),
        "train.json:annotation 7",
        '"category_id" is -1',
    ),
    "annotation id used twice": (
        C,
        coco(annotation={"id": 8}),
        "train.json:annotation at position 1",
        '"id" is used twice',
    ),
    "annotation id as text": (
        C,
        coco(annotation={"id": [7]}),
        "train.json:annotation at position 0",
        '"id" must be a whole number',
    ),
    "image id used twice": (
        C,
        coco(images=[*PAIR, PAIR[1]]),
        "train.json:image at position 2",
        '"id" is used twice',
    ),
    "file name that is a number": (
        C,
        coco(image={"file_name": 5}),
        "train.json:image 1",
        '"file_name" must be the name',
    ),
    "file name above the folder": (
        C,
        coco(image={"file_name": "../c.jpg"}),
        "train.json:image 1",
        "refused",
    ),
    "size that is negative": (
        C,
        coco(image={"height": -10}),
        "train.json:image 1",
        '"height" and "width" must be whole numbers',
    ),
    "size of another image": (
        C,
        coco(image={"height": 11}),
        "train.json:image 1",
        "is 11×12 .* but its image is 10×12",
    ),
    "segmentation that is a text": (
        C,
        coco(annotation={"segmentation": "x"}),
        "train.json:annotation 7",
        '"segmentation" must be a list',
    ),
    "two texts of one annotation": (
        C,
        coco(annotation={"query": "a", "caption": "b"}),
        "train.json:annotation 7",
        "has query and caption",
    ),
    "iscrowd that is a text": (
        C,
        coco(annotation={"iscrowd": "no"}),
        "train.json:annotation 7",
        '"iscrowd" must be 0 or 1',
    ),
    # labelme
    "json without bytes": (L, file_bytes("a.json", b""), "train/a.json", "the file is empty"),
    "json of zeros": (L, file_bytes("a.json", b"\0" * 64), "train/a.json", "the file is empty"),
    "json cut": (
        L,
        file_bytes("a.json", b'{"shapes": [{"label":'),
        "train/a.json",
        "not valid JSON",
    ),
    "json in UTF-16": (
        L,
        file_bytes("a.json", '{"shapes": []}'.encode("utf-16")),
        "train/a.json",
        "has no shape to ask for",
    ),
    "json in UTF-32 without mark": (
        L,
        file_bytes("a.json", '{"shapes": []}'.encode("utf-32-le")),
        "train/a.json",
        "save it as UTF-8",
    ),
    "json in no encoding": (
        L,
        file_bytes("a.json", b'{"t": "\x81\x8d"}'),
        "train/a.json",
        "is not UTF-8, and gives no usual words otherwise; save it as UTF-8",
    ),
    "json that is a list": (L, file_bytes("a.json", b"[]"), "train/a.json", 'has no list "shapes"'),
    "json that never ends": (
        L,
        file_bytes("a.json", b"[" * 100_000),
        "train/a.json",
        "not valid JSON",
    ),
    "folder called json": (
        L,
        file_bytes("a.json", None),
        "train/a.json",
        "cannot be read .*directory",
    ),
    "shapes that are no list": (L, labelme(shapes={}), "train/a.json", 'has no list "shapes"'),
    "nothing drawn": (L, labelme(shapes=[]), "train/a.json", "has no shape to ask for"),
    "shape without label": (
        L,
        shape(label=None),
        "train/a.json",
        r'"shapes"\[0\]: has no text "label"',
    ),
    "shape without area": (L, shape(shape_type="line"), "train/a.json", "'line' has no area"),
    "circle of three points": (
        L,
        shape(shape_type="circle", points=RECTANGLE[:3]),
        "train/a.json:label dog",
        "a circle has 2 points, found 3",
    ),
    "point with three numbers": (
        L,
        shape(points=[[1, 2, 3]]),
        "train/a.json:label dog",
        r'needs "points" as a list of \[x, y\]',
    ),
    "mask that is no PNG": (
        L,
        shape(shape_type="mask", points=RECTANGLE[:2], mask="abcd"),
        "train/a.json:label dog",
        '"mask" must be a PNG in base64',
    ),
    "height as text": (
        L,
        labelme(imageHeight="ten"),
        "train/a.json",
        '"imageHeight" and "imageWidth" must be whole numbers',
    ),
    "labelme of another image": (
        L,
        labelme(imageHeight=12, imageWidth=10),
        "train/a.json",
        "is 12×10 .* but its image is 10×12",
    ),
    "imagePath that is a number": (
        L,
        labelme(imagePath=4),
        "train/a.json",
        '"imagePath" must be a file name',
    ),
    # ReasonSeg's layout
    "image without JSON": (
        R,
        reason_seg(lambda f: write_image(f / "x.jpg")),
        "train/x.jpg",
        "no JSON belongs to this image",
    ),
    "run lengths cut": (
        R,
        reason_seg(
            lambda f: write_json(
                f / "000.json", {"text": "q", "shapes": [], "target_rle": rle(counts="52")}
            )
        ),
        "train/000.json",
        "add up to 7 pixels",
    ),
}


def open_set(root: Path, name: str, options: LoaderOptions):
    if name == R:
        return ReasoningSegmentation(root, "ReasonSeg|train", options)
    return OwnData(root, name.removeprefix("own:"), options)


@pytest.mark.parametrize(("name", "break_it", "item", "message"), CASES.values(), ids=CASES.keys())
def test_broken_input_is_named_and_only_it_is_left_out(tmp_path, name, break_it, item, message):
    break_it(tmp_path)
    with pytest.raises(DataError, match=message) as error:
        open_all(open_set(tmp_path, name, EVAL))
    assert Path(item).name.split(" at ")[0] in str(error.value) and "\n" not in str(error.value)

    findings, _ = check.inspect_all(tmp_path, None, [name])
    (finding,) = findings
    (bad,) = finding.bad
    folder = "reason_seg/ReasonSeg" if name == R else name.replace(":", "/")
    assert bad.item == f"{folder}/{item}" and not finding.error

    tolerant = open_set(
        tmp_path, name, LoaderOptions(LEVELS, training=False, faults=Faults(tmp_path, skip=[bad]))
    )
    open_all(tolerant)
    assert tolerant.options.faults.left_out.total() == 1 and len(tolerant) >= 1, (
        "the healthy item stays"
    )


def test_enough_kinds():
    assert len(CASES) >= 40
    assert len({message for *_, message in CASES.values()}) >= 40


WHOLE_FILES = {
    "utf-32 table": (
        T,
        table_bytes(lambda raw: raw.decode().encode("utf-32-le")),
        "train.jsonl: is written in UTF-32",
    ),
    "empty table": (T, table_bytes(lambda raw: b""), "train.jsonl: the file is empty"),
    "csv without columns": (
        T,
        csv_text("photo,text"),
        "train.csv:1: the first line must name the columns",
    ),
    "csv with a column twice": (
        T,
        csv_text("image,query,query"),
        "train.csv:1: the first line must name the columns",
    ),
    "csv with an open quote": (
        T,
        csv_text("image,query,polygons", '0.jpg,"q'),
        "train.csv:2: not valid CSV",
    ),
    "coco without lists": (C, coco(images={}), "not valid|has no list"),
    "category id used twice": (
        C,
        coco(categories=[{"id": 0, "name": "a"}] * 2),
        'category at position 1: "id" is used twice',
    ),
    "categories that are no list": (C, coco(categories={}), '"categories" must be a list'),
    "category without name": (C, coco(categories=[{"id": 0}]), 'category 0: "name" must be a text'),
}


@pytest.mark.parametrize(
    ("name", "break_it", "message"), WHOLE_FILES.values(), ids=WHOLE_FILES.keys()
)
def test_a_file_that_is_broken_as_a_whole_cannot_be_opened(tmp_path, name, break_it, message):
    break_it(tmp_path)
    with pytest.raises(DataError, match=message):
        open_all(open_set(tmp_path, name, EVAL))
    assert check.main(["--dataset_dir", str(tmp_path)]) == 1


def test_marks_and_old_encodings_are_no_damage(tmp_path):
    path = write_table(tmp_path, [ROW | {"query": "the café"}], images=1)
    for encoding in ("utf-8-sig", "cp1252"):
        path.write_bytes(
            json.dumps(ROW | {"query": "the café"}, ensure_ascii=False).encode(encoding)
        )
        assert (
            "café"
            in OwnData(tmp_path, "table", EVAL)
            .sample(0, np.random.default_rng(0))
            .conversations[0]
            .turns[0][0]
        )


def test_the_check_writes_what_training_can_leave_out(tmp_path, capsys):
    write_table(
        tmp_path,
        [
            ROW | {"polygons": [[1, 2]]},
            HEALTHY,
            ROW | {"query": "other", "rle": rle(counts=[1]), "polygons": None},
        ],
    )
    listed = tmp_path / "bad.jsonl"
    assert check.main(["--dataset_dir", str(tmp_path), "--fix-list", str(listed)]) == 1
    assert [item.item for item in read_skip_list(listed)] == [
        f"own/table/train.jsonl:{n}" for n in (1, 3)
    ]
    assert "2 bad" in capsys.readouterr().out
    faults = Faults(tmp_path, skip=read_skip_list(listed))
    assert len(OwnData(tmp_path, "table", LoaderOptions(LEVELS, faults=faults))) == 1
    assert faults.left_out == {"own:table|train": 2}
    write_lines(listed, [{"dataset": "x"}])
    with pytest.raises(DataError, match="bad.jsonl:1: a skip list has one"):
        read_skip_list(listed)
