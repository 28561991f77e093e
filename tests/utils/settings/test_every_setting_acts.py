"""A setting that is parsed acts: with another value, something else is drawn, built, trained or
written.

What it means is shown by the tests of its part; here it is shown that no setting is forgotten on
the way from the command line to what it is for. A new field of ``GROUPS`` must come into one of the
tables.
"""

import dataclasses
import json
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cores import train_ds
from cores.dataset.sample import Sample
from cores.model.checkpoints.sam import save_sam
from cores.model.segmenting.sam import build_sam
from cores.utils import build
from cores.utils.settings.arguments import parse
from cores.utils.settings.flags import GROUPS
from cores.utils.training.loader import make_loader
from tests import official_layouts as official
from tests.backbone_toys import TOY_SAM, flags, toys
from tests.dataset_toys import square, write_image, write_json
from tests.helpers import randomise, write_dinov2
from tests.own_toys import write_table


class Below:
    """A path below ``root()``, which is only made when the first test needs it."""

    def __init__(self, name: str = "."):
        self.name = name

    def __str__(self) -> str:
        return str(root() / self.name)


COMMON = {"dataset_dir": Below(), "exemplar_count": 1}


# --------------------------------------------------------------------------------------- the tables

DATA = {  # flag: another value than DATA_BASE has or the default is
    "dataset": "refer_seg||coco",
    "sample_rates": "1,0,0,1,0,0",
    "sem_seg_data": "cocostuff",
    "refer_seg_data": "refcocog",
    "coco_data": "val2017",
    "reason_seg_data": "ReasonSeg|val",
    "vqa_data": "other",
    "own_data": "second",
    "explanatory": 1.0,
    "num_classes_per_sample": 1,
    "exclude_val": True,
    "exemplar_count": 2,
    "levels": "SEG",
    "seed": 5,
}
DATA_BASE = {
    "dataset": "sem_seg||refer_seg||coco||reason_seg||vqa||own",
    "sample_rates": "1,1,1,1,1,1",
    "sem_seg_data": "ade20k",
    "refer_seg_data": "refcoco",
    "coco_data": "train2017",
    "reason_seg_data": "ReasonSeg|train",
    "own_data": "first",
}
MODEL = {
    "version": Below("llava"),
    "vision_pretrained": Below("sam"),
    "load_in_8bit": True,
    "load_in_4bit": True,
    "method": "lisa",
    "levels": "LOC,PART,SEG",
    "refiner": "none",
    "pooling": "hard",
    "text_projection_norm": 4.0,
    "conv_type": "llava_v1",
    "precision": "bf16",
    "system_prompt": "Be brief.",
    "model_max_length": 30,
    "lora_r": 4,
    "lora_alpha": 64,
    "lora_dropout": 0.9,
    "lora_target_modules": "k_proj",
    "use_dora": True,
    "use_rslora": True,
    "train_mask_decoder": False,
    "ce_loss_weight": 3.0,
    "bce_loss_weight": 3.0,
    "dice_loss_weight": 3.0,
    "bce_balance": True,
    "pointing_weight": 1.0,
    "pointing_host": False,
    "level_loss_weights": "1,1",
    "ignore_in_loss": False,
    "sam_cache_dtype": "int8",
    "batch_size": 2,
}
MODEL_BASE = {"refiner": "foreground", "batch_size": 3}
NEEDS = {  # what must be set for a flag to mean something
    "dataset": {"sample_rates": "1,1"},
    "pointing_host": {"pointing_weight": 1.0, "pointing_host": True},
    "system_prompt": {"conv_type": "llava_v1"},
    "features": {"features_pretrained": Below("dinov2")},
    "sam_cache_dtype": {"sam_cache": Below("cache")},
}
SELECTOR = {
    "method": "cores+select",
    "features": "dinov2",
    "proposal_place": True,
    "proposal_ranking": "quality",
    "proposal_count": 2,
    "proposal_points": 2,
    "proposal_iou": 1.0,
    "proposal_stability": 0.99,
    "proposal_multimask": False,
    "pool_size": 8,
}
SELECTOR_BASE = {
    "vision_pretrained": Below("sam"),
    "method": "llm_seg",
    "features": "sam",
    "proposal_points": 4,
    "proposal_count": 4,
    "proposal_iou": 0.0,
    "proposal_stability": 0.0,
    "pool_size": 16,
    "batch_size": 3,
}
ELSEWHERE = {  # flag: the test that fails when it does nothing
    "vision_tower": "test_flags_that_contradict_the_weights_are_refused",
    "gradient_checkpointing": "test_gradient_checkpointing_changes_nothing",
    "features_pretrained": "test_what_does_not_fit_is_refused",
    "select": "test_evaluation_by_three_rules",
    "proposals": "test_the_scripts_end_to_end",
    "loss_normalisation": "test_means_of_micro_batches_are_something_else",
    "dataset_dir": "test_the_data_are_uneven",
    "on_bad_sample": "test_training_over_broken_files_leaves_out_exactly_these",
    "skip_list": "test_training_with_a_skip_list_meets_nothing_bad",
    "follow_links": "test_links_out_of_the_data_are_followed_where_they_may_be",
    "workers": "test_a_data_worker_that_dies",
    "exp_name": "test_a_run_writes_what_it_is_told",
    "log_base_dir": "test_a_run_folder_that_cannot_be_written",
    "epochs": "test_a_run_writes_what_it_is_told",
    "steps_per_epoch": "test_a_run_writes_what_it_is_told",
    "grad_accumulation_steps": "test_accumulation_changes_nothing",
    "global_batch_size": "test_a_global_batch_that_the_ranks_do_not_divide",
    **dict.fromkeys(
        ("lr", "beta1", "beta2", "weight_decay", "warmup_steps", "max_grad_norm"),
        "test_steps_are_adamw_with_clipping_and_warm_up",
    ),
    "loraplus_lr_ratio": "test_loraplus_learns_faster_in_b_alone",
    "zero_stage": "test_zero_3_on_several_ranks_needs_targets",
    "offload": "test_an_optimizer_on_the_host_takes_the_same_steps",
    "print_freq": "test_a_run_writes_what_it_is_told",
    "report_to": "test_a_tracker_that_fails_ends_no_training",
    "report_project": "test_mlflow",
    "save_every": "test_kills_change_nothing",
    "resume": "test_the_way_on_leads_to_the_same_end",
    "auto_resume": "test_a_lost_last_checkpoint_does_not_start_over_in_silence",
    "accept_changes": "test_other_backbones_are_accepted_by_a_flag",
    "spike_factor": "test_a_loss_far_above_the_others_is_logged_with_its_samples",
    "start_epoch": "test_a_run_that_starts_at_a_later_epoch",
    "no_eval": "test_a_run_without_evaluation",
    "eval_every": "test_epochs_between_evaluations",
    "local_rank": "test_a_launcher_starts_ranks_that_know_each_other",
    "eval_only": "test_a_training_run_on_the_whole_mixture",
    "val_dataset": "test_a_training_run_on_the_whole_mixture",
    **dict.fromkeys(
        ("eval_mode", "val_batch_size", "eval_limit", "max_new_tokens", "examples", "gallery"),
        "test_a_run_writes_what_it_is_told",
    ),
    "eval_texts": "test_all_wordings_are_scored",
    "save_masks": "test_saved_masks_score_as_the_evaluation_did",
    "prefix_sharing": "test_flags_reach_the_model",
    "pack_tokens": "test_flags_reach_the_model",
    "attn_implementation": "test_flags_reach_the_model",
    "compile": "test_the_encoder_is_compiled_where_it_is_asked_for",
    "sam_cache": "test_flags_reach_the_model",
    "sam_cache_gb": "test_a_full_cache_ends_the_filling",
}


def test_every_setting_is_in_a_table():
    fields = {f.name for group in GROUPS for f in dataclasses.fields(group)}
    assert fields == DATA.keys() | MODEL.keys() | SELECTOR.keys() | ELSEWHERE.keys()


def test_the_tests_elsewhere_exist():
    tests = Path(__file__).resolve().parents[2]
    texts = "".join(p.read_text(encoding="utf-8") for p in tests.rglob("test_*.py"))
    missing = {name for name in ELSEWHERE.values() if f"def {name}(" not in texts}
    assert missing == set()


# --------------------------------------------------------------------------------------------- data


@cache
def root() -> Path:
    """Every published data set in miniature, and what the flags above need beside them."""
    root = toys() / "every-setting"
    official.write_everything(root)
    instances = root / "coco" / "annotations" / "instances_{}.json"
    content = json.loads(Path(str(instances).format("train2017")).read_text())
    content["categories"] = [c | {"name": f"other {c['name']}"} for c in content["categories"]]
    write_json(Path(str(instances).format("val2017")), content)
    shutil.copytree(root / "coco" / "train2017", root / "coco" / "val2017", dirs_exist_ok=True)
    spoken = json.loads((root / "llava_dataset" / "llava_instruct_150k.json").read_text())
    for entry in spoken:
        entry["conversations"][0]["value"] = "<image>\nWhat else is it?"
    write_json(root / "llava_dataset" / "other.json", spoken)
    write_table(root, name="first")
    write_table(root, name="second")
    rows = [
        {
            "image": "0.jpg",
            "query": f"thing {i}",
            "polygons": [[[i, i], [i + 4, i], [i + 4, i + 4]]],
        }
        for i in range(4)
    ]
    write_table(root, rows, name="several")
    many = root / "reason_seg" / "Many" / "train"
    write_image(many / "0.jpg", (24, 32))
    shapes = [square(3, 3, 20, 14), square(0, 0, 31, 5, "ignore")]
    texts = [f"what is thing {i} of this picture?" for i in range(5)]
    write_json(
        many / "0.json",
        {
            "text": texts,
            "is_sentence": True,
            "shapes": shapes,
            "host_shapes": [square(2, 2, 25, 20)],
        },
    )
    # masks of the toy SAM are all alike; of this one, there are seventeen to choose from
    torch.manual_seed(9)
    sam = build_sam(TOY_SAM)
    randomise(sam, seed=4, scale=0.6)
    save_sam(sam, TOY_SAM, root / "sam")
    shutil.copytree(toys() / "llava", root / "llava")
    file = root / "llava" / "model.safetensors"
    weights = {name: 1.1 * weight for name, weight in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    write_dinov2(root / "dinov2")
    return root


def drawn(changes: dict[str, Any], count: int = 80) -> list:
    """What the first samples of an epoch ask and answer."""
    return [
        (sample.dataset, sample.id, sample.exemplars, [c.turns for c in sample.conversations])
        for sample in samples(changes, count)
    ]


def samples(changes: dict[str, Any], count: int) -> list[Sample]:
    values = COMMON | DATA_BASE | changes
    if "own" not in values["dataset"].split("||"):
        values.pop("own_data")  # Naming data that are not trained on is refused.
    s = parse(flags(toys(), **values))
    data = build.build_mixture(s, build.PromptFormat(s.level_list, s.exemplar_count))
    data.samples_per_epoch = count
    return [data[i] for i in range(count)]


@cache
def drawn_without_changes() -> list:
    return drawn({})


@pytest.mark.parametrize("name", DATA)
def test_a_setting_of_the_data_acts(name):
    assert drawn(NEEDS.get(name, {}) | {name: DATA[name]}) != drawn_without_changes()


def test_the_same_settings_draw_the_same():
    assert drawn({}) == drawn_without_changes()


def test_every_query_of_an_image_is_drawn_sooner_or_later():
    """--num_classes_per_sample limits a sample, not what can be asked: of five queries, two at a
    time, all come in eighty draws."""
    many = {"dataset": "reason_seg", "sample_rates": "1", "reason_seg_data": "Many|train"}
    found = drawn(many | {"num_classes_per_sample": 2})
    assert {len(turns) for *_, turns in found} == {2}
    asked = {question for *_, turns in found for ((question, _),) in turns}
    assert {i for i in range(5) if any(f"thing {i} " in q for q in asked)} == set(range(5))


@pytest.mark.parametrize(
    "source",
    [
        {"dataset": "sem_seg", "sem_seg_data": "cocostuff"},
        {"dataset": "sem_seg", "sem_seg_data": "paco_lvis"},
        {"dataset": "refer_seg", "refer_seg_data": "refcoco"},
        {"dataset": "reason_seg", "reason_seg_data": "LLM-Seg40K|train"},
        {"dataset": "own", "own_data": "several"},
    ],
    ids=lambda source: list(source.values())[1],
)
def test_every_target_of_an_image_is_drawn_sooner_or_later(source):
    """One at a time, as many different ones as all at a time."""
    found = []
    for count in (1, 50):
        limited = source | {"sample_rates": "1", "num_classes_per_sample": count}
        asked = [(s.id, c) for s in samples(limited, 80) for c in s.conversations]
        found.append({(name, c.masks.tobytes()) for name, c in asked})
        assert len(asked) == 80 or count > 1
    assert found[0] == found[1] and len(found[0]) > len({name for name, _ in found[0]})


# -------------------------------------------------------------------------------------------- model


def trained(changes: dict[str, Any]) -> dict[str, Any]:
    """The token ids of a batch, its loss, and the size of every gradient."""
    base = {"dataset": "sem_seg||reason_seg", "sample_rates": "1,1", "exemplar_count": 0}
    base |= {"sem_seg_data": "paco_lvis", "reason_seg_data": "Many|train", "pooling": "soft"}
    s = parse(flags(toys(), **COMMON | base | changes))
    torch.manual_seed(0)
    try:
        model, processor = build.build_model(s)
        sizes = build.make_trainable(model, s)
        data = build.build_mixture(s, processor)
        data.set_epoch(1)
        batch = next(iter(make_loader(data, processor, s)[0]))
        dtype = next(model.parameters()).dtype
        loss = model.train()(batch.to(dtype=dtype)).loss
    except ValueError as error:
        return {"error": re.sub(r"\d+ tokens", "", str(error))}
    loss.backward()
    gradients = {
        name: round(p.grad.double().norm().item(), 7)
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    ids = batch.input_ids.tolist()
    return {"sizes": sizes, "ids": ids, "dtype": dtype, "loss": loss.item(), "grad": gradients}


def same(one: dict, two: dict) -> bool:
    """Numbers are compared with room for another order of sums, which changed none of them here."""
    if one.keys() != two.keys():
        return False
    numbers = lambda found: {"loss": found["loss"], **found["grad"]}  # noqa: E731
    exact = all(one[key] == two[key] for key in one.keys() - {"loss", "grad"})
    if "error" in one or not exact or one["grad"].keys() != two["grad"].keys():
        return exact
    return numbers(one) == pytest.approx(numbers(two), rel=1e-4, abs=1e-6)


@cache
def trained_without_changes(name: str, selecting: bool) -> dict[str, Any]:
    return trained((SELECTOR_BASE if selecting else MODEL_BASE) | NEEDS.get(name, {}))


@pytest.mark.parametrize("name", MODEL)
def test_a_setting_of_model_or_loss_acts(name):
    base = trained_without_changes(name if name in NEEDS else "", selecting=False)
    found = trained(MODEL_BASE | NEEDS.get(name, {}) | {name: MODEL[name]})
    # thirty tokens are too few for a conversation, and that is said
    assert "error" not in base and ("error" in found) == (name == "model_max_length")
    assert not same(found, base)


def test_the_same_settings_train_the_same():
    assert same(trained(MODEL_BASE), trained_without_changes("", selecting=False))


@pytest.mark.parametrize("name", SELECTOR)
def test_a_setting_of_the_selector_acts(name):
    base = trained_without_changes("", selecting=True)
    found = trained(SELECTOR_BASE | NEEDS.get(name, {}) | {name: SELECTOR[name]})
    assert "error" not in base.keys() | found.keys()
    assert not same(found, base)


# -------------------------------------------------------------------------------------------- a run


def test_a_run_writes_what_it_is_told(monkeypatch):
    told = {
        "exp_name": "told",
        "epochs": 2,
        "steps_per_epoch": 4,
        "print_freq": 3,
        "eval_mode": "free",
        "eval_limit": 2,
        "val_batch_size": 2,
        "max_new_tokens": 3,
        "examples": 2,
        "gallery": 1,
    }
    between, limits, sizes = [], [], []
    evaluate, generate = train_ds.evaluate, build.CoresForReasoningSegmentation.generate

    def measured(*args, **kwargs):
        between.append(evaluate(*args, **kwargs))
        return between[-1]

    def generated(model, batch, *args, **kwargs):
        answers = generate(model, batch, *args, **kwargs)
        sizes.append(len(batch.clip_pixels))
        limits.extend(len(answer.token_ids) for answer in answers)
        return answers

    monkeypatch.setattr(train_ds, "evaluate", measured)
    monkeypatch.setattr(build.CoresForReasoningSegmentation, "generate", generated)
    assert train_ds.main(flags(toys(), **told)) == 0
    run = toys() / "runs" / "told"
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    # the last step of an epoch is always written
    assert [row["step"] for row in rows if row["kind"] == "train"] == [3, 4, 6, 8]
    assert [report.summary["n"] for report in between] == [2, 2], "images between epochs: the limit"
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["free"]["n"] == 3 and "teacher_forced" not in metrics, "in the end, all of them"
    assert sizes == [2, 2, 2, 1], "images in a pass"
    assert max(limits) == 3
    page = (run / "report.html").read_text()
    shown = page.count("<img")
    again = flags(toys(), **told | {"exp_name": "told-more", "gallery": 3, "examples": 3})
    assert train_ds.main(again) == 0
    more = toys() / "runs" / "told-more"
    assert (more / "report.html").read_text().count("<img") > shown
    assert (more / "examples.png").stat().st_size > (run / "examples.png").stat().st_size


def test_all_wordings_are_scored():
    asked = {}
    for texts in ("first", "all"):
        s = parse(flags(toys(), **COMMON, val_dataset="ReasonSeg|val", eval_texts=texts))
        data = build.build_eval(s, build.PromptFormat(s.level_list, 0))
        asked[texts] = [len(data[i].conversations) for i in range(len(data))]
    assert asked == {"first": [1, 1], "all": [2, 2]}


def test_exemplars_of_an_evaluation_follow_the_seed():
    drawn = []
    for seed in (0, 0, 1):
        s = parse(flags(toys(), **COMMON, val_dataset="ReasonSeg|val", seed=seed))
        drawn.append(build.build_eval(s, build.PromptFormat(s.level_list, 3))[0].exemplars)
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_run_without_evaluation(monkeypatch):
    monkeypatch.setattr(train_ds, "evaluate", None)
    argv = flags(toys(), exp_name="unmeasured", epochs=1, steps_per_epoch=1, no_eval="true")
    assert train_ds.main(argv) == 0
    run = toys() / "runs" / "unmeasured"
    assert not (run / "metrics.json").exists() and (run / "ckpt" / "best").is_dir()


def test_the_encoder_is_compiled_where_it_is_asked_for(monkeypatch):
    """Without compiling: that takes a minute and a C++ compiler."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    monkeypatch.setattr(build.shutil, "which", lambda name: f"/bin/{name}")
    model, _ = build.build_model(parse(flags(toys())))
    assert compiled == []
    model, _ = build.build_model(parse(flags(toys(), compile="true")))
    assert compiled == [model.segmenting.sam.image_encoder]
