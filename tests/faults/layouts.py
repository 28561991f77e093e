"""Layouts and dialects of exporters, names of files."""

from __future__ import annotations

import base64
import io
import json
import os
import unicodedata
import zlib
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cores.dataset import check
from cores.dataset.registry import open_evaluation
from cores.dataset.sample import LoaderOptions
from cores.utils.evaluation.cli import main as evaluation
from tests.dataset_toys import write_image, write_json
from tests.faults.case import case
from tests.own_toys import SIZE, box, runs, write_lines

FLAT = [2, 2, 6, 2, 6, 5, 2, 5]  # 12 pixels


def checked(root: Path, *flags: str) -> tuple[int, str]:
    """Exit code and output of ``python -m dataset.check --all``, without what is not there."""
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out):
        code = check.main(["--dataset_dir", str(root), "--all", *flags])
    assert "Traceback" not in out.getvalue()
    return code, out.getvalue().split("Not there, and")[0]


def asked(root: Path, spec: str) -> list[tuple[str, str, int]]:
    """(image, query, pixels) of every target of an evaluation set."""
    loader = open_evaluation(root, spec, LoaderOptions(("SEG",), training=False))
    found = []
    for index in range(len(loader)):
        sample = loader.sample(index, np.random.default_rng(0))
        for conversation in sample.conversations:
            query = conversation.turns[0][0].split(" Please")[0]
            query = query.removeprefix("What is ").removesuffix(" in this image?")
            found.append((sample.id, query, int(conversation.masks.sum())))
    return found


def coco(*names: str, categories: tuple[str, ...] = ("car",), **fields: Any) -> dict:
    """A file in COCO's format with one car of 12 pixels in each of the images ``names``."""
    numbers = range(1, len(names) + 1)
    height, width = SIZE
    return {
        "images": [
            {"id": i, "file_name": name, "height": height, "width": width}
            for i, name in zip(numbers, names, strict=True)
        ],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "segmentation": [FLAT], "iscrowd": 0}
            | fields
            for i in numbers
        ],
        "categories": [{"id": i, "name": n} for i, n in enumerate(categories, start=1)],
    }


def labelme(label: str = "car", **fields: Any) -> dict:
    points = [[2, 2], [5, 2], [5, 4], [2, 4]]  # with its outline 12 pixels
    return {"shapes": [{"label": label, "points": points}]} | fields


def photo(path: Path) -> Path:
    """A photo in whatever format its ending says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((*SIZE, 3), 120, dtype=np.uint8)
    kind = {".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF"}.get(path.suffix.lower())
    Image.fromarray(pixels).save(path, format=kind or path.suffix[1:].upper())
    return path


@case(
    "masks drawn with a brush in CVAT, which marks each as iscrowd",
    "right",
    "where all run lengths are marked and no polygon, they are objects; the check counts them",
)
def brush_masks(root: Path) -> None:
    content = coco("a.jpg", "b.jpg")
    mask = {"segmentation": runs(box(7, 0, 10, 10)), "iscrowd": 1, "category_id": 1}
    content["annotations"] += [{"id": 9, "image_id": 1} | mask, {"id": 10, "image_id": 2} | mask]
    for name in ("a.jpg", "b.jpg"):
        write_image(root / "own" / "cvat" / "images" / name, SIZE)
    write_json(root / "own" / "cvat" / "train.json", content)
    assert asked(root, "own:cvat|train") == [("a", "the car", 42), ("b", "the car", 42)]
    code, out = checked(root)
    assert code == 0 and "2 annotations have iscrowd 1; as all run lengths have it" in out


@case(
    "a crowd among single masks, or of COCO itself",
    "right",
    "its pixels are ignored, and the check says how many there are",
)
def real_crowds(root: Path) -> None:
    for name, number, crowd_id in (("mixed", "a.jpg", 9), ("taken", "000000000139.jpg", 9)):
        content = coco(number)
        content["annotations"].append(
            {"id": crowd_id, "image_id": 1, "category_id": 1, "iscrowd": 1}
            | {"segmentation": runs(box(7, 0, 10, 10))}
        )
        if name == "mixed":
            single = {"segmentation": runs(box(0, 9, 1, 10)), "iscrowd": 0}
            content["annotations"].append({"id": 10, "image_id": 1, "category_id": 1} | single)
        write_image(root / "own" / name / "images" / number, SIZE)
        write_json(root / "own" / name / "train.json", content)
    assert asked(root, "own:mixed|train") == [("a", "the car", 13)]
    assert asked(root, "own:taken|train") == [("000000000139", "the car", 12)]
    assert checked(root)[1].count("1 annotations have iscrowd 1; they are crowds") == 2


@case(
    "an archive of CVAT as unpacked: annotations/instances_<subset>.json, images/<subset>/",
    "right",
    "each subset is a split; default is everything",
)
def cvat_archive(root: Path) -> None:
    for subset in ("default",), ("train", "validation"):
        folder = root / "own" / subset[0]
        for name in subset:
            write_image(folder / "images" / name / "a.jpg", SIZE, seed_of(name))
            write_json(folder / "annotations" / f"instances_{name}.json", coco("a.jpg"))
    assert asked(root, "own:default|train") == [("a", "the car", 12)]
    loader = open_evaluation(root, "own:train|val", LoaderOptions(("SEG",), training=False))
    assert str(loader.path(0)).endswith("images/validation/a.jpg") and checked(root)[0] == 0


def seed_of(name: str) -> int:
    return len(name)


@case(
    "an export of Roboflow: train, valid and test, each with _annotations.coco.json",
    "right",
    "opens as it is; valid is val",
)
def roboflow(root: Path) -> None:
    for split in ("train", "valid", "test"):
        folder = root / "own" / "rf" / split
        write_image(folder / f"{split}_jpg.rf.0a.jpg", SIZE)
        write_json(folder / "_annotations.coco.json", coco(f"{split}_jpg.rf.0a.jpg"))
    assert [asked(root, f"own:rf|{s}")[0][0] for s in ("train", "val", "valid", "test")] == [
        f"{s}_jpg.rf.0a" for s in ("train", "valid", "valid", "test")
    ]
    assert checked(root)[0] == 0


@case(
    "names of photos as Windows, browsers and other machines write them",
    "right",
    "found where one file only fits; the folders of the exporter need not be there",
)
def foreign_names(root: Path) -> None:
    names = (
        "images\\0a-a.jpg",
        "/data/upload/1/1b-b.jpg",
        "/data/local-files/?d=images%5Cc.jpg",
        "https://example.org/x/d%20d.jpg",
        "C:\\Users\\me\\set\\images\\e.jpg",
        "./f.jpg",
        "../pictures/g.JPG",
        "h.png",
    )
    there = ("0a-a.jpg", "1b-b.jpg", "c.jpg", "d d.jpg", "e.jpg", "f.jpg", "g.jpg", "h.webp")
    for name in there:
        photo(root / "own" / "ls" / "images" / name)
    write_json(root / "own" / "ls" / "result.json", coco(*names))
    code, out = checked(root)
    assert code == 0 and "8 images, 8 opened: 8 queries" in out


@case(
    "URLs and absolute names that could mean the same file, or none",
    "refused",
    "one line names the entries and what to change; nothing outside of the data is opened",
)
def foreign_names_refused(root: Path) -> None:
    folder = root / "own" / "url"
    write_image(folder / "images" / "a.jpg", SIZE)
    write_image(root / "secret.jpg", SIZE)
    write_json(folder / "train.json", coco("https://x.org/1/a.jpg", "/data/2/a.jpg"))
    write_json(folder / "val.json", coco("../../secret.jpg"))
    code, out = checked(root)
    assert code == 1 and "image 1 and of " in out and "give all its annotations one image" in out
    assert "../../secret.jpg is a place outside of the data" in out


@case(
    "letters that macOS has taken apart, and endings in another case",
    "right",
    "the same letters are the same name",
)
def composed_letters(root: Path) -> None:
    name = "käfer.jpg"
    photo(root / "coco" / "train2017" / unicodedata.normalize("NFD", "Käfer.JPG"))
    write_json(root / "coco" / "annotations" / "instances_train2017.json", coco(name))
    write_lines(
        root / "own" / "t" / "train.jsonl", [{"image": name, "query": "q", "polygons": [FLAT]}]
    )
    photo(root / "own" / "t" / "images" / unicodedata.normalize("NFD", name))
    assert [area for _, _, area in asked(root, "coco|train2017") + asked(root, "own:t|train")] == [
        12,
        12,
    ]


@case(
    "photos in ReasonSeg's layout as IMG_1.JPG, .PNG, .webp, .bmp or .tif, as cameras write them",
    "right",
    "every format that is read is found, in any case",
)
def other_endings(root: Path) -> None:
    for number, ending in enumerate(("JPG", "JPEG", "PNG", "webp", "bmp", "tif")):
        for place in (f"reason_seg/S{number}/train", f"own/s{number}/train"):
            photo(root / place / f"IMG_1.{ending}")
            write_json(root / place / "IMG_1.json", labelme(text=["the box"]))
    code, out = checked(root)
    assert code == 0 and out.count("1 images, 1 opened: 1 queries, 1 targets") == 12


@case(
    "a photo in a format that is not read (HEIC)",
    "refused",
    "the line names the file and what to convert it to",
)
def unread_format(root: Path) -> None:
    folder = root / "own" / "phone" / "train"
    write_json(folder / "IMG_1.json", labelme())
    (folder / "IMG_1.HEIC").write_bytes(b"ftypheic")
    code, out = checked(root)
    assert code == 1 and "IMG_1.HEIC: this format is not read; convert it to JPEG or PNG" in out


@case(
    'AnyLabeling: a file that was saved again has an empty "text"',
    "right",
    "an empty text is none, so the labels are asked",
)
def empty_text(root: Path) -> None:
    write_image(root / "own" / "any" / "train" / "a.jpg", SIZE)
    content = labelme("red_car", text="", flags={}, imagePath="..\\photos\\a.jpg")
    write_json(root / "own" / "any" / "train" / "a.json", content)
    assert asked(root, "own:any|train") == [("a", "the red car", 12)]


@case(
    "labels of labelme in GBK, Big5, Shift-JIS, EUC-KR or Windows-1251",
    "right",
    "the encoding is proved from the letters of the file or of its folder, and said",
)
def proved_encodings(root: Path) -> None:
    words = {
        "gbk": ("汽车", "人", "猫"),
        "big5": ("汽車", "白貓"),
        "cp932": ("赤い箱", "車"),
        "euc_kr": ("자동차", "개"),
        "cp1251": ("машина", "человек"),
        "cp1252": ("café", "the dog’s bowl"),
    }
    for encoding, labels in words.items():
        for number, label in enumerate(labels):
            path = root / "own" / encoding / "train" / f"{number}.json"
            write_image(path.with_suffix(".jpg"), SIZE)
            path.write_bytes(json.dumps(labelme(label), ensure_ascii=False).encode(encoding))
        found = [query.removeprefix("the ") for _, query, _ in asked(root, f"own:{encoding}|train")]
        assert found == [label.removeprefix("the ") for label in labels], found


@case(
    "a label that two encodings make into usual words, or none",
    "refused",
    "the line shows what each would read, and how to save it as UTF-8",
)
def doubtful_encoding(root: Path) -> None:
    for name, raw in (("two", "狗".encode("gbk")), ("none", "żółty".encode("cp1250"))):
        path = root / "own" / name / "train" / "a.json"
        write_image(path.with_suffix(".jpg"), SIZE)
        path.write_bytes(b'{"shapes": [{"label": "%s", "points": [[2, 2], [6, 5], [2, 5]]}]}' % raw)
    code, out = checked(root)
    assert code == 1 and 'may be GB18030 ("狗") or Big5 ("僩")' in out, out
    assert "gives no usual words otherwise; save it as UTF-8" in out


@case("ids as texts, floats and UUIDs, as pandas writes them", "right", "equal ids are joined")
def ids_of_pandas(root: Path) -> None:
    for name, image, annotation in (("text", "7", 7.0), ("uuid", "9f0c-a", "9f0c-a")):
        content = coco("a.jpg")
        content["images"][0]["id"] = image
        content["annotations"][0] |= {"id": "77aa", "image_id": annotation, "category_id": "1.0"}
        write_image(root / "own" / name / "a.jpg", SIZE)
        write_json(root / "own" / name / "train.json", content)
        assert asked(root, f"own:{name}|train") == [("a", "the car", 12)]
    content = coco("a.jpg")
    content["images"][0]["id"], content["annotations"][0]["category_id"] = "1", 1.0
    write_image(root / "coco" / "train2017" / "a.jpg", SIZE)
    write_json(root / "coco" / "annotations" / "instances_train2017.json", content)
    assert asked(root, "coco|train2017") == [("a", "the car", 12)]


@case(
    "one photo listed as two images, each with a part of the objects",
    "refused",
    "the line names both; neither is asked with half of its objects",
)
def one_file_twice(root: Path) -> None:
    write_image(root / "own" / "two" / "a.jpg", SIZE)
    write_json(root / "own" / "two" / "train.json", coco("a.jpg", "./a.jpg"))
    write_image(root / "coco" / "train2017" / "a.jpg", SIZE)
    content = coco("a.jpg", "a.jpg")
    write_json(root / "coco" / "annotations" / "instances_train2017.json", content)
    code, out = checked(root)
    assert code == 1 and "train.json:image 1 and of " in out
    assert "a.jpg is the file of the images 1 and 2; give all its annotations one image" in out


@case(
    "cam1/0001.jpg and cam2/0001.jpg in one set, scored and compared",
    "right",
    "each keeps its folder as its name, in reports, predictions and comparisons",
)
def same_names(root: Path) -> None:
    folder = root / "own" / "cams"
    for camera in ("cam1", "cam2"):
        write_image(folder / "images" / camera / "0001.jpg", SIZE)
        mask = Image.fromarray(box(2, 2, 6, 5).astype(np.uint8))
        (root / "masks" / camera).mkdir(parents=True)
        mask.save(root / "masks" / camera / "0001.png")
    write_json(folder / "val.json", coco("cam1/0001.jpg", "cam2/0001.jpg"))
    flags = ["--predictions", str(root / "masks"), "--dataset_dir", str(root)]
    flags += ["--val_dataset", "own:cams|val", "--out", str(root / "out")]
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out):
        assert evaluation(["score", *flags]) == 0
        written = root / "out" / "targets-free.json"
        assert evaluation(["compare", str(written), str(written)]) == 0, out.getvalue()
    rows = json.loads(written.read_text())["targets"]
    assert [(row["id"], row["iou"]) for row in rows] == [("cam1/0001", 1.0), ("cam2/0001", 1.0)]


@case("an export of FiftyOne: labels.json and data/", "right", "opens as it is")
def fiftyone(root: Path) -> None:
    write_image(root / "own" / "fo" / "data" / "a.jpg", SIZE)
    write_json(root / "own" / "fo" / "labels.json", coco("a.jpg"))
    assert asked(root, "own:fo|train") == [("a", "the car", 12)]


@case(
    "__MACOSX, ._a.json, .DS_Store, Thumbs.db, desktop.ini and @eaDir beside the data",
    "right",
    "ignored wherever files and folders are listed",
)
def leftovers(root: Path) -> None:
    for place in ("own/good", "reason_seg/Mine/train"):
        write_image(root / place / "a.jpg", SIZE)
        write_json(root / place / "a.json", labelme(text="the box"))
        for name in ("._a.json", ".DS_Store", "Thumbs.db", "desktop.ini"):
            (root / place / name).write_bytes(b"\0\5\26\7")
    for place in ("own", "own/good", "reason_seg", "reason_seg/Mine", "reason_seg/Mine/train"):
        for name in ("__MACOSX", "@eaDir", ".ipynb_checkpoints"):
            write_json(root / place / name / "a.json", {})
    code, out = checked(root)
    assert code == 0 and out.count("1 images, 1 opened") == len(out.strip().splitlines()) == 2, out


@case(
    "LLaVA's mixture of 665k: records without image, photos as coco/train2017/…",
    "right",
    "photos are found below the data folder; records in text alone are left out and counted",
)
def llava_mixture(root: Path) -> None:
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A box."}]
    names = ("coco/train2017/1.jpg", "vg/VG_100K/1.jpg", None)
    records = [{"id": str(i), "conversations": talk} for i in range(3)]
    for record, name in zip(records, names, strict=True):
        if name:
            record["image"] = name
            write_image(root / name, SIZE)
    write_json(root / "llava_dataset" / "llava_v1_5_mix665k.json", records)
    code, out = checked(root)
    assert code == 0 and "2 images, 2 opened" in out and "1 of 3 records have no image" in out


@case(
    "tables from Excel: semicolons, or tabs in UTF-16",
    "right",
    "what separates the columns is read off the first line",
)
def tables_of_excel(root: Path) -> None:
    rows = [["image", "query", "polygons"], ["a.jpg", "the car", f'"{[FLAT]}"']]
    for name, sign, encoding in (("semi", ";", "utf-8-sig"), ("tab", "\t", "utf-16")):
        text = "".join(sign.join(row) + "\r\n" for row in rows)
        write_image(root / "own" / name / "images" / "a.jpg", SIZE)
        (root / "own" / name / "train.csv").write_bytes(text.encode(encoding))
        assert asked(root, f"own:{name}|train") == [("a", "the car", 12)]


@case(
    "a val.json that lists nothing",
    "refused",
    "the line says that it is empty; the other splits open",
)
def empty_split(root: Path) -> None:
    write_image(root / "own" / "e" / "a.jpg", SIZE)
    write_json(root / "own" / "e" / "train.json", coco("a.jpg"))
    write_json(root / "own" / "e" / "val.json", coco())
    code, out = checked(root)
    assert code == 1 and "val.json: holds no query that can be used; add some, or remove it" in out
    assert asked(root, "own:e|train") and asked(root, "own:e|all")


@case(
    "a folder of a hub's cache, in which every file is a link",
    "refused",
    "the line names --follow_links, with which it opens",
)
def hub_cache(root: Path) -> None:
    snapshot = root / "cache" / "snapshots" / "c0ffee"
    write_image(root / "cache" / "blobs" / "a.jpg", SIZE)
    row = {"image": "a.jpg", "query": "the car", "polygons": [FLAT]}
    write_lines(root / "cache" / "blobs" / "bbbb", [row])
    (snapshot / "images").mkdir(parents=True)
    os.symlink("../../blobs/bbbb", snapshot / "train.jsonl")
    os.symlink("../../../blobs/a.jpg", snapshot / "images" / "a.jpg")
    (root / "data" / "own").mkdir(parents=True)
    os.symlink(snapshot, root / "data" / "own" / "hub")
    code, out = checked(root / "data")
    assert code == 1 and "is a link that leaves" in out and "--follow_links" in out
    code, out = checked(root / "data", "--follow_links")
    assert code == 0 and "1 images, 1 opened: 1 queries, 1 targets" in out


@case(
    "annotations of VIA (project or annotations), polygon, rect, circle and ellipse",
    "right",
    "regions are asked by their label",
)
def via(root: Path) -> None:
    shapes = (
        {"name": "polygon", "all_points_x": FLAT[::2], "all_points_y": FLAT[1::2]},
        {"name": "rect", "x": 8, "y": 0, "width": 3, "height": 2},
        {"name": "ellipse", "cx": 6, "cy": 5, "rx": 4, "ry": 2, "theta": 0},
        {"name": "circle", "cx": 6, "cy": 5, "r": 2},
    )
    labels = ({"label": "car"}, {"label": "sign"}, {"kind": {"pond": True}}, {"label": "ball"})
    regions = [
        {"shape_attributes": shape, "region_attributes": label}
        for shape, label in zip(shapes, labels, strict=True)
    ]
    entries = {"a.jpg1": {"filename": "a.jpg", "size": 1, "regions": regions}}
    for name, content in (("project", {"_via_img_metadata": entries}), ("plain", entries)):
        write_image(root / "own" / name / "a.jpg", SIZE)
        write_json(root / "own" / name / "via.json", content)
        found = {query: area for _, query, area in asked(root, f"own:{name}|train")}
        assert found["the car"] == 12 and found["the sign"] == 6
        assert abs(found["the pond"] - 25) < 5 and abs(found["the ball"] - 12.5) < 4


@case(
    "a project of Supervisely: ann/, img/, polygons with holes, bitmaps",
    "right",
    "opens as it is; holes stay open",
)
def supervisely(root: Path) -> None:
    drawn = io.BytesIO()
    Image.fromarray(np.full((2, 3), 255, np.uint8)).convert("1").save(drawn, "PNG")
    bitmap = base64.b64encode(zlib.compress(drawn.getvalue())).decode()
    square = [[0, 0], [8, 0], [8, 8], [0, 8]]
    hole = [[2, 2], [6, 2], [6, 6], [2, 6]]
    objects = [
        {"classTitle": "ring", "geometryType": "polygon"}
        | {"points": {"exterior": square, "interior": [hole]}},
        {"classTitle": "chip", "geometryType": "bitmap"}
        | {"bitmap": {"data": bitmap, "origin": [9, 7]}},
    ]
    folder = root / "own" / "sly"
    write_json(folder / "meta.json", {"classes": []})
    write_image(folder / "ds0" / "img" / "a.jpg", SIZE)
    size = {"height": SIZE[0], "width": SIZE[1]}
    write_json(folder / "ds0" / "ann" / "a.jpg.json", {"size": size, "objects": objects})
    assert asked(root, "own:sly|train") == [("a", "the ring", 48), ("a", "the chip", 6)]


@case(
    "Datumaro's JSON: polygons and masks in items",
    "right",
    "each subset is a split",
)
def datumaro(root: Path) -> None:
    entries = [
        {"id": 0, "type": "polygon", "label_id": 0, "points": FLAT},
        {"id": 0, "type": "mask", "label_id": 1, "rle": runs(box(7, 0, 10, 10))},
    ]
    item = {"id": "a", "annotations": entries, "image": {"path": "a.jpg", "size": list(SIZE)}}
    labels = {"label": {"labels": [{"name": "car"}, {"name": "bus"}]}}
    write_image(root / "own" / "dm" / "images" / "train" / "a.jpg", SIZE)
    write_json(
        root / "own" / "dm" / "annotations" / "train.json", {"categories": labels, "items": [item]}
    )
    assert asked(root, "own:dm|train") == [("a", "the car", 12), ("a", "the bus", 30)]


@case(
    "LVIS: no file_name but coco_url, names such as car_(automobile)",
    "right",
    "found by the end of the URL, asked in plain words",
)
def lvis(root: Path) -> None:
    content = coco("x", categories=("car_(automobile)", "bat_(animal)", "bat_(sports_equipment)"))
    del content["images"][0]["file_name"]
    content["images"][0]["coco_url"] = "http://images.cocodataset.org/train2017/000000000139.jpg"
    for number in (2, 3):
        content["annotations"].append({"id": number, "image_id": 1, "category_id": number})
        content["annotations"][-1]["segmentation"] = [FLAT]
    write_image(root / "own" / "lvis" / "images" / "000000000139.jpg", SIZE)
    write_json(root / "own" / "lvis" / "train.json", content)
    write_image(root / "coco" / "train2017" / "000000000139.jpg", SIZE)
    write_json(root / "coco" / "annotations" / "instances_train2017.json", content)
    expected = ["the car", "the bat (animal)", "the bat (sports equipment)"]
    for spec in ("own:lvis|train", "coco|train2017"):
        assert [query for _, query, _ in asked(root, spec)] == expected


@case(
    "annotations whose text is in a field of another name",
    "right",
    "sentences, expressions and the like are asked; other texts are named by the check",
)
def texts_in_other_fields(root: Path) -> None:
    content = coco("a.jpg", "b.jpg")
    content["annotations"][0]["sentences"] = [{"sent": "left car"}, {"sent": "the old car"}]
    content["annotations"][1]["remark_of_annotator"] = "the very old car"
    for name in ("a.jpg", "b.jpg"):
        write_image(root / "own" / "ref" / name, SIZE)
    write_json(root / "own" / "ref" / "train.json", content)
    assert [query for _, query, _ in asked(root, "own:ref|train")] == ["left car", "the car"]
    assert 'a text in "remark_of_annotator" ("the very old car")' in checked(root)[1]


@case(
    "exports that are not read: Label Studio's own JSON, YOLO, CVAT for images",
    "refused",
    "the line says which export to choose in that tool",
)
def other_exports(root: Path) -> None:
    write_json(root / "own" / "ls" / "project.json", [{"id": 1, "data": {}, "annotations": []}])
    (root / "own" / "yolo" / "labels").mkdir(parents=True)
    (root / "own" / "yolo" / "data.yaml").write_text("names: [car]\n")
    (root / "own" / "cvat").mkdir()
    (root / "own" / "cvat" / "annotations.xml").write_text("<annotations/>")
    code, out = checked(root)
    assert code == 1
    for how in ("Label Studio's own JSON: export it as COCO", "YOLO", "export it as COCO 1.0"):
        assert how in out


@case(
    "the same class as Car, car and 'car ' by different annotators, in one photo",
    "right",
    "one query; its target is all of them",
)
def labels_in_other_cases(root: Path) -> None:
    folder = root / "own" / "lab" / "train"
    photo(folder / "a.jpg")
    shapes = labelme("Car")["shapes"] + labelme("car ")["shapes"]
    shapes[1]["points"] = [[7, 6], [9, 6], [9, 8], [7, 8]]
    write_json(folder / "a.json", {"shapes": shapes})
    assert asked(root, "own:lab|train") == [("a", "the Car", 12 + 9)]
    content = coco("a.jpg", categories=("Car", "car"))
    content["annotations"].append(
        content["annotations"][0]
        | {"id": 2, "category_id": 2, "segmentation": [[7, 6, 9, 6, 9, 8]]}
    )
    photo(root / "own" / "coco" / "a.jpg")
    write_json(root / "own" / "coco" / "train.json", content)
    ((_, query, pixels),) = asked(root, "own:coco|train")
    assert query == "the Car" and pixels > 12


@case(
    "an empty shell that COCO Annotator leaves of what was deleted (segmentation [], area 0)",
    "right",
    "not asked, and the check says so; with a query of its own it is an empty target",
)
def empty_shells(root: Path) -> None:
    content = coco("a.jpg", categories=("car", "dog"))
    shell = {"image_id": 1, "category_id": 2, "segmentation": [], "area": 0, "iscrowd": 0}
    content["annotations"].append({"id": 2} | shell)
    photo(root / "own" / "shell" / "a.jpg")
    write_json(root / "own" / "shell" / "train.json", content)
    assert asked(root, "own:shell|train") == [("a", "the car", 12)]
    assert "empty shape of area 0 is not asked" in checked(root)[1]
    content["annotations"][1]["query"] = "the dog"
    write_json(root / "own" / "shell" / "train.json", content)
    assert ("a", "the dog", 0) in asked(root, "own:shell|train")


@case(
    "labelme's imagePath after the photo and its JSON were renamed, with both photos there",
    "refused",
    "names the two names; one of them is to be corrected",
)
def renamed_beside_its_json(root: Path) -> None:
    folder = root / "own" / "lab" / "train"
    for name in ("0001", "0002"):
        photo(folder / f"{name}.jpg")
        write_json(folder / f"{name}.json", labelme(imagePath="0001.jpg"))
    code, out = checked(root)
    assert code == 1 and '"imagePath" says 0001.jpg, but 0002.jpg has the name of this JSON' in out


@case(
    "a second batch of JSONs in a folder inside a ReasonSeg split",
    "right",
    "the check says that it is not read and to move it up",
)
def a_folder_in_a_split(root: Path) -> None:
    folder = root / "reason_seg" / "Mine" / "train"
    for place in (folder, folder / "batch2"):
        photo(place / "a.jpg")
        write_json(place / "a.json", labelme("target", text=["which?"], is_sentence=True))
    assert "1 JSONs in a folder of their own are not read; move them up" in checked(root)[1]


@case(
    "one photo under several ids, each with a caption of its own (MDETR's files)",
    "right",
    "each caption is a query about the photo",
)
def captions_under_many_ids(root: Path) -> None:
    content = coco("a.jpg", "a.jpg")
    for image, caption in zip(content["images"], ("left car", "right car"), strict=True):
        image["caption"] = caption
    photo(root / "own" / "mdetr" / "a.jpg")
    write_json(root / "own" / "mdetr" / "train.json", content)
    assert sorted(query for _, query, _ in asked(root, "own:mdetr|train")) == [
        "left car",
        "right car",
    ]
