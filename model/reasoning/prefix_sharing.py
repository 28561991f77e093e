"""Conversations of one image share its prefix: the language model reads system text, exemplars and
image once.

::

    separate rows   [prefix a] [prefix b] [prefix c]          one row   [prefix a b c]
    positions       0 … p …    0 … p …    0 … p …                       0 … p … p … p …

A token sees what it would have seen in a row of its own: the prefix, and of the suffixes only its
own. Hidden states and gradients are therefore those of separate rows, up to the order of
floating-point sums. What is shared is found by comparing token ids, so conversations with different
exemplars, or with none, are right, too; they share less.

Two conversations of one image, of ids 1 2 3 | 4 5 and 1 2 3 | 6, padded to L = 5, have the flat
indices 0 … 4 and 5 … 9. They share three tokens and fill one packed row::

    token       1  2  3  4  5  6
    source      0  1  2  3  4  8        where the token stands in the batch
    positions   0  1  2  3  4  3        each suffix goes on after the prefix
    branch      0  0  0  1  1  2        the 6 sees branch 0 and its own, not 4 and 5
    image       0  0  0  0  0  0

``place`` goes the other way, from the batch into the row: 0 1 2 3 4 for the first conversation, and
0 1 2 5 for the second (its padding points anywhere).

N conversations · L tokens of a padded conversation · R packed rows · S tokens of a packed row.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

MASKED_ATTENTION = ("eager", "sdpa", "flex_attention")  # These implementations take any mask.


@dataclass(frozen=True)
class Packing:
    """Where every token of a batch stands in the packed rows, and what it may see there."""

    source: Tensor
    """int64 (R, S): index into the flattened (N · L) tokens of the batch; 0 in the padding."""
    place: Tensor
    """int64 (N, L): index into the flattened (R · S) packed tokens; 0 in the padding."""
    positions: Tensor
    """int64 (R, S): a token's position in its own conversation."""
    image: Tensor
    """int64 (R, S): which image a token belongs to; -1 in the padding."""
    branch: Tensor
    """int64 (R, S): 0 in the shared prefix, else 1 + the conversation of a suffix."""

    def to(self, device: torch.device) -> Packing:
        return replace(self, **{name: value.to(device) for name, value in vars(self).items()})

    def visible(self, row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """bool, broadcast over index tensors: whether token ``query`` of packed row ``row`` sees
        token ``key``.

        Padding sees padding, as attention over nothing is not a number.
        """
        branch = self.branch[row, key]
        same_image = self.image[row, query] == self.image[row, key]
        return (key <= query) & same_image & ((branch == 0) | (branch == self.branch[row, query]))

    def mask(self) -> Tensor:
        """bool (R, 1, S, S): rows are queries, True is visible."""
        rows, length = self.source.shape
        index = torch.arange(length, device=self.source.device)
        row = torch.arange(rows, device=self.source.device)
        return self.visible(row[:, None, None], index[None, :, None], index[None, None])[:, None]

    def attention_mask(self, implementation: str, dtype: torch.dtype):
        """The mask in the form that an implementation of transformers' attention takes."""
        if implementation == "flex_attention":
            return self.block_mask()
        if implementation == "sdpa":
            return self.mask()
        hidden = torch.zeros((), dtype=dtype, device=self.source.device)
        return hidden.masked_fill(~self.mask(), torch.finfo(dtype).min)

    def block_mask(self):
        """The mask for FlexAttention, which skips blocks where nothing is visible, so that other
        images and conversations cost nothing."""
        from torch.nn.attention.flex_attention import create_block_mask

        rows, length = self.source.shape

        def sees(row, head, query, key):
            return self.visible(row, query, key)

        return create_block_mask(sees, rows, None, length, length, device=self.source.device)


@dataclass
class PrefixSharing:
    """Whether and how conversations share prefixes. It changes the speed, not the results."""

    enabled: bool = True
    row_tokens: int = 0
    """Tokens of a packed row that images may fill together; an image that needs more gets a longer
    row of its own. 0: as many as the largest image needs, so packing makes no row longer."""

    def plan(
        self, input_ids: Tensor, attention_mask: Tensor, image_index: Tensor, implementation: str
    ) -> Packing | None:
        """input_ids, attention_mask (N, L), image_index (N,) -> how to pack them; None where there
        is nothing to gain.

        ``implementation`` of attention: one that takes no mask of its own, such as
        flash_attention_2, gives None and a message.
        """
        if not self.enabled or len(image_index) == len(image_index.unique()):
            return None
        if implementation not in MASKED_ATTENTION or (
            implementation == "flex_attention" and not input_ids.is_cuda
        ):
            _warn_once(
                f"prefix sharing is off: {implementation} cannot use its mask here; sdpa can"
            )
            return None
        groups = _groups(
            input_ids.cpu().numpy(), attention_mask.cpu().numpy() > 0, image_index.cpu().numpy()
        )
        if not any(group.shared for group in groups):
            return None
        rows, length = input_ids.shape
        return _lay_out(groups, (rows, length), self.row_tokens).to(input_ids.device)


@dataclass(frozen=True)
class _Group:
    """The conversations of one image: indices into the flattened batch."""

    tokens: list[np.ndarray]
    shared: int
    """Tokens that all of them begin with."""

    @property
    def length(self) -> int:
        return self.shared + sum(len(t) - self.shared for t in self.tokens)


def _groups(ids: np.ndarray, mask: np.ndarray, image_index: np.ndarray) -> list[_Group]:
    flat = np.arange(ids.size).reshape(ids.shape)
    groups = []
    for image in np.unique(image_index):
        tokens = [flat[row][mask[row]] for row in np.flatnonzero(image_index == image)]
        shared = min(map(len, tokens)) if len(tokens) > 1 else 0
        if shared:
            starts = ids.reshape(-1)[np.stack([t[:shared] for t in tokens])]
            different = np.flatnonzero((starts != starts[:1]).any(0))
            shared = int(different[0]) if len(different) else shared
        groups.append(_Group(tokens, shared))
    return groups


def _rows(lengths: list[int], row_tokens: int) -> list[list[int]]:
    """Indices of ``lengths`` in rows: the longest first, each into the first row with room for it
    (first-fit decreasing)."""
    limit = max(row_tokens, *lengths)
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, left in enumerate(room) if left >= lengths[index]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(limit)
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows


def _lay_out(groups: list[_Group], shape: tuple[int, int], row_tokens: int) -> Packing:
    rows = _rows([group.length for group in groups], row_tokens)
    width = max(sum(groups[i].length for i in row) for row in rows)
    source, positions, branch = (np.zeros((len(rows), width), dtype=np.int64) for _ in range(3))
    image = np.full((len(rows), width), -1, dtype=np.int64)
    place = np.zeros(shape[0] * shape[1], dtype=np.int64)
    for r, members in enumerate(rows):
        end = 0
        for g in members:
            group, start = groups[g], end
            for number, tokens in enumerate(group.tokens):
                first = group.shared if number else 0  # The first brings the prefix.
                begin, end = end, end + len(tokens) - first
                source[r, begin:end] = tokens[first:]
                positions[r, begin:end] = np.arange(first, len(tokens))
                branch[r, begin:end] = 1 + number
                place[tokens[: group.shared]] = r * width + start + np.arange(group.shared)
                place[tokens[group.shared :]] = r * width + np.arange(
                    end - (len(tokens) - group.shared), end
                )
            branch[r, start : start + group.shared] = 0
            image[r, start:end] = g
    tables = {
        "source": source,
        "place": place.reshape(shape),
        "positions": positions,
        "image": image,
        "branch": branch,
    }
    return Packing(**{name: torch.from_numpy(table) for name, table in tables.items()})


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)
