"""Free answers: read each image's prompt once, speak token by token, turn answer tokens into masks.

B images · N conversations · L tokens of a prompt · M new tokens · d hidden size · K targets · T levels · (H, W) original frame.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer
from transformers.generation import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from dataset.proposals import Proposals
from dataset.sample import Batch
from model.drafts import draft
from model.llm_seg import Scores, required, united
from model.reasoning_chain import ReasoningChain
from model.sam import position_encoding, to_grid, to_original, valid_cells

if TYPE_CHECKING:
    from model.cores import CoresForReasoningSegmentation


@dataclass
class Segmentation:
    """The masks of one conversation. ``masks``: bool (K, T, H, W), original frame; ``iou``: float (K, T)."""

    masks: Tensor
    iou: Tensor


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
        """Whether the answer holds at least one complete group of answer tokens, [LOC] … [SEG] in order."""
        return len(self.masks) > 0


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen: the likeliest one, or with ``do_sample`` drawn from torch's global generator."""

    max_new_tokens: int = 64
    do_sample: bool = False
    temperature: float = 1.0
    """Above 0; only with ``do_sample``."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability; only with ``do_sample``."""
    prompt_lookup_num_tokens: int = 8
    """The most tokens of a draft (model/drafts.py), read at once and kept as far as they are what is chosen; 0: no drafts."""
    logits_processor: Sequence[Callable[[Tensor, Tensor], Tensor]] = ()
    """transformers' processors: (ids said so far (N, M), logits (N, V)) -> logits (N, V)."""

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if self.prompt_lookup_num_tokens < 0:
            raise ValueError(f"prompt_lookup_num_tokens is {self.prompt_lookup_num_tokens}; give 0 (no drafts) or more")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0 (do_sample=False takes the likeliest token)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")

    @classmethod
    def of(cls, **options: Any) -> Decoding:
        """Raises ValueError for an option that is not here. Beams are not: they reorder rows while states are kept."""
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := options.keys() - set(known):
            raise ValueError(f"no such option of generation: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
        return cls(**options)

    def choose(self, said: Tensor, logits: Tensor) -> Tensor:
        """The next token of each row: said int64 (N, M), logits (N, V) -> int64 (N,)."""
        processors = LogitsProcessorList(self.logits_processor)
        if not self.do_sample:
            return processors(said, logits.float()).argmax(-1)
        processors += [TemperatureLogitsWarper(self.temperature), TopPLogitsWarper(self.top_p)]
        return torch.multinomial(processors(said, logits.float()).softmax(-1), 1)[:, 0]


# -------------------------------------------------------------------------------------------------------------- reading


class _Layer(DynamicLayer):
    """Keys and values in buffers with room to spare: a further token is written, where transformers copies all of them."""

    ROOM = 256  # tokens by which a buffer grows

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As DynamicLayer.update: (N, heads, l, width) each, returns everything so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        if self._buffers is None or self._buffers[0].shape[-2] < end:
            self._buffers = _with_room(self.keys, end + self.ROOM), _with_room(self.values, end + self.ROOM)
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
    """What the language model has read: keys and values of every layer, and which positions are tokens."""

    def __init__(self, reasoning: ReasoningChain):
        self.reasoning = reasoning
        self.cache = Cache(layer_class_to_replicate=_Layer)
        self.mask: Tensor | None = None
        """int64 (N, length): 0 where a position is padding; None before anything is read."""

    def read(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Reads on: embeddings (N, l, d), mask (N, l) -> last-layer hidden states (N, l, d)."""
        everything = mask if self.mask is None else torch.cat([self.mask, mask], dim=1)
        positions = (everything.cumsum(1) - 1).clamp(min=0)[:, -mask.shape[1] :]  # padding takes up no position
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
        """Forgets all but the first ``length`` positions; also after a reading that was interrupted between two layers."""
        for layer in self.cache.layers:
            layer.keep(length)
        if self.mask is not None:
            self.mask = self.mask[:, :length]


def read_prompts(reasoning: ReasoningChain, batch: Batch, features: Tensor) -> tuple[Context, Tensor]:
    """Reads left-padded prompts; what the conversations of an image have in common is read once per image.

    features (B, P, d). Returns the context, with one row per conversation, and the last hidden states (N, d).
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
    shared = min(min(common_prefix(p, prompts[firsts[i]]), len(p) - 1) for p, i in zip(prompts, index, strict=True))
    begin = torch.stack([embeddings[n, starts[n] : starts[n] + shared] for n in firsts])
    context.read(begin, torch.ones_like(batch.attention_mask)[: len(begin), :shared])
    context.select(image_of_row)
    start = min(starts) + shared
    rest = torch.arange(start, width, device=embeddings.device) >= torch.tensor(starts, device=embeddings.device)[:, None] + shared
    return context, context.read(embeddings[:, start:], rest.long())[:, -1]


def prompts_of(batch: Batch) -> list[list[int]]:
    """N × token ids without the padding on their left."""
    lengths = batch.attention_mask.sum(1).tolist()
    return [row[len(row) - length :] for row, length in zip(batch.input_ids.tolist(), lengths, strict=True)]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids the two begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# ------------------------------------------------------------------------------------------------------------- speaking


def speak(
    context: Context, hidden: Tensor, end: int, decoding: Decoding, read: Sequence[Sequence[int]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Goes on from the last hidden states (N, d) of what was ``read``, N × token ids.

    Yields the tokens int64 (N,), ``end`` for a row that has ended, and the states (N, d) that predicted them. Each token
    is read before the next one is chosen, the last one never. Tokens of a draft are read ahead; whoever reads on after stopping
    in the middle has to ``keep`` what was said.
    """
    llava = context.reasoning.llava
    embed = llava.get_input_embeddings()
    known = [list(ids) for ids in read]
    stops = end, context.reasoning.image_token_id  # nobody reads on after the one, the other may have no row in the table
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


def _drafts(known: list[list[int]], ended: list[bool], count: int, stops: tuple[int, ...]) -> Tensor:
    """int64 (N, n): a draft for every row, as long as the shortest of the rows that have not ended; n ≤ ``count``."""
    guesses = [[0] * count if over else draft(ids, count, stops) for ids, over in zip(known, ended, strict=True)]
    shortest = min(map(len, guesses))
    return torch.tensor([guess[:shortest] for guess in guesses], dtype=torch.int64)


def generate(model: CoresForReasoningSegmentation, batch: Batch, tokenizer, decoding: Decoding) -> list[Generation]:
    """See CoresForReasoningSegmentation.generate."""
    scene = Scene.of(model, batch)
    context, hidden = read_prompts(model.reasoning, batch, scene.features)
    steps = list(speak(context, hidden, tokenizer.eos_token_id, decoding, prompts_of(batch)))
    del context  # keys and values make room for SAM
    ids, states = (torch.stack(part, dim=1) for part in zip(*steps, strict=True))
    spoken = [_before(row, tokenizer.eos_token_id) for row in ids.tolist()]
    found = scene.segment([row[: len(a)] for row, a in zip(states, spoken, strict=True)], spoken, batch.image_index)
    return [
        Generation(f.masks, f.iou, answer, tokenizer.decode(answer).strip(), len(answer) < ids.shape[1])
        for f, answer in zip(found, spoken, strict=True)
    ]


def _before(row: list[int], end: int) -> list[int]:
    """What stands before the first ``end``; all of it where there is none."""
    return row[: row.index(end)] if end in row else row


# ------------------------------------------------------------------------------------------------------------ segmenting


class Scene:
    """B images as a model sees them. What looks at them (CLIP, the encoder behind the masks, the finder of proposals) runs when
    it is first asked for, each once."""

    def __init__(
        self,
        model: CoresForReasoningSegmentation,
        clip_pixels: Tensor,
        sam_pixels: Tensor,
        original_sizes: list[tuple[int, int]],
        resized_sizes: list[tuple[int, int]],
        proposals: Callable[[], list[Proposals] | None] = lambda: None,
        cached: tuple[list[Tensor | None], list[str]] | None = None,
    ):
        """clip_pixels (B, 3, h, w), sam_pixels (B', 3, S, S), sizes (height, width) and ``cached`` as in a
        Batch; ``proposals`` gives those of each image to a model that selects."""
        self.model = model
        self.original_sizes, self.resized_sizes = original_sizes, resized_sizes
        self._clip_pixels, self._sam_pixels, self._cached, self._find = clip_pixels, sam_pixels, cached, proposals

    @classmethod
    def of(cls, model: CoresForReasoningSegmentation, batch: Batch) -> Scene:
        sizes = batch.original_sizes, batch.resized_sizes
        return cls(model, batch.clip_pixels, batch.sam_pixels, *sizes, lambda: batch.proposals, batch.cached)

    @cached_property
    def features(self) -> Tensor:
        """(B, P, d): image tokens of the language model."""
        return self.model.reasoning.image_features(self._clip_pixels)

    @cached_property
    def _seen(self) -> tuple[Tensor | None, Tensor | None]:
        """What the mask branch sees of the images, see ``mask_features`` of the model."""
        seen = self.model.mask_features(self._sam_pixels, self.resized_sizes, self._cached)
        del self._sam_pixels  # 12 MB a picture, not needed again
        return seen

    @property
    def embeddings(self) -> Tensor:
        """(B, C, G, G): SAM's, for a model that decodes masks."""
        return self._seen[0]

    @cached_property
    def proposals(self) -> list[Proposals]:
        return required(self._find())

    def look(self) -> None:
        """Does now what the first mask would wait for."""
        _ = self._seen
        if self.model.selecting is not None:
            _ = self.proposals

    @cached_property
    def _valid(self) -> Tensor:
        dims, device = self.model.config.sam_dims, self.embeddings.device
        return torch.stack([valid_cells(size, dims.image_size, dims.grid, device) for size in self.resized_sizes])

    def segment(self, states: Sequence[Tensor], answers: Sequence[Sequence[int]], image_index: Tensor) -> list[Segmentation]:
        """Masks of every complete group of answer tokens.

        states: N × (M, d), the hidden states that predicted the tokens of ``answers``, N × M ids; image_index (N,).
        """
        groups = [complete_groups(answer, self.model.config.level_token_ids) for answer in answers]
        positions = [torch.tensor(g, dtype=torch.int64).reshape(-1, len(self.model.config.levels)) for g in groups]
        chosen = torch.cat([state[where.to(state.device)] for state, where in zip(states, positions, strict=True)])
        return self.masks(self.model.text_projection(chosen), [len(g) for g in groups], image_index)

    def masks(self, tokens: Tensor, counts: list[int], image_index: Tensor) -> list[Segmentation]:
        """The one place where tokens become masks: (K, T, C) of N conversations with ``counts`` targets each, which ask about
        the images image_index (N,)."""
        images = image_index.tolist()
        if not len(tokens):  # the encoder is the most expensive part: nothing asks for it here
            nothing = tokens.new_zeros((0, tokens.shape[1]), dtype=torch.float32)
            return [Segmentation(nothing.new_zeros((*nothing.shape, *self.original_sizes[i]), dtype=torch.bool), nothing)
                    for i in images]  # fmt: skip
        found = self.chain(tokens, counts, image_index) if self.model.config.decodes else None
        return found if self.model.selecting is None else self._select(tokens, counts, image_index, found)

    def decode(self, tokens: Tensor, counts: list[int], image_index: Tensor) -> tuple[Tensor, Tensor]:
        """SAM's decoder on tokens (K, T, C), see ``masks``: low-res logits (K, T, 4G, 4G) and its own IoU predictions (K, T)."""
        if not sum(counts):  # the image encoder is the most expensive part: nothing asks for it here
            levels, side = tokens.shape[1], self.model.config.sam_dims.low_res
            return tokens.new_zeros((0, levels, side, side)), tokens.new_zeros((0, levels))
        return self.model.segmenting(tokens, self.embeddings, _of_target(image_index, counts), self._valid)

    def chain(self, tokens: Tensor, counts: list[int], image_index: Tensor) -> list[Segmentation]:
        """The masks of the chain of segmenting; arguments as of ``masks``."""
        low_res, iou = self.decode(tokens, counts, image_index)
        return [
            Segmentation(self.in_frame(masks, image), ious.float())
            for masks, ious, image in zip(low_res.split(counts), iou.split(counts), image_index.tolist(), strict=True)
        ]

    def score(self, tokens: Tensor, counts: list[int], image_index: Tensor, own: list[Tensor] | None = None) -> Scores:
        """Of every proposal for every target. ``own``: N × bool (K, H, W), one more proposal of each target."""
        model, weights = self.model, None
        if own is not None:
            padded, side = model.config.sam["image_size"], model.selecting.config.pool_size
            images = image_index.tolist()
            weights = [to_grid(m, self.resized_sizes[i], padded, side) for m, i in zip(own, images, strict=True)]
            weights = torch.cat(weights).to(tokens.device)
        of_target, position = _of_target(image_index, counts), position_encoding(model.segmenting.sam)
        return model.selecting(tokens[:, -1], self._seen[1], self.proposals, of_target, position, weights)

    def _select(
        self, tokens: Tensor, counts: list[int], image_index: Tensor, chain: list[Segmentation] | None
    ) -> list[Segmentation]:
        """The union of what is chosen for every target; its ``iou`` is the highest IoP among it, 0 where nothing is chosen.

        It takes the place of the last mask of the ``chain``, which is one of the proposals; the levels before it stay.
        """
        own = None if chain is None else [found.masks[:, -1] for found in chain]
        scores = self.score(tokens, counts, image_index, own)
        chosen = self.model.selecting.choose(scores)
        sure = (scores.iop * chosen).amax(1, keepdim=True)
        out = []
        for n, (picked, iop, image) in enumerate(zip(chosen.split(counts), sure.split(counts), image_index.tolist(), strict=True)):
            masks = united(picked, self.proposals[image], self.original_sizes[image])
            if chain is not None:
                masks = masks | (own[n] & picked[:, -1, None, None])[:, None]
                masks = torch.cat([chain[n].masks[:, :-1], masks], dim=1)
                iop = torch.cat([chain[n].iou[:, :-1], iop], dim=1)
            out.append(Segmentation(masks, iop))
        return out

    def in_frame(self, low_res: Tensor, image: int) -> Tensor:
        """Low-res logits (K, T, h, w) of targets in one image -> bool (K, T, H, W), target by target: logits are large."""
        resized, original = self.resized_sizes[image], self.original_sizes[image]
        out = torch.zeros((*low_res.shape[:2], *original), dtype=torch.bool, device=low_res.device)
        for target, levels in enumerate(low_res):
            out[target] = to_original(levels, resized, original, self.model.config.sam["image_size"]) > 0
        return out


def _of_target(image_index: Tensor, counts: list[int]) -> Tensor:
    """The image (K,) of every target: of conversations about the images image_index (N,), with ``counts`` targets each."""
    return image_index.repeat_interleave(torch.tensor(counts, device=image_index.device))


def complete_groups(answer: Sequence[int], level_token_ids: Sequence[int]) -> list[list[int]]:
    """Positions of each complete group of level tokens in an answer.

    A group is one token of every level, in order, with anything but level tokens between them. A token out of order
    starts over.
    """
    groups: list[list[int]] = []
    pending: list[int] = []
    for position, token in enumerate(answer):
        if token not in level_token_ids:
            continue
        if token != level_token_ids[len(pending)]:
            pending = []
        if token == level_token_ids[len(pending)]:
            pending.append(position)
        if len(pending) == len(level_token_ids):
            groups.append(pending)
            pending = []
    return groups
