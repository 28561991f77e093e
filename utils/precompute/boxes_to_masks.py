"""Masks for annotations that have boxes only (EgoObjects), by SAM with each box as its prompt.

    python -m utils.boxes_to_masks --annotations EgoObjectsV1_unified_train.json \\
        --images ego_objects/images --vision_pretrained sam_vit_h_4b8939.pth \\
        --out ego_objects/instances.json

The result is the same file with a "segmentation" (COCO run lengths) in every annotation that had
none, ready for ``python -m dataset.generate questions``. The same command continues a run that was
stopped, also with annotations that were corrected since: finished masks are kept in
<out>.partial.jsonl until the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import defaultdict
from collections.abc import Container, Iterator
from contextlib import closing
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle_codec
from segment_anything import SamPredictor
from tqdm import tqdm

from cores.dataset import command
from cores.dataset.files.errors import DataError, MissingDataError
from cores.dataset.files.images import claimed_size, read_claimed
from cores.dataset.files.index import as_id
from cores.dataset.files.lookup import Lookup, photo_name
from cores.dataset.files.paths import require_folder
from cores.dataset.files.rle import encode_rle
from cores.dataset.files.text import read_json
from cores.dataset.files.write import prepare_output, write_text
from cores.model.checkpoints.sam import load_sam
from cores.utils import distributed
from cores.utils.settings.flags import UsageError
from cores.utils.settings.programs import read_boxes

BOXES_AT_A_TIME = 32  # limits the memory, which the masks at full resolution dominate


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


def boxed(content: Any, source: Path) -> dict[int | str, list[dict]]:
    """Image id -> its annotations without a mask. Raises DataError for what is not in COCO's
    format."""
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key), list) for key in ("images", "annotations")
    ):
        raise DataError(f'{source}: needs the lists "images" and "annotations" of COCO\'s format')
    for key in ("images", "annotations"):
        for position, entry in enumerate(content[key]):
            if not isinstance(entry, dict) or as_id(entry.get("id")) is None:
                raise DataError(f'{source}: {key}[{position}] must be an object with an "id"')
    images = {as_id(image["id"]) for image in content["images"]}
    wanted: dict[int | str, list[dict]] = defaultdict(list)
    for entry in content["annotations"]:
        if entry.get("segmentation"):
            continue
        where, image = f"{source}: annotation {entry['id']}", as_id(entry.get("image_id"))
        if image is None or image not in images:
            raise DataError(
                f'{where}: "image_id" is {entry.get("image_id")!r}, and there is no such image'
            )
        box = entry.get("bbox")
        if (
            not isinstance(box, list)
            or len(box) != 4
            or not all(type(v) in (int, float) and np.isfinite(v) for v in box)
        ):
            raise DataError(f'{where}: "bbox" must be [x, y, width, height]')
        wanted[image].append(entry)
    if not wanted:
        raise DataError(f"{source}: there is nothing to do, no annotation is without a mask")
    return wanted


def corners(box: list[float], size: tuple[int, int]) -> tuple[float, ...] | None:
    """(x0, y0, x1, y1) of a "bbox" (x, y, width, height), inside an image of ``size`` (H, W); None
    where it has no area there."""
    x, y, width, height = box
    x0, x1 = np.clip([x, x + width], 0, size[1])
    y0, y1 = np.clip([y, y + height], 0, size[0])
    return None if x1 <= x0 or y1 <= y0 else (float(x0), float(y0), float(x1), float(y1))


class FinishedMasks:
    """Finished masks on disk, the new ones of an image on one line; the first line says which SAM
    made them. A mask is known by its photo's bytes and its box, on which alone it depends, so that
    what is done serves a corrected file of annotations, too."""

    def __init__(self, path: Path, identity: str):
        """Raises UsageError where ``path`` holds the masks of another SAM."""
        self._masks: dict[tuple, dict[str, Any]] = {}
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        # A kill may have cut the last line short; its image is then computed again.
        whole = [line for line in lines if line.endswith(b"\n")]
        try:
            if whole and json.loads(whole[0]) != identity:
                raise UsageError(
                    f"{path}: holds masks of another SAM; remove it or choose another --out"
                )
            for line in whole[1:]:
                photo, found = json.loads(line)
                self._masks |= {(photo, *box): mask for box, mask in found}
        except (TypeError, ValueError) as error:
            if isinstance(error, UsageError):
                raise
            raise DataError(f"{path}: is damaged; remove it") from None
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

    def get(self, photo: str, box: tuple[float, ...]) -> dict[str, Any] | None:
        """The run lengths of a box in the photo of this digest, if they are there."""
        return self._masks.get((photo, *box))

    def add(self, photo: str, masks: dict[tuple[float, ...], dict[str, Any]]) -> None:
        self._masks |= {(photo, *box): mask for box, mask in masks.items()}
        self._write([photo, [[box, mask] for box, mask in masks.items()]])


def convert(
    annotations: Path, images: Path, vision_pretrained: Path, out: Path
) -> tuple[int, list[str]]:
    """Writes ``out``; returns the number of new masks, and in words what has got none. Raises
    DataError, UsageError and what ``load_sam`` raises."""
    content = read_json(annotations)
    wanted = boxed(content, annotations)
    require_folder(images, f"the images of {annotations.name}")
    photos, remarks = _photos(content, wanted, images, annotations)
    partial = out.with_name(f"{out.name}.partial.jsonl")
    count, flat = 0, set()
    with closing(FinishedMasks(partial, str(vision_pretrained.resolve()))) as finished:
        sam, _ = load_sam(vision_pretrained)
        predictor = SamPredictor(sam.to(distributed.device()).eval())
        for path, image in tqdm(photos, desc="boxes to masks", disable=None):
            pixels = read_claimed(path, claimed_size(image, annotations), annotations.name)
            size, photo = pixels.shape[:2], hashlib.sha256(path.read_bytes()).hexdigest()
            entries = wanted.get(as_id(image["id"]) or 0, [])
            places = [(entry, corners(entry["bbox"], size)) for entry in entries]
            boxes = dict.fromkeys(box for _, box in places if box is not None)
            new = [box for box in boxes if finished.get(photo, box) is None]
            if new:
                masks = box_masks(predictor, pixels, np.array(new))
                finished.add(photo, dict(zip(new, map(encode_rle, masks), strict=True)))
            for entry, box in places:
                if box is None:
                    flat.add(id(entry))
                    remarks.append(
                        f'{annotations}: annotation {entry["id"]} is left out: "bbox"'
                        f" {entry['bbox']} has no area inside its image of {size[0]}×{size[1]}"
                        " (height × width)"
                    )
                else:
                    entry["segmentation"] = finished.get(photo, box)
                    entry["area"] = int(rle_codec.area(entry["segmentation"]))
                    count += 1
    if not count:
        raise DataError(f"no box has an area inside its image; {remarks[-1]}")
    # Annotations of images that are not there keep their boxes only, and readers leave them out.
    # Those of images that are there must not, as readers would refuse the image.
    content["annotations"] = [e for e in content["annotations"] if id(e) not in flat]
    write_text(out, json.dumps(content))
    partial.unlink()
    return count, remarks


def _photos(
    content: dict, wanted: Container[int | str | None], images: Path, source: Path
) -> tuple[list[tuple[Path, dict]], list[str]]:
    """(file, entry) of every wanted image that is there, in the order of the files, and in words
    which ones are not. Raises DataError where none is there or one file would be two photos."""
    lookup = Lookup([images], by_base=True)
    found: dict[Path, dict] = {}
    missing: list[str] = []
    for image in content["images"]:
        if as_id(image["id"]) not in wanted:
            continue
        if (name := photo_name(image)) is None:
            raise DataError(
                f'{source}: image {image["id"]} has no "file_name", the name of its photo'
            )
        try:
            path = lookup.find(name)
        except MissingDataError as error:
            missing.append(str(error))
            continue
        first = found.setdefault(path, image)
        if first is not image:
            raise DataError(
                f"{source}: images {first['id']} and {image['id']} are both {path}; keep one, or"
                " keep the photos in the folders that their names say"
            )
    if not found:
        raise DataError(f"{source}: none of its {len(missing)} photos is there; {missing[0]}")
    count = f"{len(missing)} of {len(missing) + len(found)} photos are not there; their"
    remarks = [f"{count} annotations keep their boxes only: {missing[0]}"] if missing else []
    return sorted(found.items(), key=itemgetter(0)), remarks


@command.entry(stopped="stopped; the same command continues")
def main(argv: list[str] | None = None) -> int:
    args = read_boxes(argv)
    prepare_output("--out", args.out)
    count, remarks = convert(args.annotations, args.images, args.vision_pretrained, args.out)
    for remark in remarks:
        print(f"warning: {command.shown(remark)}", file=sys.stderr)
    print(f"{args.out}: {count} new masks")
    return 0
