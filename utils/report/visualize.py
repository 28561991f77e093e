"""Contact sheets of an evaluation: pictures with the masks of an answer over them.

Images are uint8 (H, W, 3) RGB, masks bool (H, W) in the same frame, colours (red, green, blue) in
0-255.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from cores.dataset.drawing import (
    FAINT,
    GAP,
    GROUND_TRUTH_COLOUR,
    HIT_COLOUR,
    IGNORE_COLOUR,
    INK,
    LINE,
    MARGIN,
    MISSED_COLOUR,
    PAPER,
    WRONG_COLOUR,
    draw_lines,
    fit,
    level_colour,
    overlay,
    save_png,
    wrap,
)
from cores.dataset.fonts import Face
from cores.utils.metrics import mask_iou


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


def panels(example: Example, side: int) -> list[tuple[str, np.ndarray]]:
    """(caption, uint8 tile) of the image, every level, the ground truth, and where the last level
    differs from it."""
    image = fit(example.image, side)
    tiles = [("image", image)]
    for level, name in enumerate(example.levels):
        if example.masks is None:
            tiles.append((f"[{name}]  not emitted", np.full_like(image, 236)))
            continue
        mask = example.masks[level]
        # Only the last level is meant to be the target, so an IoU of the others would mislead.
        last = level == len(example.levels) - 1
        score = f"  IoU {100 * mask_iou(mask, example.target, example.ignore):.0f}" if last else ""
        empty = "" if mask.any() else "  (empty)"
        tile = overlay(image, fit(mask, side), level_colour(level, len(example.levels)))
        tiles.append((f"[{name}]{score}{empty}", tile))
    ground_truth = image
    if example.ignore is not None:
        ignore = fit(example.ignore, side)
        ground_truth = overlay(image, ignore, IGNORE_COLOUR, alpha=0.7, contour=0)
    target = fit(example.target, side)
    tiles.append(("ground truth", overlay(ground_truth, target, GROUND_TRUTH_COLOUR)))
    final = None if example.masks is None else example.masks[-1]
    marked = errors(example.image, final, example.target, example.ignore, side)
    return [*tiles, ("compared", marked)]


def errors(
    image: np.ndarray,
    mask: np.ndarray | None,
    target: np.ndarray,
    ignore: np.ndarray | None,
    side: int,
) -> np.ndarray:
    """uint8 tile: the grey picture with the pixels that the mask hits, those that it marks wrongly
    and those that it misses, each in its colour; ignored pixels in none."""
    grey = fit(image, side).mean(axis=2, keepdims=True)
    out = np.repeat(128 + (grey - 128) * 0.5, 3, axis=2)  # Paler, so that colours stand out.
    marked = np.zeros_like(target) if mask is None else mask
    counted = np.ones_like(target) if ignore is None else ~ignore
    for pixels, colour in (
        (marked & target, HIT_COLOUR),
        (marked & ~target, WRONG_COLOUR),
        (~marked & target, MISSED_COLOUR),
    ):
        out[fit(pixels & counted, side)] = colour
    return out.astype(np.uint8)


def draw_row(example: Example, tile: int = 256) -> Image.Image:
    """One example: the tiles with their captions, the query and the answer underneath."""
    tiles = panels(example, tile)
    small, text, bold = Face(12), Face(14), Face(15, bold=True)
    width = len(tiles) * tile + (len(tiles) - 1) * GAP
    query = wrap(example.query, bold, width)
    answer = wrap(f"Answer: {example.answer}", text, width) if example.answer else []
    caption, height = 20, tiles[0][1].shape[0]
    text_height = round(15 * 1.35) * len(query) + round(14 * 1.35) * len(answer) + round(12 * 1.35)
    row = Image.new("RGB", (width, caption + height + GAP + text_height), PAPER)
    draw = ImageDraw.Draw(row)
    for column, (title, picture) in enumerate(tiles):
        x = column * (tile + GAP)
        small.draw(draw, (x, 2), title, INK)
        row.paste(Image.fromarray(picture), (x + (tile - picture.shape[1]) // 2, caption))
    y = draw_lines(draw, (0, caption + height + GAP - 2), query, bold, INK)
    y = draw_lines(draw, (0, y), answer, text, INK)
    draw_lines(draw, (0, y), wrap(example.name, small, width, max_lines=1), small, FAINT)
    return row


def contact_sheet(
    examples: Sequence[Example], path: str | Path, title: str = "", tile: int = 256
) -> Path:
    """Writes a PNG with a title and one row per example; ``tile``: pixels of the longer side of
    every picture.

    Returns the path. Raises ValueError without examples.
    """
    if not examples:
        raise ValueError(f"{path}: there is no example to draw")
    path = Path(path)
    rows = [draw_row(example, tile) for example in examples]
    width = max(row.width for row in rows)
    head = Face(17, bold=True)
    heading = wrap(title, head, width) if title else []
    top = MARGIN + round(17 * 1.35) * len(heading) + (GAP if heading else 0)
    height = top + sum(row.height + 2 * MARGIN for row in rows)
    sheet = Image.new("RGB", (width + 2 * MARGIN, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw_lines(draw, (MARGIN, MARGIN), heading, head, INK)
    y = top
    for row in rows:
        draw.line([(MARGIN, y), (MARGIN + width, y)], fill=LINE)
        sheet.paste(row, (MARGIN, y + MARGIN))
        y += row.height + 2 * MARGIN
    save_png(sheet, path)
    return path
