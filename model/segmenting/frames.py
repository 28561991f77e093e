"""Frames of reference: original pictures into SAM's padded input, low-res masks back into the
picture, masks onto SAM's grid.

K masks · G grid side · S padded side; the frames are named in docs/architecture.md.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

PIXEL_MEAN = (123.675, 116.28, 103.53)  # RGB, 0…255
PIXEL_STD = (58.395, 57.12, 57.375)


def resized_size(height: int, width: int, image_size: int) -> tuple[int, int]:
    """(height, width) in the resized frame: the longer side becomes ``image_size``. Raises
    ValueError where the shorter one would have no pixel."""
    scale = image_size / max(height, width)
    size = int(height * scale + 0.5), int(width * scale + 0.5)
    if min(size) < 1:
        raise ValueError(
            f"an image of {width}×{height} pixels is too narrow for SAM's {image_size} pixels"
        )
    return size


def resize_longest_side(image: np.ndarray, image_size: int) -> np.ndarray:
    """uint8 (H, W, 3), original frame -> uint8 (h, w, 3), resized frame, read-only; bilinear with
    antialiasing."""
    height, width = resized_size(image.shape[0], image.shape[1], image_size)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def preprocess(image: np.ndarray, image_size: int) -> tuple[Tensor, tuple[int, int]]:
    """uint8 (H, W, 3) RGB, original frame -> float (3, S, S), normalised, padded right and below;
    (h, w) resized."""
    resized = resize_longest_side(image, image_size)
    height, width = resized.shape[:2]
    pixels = torch.zeros(3, image_size, image_size)
    # It goes channel by channel in place, because every step on the whole picture would write
    # another 12 MB.
    for channel, values, mean, std in zip(
        pixels, cv2.split(resized), PIXEL_MEAN, PIXEL_STD, strict=True
    ):
        channel[:height, :width].copy_(torch.from_numpy(values)).sub_(mean).div_(std)
    return pixels, (height, width)


def to_original(
    low_res: Tensor, resized: tuple[int, int], original: tuple[int, int], image_size: int
) -> Tensor:
    """Mask logits (K, h, w) low-res -> float32 (K, H, W) original: enlarged to the padded frame,
    cropped to the resized one, resized.

    It works in float32 whatever the model's dtype, because half precision moves mask borders.
    """
    padded, masks = (image_size, image_size), low_res[:, None].float()
    masks = F.interpolate(masks, padded, mode="bilinear", align_corners=False)
    masks = masks[..., : resized[0], : resized[1]]
    return F.interpolate(masks, original, mode="bilinear", align_corners=False)[:, 0]


def to_grid(masks: Tensor, resized: tuple[int, int], image_size: int, grid: int) -> Tensor:
    """Masks bool (K, H, W) original -> float (K, G, G): the share of each cell of the padded frame
    that they cover. Masks are large as floats, so it goes mask by mask."""
    out = torch.zeros((len(masks), grid, grid), device=masks.device)
    for share, mask in zip(out, masks, strict=True):
        scaled = F.interpolate(mask[None, None].float(), resized, mode="area")
        padded = F.pad(scaled, (0, image_size - resized[1], 0, image_size - resized[0]))
        share.copy_(F.adaptive_avg_pool2d(padded, grid)[0, 0])
    return out


def valid_cells(
    resized: tuple[int, int], image_size: int, grid: int, device: torch.device | None = None
) -> Tensor:
    """float (G, G): the share of every cell that is image rather than padding."""
    padded = torch.zeros((1, 1, image_size, image_size), device=device)
    padded[..., : resized[0], : resized[1]] = 1
    return F.adaptive_avg_pool2d(padded, grid)[0, 0]
