"""Files of a SAM: the original .pth, whose sizes are read off its weights, and folders that this
program wrote."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file
from segment_anything.modeling import Sam
from torch import Tensor

from model.checkpoints.weights import load_strict, read_file
from model.config import SamDims
from model.segmenting.sam import build_sam

PRESETS = {
    "vit_b": SamDims(),
    "vit_l": SamDims(embed_dim=1024, depth=24, num_heads=16, global_attn_indexes=(5, 11, 17, 23)),
    "vit_h": SamDims(embed_dim=1280, depth=32, num_heads=16, global_attn_indexes=(7, 15, 23, 31)),
}


def detect_dims(weights: dict[str, Tensor], source: Path | str) -> SamDims:
    """The sizes of the SAM that ``weights`` (its state dict) belong to, read off their shapes.

    Only the number of heads of the mask decoder leaves no trace; it is SAM's 8. Raises ValueError
    naming ``source``.
    """
    try:
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        width, _, patch, _ = shapes["image_encoder.patch_embed.proj.weight"]
        grid = shapes["image_encoder.pos_embed"][1]
        depth = 1 + max(
            int(name.split(".")[2]) for name in shapes if name.startswith("image_encoder.blocks.")
        )
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
            global_attn_indexes=(
                tuple(i for i, side in enumerate(sides) if side == grid) if window else ()
            ),
            window_size=window,
            prompt_dim=shapes["image_encoder.neck.0.weight"][0],
            decoder_mlp_dim=shapes["mask_decoder.transformer.layers.0.mlp.lin1.weight"][0],
            mask_in_chans=shapes["prompt_encoder.mask_downscaling.3.weight"][0],
            iou_head_hidden_dim=shapes["mask_decoder.iou_prediction_head.layers.0.weight"][0],
        )
    except (AttributeError, KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"{source}: not the weights of a SAM ({type(error).__name__}: {error})"
        ) from None


def load_sam(path: str | Path) -> tuple[Sam, SamDims]:
    """A SAM in float32 from an original ``.pth`` or from a folder that ``save_sam`` wrote.

    The sizes of a ``.pth`` (vit_b, vit_l, vit_h or any other) are read off its weights. Raises
    FileNotFoundError for what is not there and ValueError for a file that holds no SAM or other
    weights than its sizes ask for.
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
            raise FileNotFoundError(
                f"{file}: not found (--vision_pretrained: a SAM .pth or a folder with sam.json)"
            )
    try:
        dims = SamDims(**json.loads(config.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{config}: not the sizes of a SAM: {error}") from error
    return dims, read_file(weights)


def _read_pth(path: Path) -> tuple[SamDims, dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: not found (--vision_pretrained: a SAM .pth or a folder with sam.json)"
        )
    weights = read_file(path)
    return detect_dims(weights, path), weights


def save_sam(sam: Sam, dims: SamDims, folder: str | Path) -> None:
    """Writes sam.json and sam.safetensors in the weights' own dtype; ``load_sam`` makes float32 of
    it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sam.json").write_text(json.dumps(asdict(dims), indent=1) + "\n")
    save_file({k: v.contiguous() for k, v in sam.state_dict().items()}, folder / "sam.safetensors")
