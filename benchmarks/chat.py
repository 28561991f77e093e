"""Answers, follow-up questions and evaluation, against the schedule of the published code, in one
run.

    python -m benchmarks.chat --size small --json benchmarks/results/chat.json

Published schedule (LISA, CoReS): no key-value cache, so that every token reads the whole prompt
again; CLIP once more for every token; SAM's encoder once more for every question; one question at a
time. Here it is written with this model's own parts, so both sides have the same weights, prompts
and decoder, and their tokens and masks are checked to be equal. Where the reference could be made
slower in good faith it is not: it computes logits of the last position only.

Four comparisons, each timed alternately, --repeats times; the ratio is that of the medians:
generation       --tokens tokens with the image's CLIP features given on both sides; only the cache differs
follow_up        one more question about a picture, in an open session: text and masks
follow_up_alike  the same, answered as the question before was: "It appears on [LOC]. It is [SEG]."
evaluation       free generation for --queries questions about one picture, text and masks

Weights are random and seeded. All but follow_up_alike say --tokens tokens, [LOC] and [SEG] at fixed
places and greedy in between, but no word twice: a random model repeats itself, and here repetitions
are drafted (model/reasoning/generation.py). So no draft helps there; only trained models, which
follow_up_alike stands for, answer as they did before. Every follow-up question is a new one.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
)

from benchmarks.synthreason import ROOT
from dataset.collate import collate_prompts
from dataset.conversation.encoding import encode_prompt
from dataset.conversation.turns import Conversation
from dataset.conversation.wordings import answer
from dataset.sample import Sample
from model import (
    CoresConfig,
    CoresForReasoningSegmentation,
    CoresProcessor,
    Decoding,
    ReasoningSegmenter,
)
from model.config import SamDims
from model.reasoning.generation import KVCache, decode

RESULTS = ROOT / "benchmarks" / "results" / "chat.json"
LEVELS = ["LOC", "SEG"]
COMPARISONS = ("generation", "follow_up", "follow_up_alike", "evaluation")
# asked in turns
FOLLOW_UPS = ("And which part of it is for hearing?", "What does this animal smell with?")


@dataclass(frozen=True)
class Size:
    """Width, layers and heads of the language model; width, layers, heads and pixels of CLIP and of
    SAM."""

    llama: tuple[int, int, int]
    clip: tuple[int, int, int, int]
    sam: tuple[int, int, int, int]
    prompt_dim: int = 256


SIZES = {
    "tiny": Size((32, 2, 4), (32, 2, 2, 28), (32, 2, 2, 64), prompt_dim=32),
    "small": Size((512, 8, 8), (256, 6, 4, 224), (192, 6, 6, 1024)),
}


def build(size: Size, vocabulary: int = 0) -> tuple[CoresForReasoningSegmentation, CoresProcessor]:
    """A model with random weights; patches of 14 for CLIP and 16 for SAM, as in LISA.

    ``vocabulary``: rows of the word tables where that is more than the tokenizer of assets/tiny
    has. Llama's 32,000 would be 40 % of the weights read for a token at this width (LLaVA-7B: 2 %).
    """
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets" / "tiny" / "llava")
    tokenizer.model_max_length = 4096
    tokenizer.add_tokens([f"[{level}]" for level in LEVELS], special_tokens=True)
    width, layers, heads, pixels = size.clip
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=pixels,
        patch_size=14,
        projection_dim=width,
    )
    tokens = (pixels // 14) ** 2
    width, layers, heads = size.llama
    text = LlamaConfig(
        vocab_size=max(vocabulary, len(tokenizer)),
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    llava = LlavaConfig(vision_config=vision, text_config=text, tie_word_embeddings=False,
                        image_token_index=tokenizer.convert_tokens_to_ids("<image>"))  # fmt: skip
    width, layers, heads, side = size.sam
    every = layers // 2  # global attention in two blocks, windows in the others, as SAM mixes them
    sam = SamDims(
        side,
        16,
        width,
        layers,
        heads,
        (every - 1, layers - 1),
        14 if side > 64 else 2,
        size.prompt_dim,
    )
    ids = tokenizer.convert_tokens_to_ids([f"[{level}]" for level in LEVELS])
    model = CoresForReasoningSegmentation(CoresConfig(llava, vars(sam), LEVELS, ids)).eval()
    with torch.no_grad():  # SAM starts its relative positions and its position embedding at zero
        for parameter in model.segmenting.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    pixels = size.clip[3]
    clip = CLIPImageProcessor(
        size={"shortest_edge": pixels}, crop_size={"height": pixels, "width": pixels}
    )
    return model, CoresProcessor(
        tokenizer, clip, side, tokens, LEVELS, "llava_v1", exemplar_count=1
    )


@dataclass(frozen=True)
class Script:
    """A logits processor: the model says ``ids``, and where they are None what it likes of what it
    has not said; then the end."""

    ids: tuple[int | None, ...]
    level_ids: list[int]
    end: int

    def __call__(self, said: Tensor, logits: Tensor) -> Tensor:
        place = said.shape[1]
        forced = self.ids[place] if place < len(self.ids) else self.end
        if forced is not None:
            return torch.full_like(logits, -torch.inf).index_fill_(1, torch.tensor([forced]), 0.0)
        logits = logits.scatter(1, said, -torch.inf)
        logits[:, [*self.level_ids, self.end]] = -torch.inf
        return logits


def free_script(length: int, level_ids: list[int], end: int) -> Script:
    """``length`` tokens with one [LOC] and one [SEG] among them."""
    ids: list[int | None] = [None] * length
    ids[length // 3], ids[length - 2] = level_ids
    return Script(tuple(ids), level_ids, end)


class Published:
    """The published schedule: one question at a time, everything again for every token or
    question."""

    def __init__(
        self, model: CoresForReasoningSegmentation, processor: CoresProcessor, decoding: Decoding
    ):
        self.model, self.processor, self.decoding = model, processor, decoding

    @torch.no_grad()
    def generate(
        self, prompt: list[int], features: Tensor | None, clip_pixels: Tensor
    ) -> tuple[list[int], Tensor]:
        """(token ids, states (M, d)); CLIP runs for every token unless its ``features`` (1, P, d)
        are given."""
        reasoning, end = self.model.reasoning, self.processor.tokenizer.eos_token_id
        said: list[int] = []
        states: list[Tensor] = []
        zero = torch.zeros(1, dtype=torch.int64)
        while len(said) < self.decoding.max_new_tokens:
            seen = reasoning.image_features(clip_pixels) if features is None else features
            ids = torch.tensor([prompt + said])
            hidden = reasoning.hidden_states(
                reasoning.embed(ids, seen, zero), torch.ones_like(ids)
            )[:, -1]
            token = int(
                self.decoding.choose(
                    torch.tensor([said], dtype=torch.int64), reasoning.llava.lm_head(hidden)
                )
            )
            if token == end:
                break
            said.append(token)
            states.append(hidden)
        return said, torch.cat(states)

    @torch.no_grad()
    def answer(self, image: np.ndarray, prompt: list[int]) -> tuple[list[int], np.ndarray]:
        """(token ids, masks bool (K, T, H, W)) of one question; the picture is read from its pixels
        on."""
        batch = ReasoningSegmenter(self.model, self.processor).collate([(image, "image", ["?"])])
        generated, states = self.generate(prompt, None, batch.clip_pixels)
        prompts, counts = self.model.group_prompts([states], [generated])
        (found,) = self.model.mask_branch.segment(
            prompts, counts, batch.image_index, self.model.encode_images(batch)
        )
        return generated, found.masks.numpy()


class Comparison:
    """A prompt, a picture, and both ways to answer."""

    def __init__(self, size: Size, tokens: int, queries: int, vocabulary: int = 0):
        self.model, self.processor = build(size, vocabulary)
        self.tokens, self.queries = tokens, queries
        self.segmenter = ReasoningSegmenter(self.model, self.processor, tokens)
        self.level_ids, self.end = (
            self.model.config.level_token_ids,
            self.processor.tokenizer.eos_token_id,
        )
        self.speak_by(free_script(tokens - 1, self.level_ids, self.end))
        self.image = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)

    def speak_by(self, script: Script) -> None:
        """Both sides, from now on."""
        self.segmenter.decoding = Decoding(len(script.ids) + 1, logits_processor=(script,))
        self.published = Published(self.model, self.processor, self.segmenter.decoding)

    def prompt(self, question: str, history: Sequence = ()) -> list[int]:
        p = self.processor
        return encode_prompt(
            question,
            history,
            self.segmenter.exemplars,
            p.tokenizer,
            p.conversation,
            p.image_token,
            p.image_token_count,
            p.levels,
        )

    @torch.no_grad()
    def generation(self) -> tuple[Callable[[], Any], Callable[[], Any]]:
        prompt, pixels = (
            self.prompt("Where is the part that lets the dog smell?"),
            self.processor.clip(self.image)[None],
        )
        features, reasoning = self.model.reasoning.image_features(pixels), self.model.reasoning
        free = replace(self.segmenter.decoding, max_new_tokens=self.tokens - 1)

        @torch.no_grad()
        def ours() -> list[int]:
            cache, ids = KVCache(reasoning), torch.tensor([prompt])
            embeddings = reasoning.embed(ids, features, torch.zeros(1, dtype=torch.int64))
            hidden = cache.extend(embeddings, torch.ones_like(ids))[:, -1]
            return [int(token) for token, _ in decode(cache, hidden, self.end, free, [prompt])]

        def published() -> list[int]:
            return Published(self.model, self.processor, free).generate(prompt, features, pixels)[0]

        return ours, published

    def follow_up(self) -> tuple[Callable[[], Any], Callable[[], Any]]:
        session = self.segmenter.open(self.image)
        session.ask("Where is the dog?")
        questions, prompts = (
            cycle(FOLLOW_UPS),
            cycle([self.prompt(question, session.turns) for question in FOLLOW_UPS]),
        )
        published = self.published

        def ours() -> tuple[list[int], np.ndarray]:
            result = session.ask(next(questions))
            session.undo()
            return result.token_ids, np.stack(
                [np.stack(list(m.levels.values())) for m in result.masks]
            )

        return ours, lambda: published.answer(self.image, next(prompts))

    def follow_up_alike(self) -> tuple[Callable[[], Any], Callable[[], Any]]:
        turn = ("Where is the dog?", answer(LEVELS))
        before = self.prompt(turn[0])
        said = self.prompt("?", [turn])[len(before) :]  # the answer, its end and the next question
        self.speak_by(Script(tuple(said[: said.index(self.end)]), self.level_ids, self.end))
        return self.follow_up()

    def evaluation(self) -> tuple[Callable[[], Any], Callable[[], Any]]:
        parts = ("smell", "hear", "see", "run", "bite", "bark", "swim", "dig")
        questions = [
            f"Which part lets the dog {parts[i % len(parts)]}?" for i in range(self.queries)
        ]
        prompts = [self.prompt(question) for question in questions]
        nothing = np.zeros((0, *self.image.shape[:2]), dtype=bool)
        talks = [Conversation([(question, [])], nothing) for question in questions]

        def ours() -> list[tuple[list[int], np.ndarray]]:
            sample = Sample(
                self.image,
                "picture",
                talks,
                "reasoning",
                "benchmark",
                "0",
                self.segmenter.exemplars,
            )
            batch = collate_prompts([sample], self.processor, LEVELS, self.processor.conversation)
            found = self.model.generate(
                batch, self.processor.tokenizer, **vars(self.segmenter.decoding)
            )
            return [(g.token_ids, g.masks.numpy()) for g in found]

        return ours, lambda: [self.published.answer(self.image, prompt) for prompt in prompts]


def check_equal(name: str, ours: Any, published: Any) -> dict[str, Any]:
    """Raises RuntimeError unless both sides said the same tokens and no mask differs in more than
    one pixel of 10,000."""
    pairs = (
        [(ours, published)]
        if name.startswith("follow_up")
        else list(zip(ours, published, strict=True))
    )
    if name == "generation":
        if ours != published:
            raise RuntimeError(f"generation: {ours} against {published}")
        return {"tokens": len(ours)}
    differing = 0.0
    for (ids, masks), (reference_ids, reference) in pairs:
        if ids != reference_ids or masks.shape != reference.shape or not len(masks):
            raise RuntimeError(
                f"{name}: {ids} with masks {masks.shape} against {reference_ids} with masks"
                f" {reference.shape}"
            )
        differing = max(differing, float((masks != reference).mean()))
    if differing > 1e-4:
        raise RuntimeError(f"{name}: {differing:.2%} of the pixels of a mask differ")
    return {"tokens": sum(len(ids) for (ids, _), _ in pairs), "pixels_that_differ": differing}


def compare(
    name: str, ours: Callable[[], Any], published: Callable[[], Any], repeats: int
) -> dict[str, Any]:
    """Seconds of both sides, alternately; the first call of each checks that they agree and is not
    timed."""
    facts = check_equal(name, ours(), published())
    seconds: dict[str, list[float]] = {"ours": [], "published": []}
    for _ in range(repeats):
        for side, run in (("published", published), ("ours", ours)):
            started = time.perf_counter()
            run()
            seconds[side].append(time.perf_counter() - started)
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    return {
        **facts,
        "ratio": medians["published"] / medians["ours"],
        "median_seconds": medians,
        "seconds": seconds,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument(
        "--tokens", type=int, default=32, help="new tokens of every answer, the end token included"
    )
    parser.add_argument("--queries", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--vocabulary", type=int, default=0, help="words, where more than the tokenizer's"
    )
    parser.add_argument("--only", nargs="+", choices=COMPARISONS, default=list(COMPARISONS))
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    results = {}
    for name in args.only:
        comparison = Comparison(SIZES[args.size], args.tokens, args.queries, args.vocabulary)
        results[name] = compare(name, *getattr(comparison, name)(), args.repeats)
        medians = results[name]["median_seconds"]
        print(
            f"{name:15}  {results[name]['ratio']:6.1f}×   published {medians['published']:8.3f} s   "
            f"here {medians['ours']:8.3f} s",
            flush=True,
        )
    if args.json:
        flags = {name: value for name, value in vars(args).items() if name not in ("json", "only")}
        shown = " ".join(
            ["python -m benchmarks.chat", *(f"--{name} {value}" for name, value in flags.items())]
        )
        machine = {
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        prompt = len(comparison.prompt("Where is the dog?"))
        facts = {
            "prompt_tokens": prompt,
            "new_tokens": args.tokens,
            "queries": args.queries,
            "results": results,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(
            json.dumps({"command": shown, "machine": machine, **facts}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
