"""Reads the command line and YAML files into ``Settings``, and checks them.

``--config FILE`` gives defaults, explicit flags go before them; a ``base: other.yaml`` key in the
file names a file whose values it changes. The flags of LISA and CoReS keep their names. A flag that
cannot be honoured is refused, never ignored. The flags themselves are in utils/settings/flags.py.
"""

from __future__ import annotations

import dataclasses
import re
import reprlib
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from cores.dataset import command
from cores.dataset.command import one_line
from cores.dataset.files.paths import typed_folder
from cores.dataset.files.text import read_text
from cores.dataset.numbers import refuse_outside
from cores.utils.settings.flags import GROUPS, TRACKERS, EvalArguments, UsageError
from cores.utils.settings.saved import read_settings, run_of

FIELDS = {f.name: f for group in GROUPS for f in dataclasses.fields(group)}
# What a YAML file may give for a field of a type; the first entry reads a word of the command line.
KINDS: dict[Any, tuple[type, ...]] = {
    "int": (int,),
    "float": (float, int),
    "float | None": (float, int, type(None)),
    "str": (str,),
    "bool": (bool,),
}
NUMBERS = ("int", "float", "float | None")
UNSET = object()  # The word "none" of a command line, where None says that a flag was not given.

FREE_ON_RESUME = {
    name for name, f in FIELDS.items() if f.metadata["may_change"] or hasattr(EvalArguments, name)
}
# Free, too: utils/training/reshard.py checks that the steps of a continued run have as many images
# as before, however ranks and micro steps divide them.
DIVISION = {"batch_size", "grad_accumulation_steps", "global_batch_size"}

# Flags of the published scripts that have no meaning here, with the reason.
REFUSED = {
    "vis_save_path": "belongs to chat.py; evaluation writes its pictures into the run folder",
}

# Flags of the published scripts whose value is a fact of the loaded weights: they are accepted if
# the weights say the same, see utils/build.py.
FACTS = {"image_size": int, "out_dim": int, "use_mm_start_end": str}


CONFIGS = Path(__file__).parents[2] / "configs"


class Settings(Namespace):
    """All fields of GROUPS, plus ``facts``: values given for FACTS."""

    facts: dict[str, Any]

    @property
    def level_list(self) -> list[str]:
        return [name for name in self.levels.split(",") if name]

    @property
    def trackers(self) -> list[str]:
        """Names of TRACKERS; none for "none"."""
        names = [name.strip() for name in self.report_to.split(",")]
        return [] if names == ["none"] else names

    @property
    def bits(self) -> int | None:
        """Bits per weight of the language model, None for --precision."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None

    @property
    def run_dir(self) -> Path:
        return Path(self.log_base_dir) / self.exp_name

    def saved(self) -> dict[str, Any]:
        """What a later tool needs to rebuild the run, without how this process was started."""
        unsaved = ("local_rank", "facts", "resume", "eval_only", "accept_changes")
        return {k: v for k, v in sorted(vars(self).items()) if k not in unsaved}

    def refuse_changes(self, earlier: Settings, where: Path) -> None:
        """Raises UsageError if these settings would train the run in the folder ``where``, which
        ``earlier`` started, in another way."""
        free = FREE_ON_RESUME | DIVISION
        if self.loss_normalisation == "micro":  # Means over micro batches depend on their size.
            free -= {"batch_size"}
        changes = ", ".join(
            f"{name} was {getattr(earlier, name)!r} and is now {value!r}"
            for name, value in self.saved().items()
            if name not in free and value != getattr(earlier, name)
        )
        if changes:
            raise UsageError(
                f"{where}: holds a run with other settings: {changes}; choose another --exp_name or"
                " the earlier settings"
            )


class FlagParser(command.Parser):
    mistake = UsageError


def build_parser(program: str | None = None) -> FlagParser:
    parser = FlagParser("Train or evaluate CoReS and LISA.", program)
    parser.add_argument("--config", help="YAML file with defaults, or the name of one in configs/")
    for group in GROUPS:
        section = parser.add_argument_group(group.__name__)
        for f in dataclasses.fields(group):
            text = f"{f.metadata['help']} (default: {f.default})"
            words: dict[str, Any] = {"dest": f.name, "help": text}
            if f.type == "bool":  # `--flag`, `--no-flag`, and LISA's `--flag true`
                section.add_argument(f"--{f.name}", nargs="?", const=True, type=_boolean, **words)
                words["help"] = f"turn off --{f.name}"
                section.add_argument(f"--no-{f.name}", action="store_const", const=False, **words)
            else:
                names = f"--{f.name}", *f.metadata["aliases"]
                kind = _float_or_none if f.type == "float | None" else KINDS[f.type][0]
                section.add_argument(*names, type=kind, choices=f.metadata["choices"], **words)
    for name, reason in REFUSED.items():
        parser.add_argument(f"--{name}", nargs="?", const=True, help=f"refused: {reason}")
    checked = "checked against the weights"
    for name, kind in FACTS.items():
        parser.add_argument(f"--{name}", type=kind, nargs="?", const="true", help=checked)
    return parser


def _float_or_none(text: str) -> Any:
    return UNSET if text.lower() in ("none", "null") else float(text)


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise ArgumentTypeError(f"{text!r} is neither true nor false")


class _FlatLoader(yaml.SafeLoader):
    """Reads `key: value` lines. Numbers such as 1e-4, which YAML 1.1 takes for texts, are numbers,
    and nothing may be nested, repeated by reference or built without end."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        mark: Any = event.start_mark
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                None, None, "references (*name) are not read; write the value", mark
            )
        if parent is not None and isinstance(event, yaml.CollectionStartEvent):
            key = getattr(index, "value", "")
            key = key if key in FIELDS else f"unknown key {key}"
            raise yaml.MarkedYAMLError(
                None, None, f"{key}: a list or a table cannot be a value", mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        keys: set[str] = set()
        for key, _ in node.value:
            if key.value in keys:
                raise yaml.MarkedYAMLError(
                    None, None, f"{key.value!r} stands here twice", key.start_mark
                )
            keys.add(key.value)
        return super().construct_mapping(node, deep)


_FlatLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_config(path: str | Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a YAML file, or of the one in configs/ of that name, on top of those of its
    ``base``; ``above``: the files that name it as their base. Raises UsageError naming file and
    key."""
    path = Path(path)
    if not path.is_file() and not above and not path.is_absolute() and ".." not in path.parts:
        # The name of one that comes with the program, such as tiny or recipes/1x80gb-7b.
        path = next((p for p in (CONFIGS / path, CONFIGS / f"{path}.yaml") if p.is_file()), path)
    if not path.is_file():
        asked_by = f"base of {above[-1]}" if above else "--config"
        names = (file.relative_to(CONFIGS).with_suffix("") for file in CONFIGS.rglob("*.yaml"))
        shipped = ", ".join(sorted(map(str, names)))
        hint = "" if above else f"; by name there are {shipped}"
        raise UsageError(f"{path}: no such file ({asked_by}){hint}")
    if path.resolve() in [p.resolve() for p in above]:
        raise UsageError(f"{path}: is its own base; remove one of the `base:` keys")
    try:
        values = yaml.load(read_text(path), _FlatLoader) or {}  # noqa: S506 (a safe loader)
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not valid YAML: {one_line(error)}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: must hold `key: value` lines")
    base = values.pop("base", None)
    for key, value in values.items():
        if key not in FIELDS:
            raise UsageError(
                f"{path}: unknown key {key!r}; `train_ds.py --help` lists the flags, which are the"
                " keys"
            )
        kind, choices = FIELDS[key].type, FIELDS[key].metadata["choices"]
        if kind == "int" and isinstance(value, float) and value.is_integer():
            values[key] = value = int(value)  # 1e3
        # True and False are integers for Python.
        if not isinstance(value, KINDS[kind]) or (isinstance(value, bool) and kind != "bool"):
            hint = "; put a text that looks like something else in quotes" if kind == "str" else ""
            raise UsageError(f"{path}: {key} is {reprlib.repr(value)}, expected {kind}{hint}")
        if choices and value not in choices:
            among = ", ".join(map(str, choices))
            raise UsageError(f"{path}: {key} is {reprlib.repr(value)}; choose one of {among}")
    if path.resolve().is_relative_to(CONFIGS.resolve()):
        # What it names comes with the program, too, wherever that is started.
        for key, value in values.items():
            if str(value).startswith("assets/") and not Path(value).exists():
                values[key] = str(CONFIGS.parent / value)
    return (read_config(path.parent / str(base), (*above, path)) if base else {}) | values


def parse(argv: Sequence[str] | None = None, program: str | None = None) -> Settings:
    """Settings of a command line of ``program``, train_ds.py if None. Raises UsageError for
    whatever is wrong with it."""
    return parse_over({}, argv, program)


def parse_over(
    known: dict[str, Any], argv: Sequence[str] | None = None, program: str | None = None
) -> Settings:
    """As ``parse``, with the values ``known`` in place of the defaults. A run that --resume names,
    a --config file and flags come on top, in this order."""
    given = vars(build_parser(program).parse_args(argv))
    config = given.pop("config")
    refused = [name for name in REFUSED if given.pop(name) is not None]
    if refused:
        raise UsageError(f"--{refused[0]}: {REFUSED[refused[0]]}; leave the flag out")
    facts = {name: value for name in FACTS if (value := given.pop(name)) is not None}
    resumed = given["resume"] not in (None, "", "auto")
    values = known | (read_resumed(given["resume"]) if resumed else {})
    values |= read_config(config) if config else {}
    # The limit of a config or a run is meant for the evaluations between epochs.
    if given["eval_only"] and not given["eval_limit"]:
        values["eval_limit"] = 0
    values |= {
        name: None if value is UNSET else value
        for name, value in given.items()
        if value is not None
    }
    families = str(values.get("dataset", FIELDS["dataset"].default)).split("||")
    if given["own_data"] and "own" not in families and not given["eval_only"]:
        raise UsageError(
            f"--own_data {given['own_data']}: --dataset {'||'.join(families)} does not train on it;"
            " add own, as in --dataset own"
        )
    rates = str(values.get("sample_rates", FIELDS["sample_rates"].default)).split(",")
    if given["dataset"] and not given["sample_rates"] and len(rates) != len(families):
        # Those of a config, or the default, are for other families.
        values["sample_rates"] = ",".join("1" for _ in families)
    return settings_of(values, facts)


def read_resumed(path: str | Path) -> dict[str, Any]:
    """The settings of a run, of which ``path`` is the folder or a checkpoint. The run may have been
    moved: log_base_dir and exp_name say where it is now."""
    folder = run_of(path)
    if folder is None:
        raise UsageError(
            f"{path}: neither a run folder nor a checkpoint in one (--resume); a run folder has"
            " config.json and ckpt/"
        )
    values = read_settings(folder, _fits, FIELDS.keys() - FREE_ON_RESUME - DIVISION)
    return values | {"log_base_dir": str(folder.parent), "exp_name": folder.name}


def refuse_no_version(s: Settings) -> None:
    """Raises UsageError where nothing says which model it is about."""
    if not s.version.strip():
        raise UsageError(
            "--version is missing or empty: name a LLaVA (hub name or folder), a merged model, or a"
            " --config that does, such as configs/tiny.yaml"
        )


def _fits(name: str, value: Any) -> bool:
    """Whether a setting may have a value of this type; one that is unknown here may have any, as
    another version of the program may have written it."""
    if name not in FIELDS:
        return True
    kind, choices = FIELDS[name].type, FIELDS[name].metadata["choices"]
    sound = isinstance(value, KINDS[kind]) and (kind == "bool") == isinstance(value, bool)
    return sound and (not choices or value in choices)


def settings_of(values: dict[str, Any], facts: dict[str, Any] | None = None) -> Settings:
    """Settings with the defaults for whatever ``values`` leaves out; ``facts`` are values of FACTS.
    Raises UsageError for contradictions."""
    values = {name: f.default for name, f in FIELDS.items()} | values
    for name, value in values.items():
        if isinstance(value, str) and value[:1] in ("~", "$"):
            values[name] = str(typed_folder(value))
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
    for name, f in FIELDS.items():
        value = getattr(s, name)
        if f.type in NUMBERS and value is not None:
            try:
                refuse_outside(value, f.metadata["minimum"], f.metadata["maximum"])
            except ValueError as error:
                raise UsageError(f"--{name} {error}") from None
        # An empty text means "unset" where that is the default, and elsewhere a lost $VARIABLE.
        if f.type == "str" and f.default and not value.strip():
            raise UsageError(f"--{name} is empty; give a value or leave the flag out")
    if Path(s.exp_name) == Path():
        raise UsageError(f"--exp_name is {s.exp_name!r}; give the run a name")
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
    unknown = [name for name in s.trackers if name not in TRACKERS]
    if unknown or len(set(s.trackers)) < len(s.trackers):
        raise UsageError(
            f"--report_to {s.report_to}: give different names out of {', '.join(TRACKERS)}, joined"
            " by commas, or none alone"
        )
    if not s.lora_r:
        for flag in ("use_dora", "use_rslora", "loraplus_lr_ratio"):
            if getattr(s, flag) != FIELDS[flag].default:
                raise UsageError(f"--{flag} needs --lora_r above 0: it changes adapters")
    if s.use_dora and s.load_in_8bit and not s.eval_only:
        raise UsageError(
            "--use_dora --load_in_8bit: 8-bit layers of bitsandbytes lose their scales when PEFT"
            " measures their rows; use --load_in_4bit"
        )
    if s.offload != "none" and s.zero_stage == 0:
        raise UsageError(
            "--offload optimizer needs --zero_stage 1, 2 or 3: without ZeRO the optimizer stays on"
            " the GPU"
        )
    if s.lr == 0:
        raise UsageError("--lr is 0; it must be a number above 0")
    if s.text_projection_norm == 0:
        raise UsageError("--text_projection_norm is 0; it must be a number above 0, or none")
    numbers(s.sample_rates, "--sample_rates")
    weights = numbers(s.level_loss_weights, "--level_loss_weights") if s.level_loss_weights else []
    if weights and len(weights) != len(s.level_list):
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
    """The numbers of a value like "9,1"; a UsageError names ``flag``."""
    try:
        found = [float(part) for part in str(text).split(",")]
    except ValueError as error:
        raise UsageError(f"{flag} {text!r}: give numbers joined by commas") from error
    try:
        for value in found:
            refuse_outside(value, 0)
    except ValueError as error:
        raise UsageError(f"{flag} {text!r}: one {error}") from None
    return found
