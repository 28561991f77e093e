"""The model card, README.md of a model folder: what is known of a model, from its config, from the
settings that trained it and from the evaluation at the end of its training. What is not known is
left out, and the card says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PretrainedConfig

from cores.model.config import CoresConfig, SamDims

CARD = "README.md"
HERE = 'from_pretrained(".")'
"""In the card of a folder; ``push_folder`` puts the name of the repository there."""
LIBRARY = "cores"
WHOLE = "the whole model"
"""The part of a model that went on from a finished one."""
MODES = {"free": "free generation", "teacher_forced": "teacher-forced"}
# Family of --dataset -> the flag that names its data sets.
FAMILIES = {
    "sem_seg": "sem_seg_data",
    "refer_seg": "refer_seg_data",
    "coco": "coco_data",
    "reason_seg": "reason_seg_data",
    "vqa": "vqa_data",
    "own": "own_data",
}
SAMS = {(768, 12): "ViT-B", (1024, 24): "ViT-L", (1280, 32): "ViT-H"}  # (width, blocks)
SAM_FILES = ("sam_vit_b_01ec64.pth", "sam_vit_l_0b3195.pth", "sam_vit_h_4b8939.pth")
SHOWN = ("precision", "load_in_4bit", "load_in_8bit", "lora_r", "lora_alpha", "lora_dropout") + (
    *("lora_target_modules", "use_dora", "use_rslora", "loraplus_lr_ratio", "train_mask_decoder"),
    *("epochs", "steps_per_epoch", "batch_size", "grad_accumulation_steps", "lr", "weight_decay"),
    *("warmup_steps", "max_grad_norm", "zero_stage", "conv_type", "exemplar_count", "seed"),
)
METHODS = {
    "cores": "CoReS ([paper](https://arxiv.org/abs/2404.05673))",
    "lisa": "LISA ([paper](https://arxiv.org/abs/2308.00692))",
    "llm_seg": "LLM-Seg ([paper](https://arxiv.org/abs/2404.08767))",
    "cores+select": "CoReS ([paper](https://arxiv.org/abs/2404.05673)) with the selector of LLM-Seg"
    " ([paper](https://arxiv.org/abs/2404.08767))",
}


def model_card(
    config: CoresConfig,
    backbones: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    unmeasured: str = "no evaluation of these weights was found when the folder was written",
) -> str:
    """The text of the card, with its YAML.

    ``backbones``: part, such as "language model" -> the folder, file or hub name that it came from.
    ``settings``: those of the training, by flag. ``metrics``: what metrics.json holds about these
    weights. ``unmeasured``: why there are none.
    """
    settings, backbones = settings or {}, {k: v for k, v in (backbones or {}).items() if v}
    kind = method(config)
    sections = [
        ("Use", _usage()),
        ("Model", _model(config, kind)),
        ("Base models", _backbones(backbones)),
        ("Training", _training(settings)),
        ("Evaluation", _evaluation(metrics) if metrics else f"Not known: {unmeasured}."),
        ("Licence", _licence()),
    ]
    data = _data(kind, backbones, settings, metrics)
    name = str(settings.get("exp_name") or "A model for reasoning segmentation")
    text = "\n\n".join(f"## {title}\n\n{content}" for title, content in sections)
    head = f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n{_summary(config)}"
    return f"{head}\n\n{text}\n"


def method(config: CoresConfig) -> str:
    """The value of --method that makes such a model."""
    if config.selector is not None:
        return "cores+select" if config.decodes else "llm_seg"
    return "lisa" if list(config.levels) == ["SEG"] else "cores"


def _summary(config: CoresConfig) -> str:
    tokens = " and ".join(f"`[{level}]`" for level in config.levels)
    return (
        "Reasoning segmentation: a picture and a question go in, an answer in words and masks of"
        f" the picture come out. The answer holds {tokens}, whose hidden states prompt SAM."
    )


def _usage() -> str:
    return f"""\
The package `cores`, installed from its source (`pip install .` in a clone), reads the model;
`trust_remote_code` does not.

```python
from cores import ReasoningSegmenter

segmenter = ReasoningSegmenter.{HERE}
result = segmenter("picture.jpg", "which part of the animal is for smelling?")
print(result)
result.save("answer")
```

After `import cores.auto`, so do `AutoModel`, `AutoConfig` and `AutoProcessor` of transformers."""


def _model(config: CoresConfig, kind: str) -> str:
    text, vision = config.llava.get_text_config(), config.llava.vision_config
    assert isinstance(vision, PretrainedConfig)
    rows = [
        ("method", METHODS[kind]),
        ("answer tokens", ", ".join(f"[{level}]" for level in config.levels)),
        ("token refiner", config.refiner["kind"]),
        ("language model", f"{text.num_hidden_layers} layers of width {text.hidden_size}"),
        ("CLIP", f"pictures of {vision.image_size} pixels, patches of {vision.patch_size}"),
        ("SAM", _sam(config.sam_dims)),
    ]
    return _table(("part", "what"), rows)


def _sam(sam: SamDims) -> str:
    sizes = f"{sam.depth} blocks of width {sam.embed_dim}, pictures of {sam.image_size} pixels"
    name = SAMS.get((sam.embed_dim, sam.depth))
    return f"{name}: {sizes}" if name else sizes


def _backbones(backbones: Mapping[str, str]) -> str:
    if not backbones:
        return "Not known: the folder that this card was written from does not name them."
    rows = [(part, _origin(name)) for part, name in backbones.items()]
    return "The weights began as those of\n\n" + _table(("part", "from"), rows)


def _origin(name: str) -> str:
    """A hub name as a link; of a path its last part, as the others are nobody's business."""
    if is_hub_name(name):
        return f"[{name}](https://huggingface.co/{name})"
    last = Path(name).name
    if Path(name).parts[-3:-1] == ("assets", "tiny"):
        return f"`assets/tiny/{last}`, which comes with the code"
    if last in SAM_FILES:
        source = "https://github.com/facebookresearch/segment-anything"
        return f"a file with the name of the published [`{last}`]({source})"
    return f"`{last}`, a local copy; where it came from is not recorded"


def is_hub_name(name: str) -> bool:
    """Whether it is "owner/name" and no path on this machine."""
    return name.count("/") == 1 and not Path(name).exists() and _is_id(name)


def _is_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def data_sets(settings: Mapping[str, Any]) -> dict[str, list[str]]:
    """Family -> the data sets that these settings train on, as they were given."""
    families = [name for name in str(settings.get("dataset") or "").split("||") if name]
    return {
        family: [name for name in str(settings.get(FAMILIES[family]) or "").split("||") if name]
        for family in families
        if family in FAMILIES
    }


def _training(settings: Mapping[str, Any]) -> str:
    if not settings:
        return "Not known: the settings of the training do not lie with the model."
    rates = str(settings.get("sample_rates") or "").split(",")
    data = [
        (family, ", ".join(name.replace("|", " ") for name in names), rate)
        for (family, names), rate in zip(data_sets(settings).items(), rates, strict=False)
    ]
    values = [(f"`{name}`", str(settings[name])) for name in SHOWN if name in settings]
    count = settings.get("images_per_step")
    images = f"An optimizer step has {count} images. " if count else ""
    return (
        f"Data, each family drawn as often as its share says:\n\n"
        f"{_table(('family', 'data sets', 'share'), data)}\n\n"
        f"{images}The settings, by their flags:\n\n{_table(('flag', 'value'), values)}"
    )


def _evaluation(metrics: Mapping[str, Any]) -> str:
    rows = [
        (
            MODES[mode],
            _score(found, "giou"),
            _score(found, "ciou"),
            _percent(found.get("emission_rate")),
            str(found.get("n", "–")),
        )
        for mode in MODES
        if isinstance(found := metrics.get(mode), Mapping)
    ]
    head = ("how it answers", "gIoU", "cIoU", "answers with a mask", "targets")
    precision = (metrics.get("config") or {}).get("precision")
    how = f" in {precision}, before the adapters were merged" if precision else ""
    return (
        f"{_set_name(metrics)}, in percent, with 95 % intervals from a bootstrap over pictures;"
        f" measured at the end of the training{how}. In free generation the model must say the"
        " tokens itself; teacher-forced, as the published code of LISA and CoReS measures, the"
        " answer is given with them.\n\n" + _table(head, rows)
    )


def _score(found: Mapping[str, Any], name: str) -> str:
    low, high = found.get(f"{name}_ci95") or (None, None)
    return f"{_percent(found.get(name))} [{_percent(low)}, {_percent(high)}]"


def _percent(value: Any) -> str:
    return f"{100 * value:.1f}" if isinstance(value, (int, float)) else "–"


def _set_name(metrics: Mapping[str, Any]) -> str:
    name, _, split = str(metrics.get("dataset") or "").partition("|")
    return f"{name}, split {split}" if split else name


def _licence() -> str:
    return (
        "The code is under the Apache License 2.0. The weights derive from the base models and the"
        " training data above: their licences and terms apply to this model, too."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = ([cell.replace("|", r"\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _data(
    kind: str,
    backbones: Mapping[str, str],
    settings: Mapping[str, Any],
    metrics: Mapping[str, Any] | None,
) -> ModelCardData:
    """The YAML. Names that are no ids of the hub stay in the text alone."""
    trained = data_sets(settings)
    names = {n.partition("|")[0] for family, ns in trained.items() if family != "own" for n in ns}
    base = [name for name in dict.fromkeys(backbones.values()) if is_hub_name(name)]
    results = _results(metrics) if metrics else []
    return ModelCardData(
        model_name=str(settings.get("exp_name") or "cores") if results else None,
        library_name=LIBRARY,
        pipeline_tag="image-segmentation",
        license="other",
        license_name="base-models-and-data",
        license_link=CARD,
        base_model=base or None,
        datasets=sorted(name for name in names if _is_id(name)) or None,
        metrics=["giou", "ciou"] if results else None,
        tags=["reasoning-segmentation", "segment-anything", "llava", kind.replace("+", "-")],
        eval_results=results or None,
    )


def _results(metrics: Mapping[str, Any]) -> list[EvalResult]:
    name, _, split = str(metrics.get("dataset") or "").partition("|")
    return [
        EvalResult(
            task_type="image-segmentation",
            task_name="Reasoning segmentation",
            dataset_type=name if _is_id(name) else "own",
            dataset_name=_set_name(metrics),
            dataset_split=split or None,
            metric_type=metric,
            metric_name=f"{metric.replace('iou', 'IoU')} in percent, {words}",
            metric_value=round(100 * found[metric], 2),
        )
        for mode, words in MODES.items()
        if isinstance(found := metrics.get(mode), Mapping)
        for metric in ("giou", "ciou")
        if isinstance(found.get(metric), (int, float))
    ]
