"""The model that the flags of a program describe, ready to be asked."""

from __future__ import annotations

from argparse import Namespace

from cores.model.checkpoints.precision import DTYPES, choose_attention, quantization
from cores.model.inference.segmenter import ReasoningSegmenter
from cores.utils import distributed

LESS_MEMORY = "use --load_in_4bit or --load_in_8bit, or a smaller model"


def load_segmenter(args: Namespace) -> ReasoningSegmenter:
    """The model that the flags of ``add_model_flags`` describe. Raises FileNotFoundError or
    ValueError for flags or a folder that do not work."""
    bits = 4 if args.load_in_4bit else 8 if args.load_in_8bit else None
    compute = DTYPES[args.precision or "bf16"]
    attention, _ = choose_attention(args.attn_implementation, compute, distributed.device())
    segmenter = ReasoningSegmenter.from_pretrained(
        args.version,
        dtype=compute if bits or args.precision else "auto",
        attn_implementation=attention,
        template=args.conv_type,
        max_new_tokens=args.max_new_tokens,
        vision_tower=args.vision_tower,
        proposals=args.proposals,
        quantization_config=quantization(bits, compute),
    )
    if args.model_max_length is not None:
        segmenter.processor.tokenizer.model_max_length = args.model_max_length
    return segmenter
