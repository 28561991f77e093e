"""Pictures for people: masks laid over an image, texts that fit; shared by the check of data sets
and the sheets of an evaluation.

Images are uint8 (H, W, 3) RGB, masks bool (H, W) in the same frame, colours (red, green, blue) in
0-255.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw

from cores.dataset.files.write import writing
from cores.dataset.fonts import Face

# People with any kind of colour vision can tell these apart. The coarse levels have their own, the
# last level always has the final one.
COARSE_COLOURS = ((60, 170, 240), (240, 200, 40), (170, 110, 230))
FINAL_COLOUR = (240, 50, 110)
GROUND_TRUTH_COLOUR = (20, 190, 100)
IGNORE_COLOUR = (120, 120, 120)
# Of Okabe and Ito's palette, which people who see few colours can tell apart, too.
HIT_COLOUR, WRONG_COLOUR, MISSED_COLOUR = (0, 114, 178), (230, 159, 0), (204, 121, 167)
TARGET_COLOURS = ((240, 50, 110), (60, 140, 240), (240, 170, 30), (20, 190, 100), (150, 90, 220))
INK, FAINT, PAPER, LINE = (25, 28, 33), (110, 116, 125), (255, 255, 255), (222, 225, 230)
MARGIN, GAP = 16, 8
MAX_LINES = 4  # of one text


def level_colour(level: int, levels: int) -> tuple[int, int, int]:
    """The last level always has the same colour, however many come before it."""
    return FINAL_COLOUR if level == levels - 1 else COARSE_COLOURS[level % len(COARSE_COLOURS)]


def overlay(
    image: np.ndarray,
    mask: np.ndarray,
    colour: tuple[int, int, int],
    alpha: float = 0.45,
    contour: int = 2,
) -> np.ndarray:
    """A copy of ``image`` with ``mask`` tinted, and outlined on the outside only, so that the tint
    shows the exact pixels of the mask.

    ``alpha``: share of the colour in [0, 1]; ``contour``: pixels of the outline, 0 for none. A thin
    white line around it keeps the outline visible on a ground of its own colour. Raises ValueError
    if image and mask differ in size.
    """
    if image.shape[:2] != mask.shape:
        raise ValueError(f"overlay: image {image.shape[:2]} and mask {mask.shape} differ in size")
    out = image.copy()
    if contour:
        outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        # A line is drawn around its middle: the half that falls on the mask is painted over below.
        cv2.drawContours(out, outlines, -1, (255, 255, 255), 2 * contour + 2, cv2.LINE_AA)
        cv2.drawContours(out, outlines, -1, colour, 2 * contour, cv2.LINE_AA)
    out[mask] = np.round((1 - alpha) * image[mask] + alpha * np.array(colour)).astype(np.uint8)
    return out


def printable(text: str) -> str:
    """``text`` in one line without control characters."""
    kept = (c for c in text if c.isspace() or unicodedata.category(c)[0] != "C")
    return " ".join("".join(kept).split())


def wrap(text: str, face: Face, width: int, max_lines: int = MAX_LINES) -> list[str]:
    """Lines of at most ``width`` pixels; a longer word is broken, a text of more lines ends with
    "…"."""
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
        scaled = cv2.resize(array.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
        return scaled.astype(bool)
    return cv2.resize(array, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


def draw_lines(
    draw: ImageDraw.ImageDraw,
    xy: tuple[int, int],
    lines: Sequence[str],
    face: Face,
    colour: tuple,
) -> int:
    """Draws text lines from the top left corner ``xy`` (x, y); returns the y below the last one."""
    x, y = xy
    step = round(face.size * 1.35)
    for line in lines:
        face.draw(draw, (x, y), line, colour)
        y += step
    return y


def save_png(picture: Image.Image, path: Path) -> None:
    """Writes in one step: the file is never half written."""
    with writing(path) as partial:
        picture.save(partial, format="PNG", optimize=True)


@dataclass
class QueryCard:
    """One query on its image."""

    image: np.ndarray
    """uint8 (H, W, 3) RGB, original frame."""
    masks: np.ndarray
    """bool (K, H, W): the targets."""
    ignore: np.ndarray | None
    """bool (H, W): pixels that do not count."""
    query: str
    note: str
    """What else there is to say, such as the answer to a question without target."""
    name: str


def draw_card(card: QueryCard, side: int) -> Image.Image:
    """The image with its targets, each in a colour of its own, and the query underneath; ``side``:
    width in pixels."""
    shown = fit(card.image, side)
    if card.ignore is not None:
        shown = overlay(shown, fit(card.ignore, side), IGNORE_COLOUR, alpha=0.7, contour=0)
    for number, mask in enumerate(card.masks):
        colour = TARGET_COLOURS[number % len(TARGET_COLOURS)]
        shown = overlay(shown, _never_empty(mask, fit(mask, side)), colour)
    what = f"{len(card.masks)} targets" if len(card.masks) > 1 else ""
    what += " empty target" if len(card.masks) and not card.masks.any() else ""
    caption = "  ".join(part for part in (card.name, what.strip()) if part)
    small, text = Face(11), Face(13)
    query = wrap(card.query, text, side, max_lines=5)
    note = wrap(card.note, text, side, max_lines=2) if card.note else []
    height = shown.shape[0] + GAP + round(13 * 1.35) * (len(query) + len(note)) + round(11 * 1.35)
    picture = Image.new("RGB", (side, height), PAPER)
    picture.paste(Image.fromarray(shown), ((side - shown.shape[1]) // 2, 0))
    draw = ImageDraw.Draw(picture)
    y = draw_lines(draw, (0, shown.shape[0] + GAP - 3), query, text, INK)
    y = draw_lines(draw, (0, y), note, text, FAINT)
    draw_lines(draw, (0, y), wrap(caption, small, side, max_lines=1), small, FAINT)
    return picture


def _never_empty(mask: np.ndarray, scaled: np.ndarray) -> np.ndarray:
    """``scaled``, or one pixel where scaling made the target ``mask`` vanish, so that it is still
    seen."""
    if mask.any() and not scaled.any():
        y, x = np.argwhere(mask)[0]
        scaled = scaled.copy()
        scaled[y * scaled.shape[0] // mask.shape[0], x * scaled.shape[1] // mask.shape[1]] = True
    return scaled


def card_sheet(
    cards: Sequence[QueryCard], path: str | Path, title: str, columns: int = 4, side: int = 256
) -> Path:
    """Writes a PNG with a title and the cards in rows of ``columns``. Returns the path. Raises
    ValueError without cards."""
    if not cards:
        raise ValueError(f"{path}: there is nothing to draw")
    path = Path(path)
    columns = min(columns, len(cards))
    pictures = [draw_card(card, side) for card in cards]
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    heights = [max(picture.height for picture in row) for row in rows]
    width = columns * side + (columns - 1) * MARGIN
    head = Face(14, bold=True)
    heading = wrap(title, head, width)
    y = MARGIN + round(14 * 1.35) * len(heading) + GAP
    sheet = Image.new("RGB", (width + 2 * MARGIN, y + sum(heights) + MARGIN * len(rows)), PAPER)
    draw_lines(ImageDraw.Draw(sheet), (MARGIN, MARGIN), heading, head, INK)
    for row, height in zip(rows, heights, strict=True):
        for number, picture in enumerate(row):
            sheet.paste(picture, (MARGIN + number * (side + MARGIN), y))
        y += height + MARGIN
    save_png(sheet, path)
    return path
