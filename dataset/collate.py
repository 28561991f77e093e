"""From samples to a batch: token ids, pixels and masks of several samples side by side.

B images · N conversations · L tokens · K targets of one conversation · H, W an image in the
original frame · h, w CLIP's input · S the side of SAM's padded input · C, G channels and side of
SAM's embedding.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cores.dataset.conversation.encoding import (
    IGNORE_INDEX,
    Encoded,
    encode_conversation,
    encode_prompt,
)
from cores.dataset.conversation.templates import ConversationTemplate
from cores.dataset.conversation.turns import Conversation, count_groups
from cores.dataset.files.errors import DataError
from cores.dataset.proposals import Proposals
from cores.dataset.sample import Sample, check_sample

logger = logging.getLogger(__name__)
Encode = Callable[[Sample, Conversation], Encoded]


@dataclass
class Batch:
    """What the model takes. Built by ``collate`` (right padded) or ``collate_prompts`` (left
    padded, no labels)."""

    input_ids: torch.Tensor
    """int64 (N, L)."""
    attention_mask: torch.Tensor
    """int64 (N, L): 1 for tokens, 0 for padding; made from lengths, as padding may share an id with
    real tokens."""
    labels: torch.Tensor
    """int64 (N, L): -100 where unsupervised."""
    image_index: torch.Tensor
    """int64 (N,): the image of each conversation."""
    clip_pixels: torch.Tensor
    """float (B, 3, h, w): CLIP's normalised input."""
    sam_pixels: torch.Tensor
    """float (B', 3, S, S): SAM's normalised and padded input of the images whose embedding is not
    cached; B' = B without a cache."""
    original_sizes: list[tuple[int, int]]
    """(H, W) of each of the B images."""
    resized_sizes: list[tuple[int, int]]
    """(height, width) of each of the B images inside SAM's padded input."""
    target_masks: list[torch.Tensor]
    """N × bool (K, H, W), original frame."""
    ignore_masks: list[torch.Tensor | None]
    """N × bool (H, W)."""
    host_masks: list[torch.Tensor | None]
    """N × bool (K, H, W)."""
    info: list[dict]
    """N × {dataset, id, image_path, kind, query, is_sentence, conversation (its index in the
    sample)}."""
    sam_embeddings: list[torch.Tensor | None] | None = None
    """With a cache: B × float (C, G, G), None where it has none."""
    sam_keys: list[str] | None = None
    """With a cache: B names under which it keeps embeddings."""
    proposals: list[Proposals] | None = None
    """B × the masks a selecting model chooses from; None where the processor has no source of
    proposals."""

    @property
    def cached(self) -> tuple[list[torch.Tensor | None], list[str]] | None:
        """``sam_embeddings`` and ``sam_keys``; None without a cache."""
        if self.sam_embeddings is None or self.sam_keys is None:
            return None
        return self.sam_embeddings, self.sam_keys

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Batch:
        """A batch with its tensors on ``device`` and its float tensors as ``dtype``; None leaves
        either as it is."""

        def move(value):
            if isinstance(value, torch.Tensor):
                return value.to(device=device, dtype=dtype if value.is_floating_point() else None)
            if isinstance(value, Proposals):
                return value.to(device)
            return [move(item) for item in value] if isinstance(value, list) else value

        return Batch(**{f.name: move(getattr(self, f.name)) for f in dataclasses.fields(self)})


def _fit(
    sample: Sample, index: int, encode: Encode, limit: int, on_too_long: str
) -> tuple[Conversation, Encoded] | None:
    """A conversation within ``limit`` tokens, or None if it is to be left out. Answers are never
    cut: a text-only conversation may lose its last turns, any other would lose a target."""
    conversation = sample.conversations[index]
    encoded = encode(sample, conversation)
    length = len(encoded.input_ids)
    if length <= limit:
        return conversation, encoded
    message = (
        f"{sample.name}, conversation {index}: {length} tokens, but model_max_length is {limit}"
    )
    if on_too_long == "raise":
        raise DataError(
            f"{message}; raise --model_max_length, use fewer exemplars or shorten the text"
        )
    while len(conversation.turns) > 1 and not len(conversation.masks):
        conversation = dataclasses.replace(conversation, turns=conversation.turns[:-1])
        encoded = encode(sample, conversation)
        if len(encoded.input_ids) <= limit:
            logger.warning("%s; kept its first %d turns", message, len(conversation.turns))
            return conversation, encoded
    logger.warning("%s; left out", message)
    return None


def _pad(rows: Sequence[Sequence[int]], value: int, left: bool) -> torch.Tensor:
    width = max(len(row) for row in rows)
    table = torch.full((len(rows), width), value, dtype=torch.int64)
    for target, row in zip(table, rows, strict=True):
        start = width - len(row) if left else 0
        target[start : start + len(row)] = torch.tensor(row, dtype=torch.int64)
    return table


def _tensors(masks: Iterable[np.ndarray | None]) -> list[torch.Tensor | None]:
    return [
        None if mask is None else torch.from_numpy(np.ascontiguousarray(mask, dtype=bool))
        for mask in masks
    ]


def _assemble(
    samples: Sequence[Sample], processor, encode: Encode, on_too_long: str, left: bool
) -> Batch:
    tokenizer = processor.tokenizer
    rows = []  # (image index, conversation index, conversation, encoded)
    for number, sample in enumerate(samples):
        for index in range(len(sample.conversations)):
            fitted = _fit(sample, index, encode, tokenizer.model_max_length, on_too_long)
            if fitted is not None:
                rows.append((number, index, *fitted))
    if not rows:
        names = "; ".join(sample.name for sample in samples)
        raise DataError(
            f"no conversation is left in a batch of {names or 'no samples'}; raise"
            " --model_max_length"
        )
    conversations = [conversation for _, _, conversation, _ in rows]
    encodings = [encoded for *_, encoded in rows]
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    sam_pixels, resized_sizes, cached = _sam_inputs([sample.image for sample in samples], processor)
    return Batch(
        input_ids=_pad([e.input_ids for e in encodings], pad, left),
        attention_mask=_pad([[1] * len(e.input_ids) for e in encodings], 0, left),
        labels=_pad([e.labels for e in encodings], IGNORE_INDEX, left),
        image_index=torch.tensor([number for number, *_ in rows], dtype=torch.int64),
        clip_pixels=torch.stack([processor.clip(sample.image) for sample in samples]),
        sam_pixels=sam_pixels,
        original_sizes=[sample.image.shape[:2] for sample in samples],
        resized_sizes=resized_sizes,
        target_masks=[torch.from_numpy(np.ascontiguousarray(c.masks, bool)) for c in conversations],
        ignore_masks=_tensors(c.ignore for c in conversations),
        host_masks=_tensors(c.host_masks for c in conversations),
        info=[
            {
                "dataset": samples[number].dataset,
                "id": samples[number].id,
                "image_path": samples[number].image_path,
                "kind": samples[number].kind,
                "query": conversation.turns[-1][0],
                "is_sentence": conversation.is_sentence,
                "conversation": index,
            }
            for number, index, conversation, _ in rows
        ],
        proposals=_proposals(samples, processor, free=left),
        **cached,
    )


def _sam_inputs(
    images: Sequence[np.ndarray], processor
) -> tuple[torch.Tensor, list[tuple[int, int]], dict]:
    """Pixels (B', 3, S, S) and resized sizes (B) for SAM, and the fields of a Batch that its cache
    fills, if there is one."""
    cache = getattr(processor, "sam_cache", None)
    if cache is None:
        inputs = [processor.sam(image) for image in images]
        return torch.stack([p for p, _ in inputs]), [tuple(size) for _, size in inputs], {}
    keys = [cache.key(image) for image in images]
    found = [cache.load(key) for key in keys]
    # The leading empty tensor gives the shape where the cache has every image.
    pixels = [torch.zeros(0, 3, processor.image_size, processor.image_size)]
    for image, embedding in zip(images, found, strict=True):
        if embedding is None:
            pixels.append(processor.sam(image)[0][None])
    sizes = [processor.sam_size(image) for image in images]
    return torch.cat(pixels), sizes, {"sam_embeddings": found, "sam_keys": keys}


def _proposals(samples: Sequence[Sample], processor, free: bool) -> list[Proposals] | None:
    """The proposals of each image. An image without targets needs none, unless the answers are
    still to be generated (``free``)."""
    source = getattr(processor, "proposals", None)
    if source is None:
        return None
    wanted = [free or any(len(c.masks) for c in sample.conversations) for sample in samples]
    return [
        source(s.image, s.name) if want else source.none(s.image)
        for s, want in zip(samples, wanted, strict=True)
    ]


def _encoder(processor, levels, template, free: bool) -> Encode:
    """Encodes whole conversations or, with ``free``, prompts that end where the last answer
    begins."""
    image = (processor.image_token, processor.image_token_count)
    settings = (processor.tokenizer, template, *image, levels)

    def encode(sample: Sample, conversation: Conversation) -> Encoded:
        if not free:
            return encode_conversation(conversation, sample.exemplars, *settings)
        *history, (question, _) = conversation.turns
        ids = encode_prompt(question, history, sample.exemplars, *settings)
        return Encoded(ids, [IGNORE_INDEX] * len(ids))

    return encode


def collate(
    samples: Sequence[Sample],
    processor,
    levels: Sequence[str],
    template: str | ConversationTemplate,
    on_too_long: str = "raise",
) -> Batch:
    """The batch for training and teacher-forced evaluation, right padded. Each image is processed
    once.

    ``processor`` has ``tokenizer``, ``image_token``, ``image_token_count``, ``clip(image) -> (3, h,
    w)`` and ``sam(image) -> ((3, S, S), resized size)``; SAM's pixels are not made where its
    ``sam_cache``, if it has one, holds the embedding. A conversation longer than
    ``tokenizer.model_max_length`` raises DataError, or with ``on_too_long="skip"`` loses its last
    text-only turns or is left out with a warning; answer tokens are never cut. Raises DataError for
    a sample whose masks do not match its answer tokens or its image.
    """
    if on_too_long not in ("raise", "skip"):
        raise ValueError(f'on_too_long must be "raise" or "skip", got {on_too_long!r}')
    for sample in samples:
        check_sample(sample, levels)
    encode = _encoder(processor, levels, template, free=False)
    return _assemble(samples, processor, encode, on_too_long, left=False)


def collate_prompts(
    samples: Sequence[Sample],
    processor,
    levels: Sequence[str],
    template: str | ConversationTemplate,
) -> Batch:
    """The batch for free generation: left-padded prompts that end where the answer begins, labels
    -100.

    The last question of each conversation is asked, its earlier turns are the history, and the
    masks are those of the last answer. Raises DataError for a prompt longer than
    ``tokenizer.model_max_length``.
    """
    for sample in samples:
        check_sample(sample, levels)
    samples = [
        dataclasses.replace(s, conversations=[_last_only(c, levels) for c in s.conversations])
        for s in samples
    ]
    encode = _encoder(processor, levels, template, free=True)
    return _assemble(samples, processor, encode, "raise", left=True)


def token_counts(
    sample: Sample,
    processor,
    levels: Sequence[str],
    template: str | ConversationTemplate,
    free: bool,
) -> list[int]:
    """Tokens of each conversation of ``sample`` as ``collate`` makes them or, with ``free``, as
    ``collate_prompts`` does; no image is processed."""
    encode = _encoder(processor, levels, template, free)
    return [len(encode(sample, c).input_ids) for c in sample.conversations]


def _last_only(conversation: Conversation, levels: Sequence[str]) -> Conversation:
    """The conversation with the masks of its last answer only."""
    start = len(conversation.masks) - count_groups(conversation.turns[-1:], levels)
    hosts = conversation.host_masks
    return dataclasses.replace(
        conversation,
        masks=conversation.masks[start:],
        host_masks=None if hosts is None else hosts[start:],
    )
