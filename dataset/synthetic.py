"""SynthReason: a procedural benchmark for reasoning segmentation that fits a machine without a GPU.

Every scene holds four objects of one family. All objects of a family own the same kinds of parts, and two of these kinds look alike
(eye / nose, wheel / knob, wing / blade): the look of a part never tells which one is meant, only the host does. Grey bars and dark
discs that belong to nothing lie between the objects. A query names a part ("the wheels of the red bus") or describes what it is for
("what does the animal that barks use to smell?"); its target is the union of the host's parts of that name.

Training and validation share neither a wording nor a combination: validation uses other sentence frames, and only combinations
(category, part, purpose) or (colour, category, part) that training never uses.

Written to disk in two layouts that real data have, too::

    OUT/reason_seg/SynthReason/{train,val}/000000.jpg, 000000_0.json, …   ReasonSeg (one JSON per query)
    OUT/synth_sem/{images,annotations}/{train,val}/000000.{jpg,png}       label maps of whole objects, 0 = void
    OUT/synth_sem/classes.json                                            class i has value i + 1

Run ``python -m dataset.synthetic --out data/synthreason`` (about half a minute). The same seed gives the same files.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from dataset.images import encode_rle

SIZE = 128  # pixels; scenes are square
VERSION = 1  # raise it whenever the same seed would give other files

COLOURS = {
    "red": (214, 60, 52),
    "green": (66, 170, 74),
    "blue": (62, 104, 214),
    "yellow": (232, 200, 60),
    "purple": (150, 78, 184),
    "orange": (240, 142, 50),
}
DARK = (34, 32, 36)  # eyes, noses, wheels and knobs: one colour on purpose
GREY = (172, 176, 182)  # wings and blades
GLASS = (188, 226, 238)  # windows

FAMILIES = {
    "animal": ("dog", "cat", "rabbit", "bear"),
    "vehicle": ("car", "truck", "bus", "robot"),
    "aircraft": ("plane", "helicopter", "drone", "airship"),
}
CATEGORIES = [category for members in FAMILIES.values() for category in members]
PARTS = {
    "animal": ("eye", "nose", "ear"),
    "vehicle": ("wheel", "knob", "window"),
    "aircraft": ("wing", "blade", "porthole"),
}
# What a part is for: a verb phrase that continues "... use to" and "... lets it".
PURPOSES = {
    "eye": ("see", "look around", "watch things", "spot something far away"),
    "nose": ("smell", "sniff", "follow a scent", "notice an odour"),
    "ear": ("hear", "listen", "catch a sound", "notice a noise"),
    "wheel": ("roll", "move along the road", "touch the ground", "travel over land"),
    "knob": ("take orders from a hand", "change its settings", "switch its heating on", "tune its radio"),
    "window": ("let daylight in", "light up its inside", "show what it carries", "keep out the wind"),
    "wing": ("glide", "stay up in the air", "get lift", "keep its balance in flight"),
    "blade": ("spin", "push the air", "whirl around", "rotate quickly"),
    "porthole": ("give a view outside", "light up its cabin", "let the crew look out", "admit some light"),
}
# What only one category of a family does: continues "the animal that ...".
HABITS = {
    "dog": "barks",
    "cat": "purrs",
    "rabbit": "hops",
    "bear": "growls",
    "car": "carries a family",
    "truck": "hauls cargo",
    "bus": "carries many passengers",
    "robot": "obeys commands",
    "plane": "needs a runway",
    "helicopter": "hovers over one place",
    "drone": "takes pictures without a pilot",
    "airship": "floats on gas",
}
# Short queries are phrases and long ones are sentences, as in ReasonSeg: the loader puts a question around a phrase.
EXPLICIT = {
    "train": ("the {part} of {host}", "the {part} which {host} has got", "the {part} that {host} has", "{part} of {host}"),
    "val": ("the {part} on {host}", "the {part} belonging to {host}"),
}
IMPLICIT = {
    "train": (
        "what does {host} use to {purpose}?",
        "where is the part that lets {host} {purpose}?",
        "which part helps {host} to {purpose}?",
        "find what {host} needs in order to {purpose}.",
        "if {host} wants to {purpose}, what is it going to use?",
    ),
    "val": ("with which part can {host} {purpose}?", "to {purpose}, what will {host} use?"),
}
SEMANTIC_SPLITS = ("train", "val")


def held_out(*combination: str) -> bool:
    """True for the fifth of all combinations that only validation uses (a stable hash, not Python's salted one)."""
    return zlib.crc32("|".join(combination).encode()) % 5 == 0


# ---------------------------------------------------------------------------------------------------------------- drawing


@dataclass
class Part:
    """One part instance. ``mask``: bool (SIZE, SIZE), what is visible of it."""

    name: str
    mask: np.ndarray


@dataclass
class SceneObject:
    """A composite object. ``mask``: bool (SIZE, SIZE), everything visible of it, parts included."""

    category: str
    colour: str
    family: str
    mask: np.ndarray
    parts: list[Part]

    def union(self, part: str) -> np.ndarray:
        """All instances of the named part, bool (SIZE, SIZE)."""
        return np.any([p.mask for p in self.parts if p.name == part], axis=0)


@dataclass
class Scene:
    """``image``: uint8 (SIZE, SIZE, 3) RGB."""

    image: np.ndarray
    objects: list[SceneObject]


Polygon = np.ndarray  # float (n, 2), (x, y) in the object's own frame: the object fills [-1, 1]², y down


def ellipse(x: float, y: float, rx: float, ry: float | None = None, angle: float = 0.0) -> Polygon:
    t = np.linspace(0, 2 * math.pi, 28, endpoint=False)
    points = np.stack([rx * np.cos(t), (ry or rx) * np.sin(t)], axis=1)
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return points @ np.array([[c, s], [-s, c]]) + (x, y)


def box(x0: float, y0: float, x1: float, y1: float) -> Polygon:
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], dtype=float)


def bar(x0: float, y0: float, x1: float, y1: float, width: float) -> Polygon:
    """A thick line from (x0, y0) to (x1, y1)."""
    along = np.array([x1 - x0, y1 - y0])
    across = np.array([-along[1], along[0]]) / np.hypot(*along) * width / 2
    start, end = np.array([x0, y0]), np.array([x1, y1])
    return np.stack([start + across, end + across, end - across, start - across])


def mirrored(polygon: Polygon) -> list[Polygon]:
    """The polygon and its mirror image: most parts come in pairs."""
    return [polygon, polygon * (-1, 1)]


def shape_of(category: str) -> tuple[list[Polygon], dict[str, list[Polygon]]]:
    """(body polygons, part name -> polygons of its instances) in the object's own frame."""
    bodies = {
        "dog": [ellipse(0, 0.1, 0.66, 0.72)],
        "cat": [ellipse(0, 0.15, 0.74, 0.64)],
        "rabbit": [ellipse(0, 0.3, 0.62, 0.62)],
        "bear": [ellipse(0, 0.1, 0.78, 0.76)],
        "car": [box(-0.95, 0.0, 0.95, 0.55), np.array([(-0.6, 0.0), (-0.4, -0.55), (0.4, -0.55), (0.6, 0.0)])],
        "truck": [box(-0.3, -0.7, 0.95, 0.5), box(-0.95, -0.25, -0.3, 0.5)],
        "bus": [box(-0.95, -0.75, 0.95, 0.55)],
        "robot": [box(-0.6, -0.2, 0.6, 0.6), box(-0.38, -0.85, 0.38, -0.2), bar(0, -1, 0, -0.8, 0.1)],
        "plane": [ellipse(0, 0.05, 0.26, 0.88), box(-0.4, 0.72, 0.4, 0.92)],
        "helicopter": [ellipse(-0.15, 0.15, 0.55, 0.48), bar(0.3, 0.1, 0.98, 0.0, 0.16), box(0.86, -0.25, 0.98, 0.15)],
        "drone": [box(-0.4, -0.35, 0.4, 0.45)],
        "airship": [ellipse(0, -0.05, 0.95, 0.48)],
    }
    parts = {
        "dog": {"ear": mirrored(ellipse(0.74, 0.0, 0.22, 0.5, -12))},
        "cat": {"ear": mirrored(np.array([(0.2, -0.45), (0.72, -0.98), (0.74, -0.12)]))},
        "rabbit": {"ear": mirrored(ellipse(0.3, -0.6, 0.17, 0.46, 8))},
        "bear": {"ear": mirrored(ellipse(0.6, -0.58, 0.3))},
        "car": {
            "wheel": mirrored(ellipse(0.55, 0.58, 0.29)),
            "knob": mirrored(ellipse(0.27, 0.18, 0.18)),
            "window": mirrored(box(0.05, -0.46, 0.38, -0.08)),
        },
        "truck": {
            "wheel": mirrored(ellipse(0.6, 0.58, 0.29)),
            "knob": [ellipse(0.05, 0.08, 0.18), ellipse(0.6, 0.04, 0.18)],
            "window": [box(-0.88, -0.18, -0.5, 0.14), box(0.15, -0.58, 0.55, -0.24)],
        },
        "bus": {
            "wheel": mirrored(ellipse(0.6, 0.6, 0.27)),
            "knob": mirrored(ellipse(0.28, 0.14, 0.18)),
            "window": mirrored(box(0.15, -0.58, 0.75, -0.16)),
        },
        "robot": {
            "wheel": mirrored(ellipse(0.42, 0.72, 0.27)),
            "knob": mirrored(ellipse(0.3, 0.08, 0.18)),
            "window": mirrored(box(0.04, -0.72, 0.32, -0.34)),
        },
        "plane": {
            "wing": mirrored(np.array([(0.22, -0.2), (0.98, 0.2), (0.98, 0.42), (0.22, 0.22)])),
            "blade": mirrored(bar(0.04, -0.9, 0.56, -0.9, 0.18)),
            "porthole": [ellipse(0, -0.42, 0.16), ellipse(0, 0.38, 0.16)],
        },
        "helicopter": {
            "wing": mirrored(bar(0.12, 0.72, 0.72, 0.72, 0.24)),
            "blade": mirrored(bar(0.06, -0.52, 0.95, -0.52, 0.2)),
            "porthole": [ellipse(-0.4, 0.1, 0.17), ellipse(0.02, 0.1, 0.17)],
        },
        "drone": {
            "wing": mirrored(bar(0.4, 0.1, 0.95, 0.1, 0.26)),
            "blade": mirrored(bar(0.18, -0.5, 0.85, -0.86, 0.2)),
            "porthole": mirrored(ellipse(0.2, 0.05, 0.16)),
        },
        "airship": {
            "wing": mirrored(bar(0.62, -0.4, 0.9, -0.85, 0.26)),
            "blade": mirrored(bar(0.12, 0.62, 0.68, 0.62, 0.2)),
            "porthole": mirrored(ellipse(0.3, -0.05, 0.17)),
        },
    }
    if category in FAMILIES["animal"]:
        low = {"rabbit": 0.2, "cat": 0.08}.get(category, 0.0)
        parts[category] |= {
            "eye": mirrored(ellipse(0.3, -0.08 + low, 0.19)),
            "nose": [ellipse(0, 0.38 + low * 0.7, 0.25, 0.2)],
        }
    return bodies[category], parts[category]


def part_colour(part: str, body: tuple[int, int, int]) -> tuple[int, int, int]:
    if part in ("eye", "nose", "wheel", "knob"):
        return DARK
    if part in ("wing", "blade"):
        return GREY
    if part in ("window", "porthole"):
        return GLASS
    return tuple(int(0.72 * channel) for channel in body)  # ears are a darker shade of the body


class Canvas:
    """Paints polygons in painter's order and remembers which instance every pixel belongs to."""

    def __init__(self, rng: np.random.Generator):
        base = rng.uniform(196, 248, size=3)
        slope = rng.uniform(-14, 14, size=(2, 3))
        y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE - 0.5
        self.image = base + y[..., None] * slope[0] + x[..., None] * slope[1]
        self.owner = np.zeros((SIZE, SIZE), dtype=np.int32)  # 0 is background

    def paint(self, points: np.ndarray, colour: tuple[int, int, int], owner: int) -> None:
        """``points``: float (n, 2) image coordinates (x, y)."""
        stencil = np.zeros((SIZE, SIZE), dtype=np.uint8)
        cv2.fillPoly(stencil, [np.round(points * 16).astype(np.int32)], 1, shift=4)
        inside = stencil.astype(bool)
        self.image[inside] = colour
        self.owner[inside] = owner

    def finish(self, rng: np.random.Generator) -> np.ndarray:
        image = cv2.GaussianBlur(self.image.astype(np.float32), (3, 3), 0.5)
        return np.clip(image + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8)


def _clutter(canvas: Canvas, rng: np.random.Generator) -> None:
    """Dark discs and grey bars that belong to no object: what a part looks like is never enough to find it."""
    for _ in range(rng.integers(2, 5)):
        x, y = rng.uniform(6, SIZE - 6, size=2)
        if rng.random() < 0.5:
            canvas.paint(ellipse(x, y, rng.uniform(4, 6.5)), DARK, 0)
        else:
            angle, half = rng.uniform(0, math.pi), rng.uniform(7, 11)
            dx, dy = half * math.cos(angle), half * math.sin(angle)
            canvas.paint(bar(x - dx, y - dy, x + dx, y + dy, rng.uniform(5, 7)), GREY, 0)


def make_scene(rng: np.random.Generator) -> Scene:
    """Four objects of one family on a jittered 2 × 2 grid. No two share category and colour."""
    family = str(rng.choice(list(FAMILIES)))
    kinds: list[tuple[str, str]] = []
    while len(kinds) < 4:
        kind = (str(rng.choice(FAMILIES[family])), str(rng.choice(list(COLOURS))))
        if kind not in kinds:
            kinds.append(kind)
    canvas = Canvas(rng)
    _clutter(canvas, rng)
    names: dict[int, tuple[int, str | None]] = {}  # owner id -> (object index, part name or None for the body)
    for index, (category, colour) in enumerate(kinds):
        centre = np.array([(index % 2) * 64 + 32, (index // 2) * 64 + 32]) + rng.uniform(-4, 4, size=2)
        scale = rng.uniform(25, 30) * np.array([rng.choice((-1, 1)), 1])
        turn = math.radians(rng.uniform(-14, 14))
        rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
        shade = np.array(COLOURS[colour]) * rng.uniform(0.88, 1.08)
        body_colour = tuple(int(v) for v in np.clip(shade, 0, 255))
        bodies, parts = shape_of(category)
        layers = [(None, polygon) for polygon in bodies]
        layers += [(name, polygon) for name, polygons in parts.items() for polygon in polygons]
        for name, polygon in layers:
            owner = len(names) + 1
            names[owner] = (index, name)
            colour_here = body_colour if name is None else part_colour(name, body_colour)
            canvas.paint((polygon * scale) @ rotation + centre, colour_here, owner)
    return Scene(canvas.finish(rng), _objects(canvas.owner, names, kinds, family))


def _objects(owner: np.ndarray, names: dict, kinds: list[tuple[str, str]], family: str) -> list[SceneObject]:
    objects = []
    for index, (category, colour) in enumerate(kinds):
        mine = {o: part for o, (i, part) in names.items() if i == index}
        parts = [Part(part, owner == o) for o, part in mine.items() if part is not None]
        parts = [part for part in parts if part.mask.sum() >= 12]  # slivers left by occlusion are not parts
        objects.append(SceneObject(category, colour, family, np.isin(owner, list(mine)), parts))
    return objects


# ---------------------------------------------------------------------------------------------------------------- queries


@dataclass
class Query:
    """A question about one part of one object. ``texts``: wordings of the same question."""

    texts: list[str]
    object_index: int
    part: str
    is_sentence: bool  # True: the part is described by its purpose; False: it is named


def plural(part: str) -> str:
    return part if part == "nose" else part + "s"  # every other part comes in pairs


def host_phrases(scene: Scene, index: int, with_colour_only: bool = False) -> list[str]:
    """Every unambiguous way to name an object of the scene."""
    obj = scene.objects[index]
    phrases = [f"the {obj.colour} {obj.category}"]
    if not with_colour_only and sum(o.category == obj.category for o in scene.objects) == 1:
        phrases += [f"the {obj.category}", f"the {obj.family} that {HABITS[obj.category]}"]
    return phrases


def make_query(scene: Scene, split: str, rng: np.random.Generator, texts: int = 1) -> Query:
    """Draws one query that ``split`` ("train" or "val") may use, with up to ``texts`` wordings."""
    wanted = split == "val"
    for _ in range(200):
        index = int(rng.integers(len(scene.objects)))
        obj = scene.objects[index]
        part = str(rng.choice(PARTS[obj.family]))
        if not any(p.name == part for p in obj.parts):
            continue
        implicit = bool(rng.random() < 0.6)
        if implicit:
            purposes = [p for p in PURPOSES[part] if held_out(obj.category, part, p) == wanted]
            if not purposes:
                continue
            frames, hosts = IMPLICIT[split], host_phrases(scene, index)
            wordings = [f.format(host=h, purpose=p) for f in frames for h in hosts for p in purposes]
        else:
            if held_out(obj.colour, obj.category, part) != wanted:
                continue
            frames, hosts = EXPLICIT[split], host_phrases(scene, index, with_colour_only=wanted)
            wordings = [f.format(host=h, part=plural(part)) for f in frames for h in hosts]
        chosen = rng.choice(len(wordings), size=min(texts, len(wordings)), replace=False)
        return Query([wordings[i] for i in chosen], index, part, implicit)
    raise RuntimeError("no query found for a scene after 200 draws: the held-out rule leaves this scene nothing to ask")


# ------------------------------------------------------------------------------------------------------------------ files


def polygons(mask: np.ndarray) -> list[list[list[int]]]:
    """Outer contours as point lists [[x, y], …] for readers that know ReasonSeg's polygons only."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return [contour[:, 0].tolist() for contour in contours]


def query_record(scene: Scene, query: Query, image_name: str) -> dict:
    """One ReasonSeg JSON. The RLE keys hold the exact masks; ``scene`` is what the trivial baselines read."""
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
                    "parts": [{"name": part.name, "rle": encode_rle(part.mask)} for part in obj.parts],
                }
                for obj in scene.objects
            ]
        },
    }


def scene_rng(seed: int, split: str, index: int) -> np.random.Generator:
    """Scenes are independent of each other: adding scenes never changes the ones before."""
    return np.random.default_rng([seed, {"train": 0, "val": 1, "semantic": 2}[split], index])


def write_jpeg(path: Path, image: np.ndarray) -> None:
    if not cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 95]):
        raise OSError(f"{path}: could not be written (is the disk full?)")


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
            if (query.object_index, query.part, query.is_sentence) in asked:
                continue
            asked.add((query.object_index, query.part, query.is_sentence))
            record = query_record(scene, query, name)
            (folder / f"{index:06d}_{number}.json").write_text(json.dumps(record), encoding="utf-8")


def write_semantic_split(root: Path, split: str, count: int, seed: int) -> None:
    images, labels = root / "synth_sem" / "images" / split, root / "synth_sem" / "annotations" / split
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    offset = 1_000_000 * SEMANTIC_SPLITS.index(split)
    for index in tqdm(range(count), desc=f"synth_sem {split}", unit="scene", disable=None):
        scene = make_scene(scene_rng(seed, "semantic", offset + index))
        label = np.zeros((SIZE, SIZE), dtype=np.uint8)
        for obj in scene.objects:
            label[obj.mask] = CATEGORIES.index(obj.category) + 1
        write_jpeg(images / f"{index:06d}.jpg", scene.image)
        cv2.imwrite(str(labels / f"{index:06d}.png"), label)


def generate(out: str | Path, train: int = 3000, val: int = 200, semantic: int = 600, queries: int = 4, seed: int = 0) -> Path:
    """Writes the whole benchmark under ``out``; an equal one that is already there is kept. Returns ``out``.

    The folder appears only when it is complete, so an interrupted run never leaves half a data set behind.
    """
    out = Path(out)
    settings = {"version": VERSION, "train": train, "val": val, "semantic": semantic, "queries": queries, "seed": seed}
    stamp = out / "synthreason.json"
    if stamp.exists():
        if json.loads(stamp.read_text()) == settings:
            return out
        raise ValueError(f"{stamp}: made with other settings ({stamp.read_text().strip()}); give another --out or delete it")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: exists and is not a SynthReason folder; give another --out")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="data/synthreason", help="folder to write, later given as --dataset_dir")
    parser.add_argument("--train", type=int, default=3000, help="training scenes")
    parser.add_argument("--val", type=int, default=200, help="validation scenes (two queries each)")
    parser.add_argument("--semantic", type=int, default=600, help="scenes with label maps of whole objects")
    parser.add_argument("--queries", type=int, default=4, help="queries per training scene")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    out = generate(**vars(args))
    counts = Counter(p.suffix for p in (out / "reason_seg").rglob("*") if p.is_file())
    found = f"{counts['.jpg']} scenes and {counts['.json']} queries in reason_seg/SynthReason"
    print(f"{out}: {found}, {args.semantic} training label maps in synth_sem")


if __name__ == "__main__":
    main()
