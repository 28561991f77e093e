"""Free answers: prefill the KV cache with each image's prompt once, then decode token by token.

B images · N conversations · L tokens of a prompt · M generated tokens · d hidden size · V words.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer
from transformers.generation import (
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from cores.dataset.collate import Batch
from cores.model.checkpoints.weights import require_finite
from cores.model.reasoning.chain import ReasoningChain

ROOM = 256  # positions by which the buffers of the KV cache grow
SHORTEST_MATCH, LONGEST_MATCH = 3, 6  # ids in a row: fewer predict too little, more no better


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
    """The most tokens of a draft, which are read in one pass and kept as far as they are what the
    model chooses; 0: no drafts."""
    logits_processor: Sequence[Callable[[Tensor, Tensor], Tensor]] = ()
    """transformers' processors: (generated ids (N, M), logits (N, V)) -> logits (N, V)."""

    def __post_init__(self) -> None:
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
        """Raises ValueError for an option that is not a field. Beam search is none, because it
        would reorder rows whose hidden states are kept."""
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := options.keys() - set(known):
            raise ValueError(
                f"no such option of generation: {', '.join(sorted(unknown))}; known:"
                f" {', '.join(known)}"
            )
        return cls(**options)

    def choose(self, generated: Tensor, logits: Tensor) -> Tensor:
        """The next token of each row: generated int64 (N, M), logits (N, V) -> int64 (N,). Raises
        NonFiniteAnswer."""
        processors = [*self.logits_processor]
        if self.do_sample:
            processors += [TemperatureLogitsWarper(self.temperature), TopPLogitsWarper(self.top_p)]
        require_finite(logits, "the scores of the next word")
        logits = logits.float()
        for process in processors:
            logits = process(generated, logits)
        if not self.do_sample:
            return logits.argmax(-1)
        return torch.multinomial(logits.softmax(-1), 1)[:, 0]


# ---------------------------------------------------------------------------------------- KV cache


class _BufferedLayer(DynamicLayer):
    """Keys and values of one layer in buffers with room to spare. A further token is written into
    them, where transformers' own layer copies all tokens for each one."""

    _buffers: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As DynamicLayer.update: takes (N, heads, l, width) each, returns all positions so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        if self._buffers is None or self._buffers[0].shape[-2] < end:
            self._buffers = self._enlarged(self.keys, end), self._enlarged(self.values, end)
        keys, values = self._buffers
        keys[..., start:end, :], values[..., start:end, :] = key_states, value_states
        self.keys, self.values = keys[..., :end, :], values[..., :end, :]
        return self.keys, self.values

    @staticmethod
    def _enlarged(old: Tensor, length: int) -> Tensor:
        new = old.new_empty((*old.shape[:-2], length + ROOM, old.shape[-1]))
        new[..., : old.shape[-2], :] = old
        return new

    def crop(self, max_length: int) -> None:
        if self.keys is not None and self.values is not None:
            self.keys = self.keys[..., :max_length, :]
            self.values = self.values[..., :max_length, :]

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._buffers = None  # They hold the rows from before the selection.


class KVCache:
    """Keys and values, in every layer, of all tokens that the language model has read, and which
    positions are tokens rather than padding."""

    def __init__(self, reasoning: ReasoningChain):
        self.reasoning = reasoning
        self.cache = Cache(layer_class_to_replicate=_BufferedLayer)
        self.mask: Tensor | None = None
        """int64 (N, length): 0 where a position is padding; None before anything is read."""

    def extend(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Reads on: embeddings (N, l, d), mask (N, l) -> last-layer hidden states (N, l, d)."""
        full = mask if self.mask is None else torch.cat([self.mask, mask], dim=1)
        # Padding takes up no position.
        positions = (full.cumsum(1) - 1).clamp(min=0)[:, -mask.shape[1] :]
        hidden = self.reasoning.forward_cached(embeddings, full, positions, self.cache)
        self.mask = full
        return hidden

    @property
    def length(self) -> int:
        """Positions read so far, padding included."""
        return 0 if self.mask is None else self.mask.shape[1]

    def select_rows(self, rows: Tensor) -> None:
        """Row n becomes a copy of what is now row ``rows[n]``, int64 (N,)."""
        assert self.mask is not None, "nothing was read yet"
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]

    def crop(self, length: int) -> None:
        """Forgets all but the first ``length`` positions, also where a reading was interrupted
        between two layers."""
        for layer in self.cache.layers:
            assert isinstance(layer, _BufferedLayer)
            layer.crop(length)
        if self.mask is not None:
            self.mask = self.mask[:, :length]


# ------------------------------------------------------------------------------------------ prefill


def prefill(reasoning: ReasoningChain, batch: Batch, features: Tensor) -> tuple[KVCache, Tensor]:
    """Reads left-padded prompts, and once per image what its conversations have in common.

    features (B, P, d). Returns the cache, with one row per conversation, and the last hidden states
    (N, d).
    """
    embeddings = reasoning.embed(batch.input_ids, features, batch.image_index)
    cache = KVCache(reasoning)
    images, image_of_row = batch.image_index.unique(return_inverse=True)
    if len(images) == len(embeddings):
        return cache, cache.extend(embeddings, batch.attention_mask)[:, -1]
    prompts, width = unpadded_prompts(batch), batch.input_ids.shape[1]
    starts = [width - len(prompt) for prompt in prompts]
    index = image_of_row.tolist()
    firsts = [index.index(image) for image in range(len(images))]
    # The last token of a prompt is never shared: its hidden state predicts the first answer token.
    shared = min(
        min(common_prefix(prompt, prompts[firsts[i]]), len(prompt) - 1)
        for prompt, i in zip(prompts, index, strict=True)
    )
    begin = torch.stack([embeddings[n, starts[n] : starts[n] + shared] for n in firsts])
    cache.extend(begin, torch.ones_like(batch.attention_mask)[: len(begin), :shared])
    cache.select_rows(image_of_row)
    start = min(starts) + shared
    own_start = torch.tensor(starts, device=embeddings.device)[:, None] + shared
    rest = torch.arange(start, width, device=embeddings.device) >= own_start
    return cache, cache.extend(embeddings[:, start:], rest.long())[:, -1]


def unpadded_prompts(batch: Batch) -> list[list[int]]:
    """N × token ids without the padding on their left."""
    lengths = batch.attention_mask.sum(1).tolist()
    rows = zip(batch.input_ids.tolist(), lengths, strict=True)
    return [row[len(row) - length :] for row, length in rows]


def common_prefix(a: Sequence, b: Sequence) -> int:
    """How many items the two begin with in common."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


# ------------------------------------------------------------------------------------------- decode


def decode(
    cache: KVCache,
    hidden: Tensor,
    end: int,
    decoding: Decoding,
    prompt_ids: Sequence[Sequence[int]],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Generates after the prompts, N × token ids, whose last hidden states are (N, d).

    Yields the tokens int64 (N,), ``end`` for a row that has ended, and the states (N, d) that
    predicted them. Each token is read before the next one is yielded, the last one never.

    A draft of what may follow is read in the same pass as the token before it, and rolled back from
    the cache where the model chooses otherwise. With the draft "on", "[LOC]", "." after "appears"::

        pass reads   appears on [LOC] .        the states predict   on  [LOC]  and  …
        chosen       on   as drafted, kept     [LOC]   as drafted, kept     and   not "."
        roll back    the cache keeps "appears on [LOC]"; the next pass reads "and" and its draft

    That is three tokens in one pass, where there would be three passes without a draft. Whoever
    stops in the middle has to ``crop`` the cache, which may hold tokens of a draft by then.
    """
    llava = cache.reasoning.llava
    embed = llava.get_input_embeddings()
    known = [list(ids) for ids in prompt_ids]
    # Never draft EOS (decoding ends there) or the image token (it may have no embedding row).
    never = end, cache.reasoning.image_token_id
    generated = torch.zeros((len(hidden), 0), dtype=torch.int64, device=hidden.device)
    ended = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
    drafted, states = generated, hidden[:, None]
    while True:
        logits = llava.lm_head(states)
        for place in range(states.shape[1]):
            token = decoding.choose(generated, logits[:, place]).masked_fill(ended, end)
            yield token, states[:, place]
            generated, ended = torch.cat([generated, token[:, None]], dim=1), ended | (token == end)
            for ids, chosen in zip(known, token.tolist(), strict=True):
                ids.append(chosen)
            if generated.shape[1] == decoding.max_new_tokens or ended.all():
                return
            if place < drafted.shape[1] and ((token != drafted[:, place]) & ~ended).any():
                break
        cache.crop(cache.length - drafted.shape[1] + place)
        left = decoding.max_new_tokens - generated.shape[1] - 1
        count = min(decoding.prompt_lookup_num_tokens, left)
        # All rows advance together, so the shortest draft of those that go on counts.
        drafts = [
            [0] * count if over else draft(ids, count, never)
            for ids, over in zip(known, ended.tolist(), strict=True)
        ]
        shortest = min(map(len, drafts))
        drafted = torch.tensor(
            [d[:shortest] for d in drafts], dtype=torch.int64, device=token.device
        )
        tokens = torch.cat([token[:, None], drafted], dim=1)
        states = cache.extend(embed(tokens), torch.ones_like(tokens))


def draft(ids: Sequence[int], count: int, never: Sequence[int]) -> list[int]:
    """At most ``count`` ids that may follow ``ids`` (prompt lookup decoding): what followed the
    last ids the last time that they occurred.

    The answers of one conversation are alike ("It appears on [LOC]. It is [SEG]."), so an earlier
    answer predicts the next. A draft is only a guess and changes nothing but the time, up to
    rounding: several tokens in one pass are rounded otherwise than one, so of two words that are
    equally likely to the last bit the other may be chosen.

    The place where the longest run of ids (3 to 6) agrees with the end of ``ids`` wins, and of
    equal ones the last: for 5 6 7 8 9 … 5 6 7 it is the first 5 6 7, and the draft begins 8 9. It
    is empty where no three ids occurred before, and ends before an id of ``never``.
    """
    length, where = SHORTEST_MATCH - 1, 0
    for place in range(len(ids) - 1, SHORTEST_MATCH - 1, -1):
        if ids[place - 1] != ids[-1]:
            continue
        most = min(LONGEST_MATCH, place)
        same = next((n for n in range(most) if ids[place - 1 - n] != ids[-1 - n]), most)
        if same > length:
            length, where = same, place
        if same == LONGEST_MATCH:
            break
    following = ids[where : where + count] if where else []
    return list(takewhile(lambda token: token not in never, following))
