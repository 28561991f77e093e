"""CoReS: a chain of reasoning in a multimodal language model prompts a chain of segmenting in SAM.

    image, question ─► ReasoningChain ─► "It appears on [LOC]. It is [SEG]."
                            └─► hidden states h⁰…hᵀ ─► text_projection ─► SegmentingChain ─► one mask per token

B images · N conversations · L tokens · K targets · T levels · C prompt width · (H, W) an image in
the original frame.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModel,
    Dinov2Model,
    GenerationConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)
from transformers.utils import GENERATION_CONFIG_NAME

from dataset.collate import Batch
from dataset.proposals import ProposalSource, ProposalStore
from model import losses
from model.checkpoints import published
from model.checkpoints.llava import (
    add_image_token,
    add_level_tokens,
    assemble,
    llava_class,
    load_llava,
    load_tokenizer,
)
from model.checkpoints.precision import quantized_bits
from model.checkpoints.sam import load_sam
from model.checkpoints.weights import find_file, read_all, read_json_file, refuse_bad_loading
from model.config import CoresConfig, ProposalConfig, SelectorConfig
from model.masks import Scene, Segmentation
from model.processor import CoresProcessor
from model.reasoning.chain import ReasoningChain
from model.reasoning.generation import Decoding, Generation, generate
from model.reasoning.lora import has_lora
from model.segmenting.chain import SegmentingChain, TokenRefiner
from model.segmenting.frames import PIXEL_MEAN, PIXEL_STD, to_grid, to_original
from model.segmenting.sam import build_sam, position_encoding
from model.selecting.proposals import fingerprint, make_generator
from model.selecting.selector import Selector, dinov2_pixels, required
from model.selecting.targets import overlap, truth_of

# pixels of the original frame that the mask losses hold at a time: 16 MB a copy
MASK_PIXELS = 1 << 22


@dataclass
class CoresOutput:
    """Of one training or teacher-forced pass."""

    loss: Tensor
    """(): what is minimised."""
    losses: dict[str, Tensor]
    """Its parts, each () and unweighted: text, then bce and dice of decoded masks, similarity and
    iop of a selector, and pointing where it is used."""
    low_res: list[Tensor]
    """N × float (K, T, 4G, 4G): mask logits, low-res frame; none where only proposals are
    selected."""
    iou: list[Tensor]
    """N × float (K, T): SAM's own prediction of its masks' IoU; likewise."""


class TextProjection(nn.Sequential):
    """Hidden state (…, d) -> prompt token (…, C): LISA's Linear, ReLU, Linear, with an optional
    LayerNorm behind."""

    def __init__(self, hidden: int, width: int, norm: float | None):
        layers: list[nn.Module] = [
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, width),
        ]
        if norm is not None:
            layers.append(nn.LayerNorm(width))
            # a normalised token has norm √C
            nn.init.constant_(layers[-1].weight, norm / width**0.5)
        super().__init__(*layers)


class CoresForReasoningSegmentation(PreTrainedModel):
    config_class = CoresConfig
    base_model_prefix = "cores"
    supports_gradient_checkpointing = True
    # where the config ties them; transformers looks for LLaVA's own one level deep only
    _tied_weights_keys = {
        "reasoning.llava.lm_head.weight": "reasoning.llava.model.language_model.embed_tokens.weight"
    }
    _supports_sdpa = _supports_flash_attn = True

    def __init__(self, config: CoresConfig):
        if config.level_token_ids is None:
            raise ValueError(
                "config: level_token_ids is missing; `from_backbones` adds the tokens to a"
                " tokenizer"
            )
        super().__init__(config)
        self.reasoning = ReasoningChain(
            llava_class(config.llava)(config.llava), config.level_token_ids
        )
        sam, proposes = build_sam(config.sam_dims), config.selector is not None and config.decodes
        self.segmenting = SegmentingChain(sam, config.refiner_config, config.decode_chunk, proposes)
        self.selecting = self._new_selector(config)
        self.text_projection = self._new_text_projection(config)
        self.generation_config = answer_defaults(config)
        self.post_init()

    @staticmethod
    def _new_text_projection(config: CoresConfig) -> TextProjection:
        hidden, width = config.llava.text_config.hidden_size, config.sam["prompt_dim"]
        return TextProjection(hidden, width, config.text_projection_norm)

    @staticmethod
    def _new_selector(config: CoresConfig) -> Selector | None:
        return (
            None
            if config.selector is None
            else Selector(config.selector_config, config.sam["prompt_dim"])
        )

    def _init_weights(self, module: nn.Module) -> None:
        """Modules initialise themselves when built; only what no checkpoint holds is filled in
        after loading."""
        if isinstance(module, Sam):
            module.pixel_mean.copy_(torch.tensor(PIXEL_MEAN)[:, None, None])
            module.pixel_std.copy_(torch.tensor(PIXEL_STD)[:, None, None])

    # ------------------------------------------------------------------------------------- assembly

    @classmethod
    def from_backbones(
        cls,
        version: str,
        vision_pretrained: str,
        levels: Sequence[str] = ("LOC", "SEG"),
        template: str = "llava_v1",
        exemplar_count: int = 1,
        dtype: torch.dtype = torch.float32,
        model_max_length: int | None = None,
        attn_implementation: str | None = None,
        quantization_config: Any = None,
        vision_tower: str | None = None,
        system: str | None = None,
        features_pretrained: str | None = None,
        **config: Any,
    ) -> tuple[CoresForReasoningSegmentation, CoresProcessor]:
        """A new model, in evaluation mode, of a LLaVA (``version``) and a SAM
        (``vision_pretrained``).

        ``config``: further fields of CoresConfig. ``model_max_length``: longest sequence in tokens,
        None for the tokenizer's own. ``quantization_config``: transformers', for the language model
        (``model.quantize``). ``vision_tower``: see ``load_llava``. ``system``: system text in place
        of the template's. ``features_pretrained``: the DINOv2 of a selector that has one. Raises
        FileNotFoundError or ValueError where parts are missing or do not fit together.
        """
        unknown = config.keys() - signature(CoresConfig).parameters.keys()
        if unknown:
            raise ValueError(f"no such field of CoresConfig: {', '.join(sorted(unknown))}")
        sam, dims = load_sam(vision_pretrained)
        encoder = load_dinov2(features_pretrained, config.get("selector"))
        loading = {
            "attn_implementation": attn_implementation,
            "quantization_config": quantization_config,
        }
        backbone = load_llava(
            version, dtype, vision_tower, **{k: v for k, v in loading.items() if v is not None}
        )
        llava, tokenizer = backbone.model, backbone.tokenizer
        ids = add_level_tokens(llava, tokenizer, list(levels))
        add_image_token(llava.config, tokenizer)
        full = CoresConfig(
            llava=llava.config, sam=vars(dims), levels=list(levels), level_token_ids=ids, **config
        )
        processor = CoresProcessor(
            tokenizer,
            backbone.image_processor,
            dims.image_size,
            _image_tokens(llava),
            list(levels),
            template,
            exemplar_count,
            system=system,
            image_marks=backbone.image_marks,
            strip_at_tokens=backbone.strip_at_tokens,
        )
        _check_fit(version, llava, processor)
        with torch.device("meta"):  # the parts come ready made: nothing is initialised twice
            model = cls(full)
        model.reasoning.llava = llava
        model.segmenting.sam = sam.to(dtype)
        if model.segmenting.untrained is not None:
            model.segmenting.untrained = copy.deepcopy(sam.mask_decoder)
        model.text_projection = cls._new_text_projection(full).to(dtype)
        if model.selecting is not None:
            model.selecting = cls._new_selector(full).to(dtype)
            model.selecting.encoder = None if encoder is None else encoder.to(dtype)
        if model.segmenting.refiner is not None:
            model.segmenting.refiner = TokenRefiner(dims.prompt_dim, full.refiner_config).to(dtype)
        # building the model around it has reset what the config said
        if attn_implementation is not None:
            llava.set_attn_implementation({"": "sdpa", "text_config": attn_implementation})
        if model_max_length is not None:
            tokenizer.model_max_length = model_max_length
        return model.eval(), processor

    @classmethod
    def from_pretrained(
        cls, name: str, *args: Any, vision_tower: str | None = None, **kwargs: Any
    ) -> CoresForReasoningSegmentation:
        """As in transformers, but a missing, unexpected or wrongly shaped weight is an error that
        names it.

        ``name``: a folder that ``save_pretrained`` wrote, or a folder or hub name of a published
        LISA or CoReS (model/checkpoints/published.py; ``vision_tower``: its CLIP, in place of the
        one that its config.json names). Raises FileNotFoundError where there is none and ValueError
        for another kind of model.
        """
        content = read_json_file(name, "config.json")
        dtype = kwargs.get("dtype")
        kwargs["dtype"] = dtype = (
            getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
        )
        wants_info = kwargs.pop("output_loading_info", False)
        if published.is_published(content):
            kwargs |= cls._published_parts(str(name), content, dtype, vision_tower)
            dtype, source = kwargs["dtype"], None
        elif content.get("model_type") == CoresConfig.model_type:
            source = name
            kwargs |= published.tower_renaming(read_all(name))
        else:
            found = content.get("model_type")
            raise ValueError(
                f"{name}: model_type is {found!r}; a merged model says {CoresConfig.model_type!r}"
            )
        model, info = super().from_pretrained(
            source, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        refuse_bad_loading(str(name), info)
        if isinstance(dtype, torch.dtype) and not quantized_bits(model):
            model.to(dtype)  # the configs inside the config remember how they were stored
        if find_file(name, GENERATION_CONFIG_NAME) is not None:
            model.generation_config = GenerationConfig.from_pretrained(name)
        return (model, info) if wants_info else model

    @staticmethod
    def _published_parts(
        name: str, content: dict, dtype: torch.dtype | str | None, vision_tower: str | None
    ) -> dict[str, Any]:
        """``config``, ``state_dict`` and ``dtype`` of a published LISA or CoReS; "auto" is the
        dtype of its weights."""
        weights = read_all(name)
        if not published.has_masks(weights):
            raise ValueError(
                f"{name}: a LLaVA without masks; it is a backbone, which needs --vision_pretrained"
            )
        if not isinstance(dtype, torch.dtype):
            dtype = (
                weights["lm_head.weight"].dtype
                if dtype == "auto" and "lm_head.weight" in weights
                else torch.float32
            )
        tokenizer = load_tokenizer(name)
        levels = content.get("levels") or published.levels_of(tokenizer.get_vocab(), name)
        llava, ours, _ = assemble(name, content, weights, tokenizer, dtype, vision_tower)
        add_image_token(llava, tokenizer)
        has_refiner = any(key.startswith(published.REFINER) for key in ours)
        config = CoresConfig(
            llava=llava,
            sam=content.get("sam") or vars(published.sam_dims(weights, name)),
            levels=levels,
            level_token_ids=tokenizer.convert_tokens_to_ids([f"[{level}]" for level in levels]),
            refiner=(
                {"kind": "attention+norm", "pooling": "released"}
                if has_refiner
                else {"kind": "none"}
            ),
        )
        return {"config": config, "state_dict": ours, "dtype": dtype}

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers. Raises ValueError while adapters are apart: nothing could read such a
        folder."""
        if has_lora(self):
            raise ValueError(
                "the model has LoRA adapters; merge them with `merge_lora` before `save_pretrained`"
            )
        if bits := quantized_bits(self):
            raise ValueError(
                f"the model is held in {bits} bits; load it in full precision to save it"
            )
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

    # -------------------------------------------------------------------------------------- forward

    def forward(self, batch: Batch) -> CoresOutput:
        """Text loss and mask losses of a batch with its answers in it (training, teacher-forced
        evaluation)."""
        hidden = self._hidden(batch, wanted=_supervised(batch))
        tokens, expected = self._tokens(hidden, batch)
        parts = {"text": self.reasoning.text_loss(hidden, batch.labels)}
        scene = Scene.of(self, batch)
        if not self.config.decodes:
            parts |= self._selection_losses(tokens, batch, expected, scene)
            return CoresOutput(self.total(parts), parts, [], [])
        low_res, iou = scene.decode(tokens, expected, batch.image_index)
        parts |= self._mask_losses(low_res, tokens, batch, expected)
        if self.selecting is not None:
            parts |= self._selection_losses(tokens, batch, expected, scene, low_res[:, -1])
        return CoresOutput(
            self.total(parts), parts, list(low_res.split(expected)), list(iou.split(expected))
        )

    @torch.no_grad()
    def segment(self, batch: Batch) -> list[Segmentation]:
        """Teacher-forced masks: the answers, with their tokens, are in the batch. One Segmentation
        per conversation."""
        return Scene.of(self, batch).masks(
            *self._tokens(self._hidden(batch, _supervised(batch)), batch), batch.image_index
        )

    @torch.no_grad()
    def mask_features(
        self,
        pixels: Tensor,
        resized: list[tuple[int, int]],
        cached: tuple[list[Tensor | None], list[str]] | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """What the mask branch sees of B images: SAM's embedding (B, C, G, G), and what a selector
        pools, (B, c, G', G'): the same, or features of its DINOv2. None for what this model does
        not look at.

        pixels (B', 3, S, S), ``resized`` B × (height, width), and ``cached`` embeddings with their
        names, as in a Batch.
        """
        own = self.selecting is not None and self.selecting.encoder is not None
        embedding = None
        if self.config.decodes or not own:
            embedding = (
                self.segmenting.embed(pixels)
                if cached is None
                else self.segmenting.embed_missing(*cached, pixels)
            )
        if not own:
            return embedding, None if self.selecting is None else embedding
        sam, size = self.segmenting.sam, self.selecting.config.feature_size
        return embedding, self.selecting.encode(
            dinov2_pixels(pixels, resized, size, sam.pixel_mean, sam.pixel_std)
        )

    def _tokens(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, list[int]]:
        """The projected answer tokens (K, T, C) of all conversations, and how many targets each
        has.

        With a gradient and without targets: one that means nothing, for ``_stand_in``.
        """
        expected = [len(m) for m in batch.target_masks]
        states = torch.cat(self.reasoning.token_states(hidden, batch.labels, batch.info, expected))
        if torch.is_grad_enabled() and not len(states):
            states = hidden[:1, :1].expand(1, states.shape[1], -1)
        return self.text_projection(states), expected

    def _hidden(self, batch: Batch, wanted: Tensor | None = None) -> Tensor:
        """Last hidden states (N, L, d); ``wanted`` bool (N, L): what is needed of them, None for
        all."""
        with torch.no_grad():
            features = self.reasoning.image_features(batch.clip_pixels)
        return self.reasoning.read(
            batch.input_ids, batch.attention_mask, batch.image_index, features, wanted
        )

    # ------------------------------------------------------------------------------------ selection

    def proposal_source(
        self, folder: str | Path | None, generate: bool = True
    ) -> ProposalSource | None:
        """Where ``collate`` gets proposals for this model, or None if it selects nothing; set as
        ``processor.proposals``.

        ``folder``: of the store, None for none. ``generate``: compute what it lacks, with the
        model's own SAM, which is copied at the first image where its weights are half precision.
        """
        c = self.config.selector_config
        if c is None:
            return None
        settings, find = ProposalConfig(**c.proposals), None

        def compute(image: np.ndarray):
            nonlocal find
            find = find or make_generator(self.segmenting.proposer, settings)
            return find(image)

        store = (
            None
            if folder is None
            else ProposalStore(folder, fingerprint(self.segmenting.proposer, settings))
        )
        return ProposalSource(c.ranking, c.count, c.pool_size, store, compute if generate else None)

    def _selection_losses(
        self,
        tokens: Tensor,
        batch: Batch,
        counts: list[int],
        scene: Scene,
        chain: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """``chain``: the last low-res logits (K, 4G, 4G) of the targets, whose masks stand among
        the proposals; no gradient goes into them from here."""
        pointing = self.config.pointing_weight and chain is None  # else a mask loss already
        if not sum(counts):
            required(batch.proposals)
            names = ["similarity", "iop", "pointing"] if pointing else ["similarity", "iop"]
            return dict.fromkeys(names, self._stand_in_selection(tokens))
        own = None
        if chain is not None:
            logits = zip(
                chain.detach()[:, None].split(counts), batch.image_index.tolist(), strict=True
            )
            own = [scene.in_frame(low_res, image)[:, 0] for low_res, image in logits]
        scores = scene.score(tokens, counts, batch.image_index, own)
        truth = [torch.zeros(scores.iop.shape, device=tokens.device) for _ in range(2)]
        rows = torch.arange(len(tokens)).split(counts)
        for n, (row, found) in enumerate(
            zip(rows, truth_of(batch, self.config.ignore_in_loss), strict=True)
        ):
            for table, values in zip(truth, found, strict=True):
                table[row, : values.shape[1]] = torch.from_numpy(values).to(table)
            if own is not None:
                ignore = batch.ignore_masks[n] if self.config.ignore_in_loss else None
                for table, values in zip(
                    truth, overlap(own[n], batch.target_masks[n], ignore), strict=True
                ):
                    table[row, -1] = values
        parts = self.selecting.losses(scores, *truth)
        if pointing:
            parts["pointing"] = self._pointing(tokens, batch, counts)
        return parts

    def _pointing(self, tokens: Tensor, batch: Batch, counts: list[int]) -> Tensor:
        """Mean pointing loss of tokens (K, 1, C) at their targets."""
        total = tokens.float().sum() * 0.0
        for image, rows in _rows_per_image(batch.image_index, counts).items():
            index = torch.cat(
                [torch.arange(s.start, s.stop, device=tokens.device) for _, s in rows]
            )
            targets = torch.cat([batch.target_masks[row] for row, _ in rows])
            hosts = _stack_hosts(batch, rows, batch.original_sizes[image])
            total = total + self._point(
                tokens[index], targets, *hosts, batch.resized_sizes[image]
            ) / len(tokens)
        return total

    # --------------------------------------------------------------------------------------- losses

    def total(self, parts: dict[str, Tensor]) -> Tensor:
        """The loss () of its unweighted parts, each ()."""
        c, branches = self.config, []
        if c.decodes:
            branches.append(c.bce_weight * parts["bce"] + c.dice_weight * parts["dice"])
        if self.selecting is not None:
            s = self.selecting.config
            branches.append(s.similarity_weight * parts["similarity"] + s.iop_weight * parts["iop"])
        loss = c.text_weight * parts["text"] + c.mask_weight * sum(branches)
        return loss + c.pointing_weight * parts["pointing"] if "pointing" in parts else loss

    def _stand_in(self, tokens: Tensor) -> Tensor:
        """(), 0: a pass of some token (1, T, C) through the chain, for a batch without targets; of
        none without a gradient.

        ZeRO-2 puts gradients into its buckets as they come: a rank without targets must bring the
        same ones in the same order as the others, or sums of gradients of different weights come
        out.
        """
        if not len(tokens):
            return tokens.float().sum()
        dims, image_index = (
            self.config.sam_dims,
            torch.zeros(1, dtype=torch.int64, device=tokens.device),
        )
        embedding = tokens.new_zeros((1, dims.prompt_dim, dims.grid, dims.grid))
        low_res, _ = self.segmenting(
            tokens, embedding, image_index, tokens.new_ones((1, dims.grid, dims.grid))
        )
        return (low_res.float().sum() + tokens.float().sum()) * 0.0

    def _stand_in_selection(self, tokens: Tensor) -> Tensor:
        """Likewise, through the selector."""
        if not len(tokens):
            return tokens.float().sum()
        image_index = torch.zeros(1, dtype=torch.int64, device=tokens.device)
        scores = self.selecting.stand_in(
            tokens[:, -1], image_index, position_encoding(self.segmenting.sam)
        )
        return (scores.similarity.sum() + scores.iop.sum() + tokens.float().sum()) * 0.0

    def _mask_losses(
        self, low_res: Tensor, tokens: Tensor, batch: Batch, counts: list[int]
    ) -> dict[str, Tensor]:
        """Sums over masks, divided by the number of masks of the batch."""
        if not sum(counts):
            names = ["bce", "dice", "pointing"] if self.config.pointing_weight else ["bce", "dice"]
            return dict.fromkeys(names, self._stand_in(tokens))
        totals: dict[str, Tensor] = {}
        for image, rows in _rows_per_image(batch.image_index, counts).items():
            for name, value in self._image_losses(low_res, tokens, batch, image, rows).items():
                totals[name] = totals.get(name, 0.0) + value / len(low_res)
        return totals

    def _image_losses(
        self,
        low_res: Tensor,
        tokens: Tensor,
        batch: Batch,
        image: int,
        rows: list[tuple[int, slice]],
    ) -> dict[str, Tensor]:
        """Sums over the masks of one image. ``rows``: its conversations, each with the slice of its
        targets."""
        resized, original = batch.resized_sizes[image], batch.original_sizes[image]
        index = torch.cat([torch.arange(s.start, s.stop, device=low_res.device) for _, s in rows])
        targets = torch.cat([batch.target_masks[row] for row, _ in rows])
        ignore = _stack_ignore(batch, rows, original) if self.config.ignore_in_loss else None
        hosts, has_host = _stack_hosts(batch, rows, original)
        sums: dict[str, Tensor] = {
            "bce": low_res.new_zeros(()).float(),
            "dice": low_res.new_zeros(()).float(),
        }
        last = len(self.config.levels) - 1
        for level, weight in enumerate(self.config.level_loss_weights):
            if not weight:
                continue
            chosen = index if level == last else index[has_host]
            truth = targets if level == last else hosts[has_host]
            hidden = ignore if ignore is None or level == last else ignore[has_host]
            for some in _pieces(len(chosen), original):
                left_out = None if hidden is None else hidden[some]
                bce, dice = self._frame_losses(
                    low_res[chosen[some], level], truth[some], left_out, resized
                )
                sums["bce"] = sums["bce"] + weight * bce
                sums["dice"] = sums["dice"] + weight * dice
        if self.config.pointing_weight:
            sums["pointing"] = self._point(tokens[index], targets, hosts, has_host, resized)
        return sums

    def _frame_losses(
        self, low_res: Tensor, truth: Tensor, ignore: Tensor | None, resized: tuple[int, int]
    ):
        """Sums of BCE and of DICE, each (): low-res logits (K, h, w), truth and ignore bool (K, H,
        W).

        With a gradient, masks of the original frame are computed again in the backward pass instead
        of kept: only the low-res ones stay.
        """

        def compare(low_res: Tensor) -> tuple[Tensor, Tensor]:
            logits = to_original(
                low_res, resized, tuple(truth.shape[1:]), self.config.sam["image_size"]
            )
            target = truth.float()
            bce = losses.bce_per_mask(logits, target, ignore, self.config.bce_balance)
            return bce.sum(), losses.dice_per_mask(logits, target, ignore).sum()

        if torch.is_grad_enabled() and low_res.requires_grad:
            return checkpoint(compare, low_res, use_reentrant=False, preserve_rng_state=False)
        return compare(low_res)

    def _point(
        self,
        tokens: Tensor,
        targets: Tensor,
        hosts: Tensor,
        has_host: Tensor,
        resized: tuple[int, int],
    ) -> Tensor:
        """Pointing loss of tokens (K, T, C): the last level at the target; with pointing_host,
        others at the host."""
        dims = self.config.sam_dims
        position = position_encoding(self.segmenting.sam)[0].flatten(1).T
        area = to_grid(targets, resized, dims.image_size, dims.grid).flatten(1)
        total = losses.pointing_per_token(tokens[:, -1].float(), position, area).sum()
        if self.config.pointing_host and has_host.any():
            area = to_grid(hosts[has_host], resized, dims.image_size, dims.grid).flatten(1)
            for level in range(tokens.shape[1] - 1):
                total = (
                    total
                    + losses.pointing_per_token(
                        tokens[has_host, level].float(), position, area
                    ).sum()
                )
        return total

    # ----------------------------------------------------------------------------------- generation

    @torch.no_grad()
    def generate(
        self, batch: Batch, tokenizer, max_new_tokens: int = 64, **decoding: Any
    ) -> list[Generation]:
        """Free answers to left-padded prompts (``collate_prompts``), with masks for every complete
        group of tokens.

        ``decoding``: further fields of model.reasoning.generation.Decoding; greedy unless they say
        otherwise. An answer that lacks a level's token before [SEG] has no group there and so no
        mask: it counts as not emitted. Raises ValueError for an unknown option and for a model in
        training mode.
        """
        if self.training:
            raise ValueError("generate needs a model in evaluation mode: call `model.eval()` first")
        return generate(
            self, batch, tokenizer, Decoding.of(max_new_tokens=max_new_tokens, **decoding)
        )


def answer_defaults(config: CoresConfig) -> GenerationConfig:
    """Greedy answers of at most 64 tokens, which end with the language model's end token."""
    text = config.llava.text_config
    tokens = {
        name: getattr(text, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    return GenerationConfig(max_new_tokens=64, do_sample=False, **tokens)


def load_dinov2(path: str | None, selector: dict | None) -> Dinov2Model | None:
    """The frozen feature encoder of a selector that wants one; its sizes go into ``selector``.
    Raises ValueError or OSError."""
    if selector is None or SelectorConfig(**selector).features != "dinov2":
        return None
    if not path:
        raise ValueError(
            "a selector with features dinov2 needs --features_pretrained, such as"
            " facebook/dinov2-large"
        )
    encoder = Dinov2Model.from_pretrained(path)
    selector["dinov2"] = encoder.config.to_diff_dict()
    return encoder


def _check_fit(
    version: str, llava: LlavaForConditionalGeneration, processor: CoresProcessor
) -> None:
    """Raises ValueError where tokenizer or image processor would feed the model something it was
    not made for."""
    expected, found = llava.config.image_token_id, processor.image_token_id
    if found != expected:
        raise ValueError(
            f"{version}: the tokenizer's id of {processor.image_token} is {found}, config.json says"
            f" {expected} (image_token_index)"
        )
    size = llava.config.vision_config.image_size
    given = tuple(processor.clip(np.zeros((size, 2 * size, 3), dtype=np.uint8)).shape[1:])
    if given != (size, size):
        raise ValueError(
            f"{version}: preprocessor_config.json makes images of {given[0]}×{given[1]} pixels, the"
            f" vision tower takes {size}×{size}"
        )


def _image_tokens(llava: LlavaForConditionalGeneration) -> int:
    """Features that CLIP gives for one image, from its own sizes."""
    vision = llava.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    return patches if llava.config.vision_feature_select_strategy == "default" else patches + 1


def _supervised(batch: Batch) -> Tensor:
    """bool (N, L): the positions that predict a supervised token."""
    return F.pad(batch.labels[:, 1:] >= 0, (0, 1))


def _rows_per_image(image_index: Tensor, counts: list[int]) -> dict[int, list[tuple[int, slice]]]:
    """image -> [(conversation, slice of its targets in the batch)], conversations without targets
    left out."""
    out: dict[int, list[tuple[int, slice]]] = {}
    start = 0
    for row, (image, count) in enumerate(zip(image_index.tolist(), counts, strict=True)):
        if count:
            out.setdefault(image, []).append((row, slice(start, start + count)))
        start += count
    return out


def _pieces(count: int, size: tuple[int, int]) -> list[slice]:
    """``count`` masks of (H, W) = ``size``, as many at a time as MASK_PIXELS allow."""
    step = max(1, MASK_PIXELS // (size[0] * size[1]))
    return [slice(start, start + step) for start in range(0, count, step)]


def _stack_ignore(
    batch: Batch, rows: list[tuple[int, slice]], size: tuple[int, int]
) -> Tensor | None:
    """bool (K, H, W), or None where no conversation of the image ignores anything."""
    if all(batch.ignore_masks[row] is None for row, _ in rows):
        return None
    device = batch.input_ids.device
    nothing = torch.zeros(size, dtype=torch.bool, device=device)
    per_row = [
        nothing if batch.ignore_masks[row] is None else batch.ignore_masks[row] for row, _ in rows
    ]
    return torch.cat(
        [mask.expand(s.stop - s.start, *size) for mask, (_, s) in zip(per_row, rows, strict=True)]
    )


def _stack_hosts(
    batch: Batch, rows: list[tuple[int, slice]], size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Host masks bool (K, H, W), empty where unknown, and bool (K,): whether a host is known."""
    device = batch.input_ids.device
    masks, known = [], []
    for row, targets in rows:
        count, host = targets.stop - targets.start, batch.host_masks[row]
        masks.append(
            torch.zeros((count, *size), dtype=torch.bool, device=device) if host is None else host
        )
        known += [host is not None] * count
    return torch.cat(masks), torch.tensor(known, device=device)


AutoModel.register(CoresConfig, CoresForReasoningSegmentation)
