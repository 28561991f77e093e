"""SynthReason: a procedural benchmark for reasoning segmentation that fits a machine without a GPU.

Every scene holds four objects of one family. All objects of a family own the same kinds of parts,
and two of these kinds look alike (eye / nose, wheel / knob, wing / blade): the look of a part never
tells which one is meant, only the host does. Grey bars and dark discs that belong to nothing lie
between the objects. A query names a part ("the wheels of the red bus") or describes what it is for
("what does the animal that barks use to smell?"); its target is the union of the host's parts of
that name.

Training and validation share neither a wording nor a combination: validation uses other sentence
frames, and only combinations (category, part, purpose) or (colour, category, part) that training
never uses.

Written to disk in two layouts that real data have, too::

    OUT/reason_seg/SynthReason/{train,val}/000000.jpg     ReasonSeg: a picture …
    OUT/reason_seg/SynthReason/{train,val}/000000_0.json  … and one JSON per query
    OUT/synth_sem/images/{train,val}/000000.jpg
    OUT/synth_sem/annotations/{train,val}/000000.png      label maps of whole objects, 0 = void
    OUT/synth_sem/classes.json                            class i has value i + 1

Run ``python -m dataset.synthetic --out data/synthreason`` (about half a minute). The same seed
gives the same files.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from cores.dataset import command
from cores.dataset.files.rle import encode_rle
from cores.dataset.files.write import all_or_nothing
from cores.dataset.numbers import in_range
from cores.dataset.synthetic.queries import PartQuery, make_query
from cores.dataset.synthetic.scenes import SIZE, SyntheticScene, make_scene
from cores.dataset.synthetic.vocabulary import CATEGORIES

VERSION = 1  # raise it whenever the same seed would give other files
SEMANTIC_SPLITS = ("train", "val")


def polygons(mask: np.ndarray) -> list[list[list[int]]]:
    """Outer contours of bool (S, S) as point lists [[x, y], …], for readers that know only
    ReasonSeg's polygons."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return [contour[:, 0].tolist() for contour in contours]


def query_record(scene: SyntheticScene, query: PartQuery, image_name: str) -> dict:
    """One JSON of ReasonSeg. The RLE keys hold the exact masks; the trivial baselines read
    "scene"."""
    host = scene.objects[query.object_index]
    target = host.union(query.part)
    return {
        "image": image_name,
        "text": query.texts,
        "is_sentence": query.is_sentence,
        "shapes": [{"label": "target", "points": points} for points in polygons(target)],
        "target_rle": encode_rle(target),
        "host_rle": encode_rle(host.mask),
        "target": {"object": query.object_index, "part": query.part},
        "scene": {
            "objects": [
                {
                    "category": obj.category,
                    "colour": obj.colour,
                    "rle": encode_rle(obj.mask),
                    "parts": [
                        {"name": part.name, "rle": encode_rle(part.mask)} for part in obj.parts
                    ],
                }
                for obj in scene.objects
            ]
        },
    }


def scene_rng(seed: int, split: str, index: int) -> np.random.Generator:
    """The generator of one scene alone, so that adding scenes never changes the ones before."""
    return np.random.default_rng([seed, {"train": 0, "val": 1, "semantic": 2}[split], index])


def write_jpeg(path: Path, image: np.ndarray) -> None:
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    write_image(path, bgr, [cv2.IMWRITE_JPEG_QUALITY, 95])


def write_image(path: Path, image: np.ndarray, how: Sequence[int] = ()) -> None:
    # cv2.imwrite says nothing of a full disk.
    path.write_bytes(cv2.imencode(path.suffix, image, how)[1].tobytes())


def write_reasoning_split(root: Path, split: str, count: int, queries: int, seed: int) -> None:
    folder = root / "reason_seg" / "SynthReason" / split
    folder.mkdir(parents=True)
    for index in tqdm(range(count), desc=f"SynthReason {split}", unit="scene", disable=None):
        rng = scene_rng(seed, split, index)
        scene = make_scene(rng)
        name = f"{index:06d}.jpg"
        write_jpeg(folder / name, scene.image)
        asked = set()
        for number in range(queries):
            query = make_query(scene, split, rng, texts=3 if split == "train" else 1)
            question = (query.object_index, query.part, query.is_sentence)
            if question in asked:
                continue
            asked.add(question)
            record = query_record(scene, query, name)
            (folder / f"{index:06d}_{number}.json").write_text(json.dumps(record), encoding="utf-8")


def write_semantic_split(root: Path, split: str, count: int, seed: int) -> None:
    images = root / "synth_sem" / "images" / split
    labels = root / "synth_sem" / "annotations" / split
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    offset = 1_000_000 * SEMANTIC_SPLITS.index(split)
    for index in tqdm(range(count), desc=f"synth_sem {split}", unit="scene", disable=None):
        scene = make_scene(scene_rng(seed, "semantic", offset + index))
        label = np.zeros((SIZE, SIZE), dtype=np.uint8)
        for obj in scene.objects:
            label[obj.mask] = CATEGORIES.index(obj.category) + 1
        write_jpeg(images / f"{index:06d}.jpg", scene.image)
        write_image(labels / f"{index:06d}.png", label)


def write_synthreason(
    out: str | Path,
    train: int = 3000,
    val: int = 200,
    semantic: int = 600,
    queries: int = 4,
    seed: int = 0,
) -> Path:
    """Writes the whole benchmark under ``out``; an equal one that is already there is kept. Returns
    ``out``.

    The folder appears only when it is complete, so an interrupted run never leaves half a data set
    behind.
    """
    out = Path(out)
    settings = {"version": VERSION, "train": train, "val": val, "semantic": semantic}
    settings |= {"queries": queries, "seed": seed}
    stamp = out / "synthreason.json"
    if stamp.exists():
        if json.loads(stamp.read_text()) == settings:
            return out
        raise ValueError(
            f"{stamp}: made with other settings ({stamp.read_text().strip()}); give another --out"
            " or delete it"
        )
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: exists and is not a SynthReason folder; give another --out")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with all_or_nothing(out, partial):
        write_reasoning_split(partial, "train", train, queries, seed)
        write_reasoning_split(partial, "val", val, 2, seed)
        write_semantic_split(partial, "train", semantic, seed)
        write_semantic_split(partial, "val", max(1, semantic // 10), seed)
        (partial / "synth_sem" / "classes.json").write_text(json.dumps(CATEGORIES))
        (partial / stamp.name).write_text(json.dumps(settings))
        if out.exists():
            out.rmdir()
        partial.rename(out)
    return out


@command.entry()
def main(argv: list[str] | None = None) -> None:
    about = "Writes SynthReason, a drawn benchmark for reasoning segmentation."
    parser = command.Parser(about, "python -m dataset.synthetic")
    add = parser.add_argument
    add("--out", default="data/synthreason", help="folder to write, later given as --dataset_dir")
    add("--train", type=in_range(int, 1), default=3000, help="training scenes")
    add("--val", type=in_range(int, 1), default=200, help="validation scenes (two queries each)")
    add(
        "--semantic",
        type=in_range(int, 1),
        default=600,
        help="scenes with label maps of whole objects",
    )
    add("--queries", type=in_range(int, 1), default=4, help="queries per training scene")
    add("--seed", type=in_range(int, 0, 2**63 - 1), default=0)
    args = parser.parse_args(argv)
    out = write_synthreason(**vars(args))
    counts = Counter(p.suffix for p in (out / "reason_seg").rglob("*") if p.is_file())
    found = f"{counts['.jpg']} scenes and {counts['.json']} queries in reason_seg/SynthReason"
    print(f"{out}: {found}, {args.semantic} training label maps in synth_sem")
