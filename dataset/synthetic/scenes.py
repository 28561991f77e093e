"""The pictures of SynthReason: shapes of objects and parts, painted into a scene with exact masks.

S is ``SIZE``. Polygons are (x, y) points, y down: in the frame of an object, which fills [-1, 1]²,
or in pixels of the image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

from cores.dataset.synthetic.vocabulary import COLOURS, DARK, FAMILIES, GLASS, GREY

SIZE = 128  # pixels; scenes are square
Polygon = np.ndarray  # float (n, 2)
Colour = tuple[int, ...]  # red, green, blue in 0…255


@dataclass
class PartInstance:
    """One part instance. ``mask``: bool (S, S), what is visible of it."""

    name: str
    mask: np.ndarray


@dataclass
class SyntheticObject:
    """A composite object. ``mask``: bool (S, S), everything visible of it, parts included."""

    category: str
    colour: str
    family: str
    mask: np.ndarray
    parts: list[PartInstance]

    def union(self, part: str) -> np.ndarray:
        """All instances of the named part, bool (S, S)."""
        return np.any([p.mask for p in self.parts if p.name == part], axis=0)


@dataclass
class SyntheticScene:
    """``image``: uint8 (S, S, 3) RGB."""

    image: np.ndarray
    objects: list[SyntheticObject]


def ellipse(x: float, y: float, rx: float, ry: float | None = None, angle: float = 0.0) -> Polygon:
    """Centre (x, y), radii, and a turn of ``angle`` degrees."""
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
        "car": [
            box(-0.95, 0.0, 0.95, 0.55),
            np.array([(-0.6, 0.0), (-0.4, -0.55), (0.4, -0.55), (0.6, 0.0)]),
        ],
        "truck": [box(-0.3, -0.7, 0.95, 0.5), box(-0.95, -0.25, -0.3, 0.5)],
        "bus": [box(-0.95, -0.75, 0.95, 0.55)],
        "robot": [
            box(-0.6, -0.2, 0.6, 0.6),
            box(-0.38, -0.85, 0.38, -0.2),
            bar(0, -1, 0, -0.8, 0.1),
        ],
        "plane": [ellipse(0, 0.05, 0.26, 0.88), box(-0.4, 0.72, 0.4, 0.92)],
        "helicopter": [
            ellipse(-0.15, 0.15, 0.55, 0.48),
            bar(0.3, 0.1, 0.98, 0.0, 0.16),
            box(0.86, -0.25, 0.98, 0.15),
        ],
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


def part_colour(part: str, body: Colour) -> Colour:
    """The colour of a part on an object whose body has the colour ``body``."""
    if part in ("eye", "nose", "wheel", "knob"):
        return DARK
    if part in ("wing", "blade"):
        return GREY
    if part in ("window", "porthole"):
        return GLASS
    return tuple(int(0.72 * channel) for channel in body)  # an ear: a darker shade of the body


class Canvas:
    """Paints polygons in painter's order and remembers which instance every pixel belongs to."""

    def __init__(self, rng: np.random.Generator):
        base = rng.uniform(196, 248, size=3)
        slope = rng.uniform(-14, 14, size=(2, 3))
        y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE - 0.5
        self.image = base + y[..., None] * slope[0] + x[..., None] * slope[1]
        self.owner = np.zeros((SIZE, SIZE), dtype=np.int32)  # 0 is background

    def paint(self, points: Polygon, colour: Colour, owner: int) -> None:
        """``points``: in pixels of the image. ``owner``: number of the instance, 0 for none."""
        stencil = np.zeros((SIZE, SIZE), dtype=np.uint8)
        corners = np.round(points * 16).astype(np.int32)  # ``shift`` says 4 fractional bits.
        cv2.fillPoly(stencil, [corners], (1,), shift=4)
        inside = stencil.astype(bool)
        self.image[inside] = colour
        self.owner[inside] = owner

    def finish(self, rng: np.random.Generator) -> np.ndarray:
        """The picture, uint8 (S, S, 3) RGB, with softened edges and noise."""
        image = cv2.GaussianBlur(self.image.astype(np.float32), (3, 3), 0.5)
        return np.clip(image + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8)


def _clutter(canvas: Canvas, rng: np.random.Generator) -> None:
    """Paints dark discs and grey bars that belong to no object, so that the look of a part is never
    enough to find it."""
    for _ in range(rng.integers(2, 5)):
        x, y = rng.uniform(6, SIZE - 6, size=2)
        if rng.random() < 0.5:
            canvas.paint(ellipse(x, y, rng.uniform(4, 6.5)), DARK, 0)
        else:
            angle, half = rng.uniform(0, math.pi), rng.uniform(7, 11)
            dx, dy = half * math.cos(angle), half * math.sin(angle)
            canvas.paint(bar(x - dx, y - dy, x + dx, y + dy, rng.uniform(5, 7)), GREY, 0)


def make_scene(rng: np.random.Generator) -> SyntheticScene:
    """Four objects of one family on a jittered 2 × 2 grid. No two share category and colour."""
    family = str(rng.choice(list(FAMILIES)))
    kinds: list[tuple[str, str]] = []
    while len(kinds) < 4:
        kind = (str(rng.choice(FAMILIES[family])), str(rng.choice(list(COLOURS))))
        if kind not in kinds:
            kinds.append(kind)
    canvas = Canvas(rng)
    _clutter(canvas, rng)
    names: list[tuple[int, str]] = []  # owner - 1 -> (index of its object, part or "" for the body)
    for index, (category, colour) in enumerate(kinds):
        middle = np.array([(index % 2) * 64 + 32, (index // 2) * 64 + 32])
        centre = middle + rng.uniform(-4, 4, size=2)
        scale = rng.uniform(25, 30) * np.array([rng.choice((-1, 1)), 1])
        turn = math.radians(rng.uniform(-14, 14))
        rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
        shade = np.array(COLOURS[colour]) * rng.uniform(0.88, 1.08)
        body_colour = tuple(int(v) for v in np.clip(shade, 0, 255))
        bodies, parts = shape_of(category)
        layers = [("", polygon) for polygon in bodies]
        layers += [(part, polygon) for part, polygons in parts.items() for polygon in polygons]
        for part, polygon in layers:
            names.append((index, part))
            layer_colour = part_colour(part, body_colour) if part else body_colour
            canvas.paint((polygon * scale) @ rotation + centre, layer_colour, len(names))
    objects = []
    for index, (category, colour) in enumerate(kinds):
        mine = {owner: part for owner, (i, part) in enumerate(names, start=1) if i == index}
        found = [PartInstance(part, canvas.owner == owner) for owner, part in mine.items() if part]
        visible = [part for part in found if part.mask.sum() >= 12]  # Occlusion leaves slivers.
        mask = np.isin(canvas.owner, list(mine))
        objects.append(SyntheticObject(category, colour, family, mask, visible))
    return SyntheticScene(canvas.finish(rng), objects)
