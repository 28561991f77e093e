"""The chain of reasoning: the multimodal language model reads image and question, answers, and
gives one hidden state per answer token.

B images · N conversations · L tokens · P image tokens per image · d hidden size · K targets of one
conversation · T levels · V words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, LlavaForConditionalGeneration

from cores.model import losses
from cores.model.reasoning.prefix_sharing import PrefixSharing

TEXT_CHUNK = 512  # positions whose logits are held at a time: 64 MB in float32 for 32,000 words


class ReasoningChain(nn.Module):
    """A LLaVA of transformers, unchanged, read at the places where it predicts answer tokens."""

    def __init__(self, llava: LlavaForConditionalGeneration, level_token_ids: list[int]):
        super().__init__()
        self.llava = llava
        self.level_token_ids = level_token_ids
        self.sharing = PrefixSharing()

    @property
    def image_token_id(self) -> int:
        return self.llava.config.image_token_id

    def image_features(self, pixels: Tensor) -> Tensor:
        """CLIP (frozen) and projector, once per image: (B, 3, h, w) -> (B, P, d)."""
        return torch.stack(list(self.llava.get_image_features(pixel_values=pixels).pooler_output))

    def embed(self, input_ids: Tensor, features: Tensor, image_index: Tensor) -> Tensor:
        """Token embeddings with each row's image features in place of its image tokens: (N, L) ->
        (N, L, d).

        Raises ValueError naming the row whose placeholders do not match its image's features; a
        check of the batch total would let one row take another's image, and a row without
        placeholders would answer blind.
        """
        places = input_ids == self.image_token_id
        found, expected = places.sum(1), features.shape[1]
        wrong = (found != expected).nonzero()[:, 0].tolist()
        if wrong:
            row = wrong[0]
            raise ValueError(
                f"row {row} of the batch: {int(found[row])} image tokens but {expected} image"
                " features"
            )
        # A published LLaVA has no row for the image token, whose id stands beyond the table.
        embeddings = self.llava.get_input_embeddings()(input_ids.masked_fill(places, 0))
        return embeddings.masked_scatter(
            places[..., None], features[image_index].to(embeddings.dtype)
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        image_index: Tensor,
        features: Tensor,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Right-padded conversations (N, L) with their images (B, P, d) -> hidden states (N, L, d).

        Conversations of one image are read together where ``sharing`` finds that they begin alike.
        ``wanted`` bool (N, L): the only positions whose states have to be right, None for all.
        """
        embeddings = self.embed(input_ids, features, image_index)
        language_model = self.llava.model.language_model
        implementation = language_model.config._attn_implementation
        packing = self.sharing.plan(input_ids, attention_mask, image_index, implementation)
        if packing is None:
            return self.hidden_states(embeddings, attention_mask, wanted=wanted)
        packed = embeddings.flatten(0, 1)[packing.source]
        mask = packing.attention_mask(implementation, packed.dtype)
        if wanted is not None:
            wanted_places = torch.zeros_like(packing.source, dtype=torch.bool)
            wanted_places.view(-1)[packing.place[wanted]] = True
            wanted = wanted_places
        hidden = self.hidden_states(packed, mask, packing.positions, wanted)
        return hidden.flatten(0, 1)[packing.place]

    def hidden_states(
        self,
        embeddings: Tensor,
        attention_mask: Tensor,
        positions: Tensor | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Last-layer hidden states after the final norm: (N, L, d) -> (N, L, d); ``lm_head`` of
        them are the logits.

        ``attention_mask``: (N, L), or what each token sees as (N, 1, L, L); ``positions`` (N, L),
        None: 0, 1, 2, …; ``wanted`` as in ``forward``.
        """
        language_model = self.llava.model.language_model
        inputs = {"inputs_embeds": embeddings, "attention_mask": attention_mask}
        with _last_layer_only_at(wanted, language_model.layers[-1]):
            out = language_model(**inputs, position_ids=positions, use_cache=False)
        return out.last_hidden_state

    def forward_cached(
        self, embeddings: Tensor, attention_mask: Tensor, positions: Tensor, cache: Cache
    ) -> Tensor:
        """Hidden states of l further tokens after what the KV ``cache`` holds, which grows by them:
        (N, l, d) -> (N, l, d).

        attention_mask (N, length of the cache + l), positions int64 (N, l) within each row's own
        tokens.
        """
        inputs = {"inputs_embeds": embeddings, "attention_mask": attention_mask}
        out = self.llava.model.language_model(
            **inputs, position_ids=positions, past_key_values=cache, use_cache=True
        )
        return out.last_hidden_state

    def text_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy (), float32, of hidden (N, L, d) at the labels (N, L).

        Only positions with a label meet the vocabulary. Their logits are V wide, and the loss needs
        them three times, so where there are many, each piece is computed again in the backward pass
        instead of kept.
        """
        chosen = labels[:, 1:] >= 0
        states, wanted = hidden[:, :-1][chosen], labels[:, 1:][chosen]
        if len(wanted) <= TEXT_CHUNK or not torch.is_grad_enabled():
            return losses.text_loss(self.llava.lm_head(states), wanted)

        def piece(states: Tensor, wanted: Tensor) -> Tensor:
            return losses.text_loss(self.llava.lm_head(states), wanted) * len(wanted)

        pieces = zip(states.split(TEXT_CHUNK), wanted.split(TEXT_CHUNK), strict=True)
        sums = [checkpoint(piece, *pair, use_reentrant=False) for pair in pieces]
        return torch.stack(sums).sum() / len(wanted)

    def token_states(
        self, hidden: Tensor, token_ids: Tensor, info: list[dict], expected: list[int]
    ) -> list[Tensor]:
        """The hidden states that *predict* the answer tokens: the positions just before them.

        hidden (N, L, d); token_ids (N, L): the answer's ids, anything else where a token is not
        part of an answer; ``expected``: targets per row; ``info`` names the rows. Returns N tensors
        (K, T, d). Raises ValueError if a row has other numbers of tokens than ``expected``.
        """
        out = []
        for row, (ids, count) in enumerate(zip(token_ids, expected, strict=True)):
            per_level = [(ids == token).nonzero()[:, 0] for token in self.level_token_ids]
            counts = [len(positions) for positions in per_level]
            if any(found != count for found in counts):
                where = f"{info[row]['dataset']} {info[row]['id']} ({info[row]['image_path']})"
                raise ValueError(
                    f"{where}: {counts} answer tokens per level but {count} target masks (row"
                    f" {row})"
                )
            positions = torch.stack(per_level, dim=1) - 1  # (K, T)
            out.append(hidden[row, positions.clamp(min=0)])
        return out


def enable_checkpointing(llava: LlavaForConditionalGeneration) -> None:
    """Recomputes the language model's activations in the backward pass, but for the last layer.

    The backward pass comes to the last layer first, when no other layer's activations have been
    recomputed yet, so keeping them does not raise the peak.
    """
    # transformers renamed the method in 5.23.
    enable = getattr(llava, "activation_checkpointing_enable", None)
    enable = enable or llava.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    llava.enable_input_require_grads()
    llava.model.language_model.layers[-1].gradient_checkpointing = False


@contextmanager
def _last_layer_only_at(wanted: Tensor | None, layer: nn.Module) -> Iterator[None]:
    """Lets the row-wise parts of the last decoder layer work on the ``wanted`` (N, L) positions
    only; the others get zeros.

    Nothing reads the last layer's output elsewhere, and of the other positions only its keys and
    values are needed. A layer whose activations are recomputed in the backward pass, which is after
    this context, is left alone.
    """
    recomputed = getattr(layer, "gradient_checkpointing", False) and layer.training
    if wanted is None or recomputed or not wanted.any():
        yield
        return
    index = wanted.flatten().nonzero()[:, 0]
    attention = getattr(layer, "self_attn", None)
    parts = getattr(attention, "q_proj", None), getattr(attention, "o_proj", None)
    patched = [part for part in (*parts, getattr(layer, "mlp", None)) if part is not None]

    def only_there(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def compute(x: Tensor) -> Tensor:
            rows = index.to(x.device)
            some = forward(x.flatten(0, 1)[rows])
            everywhere = some.new_zeros(x.shape[0] * x.shape[1], some.shape[-1])
            return everywhere.index_copy(0, rows, some).unflatten(0, x.shape[:2])

        return compute

    for part in patched:
        part.forward = only_there(part.forward)
    try:
        yield
    finally:
        for part in patched:
            del part.forward  # The forward of the class is visible again.
