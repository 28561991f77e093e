"""Masks laid over an image.

Images are uint8 (H, W, 3) RGB, masks bool (H, W) in the same frame, colours (red, green, blue) in 0-255.
"""

from __future__ import annotations

import cv2
import numpy as np

# Told apart by people with any kind of colour vision; coarse to fine, the last one for the answer itself.
COARSE_COLOURS = ((60, 170, 240), (240, 200, 40), (170, 110, 230))
FINAL_COLOUR = (240, 50, 110)


def level_colour(level: int, levels: int) -> tuple[int, int, int]:
    """The last level always has the same colour, however many come before it."""
    return FINAL_COLOUR if level == levels - 1 else COARSE_COLOURS[level % len(COARSE_COLOURS)]


def overlay(image: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int], alpha: float = 0.45, contour: int = 2) -> np.ndarray:
    """A copy of ``image`` with ``mask`` tinted, and outlined from outside so that the tint shows its exact pixels.

    ``alpha``: share of the colour in [0, 1]; ``contour``: pixels of the outline, 0 for none. A thin white line around
    it keeps the outline visible on a ground of its own colour. Raises ValueError if image and mask differ in size.
    """
    if image.shape[:2] != mask.shape:
        raise ValueError(f"overlay: image {image.shape[:2]} and mask {mask.shape} differ in size")
    out = image.copy()
    if contour:
        outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        # a line is drawn around its middle: half of it falls on the mask and is painted over below
        cv2.drawContours(out, outlines, -1, (255, 255, 255), 2 * contour + 2, cv2.LINE_AA)
        cv2.drawContours(out, outlines, -1, colour, 2 * contour, cv2.LINE_AA)
    out[mask] = np.round((1 - alpha) * image[mask] + alpha * np.array(colour)).astype(np.uint8)
    return out
