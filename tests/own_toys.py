"""A user's data in each of the three forms, small enough for a test: images of 10×12 pixels with
masks known to the pixel."""

import json
from pathlib import Path

import cv2
import numpy as np

from tests.dataset_toys import write_image, write_json

SIZE = (10, 12)
# 4 × 3 pixels as a polygon of COCO's, 5 × 4 as one of labelme's, whose outline belongs to it.
RECTANGLE = [[2, 2], [6, 2], [6, 5], [2, 5]]
FLAT_ROW = {"query": "the dog", "polygons": [[2, 2, 6, 2, 6, 5, 2, 5]]}


def box(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    """bool (H, W): rows y0…y1-1, columns x0…x1-1."""
    mask = np.zeros(SIZE, dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


def runs(mask: np.ndarray) -> dict:
    """Uncompressed run lengths, written by hand: column by column, beginning with background."""
    flat = mask.ravel(order="F").astype(int)
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": ([0] if flat[0] else []) + counts}


def write_mask(path: Path, mask: np.ndarray, value: int = 255) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), mask.astype(np.uint8) * value)
    return path


def write_lines(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_table(root: Path, rows: list | None = None, name: str = "table", images: int = 2) -> Path:
    """own/<name>/train.jsonl with images 0.jpg, 1.jpg, … in images/ and masks/m.png; the default
    has a row for each image."""
    folder = root / "own" / name
    for i in range(images):
        write_image(folder / "images" / f"{i}.jpg", SIZE, 60 + i)
    write_mask(folder / "masks" / "m.png", box(1, 1, 4, 4))
    default = [
        {"image": f"{i}.jpg", "query": f"thing {i}", "polygons": [RECTANGLE]} for i in range(images)
    ]
    return write_lines(folder / "train.jsonl", default if rows is None else rows)


def write_coco(root: Path, name: str = "coco", **changes: object) -> Path:
    """own/<name>/train.json with one image and one dog; ``changes`` replace its lists."""
    write_image(root / "own" / name / "train" / "a.jpg", SIZE)
    flat = [float(v) for point in RECTANGLE for v in point]
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": SIZE[0], "width": SIZE[1]}],
        "categories": [{"id": 0, "name": "dog"}],
        "annotations": [{"id": 7, "image_id": 1, "category_id": 0, "segmentation": [flat]}],
    }
    return write_json(root / "own" / name / "train.json", content | changes)


def write_labelme(
    root: Path, name: str = "labelme", split: str = "train", **changes: object
) -> Path:
    """own/<name>/<split>/a.json with one polygon "dog"; ``changes`` replace its fields."""
    folder = root / "own" / name / split
    write_image(folder / "a.jpg", SIZE)
    record = {"imagePath": "a.jpg", "imageHeight": SIZE[0], "imageWidth": SIZE[1]}
    record["shapes"] = [{"label": "dog", "points": RECTANGLE, "shape_type": "polygon"}]
    return write_json(folder / "a.json", record | changes)
