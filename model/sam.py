"""SAM: sizes, building and loading, frames of reference, and a mask decoder call that serves many images at once.

The modules are segment-anything's own. K targets · C prompt width · G grid side · S padded side; frames as in
docs/architecture.md.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import Tensor, nn

from model.sam_decoder import downscale, to_pixels, to_places, two_way, upscale
from model.sam_encoder import set_fast
from model.weights import load_strict, read_file

PIXEL_MEAN = (123.675, 116.28, 103.53)  # RGB, 0…255
PIXEL_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class SamDims:
    """Sizes of a SAM; the defaults are ViT-B's. Grid and low-res sides follow from image and patch size."""

    image_size: int = 1024
    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    global_attn_indexes: tuple[int, ...] = (2, 5, 8, 11)
    window_size: int = 14
    """Side of an attention window in patches; 0 means global attention in every block."""
    prompt_dim: int = 256
    decoder_heads: int = 8
    decoder_mlp_dim: int = 2048
    mask_in_chans: int = 16
    iou_head_hidden_dim: int = 256

    def __post_init__(self):
        object.__setattr__(self, "global_attn_indexes", tuple(self.global_attn_indexes))  # JSON gives lists
        if self.image_size % self.patch_size:
            raise ValueError(f"sam: image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.embed_dim % self.num_heads or self.prompt_dim % self.decoder_heads:
            raise ValueError("sam: embed_dim must be divisible by num_heads, and prompt_dim by decoder_heads")
        if self.mask_in_chans % 4 or self.mask_in_chans < 8:  # a norm over a quarter of them: one channel would be 0
            raise ValueError(f"sam: mask_in_chans {self.mask_in_chans} must be a multiple of 4 and at least 8")

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    @property
    def low_res(self) -> int:
        """Side of the decoder's masks: it upscales the embedding four times."""
        return 4 * self.grid


PRESETS = {
    "vit_b": SamDims(),
    "vit_l": SamDims(embed_dim=1024, depth=24, num_heads=16, global_attn_indexes=(5, 11, 17, 23)),
    "vit_h": SamDims(embed_dim=1280, depth=32, num_heads=16, global_attn_indexes=(7, 15, 23, 31)),
}


def build_sam(dims: SamDims) -> Sam:
    """A SAM of these sizes with random weights."""
    encoder = set_fast(
        ImageEncoderViT(
            img_size=dims.image_size,
            patch_size=dims.patch_size,
            embed_dim=dims.embed_dim,
            depth=dims.depth,
            num_heads=dims.num_heads,
            mlp_ratio=4,
            out_chans=dims.prompt_dim,
            qkv_bias=True,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=dims.window_size,
            global_attn_indexes=dims.global_attn_indexes,
        )
    )
    return Sam(
        image_encoder=encoder,
        prompt_encoder=PromptEncoder(
            embed_dim=dims.prompt_dim,
            image_embedding_size=(dims.grid, dims.grid),
            input_image_size=(dims.image_size, dims.image_size),
            mask_in_chans=dims.mask_in_chans,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(
                depth=2, embedding_dim=dims.prompt_dim, mlp_dim=dims.decoder_mlp_dim, num_heads=dims.decoder_heads
            ),
            transformer_dim=dims.prompt_dim,
            iou_head_depth=3,
            iou_head_hidden_dim=dims.iou_head_hidden_dim,
        ),
        pixel_mean=list(PIXEL_MEAN),
        pixel_std=list(PIXEL_STD),
    )


def detect_dims(weights: dict[str, Tensor], source: Path | str) -> SamDims:
    """The sizes of the SAM that ``weights`` (its state dict) belong to, read off their shapes.

    Only the number of heads of the mask decoder leaves no trace; it is SAM's 8. Raises ValueError naming ``source``.
    """
    try:
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        width, _, patch, _ = shapes["image_encoder.patch_embed.proj.weight"]
        grid = shapes["image_encoder.pos_embed"][1]
        depth = 1 + max(int(name.split(".")[2]) for name in shapes if name.startswith("image_encoder.blocks."))
        # a block's table of relative positions has 2 · side - 1 rows for a window of that side
        tables = [shapes[f"image_encoder.blocks.{i}.attn.rel_pos_h"] for i in range(depth)]
        sides = [(rows + 1) // 2 for rows, _ in tables]
        windows = {side for side in sides if side != grid}
        if len(windows) > 1:
            raise ValueError(f"windows of different sizes, {sorted(windows)}")
        window = windows.pop() if windows else 0
        return SamDims(
            image_size=grid * patch,
            patch_size=patch,
            embed_dim=width,
            depth=depth,
            num_heads=width // tables[0][1],
            global_attn_indexes=tuple(i for i, side in enumerate(sides) if side == grid) if window else (),
            window_size=window,
            prompt_dim=shapes["image_encoder.neck.0.weight"][0],
            decoder_mlp_dim=shapes["mask_decoder.transformer.layers.0.mlp.lin1.weight"][0],
            mask_in_chans=shapes["prompt_encoder.mask_downscaling.3.weight"][0],
            iou_head_hidden_dim=shapes["mask_decoder.iou_prediction_head.layers.0.weight"][0],
        )
    except (AttributeError, KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{source}: not the weights of a SAM ({type(error).__name__}: {error})") from None


def load_sam(path: str | Path) -> tuple[Sam, SamDims]:
    """A SAM in float32 from an original ``.pth`` or from a folder that ``save_sam`` wrote.

    The sizes of a ``.pth`` (vit_b, vit_l, vit_h or any other) are read off its weights. Raises FileNotFoundError for
    what is not there and ValueError for a file that holds no SAM or other weights than its sizes ask for.
    """
    path = Path(path)
    dims, weights = _read_folder(path) if path.is_dir() else _read_pth(path)
    sam = build_sam(dims)
    load_strict(sam, weights, path)
    return sam, dims


def _read_folder(folder: Path) -> tuple[SamDims, dict[str, Tensor]]:
    config, weights = folder / "sam.json", folder / "sam.safetensors"
    for file in (config, weights):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: not found (--vision_pretrained: a SAM .pth or a folder with sam.json)")
    try:
        dims = SamDims(**json.loads(config.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{config}: not the sizes of a SAM: {error}") from error
    return dims, read_file(weights)


def _read_pth(path: Path) -> tuple[SamDims, dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found (--vision_pretrained: a SAM .pth or a folder with sam.json)")
    weights = read_file(path)
    return detect_dims(weights, path), weights


def save_sam(sam: Sam, dims: SamDims, folder: str | Path) -> None:
    """Writes sam.json and sam.safetensors in the weights' own dtype; ``load_sam`` makes float32 of it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sam.json").write_text(json.dumps(asdict(dims), indent=1) + "\n")
    save_file({k: v.contiguous() for k, v in sam.state_dict().items()}, folder / "sam.safetensors")


# --------------------------------------------------------------------------------------------------------------- frames


def resized_size(height: int, width: int, image_size: int) -> tuple[int, int]:
    """(height, width) in the resized frame: the longer side becomes ``image_size``. ValueError below one pixel."""
    scale = image_size / max(height, width)
    size = int(height * scale + 0.5), int(width * scale + 0.5)
    if min(size) < 1:
        raise ValueError(f"an image of {width}×{height} pixels is too narrow for SAM's {image_size} pixels")
    return size


def resize_longest_side(image: np.ndarray, image_size: int) -> np.ndarray:
    """uint8 (H, W, 3), original frame -> uint8 (h, w, 3), resized frame, read-only; bilinear with antialiasing."""
    height, width = resized_size(*image.shape[:2], image_size)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def preprocess(image: np.ndarray, image_size: int) -> tuple[Tensor, tuple[int, int]]:
    """uint8 (H, W, 3) RGB, original frame -> float (3, S, S), normalised, padded right and below; (h, w) resized."""
    resized = resize_longest_side(image, image_size)
    height, width = resized.shape[:2]
    pixels = torch.zeros(3, image_size, image_size)
    # channel by channel, in place: on whole pictures every step would write another 12 MB
    for channel, values, mean, std in zip(pixels, cv2.split(resized), PIXEL_MEAN, PIXEL_STD, strict=True):
        channel[:height, :width].copy_(torch.from_numpy(values)).sub_(mean).div_(std)
    return pixels, (height, width)


def to_original(low_res: Tensor, resized: tuple[int, int], original: tuple[int, int], image_size: int) -> Tensor:
    """Mask logits (K, h, w) low-res -> float32 (K, H, W) original: up to the padded frame, cropped, resized.

    In float32 whatever the model's dtype: half precision moves mask borders.
    """
    masks = F.interpolate(low_res[:, None].float(), (image_size, image_size), mode="bilinear", align_corners=False)
    masks = masks[..., : resized[0], : resized[1]]
    return F.interpolate(masks, original, mode="bilinear", align_corners=False)[:, 0]


def to_grid(masks: Tensor, resized: tuple[int, int], image_size: int, grid: int) -> Tensor:
    """Masks bool (K, H, W) original -> float (K, G, G): the share of each cell of the padded frame they cover.

    Mask by mask: as floats they are large.
    """
    out = torch.zeros((len(masks), grid, grid), device=masks.device)
    for share, mask in zip(out, masks, strict=True):
        scaled = F.interpolate(mask[None, None].float(), resized, mode="area")
        padded = F.pad(scaled, (0, image_size - resized[1], 0, image_size - resized[0]))
        share.copy_(F.adaptive_avg_pool2d(padded, grid)[0, 0])
    return out


def valid_cells(resized: tuple[int, int], image_size: int, grid: int, device: torch.device | None = None) -> Tensor:
    """float (G, G): the share of every cell that is image rather than padding."""
    padded = torch.zeros((1, 1, image_size, image_size), device=device)
    padded[..., : resized[0], : resized[1]] = 1
    return F.adaptive_avg_pool2d(padded, grid)[0, 0]


# -------------------------------------------------------------------------------------------------------------- decoder


def no_mask_prompt(sam: Sam, count: int) -> Tensor:
    """The dense prompt "no mask": (K, C, G, G)."""
    grid = sam.prompt_encoder.image_embedding_size
    return sam.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(count, -1, *grid)


def mask_prompt(sam: Sam, low_res: Tensor) -> Tensor:
    """Low-res logits (K, h, w) as a dense prompt (K, C, G, G)."""
    places = downscale(sam.prompt_encoder.mask_downscaling, to_places(low_res))
    return places.transpose(1, 2).unflatten(2, sam.prompt_encoder.image_embedding_size)


def position_encoding(sam: Sam) -> Tensor:
    """SAM's positional encoding of every cell, float32 (1, C, G, G), whatever the dtype of the weights.

    segment-anything's ``get_dense_pe`` multiplies float32 coordinates by the matrix as it is, which fails once a model
    is half precision; a phase of many turns would not survive half precision either.
    """
    grid_h, grid_w = sam.prompt_encoder.image_embedding_size
    frequencies = sam.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix.float()  # (2, C / 2), rows x and y
    x = (torch.arange(grid_w, device=frequencies.device) + 0.5) / grid_w
    y = (torch.arange(grid_h, device=frequencies.device) + 0.5) / grid_h
    centres = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)  # (G, G, 2) as (x, y) in [0, 1]
    phase = 2 * torch.pi * ((2 * centres - 1) @ frequencies)
    return torch.cat([phase.sin(), phase.cos()], dim=-1).permute(2, 0, 1)[None]


def decode_masks(sam: Sam, embeddings: Tensor, sparse: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
    """One mask per row: embeddings (K, C, G, G), sparse (K, n, C), dense (K, C, G, G) -> logits (K, 4G, 4G), IoU (K,).

    Logits are low-res, IoU is SAM's own estimate, both of the single-mask output (mask token 0). segment-anything's
    ``MaskDecoder.forward`` repeats one image for all prompts; here every row brings its image, so the targets of a
    whole batch are decoded at once. Equal otherwise.
    """
    decoder = sam.mask_decoder
    rows = embeddings.shape[0]
    tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])[None].expand(rows, -1, -1)
    tokens = torch.cat([tokens.to(sparse.dtype), sparse], dim=1)
    position = position_encoding(sam)[0].flatten(1).T.to(embeddings.dtype)
    places = (embeddings + dense).flatten(2).transpose(1, 2)
    out, places = two_way(decoder.transformer, places, position, tokens)
    logits = to_pixels(upscale(decoder, places, decoder.output_hypernetworks_mlps[0](out[:, 1])))
    return logits, decoder.iou_prediction_head(out[:, 0])[:, 0]
