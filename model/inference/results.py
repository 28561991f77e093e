"""What an answer is: masks with their numbers, files, JSON and COCO; and an answer in the making.

H, W a picture in the original frame.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cores.dataset.drawing import fit, level_colour, overlay
from cores.dataset.files.rle import encode_rle
from cores.dataset.files.write import writing

SHOWN_SIDE = 480  # pixels of a picture's longer side in a notebook


@dataclass(repr=False)
class AnswerMask:
    """One group of answer tokens, [LOC] … [SEG]: the mask that was asked for and the coarser ones
    on the way to it."""

    levels: dict[str, np.ndarray]
    """Level name, coarse to fine -> bool (H, W)."""
    ious: dict[str, float]
    """Level name -> SAM's own prediction of its mask's IoU; of a selector's, the highest IoP among
    what it united."""

    def __repr__(self) -> str:
        levels = ", ".join(f"{name}: {int(m.sum())} pixels" for name, m in self.levels.items())
        return f"AnswerMask({levels}; predicted IoU {self.predicted_iou:.2f})"

    @property
    def mask(self) -> np.ndarray:
        """bool (H, W): the last level's."""
        return list(self.levels.values())[-1]

    @property
    def coarse(self) -> dict[str, np.ndarray]:
        """The levels before the last one; empty for LISA."""
        return dict(islice(self.levels.items(), len(self.levels) - 1))

    @property
    def predicted_iou(self) -> float:
        return list(self.ious.values())[-1]

    @property
    def area(self) -> int:
        """Pixels of ``mask``."""
        return int(self.mask.sum())

    @property
    def box(self) -> tuple[int, int, int, int] | None:
        """(x0, y0, x1, y1) around ``mask`` in pixels, x1 and y1 exclusive; None where it is
        empty."""
        if not self.mask.any():
            return None
        columns, rows = (np.flatnonzero(self.mask.any(axis)) for axis in (0, 1))
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1

    @property
    def rle(self) -> dict[str, Any]:
        """``mask`` as COCO's compressed run lengths."""
        return encode_rle(self.mask)

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold of it, the coarse masks as "chain"."""
        coarse = [
            {"level": name, "rle": encode_rle(mask), "predicted_iou": round(self.ious[name], 4)}
            for name, mask in self.coarse.items()
        ]
        box, iou = None if self.box is None else list(self.box), round(self.predicted_iou, 4)
        numbers = {"box": box, "area": self.area, "predicted_iou": iou}
        return {"rle": self.rle, **numbers, "chain": coarse}


@dataclass(repr=False)
class Result:
    """One answer. An answer without a complete group of answer tokens has no ``masks``."""

    image: np.ndarray
    """uint8 (H, W, 3) RGB."""
    name: str
    """Path of the picture, or "image"."""
    question: str
    text: str
    """The answer, its tokens written as [LOC] and [SEG]."""
    masks: list[AnswerMask]
    token_ids: list[int]
    """Of the answer, without the end token."""
    finished: bool
    """False: the answer was cut at the limit of new tokens."""
    forgotten_turns: int = 0
    """The oldest turns of the conversation that had to be left out for this question to fit."""
    level_names: tuple[str, ...] = ()
    """Of the model, coarse to fine."""

    @property
    def why_no_mask(self) -> str | None:
        """What the answer lacks, in words; None where it has a mask."""
        if self.masks:
            return None
        wanted = " ".join(f"[{name}]" for name in self.level_names)
        said = [name for name in re.findall(r"\[(\w+)\]", self.text) if name in self.level_names]
        if not said:
            return f"the answer does not say {wanted}" if wanted else "the answer names nothing"
        words = " ".join(f"[{name}]" for name in said)
        return f"the answer says {words}, and a mask needs {wanted}, in this order"

    def __repr__(self) -> str:
        height, width = self.image.shape[:2]
        return f"Result({self.text!r}, masks={self.masks}, image {height}×{width})"

    def _repr_png_(self) -> bytes:
        """What a notebook shows that takes no HTML: the masks over the picture."""
        return _png(self.overlay())

    def _repr_html_(self) -> str:
        """What a notebook shows: the question, the answer, and the mask of every level with its
        numbers."""
        tiles = [("", self.image)] if not self.masks else []
        for found in self.masks:
            for level, (name, mask) in enumerate(found.levels.items()):
                colour = level_colour(level, len(found.levels))
                size = f"{int(mask.sum())} pixels" if mask.any() else "empty"
                caption = f"[{name}] {size}, predicted IoU {found.ious[name]:.2f}"
                tiles.append((caption, overlay(self.image, mask, colour)))
        figures = "".join(
            '<figure style="display:inline-block;margin:4px"><img style="max-width:100%"'
            f' alt="{html.escape(caption or self.name)}"'
            f' src="data:image/png;base64,{base64.b64encode(_png(picture)).decode()}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
            for caption, picture in tiles
        )
        notes = ""
        if reason := self.why_no_mask:
            notes = f"<p>No mask: {html.escape(reason)}.</p>"
        if not self.finished:
            notes += "<p>The answer was cut at the limit of new tokens.</p>"
        question, text = html.escape(self.question), html.escape(self.text)
        return f"<p><b>{question}</b></p><p>{text}</p>{notes}{figures}"

    def overlay(self, coarse: bool = False, alpha: float = 0.45) -> np.ndarray:
        """uint8 (H, W, 3): the masks over the picture, with ``coarse`` those on the way to them
        below; alpha in [0, 1]."""
        out = self.image.copy()
        for found in self.masks:
            for level, (name, mask) in enumerate(found.levels.items()):
                if coarse or name not in found.coarse:
                    out = overlay(out, mask, level_colour(level, len(found.levels)), alpha)
        return out

    def save(self, folder: str | Path) -> dict[str, Any]:
        """Writes every mask of every level (PNG, 0 or 255) and the overlay under new names;
        overwrites nothing.

        Returns {"masks": one {level: path} per mask, "overlay": path or None}. Raises OSError where
        it cannot write.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not self.masks:
            return {"masks": [], "overlay": None}
        stem, files = _free_stem(folder, Path(self.name).stem), []
        for index, found in enumerate(self.masks):
            paths = {name: folder / f"{stem}_{index}_{_safe(name)}.png" for name in found.levels}
            for name, mask in found.levels.items():
                with writing(paths[name]) as partial:
                    Image.fromarray(255 * mask.astype(np.uint8)).save(partial, "PNG")
            files.append({name: str(path) for name, path in paths.items()})
        picture = folder / f"{stem}_overlay.png"
        with writing(picture) as partial:
            Image.fromarray(self.overlay()).save(partial, "PNG")
        return {"masks": files, "overlay": str(picture)}

    def to_dict(self, files: dict[str, Any] | None = None) -> dict[str, Any]:
        """What JSON can hold; ``files``: what ``save`` returned."""
        report: dict[str, Any] = {"image": self.name, "question": self.question, "text": self.text}
        masks = [found.to_dict() for found in self.masks]
        report |= {"finished": self.finished, "masks": masks}
        report["why_no_mask"] = self.why_no_mask
        if files is not None:
            for row, paths in zip(masks, files["masks"], strict=True):
                row["files"] = paths
            report["overlay"] = files["overlay"]
        return report | {"forgotten_turns": self.forgotten_turns}

    def to_coco(self, image_id: int = 1) -> dict[str, Any]:
        """A COCO data set of one picture; boxes are COCO's [x, y, width, height], ``score`` is the
        predicted IoU."""
        height, width = self.image.shape[:2]
        image = {"id": image_id, "file_name": Path(self.name).name}
        rows = []
        for number, found in enumerate(self.masks, start=1):
            x0, y0, x1, y1 = found.box or (0, 0, 0, 0)
            row: dict[str, Any] = {"id": number, "image_id": image_id, "category_id": 1}
            row |= {"segmentation": found.rle, "area": found.area, "iscrowd": 0}
            box = [x0, y0, x1 - x0, y1 - y0]
            rows.append(row | {"bbox": box, "score": found.predicted_iou})
        return {
            "images": [image | {"height": height, "width": width}],
            "categories": [{"id": 1, "name": self.question}],
            "annotations": rows,
        }


def _png(picture: np.ndarray) -> bytes:
    """A uint8 (H, W, 3) picture as PNG, no side longer than SHOWN_SIDE."""
    longest = max(picture.shape[:2])
    out = io.BytesIO()
    Image.fromarray(fit(picture, min(SHOWN_SIDE, longest))).save(out, "PNG")
    return out.getvalue()


def _safe(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)


def _free_stem(folder: Path, stem: str) -> str:
    """STEM_000, or the number after the highest one in use."""
    # File systems limit names by their bytes, not by their characters.
    stem = _safe(stem).encode()[:100].decode(errors="ignore")
    used = [re.match(re.escape(stem) + r"_(\d{3,})_", path.name) for path in folder.iterdir()]
    return f"{stem}_{max((int(match[1]) + 1 for match in used if match), default=0):03d}"


class Stream(Iterator[str]):
    """An answer in the making: iterate over its pieces of text, which join to ``result.text``; then
    take ``result``."""

    def __init__(self, pieces: Generator[str, None, Result]):
        self._pieces = pieces
        self._result: Result | None = None

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration as end:
            self._result = self._result or end.value
            raise

    @property
    def result(self) -> Result:
        """Waits for the end of the answer. Raises ValueError where the answer was given up before
        its end."""
        for _ in self:
            pass
        if self._result is None:
            raise ValueError(
                "this answer was interrupted, by an error or by another question of its session;"
                " ask again"
            )
        return self._result

    def close(self) -> None:
        """Gives the answer up; the conversation stays as it was before the question."""
        self._pieces.close()
