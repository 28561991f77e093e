"""Writes the published data sets in their official layouts, in miniature, with the masks that a
loader must find in them.

Every quirk of the real files has its place: crowd regions, empty and several segments, texts in
Windows-1252, palette label maps with 16-bit ones beside them, masks of one pixel, polygons of two
points, pickles of Python 2's protocols.

Masks are drawn as boxes of whole pixels, so that every encoding of them is exact.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Box = tuple[int, int, int, int]  # (x0, y0, x1, y1), the last column and row outside
Size = tuple[int, int]  # (H, W)

# COCO's numbers of the photos that are written.
TRAIN, VAL, TEST_A, TEST_B, TEST_G, CROWDED = 9, 25, 30, 34, 581857, 36
PHOTOS = (TRAIN, VAL, TEST_A, TEST_B, TEST_G, CROWDED)
EXCLUDED = {VAL, TEST_A, TEST_B, TEST_G}


@dataclass
class Expected:
    """One conversation that a loader must make. ``phrases``: how its question may call the target,
    the canonical way first."""

    phrases: tuple[str, ...]
    mask: np.ndarray
    """bool (H, W)."""
    ignore: np.ndarray | None = None
    host: np.ndarray | None = None


# name for --val_dataset -> id of a sample -> its conversations
Layout = dict[str, dict[str, list[Expected]]]


def size_of(number: int) -> Size:
    """Photos differ in size, and none is square."""
    return 20 + number % 7, 30 + number % 5


def drawn(size: Size, *boxes: Box) -> np.ndarray:
    """bool (H, W): the union of the boxes."""
    mask = np.zeros(size, dtype=bool)
    for x0, y0, x1, y1 in boxes:
        mask[y0:y1, x0:x1] = True
    return mask


def polygon(box: Box) -> list[int]:
    x0, y0, x1, y1 = box
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def runs(mask: np.ndarray) -> dict:
    """COCO's uncompressed run lengths: column by column, zeros first."""
    counts, value = [0], False
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}


def compressed(mask: np.ndarray) -> dict:
    """COCO's compressed run lengths: 5 bits in a character, from the fourth run on as the
    difference to the last but one."""
    counts, text = runs(mask)["counts"], ""
    for i, count in enumerate(counts):
        rest, more = count - (counts[i - 2] if i > 2 else 0), True
        while more:
            bits = rest & 0x1F
            rest >>= 5
            more = rest != (-1 if bits & 0x10 else 0)
            text += chr((bits | 0x20 if more else bits) + 48)
    return {"size": list(mask.shape), "counts": text}


def pickled(value: Any, protocol: int = 2) -> bytes:
    """As the makers of the referring data sets wrote them; protocol 2 was Python 2's best."""
    return pickle.dumps(value, protocol)


def write_json(path: Path, content: Any, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding=encoding)
    return path


def write_photo(path: Path, size: Size) -> Path:
    """A grey ramp."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.linspace(0, 255, size[1]).astype(np.uint8)
    Image.fromarray(np.broadcast_to(ramp, size).copy()).convert("RGB").save(path)
    return path


def write_coco_photos(root: Path) -> None:
    """The same photos in COCO's two releases, and one that no data set speaks of."""
    for number in (*PHOTOS, 999):
        write_photo(root / f"coco/train2017/{number:012d}.jpg", size_of(number))
        write_photo(
            root / f"refer_seg/images/mscoco/images/train2014/COCO_train2014_{number:012d}.jpg",
            size_of(number),
        )


# --------------------------------------------------------------------------------------- label maps


def write_label(path: Path, label: np.ndarray, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(label)
    if palette:
        picture = Image.fromarray(label.astype(np.uint8), "L")
        picture.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    picture.save(path)


def write_ade20k(root: Path) -> Layout:
    """Two photos; 0 is void, 3 is the sky, 13 a person of one pixel."""
    layout: Layout = {}
    for split, count in (("training", 2), ("validation", 1)):
        name = f"ade20k|{split}"
        layout[name] = {}
        for i in range(count):
            stem, size = f"ADE_{split[:-3] if split == 'training' else 'val'}_{i:08d}", (18, 25 + i)
            label = np.zeros(size, np.uint8)
            label[:6], label[10, 7] = 3, 13
            write_photo(root / f"ade20k/images/{split}/{stem}.jpg", size)
            write_label(root / f"ade20k/annotations/{split}/{stem}.png", label)
            void = label == 0
            layout[name][stem] = [
                Expected(("the sky",), label == 3, void),
                Expected(("the person",), label == 13, void),
            ]
    return layout


def write_cocostuff(root: Path) -> Layout:
    """Values are COCO's category ids minus 1. One photo shows only classes that are not asked
    for."""
    samples: dict[str, list[Expected]] = {}
    for number in PHOTOS:
        label = np.full(size_of(number), 255, np.uint8)
        label[:5], label[8:12, 3:9] = 170, 0  # the values of "wall-brick" and "person"
        label[12:15], label[15, 2] = 156, 17  # "sky", and one pixel of "dog"
        if number == CROWDED:
            label[:] = 255
            label[:5] = 170
        write_label(root / f"cocostuff/train2017/{number:012d}.png", label, palette=number == TRAIN)
        void = (label == 255) | (label == 170)
        names = {0: "person", 17: "dog", 156: "sky"}
        samples[f"{number:012d}"] = [
            Expected((f"the {n}",), label == v, void)
            for v, n in names.items()
            if (label == v).any()
        ]
    return {"cocostuff|train2017": samples}


def write_mapillary(root: Path) -> Layout:
    """Palette label maps, 16-bit instance maps beside them; the last class is not evaluated."""
    labels = [
        {
            "color": [165, 42, 42],
            "instances": True,
            "readable": "Bird",
            "name": "animal--bird",
            "evaluate": True,
        },
        {
            "color": [0, 192, 0],
            "instances": False,
            "readable": "Lane Marking - Crosswalk",
            "name": "m--c",
            "evaluate": True,
        },
        {
            "color": [0, 0, 0],
            "instances": False,
            "readable": "Unlabeled",
            "name": "void--unlabeled",
            "evaluate": False,
        },
    ]
    write_json(
        root / "mapillary/config_v2.0.json",
        {"version": "v2.0", "mapping": "public", "labels": labels},
    )
    samples = {}
    for stem in ("-0BzBKwCjHyQ", "zyx_12"):
        size = (22, 31)
        label = np.full(size, 2, np.uint8)
        label[3:9, 4:20], label[20, 30] = 1, 0
        write_photo(root / f"mapillary/training/images/{stem}.jpg", size)
        write_label(root / f"mapillary/training/v2.0/labels/{stem}.png", label, palette=True)
        write_label(
            root / f"mapillary/training/v2.0/instances/{stem}.png", label.astype(np.uint16) * 256
        )
        names = {0: "the bird", 1: "the lane marking - crosswalk"}
        samples[stem] = [
            Expected((name,), label == value, label == 2) for value, name in names.items()
        ]
    return {"mapillary|training": samples}


# -------------------------------------------------------------------------------------------- parts


def coco_image(number: int, file_name: str) -> dict:
    height, width = size_of(number)
    return {"id": number, "file_name": file_name, "height": height, "width": width}


def annotation(number: int, image: int, category: int, segmentation: Any, **more: Any) -> dict:
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "segmentation": segmentation,
        "area": 1,
        **more,
    }


def part(
    phrase: tuple[str, str],
    mask: np.ndarray,
    ignore: np.ndarray | None = None,
    host: np.ndarray | None = None,
) -> Expected:
    thing, name = phrase
    return Expected((f"the {name} of the {thing}", f"the {thing} {name}"), mask, ignore, host)


def write_paco(root: Path) -> Layout:
    """LVIS has no "iscrowd"; a file name begins with COCO's folder; the object of a part is an
    annotation of its own."""
    categories = [
        {"id": 207, "name": "car_(automobile)", "supercategory": "OBJECT"},
        {"id": 2000, "name": "car_(automobile):steeringwheel", "supercategory": "PART"},
        {"id": 2001, "name": "table:table_top", "supercategory": "PART"},
    ]
    images, annotations, samples = [], [], {}
    for number in (TRAIN, VAL):
        size, first = size_of(number), 10 * number
        body, wheels, top = (2, 2, 20, 15), [(4, 4, 7, 7), (10, 4, 13, 7)], (25, 3, 26, 4)
        images.append(coco_image(number, f"train2017/{number:012d}.jpg"))
        annotations += [
            annotation(first, number, 207, [polygon(body)], obj_ann_id=first),
            annotation(first + 1, number, 2000, [polygon(wheels[0])], obj_ann_id=first),
            annotation(first + 2, number, 2000, [polygon(wheels[1])], obj_ann_id=first),
            annotation(first + 3, number, 2001, runs(drawn(size, top)), obj_ann_id=first),
        ]
        host = drawn(size, body)
        samples[f"{number:012d}"] = [
            Expected(("the car",), host),
            part(("car", "steering wheel"), drawn(size, *wheels), host=host),
            part(("table", "table top"), drawn(size, top)),
        ]
    content = {
        "images": images,
        "annotations": annotations,
        "categories": categories,
        "attributes": [],
    }
    write_json(root / "vlpart/paco/annotations/paco_lvis_v1_train.json", content)
    return {"paco_lvis|train": samples}


def write_pascal_part(root: Path) -> Layout:
    """What VLPart's script makes of the MATLAB files: run lengths, annotation ids from 0, image ids
    without the underscore."""
    size, stem, plate, wheel = (24, 33), "2008_000002", (3, 4, 9, 6), (15, 10, 16, 11)
    write_photo(root / f"vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages/{stem}.jpg", size)
    categories = [
        {"id": 19, "name": "bus:license plate", "abbr": "bus:liplate"},
        {"id": 24, "name": "bus:wheel"},
    ]
    image = {"id": 2008000002, "file_name": f"{stem}.jpg", "height": size[0], "width": size[1]}
    annotations = [
        annotation(0, 2008000002, 24, compressed(drawn(size, wheel)), iscrowd=0),
        annotation(1, 2008000002, 19, compressed(drawn(size, plate)), iscrowd=0),
    ]
    content = {"images": [image], "annotations": annotations, "categories": categories}
    write_json(root / "vlpart/pascal_part/train.json", content)
    plates, wheels = (
        part(("bus", n), drawn(size, box))
        for n, box in (("license plate", plate), ("wheel", wheel))
    )
    return {"pascal_part|train": {stem: [plates, wheels]}}


def write_partimagenet(root: Path) -> Layout:
    """Category ids from 0, images in folders by synset that the file name leaves out, polygons of
    one and two points."""
    size, stem, boxes = (26, 34), "n01440764_10029", [(2, 3, 9, 12), (12, 3, 14, 5)]
    write_photo(root / f"vlpart/partimagenet/images/n01440764/{stem}.JPEG", size)
    categories = [
        {"id": 0, "name": "Quadruped Head"},
        {"id": 25, "name": "Car Tier"},
        {"id": 26, "name": "Car Side Mirror"},
    ]
    image = {"id": 0, "file_name": f"{stem}.JPEG", "height": size[0], "width": size[1]}
    annotations = [
        annotation(
            0, 0, 0, [polygon(boxes[0]), [5, 5, 8, 8], [1, 1], polygon(boxes[1])], iscrowd=0
        ),
        annotation(1, 0, 26, [[5, 5, 8, 8]], iscrowd=0),  # Two points enclose no pixel.
        annotation(2, 0, 25, runs(drawn(size, (20, 20, 25, 25))), iscrowd=0),
        annotation(3, 0, 25, runs(drawn(size, (24, 20, 30, 25))), iscrowd=1),
    ]
    content = {"images": [image], "annotations": annotations, "categories": categories}
    write_json(root / "vlpart/partimagenet/train.json", content)
    heads = part(("quadruped", "head"), drawn(size, *boxes))
    tires = part(("car", "tire"), drawn(size, (20, 20, 25, 25)), drawn(size, (25, 20, 30, 25)))
    return {"partimagenet|train": {stem: [heads, tires]}}


# ---------------------------------------------------------------------------------------- instances


def write_coco(root: Path) -> Layout:
    """The instances of COCO itself, for ``coco|train2017``: a crowd beside and over single dogs."""
    images, annotations, samples = [], [], {}
    for number in (TRAIN, VAL, CROWDED):
        size, dogs, crowd = size_of(number), [(2, 2, 8, 8), (10, 2, 12, 4)], (5, 5, 20, 12)
        images.append(coco_image(number, f"{number:012d}.jpg"))
        annotations += [
            annotation(10 * number, number, 18, [polygon(box) for box in dogs], iscrowd=0),
            annotation(10 * number + 1, number, 18, runs(drawn(size, crowd)), iscrowd=1),
        ]
        target = drawn(size, *dogs)
        samples[f"{number:012d}"] = [Expected(("the dog",), target, drawn(size, crowd) & ~target)]
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 18, "name": "dog", "supercategory": "animal"}],
    }
    write_json(root / "coco/annotations/instances_train2017.json", content)
    return {"coco|train2017": samples}


# ---------------------------------------------------------------------------------------- referring


def reference(
    number: int, image: int, ann_id: Any, split: str, *sentences: str, **more: Any
) -> dict:
    """One entry of a file of references; the file name of real ones ends with the number of the
    annotation."""
    spoken = [
        {"sent_id": 10 * number + i, "sent": text, "raw": text.upper(), "tokens": text.split()}
        for i, text in enumerate(sentences)
    ]
    return {
        "ref_id": number,
        "image_id": image,
        "ann_id": ann_id,
        "split": split,
        "category_id": 1,
        "file_name": f"COCO_train2014_{image:012d}_{number}.jpg",
        "sent_ids": [s["sent_id"] for s in spoken],
        "sentences": spoken,
    } | more


LEFT, RIGHT, FAR = (1, 2, 8, 12), (15, 3, 22, 14), (25, 1, 26, 2)


def referring_instances(root: Path, name: str) -> None:
    """Photo n has the annotations 10n: two polygons, + 1: run lengths, + 2: empty, + 3: one pixel,
    + 4: a crowd."""
    images, annotations = [], []
    for number in PHOTOS:
        size, first = size_of(number), 10 * number
        images.append(coco_image(number, f"COCO_train2014_{number:012d}.jpg"))
        annotations += [
            annotation(
                first, number, 1, [polygon((1, 2, 8, 7)), polygon((1, 7, 8, 12))], iscrowd=0
            ),
            annotation(first + 1, number, 1, runs(drawn(size, RIGHT)), iscrowd=0),
            annotation(first + 2, number, 1, [], iscrowd=0),
            annotation(first + 3, number, 1, [polygon(FAR)], iscrowd=0),
            annotation(first + 4, number, 1, runs(drawn(size, (0, 0, 30, 20))), iscrowd=1),
        ]
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "person"}],
    }
    write_json(root / f"refer_seg/{name}/instances.json", content)


def said(number: int, **sentences: tuple[Box, ...]) -> list[Expected]:
    return [
        Expected((text.replace("_", " "),), drawn(size_of(number), *boxes))
        for text, boxes in sentences.items()
    ]


def write_refcoco(
    root: Path, name: str = "refcoco", split_by: str = "unc", protocol: int = 2
) -> Layout:
    """Train, val, testA and testB, one photo each; the training photo also has an empty segment,
    one pixel, an empty sentence."""
    referring_instances(root, name)
    references = [
        reference(0, TRAIN, 10 * TRAIN, "train", "Left man", "guy in red", " "),
        reference(1, TRAIN, 10 * TRAIN + 1, "train", "right man"),
        reference(2, TRAIN, 10 * TRAIN + 2, "train", "ghost"),
        reference(3, TRAIN, 10 * TRAIN + 3, "train", "far away"),
        reference(4, VAL, 10 * VAL, "val", "left man"),
        reference(5, TEST_A, 10 * TEST_A + 1, "testA", "right man", "he"),
        reference(6, TEST_B, 10 * TEST_B + 3, "testB", "dot"),
    ]
    (root / f"refer_seg/{name}/refs({split_by}).p").write_bytes(pickled(references, protocol))
    train = said(
        TRAIN, left_man=(LEFT,), guy_in_red=(LEFT,), right_man=(RIGHT,), ghost=(), far_away=(FAR,)
    )
    both = {
        "testA": (TEST_A, {"right_man": (RIGHT,), "he": (RIGHT,)}),
        "testB": (TEST_B, {"dot": (FAR,)}),
    }
    layout = {f"{name}|{split_by}|train": {photo(TRAIN): train}}
    layout[f"{name}|{split_by}|val"] = {photo(VAL): said(VAL, left_man=(LEFT,))}
    for split, (number, sentences) in both.items():
        layout[f"{name}|{split_by}|{split}"] = {photo(number): said(number, **sentences)}
    return layout


def photo(number: int) -> str:
    return f"COCO_train2014_{number:012d}"


def write_refcocog(root: Path) -> Layout:
    """Divided by image (umd) and by object (google, where train and val share a photo); test exists
    in umd only."""
    referring_instances(root, "refcocog")
    folder = root / "refer_seg/refcocog"
    sentence = "the man in the yellow coat, to the left of the dog."
    umd = [
        reference(0, TRAIN, 10 * TRAIN, "train", sentence),
        reference(1, VAL, 10 * VAL, "val", sentence),
        reference(2, TEST_G, 10 * TEST_G + 1, "test", sentence),
    ]
    google = [
        reference(0, TRAIN, 10 * TRAIN, "train", sentence),
        reference(1, TRAIN, 10 * TRAIN + 1, "val", sentence),
    ]
    (folder / "refs(umd).p").write_bytes(pickled(umd, 2))
    (folder / "refs(google).p").write_bytes(pickled(google, 0))

    def one(number: int, box: Box) -> dict[str, list[Expected]]:
        return {photo(number): [Expected((sentence,), drawn(size_of(number), box))]}

    layout = {
        "refcocog|umd|train": one(TRAIN, LEFT),
        "refcocog|umd|val": one(VAL, LEFT),
        "refcocog|umd|test": one(TEST_G, RIGHT),
    }
    return layout | {
        "refcocog|google|train": one(TRAIN, LEFT),
        "refcocog|google|val": one(TRAIN, RIGHT),
    }


def write_refclef(root: Path) -> Layout:
    """Photos of SAIAPR TC-12, lists of compressed run lengths, test splits written into one
    word."""
    size, folder = (21, 32), root / "refer_seg/refclef"
    images, annotations = [], []
    for number in (19, 25, 112):
        write_photo(root / f"refer_seg/images/saiapr_tc-12/{number}.jpg", size)
        images.append(
            {"id": number, "file_name": f"{number}.jpg", "height": size[0], "width": size[1]}
        )
        parts = [compressed(drawn(size, LEFT)), compressed(drawn(size, RIGHT))]
        annotations.append(
            annotation(10 * number, number, 7, parts, mask_name=f"{number}_1.mat", iscrowd=0)
        )
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 7, "name": "cloud"}],
    }
    write_json(folder / "instances.json", content)
    splits = {19: "train", 25: "val", 112: "testAC"}
    references = [
        reference(i, n, 10 * n, split, "clouds over the hill")
        for i, (n, split) in enumerate(splits.items())
    ]
    (folder / "refs(unc).p").write_bytes(pickled(references, 2))
    one = [Expected(("clouds over the hill",), drawn(size, LEFT, RIGHT))]
    layout = {"refclef|unc|train": {"19": one}, "refclef|unc|val": {"25": one}}
    return layout | {f"refclef|unc|{split}": {"112": one} for split in ("testA", "testC", "test")}


def write_grefcoco(root: Path) -> Layout:
    """JSON; one object, several, none, and a crowd region among them."""
    referring_instances(root, "grefcoco")
    first = 10 * TRAIN
    references = [
        reference(
            0, TRAIN, [first, first + 1], "train", "both men", category_id=[1, 1], no_target=False
        ),
        reference(1, TRAIN, [-1], "train", "the elephant", category_id=[-1], no_target=True),
        reference(2, TRAIN, [first + 3], "train", "the dot", category_id=[1], no_target=False),
        reference(
            3,
            TRAIN,
            [first, first + 4],
            "train",
            "man and crowd",
            category_id=[1, 1],
            no_target=False,
        ),
        reference(4, VAL, [-1], "val", "a zebra", category_id=[-1], no_target=True),
        reference(
            5, VAL, [10 * VAL, 10 * VAL + 1], "val", "everyone", category_id=[1, 1], no_target=False
        ),
    ]
    write_json(root / "refer_seg/grefcoco/grefs(unc).json", references)
    train = said(
        TRAIN, both_men=(LEFT, RIGHT), the_elephant=(), the_dot=(FAR,), man_and_crowd=(LEFT,)
    )
    val = said(VAL, a_zebra=(), everyone=(LEFT, RIGHT))
    return {"grefcoco|unc|train": {photo(TRAIN): train}, "grefcoco|unc|val": {photo(VAL): val}}


# -------------------------------------------------------------------------------- reasoning and VQA


def write_llm_seg40k(root: Path) -> Layout:
    """Photos of COCO and of EgoObjects in one file, several questions each; one has two wordings,
    one photo no question."""
    layout: Layout = {}
    for file, split, number in (
        ("train", "train", TRAIN),
        ("validation", "val", VAL),
        ("test", "test", TEST_A),
    ):
        size, ego = size_of(number), f"{number:064X}.jpg"
        write_photo(root / "ego_objects/images" / ego, (19, 27))
        pairs = [
            {
                "question": "Where would one sit?",
                "answer": "The chair.",
                "rle_seg": compressed(drawn(size, LEFT)),
            },
            {
                "question": ["What shines?", "What gives light?"],
                "answer": "The lamp.",
                "rle_seg": compressed(drawn(size, FAR)),
            },
        ]
        other = [
            {
                "question": "What holds tea?",
                "answer": "The cup.",
                "rle_seg": compressed(drawn((19, 27), RIGHT)),
            }
        ]
        content = {
            f"{number:012d}.jpg": {"from_dataset": "coco", "qa_pairs": pairs},
            ego: {"from_dataset": "ego_objects", "qa_pairs": other},
            "nothing.jpg": {"from_dataset": "coco", "qa_pairs": []},
        }
        write_json(root / f"reason_seg/LLM-Seg40K/{file}.json", content)
        layout[f"LLM-Seg40K|{split}"] = {
            f"{number:012d}": [
                Expected(("Where would one sit?",), drawn(size, LEFT)),
                Expected(("What shines?", "What gives light?"), drawn(size, FAR)),
            ],
            ego[:-4]: [Expected(("What holds tea?",), drawn((19, 27), RIGHT))],
        }
    return layout


def write_reason_seg(root: Path) -> Layout:
    """labelme files in Windows-1252, an ignored region, a flag, long and short queries, and the
    explanations beside them."""
    layout: Layout = {}
    for split in ("train", "val", "test"):
        folder, size = root / "reason_seg/ReasonSeg" / split, (23, 35)
        target, ignore = drawn(size, (3, 3, 11, 9)), drawn(size, (20, 3, 24, 9))
        names = {"long": "the naïve visitor’s café table, where is it?", "short": "café table"}
        for stem, text in names.items():
            write_photo(folder / f"{stem}_o.jpg", size)
            record = {
                "text": [text, "another wording?"],
                "is_sentence": stem == "long",
                "shapes": [
                    labelme("target", (3, 3, 11, 9)),
                    labelme("ignore", (20, 3, 24, 9)),
                    labelme("flag", (0, 0, 35, 23)),
                ],
            }
            write_json(folder / f"{stem}_o.json", record, encoding="cp1252")
        wordings = {f"{stem}_o": (text, "another wording?") for stem, text in names.items()}
        layout[f"ReasonSeg|{split}"] = {
            stem: [Expected(texts, target, ignore)] for stem, texts in wordings.items()
        }
        for length in ("long", "short"):
            only = {f"{length}_o": layout[f"ReasonSeg|{split}"][f"{length}_o"]}
            layout[f"ReasonSeg|{split}{length}"] = only
    entry = {
        "query": "q",
        "outputs": 'It is "the" table, as it stands there.',
        "image": "long_o.jpg",
        "json": "long_o.json",
    }
    write_json(root / "reason_seg/ReasonSeg/explanatory/train.json", [entry])
    return layout


def labelme(label: str, box: Box) -> dict:
    """A shape whose outline counts: its last column and row are one before those of the box."""
    x0, y0, x1, y1 = box
    points = [[x0, y0], [x1 - 1, y0], [x1 - 1, y1 - 1], [x0, y1 - 1]]
    return {
        "label": label,
        "labels": [label],
        "shape_type": "polygon",
        "image_name": "x.jpg",
        "points": points,
        "flags": {},
    }


def write_llava(root: Path) -> None:
    """Three conversations about photos of COCO, two of them about ones that are validated on."""
    spoken = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A dog."},
    ]
    entries = [
        {"id": f"{n:012d}", "image": f"{n:012d}.jpg", "conversations": spoken}
        for n in (TRAIN, VAL, TEST_G)
    ]
    write_json(root / "llava_dataset/llava_instruct_150k.json", entries)


def write_everything(root: Path) -> Layout:
    """All of them under one --dataset_dir."""
    write_coco_photos(root)
    write_llava(root)
    layout = write_refcoco(root) | write_refcoco(root, "refcoco+", protocol=0)
    for write in (
        write_ade20k,
        write_cocostuff,
        write_mapillary,
        write_paco,
        write_pascal_part,
        write_partimagenet,
        write_coco,
        write_refcocog,
        write_refclef,
        write_grefcoco,
        write_llm_seg40k,
        write_reason_seg,
    ):
        layout |= write(root)
    return layout
