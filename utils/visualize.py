"""Pictures: overlays and contact sheets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLOURS = ((255, 176, 0), (220, 38, 127), (100, 143, 255), (120, 94, 240))  # told apart with any colour vision
TRUTH = (0, 158, 115)
TILE = 256
MARGIN = 12
INK, PAPER, FAINT = (24, 26, 30), (255, 255, 255), (110, 114, 120)


@dataclass
class Example:
    """One row of a contact sheet: image uint8 (H, W, 3), masks bool (H, W) by level name, coarse to fine, and the truth."""

    image: np.ndarray
    query: str
    answer: str | None
    levels: dict[str, np.ndarray]
    truth: np.ndarray
    iou: float


def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """A font that comes with matplotlib and covers Latin, Greek and Cyrillic."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def overlay(image: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int], alpha: float = 0.5) -> np.ndarray:
    """uint8 (H, W, 3) with the mask tinted and outlined."""
    out = image.copy()
    out[mask] = ((1 - alpha) * image[mask] + alpha * np.array(colour)).astype(np.uint8)
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    width = max(1, round(max(image.shape[:2]) / 250))
    return cv2.drawContours(np.ascontiguousarray(out), contours, -1, colour, width)


def tile(image: np.ndarray, mask: np.ndarray | None, colour: tuple[int, int, int]) -> Image.Image:
    """A TILE × TILE picture; small images are enlarged before the outline is drawn, so it stays thin."""
    height, width = image.shape[:2]
    scale = TILE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    enlarged = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA)
    if mask is not None:
        enlarged = overlay(enlarged, cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST).astype(bool), colour)
    canvas = Image.new("RGB", (TILE, TILE), (240, 241, 243))
    canvas.paste(Image.fromarray(enlarged), ((TILE - size[0]) // 2, (TILE - size[1]) // 2))
    return canvas


def wrap(text: str, width: int, face: ImageFont.FreeTypeFont, lines: int) -> list[str]:
    """At most ``lines`` lines of ``width`` pixels; what does not fit ends in an ellipsis."""
    out: list[str] = [""]
    for word in " ".join(text.split()).split(" "):
        longer = f"{out[-1]} {word}".strip()
        if face.getlength(longer) <= width:
            out[-1] = longer
        else:
            out.append(word)
    if len(out) > lines:
        out = out[:lines]
        out[-1] += " …"
    for index, line in enumerate(out):
        while line and face.getlength(line) > width:
            line = line[:-2] + "…"
        out[index] = line
    return [line for line in out if line]


def contact_sheet(examples: list[Example], path: str | Path, title: str = "") -> None:
    """A PNG with one row per example: image, the mask of every level, the ground truth; query, answer and IoU above each row."""
    if not examples:
        raise ValueError(f"{path}: no examples to draw")
    names = list(examples[0].levels)
    columns = 2 + len(names)
    width = columns * (TILE + MARGIN) + MARGIN
    head, text_height = 64, 62
    sheet = Image.new("RGB", (width, head + len(examples) * (TILE + text_height + MARGIN) + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, 10), wrap(title, width - 2 * MARGIN, font(15, True), 1)[0] if title else "", INK, font(15, True))
    labels = ["image", *(f"[{name}]" + (" (coarse)" if i + 1 < len(names) else " (final)") for i, name in enumerate(names)), "ground truth"]
    colours = [FAINT, *(COLOURS[i % len(COLOURS)] for i in range(len(names))), TRUTH]
    for column, (label, colour) in enumerate(zip(labels, colours, strict=True)):
        x = MARGIN + column * (TILE + MARGIN)
        draw.rectangle((x, 42, x + 12, 54), colour)
        draw.text((x + 18, 40), label, INK, font(13))
    for row, example in enumerate(examples):
        top = head + row * (TILE + text_height + MARGIN)
        _draw_words(draw, example, top, width)
        masks = [None, *example.levels.values(), example.truth]
        for column, (mask, colour) in enumerate(zip(masks, colours, strict=True)):
            sheet.paste(tile(example.image, mask, colour), (MARGIN + column * (TILE + MARGIN), top + text_height))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _draw_words(draw: ImageDraw.ImageDraw, example: Example, top: int, width: int) -> None:
    room = width - 2 * MARGIN - 90
    lines = [(line, font(14, True), INK) for line in wrap(example.query, room, font(14, True), 2 if example.answer is None else 1)]
    if example.answer is not None:
        lines += [(line, font(13), FAINT) for line in wrap(example.answer or "(no answer)", room, font(13), 1)]
    for index, (line, face, colour) in enumerate(lines):
        draw.text((MARGIN, top + 12 + 21 * index), line, colour, face)
    draw.text((width - MARGIN, top + 12), f"IoU {100 * example.iou:.0f}", INK, font(14, True), anchor="ra")
