"""Draws answers of a model beside the ground truth: the image, the mask of every level, the target.

    python scripts/draw_chain.py --version runs/demo/model --dataset_dir data/synthreason \\
        --val_dataset "SynthReason|val" --samples 10:0 4:0 --out docs/img/chain.png

"10:0" is the first query about the eleventh image. This very command draws the README's picture,
two of the better answers, from the model of `make demo`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cores.dataset import command  # noqa: E402

if __name__ == "__main__":
    command.guard()

from cores.dataset.mixture import EvalDataset  # noqa: E402
from cores.model import ReasoningSegmenter  # noqa: E402
from cores.utils.report.visualize import Example, contact_sheet  # noqa: E402


@command.entry()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("version", "dataset_dir", "val_dataset", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--samples", nargs="+", required=True, help="image:query, from 0")
    parser.add_argument("--tile", type=int, default=256, help="pixels of a picture's longer side")
    args = parser.parse_args(argv)
    segmenter = ReasoningSegmenter.from_pretrained(args.version)
    levels = segmenter.processor.levels
    dataset = EvalDataset(args.dataset_dir, args.val_dataset, levels, exemplar_count=0)
    examples = []
    for place in args.samples:
        image, query = map(int, place.split(":"))
        sample = dataset[image]
        conversation = sample.conversations[query]
        question = conversation.turns[-1][0]
        result = segmenter(sample.image, question)
        found = result.masks[0].levels if result.masks else {}
        examples.append(
            Example(
                image=sample.image,
                query=question,
                answer=result.text,
                levels=list(levels),
                masks=[found[level] for level in levels] if found else None,
                target=conversation.masks[-1],
                ignore=conversation.ignore,
                name=f"{sample.dataset} {sample.id}",
            )
        )
    contact_sheet(examples, args.out, tile=args.tile)
    return 0


if __name__ == "__main__":
    sys.exit(main())
