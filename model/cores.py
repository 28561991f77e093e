"""CoReS: a chain of reasoning in a multimodal language model prompts a chain of segmenting in SAM.

    image, question ─► ReasoningChain ─► "It appears on [LOC]. It is [SEG]."
                            └─► hidden states h⁰…hᵀ ─► text_projection ─► SegmentingChain
                                                                             └─► one mask per token

N conversations · L tokens · K targets · T levels · C prompt width · (H, W) the original frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam
from torch import Tensor, nn
from transformers import AutoModel

from cores.dataset.collate import Batch
from cores.dataset.proposals import ProposalSource
from cores.model.checkpoints.finished import answer_defaults, loading_arguments
from cores.model.checkpoints.llava import llava_class
from cores.model.checkpoints.precision import quantized_bits
from cores.model.checkpoints.source import Source, open_source
from cores.model.checkpoints.weights import refuse_bad_loading
from cores.model.config import CoresConfig
from cores.model.connection import TextProjection
from cores.model.masks import Generation, MaskBranch, Segmentation, group_states
from cores.model.objective import Objective
from cores.model.pushed import PushedWhole
from cores.model.reasoning.chain import ReasoningChain
from cores.model.reasoning.generation import Decoding, decode, prefill, unpadded_prompts
from cores.model.reasoning.lora import refuse_apart_or_packed
from cores.model.segmenting.chain import SegmentingChain
from cores.model.segmenting.frames import PIXEL_MEAN, PIXEL_STD
from cores.model.segmenting.sam import build_sam
from cores.model.selecting.proposals import proposal_source
from cores.model.selecting.selector import Selector


@dataclass
class CoresOutput:
    """What one training or teacher-forced pass gives."""

    loss: Tensor
    """(): what is minimised."""
    losses: dict[str, Tensor]
    """Its parts, each () and unweighted: text, then bce and dice of decoded masks, similarity and
    iop of a selector, and pointing where it is used."""
    low_res: list[Tensor]
    """N × (K, T, 4G, 4G): low-res mask logits; empty where only proposals are selected."""
    iou: list[Tensor]
    """N × (K, T): SAM's own prediction of its masks' IoU; likewise."""


class CoresForReasoningSegmentation(PushedWhole):
    """Reasoning segmentation by CoReS, LISA, LLM-Seg or CoReS with a selector: its config says."""

    config: CoresConfig
    config_class = CoresConfig
    base_model_prefix = "cores"
    supports_gradient_checkpointing = True
    # A config may tie them; transformers looks for LLaVA's own declaration one level deep only.
    _tied_weights_keys = {
        "reasoning.llava.lm_head.weight": "reasoning.llava.model.language_model.embed_tokens.weight"
    }
    _supports_sdpa = _supports_flash_attn = True

    def __init__(self, config: CoresConfig):
        if config.level_token_ids is None:
            raise ValueError("config: level_token_ids is missing; build_from_backbones sets it")
        super().__init__(config)
        llava, width = llava_class(config.llava)(config.llava), config.sam["prompt_dim"]
        sam, selector = build_sam(config.sam_dims), config.selector_config
        proposes = selector is not None and config.decodes
        self.reasoning = ReasoningChain(llava, config.level_token_ids)
        self.segmenting = SegmentingChain(sam, config.refiner_config, config.decode_chunk, proposes)
        self.selecting = None if selector is None else Selector(selector, width)
        hidden = llava.config.get_text_config().hidden_size
        self.text_projection = TextProjection(hidden, width, config.text_projection_norm)
        self.generation_config = answer_defaults(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Modules initialise themselves when built; only what no checkpoint holds is filled in
        after loading."""
        if isinstance(module, Sam):
            module.pixel_mean.copy_(torch.tensor(PIXEL_MEAN)[:, None, None])
            module.pixel_std.copy_(torch.tensor(PIXEL_STD)[:, None, None])

    @classmethod
    def from_pretrained(  # type: ignore[override]  # It takes an opened Source, too.
        cls, name: str | Path | Source, *args: Any, vision_tower: str | None = None, **kwargs: Any
    ) -> CoresForReasoningSegmentation:
        """As in transformers, but a missing, unexpected or misshapen weight is an error by name.

        ``name``: a folder that ``save_pretrained`` wrote, or a folder or hub name of a published
        LISA or CoReS (model/checkpoints/published.py; ``vision_tower``: its CLIP, in place of the
        one that its config.json names), or what ``open_source`` made of one. Raises
        FileNotFoundError where there is none and ValueError for another kind of model.
        """
        source = open_source(name, vision_tower, **kwargs)
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs = loading_arguments(source, kwargs.pop("dtype", None)) | kwargs
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        loaded: Any = super().from_pretrained(None, *args, **kwargs)
        model, info = loaded  # The first flag makes a pair of it.
        refuse_bad_loading(source.name, info)
        if isinstance(kwargs["dtype"], torch.dtype) and not quantized_bits(model):
            model.to(kwargs["dtype"])  # Its inner configs remember how the parts were stored.
        model.generation_config = source.generation_config or model.generation_config
        model.origin = source
        return loaded if wants_info else model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers. Raises ValueError for adapters apart and packed weights, because
        nothing could read such a folder."""
        refuse_apart_or_packed(self)
        super().save_pretrained(*args, **kwargs)
        self.generation_config.save_pretrained(args[0] if args else kwargs["save_directory"])

    def get_input_embeddings(self) -> nn.Module:
        return self.reasoning.llava.get_input_embeddings()

    def train(self, mode: bool = True) -> CoresForReasoningSegmentation:
        """The frozen encoders stay in evaluation mode."""
        super().train(mode)
        self.segmenting.sam.image_encoder.eval()
        self.segmenting.sam.prompt_encoder.eval()
        self.reasoning.llava.model.vision_tower.eval()
        return self

    @property
    def mask_branch(self) -> MaskBranch:
        """What turns prompt tokens into masks."""
        return MaskBranch(self.config, self.segmenting, self.selecting)

    @property
    def objective(self) -> Objective:
        """What training minimises."""
        return Objective(self.config, self.segmenting, self.selecting)

    def proposal_source(
        self, folder: str | Path | None, generate: bool = True
    ) -> ProposalSource | None:
        """What a model with a selector needs as ``processor.proposals``, None for another; see
        model.selecting.proposals."""
        selector, segmenting = self.config.selector_config, self.segmenting
        return None if selector is None else proposal_source(segmenting, selector, folder, generate)

    def forward(self, batch: Batch) -> CoresOutput:
        """Text loss and mask losses of a batch with its answers in it (training, teacher-forced
        evaluation)."""
        objective, branch = self.objective, self.mask_branch
        hidden = self.hidden_states(batch, wanted=_predicting(batch))
        prompts, counts = self.prompt_tokens(hidden, batch)
        branch.require_proposals(batch.proposals)
        parts = {"text": self.reasoning.text_loss(hidden, batch.labels)}
        side, index = self.config.sam_dims.low_res, batch.image_index
        logits = prompts.new_zeros((0, len(self.config.levels), side, side))
        iou = logits.new_zeros(logits.shape[:2])
        if not sum(counts):
            parts |= objective.without_targets(prompts)
        else:
            images, chain_masks = branch.encode_batch(batch), None
            if self.config.decodes:
                logits, iou = branch.decode_levels(prompts, counts, index, images)
                parts |= objective.mask_losses(logits, prompts, batch, counts)
            if self.selecting is not None:
                if self.config.decodes:  # No gradient flows into the chain through its own mask.
                    last = branch.to_masks(logits[:, -1:].detach(), counts, index, images)
                    chain_masks = [mask[:, 0] for mask in last]
                scores = branch.score(prompts, counts, index, images, chain_masks)
                parts |= objective.selection_losses(scores, prompts, batch, counts, chain_masks)
        decoded = [list(t.split(counts)) if self.config.decodes else [] for t in (logits, iou)]
        return CoresOutput(objective.total(parts), parts, *decoded)

    @torch.no_grad()
    def segment(self, batch: Batch) -> list[Segmentation]:
        """Teacher-forced masks: the answers, with their tokens, are in the batch. One Segmentation
        per conversation."""
        hidden = self.hidden_states(batch, wanted=_predicting(batch))
        return self.mask_branch.segment_batch(*self.prompt_tokens(hidden, batch), batch)

    @torch.no_grad()
    def generate(
        self, batch: Batch, tokenizer: Any, max_new_tokens: int = 64, **decoding: Any
    ) -> list[Generation]:
        """Free answers to left-padded prompts (``collate_prompts``), with masks for every complete
        group of tokens; an answer that lacks a level's token before [SEG] has none there.

        ``decoding``: further fields of model.reasoning.generation.Decoding; greedy by default.
        Raises ValueError for an unknown option and for a model in training mode.
        """
        if self.training:
            raise ValueError("generate needs a model in evaluation mode: call `model.eval()` first")
        options = Decoding.of(max_new_tokens=max_new_tokens, **decoding)
        end = tokenizer.eos_token_id
        features = self.reasoning.image_features(batch.clip_pixels)
        cache, hidden = prefill(self.reasoning, batch, features)
        steps = list(decode(cache, hidden, end, options, unpadded_prompts(batch)))
        del cache  # Keys and values make room for SAM.
        ids, states = (torch.stack(part, dim=1) for part in zip(*steps, strict=True))
        answers = [list(takewhile(lambda token: token != end, row)) for row in ids.tolist()]
        before_end = [row[: len(a)] for row, a in zip(states, answers, strict=True)]
        prompts, counts = self.group_prompts(before_end, answers)
        found = self.mask_branch.segment_batch(prompts, counts, batch)
        texts = [tokenizer.decode(answer).strip() for answer in answers]
        return [
            Generation(f.masks, f.iou, answer, text, finished=len(answer) < ids.shape[1])
            for f, answer, text in zip(found, answers, texts, strict=True)
        ]

    def hidden_states(self, batch: Batch, wanted: Tensor | None = None) -> Tensor:
        """Last hidden states (N, L, d); ``wanted`` bool (N, L): what is needed of them, None for
        all."""
        with torch.no_grad():
            features = self.reasoning.image_features(batch.clip_pixels)
        tokens = batch.input_ids, batch.attention_mask, batch.image_index
        return self.reasoning(*tokens, features, wanted)

    def prompt_tokens(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, list[int]]:
        """The projected answer tokens (K, T, C) of all conversations, and how many targets each
        has. With a gradient and without targets there is one, (1, T, C), which means nothing."""
        counts = [len(masks) for masks in batch.target_masks]
        states = torch.cat(self.reasoning.token_states(hidden, batch.labels, batch.info, counts))
        if torch.is_grad_enabled() and not len(states):
            states = hidden[:1, :1].expand(1, states.shape[1], -1)
        return self.text_projection(states), counts

    def group_prompts(
        self, states: Sequence[Tensor], answers: Sequence[Sequence[int]]
    ) -> tuple[Tensor, list[int]]:
        """The projected tokens (K, T, C) of every complete group in free answers, and how many
        groups each has; arguments as of model.masks.group_states."""
        chosen, counts = group_states(states, answers, self.reasoning.level_token_ids)
        return self.text_projection(chosen), counts


def _predicting(batch: Batch) -> Tensor:
    """bool (N, L): the positions that predict a supervised token."""
    return F.pad(batch.labels[:, 1:] >= 0, (0, 1))


AutoModel.register(CoresConfig, CoresForReasoningSegmentation)
