"""Answers, follow-up questions and evaluation against the schedule of the published code.

    python -m benchmarks.chat --size small --json benchmarks/results/chat.json

The published schedule (LISA, CoReS) has no KV cache, so that every token reads the whole prompt
again; it runs CLIP for every token and SAM's encoder for every question, and answers one question
at a time. It is written here with the parts of our model, so that both sides have the same weights,
prompts and decoder; it is checked that they give the same tokens and masks. Unlike the published
code, it computes logits of the last position only.

There are four comparisons. The sides take turns, --repeats times; the ratio is that of the medians.

generation       --tokens tokens. Both sides are given CLIP's features, only the KV cache differs.
follow_up        One more question about a picture, in an open session: text and masks.
follow_up_alike  The same, answered like the question before: "It appears on [LOC]. It is [SEG]."
evaluation       Free generation for --queries questions about one picture: text and masks.

Weights are random and seeded. Answers have --tokens tokens, [LOC] and [SEG] at fixed places and
greedy ones in between, but none twice: random models repeat themselves, and our side would draft
the repetitions (model/reasoning/generation.py), which is no fair comparison. Only in
follow_up_alike drafts help, as they do for trained models. Every follow-up question is a new one.
"""

from __future__ import annotations

import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from typing import Any

from cores.dataset import command

if __name__ == "__main__":
    command.guard()

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

from benchmarks.shared import ROOT, alternate, benchmark_parser, seconds, write_json
from benchmarks.sizes import ModelSize, clip_size, llama_size
from cores.dataset.collate import collate_prompts
from cores.dataset.conversation.encoding import encode_prompt
from cores.dataset.conversation.turns import Conversation
from cores.dataset.conversation.wordings import answer
from cores.dataset.sample import Sample
from cores.model import (
    CoresConfig,
    CoresForReasoningSegmentation,
    CoresProcessor,
    Decoding,
    ReasoningSegmenter,
)
from cores.model.config import SamDims
from cores.model.reasoning.generation import KVCache, decode

RESULTS = ROOT / "benchmarks" / "results" / "chat.json"
LEVELS = ["LOC", "SEG"]
Schedules = tuple[Callable[[], Any], Callable[[], Any]]
COMPARISONS = ("generation", "follow_up", "follow_up_alike", "evaluation")
# These are asked in turns.
FOLLOW_UPS = ("And which part of it is for hearing?", "What does this animal smell with?")


def sam_size(side: int, width: int, depth: int, heads: int, window: int, prompt: int) -> SamDims:
    """Global attention in two blocks, in the middle and at the end, and windows in the others, as
    SAM mixes them."""
    return SamDims(side, 16, width, depth, heads, (depth // 2 - 1, depth - 1), window, prompt)


SIZES = {
    "tiny": ModelSize(
        llama_size(32, 85, 2, 4), clip_size(32, 2, 2, 14, 28), sam_size(64, 32, 2, 2, 2, 32)
    ),
    "small": ModelSize(
        llama_size(512, 1365, 8, 8),
        clip_size(256, 6, 4, 14, 224),
        sam_size(1024, 192, 6, 6, 14, 256),
    ),
}


def build_random(
    size: ModelSize, vocabulary: int = 0
) -> tuple[CoresForReasoningSegmentation, CoresProcessor]:
    """A model with random weights, and the tokenizer of assets/tiny.

    ``vocabulary``: rows of the word tables, where that is more than the tokenizer has. With Llama's
    32,000, a token would read 40 % of its weights from the tables at this width (LLaVA-7B: 2 %).
    """
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets" / "tiny" / "llava")
    tokenizer.model_max_length = 4096
    tokenizer.add_tokens([f"[{level}]" for level in LEVELS], special_tokens=True)
    text = LlamaConfig(
        **size.llama,
        vocab_size=max(vocabulary, len(tokenizer)),
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    vision = CLIPVisionConfig(**size.clip, projection_dim=size.clip["hidden_size"])
    llava = LlavaConfig(vision_config=vision, text_config=text, tie_word_embeddings=False,
                        image_token_index=tokenizer.convert_tokens_to_ids("<image>"))  # fmt: skip
    ids = tokenizer.convert_tokens_to_ids([f"[{level}]" for level in LEVELS])
    model = CoresForReasoningSegmentation(CoresConfig(llava, vars(size.sam), LEVELS, ids)).eval()
    with torch.no_grad():  # SAM's position embeddings begin at zero, where they would do nothing.
        for parameter in model.segmenting.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    pixels, side = size.clip["image_size"], size.sam.image_size
    clip = CLIPImageProcessor(
        size={"shortest_edge": pixels}, crop_size={"height": pixels, "width": pixels}
    )
    return model, CoresProcessor(
        tokenizer, clip, side, size.image_tokens, LEVELS, "llava_v1", exemplar_count=1
    )


@dataclass(frozen=True)
class ForcedTokens:
    """A logits processor that forces the tokens ``ids``, then ``end``. Where an id is None, the
    model chooses among the tokens that are neither special nor in the answer yet."""

    ids: tuple[int | None, ...]
    level_ids: list[int]
    end: int

    def __call__(self, generated: Tensor, logits: Tensor) -> Tensor:
        place = generated.shape[1]
        forced = self.ids[place] if place < len(self.ids) else self.end
        if forced is not None:
            only = torch.full_like(logits, -torch.inf)
            only[:, forced] = 0.0
            return only
        logits = logits.scatter(1, generated, -torch.inf)
        logits[:, [*self.level_ids, self.end]] = -torch.inf
        return logits


def free_tokens(length: int, level_ids: list[int], end: int) -> ForcedTokens:
    """``length`` tokens with one [LOC] and one [SEG] among them."""
    ids: list[int | None] = [None] * length
    ids[length // 3], ids[length - 2] = level_ids
    return ForcedTokens(tuple(ids), level_ids, end)


class PublishedSchedule:
    """One question at a time, everything again for every token or question."""

    def __init__(
        self, model: CoresForReasoningSegmentation, processor: CoresProcessor, decoding: Decoding
    ):
        self.model, self.processor, self.decoding = model, processor, decoding

    @torch.no_grad()
    def generate(
        self, prompt: list[int], features: Tensor | None, clip_pixels: Tensor
    ) -> tuple[list[int], Tensor]:
        """(M token ids, hidden states (M, d)). CLIP runs for every token, unless its ``features``
        (1, P, d) are given."""
        reasoning, end = self.model.reasoning, self.processor.tokenizer.eos_token_id
        generated: list[int] = []
        states: list[Tensor] = []
        zero = torch.zeros(1, dtype=torch.int64)
        while len(generated) < self.decoding.max_new_tokens:
            seen = reasoning.image_features(clip_pixels) if features is None else features
            ids = torch.tensor([prompt + generated])
            hidden = reasoning.hidden_states(
                reasoning.embed(ids, seen, zero), torch.ones_like(ids)
            )[:, -1]
            token = int(
                self.decoding.choose(
                    torch.tensor([generated], dtype=torch.int64), reasoning.llava.lm_head(hidden)
                )
            )
            if token == end:
                break
            generated.append(token)
            states.append(hidden)
        return generated, torch.cat(states)

    @torch.no_grad()
    def answer(self, image: np.ndarray, prompt: list[int]) -> tuple[list[int], np.ndarray]:
        """(token ids, masks bool (K, T, H, W)) of one question about ``image``, uint8 (H, W, 3)."""
        batch = ReasoningSegmenter(self.model, self.processor).collate([(image, "image", ["?"])])
        generated, states = self.generate(prompt, None, batch.clip_pixels)
        prompts, counts = self.model.group_prompts([states], [generated])
        images = self.model.mask_branch.encode_batch(batch)
        (found,) = self.model.mask_branch.segment(prompts, counts, batch.image_index, images)
        return generated, found.masks.numpy()


class BothSchedules:
    """A prompt, a picture, and two ways to answer: each method returns a call of ours and one of
    the published schedule, which give the same."""

    def __init__(self, size: ModelSize, tokens: int, queries: int, vocabulary: int = 0):
        self.model, self.processor = build_random(size, vocabulary)
        self.tokens, self.queries = tokens, queries
        self.segmenter = ReasoningSegmenter(self.model, self.processor, tokens)
        self.level_ids = self.model.config.level_token_ids
        self.end = self.processor.tokenizer.eos_token_id
        self.force(free_tokens(tokens - 1, self.level_ids, self.end))
        self.image = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)

    def force(self, tokens: ForcedTokens) -> None:
        """Makes both sides generate ``tokens`` from now on."""
        self.segmenter.decoding = Decoding(len(tokens.ids) + 1, logits_processor=(tokens,))
        self.published = PublishedSchedule(self.model, self.processor, self.segmenter.decoding)

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
    def generation(self) -> Schedules:
        prompt = self.prompt("Where is the part that lets the dog smell?")
        pixels = self.processor.clip(self.image)[None]
        features, reasoning = self.model.reasoning.image_features(pixels), self.model.reasoning
        free = replace(self.segmenter.decoding, max_new_tokens=self.tokens - 1)

        @torch.no_grad()
        def ours() -> list[int]:
            cache, ids = KVCache(reasoning), torch.tensor([prompt])
            embeddings = reasoning.embed(ids, features, torch.zeros(1, dtype=torch.int64))
            hidden = cache.extend(embeddings, torch.ones_like(ids))[:, -1]
            return [int(token) for token, _ in decode(cache, hidden, self.end, free, [prompt])]

        def published() -> list[int]:
            schedule = PublishedSchedule(self.model, self.processor, free)
            return schedule.generate(prompt, features, pixels)[0]

        return ours, published

    def follow_up(self) -> Schedules:
        session = self.segmenter.open(self.image)
        session.ask("Where is the dog?")
        questions = cycle(FOLLOW_UPS)
        prompts = cycle([self.prompt(question, session.turns) for question in FOLLOW_UPS])
        published = self.published

        def ours() -> tuple[list[int], np.ndarray]:
            result = session.ask(next(questions))
            session.undo()
            levels = [np.stack(list(mask.levels.values())) for mask in result.masks]
            return result.token_ids, np.stack(levels)

        return ours, lambda: published.answer(self.image, next(prompts))

    def follow_up_alike(self) -> Schedules:
        turn = ("Where is the dog?", answer(LEVELS))
        before = self.prompt(turn[0])
        after = self.prompt("?", [turn])[len(before) :]  # the answer, its end, the next question
        self.force(ForcedTokens(tuple(after[: after.index(self.end)]), self.level_ids, self.end))
        return self.follow_up()

    def evaluation(self) -> Schedules:
        parts = ("smell", "hear", "see", "run", "bite", "bark", "swim", "dig")
        questions = [
            f"Which part lets the dog {parts[i % len(parts)]}?" for i in range(self.queries)
        ]
        prompts = [self.prompt(question) for question in questions]
        nothing = np.zeros((0, *self.image.shape[:2]), dtype=bool)
        asked = [Conversation([(question, [])], nothing) for question in questions]
        exemplars = self.segmenter.exemplars
        sample = Sample(self.image, "picture", asked, "reasoning", "benchmark", "0", exemplars)

        def ours() -> list[tuple[list[int], np.ndarray]]:
            batch = collate_prompts([sample], self.processor, LEVELS, self.processor.conversation)
            found = self.model.generate(
                batch, self.processor.tokenizer, **vars(self.segmenter.decoding)
            )
            return [(g.token_ids, g.masks.numpy()) for g in found]

        return ours, lambda: [self.published.answer(self.image, prompt) for prompt in prompts]


def check_answers(name: str, ours: Any, published: Any) -> dict[str, Any]:
    """Raises RuntimeError unless both sides generated the same tokens and no mask differs in more
    than one pixel of 10,000."""
    if name == "generation":
        if ours != published:
            raise RuntimeError(f"generation: {ours} against {published}")
        return {"tokens": len(ours)}
    single = name.startswith("follow_up")
    pairs = [(ours, published)] if single else list(zip(ours, published, strict=True))
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


def time_both(
    name: str, ours: Callable[[], Any], published: Callable[[], Any], repeats: int
) -> dict[str, Any]:
    """Seconds of both sides, which take turns. The first call of each is not timed: it checks that
    they agree."""
    facts = check_answers(name, ours(), published())
    sides = {"published": partial(seconds, published), "ours": partial(seconds, ours)}
    taken = alternate(sides, repeats)
    medians = {side: statistics.median(values) for side, values in taken.items()}
    ratio = medians["published"] / medians["ours"]
    return {**facts, "ratio": ratio, "median_seconds": medians, "seconds": taken}


@command.entry()
def main(argv: list[str] | None = None) -> int:
    parser = benchmark_parser(__doc__)
    add = parser.add_argument
    add("--size", choices=list(SIZES), default="small")
    add("--tokens", type=int, default=32, help="new tokens of an answer, the end token included")
    add("--queries", type=int, default=5)
    add("--repeats", type=int, default=3)
    add("--threads", type=int, default=1)
    add("--vocabulary", type=int, default=0, help="words, where more than the tokenizer's")
    add("--only", nargs="+", choices=COMPARISONS, default=list(COMPARISONS))
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    results = {}
    for name in args.only:
        both = BothSchedules(SIZES[args.size], args.tokens, args.queries, args.vocabulary)
        results[name] = time_both(name, *getattr(both, name)(), args.repeats)
        medians = results[name]["median_seconds"]
        print(
            f"{name:15}  {results[name]['ratio']:6.1f}×   published {medians['published']:8.3f} s"
            f"   here {medians['ours']:8.3f} s",
            flush=True,
        )
    flags = {name: value for name, value in vars(args).items() if name not in ("json", "only")}
    words = [f"--{name} {value}" for name, value in flags.items()]
    facts = {
        "command": " ".join(["python -m benchmarks.chat", *words]),
        "machine": {
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "prompt_tokens": len(both.prompt("Where is the dog?")),
        "new_tokens": args.tokens,
        "queries": args.queries,
        "results": results,
    }
    write_json(args.json, facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
