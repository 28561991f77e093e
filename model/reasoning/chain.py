"""The chain of reasoning: the multimodal language model that reads image and question, answers, and
yields one hidden state per answer token.

B images · N conversations · L tokens · P image tokens per image · d hidden size · K targets · T
levels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, LlavaForConditionalGeneration

from model import losses
from model.reasoning.prefix_sharing import PrefixSharing

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
        # a published LLaVA has no row for the image token: its id stands beyond the table
        embeddings = self.llava.get_input_embeddings()(input_ids.masked_fill(places, 0))
        return embeddings.masked_scatter(
            places[..., None], features[image_index].to(embeddings.dtype)
        )

    def read(
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
            wanted = (
                torch.zeros_like(packing.source, dtype=torch.bool)
                .view(-1)
                .index_fill_(0, packing.place[wanted], True)
            )
            wanted = wanted.view_as(packing.source)
        return self.hidden_states(packed, mask, packing.positions, wanted).flatten(0, 1)[
            packing.place
        ]

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
        None: 0, 1, 2, …; ``wanted`` as in ``read``.
        """
        language_model = self.llava.model.language_model
        with _last_layer_only_at(wanted, language_model.layers[-1]):
            out = language_model(
                inputs_embeds=embeddings,
                attention_mask=attention_mask,
                position_ids=positions,
                use_cache=False,
            )
        return out.last_hidden_state

    def read_on(
        self, embeddings: Tensor, attention_mask: Tensor, positions: Tensor, cache: Cache
    ) -> Tensor:
        """Hidden states of l further tokens after what ``cache`` holds, which grows by them: (N, l,
        d) -> (N, l, d).

        attention_mask (N, length in the cache + l), positions int64 (N, l) within each row's own
        tokens.
        """
        out = self.llava.model.language_model(
            inputs_embeds=embeddings,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        return out.last_hidden_state

    def supervised_logits(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Vocabulary logits (n, V) and labels (n,) where there is a label: no other position meets
        the vocabulary."""
        chosen = labels[:, 1:] >= 0
        return self.llava.lm_head(hidden[:, :-1][chosen]), labels[:, 1:][chosen]

    def text_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy (), float32, of hidden (N, L, d) at the labels (N, L); logits of a few
        tokens at a time.

        A position's logits are as wide as the vocabulary, and the loss needs them three times:
        where there are many positions, each piece is computed again in the backward pass instead of
        kept.
        """
        chosen = labels[:, 1:] >= 0
        states, wanted = hidden[:, :-1][chosen], labels[:, 1:][chosen]
        if len(wanted) <= TEXT_CHUNK or not torch.is_grad_enabled():
            return losses.text_loss(self.llava.lm_head(states), wanted)

        def piece(states: Tensor, wanted: Tensor) -> Tensor:
            return losses.text_loss(self.llava.lm_head(states), wanted) * len(wanted)

        pieces = zip(states.split(TEXT_CHUNK), wanted.split(TEXT_CHUNK), strict=True)
        return sum(checkpoint(piece, *pair, use_reentrant=False) for pair in pieces) / len(wanted)

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
            counts = [len(p) for p in per_level]
            if any(c != count for c in counts):
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

    Its backward pass comes first: recomputed or kept, it is the only layer whose activations are
    there by then.
    """
    # what transformers calls it since 5.23, or its name until then
    enable = (
        getattr(llava, "activation_checkpointing_enable", None)
        or llava.gradient_checkpointing_enable
    )
    enable({"use_reentrant": False})
    llava.enable_input_require_grads()
    llava.model.language_model.layers[-1].gradient_checkpointing = False


@contextmanager
def _last_layer_only_at(wanted: Tensor | None, layer: nn.Module) -> Iterator[None]:
    """Lets the row-wise parts of a decoder layer work on the ``wanted`` (N, L) positions only;
    others get zeros.

    Nothing reads the last layer's output elsewhere, and only its keys and values are needed of
    every position. A layer that is computed again in the backward pass, after this context, is left
    alone.
    """
    attention = getattr(layer, "self_attn", None)
    parts = [
        getattr(attention, "q_proj", None),
        getattr(attention, "o_proj", None),
        getattr(layer, "mlp", None),
    ]
    again = getattr(layer, "gradient_checkpointing", False) and layer.training
    if wanted is None or again or not wanted.any():
        parts = []
    index = None if wanted is None else wanted.flatten().nonzero()[:, 0]
    patched = [part for part in parts if part is not None]

    def only_there(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def compute(x: Tensor) -> Tensor:
            rows = index.to(x.device)
            some = forward(x.flatten(0, 1)[rows])
            return (
                some.new_zeros(x.shape[0] * x.shape[1], some.shape[-1])
                .index_copy(0, rows, some)
                .unflatten(0, x.shape[:2])
            )

        return compute

    for part in patched:
        part.forward = only_there(part.forward)
    try:
        yield
    finally:
        for part in patched:
            del part.forward  # the class's own is there again
