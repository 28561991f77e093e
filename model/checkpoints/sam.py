"""Files of a SAM: the original .pth, whose sizes are read off its weights, and folders that this
program wrote."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file
from segment_anything.modeling import Sam
from torch import Tensor

from cores.model.checkpoints.weights import blaming, load_strict, read_file, read_json_file
from cores.model.config import SamDims
from cores.model.segmenting.sam import build_sam

logger = logging.getLogger(__name__)

# What else is called a SAM, by the name of one of its weights below the prefix of its wrapper.
RELATIVES = (
    (r"mask_decoder\.(hf_|.*_hq|compress_vit_feat)", "a SAM-HQ, whose decoder has more parts"),
    (r"image_encoder\.trunk\.|memory_attention\.|sam_mask_decoder\.", "a SAM 2"),
    (r"image_encoder\.(layers\.\d+\.blocks|patch_embed\.seq)\.", "a MobileSAM (TinyViT)"),
    (r"image_encoder\.(features|stem|stages|stage\d)\b", "a SAM with another encoder"),
    (r"vision_encoder\.(layers|patch_embed)\.", "a SAM in transformers' layout"),
    (r"\.(Adapter|adapter\w*|lora_\w+|linear_[abq]_\w+)\.", "a SAM with adapters in it"),
    (r"detector\.|geometry_encoder\.", "a SAM 3"),
)
FIRST = "image_encoder.patch_embed.proj.weight"
ORIGINAL = "the original sam_vit_h_4b8939.pth, or a fine-tuned SAM of its layout, is needed"

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
    except KeyError as error:
        raise ValueError(
            f"{source}: not the weights of a SAM: no {error} among its {len(weights)} weights"
            f" ({', '.join(sorted(weights)[:3])} …); {ORIGINAL}"
        ) from None
    except (AttributeError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"{source}: not the weights of a SAM ({type(error).__name__}: {error})"
        ) from None


def own_names(weights: dict[str, Tensor], source: Path | str) -> dict[str, Tensor]:
    """The weights of the one SAM in a file under SAM's own names, whatever holds it there
    (Lightning's "model.", "net.", a LISA's "model.visual_model."). What is beside it is left out,
    and said.

    Raises ValueError for two of them, and for a relative of SAM that is none, by its name.
    """
    prefixes = [name.removesuffix(FIRST) for name in weights if name.endswith(FIRST)]
    if len(prefixes) > 1:
        raise ValueError(f"{source}: holds several SAMs, below {', '.join(sorted(prefixes))}")
    prefix = prefixes[0] if prefixes else ""
    own = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
    for pattern, words in RELATIVES:
        if any(re.search(pattern, name) for name in own):
            raise ValueError(f"{source}: is {words}; {ORIGINAL}")
    if len(own) < len(weights):
        beside = next(name for name in weights if not name.startswith(prefix))
        count = len(weights) - len(own)
        logger.warning("%s: the SAM in it is used, not %s (%d weights)", source, beside, count)
    return own


def load_sam(path: str | Path) -> tuple[Sam, SamDims]:
    """A SAM in float32 from an original ``.pth`` or from a folder that ``save_sam`` wrote.

    The sizes of a ``.pth`` (vit_b, vit_l, vit_h or any other) are read off its weights. Raises
    FileNotFoundError for what is not there and ValueError for a file that holds no SAM or other
    weights than its sizes ask for.
    """
    path = Path(path)
    dims, weights = _read_folder(path) if path.is_dir() else _read_pth(path)
    with blaming(path):
        sam = build_sam(dims)
    load_strict(sam, weights, path)
    return sam, dims


def _read_folder(folder: Path) -> tuple[SamDims, dict[str, Tensor]]:
    config, file = folder / "sam.json", folder / "sam.safetensors"
    for needed in (config, file):
        if not needed.is_file():
            raise FileNotFoundError(
                f"{needed}: not found (--vision_pretrained: a SAM .pth or a folder with sam.json)"
            )
    fields = read_json_file(folder, config.name)
    with blaming(config):
        dims = SamDims(**fields)
    weights = read_file(file)
    # A module of the sizes that the file claims is made only where the weights have these sizes.
    found = detect_dims(weights, file)
    traceless = {"decoder_heads", "window_size", "global_attn_indexes"}
    for name, value in asdict(found).items():
        if name not in traceless and getattr(dims, name) != value:
            raise ValueError(
                f"{config}: says {name} {getattr(dims, name)!r}, but the weights in {file.name}"
                f" have {value}; take both from one SAM"
            )
    return dims, weights


def _read_pth(path: Path) -> tuple[SamDims, dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: not found (--vision_pretrained: a SAM .pth or a folder with sam.json)"
        )
    weights = own_names(read_file(path), path)
    return detect_dims(weights, path), weights


def save_sam(sam: Sam, dims: SamDims, folder: str | Path) -> None:
    """Writes sam.json and sam.safetensors in the weights' own dtype; ``load_sam`` makes float32 of
    it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sam.json").write_text(json.dumps(asdict(dims), indent=1) + "\n")
    save_file({k: v.contiguous() for k, v in sam.state_dict().items()}, folder / "sam.safetensors")
