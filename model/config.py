"""The configuration of a reasoning segmentation model. A method or an ablation is a value here,
never another file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import AutoConfig, LlavaConfig, PretrainedConfig

from cores.model.choices import RANKINGS, RULES


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(allowed)}")


def _at_least_one(config: Any, section: str, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            value = getattr(config, name)
            raise ValueError(f"{section}.{name} is {value}; it must be at least 1")


@dataclass(frozen=True)
class SamDims:
    """Sizes of a SAM; the defaults are ViT-B's. The sides of its grid and of its low-res masks
    follow from image and patch size."""

    image_size: int = 1024
    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    global_attn_indexes: tuple[int, ...] = (2, 5, 8, 11)
    window_size: int = 14
    """Side of an attention window in patches; 0 means global attention in every block."""
    prompt_dim: int = 256
    decoder_heads: int = 8
    decoder_mlp_dim: int = 2048
    mask_in_chans: int = 16
    iou_head_hidden_dim: int = 256

    def __post_init__(self) -> None:
        # JSON gives a list, which would make equal sizes differ.
        object.__setattr__(self, "global_attn_indexes", tuple(self.global_attn_indexes))
        if self.image_size % self.patch_size:
            raise ValueError(
                f"sam: image_size {self.image_size} is not a multiple of patch_size"
                f" {self.patch_size}"
            )
        if self.embed_dim % self.num_heads or self.prompt_dim % self.decoder_heads:
            raise ValueError(
                "sam: embed_dim must be divisible by num_heads, and prompt_dim by decoder_heads"
            )
        # SAM normalises over a quarter of them, and a norm over one channel is always 0.
        if self.mask_in_chans % 4 or self.mask_in_chans < 8:
            raise ValueError(
                f"sam: mask_in_chans {self.mask_in_chans} must be a multiple of 4 and at least 8"
            )

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    @property
    def low_res(self) -> int:
        """Side of the decoder's masks: it upscales the embedding four times."""
        return 4 * self.grid


@dataclass(frozen=True)
class RefinerConfig:
    """The token refiner: ĥᵗ = h + CA(h, prototypes of the previous mask)."""

    kind: str = "attention"
    """"attention"; "attention+norm": h + LayerNorm(h + CA), the released code; "none" to prompt
    with h itself."""
    prototypes: str = "foreground"
    """"foreground": one masked average, the paper's (attention over one key cannot depend on the
    query: it adds a linear map of the prototype); "foreground+background": a second average over
    the rest; "regions": foreground averages over a coarse grid."""
    region_grid: int = 4
    """Regions per side, for "regions"."""
    pooling: str = "soft"
    """"soft": sigmoid weights, which let the gradient through to the earlier level; "hard": logits
    > 0; "released": hard, over the padding too and with the mask's area rounded to bfloat16, as the
    released code does."""
    heads: int = 8
    """Attention heads; must divide SAM's prompt width."""

    def __post_init__(self) -> None:
        _one_of("refiner.kind", self.kind, ("none", "attention", "attention+norm"))
        prototypes = ("foreground", "foreground+background", "regions")
        _one_of("refiner.prototypes", self.prototypes, prototypes)
        _one_of("refiner.pooling", self.pooling, ("soft", "hard", "released"))
        _at_least_one(self, "refiner", "region_grid", "heads")


@dataclass(frozen=True)
class ProposalConfig:
    """Settings of the everything mode; the defaults are the library's, which LLM-Seg uses."""

    points_per_side: int = 32
    """Points of the grid that prompts SAM, per side of the image."""
    predicted_iou: float = 0.88
    """Masks that SAM itself expects to be worse are dropped."""
    stability: float = 0.95
    """Masks are dropped, too, whose IoU under a stricter and a looser threshold is smaller."""
    nms: float = 0.7
    """Of two masks whose boxes overlap more, the one with the lower predicted IoU is dropped."""
    long_side: int = 1024
    """The longer side in pixels, to which larger images are resized first."""
    multimask: bool = True
    """Three masks per point (SAM's ambiguity tokens). False takes the single-mask token, for a SAM
    that was trained with that one only."""

    def __post_init__(self) -> None:
        _at_least_one(self, "proposals", "points_per_side", "long_side")
        for name in ("predicted_iou", "stability", "nms"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"proposals.{name} is {getattr(self, name)}; it must be between 0 and 1"
                )


@dataclass(frozen=True)
class SelectorConfig:
    """The selecting branch (LLM-Seg) but for its weights; defaults are the published ones."""

    features: str = "dinov2"
    """"dinov2": a frozen DINOv2 of its own; "sam": the embedding of the SAM that proposed, for
    nothing extra."""
    dinov2: dict | None = None
    """Fields of Dinov2Config; a new model reads them off its DINOv2."""
    feature_size: int = 896
    """Side of DINOv2's padded input in pixels."""
    pool_size: int = 256
    """P: features are pooled as if they were resized to this side, under masks of this side."""
    place: bool = False
    """Also pool SAM's positional encoding, so a proposal knows where it is (published: no)."""
    blocks: int = 2
    heads: int = 8
    mlp_dim: int = 2048
    iou_hidden: int = 2048
    iop_hidden: int = 128
    temperature: float = 0.05
    """τ of both softmaxes of the similarity loss."""
    iop_scale: float = 50.0
    """Factor of the IoP loss."""
    similarity_weight: float = 1.0
    iop_weight: float = 1.0
    rule: str = "iop"
    """Which proposals are united: "iop": those of an IoP above the threshold; "similarity": the
    most similar one; "similarity+iop": both of these; "top5+iop": those of the five most similar
    whose IoP is above the threshold; "verified", with a chain only: the chain's mask, unless
    another proposal has a higher IoP, which takes the rule "iop" without the chain's mask."""
    threshold: float = 0.5
    ranking: str = "area"
    """How proposals are ordered before the best are kept: ``dataset.proposals.Found.ranked``."""
    count: int = 50
    """How many proposals are kept."""
    chain: bool = False
    """The chain of segmenting proposes, too: SAM's decoder is trained as in CoReS, and the last
    mask of a target becomes one more of its proposals. False (published): the decoder makes no
    masks, and there is one token."""
    proposals: dict = field(default_factory=dict)
    """Fields of ProposalConfig."""

    def __post_init__(self) -> None:
        _one_of("selector.features", self.features, ("dinov2", "sam"))
        _one_of("selector.rule", self.rule, RULES)
        _one_of("selector.ranking", self.ranking, RANKINGS)
        _at_least_one(self, "selector", "feature_size", "pool_size", "blocks", "heads", "mlp_dim")
        _at_least_one(self, "selector", "iou_hidden", "iop_hidden", "count")
        if self.rule == "verified" and not self.chain:
            raise ValueError(
                "selector.rule is 'verified', but there is no chain whose mask it verifies; choose"
                " another rule"
            )
        if self.temperature <= 0:
            raise ValueError(f"selector.temperature is {self.temperature}; it must be above 0")
        ProposalConfig(**self.proposals)


class CoresConfig(PretrainedConfig):
    """Everything that ``from_pretrained`` needs to rebuild a model. Raises ValueError for
    contradictions.

    Structure. llava: the backbone's LlavaConfig. sam: fields of SamDims. levels: the chain of
    segmenting, ``["SEG"]`` is LISA, ``["LOC", "SEG"]`` CoReS. level_token_ids: vocabulary id of
    each level's token. refiner: fields of RefinerConfig; None is the paper's, or none where there
    is one level, whose mask has no predecessor. text_projection_norm: None is LISA's plain
    projection; a number adds a LayerNorm whose output has about that norm, so that a small SAM
    hears the token (its own prompt embeddings have such norms, a fresh projection has about 1).
    decode_chunk: the most targets in one decoder call, None for no limit. selector: None where
    SAM's decoder makes the masks; fields of SelectorConfig for LLM-Seg, which selects among SAM's
    proposals, has one level and none of the mask losses; with ``chain`` in it both branches, and
    the losses of both.

    Loss = text_weight · CE + mask_weight · (bce_weight · BCE + dice_weight · DICE) +
    pointing_weight · pointing, where the mask terms are summed over levels with level_loss_weights
    (None: only the last level, 1). Earlier levels are supervised with host masks, where the data
    have them. bce_balance, pointing_weight: see model/losses.py; off in the paper. pointing_host
    also points the earlier tokens at the host. ignore_in_loss: leave ignored pixels out of the loss
    (the published code trains them as background).
    """

    model_type = "cores"
    sub_configs = {"llava": LlavaConfig}

    def __init__(
        self,
        llava: LlavaConfig | dict | None = None,
        sam: dict | None = None,
        levels: list[str] | tuple[str, ...] = ("LOC", "SEG"),
        level_token_ids: list[int] | None = None,
        refiner: dict | None = None,
        text_projection_norm: float | None = None,
        text_weight: float = 1.0,
        mask_weight: float = 1.0,
        bce_weight: float = 2.0,
        dice_weight: float = 0.5,
        level_loss_weights: list[float] | None = None,
        bce_balance: bool = False,
        pointing_weight: float = 0.0,
        pointing_host: bool = False,
        ignore_in_loss: bool = True,
        decode_chunk: int | None = None,
        selector: dict | None = None,
        **kwargs: Any,
    ):
        self.llava = llava if isinstance(llava, LlavaConfig) else LlavaConfig(**(llava or {}))
        self.sam = asdict(SamDims(**(sam or {})))
        self.levels = list(levels)
        self.level_token_ids = list(level_token_ids) if level_token_ids is not None else None
        if refiner is None and len(self.levels) == 1:
            refiner = {"kind": "none"}
        self.refiner = asdict(RefinerConfig(**(refiner or {})))
        self.text_projection_norm = text_projection_norm
        self.text_weight, self.mask_weight = text_weight, mask_weight
        self.bce_weight, self.dice_weight = bce_weight, dice_weight
        only_last = [0.0] * (len(self.levels) - 1) + [1.0]
        self.level_loss_weights = list(
            only_last if level_loss_weights is None else level_loss_weights
        )
        self.bce_balance = bce_balance
        self.pointing_weight, self.pointing_host = pointing_weight, pointing_host
        self.ignore_in_loss = ignore_in_loss
        self.decode_chunk = decode_chunk
        self.selector = None if selector is None else asdict(SelectorConfig(**selector))
        self._check_levels()
        self._check_losses()
        if decode_chunk is not None and decode_chunk < 1:
            raise ValueError(f"decode_chunk is {decode_chunk}; give a positive number or none")
        if text_projection_norm is not None and text_projection_norm <= 0:
            raise ValueError(
                f"text_projection_norm is {text_projection_norm}; give a positive number or none"
            )
        super().__init__(**kwargs)
        self.tie_word_embeddings = bool(getattr(self.llava, "tie_word_embeddings", False))

    def set_losses(self, **weights: Any) -> None:
        """Other values for the fields of the loss, checked as in the constructor."""
        for name, value in weights.items():
            setattr(self, name, value)
        self._check_levels()
        self._check_losses()

    def _check_levels(self) -> None:
        count = len(self.levels)
        if not self.levels or len(set(self.levels)) != count:
            raise ValueError(
                f"levels is {self.levels}; give one or more different names, such as LOC,SEG"
            )
        for name in ("level_token_ids", "level_loss_weights"):
            values = getattr(self, name)
            if values is not None and len(values) != count:
                raise ValueError(
                    f"{name} has {len(values)} values for {count} levels, {','.join(self.levels)}"
                )
        if self.refiner["kind"] != "none":
            if count == 1:
                raise ValueError(
                    f"refiner attends to the mask of the level before, but {self.levels[0]} is the"
                    ' only level; set its kind to "none"'
                )
            heads, width = self.refiner["heads"], self.sam["prompt_dim"]
            if width % heads:
                raise ValueError(f"refiner.heads {heads} does not divide SAM's prompt_dim {width}")
        if not self.decodes and count != 1:
            raise ValueError(
                "a selector without a chain takes one token, but levels is"
                f" {','.join(self.levels)}; use SEG alone or set its chain"
            )

    def _check_losses(self) -> None:
        for name in ("text_weight", "mask_weight", "bce_weight", "dice_weight", "pointing_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        if min(self.level_loss_weights) < 0 or self.level_loss_weights[-1] == 0:
            raise ValueError(
                f"level_loss_weights is {self.level_loss_weights}; none may be negative, the last"
                " must be above 0"
            )
        if self.pointing_host and (not self.pointing_weight or len(self.levels) == 1):
            raise ValueError(
                "pointing_host needs a pointing_weight above 0 and a level before the last"
            )

    @property
    def sam_dims(self) -> SamDims:
        return SamDims(**self.sam)

    @property
    def selector_config(self) -> SelectorConfig | None:
        return None if self.selector is None else SelectorConfig(**self.selector)

    @property
    def decodes(self) -> bool:
        """Whether SAM's decoder makes masks, and so is trained: always but for a selector without a
        chain."""
        return self.selector is None or bool(self.selector["chain"])

    @property
    def refiner_config(self) -> RefinerConfig:
        return RefinerConfig(**self.refiner)


AutoConfig.register("cores", CoresConfig)
