"""Flags, configs and how they combine."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from cores.utils.build import check_facts
from cores.utils.settings.arguments import FIELDS, NUMBERS, parse, read_config
from cores.utils.settings.flags import UsageError

CONFIGS = sorted((Path(__file__).resolve().parents[3] / "configs").glob("*.yaml"))


def write(path: Path, **values) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_parses(path):
    settings = parse(["--config", str(path)])
    assert settings.level_list[-1] == "SEG"
    names = {"llm-seg": "llm_seg", "lisa": "lisa", "cores-select": "cores+select"}
    method = next((method for name, method in names.items() if name in path.name), "cores")
    assert settings.method == method
    assert settings.level_list == (["LOC", "SEG"] if "cores" in method else ["SEG"])
    assert (settings.refiner == "none") == ("cores" not in method)


def test_the_published_schedule():
    s = parse(["--config", str(CONFIGS[0].parent / "cores-7b.yaml")])
    assert (s.lr, s.beta1, s.beta2, s.weight_decay, s.warmup_steps, s.max_grad_norm) == (
        3e-4,
        0.9,
        0.95,
        0.0,
        100,
        1.0,
    )
    assert (
        s.batch_size,
        s.grad_accumulation_steps,
        s.steps_per_epoch,
        s.num_classes_per_sample,
    ) == (2, 10, 500, 3)
    assert (s.lora_r, s.lora_alpha, s.lora_dropout, s.lora_target_modules) == (
        8,
        16,
        0.05,
        "q_proj,v_proj",
    )
    assert (
        s.ce_loss_weight,
        s.bce_loss_weight,
        s.dice_loss_weight,
        s.bce_balance,
        s.pointing_weight,
    ) == (
        1,
        2,
        0.5,
        False,
        0,
    )


def test_flag_beats_config_beats_base_beats_default(tmp_path):
    write(tmp_path / "base.yaml", lr=0.1, epochs=7, seed=3)
    child = write(tmp_path / "child.yaml", base="base.yaml", lr=0.2, epochs=8)
    s = parse(["--config", str(child), "--lr", "0.3"])
    assert (s.lr, s.epochs, s.seed, s.beta1) == (0.3, 8, 3, 0.9)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"learning_rate": 1}, ["unknown key 'learning_rate'", "c.yaml"]),
        ({"lr": "fast"}, ["lr is 'fast'", "float", "c.yaml"]),
        ({"epochs": True}, ["epochs is True", "int"]),
        ({"epochs": 1.5}, ["epochs is 1.5", "int"]),
        ({"precision": "fp8"}, ["precision is 'fp8'", "fp32"]),
        ({"base": "absent.yaml"}, ["absent.yaml", "base of"]),
        ({"base": "c.yaml"}, ["its own base"]),
    ],
)
def test_a_wrong_config_names_file_and_key(tmp_path, values, words):
    path = write(tmp_path / "c.yaml", **values)
    with pytest.raises(UsageError) as error:
        read_config(path)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_broken_yaml(tmp_path):
    (tmp_path / "c.yaml").write_text("lr: [1")
    with pytest.raises(UsageError, match=r"c\.yaml: not valid YAML"):
        read_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        ([], True),
        (["--auto_resume"], True),
        (["--auto_resume", "false"], False),
        (["--auto_resume=True"], True),
        (["--no-auto_resume"], False),
    ],
)
def test_booleans_take_a_bare_flag_or_a_word(flags, value):
    assert parse(flags).auto_resume is value


LISA = """--local_rank=1 --version llava --vision_pretrained sam.pth --dataset_dir ./dataset
--precision bf16 --dataset sem_seg||refer_seg||vqa||reason_seg --sample_rates 9,3,3,1
--sem_seg_data ade20k||cocostuff||pascal_part||paco_lvis||mapillary --refer_seg_data
refclef||refcoco||refcoco+||refcocog --exclude_val --exp_name lisa-7b --lora_r 4
--lora_alpha 8 --lora_dropout 0.1 --lora_target_modules q_proj --model_max_length 600
--val_dataset ReasonSeg|val --log_base_dir ./runs --epochs 3 --steps_per_epoch 5
--batch_size 2 --grad_accumulation_steps 4 --val_batch_size 1 --workers 2 --lr 0.0003
--ce_loss_weight 1.0 --dice_loss_weight 0.5 --bce_loss_weight 2.0 --beta1 0.9 --beta2
0.95 --num_classes_per_sample 3 --no_eval --eval_only --print_freq 1 --start_epoch 0
--gradient_checkpointing --train_mask_decoder --auto_resume --conv_type llava_v1
--out_dim 256 --image_size 1024 --vision-tower openai/clip-vit-large-patch14"""


def test_the_command_line_of_lisa():
    argv = LISA.split()
    s = parse(argv)
    assert (s.lora_r, s.lora_alpha, s.epochs, s.sample_rates, s.no_eval, s.eval_only) == (
        4,
        8,
        3,
        "9,3,3,1",
        True,
        True,
    )
    assert (
        s.exclude_val and s.refer_seg_data == parse([]).refer_seg_data and not parse([]).exclude_val
    )
    assert (
        s.facts == {"image_size": 1024, "out_dim": 256}
        and s.vision_tower == "openai/clip-vit-large-patch14"
    )


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--load_in_8bit", "--load_in_4bit"], "exclude each other"),
        (["--load_in_4bit", "--zero_stage", "3"], "--zero_stage 0, 1 or 2"),
        (["--load_in_8bit", "--lora_r", "0"], "--lora_r above 0"),
        (["--vis_save_path", "x"], "belongs to chat.py"),
        (["--learning_rate", "1"], "learning_rate"),
        (["--epochs", "many"], "--epochs"),
        (["--epochs", "0"], "at least 1"),
        (["--auto_resume", "maybe"], "neither true nor false"),
        (["--levels", "SEG,LOC"], "end with SEG"),
        (["--levels", "SEG,SEG"], "different names"),
        (["--sample_rates", "9,x"], "--sample_rates"),
        (["--level_loss_weights", "1"], "each of the levels"),
        (["--epochs", "2", "--start_epoch", "2"], "leaves nothing"),
        (["--resume", "/nowhere"], "--resume"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (["--exp_name", " "], "--exp_name is empty"),
        (["--seed", str(2**70)], "--seed is"),
        (["--batch_size", "1000000000"], "at most 100000"),
        (["--level_loss_weights", "nan,1"], "--level_loss_weights 'nan,1': one is nan"),
        (["--text_projection_norm", "0"], "above 0, or none"),
        (["--explanatory", "5"], "at most 1"),
        (["--max_grad_norm", "-1"], "--max_grad_norm is -1.0"),
    ],
)
def test_what_cannot_be_honoured_is_one_clear_line(argv, words):
    with pytest.raises(UsageError) as error:
        parse(argv)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_lisa_is_a_value_of_method():
    s = parse(["--method", "lisa", "--level_loss_weights", "0.5,1"])
    assert (s.level_list, s.refiner, s.exemplar_count, s.level_loss_weights) == (
        ["SEG"],
        "none",
        0,
        "",
    )


def facts_model():
    vision = SimpleNamespace(hidden_size=1024, patch_size=14, image_size=224)
    config = SimpleNamespace(
        sam={"image_size": 1024, "prompt_dim": 256}, llava=SimpleNamespace(vision_config=vision)
    )
    return SimpleNamespace(config=config)


def test_flags_that_state_what_the_weights_say_pass():
    tower = ["--vision-tower", "openai/clip-vit-large-patch14"]
    check_facts(
        parse(["--image_size", "1024", "--out_dim", "256", "--use_mm_start_end", "false", *tower]),
        facts_model(),
        SimpleNamespace(image_marks=None),
    )


@pytest.mark.parametrize(
    "argv",
    [
        ["--image_size", "512"],
        ["--out_dim", "128"],
        ["--use_mm_start_end"],
        ["--vision-tower", "openai/clip-vit-large-patch14-336"],
        ["--vision-tower", "unheard-of"],
    ],
)
def test_flags_that_contradict_the_weights_are_refused(argv):
    with pytest.raises(UsageError, match="leave the flag out"):
        check_facts(parse(argv), facts_model(), SimpleNamespace(image_marks=None))


@pytest.mark.parametrize("name", [n for n, f in FIELDS.items() if f.type in NUMBERS])
@pytest.mark.parametrize("value", ["nan", "inf", "-5", "1e400"])
def test_no_number_is_taken_that_would_fail_later(name, value):
    with pytest.raises(UsageError, match=f"--{name}"):
        parse([f"--{name}={value}"])


def test_the_word_none_takes_a_number_of_a_config_back(tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text("text_projection_norm: 8.0\n")
    assert parse(["--config", str(config)]).text_projection_norm == 8
    argv = ["--config", str(config), "--text_projection_norm", "none"]
    assert parse(argv).text_projection_norm is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr: [1e-4]", "cannot be a value"),
        ("a: &x 1\nlr: *x", "references"),
        ("{" * 100_000, "cannot be a value"),
        ("lr: 1\nlr: 2", "'lr' stands here twice"),
        ("exp_name: 1e5", "quotes"),
        ("epochs: 1.5", "epochs is 1.5, expected int"),
        ("lr:\t1", "not valid YAML"),
        ("lr: .nan", "--lr is nan"),
        ("- lr", "must hold"),
    ],
)
def test_what_a_config_cannot_say(tmp_path, text, words):
    config = tmp_path / "a.yaml"
    config.write_text(text)
    with pytest.raises(UsageError) as error:
        parse(["--config", str(config)])
    assert words in str(error.value) and "\n" not in str(error.value)
    assert str(config) in str(error.value) or words.startswith("--")


def test_numbers_of_a_config_as_people_write_them(tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text("lr: 1e-4\nweight_decay: .5\nsteps_per_epoch: 2e3\nbeta1: 9.E-1\n")
    s = parse(["--config", str(config)])
    assert (s.lr, s.weight_decay, s.steps_per_epoch, s.beta1) == (1e-4, 0.5, 2000, 0.9)
    assert type(s.steps_per_epoch) is int


@pytest.mark.parametrize("encoding", ["utf-8-sig", "gb18030", "cp1252"])
def test_a_config_of_any_editor(tmp_path, encoding):
    config = tmp_path / "a.yaml"
    config.write_bytes(
        ("# " + ("学习率" if encoding != "cp1252" else "Übung") + "\nlr: 1e-4\n").encode(encoding)
    )
    assert parse(["--config", str(config)]).lr == 1e-4


def test_own_data_without_own_among_the_families_is_told():
    with pytest.raises(UsageError, match="--own_data mine: --dataset reason_seg does not train"):
        parse(["--dataset", "reason_seg", "--own_data", "mine"])
    assert parse(["--dataset", "own", "--own_data", "mine"]).sample_rates == "1"


def test_families_on_the_command_line_are_drawn_alike_unless_rates_are_given(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text('dataset: reason_seg||sem_seg\nsample_rates: "9,1"\n')
    for argv, rates in (
        ([], "9,1"),
        (["--dataset", "coco||reason_seg"], "9,1"),
        (["--dataset", "coco||reason_seg||vqa"], "1,1,1"),
        (["--dataset", "coco"], "1"),
        (["--dataset", "coco||vqa||own", "--sample_rates", "3,2,1"], "3,2,1"),
    ):
        assert parse(["--config", str(config), *argv]).sample_rates == rates


def test_a_shipped_config_is_known_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "tiny.yaml"):
        s = parse(["--config", name])
        assert s.exp_name == "tiny" and Path(s.version).is_dir()
    assert parse(["--config", "recipes/1x80gb-7b"]).batch_size == 16
    with pytest.raises(UsageError, match="nosuch: no such file .*recipes/1x80gb-7b.*tiny-lisa"):
        parse(["--config", "nosuch"])
    (tmp_path / "tiny").write_text("epochs: 7\n")  # One's own goes before.
    assert parse(["--config", "tiny"]).epochs == 7
