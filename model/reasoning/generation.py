"""Free answers: read each image's prompt once, then speak token by token.

B images · N conversations · L tokens of a prompt · M new tokens · d hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer
from transformers.generation import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from dataset.collate import Batch
from model.masks import Scene, Segmentation
from model.reasoning.chain import ReasoningChain
from model.reasoning.drafts import draft

if TYPE_CHECKING:
    from model.cores import CoresForReasoningSegmentation


@dataclass
class Generation(Segmentation):
    """A free answer, with the masks of every complete group of its answer tokens."""

    token_ids: list[int]
    """Without the end token."""
    text: str
    """The answer as people read it, answer tokens included."""
    finished: bool = True
    """False: the answer was cut at the limit of new tokens."""

    @property
    def emitted(self) -> bool:
        """Whether the answer holds at least one complete group of answer tokens, [LOC] … [SEG] in
        order."""
        return len(self.masks) > 0


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen: the likeliest one, or with ``do_sample`` drawn from torch's
    global generator."""

    max_new_tokens: int = 64
    do_sample: bool = False
    temperature: float = 1.0
    """Above 0; only with ``do_sample``."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability; only with
    ``do_sample``."""
    prompt_lookup_num_tokens: int = 8
    """The most tokens of a draft (model/reasoning/drafts.py), read at once and kept as far as they
    are what is chosen; 0: no drafts."""
    logits_processor: Sequence[Callable[[Tensor, Tensor], Tensor]] = ()
    """transformers' processors: (ids said so far (N, M), logits (N, V)) -> logits (N, V)."""

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if self.prompt_lookup_num_tokens < 0:
            raise ValueError(
                f"prompt_lookup_num_tokens is {self.prompt_lookup_num_tokens}; give 0 (no drafts)"
                " or more"
            )
        if self.temperature <= 0:
            raise ValueError(
                f"temperature is {self.temperature}; it must be above 0 (do_sample=False takes the"
                " likeliest token)"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")

    @classmethod
    def of(cls, **options: Any) -> Decoding:
        """Raises ValueError for an option that is not here. Beams are not: they reorder rows while
        states are kept."""
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := options.keys() - set(known):
            raise ValueError(
                f"no such option of generation: {', '.join(sorted(unknown))}; known:"
                f" {', '.join(known)}"
            )
        return cls(**options)

    def choose(self, said: Tensor, logits: Tensor) -> Tensor:
        """The next token of each row: said int64 (N, M), logits (N, V) -> int64 (N,)."""
        processors = LogitsProcessorList(self.logits_processor)
        if not self.do_sample:
            return processors(said, logits.float()).argmax(-1)
        processors += [TemperatureLogitsWarper(self.temperature), TopPLogitsWarper(self.top_p)]
        return torch.multinomial(processors(said, logits.float()).softmax(-1), 1)[:, 0]


# ------------------------------------------------------------------------------------------ reading


class _Layer(DynamicLayer):
    """Keys and values in buffers with room to spare: a further token is written, where transformers
    copies all of them."""

    ROOM = 256  # tokens by which a buffer grows

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As DynamicLayer.update: (N, heads, l, width) each, returns everything so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        if self._buffers is None or self._buffers[0].shape[-2] < end:
            self._buffers = (
                _with_room(self.keys, end + self.ROOM),
                _with_room(self.values, end + self.ROOM),
            )
        keys, values = self._buffers
        keys[..., start:end, :], values[..., start:end, :] = key_states, value_states
        self.keys, self.values = keys[..., :end, :], values[..., :end, :]
        return self.keys, self.values

    def keep(self, length: int) -> None:
        if self.is_initialized:
            self.keys, self.values = self.keys[..., :length, :], self.values[..., :length, :]

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._buffers = None  # of the old rows


def _with_room(old: Tensor, length: int) -> Tensor:
    new = old.new_empty((*old.shape[:-2], length, old.shape[-1]))
    new[..., : old.shape[-2], :] = old
    return new


class Context:
    """What the language model has read: keys and values of every layer, and which positions are
    tokens."""

    def __init__(self, reasoning: ReasoningChain):
        self.reasoning = reasoning
        self.cache = Cache(layer_class_to_replicate=_Layer)
        self.mask: Tensor | None = None
        """int64 (N, length): 0 where a position is padding; None before anything is read."""

    def read(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Reads on: embeddings (N, l, d), mask (N, l) -> last-layer hidden states (N, l, d)."""
        everything = mask if self.mask is None else torch.cat([self.mask, mask], dim=1)
        # padding takes up no position
        positions = (everything.cumsum(1) - 1).clamp(min=0)[:, -mask.shape[1] :]
        hidden = self.reasoning.read_on(embeddings, everything, positions, self.cache)
        self.mask = everything
        return hidden

    @property
    def length(self) -> int:
        """Positions read so far, padding included."""
        return 0 if self.mask is None else self.mask.shape[1]

    def select(self, rows: Tensor) -> None:
        """Row n becomes a copy of what is now row ``rows[n]``, int64 (N,)."""
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]

    def keep(self, length: int) -> None:
        """Forgets all but the first ``length`` positions; also after a reading that was interrupted
        between two layers."""
        for layer in self.cache.layers:
            layer.keep(length)
        if self.mask is not None:
            self.mask = self.mask[:, :length]


def read_prompts(
    reasoning: ReasoningChain, batch: Batch, features: Tensor
) -> tuple[Context, Tensor]:
    """Reads left-padded prompts; what the conversations of an image have in common is read once per
    image.

    features (B, P, d). Returns the context, with one row per conversation, and the last hidden
    states (N, d).
    """
    embeddings = reasoning.embed(batch.input_ids, features, batch.image_index)
    context = Context(reasoning)
    images, image_of_row = batch.image_index.unique(return_inverse=True)
    if len(images) == len(embeddings):
        return context, context.read(embeddings, batch.attention_mask)[:, -1]
    prompts, width = prompts_of(batch), batch.input_ids.shape[1]
    starts = [width - len(prompt) for prompt in prompts]
    index = image_of_row.tolist()
    firsts = [index.index(image) for image in range(len(images))]
    # never a whole prompt: each still has its last token to read
    shared = min(
        min(common_prefix(p, prompts[firsts[i]]), len(p) - 1)
        for p, i in zip(prompts, index, strict=True)
    )
    begin = torch.stack([embeddings[n, starts[n] : starts[n] + shared] for n in firsts])
    context.read(begin, torch.ones_like(batch.attention_mask)[: len(begin), :shared])
    context.select(image_of_row)
    start = min(starts) + shared
    rest = (
        torch.arange(start, width, device=embeddings.device)
        >= torch.tensor(starts, device=embeddings.device)[:, None] + shared
    )
    return context, context.read(embeddings[:, start:], rest.long())[:, -1]


def prompts_of(batch: Batch) -> list[list[int]]:
    """N × token ids without the padding on their left."""
    lengths = batch.attention_mask.sum(1).tolist()
    return [
        row[len(row) - length :]
        for row, length in zip(batch.input_ids.tolist(), lengths, strict=True)
    ]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids the two begin with in common."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


# ----------------------------------------------------------------------------------------- speaking


def speak(
    context: Context, hidden: Tensor, end: int, decoding: Decoding, read: Sequence[Sequence[int]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Goes on from the last hidden states (N, d) of what was ``read``, N × token ids.

    Yields the tokens int64 (N,), ``end`` for a row that has ended, and the states (N, d) that
    predicted them. Each token is read before the next one is chosen, the last one never. Tokens of
    a draft are read ahead; whoever reads on after stopping in the middle has to ``keep`` what was
    said.
    """
    llava = context.reasoning.llava
    embed = llava.get_input_embeddings()
    known = [list(ids) for ids in read]
    # nobody reads on after the one, the other may have no row in the table
    stops = end, context.reasoning.image_token_id
    said = torch.zeros((len(hidden), 0), dtype=torch.int64, device=hidden.device)
    ended = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
    drafted, states = said, hidden[:, None]
    while True:
        logits = llava.lm_head(states)
        for place in range(states.shape[1]):
            token = decoding.choose(said, logits[:, place]).masked_fill(ended, end)
            yield token, states[:, place]
            said, ended = torch.cat([said, token[:, None]], dim=1), ended | (token == end)
            for ids, chosen in zip(known, token.tolist(), strict=True):
                ids.append(chosen)
            if said.shape[1] == decoding.max_new_tokens or ended.all():
                return
            if place < drafted.shape[1] and ((token != drafted[:, place]) & ~ended).any():
                break
        context.keep(context.length - drafted.shape[1] + place)
        room = min(decoding.prompt_lookup_num_tokens, decoding.max_new_tokens - said.shape[1] - 1)
        drafted = _drafts(known, ended.tolist(), room, stops).to(token.device)
        tokens = torch.cat([token[:, None], drafted], dim=1)
        states = context.read(embed(tokens), torch.ones_like(tokens))


def _drafts(
    known: list[list[int]], ended: list[bool], count: int, stops: tuple[int, ...]
) -> Tensor:
    """int64 (N, n): a draft for every row, as long as the shortest of the rows that have not ended;
    n ≤ ``count``."""
    guesses = [
        [0] * count if over else draft(ids, count, stops)
        for ids, over in zip(known, ended, strict=True)
    ]
    shortest = min(map(len, guesses))
    return torch.tensor([guess[:shortest] for guess in guesses], dtype=torch.int64)


def generate(
    model: CoresForReasoningSegmentation, batch: Batch, tokenizer, decoding: Decoding
) -> list[Generation]:
    """See CoresForReasoningSegmentation.generate."""
    scene = Scene.of(model, batch)
    context, hidden = read_prompts(model.reasoning, batch, scene.features)
    steps = list(speak(context, hidden, tokenizer.eos_token_id, decoding, prompts_of(batch)))
    del context  # keys and values make room for SAM
    ids, states = (torch.stack(part, dim=1) for part in zip(*steps, strict=True))
    spoken = [_before(row, tokenizer.eos_token_id) for row in ids.tolist()]
    found = scene.segment(
        [row[: len(a)] for row, a in zip(states, spoken, strict=True)], spoken, batch.image_index
    )
    return [
        Generation(
            f.masks, f.iou, answer, tokenizer.decode(answer).strip(), len(answer) < ids.shape[1]
        )
        for f, answer in zip(found, spoken, strict=True)
    ]


def _before(row: list[int], end: int) -> list[int]:
    """What stands before the first ``end``; all of it where there is none."""
    return row[: row.index(end)] if end in row else row
