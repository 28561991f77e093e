"""Memory of a chat with a 13B model by precision, computed without the weights.

    python -m benchmarks.chat_memory                        # prints the table
    python -m benchmarks.chat_memory --write docs/chat.md   # puts it between the marks of that file
    python -m benchmarks.chat_memory --weights --write docs/checkpoints.md   # the weights alone, of every preset

LLaVA-v1.5-13B with SAM ViT-H and CoReS' own parts is built on the meta device, so parameters and
buffers are counted exactly. Computed: weights (the linear layers inside the language model's
decoder blocks are what bitsandbytes packs; 8-bit rows carry one float32 scale each, 4-bit blocks of
64 one 8-bit scale and its share of a float32 one per 256 blocks; all else stays 16-bit), and the
keys and values of --context tokens. Estimated: the working memory of the largest moment, a global
attention block of SAM's encoder on one picture, as three copies of its heads × 4096² logits; what
CUDA itself and the allocator take (around 0.5 to 1 GiB) comes on top.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from model import CoresConfig, CoresForReasoningSegmentation
from model.checkpoints.sam import PRESETS
from model.config import SamDims

GIB = 2**30
# bytes of a weight that is not packed, and of one that is
PRECISIONS = {
    "fp32": (4.0, 4.0),
    "bf16": (2.0, 2.0),
    "8-bit": (2.0, 1.0),
    "4-bit": (2.0, 0.5 + 1 / 64 + 4 / (64 * 256)),
}
CLIP = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
VICUNA_13B = {
    "vocab_size": 32066,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "max_position_embeddings": 4096,
}


VICUNA_7B = VICUNA_13B | {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
PRESET_MODELS = {  # text, vision, layers of the projector
    "7B v1 (224 px, linear)": (VICUNA_7B, CLIP | {"image_size": 224}, 1),
    "7B v1.5 (336 px, mlp2x_gelu)": (VICUNA_7B, CLIP, 2),
    "13B v1 (224 px, linear)": (VICUNA_13B, CLIP | {"image_size": 224}, 1),
    "13B v1.5 (336 px, mlp2x_gelu)": (VICUNA_13B, CLIP, 2),
}


def build(
    text: dict, vision: dict, sam: SamDims, projector_layers: int = 2
) -> CoresForReasoningSegmentation:
    """A CoReS of these sizes without storage."""
    llava = LlavaConfig(
        text_config=LlamaConfig(**text),
        vision_config=CLIPVisionConfig(**vision),
        tie_word_embeddings=False,
        projector_layers=projector_layers,
    )
    with torch.device("meta"):
        return CoresForReasoningSegmentation(
            CoresConfig(llava, asdict(sam), ["LOC", "SEG"], [32064, 32065])
        )


def packed(model: CoresForReasoningSegmentation) -> Iterator[nn.Linear]:
    """The layers that bitsandbytes packs: the linear ones of the language model's decoder
    blocks."""
    for module in model.reasoning.llava.model.language_model.layers.modules():
        if isinstance(module, nn.Linear):
            yield module


def parts(model: CoresForReasoningSegmentation) -> dict[str, int]:
    """Parameters and buffers by part."""
    llava = model.reasoning.llava
    count = {
        "language model, decoder blocks": _count(llava.model.language_model.layers),
        "language model, word tables and norm": (
            _count(llava.model.language_model) + _count(llava.lm_head)
        ),
        "CLIP and its projector": (
            _count(llava.model.vision_tower) + _count(llava.model.multi_modal_projector)
        ),
        "SAM": _count(model.segmenting.sam),
        "projection and refiner": (
            _count(model.text_projection) + _count(model.segmenting) - _count(model.segmenting.sam)
        ),
    }
    count["language model, word tables and norm"] -= count["language model, decoder blocks"]
    if sum(count.values()) != _count(model):
        raise RuntimeError(
            f"the parts have {sum(count.values())} parameters, the model {_count(model)}"
        )
    return count


def _count(module: nn.Module) -> int:
    return sum(t.numel() for t in (*module.parameters(), *module.buffers()))


def memory(model: CoresForReasoningSegmentation, context: int) -> dict[str, dict[str, float]]:
    """Precision -> part -> bytes. ``context``: tokens whose keys and values are kept."""
    text, sam = model.config.llava.text_config, model.config.sam_dims
    linear, rows = (
        sum(m.weight.numel() for m in packed(model)),
        sum(m.weight.shape[0] for m in packed(model)),
    )
    kept = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * context
    logits = sam.num_heads * sam.grid**4
    table = {}
    for name, (plain, small) in PRECISIONS.items():
        sizes = {part: plain * number for part, number in parts(model).items()}
        sizes["language model, decoder blocks"] += (small - plain) * linear + (
            4 * rows if name == "8-bit" else 0
        )
        sizes[f"keys and values, {context} tokens"] = plain * kept
        sizes["SAM's encoder at work (estimate)"] = 3 * plain * logits
        table[name] = sizes
    return table


def format_table(model: CoresForReasoningSegmentation, context: int) -> str:
    """Markdown, in GiB; the second column in millions."""
    table, numbers = memory(model, context), parts(model)
    lines = [
        "| GiB | million weights | " + " | ".join(table) + " |",
        "| --- | ---: |" + " ---: |" * len(table),
    ]
    for part in next(iter(table.values())):
        cells = [f"{sizes[part] / GIB:.2f}" for sizes in table.values()]
        lines.append(
            f"| {part} | {f'{numbers[part] / 1e6:,.1f}' if part in numbers else ''} | "
            + " | ".join(cells)
            + " |"
        )
    sums = [f"**{sum(sizes.values()) / GIB:.1f}**" for sizes in table.values()]
    lines.append(f"| **sum** | {sum(numbers.values()) / 1e6:,.1f} | " + " | ".join(sums) + " |")
    return "\n".join(lines)


def weights_table() -> str:
    """Markdown: GiB of weights of every preset with SAM ViT-H, by precision."""
    lines = [
        "| GiB of weights, with SAM ViT-H | millions | " + " | ".join(PRECISIONS) + " |",
        "| --- |" + " ---: |" * (1 + len(PRECISIONS)),
    ]
    for name, (text, vision, layers) in PRESET_MODELS.items():
        model = build(text, vision, PRESETS["vit_h"], layers)
        held = set(parts(model))
        sizes = [
            sum(v for part, v in row.items() if part in held) / GIB
            for row in memory(model, 1).values()
        ]
        lines.append(
            f"| {name} | {sum(parts(model).values()) / 1e6:,.0f} | "
            + " | ".join(f"{size:.1f}" for size in sizes)
            + " |"
        )
    return "\n".join(lines)


def put_between_marks(file: Path, name: str, table: str) -> None:
    """``table`` between <!-- name --> and <!-- end --> of a Markdown file. Raises ValueError if it
    lacks them."""
    start, stop = f"<!-- {name} -->", "<!-- end -->"
    before, mark, rest = file.read_text(encoding="utf-8").partition(start)
    _, end, after = rest.partition(stop)
    if not mark or not end:
        raise ValueError(f"{file}: has no marks {start} … {stop}")
    file.write_text(f"{before}{mark}\n{table}\n{end}{after}", encoding="utf-8")


def show(table: str, file: Path | None, name: str, parser: argparse.ArgumentParser) -> None:
    """Prints ``table`` and, if there is a ``file``, puts it between its marks; one without them
    ends the program."""
    print(table)
    if file:
        try:
            put_between_marks(file, name, table)
        except ValueError as error:
            parser.error(str(error))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--context",
        type=int,
        default=2048,
        help="tokens of the conversation, the picture's 576 among them",
    )
    parser.add_argument("--weights", action="store_true", help="weights alone, every preset")
    parser.add_argument("--write", type=Path, help="a Markdown file with the two marks")
    args = parser.parse_args(argv)
    if args.context < 1:
        parser.error(f"--context is {args.context}; it must be at least 1")
    table = (
        weights_table()
        if args.weights
        else format_table(build(VICUNA_13B, CLIP, PRESETS["vit_h"]), args.context)
    )
    show(table, args.write, "benchmarks.chat_memory", parser)
    return 0


if __name__ == "__main__":
    sys.exit(main())
