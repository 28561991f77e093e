"""The command line: small dataclasses by concern, a YAML file for defaults, explicit flags on top.

``--config FILE`` gives defaults; a ``base: other.yaml`` key in it names a file whose values it
changes. The flags of LISA and CoReS keep their names. A flag that cannot be honoured is refused,
never ignored.
"""

from __future__ import annotations

import dataclasses
import json
import unicodedata
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import Any, NoReturn

import yaml

from utils.settings.flags import GROUPS, UsageError

# What may change when a run is continued: where things are, how they are shown, how they are
# measured.
FREE_ON_RESUME = {
    "resume",
    "auto_resume",
    "eval_only",
    "exp_name",
    "log_base_dir",
    "dataset_dir",
    "workers",
    "print_freq",
    "save_every",
    "no_eval",
    "eval_every",
    "eval_mode",
    "eval_limit",
    "eval_texts",
    "val_dataset",
    "val_batch_size",
    "max_new_tokens",
    "examples",
    "gallery",
    "prefix_sharing",
    "pack_tokens",
    "attn_implementation",
    "compile",
    "sam_cache",
    "sam_cache_gb",
    "proposals",
    "select",
    "spike_factor",
}


# How a step is divided among ranks and micro steps: utils/training/reshard.py sees that its images
# stay as many.
DIVISION = {"batch_size", "grad_accumulation_steps", "global_batch_size"}


# Flags of the published scripts that have no meaning here: the value named is what this program
# does anyway.
REFUSED = {
    "vis_save_path": "belongs to chat.py; evaluation writes its pictures into the run folder",
}


# Flags whose value is a fact of the loaded weights: accepted if it says what the weights say.
FACTS = {"image_size": int, "out_dim": int, "use_mm_start_end": str}


class Settings(Namespace):
    """All fields of GROUPS, plus ``facts``: values given for FACTS."""

    facts: dict[str, Any]

    @property
    def level_list(self) -> list[str]:
        return [name for name in self.levels.split(",") if name]

    @property
    def bits(self) -> int | None:
        """Bits per weight of the language model, None for --precision."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None

    @property
    def run_dir(self) -> Path:
        return Path(self.log_base_dir) / self.exp_name

    def saved(self) -> dict[str, Any]:
        """What a later tool needs to rebuild the run; the launcher's business is left out."""
        return {
            k: v
            for k, v in sorted(vars(self).items())
            if k not in ("local_rank", "facts", "resume", "eval_only")
        }

    def refuse_changes(self, earlier: Settings, where: Path) -> None:
        """Raises UsageError if continuing the run that ``earlier`` started would train with other
        settings."""
        # means of micro batches depend on the size of these
        free = FREE_ON_RESUME | DIVISION - (
            {"batch_size"} if self.loss_normalisation == "micro" else set()
        )
        changed = [
            k for k in self.saved() if k not in free and getattr(self, k) != getattr(earlier, k)
        ]
        if changed:
            shown = ", ".join(
                f"{k} was {getattr(earlier, k)!r} and is now {getattr(self, k)!r}" for k in changed
            )
            raise UsageError(
                f"{where}: holds a run with other settings: {shown}; choose another --exp_name or"
                " the earlier settings"
            )


def _fields() -> dict[str, dataclasses.Field]:
    return {f.name: f for group in GROUPS for f in dataclasses.fields(group)}


def _number(kind: str):
    return {"int": int, "float": float, "float | None": float, "str": str}[kind]


def shown(text: str) -> str:
    """``text`` without what would steer the terminal."""
    return "".join(" " if unicodedata.category(c) in ("Cc", "Cs") else c for c in text)


def one_line(error: BaseException) -> str:
    """An error's own words, or its name if it has none, as they may be printed; of one that a data
    worker raised, without the trace that torch puts before them."""
    text = str(error).strip()
    # … ends with "dataset.files.write.errors.DataError: /data/a.jpg: not a readable image"
    if "Original Traceback" in text:
        text = text.splitlines()[-1].split(": ", 1)[-1]
    return " ".join(shown(text).split()) or type(error).__name__


class OneLineParser(ArgumentParser):
    """Mistakes are a UsageError, not a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; --help lists the flags")


def build_parser() -> ArgumentParser:
    parser = OneLineParser(description="Train or evaluate CoReS and LISA.", allow_abbrev=False)
    parser.add_argument("--config", default=None, help="YAML file with defaults")
    for group in GROUPS:
        section = parser.add_argument_group(group.__name__)
        for f in dataclasses.fields(group):
            _add(section, f)
    for name in REFUSED:
        parser.add_argument(
            f"--{name}", nargs="?", const=True, default=None, help="refused: " + REFUSED[name]
        )
    for name, kind in FACTS.items():
        parser.add_argument(
            f"--{name}",
            dest=name,
            type=kind,
            nargs="?",
            const="true",
            default=None,
            help="checked against the weights",
        )
    return parser


def _add(section, f: dataclasses.Field) -> None:
    default = f.default
    shown = f.metadata["help"] + f" (default: {default})"
    if f.type == "bool":  # `--flag`, `--no-flag`, and LISA's `--flag true`
        section.add_argument(
            f"--{f.name}", nargs="?", const=True, default=None, type=_boolean, help=shown
        )
        section.add_argument(
            f"--no-{f.name}",
            dest=f.name,
            action="store_const",
            const=False,
            help=f"turn off --{f.name}",
        )
        return
    names = [f"--{f.name}", *f.metadata["aliases"]]
    section.add_argument(
        *names,
        dest=f.name,
        type=_number(f.type),
        default=None,
        choices=f.metadata["choices"],
        help=shown,
    )


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise ArgumentTypeError(f"{text!r} is neither true nor false")


def read_config(path: str | Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a YAML file on top of those of its ``base``. Raises UsageError naming file and
    key."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(
            f"{path}: no such file ({f'base of {above[-1]}' if above else '--config'})"
        )
    if path.resolve() in [p.resolve() for p in above]:
        raise UsageError(f"{path}: is its own base; remove one of the `base:` keys")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: must hold `key: value` lines")
    base = values.pop("base", None)
    known = _fields()
    for key, value in values.items():
        if key not in known:
            raise UsageError(
                f"{path}: unknown key {key!r}; `train_ds.py --help` lists the flags, which are the"
                " keys"
            )
        _check_type(path, key, value, known[key])
    return (read_config(path.parent / str(base), (*above, path)) if base else {}) | values


def _check_type(path: Path, key: str, value: Any, f: dataclasses.Field) -> None:
    kinds = {
        "int": (int,),
        "float": (int, float),
        "float | None": (int, float, type(None)),
        "str": (str,),
        "bool": (bool,),
    }
    wrong = not isinstance(value, kinds[f.type]) or (isinstance(value, bool) and f.type != "bool")
    if wrong:
        raise UsageError(f"{path}: {key} is {value!r}, expected {f.type}")
    if f.metadata["choices"] and value not in f.metadata["choices"]:
        raise UsageError(
            f"{path}: {key} is {value!r}; choose one of"
            f" {', '.join(map(str, f.metadata['choices']))}"
        )


def parse(argv: list[str] | None = None) -> Settings:
    """Settings of a command line. Raises UsageError for what argparse does not catch."""
    return parse_over({}, argv)


def parse_over(known: dict[str, Any], argv: list[str] | None = None) -> Settings:
    """As ``parse``, with the values ``known`` in place of the defaults; a --config file and flags
    come on top."""
    given = vars(build_parser().parse_args(argv))
    config = given.pop("config")
    refused = [name for name in REFUSED if given.pop(name) is not None]
    if refused:
        raise UsageError(f"--{refused[0]}: {REFUSED[refused[0]]}; leave the flag out")
    facts = {name: value for name in FACTS if (value := given.pop(name)) is not None}
    values = known | (
        read_resumed(given["resume"]) if given["resume"] not in (None, "", "auto") else {}
    )
    values |= read_config(config) if config else {}
    # that of a config or run is meant for the evaluations between epochs
    if given["eval_only"] and not given["eval_limit"]:
        values["eval_limit"] = 0
    values |= {name: value for name, value in given.items() if value is not None}
    return settings_of(values, facts)


def read_resumed(path: str | Path) -> dict[str, Any]:
    """The settings of the run whose folder, or one of whose checkpoints, ``path`` is; placed where
    it is now."""
    path = Path(path).resolve()
    for folder in (path, path.parent, path.parent.parent):
        if (folder / "config.json").is_file() and (folder / "ckpt").is_dir():
            values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            return values | {"log_base_dir": str(folder.parent), "exp_name": folder.name}
    raise UsageError(
        f"{path}: neither a run folder nor a checkpoint in one (--resume); a run folder has"
        " config.json and ckpt/"
    )


def settings_of(values: dict[str, Any], facts: dict[str, Any] | None = None) -> Settings:
    """Settings with the defaults for whatever ``values`` leaves out. Raises UsageError for
    contradictions."""
    values = {name: f.default for name, f in _fields().items()} | values
    if values["method"] in ("lisa", "llm_seg"):
        values = values | {
            "levels": "SEG",
            "refiner": "none",
            "exemplar_count": 0,
            "pointing_host": False,
            "level_loss_weights": "",
        }
    settings = Settings(**values, facts=facts or {})
    _check(settings)
    return settings


def _check(s: Settings) -> None:
    positive = (
        "epochs",
        "steps_per_epoch",
        "batch_size",
        "grad_accumulation_steps",
        "print_freq",
        "val_batch_size",
        "num_classes_per_sample",
        "max_new_tokens",
        "model_max_length",
        "eval_every",
        "lora_alpha",
        "proposal_count",
        "proposal_points",
        "pool_size",
    )
    for name in positive:
        if getattr(s, name) < 1:
            raise UsageError(f"--{name} is {getattr(s, name)}; it must be at least 1")
    for name in (
        "workers",
        "global_batch_size",
        "warmup_steps",
        "save_every",
        "exemplar_count",
        "lora_r",
        "start_epoch",
        "eval_limit",
        "examples",
        "gallery",
        "pack_tokens",
        "sam_cache_gb",
        "spike_factor",
    ):
        if getattr(s, name) < 0:
            raise UsageError(f"--{name} is {getattr(s, name)}; it must not be negative")
    if not s.level_list or s.level_list[-1] != "SEG" or len(set(s.level_list)) != len(s.level_list):
        raise UsageError(
            f"--levels {s.levels!r}: give different names that end with SEG, such as LOC,SEG"
        )
    if s.load_in_8bit and s.load_in_4bit:
        raise UsageError("--load_in_8bit and --load_in_4bit exclude each other")
    if s.bits and not s.eval_only and (s.zero_stage == 3 or not s.lora_r):
        raise UsageError(
            "training on 4 or 8 bits needs --lora_r above 0 and --zero_stage 0, 1 or 2: such"
            " weights cannot change"
        )
    if s.offload != "none" and s.zero_stage == 0:
        raise UsageError(
            "--offload optimizer needs --zero_stage 1, 2 or 3: without ZeRO the optimizer stays on"
            " the GPU"
        )
    if s.lr <= 0:
        raise UsageError(f"--lr is {s.lr}; it must be above 0")
    numbers(s.sample_rates, "--sample_rates")
    if s.level_loss_weights and len(numbers(s.level_loss_weights, "--level_loss_weights")) != len(
        s.level_list
    ):
        raise UsageError(
            f"--level_loss_weights {s.level_loss_weights}: give one number for each of the levels"
            f" {s.levels}"
        )
    if s.start_epoch >= s.epochs and not s.eval_only:
        raise UsageError(
            f"--start_epoch {s.start_epoch} leaves nothing of --epochs {s.epochs}; epochs count"
            " from 0"
        )


def numbers(text: str, flag: str) -> list[float]:
    try:
        return [float(part) for part in str(text).split(",")]
    except ValueError as error:
        raise UsageError(f"{flag} {text!r}: give numbers joined by commas") from error
