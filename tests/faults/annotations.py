"""Drawn shapes, masks and pictures."""

from __future__ import annotations

import base64
import io
import json
import os
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import numpy as np
from PIL import Image, ImageDraw

from cores.dataset import check
from cores.dataset.mixture import TrainMixture
from cores.dataset.registry import open_evaluation
from cores.dataset.sample import LoaderOptions
from tests.dataset_toys import LEVELS, write_json
from tests.faults.case import case

HEIGHT, WIDTH = 64, 96
BOX = [[10, 12], [40, 12], [40, 44], [10, 44]]
PIXELS = 30 * 32  # of BOX, as COCO counts; labelme's outline belongs to it, which makes 31 × 33
OUTLINED = 31 * 33
FLAT = [value for point in BOX for value in point]
EXIF_TURN = 6  # a quarter turn


def photo(path: Path, size: tuple[int, int] = (HEIGHT, WIDTH), orientation: int = 1) -> Path:
    """A dark picture of ``size`` (H, W) with a red box at BOX, as stored; EXIF may turn it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", size[::-1], (40, 60, 80))
    ImageDraw.Draw(picture).rectangle((*BOX[0], *BOX[2]), fill=(200, 30, 30))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(path, exif=exif)
    return path


def shape(points: list, kind: str | None = "polygon", label: str = "car", **more) -> dict:
    return {"label": label, "points": points, "shape_type": kind, "flags": {}} | more


def labelme(path: Path, *shapes: dict, **fields) -> None:
    """A JSON as labelme writes it and, unless it is there, its photo."""
    image = path.with_suffix(".jpg")
    if not image.exists():
        photo(image)
    whole = {"imagePath": image.name, "imageData": None, "shapes": list(shapes)}
    write_json(path, whole | {"imageHeight": HEIGHT, "imageWidth": WIDTH} | fields)


def coco(file: Path, images: Path, *segmentations, name: str = "car", **fields) -> None:
    """A COCO file with one photo; one annotation of the same category for each segmentation."""
    photo(images / "a.jpg", orientation=fields.pop("orientation", 1))
    entries = [
        {"id": number, "image_id": 1, "category_id": 1, "bbox": [10, 12, 30, 32], "iscrowd": 0}
        | ({} if part is ... else {"segmentation": part})
        for number, part in enumerate(segmentations, 1)
    ]
    image = {"id": 1, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH} | fields
    categories = [{"id": 1, "name": name}]
    write_json(file, {"images": [image], "annotations": entries, "categories": categories})


def table(root: Path, *rows: dict) -> Path:
    """own/seg with the photos that its rows name."""
    folder = root / "own" / "seg"
    for row in rows:
        photo(folder / "images" / row["image"])
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def looked_at(root: Path) -> tuple[str, dict[str, str]]:
    """(what ``dataset.check --all`` says of the data in ``root``, its bad items and the reasons)"""
    listed, said = root / "bad.jsonl", io.StringIO()
    with redirect_stdout(said):
        check.main(["--dataset_dir", str(root), "--all", "--fix-list", str(listed)])
    items = [json.loads(line) for line in listed.read_text().splitlines()]
    return said.getvalue(), {item["item"]: item["reason"] for item in items}


def asked(root: Path, name: str) -> dict[str, list[int]]:
    """Question -> pixels of its targets, of the photos of a data set without faults."""
    loader = open_evaluation(root, name, LoaderOptions(LEVELS, training=False))
    rng = np.random.default_rng(0)
    samples = [loader.sample(index, rng) for index in range(len(loader))]
    return {
        conversation.turns[0][0]: conversation.masks.sum((1, 2)).tolist()
        for sample in samples
        for conversation in sample.conversations
    }


def pixels(root: Path, name: str) -> list[int]:
    """The pixels of all targets, in the order of the photos."""
    return [count for counts in asked(root, name).values() for count in counts]


def trains_without_faults(root: Path, name: str, steps: int = 12) -> None:
    """Every sample of a training that leaves out the list of ``looked_at``."""
    mixture = TrainMixture(
        root, "own", [1], LEVELS, steps, own_data=name, skip_list=root / "bad.jsonl"
    )
    assert all(mixture[index].conversations for index in range(steps))


@case(
    "labelme: a point and a line of labels of their own beside polygons",
    "right",
    "the polygons are asked, the others are listed by the check as not asked",
)
def labelme_points_beside_polygons(root: Path) -> None:
    point, line = shape([[60, 30]], "point", "light"), shape([[1, 2], [9, 9]], "line", "crack")
    labelme(root / "own/mix/train/a.json", shape(BOX), point, line)
    said, bad = looked_at(root)
    assert not bad and "'light': 'point' has no area and is not asked" in said and "'crack'" in said
    assert pixels(root, "own:mix|train") == [OUTLINED]


@case(
    "labelme: a point or an unfinished polygon of the same label as a polygon, other labels beside",
    "right",
    "the query of that label is listed and left out, the file's other queries stay",
)
def labelme_part_of_a_target(root: Path) -> None:
    for name, extra in (("a", shape([[60, 30]], "point")), ("b", shape([[60, 30], [70, 30]]))):
        labelme(root / f"own/mix/train/{name}.json", shape(BOX), extra, shape(BOX, label="bus"))
    _, bad = looked_at(root)
    assert list(bad) == [f"own/mix/train/{name}.json:label car" for name in "ab"]
    assert "has no area" in bad["own/mix/train/a.json:label car"]
    trains_without_faults(root, "mix")


@case(
    "rectangle, circle, mask, rotated and four-point rectangle in a JSON of ReasonSeg's layout",
    "right",
    "each has the pixels that it has in own/",
)
def every_shape_in_every_layout(root: Path) -> None:
    stream = io.BytesIO()
    Image.new("1", (31, 33), 1).save(stream, "PNG")
    png = base64.b64encode(stream.getvalue()).decode()
    shapes = {
        "circle": shape([[25, 28], [25, 44]], "circle"),
        "four": shape(BOX, "rectangle"),
        "mask": shape([BOX[0], BOX[2]], "mask", mask=png),
        "rectangle": shape([BOX[2], BOX[0]], "rectangle"),
        "rotation": shape(BOX, "rotation", direction=0.0),
    }
    for name, one in shapes.items():
        labelme(root / f"own/mine/train/{name}.json", one)
        labelme(root / f"own/texts/train/{name}.json", one, text=f"the {name}.")
        labelme(root / f"reason_seg/Mine/train/{name}.json", one, text=[f"the {name}."])
    assert not looked_at(root)[1]
    counts = pixels(root, "Mine|train")
    assert counts[1:] == [OUTLINED] * 4 and abs(counts[0] - np.pi * 16.5**2) < 20
    assert pixels(root, "own:texts|train") == counts
    mine = open_evaluation(root, "own:mine|train", LoaderOptions(LEVELS, training=False))
    rng = np.random.default_rng(0)
    own = [int(mine.sample(index, rng).conversations[0].masks.sum()) for index in range(5)]
    assert own == counts


@case(
    "a point, or a kind of shape that nobody knows, in a JSON of ReasonSeg's layout",
    "refused",
    "the JSON is named with the shape and what to draw; the others stay",
)
def unknown_shapes(root: Path) -> None:
    folder = root / "reason_seg/Mine/train"
    labelme(folder / "a.json", shape(BOX), shape([[3, 4]], "point"), text="one")
    labelme(folder / "b.json", shape(BOX, "superellipse"), text="two")
    labelme(folder / "c.json", shape(BOX), shape([[3, 4]], "point", "flag"), text="three")
    said, bad = looked_at(root)
    assert [Path(item).name for item in bad] == ["a.json", "b.json"] and "1 targets" in said
    assert "'point' has no area; draw a polygon" in bad["reason_seg/Mine/train/a.json"]
    assert "'superellipse' is not known" in bad["reason_seg/Mine/train/b.json"]


@case(
    "photo turned by EXIF, annotated as stored: coco/, own/ (COCO, labelme, table), ReasonSeg",
    "right",
    "not turned in any of them, as its annotations' sizes say",
)
def lying_photos(root: Path) -> None:
    turned = {"orientation": EXIF_TURN}
    coco(root / "coco/annotations/instances_phone.json", root / "coco/phone", [FLAT], **turned)
    coco(root / "own/phone/train.json", root / "own/phone/images", [FLAT], **turned)
    for folder in ("own/lm/train", "reason_seg/Mine/train"):
        photo(root / folder / "a.jpg", orientation=EXIF_TURN)
        labelme(root / folder / "a.json", shape(BOX), **({"text": "q"} if "seg" in folder else {}))
    folder = table(root, {"image": "a.jpg", "query": "q", "mask": "a.png"})
    photo(folder / "images/a.jpg", orientation=EXIF_TURN)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[12:45, 10:41] = 1
    (folder / "masks").mkdir()
    Image.fromarray(mask).save(folder / "masks/a.png")
    assert not looked_at(root)[1]
    for name in ("coco|phone", "own:phone|train", "own:lm|train", "Mine|train", "own:seg|train"):
        loader = open_evaluation(root, name, LoaderOptions(LEVELS, training=False))
        sample = loader.sample(0, np.random.default_rng(0))
        assert sample.image.shape[:2] == (HEIGHT, WIDTH), name
        assert sample.image[sample.conversations[0].masks[0]][:, 0].mean() > 150, name


@case(
    "photo made smaller after it was annotated, the JSON keeps the old size (own/ and ReasonSeg)",
    "refused",
    "names both sizes and asks whether the photo was resized or turned",
)
def resized_photos(root: Path) -> None:
    old = {"imageHeight": 10 * HEIGHT, "imageWidth": 10 * WIDTH}
    labelme(root / "own/lm/train/a.json", shape(BOX), shape(BOX, label="bus"), **old)
    labelme(root / "reason_seg/Mine/train/a.json", shape(BOX), text="q", **old)
    _, bad = looked_at(root)
    assert set(bad) == {"own/lm/train/a.json", "reason_seg/Mine/train/a.json"}
    for reason in bad.values():
        assert "is 640×960" in reason and "64×96; was the photo resized" in reason


@case(
    "sizes as floats and as texts: COCO, coco/, labelme, run lengths",
    "right",
    "read as the whole numbers that they are",
)
def sizes_as_texts(root: Path) -> None:
    odd = {"height": f"{HEIGHT}", "width": float(WIDTH)}
    coco(root / "own/c/train.json", root / "own/c/images", [FLAT], **odd)
    coco(root / "coco/annotations/instances_mine.json", root / "coco/mine", [FLAT], **odd)
    runs = {"size": [f"{HEIGHT}", float(WIDTH)], "counts": [5, 7, HEIGHT * WIDTH - 12]}
    table(root, {"image": "a.jpg", "query": "q", "rle": runs})
    labelme(root / "reason_seg/Mine/train/a.json", shape(BOX), text="q", imageHeight="64.0")
    assert not looked_at(root)[1]
    assert pixels(root, "coco|mine") == pixels(root, "own:c|train") == [PIXELS]
    assert pixels(root, "own:seg|train") == [7] and pixels(root, "Mine|train") == [OUTLINED]


@case(
    "COCO files of detectors and of keypoints: no segmentation, null, [[]], [] with a box",
    "refused",
    "one message, the same in own/ and coco/, that names boxes_to_masks",
)
def boxes_only(root: Path) -> None:
    for name, segmentation in (("a", ...), ("b", None), ("c", [[]]), ("d", [])):
        coco(root / f"own/{name}/train.json", root / f"own/{name}/images", segmentation)
        file = root / f"coco/annotations/instances_{name}.json"
        coco(file, root / "coco" / name, segmentation)
    said, bad = looked_at(root)
    assert said.count("python -m utils.boxes_to_masks") == 8 and len(bad) == 5


@case(
    "own COCO: one of two cars in a photo has an unfinished polygon",
    "right",
    "the photo's query 'the car' is left out with it, others stay; none has half its target",
)
def half_a_target(root: Path) -> None:
    file = root / "own/deg/train.json"
    coco(file, root / "own/deg/images", [FLAT], [FLAT, [60, 55, 61, 55]], [FLAT])
    content = json.loads(file.read_text())
    content["annotations"][2]["category_id"] = 2
    write_json(file, content | {"categories": [{"id": 1, "name": "car"}, {"id": 2, "name": "bus"}]})
    said, bad = looked_at(root)
    assert list(bad) == ["own/deg/train.json:annotation 2"] and "1 queries, 1 targets" in said
    trains_without_faults(root, "deg")


@case(
    "table: one of two rows of the same query and photo is broken",
    "right",
    "the query is left out, in the check and in the training with its list",
)
def half_a_target_in_a_table(root: Path) -> None:
    rows = [{"image": "a.jpg", "query": "every car", "polygons": part} for part in (BOX, [1, 2])]
    table(root, *rows, {"image": "a.jpg", "query": "the box", "polygons": BOX})
    said, bad = looked_at(root)
    assert list(bad) == ["own/seg/train.jsonl:2"] and "1 queries, 1 targets" in said
    trains_without_faults(root, "seg")


@case(
    "mask PNGs as people save them: RGB, RGBA, LA, palette, 1 bit, red on black, white on nothing",
    "right",
    "read as the mask that they show",
)
def mask_files(root: Path) -> None:
    box = np.zeros((HEIGHT, WIDTH), bool)
    box[12:44, 10:40] = True
    grey = Image.fromarray(box.astype(np.uint8) * 255)
    red = Image.merge("RGB", (grey, Image.new("L", grey.size), Image.new("L", grey.size)))
    nothing = Image.new("LA", grey.size, 255)
    nothing.putalpha(grey)
    files = {mode: grey.convert(mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")}
    files |= {"red": red, "nothing": nothing}
    folder = table(root, *({"image": f"{n}.jpg", "query": n, "mask": f"{n}.PNG"} for n in files))
    (folder / "masks").mkdir()
    for name, picture in files.items():
        picture.save(folder / "masks" / f"{name}.PNG")
    assert not looked_at(root)[1] and pixels(root, "own:seg|train") == [PIXELS] * len(files)


@case(
    "masks with soft edges, with VOC's border 255, of the photo's former size",
    "refused",
    "each says what it holds and what to do",
)
def mask_files_of_doubt(root: Path) -> None:
    names = ("soft", "voc", "large")
    folder = table(root, *({"image": "a.jpg", "query": n, "mask": f"{n}.png"} for n in names))
    (folder / "masks").mkdir()
    values = np.zeros((HEIGHT, WIDTH), np.uint8)
    values[12:44, 10:40] = 1
    voc = Image.fromarray(values)
    voc.paste(255, (10, 12, 12, 44))
    small = Image.fromarray(values * 255)
    masks = (small.resize((50, 30)).resize((WIDTH, HEIGHT)), voc, small.resize((192, 128)))
    for name, picture in zip(names, masks, strict=True):
        picture.save(folder / f"masks/{name}.png")
    _, bad = looked_at(root)
    soft, voc_said, large = bad.values()
    assert "threshold it" in soft and "the border that VOC does not count" in voc_said
    assert "the mask is 128×192" in large and "resized" in large


@case(
    "table: two of three queries about one photo have bad masks",
    "right",
    "the check lists both, and a training that leaves out its list meets none",
)
def two_bad_rows_of_one_photo(root: Path) -> None:
    far = [[500, 500], [600, 500], [600, 600]]
    shapes = (far, BOX, [[-90, -90], [-50, -90], [-50, -50]])
    rows = [{"image": "a.jpg", "query": f"q{n}", "polygons": s} for n, s in enumerate(shapes)]
    table(root, *rows)
    _, bad = looked_at(root)
    assert list(bad) == ["own/seg/train.jsonl:1", "own/seg/train.jsonl:3"]
    trains_without_faults(root, "seg")


@case(
    "pictures whose values have no known range: 32-bit, float, 12 bits in 16, infrared as 4th band",
    "refused",
    "one line with the reason instead of a black or pale picture",
)
def pictures_of_doubt(root: Path) -> None:
    grey = (np.arange(HEIGHT * WIDTH) % 256).reshape(HEIGHT, WIDTH)
    deep = Image.fromarray((grey * 16).astype(np.uint16))
    bands = [Image.fromarray(b.astype(np.uint8)) for b in (grey, grey, grey, grey // 2 + 50)]
    pictures = {
        "32-bit": ("int32.tif", Image.fromarray(grey.astype(np.int32))),
        "floating-point": ("float.tif", Image.fromarray(grey.astype(np.float32))),
        "12-bit camera": ("deep.png", deep),
        "end below 4096": ("deep.tif", deep),
        "infrared": ("nir.tif", Image.merge("RGBA", bands)),
    }
    folder = table(root, *({"image": n, "query": "q", "polygons": BOX} for n in ("a.jpg", "b.jpg")))
    rows = [{"image": name, "query": "q", "polygons": BOX} for name, _ in pictures.values()]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, picture in pictures.values():
        picture.save(folder / "images" / name)
    _, bad = looked_at(root)
    assert len(bad) == len(pictures)
    for reason, (name, _) in pictures.items():
        assert reason in bad[f"own/seg/images/{name}"]


@case(
    "a PostScript program, and pictures of forty rare formats, called .jpg",
    "refused",
    "decoded as JPEG, PNG, WebP, BMP, TIFF, GIF or AVIF or not at all; nothing is run",
)
def pictures_that_are_none(root: Path) -> None:
    ran = root / "ran"
    gs = root / "bin" / "gs"
    gs.parent.mkdir()
    gs.write_text(f"#!/bin/sh\ntouch {ran}\n")
    gs.chmod(0o755)
    rows = [{"image": f"{n}.jpg", "query": "q", "polygons": BOX} for n in ("EPS", "PPM", "TGA")]
    folder = table(root, *rows)
    for row in rows:
        path = folder / "images" / row["image"]
        Image.open(path).convert("RGB").save(path, path.stem)
    with patch.dict(os.environ, PATH=f"{gs.parent}{os.pathsep}{os.environ['PATH']}"):
        _, bad = looked_at(root)
    assert len(bad) == 3 and not ran.exists()
    assert all("unknown format, none of JPEG, PNG" in reason for reason in bad.values())


@case(
    "COCO polygon with a hole drawn as a second ring",
    "right",
    "the union of both rings, as pycocotools has it",
)
def polygon_with_a_hole(root: Path) -> None:
    ring = [20, 20, 30, 20, 30, 30, 20, 30]
    coco(root / "own/hole/train.json", root / "own/hole/images", [FLAT, ring])
    assert not looked_at(root)[1] and pixels(root, "own:hole|train") == [PIXELS]


@case(
    "labelme: the photo is only inside the JSON (imageData)",
    "refused",
    "says that the JSON holds it and what writes it to a file, in own/ and ReasonSeg's layout",
)
def photo_inside_the_json(root: Path) -> None:
    raw = photo(root / "raw.jpg").read_bytes()
    for path in (root / "own/lm/train/a.json", root / "reason_seg/Mine/train/a.json"):
        labelme(path, shape(BOX), text="q", imageData=base64.b64encode(raw).decode())
        path.with_suffix(".jpg").unlink()
    _, bad = looked_at(root)
    assert len(bad) == 2 and all('"imageData" in the JSON holds it' in why for why in bad.values())


@case(
    "spellings of polygons: [[[x, y]]], {x, y} objects, texts, one flat list; own/ and coco/",
    "right",
    "all read as the same polygon",
)
def polygon_spellings(root: Path) -> None:
    spellings = ([BOX], [FLAT], FLAT, [{"x": x, "y": y} for x, y in BOX], [list(map(str, FLAT))])
    for number, polygon in enumerate(spellings):
        coco(root / f"own/s{number}/train.json", root / f"own/s{number}/images", polygon)
        coco(root / f"coco/annotations/instances_s{number}.json", root / f"coco/s{number}", polygon)
        assert pixels(root, f"own:s{number}|train") == [PIXELS]
        assert pixels(root, f"coco|s{number}") == [PIXELS]


@case(
    "polygons in 0 to 1 (YOLO), or outside the photo: table, labelme, ReasonSeg, own COCO, coco/",
    "refused",
    "never an empty target: says that the numbers are shares, or that the shape lies outside",
)
def polygons_in_another_frame(root: Path) -> None:
    shares = [[x / WIDTH, y / HEIGHT] for x, y in BOX]
    far = [[x * 20, y * 20] for x, y in BOX]
    half = [[x + 70, y] for x, y in BOX]  # 16 of 30 columns are inside
    most = [[x + 75, y] for x, y in BOX]  # 11 of 30
    frames = {"shares": shares, "far": far, "most": most, "half": half}
    for name, points in frames.items():
        flat = [[value for point in points for value in point]]
        unsized = {"imageHeight": None, "imageWidth": None}
        labelme(root / f"own/lm/train/{name}.json", shape(points), **unsized)
        labelme(root / f"reason_seg/Mine/train/{name}.json", shape(points), text=name, **unsized)
        coco(root / f"own/{name}/train.json", root / f"own/{name}/images", flat)
        coco(root / f"coco/annotations/instances_{name}.json", root / f"coco/{name}", flat)
    rows = [{"image": f"{n}.jpg", "query": n, "polygons": p} for n, p in frames.items()]
    table(root, *rows, {"image": "none.jpg", "query": "none", "polygons": []})
    said, bad = looked_at(root)
    assert len(bad) == 5 * 3 and "(1 empty)" in said and "half" not in "".join(bad)
    for item, reason in bad.items():
        shares_said = "lie between 0 and 1" in reason
        assert shares_said or "outside its image of 64×96" in reason, item
    assert sum("lie between 0 and 1" in reason for reason in bad.values()) == 5


@case(
    "COCO train2017: a category whose only polygon has no area (annotation 918)",
    "right",
    "not asked, and listed by the check; the photo's other categories are asked",
)
def category_without_a_pixel(root: Path) -> None:
    line = [50, 50, 50, 50, 51, 50, 51, 50]
    file = root / "coco/annotations/instances_train2017.json"
    coco(file, root / "coco/train2017", [line], [FLAT], name="hot dog")
    content = json.loads(file.read_text())
    content["annotations"][1]["category_id"] = 2
    categories = [{"id": 1, "name": "hot dog"}, {"id": 2, "name": "chair"}]
    write_json(file, content | {"categories": categories})
    said, bad = looked_at(root)
    assert not bad and "'the hot dog' covers no pixel and is not asked" in said
    (question,) = asked(root, "coco|train2017")
    assert "chair" in question
