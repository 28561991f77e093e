"""What a loader gives: samples, and the options that every loader takes.

H, W are the size of an image in the original frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cores.dataset.conversation.turns import Conversation, count_groups
from cores.dataset.files.errors import DataError
from cores.dataset.files.faults import Faults


@dataclass
class Sample:
    """One image with its conversations."""

    image: np.ndarray
    """uint8 (H, W, 3) RGB, original frame."""
    image_path: str
    conversations: list[Conversation]
    kind: str
    """"semantic", "referring", "reasoning" or "vqa"."""
    dataset: str
    id: str
    """With ``dataset`` the provenance that every error message names."""
    exemplars: list[tuple[str, str]] = field(default_factory=list)
    """In-context (question, answer) texts drawn for this sample."""
    number: int | None = None
    """The photo's id in a file in COCO's format."""

    @property
    def name(self) -> str:
        return f"{self.dataset} {self.id} ({self.image_path})"


@dataclass(frozen=True)
class LoaderOptions:
    """What every loader needs to know to turn annotations into conversations."""

    levels: tuple[str, ...]
    """Names of the answer tokens, coarse to fine."""
    training: bool = True
    """True: wordings and conversations are drawn; False: canonical wordings, every conversation of
    an image."""
    num_classes_per_sample: int = 3
    """Most conversations drawn per image in training."""
    explanatory: float = 0.0
    """Probability that a training query with an explanation asks for it; 0 or less never does."""
    texts: str = "first"
    """Outside training, "first" asks the first wording of a query (the published protocol), "all"
    asks every one."""
    skip_missing: bool = False
    """True: entries whose image file is missing are left out with a warning; False: they are an
    error."""
    faults: Faults = field(default_factory=Faults)
    """What to do about bad items, and which ones to leave out unseen."""
    follow_links: bool = False
    """Whether files may be links that lead out of the data folder (--follow_links)."""
    excluded_coco: frozenset[int] = frozenset()
    """COCO's numbers of photos that must not be trained on (--exclude_val)."""

    def __post_init__(self):
        if not self.levels or len(set(self.levels)) != len(self.levels):
            raise ValueError(
                f'levels must be different names such as ["LOC", "SEG"], got {list(self.levels)}'
            )
        if self.num_classes_per_sample < 1:
            raise ValueError(
                f"num_classes_per_sample must be at least 1, got {self.num_classes_per_sample}"
            )
        if self.texts not in ("first", "all"):
            raise ValueError(f'texts must be "first" or "all", got {self.texts!r}')

    def wording(self, rng: np.random.Generator) -> np.random.Generator | None:
        """The generator that draws wordings, or None for the canonical ones."""
        return rng if self.training else None


def draw_queries(
    wordings: Sequence[Sequence[str]], count: int, rng: np.random.Generator
) -> list[tuple[int, str]]:
    """Up to ``count`` pairs (index of a query, one of its wordings): every query once before any is
    asked again in other words."""
    shuffled = [(int(i), rng.permutation(wordings[i])) for i in rng.permutation(len(wordings))]
    pairs = [
        (number, str(texts[turn]))
        for turn in range(max(len(texts) for _, texts in shuffled))
        for number, texts in shuffled
        if turn < len(texts)
    ]
    return pairs[:count]


def check_sample(sample: Sample, levels: Sequence[str]) -> None:
    """Raises DataError naming the sample unless its masks fit the image and are as many as the
    answers have targets."""
    size = sample.image.shape[:2]
    for index, conversation in enumerate(sample.conversations):
        where = f"{sample.name}, conversation {index}"
        groups, masks = count_groups(conversation.turns, levels, where), len(conversation.masks)
        if groups != masks:
            tokens = " ".join(f"[{level}]" for level in levels)
            raise DataError(
                f"{where}: {groups} groups of answer tokens ({tokens}) but {masks} target masks"
            )
        for name, expected in (
            ("masks", (masks, *size)),
            ("ignore", size),
            ("host_masks", (masks, *size)),
        ):
            mask = getattr(conversation, name)
            if mask is not None and mask.shape != expected:
                raise DataError(f"{where}: {name} has shape {mask.shape}, expected {expected}")
