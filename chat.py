"""Ask a model about pictures: it answers in words and with masks.

    python chat.py --version runs/demo/model                # a session; /help lists what can be typed
    python chat.py --version runs/demo/model --image dog.jpg --prompt "Where is the dog's nose?" --json

Every question stands for itself: the model sees the picture and this question, not the ones before. Each mask of each
level is saved as a PNG (0 or 255, size of the picture) beside an overlay of the final ones; the paths are printed.
"""

from __future__ import annotations

import json
import re
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from dataset.conversation import TEMPLATES, answer_from_ids, answer_text
from dataset.images import read_image
from dataset.mixture import with_exemplars
from dataset.sample import Conversation, Sample, collate_prompts
from model.cores import CoresForReasoningSegmentation, Generation
from model.processor import CoresProcessor
from utils import distributed
from utils.arguments import OneLineParser, UsageError
from utils.visualize import FINAL_COLOUR, overlay

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HELP = """Type a question about the picture.
  /image PATH   another picture
  /help         this text
  /quit         the end (Ctrl-D, too)"""


def read_arguments(argv: list[str] | None) -> Namespace:
    parser = OneLineParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--version", required=True, help="model folder that the merge script wrote")
    parser.add_argument("--precision", choices=list(DTYPES), help="default: as stored")
    parser.add_argument("--vis_save_path", type=Path, default=Path("./vis_output"), help="folder for masks and overlays")
    parser.add_argument("--conv_type", choices=list(TEMPLATES), help="conversation template (default: that of the training)")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="longest answer, in tokens")
    parser.add_argument("--proposals", type=Path, help="LLM-Seg: folder of a proposal store (default: computed for every question)")
    parser.add_argument("--image", type=Path, help="with --prompt: one answer and the end; alone: the first picture of a session")
    parser.add_argument("--prompt", help="the one question")
    parser.add_argument("--json", action="store_true", help="with --prompt: print the answer as JSON")
    for bits in (8, 4):
        parser.add_argument(f"--load_in_{bits}bit", action="store_true", help="refused: not yet available in this version")
    args = parser.parse_args(argv)
    if args.load_in_8bit or args.load_in_4bit:
        raise UsageError("--load_in_8bit, --load_in_4bit: need the bitsandbytes extra and are not yet available in this version")
    if args.prompt is not None and args.image is None:
        raise UsageError("--prompt needs an --image")
    if args.json and args.prompt is None:
        raise UsageError("--json needs --image and --prompt")
    if args.prompt is not None and not args.prompt.strip():
        raise UsageError("--prompt is empty")
    if args.max_new_tokens < 1:
        raise UsageError(f"--max_new_tokens is {args.max_new_tokens}; it must be at least 1")
    return args


@dataclass
class Chat:
    """A loaded model that answers questions and saves what it points at."""

    model: CoresForReasoningSegmentation
    processor: CoresProcessor
    folder: Path
    max_new_tokens: int = 64

    @classmethod
    def load(cls, args: Namespace) -> Chat:
        processor = CoresProcessor.from_pretrained(args.version)
        processor.template = args.conv_type or processor.template
        dtype = DTYPES[args.precision] if args.precision else "auto"
        model = CoresForReasoningSegmentation.from_pretrained(args.version, dtype=dtype).eval()
        processor.proposals = model.proposal_source(args.proposals)
        return cls(model.to(distributed.device()), processor, args.vis_save_path, args.max_new_tokens)

    def ask(self, image: np.ndarray, path: Path, question: str) -> dict[str, Any]:
        """The answer to a question about ``image``, uint8 (H, W, 3) RGB, read from ``path``, and the files that were
        written; ready for JSON."""
        generation = self._generate(image, path, question)
        words = answer_from_ids(generation.token_ids, self.processor.tokenizer, self.processor.levels)
        report = {
            "image": str(path),
            "question": question,
            "answer": answer_text(words).strip(),
            "masks": [],
            "overlay": None,
        }
        if generation.emitted:
            self._save(generation, image, path, report)
        return report

    def _generate(self, image: np.ndarray, path: Path, question: str) -> Generation:
        nothing = np.zeros((0, *image.shape[:2]), dtype=bool)
        sample = Sample(image, str(path), [Conversation([(question, [])], nothing)], "chat", "chat", path.name)
        sample = with_exemplars(sample, np.random.default_rng(0), self.processor.exemplar_count)
        batch = collate_prompts([sample], self.processor, self.processor.levels, self.processor.template)
        batch = batch.to(self.model.device, self.model.dtype)
        return self.model.generate(batch, self.processor.tokenizer, max_new_tokens=self.max_new_tokens)[0]

    def _save(self, generation: Generation, image: np.ndarray, path: Path, report: dict[str, Any]) -> None:
        stem = self._free_stem(path)
        masks, shown = generation.masks.cpu().numpy(), image
        for target, levels in enumerate(masks):
            for level, mask in enumerate(levels):
                name = self.processor.levels[level]
                file = f"{stem}_{target}_{name}.png"
                _write(self.folder / file, 255 * mask.astype(np.uint8))
                score = float(generation.iou[target, level])
                row = {"target": target, "level": name, "file": str(self.folder / file), "pixels": int(mask.sum())}
                report["masks"].append(row | {"predicted_iou": round(score, 4)})
            shown = overlay(shown, levels[-1], FINAL_COLOUR)
        _write(self.folder / f"{stem}_overlay.png", cv2.cvtColor(shown, cv2.COLOR_RGB2BGR))
        report["overlay"] = str(self.folder / f"{stem}_overlay.png")

    def _free_stem(self, path: Path) -> str:
        """A name for the files of one answer that overwrites no earlier one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        stem = re.sub(r"[^\w.-]", "_", path.stem)
        number = 0
        while any(self.folder.glob(f"{stem}_{number:03d}_*")):
            number += 1
        return f"{stem}_{number:03d}"


def _write(path: Path, picture: np.ndarray) -> None:
    if not cv2.imwrite(str(path), picture):
        raise OSError(f"{path}: could not be written (--vis_save_path)")


def show(report: dict[str, Any]) -> None:
    print(report["answer"] or "(no words)")
    if not report["masks"]:
        print("  no mask in this answer")
    for mask in report["masks"]:
        print(f"  [{mask['level']}] {mask['file']} ({mask['pixels']} pixels, predicted IoU {mask['predicted_iou']:.2f})")
    if report["overlay"]:
        print(f"  overlay {report['overlay']}")


def session(chat: Chat, first_image: Path | None) -> None:
    """Reads lines until /quit or the end of the input. A wrong path or a failed answer does not end it."""
    print(HELP)
    image, path = None, None
    line = "" if first_image is None else f"/image {first_image}"
    while True:
        try:
            line = line or input("image> " if image is None else "question> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        command, _, rest = line.partition(" ")
        given, line = line, ""
        try:
            if not given:
                continue
            if command == "/quit":
                return
            if command == "/help":
                print(HELP)
            elif command == "/image" or image is None:  # an absolute path starts with "/", too
                new = Path(_unquoted(rest if command == "/image" else given)).expanduser()
                image, path = read_image(new), new
                print(f"{path}: {image.shape[1]} × {image.shape[0]} pixels")
            elif given.startswith("/"):
                print(f"unknown command {command}; /help lists them")
            else:
                show(chat.ask(image, path, given))
        except (ValueError, OSError) as error:
            print(f"error: {' '.join(str(error).split())}")


def _unquoted(path: str) -> str:
    path = path.strip()
    return path[1:-1] if len(path) > 1 and path[0] == path[-1] and path[0] in "'\"" else path


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one line for a mistake in flags or files."""
    try:
        args = read_arguments(argv)
        image = None if args.prompt is None else read_image(args.image)
        chat = Chat.load(args)
        if image is None:
            session(chat, args.image)
            return 0
        report = chat.ask(image, args.image, args.prompt.strip())
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(report))
    else:
        show(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
