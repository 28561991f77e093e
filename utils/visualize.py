"""Pictures for people: masks laid over an image, and contact sheets of an evaluation.

Images are uint8 (H, W, 3) RGB, masks bool (H, W) in the same frame, colours (red, green, blue) in 0-255.
"""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dataset.drawing import level_colour, overlay
from utils.metrics import mask_iou

TRUTH_COLOUR = (20, 190, 100)
IGNORE_COLOUR = (120, 120, 120)

INK, FAINT, PAPER, LINE = (25, 28, 33), (110, 116, 125), (255, 255, 255), (222, 225, 230)
MARGIN, GAP = 16, 8
MAX_LINES = 4  # of one text


@dataclass
class Example:
    """One answer to one query, ready to be drawn."""

    image: np.ndarray
    """uint8 (H, W, 3) RGB, original frame."""
    query: str
    answer: str
    """The text of a free answer; "" in teacher-forced evaluation."""
    levels: list[str]
    masks: np.ndarray | None
    """bool (T, H, W), one per level; None if the answer holds no mask."""
    target: np.ndarray
    """bool (H, W)."""
    ignore: np.ndarray | None
    """bool (H, W): pixels that are not scored."""
    name: str
    """Data set and sample."""


def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: Latin, Greek, Cyrillic and more, the same on every machine."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def printable(text: str) -> str:
    """``text`` in one line without control characters."""
    kept = (" " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c)[0] != "C")
    return " ".join("".join(kept).split())


def wrap(text: str, face: ImageFont.FreeTypeFont, width: int, max_lines: int = MAX_LINES) -> list[str]:
    """Lines of at most ``width`` pixels; a longer word is broken, a text of more lines ends with "…"."""
    lines = [""]
    for word in printable(text).split():
        joined = f"{lines[-1]} {word}".strip()
        if face.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if lines[-1] and face.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    if len(lines) > max_lines:
        lines = lines[:max_lines]
        while lines[-1] and face.getlength(lines[-1] + "…") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] = lines[-1].rstrip() + "…"
    return lines


def fit(array: np.ndarray, side: int) -> np.ndarray:
    """An image or a mask scaled so that its longer side is ``side``; masks stay bool."""
    height, width = array.shape[:2]
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    if array.dtype == bool:
        return cv2.resize(array.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST).astype(bool)
    return cv2.resize(array, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


def panels(example: Example, side: int) -> list[tuple[str, np.ndarray]]:
    """(caption, uint8 tile) of the image, every level and the ground truth."""
    image = fit(example.image, side)
    panels = [("image", image)]
    for level, name in enumerate(example.levels):
        if example.masks is None:
            panels.append((f"[{name}]  not emitted", np.full_like(image, 236)))
            continue
        mask = example.masks[level]
        # only the last level is meant to be the target; for the others the number would mislead
        last = level == len(example.levels) - 1
        score = f"  IoU {100 * mask_iou(mask, example.target, example.ignore):.0f}" if last else ""
        empty = "" if mask.any() else "  (empty)"
        tile = overlay(image, fit(mask, side), level_colour(level, len(example.levels)))
        panels.append((f"[{name}]{score}{empty}", tile))
    truth = image
    if example.ignore is not None:
        truth = overlay(truth, fit(example.ignore, side), IGNORE_COLOUR, alpha=0.7, contour=0)
    panels.append(("ground truth", overlay(truth, fit(example.target, side), TRUTH_COLOUR)))
    return panels


def _draw_lines(
    draw: ImageDraw.ImageDraw, xy: tuple[int, int], lines: Sequence[str], face: ImageFont.FreeTypeFont, colour: tuple
) -> int:
    """Draws text lines from the top left corner ``xy`` (x, y); returns the y below the last one."""
    x, y = xy
    step = round(face.size * 1.35)
    for line in lines:
        draw.text((x, y), line, font=face, fill=colour)
        y += step
    return y


def draw_row(example: Example, tile: int = 256) -> Image.Image:
    """One example: the tiles with their captions, the query and the answer underneath."""
    tiles = panels(example, tile)
    small, text, bold = font(12), font(14), font(15, bold=True)
    width = len(tiles) * tile + (len(tiles) - 1) * GAP
    query = wrap(example.query, bold, width)
    answer = wrap(f"Answer: {example.answer}", text, width) if example.answer else []
    caption, height = 20, tiles[0][1].shape[0]
    text_height = round(15 * 1.35) * len(query) + round(14 * 1.35) * len(answer) + round(12 * 1.35)
    row = Image.new("RGB", (width, caption + height + GAP + text_height), PAPER)
    draw = ImageDraw.Draw(row)
    for column, (title, picture) in enumerate(tiles):
        x = column * (tile + GAP)
        draw.text((x, 2), title, font=small, fill=INK)
        row.paste(Image.fromarray(picture), (x + (tile - picture.shape[1]) // 2, caption))
    y = _draw_lines(draw, (0, caption + height + GAP - 2), query, bold, INK)
    y = _draw_lines(draw, (0, y), answer, text, INK)
    _draw_lines(draw, (0, y), wrap(example.name, small, width, max_lines=1), small, FAINT)
    return row


def contact_sheet(examples: Sequence[Example], path: str | Path, title: str = "", tile: int = 256) -> Path:
    """Writes a PNG with a title and one row per example; ``tile``: pixels of the longer side of every picture.

    Returns the path. Raises ValueError without examples.
    """
    if not examples:
        raise ValueError(f"{path}: there is no example to draw")
    path = Path(path)
    rows = [draw_row(example, tile) for example in examples]
    width = max(row.width for row in rows)
    head = font(17, bold=True)
    heading = wrap(title, head, width) if title else []
    top = MARGIN + round(17 * 1.35) * len(heading) + (GAP if heading else 0)
    height = top + sum(row.height + 2 * MARGIN for row in rows)
    sheet = Image.new("RGB", (width + 2 * MARGIN, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    _draw_lines(draw, (MARGIN, MARGIN), heading, head, INK)
    y = top
    for row in rows:
        draw.line([(MARGIN, y), (MARGIN + width, y)], fill=LINE)
        sheet.paste(row, (MARGIN, y + MARGIN))
        y += row.height + 2 * MARGIN
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(buffer.getvalue())
    partial.replace(path)
    return path
