"""Photographs with marked objects for the tests of dataset.generate and for the example of its
document.

python -m tests.generate_toys data/toy_photos
"""

import sys
from pathlib import Path

import cv2
import numpy as np

from tests.dataset_toys import write_json

NAMES = ["chair", "wineglass", "lamb_(animal)", "dining_table", "kite", "teapot", "umbrella", "bus"]
SIZE = (48, 64)  # H, W


def rectangle(
    number: int, image: int, category: int, box: tuple[int, int, int, int], **facts
) -> dict:
    """An annotation whose mask is ``box`` (x, y, width, height)."""
    x, y, w, h = box
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    entry = {
        "id": number,
        "image_id": image,
        "category_id": category,
        "segmentation": [polygon],
        "bbox": list(box),
    }
    return entry | {"area": w * h, "iscrowd": 0} | facts


def write_photos(root: Path, count: int = 6, folder: str = "coco/train2017") -> tuple[Path, Path]:
    """(annotation file, image folder); image i has 2 + i % 4 categories, the first of them with two
    instances."""
    images, annotations = [], []
    for i in range(count):
        name = f"{i:012d}.jpg"
        images.append({"id": 100 + i, "file_name": name, "height": SIZE[0], "width": SIZE[1]})
        picture = np.full((*SIZE, 3), 30 + 5 * i, np.uint8)
        boxes = [(x, y, 10, 12) for y in (2, 18) for x in (2, 18, 34)]
        for slot, box in enumerate(boxes[: 3 + i % 4]):
            category = 1 + (i + max(0, slot - 1)) % len(NAMES)
            annotations.append(rectangle(len(annotations) + 1, 100 + i, category, box))
            x, y, w, h = box
            picture[y : y + h, x : x + w] = (40 * slot, 255 - 30 * category, 20 * category)
        path = root / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), picture)
    categories = [
        {"id": i, "name": name, "synonyms": [name]} for i, name in enumerate(NAMES, start=1)
    ]
    content = {"images": images, "annotations": annotations, "categories": categories}
    return write_json(root / "instances.json", content), root / folder


if __name__ == "__main__":
    print(*write_photos(Path(sys.argv[1]), 12))
