"""Masks for annotations that have boxes only (EgoObjects), by SAM with each box as its prompt.

    python -m utils.boxes_to_masks --annotations EgoObjectsV1_unified_train.json \\
        --images ego_objects/images --vision_pretrained sam_vit_h_4b8939.pth \\
        --out ego_objects/instances.json

The result is the same file with a "segmentation" (COCO run lengths) in every annotation that had
none, ready for ``python -m dataset.generate questions``. The same command continues a run that was
killed: finished images are kept in <out>.partial.jsonl until the end.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle_codec
from segment_anything import SamPredictor
from tqdm import tqdm

from dataset import command
from dataset.files.errors import DataError
from dataset.files.images import claimed_size, read_claimed
from dataset.files.paths import require_folder, resolve_inside
from dataset.files.text import read_json
from dataset.files.write import write_text
from model.checkpoints.sam import load_sam
from utils import distributed
from utils.settings.arguments import OneLineParser
from utils.settings.flags import UsageError

BOXES_AT_A_TIME = 32  # limits the memory, which the masks at full resolution dominate


def image_name(entry: dict) -> str:
    """The file name of an image of COCO, LVIS or EgoObjects."""
    return (entry.get("file_name") or entry.get("coco_url") or entry["url"]).rsplit("/", 1)[-1]


def box_masks(
    predictor: SamPredictor, image: np.ndarray, boxes: np.ndarray
) -> Iterator[np.ndarray]:
    """The mask, bool (H, W), of each of ``boxes``, float (n, 4) as (x0, y0, x1, y1) in pixels of
    ``image``, uint8 (H, W, 3) RGB."""
    predictor.set_image(image)
    prompts = torch.as_tensor(boxes, dtype=torch.float32)
    prompts = predictor.transform.apply_boxes_torch(prompts, image.shape[:2]).to(predictor.device)
    for part in prompts.split(BOXES_AT_A_TIME):
        # SAM's three masks are for ambiguous prompts such as a point; a box means one object.
        masks, _, _ = predictor.predict_torch(
            point_coords=None, point_labels=None, boxes=part, multimask_output=False
        )
        yield from masks[:, 0].cpu().numpy()


def corners(entry: dict, size: tuple[int, int], source: Path) -> list[float]:
    """(x0, y0, x1, y1) of an annotation's "bbox" (x, y, width, height), inside an image of ``size``
    (H, W). Raises DataError."""
    box = entry.get("bbox")
    where = f"{source}: annotation {entry.get('id')}"
    if (
        not isinstance(box, list)
        or len(box) != 4
        or not all(isinstance(v, (int, float)) and np.isfinite(v) for v in box)
    ):
        raise DataError(f'{where}: "bbox" must be [x, y, width, height]')
    x, y, width, height = box
    x0, x1 = np.clip([x, x + width], 0, size[1])
    y0, y1 = np.clip([y, y + height], 0, size[0])
    if x1 <= x0 or y1 <= y0:
        raise DataError(
            f'{where}: "bbox" {box} has no area inside its image of {size[0]}×{size[1]} (height ×'
            " width)"
        )
    return [float(x0), float(y0), float(x1), float(y1)]


class FinishedMasks:
    """Masks of finished images on disk, one line each; the first line says what they belong to."""

    def __init__(self, path: Path, identity: str):
        """Raises UsageError where ``path`` holds the masks of another SAM or other annotations."""
        self.masks: dict[int, dict[str, Any]] = {}
        """Image id -> annotation id as text, as JSON has it -> run lengths."""
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        # A kill may have cut the last line short; its image is then computed again.
        whole = [line for line in lines if line.endswith(b"\n")]
        if whole and json.loads(whole[0]) != identity:
            raise UsageError(
                f"{path}: holds masks of another SAM or of other annotations; remove it or choose"
                " another --out"
            )
        for line in whole[1:]:
            image, masks = json.loads(line)
            self.masks[image] = masks
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("ab")
        self._stream.truncate(sum(map(len, whole)))
        if not whole:
            self._write(identity)

    def _write(self, value: Any) -> None:
        self._stream.write(json.dumps(value).encode() + b"\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        self._stream.close()

    def add(self, image: int, masks: dict[str, Any]) -> None:
        self.masks[image] = masks
        self._write([image, masks])


def convert(annotations: Path, images: Path, vision_pretrained: Path, out: Path) -> int:
    """Writes ``out``; returns the number of new masks. Raises DataError, UsageError and what
    ``load_sam`` raises."""
    content = read_json(annotations)
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key), list) for key in ("images", "annotations")
    ):
        raise DataError(
            f'{annotations}: needs the lists "images" and "annotations" of COCO\'s format'
        )
    require_folder(images, f"the images of {annotations.name}")
    wanted: dict[int, list[dict]] = defaultdict(list)
    for entry in content["annotations"]:
        if not entry.get("segmentation"):
            wanted[entry["image_id"]].append(entry)
    there = {path.name for path in images.iterdir()}
    todo = sorted(
        (image_name(i), i["id"], i)
        for i in content["images"]
        if i["id"] in wanted and image_name(i) in there
    )
    digest = hashlib.sha256(annotations.read_bytes()).hexdigest()
    partial = out.with_name(f"{out.name}.partial.jsonl")
    with closing(FinishedMasks(partial, f"{vision_pretrained} {digest}")) as finished:
        sam, _ = load_sam(vision_pretrained)
        predictor = SamPredictor(sam.to(distributed.device()).eval())
        for name, number, entry in tqdm(todo, desc="boxes to masks", disable=None):
            if number not in finished.masks:
                path = resolve_inside(images, name)
                masks = _masks_of(predictor, path, entry, wanted[number], annotations)
                finished.add(number, masks)
    numbers = {number for _, number, _ in todo}
    for number in numbers:
        for entry in wanted[number]:
            entry["segmentation"] = finished.masks[number][str(entry["id"])]
            entry["area"] = int(rle_codec.area(entry["segmentation"]))
    # Annotations of images that are not there keep their boxes only, and readers leave them out.
    write_text(out, json.dumps(content))
    partial.unlink()
    return sum(len(finished.masks[number]) for number in numbers)


def _masks_of(
    predictor: SamPredictor, path: Path, image: dict, entries: list[dict], source: Path
) -> dict[str, Any]:
    pixels = read_claimed(path, claimed_size(image, source), source.name)
    size = pixels.shape[:2]
    boxes = np.array([corners(entry, size, source) for entry in entries])
    masks = {}
    for entry, mask in zip(entries, box_masks(predictor, pixels, boxes), strict=True):
        rle = rle_codec.encode(np.asfortranarray(mask, dtype=np.uint8))
        masks[str(entry["id"])] = {
            "size": [int(side) for side in rle["size"]],
            "counts": rle["counts"].decode(),
        }
    return masks


@command.entry(stopped="stopped; the same command continues")
def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(
        prog="python -m utils.boxes_to_masks",
        description=__doc__.split("\n")[0],
        allow_abbrev=False,
    )
    add = parser.add_argument
    formats = "JSON in the format of COCO, LVIS or EgoObjects"
    add("--annotations", type=Path, required=True, help=formats)
    folder = "folder of the images; those that are not there are left out"
    add("--images", type=Path, required=True, help=folder)
    add("--vision_pretrained", type=Path, required=True, help="SAM checkpoint (.pth) or folder")
    add("--out", type=Path, required=True, help="JSON to write")
    args = parser.parse_args(argv)
    count = convert(args.annotations, args.images, args.vision_pretrained, args.out)
    print(f"{args.out}: {count} new masks")
    return 0
