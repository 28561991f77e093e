"""A checkpoint is opened once: what a folder or hub name is, and what it holds.

``open_source`` makes a Source once per run, and everything that needs a part of the checkpoint gets
it from there: training, evaluation, merging and chat hand it on. A hub name becomes a folder of the
hub's cache with its small files in one look-up; the weights follow when somebody asks for them, and
transformers is given local paths only, so that it never asks the hub again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    CLIPVisionConfig,
    GenerationConfig,
    LlavaConfig,
)
from transformers.utils import GENERATION_CONFIG_NAME

from cores.model.checkpoints import published
from cores.model.checkpoints.weights import (
    SINGLE,
    blaming,
    read_all,
    read_json_file,
    shards,
    weight_file,
    weight_names,
)
from cores.model.config import CoresConfig, SamDims

# All published checkpoints were trained with Pillow's resizing; the other one differs by up to
# 0.015.
try:
    from transformers import CLIPImageProcessorPil as CLIPImageProcessor
except ImportError:  # Older versions of transformers have Pillow's under the plain name.
    from transformers import CLIPImageProcessor  # type: ignore[assignment]

IMAGE_TOKEN = "<image>"
PROCESSOR_FILE = "cores_processor.json"
ADAPTER_FILE = "adapter_config.json"
IMAGE_PROCESSOR_FILE = "preprocessor_config.json"
# Each of the first is a tokenizer; the others are read with it where they are there.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
TOKENIZER_PARTS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "README.md"]
"""Everything of a hub repository but its weights; folders inside it are left out."""
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "force_download", "local_files_only")


class Kind(Enum):
    """What a checkpoint is. Another family of models gets its own member here, and its case where
    they are told apart: ``Source.kind``, llava.load_llava and finished.loading_arguments."""

    LLAVA = "a LLaVA in transformers' layout"
    PUBLISHED_LLAVA = "a LLaVA in its authors' layout"
    PUBLISHED_CORES = "a whole LISA or CoReS in its authors' layout"
    CORES = "a whole model of this program"
    ADAPTER = "a LoRA adapter and not a whole model"
    OTHER = "something else"


class Source:
    """A folder or hub name, opened; make it with ``open_source``.

    Nothing but a hub's small files is read before it is asked for, and everything once. A folder
    that lacks what it is asked for raises FileNotFoundError, one whose content is wrong ValueError;
    both name it.
    """

    def __init__(self, name: str, vision_tower: str | None, **hub: Any):
        self.name = name
        """As the user gave it."""
        self.vision_tower = vision_tower
        self._hub: dict[str, Any] | None = None if Path(name).is_dir() else hub
        self.folder = Path(name) if self._hub is None else self._download(SMALL_FILES)
        """Where its files lie on this machine."""

    def _download(self, patterns: list[str]) -> Path:
        """The folder of the hub's cache with the files of these names: one look-up. Without the
        hub, what the cache has of them is taken to be all: one may work offline."""
        assert self._hub is not None
        try:
            folder = snapshot_download(
                self.name, allow_patterns=patterns, ignore_patterns=["*/*"], **self._hub
            )
        except LocalEntryNotFoundError:
            raise FileNotFoundError(
                f"{self.name}: the hub cannot be reached, and its cache has nothing of this model;"
                " check the network and HF_HUB_OFFLINE, or give the path of a folder"
            ) from None
        except (OSError, ValueError) as error:
            raise FileNotFoundError(f"{self.name}: {' '.join(str(error).split())}") from None
        # What follows must come from the same commit, whatever is pushed meanwhile.
        self._hub["revision"] = Path(folder).name
        return Path(folder)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Lets errors speak of a hub's model by its name and not by a folder of the cache."""
        try:
            yield
        except (FileNotFoundError, ValueError) as error:
            if self._hub is None:
                raise
            raise type(error)(str(error).replace(str(self.folder), self.name)) from None

    def file(self, name: str) -> Path | None:
        """The path of one of its small files, None where it has none of this name."""
        return self.folder / name if (self.folder / name).is_file() else None

    @cached_property
    def config(self) -> dict:
        """The content of config.json."""
        with self._named():
            return read_json_file(self.folder, "config.json")

    @cached_property
    def kind(self) -> Kind:
        """Read off config.json and, for the layouts of other authors, the names of the weights."""
        if self.file(ADAPTER_FILE) is not None and not self._has_weights:
            return Kind.ADAPTER
        if self.file("config.json") is None:
            if self._hub is not None and self.file(PROCESSOR_FILE) is None:
                raise FileNotFoundError(
                    f"{self.name}: has no config.json, or the hub cannot be reached and its cache"
                    " has nothing of it; check the network and HF_HUB_OFFLINE, or give the path of"
                    " a folder"
                )
            return Kind.OTHER
        with self._blaming("config.json"):
            theirs = published.is_published(self.config)
        if theirs:
            masks = published.has_masks(self._weight_names)
            return Kind.PUBLISHED_CORES if masks else Kind.PUBLISHED_LLAVA
        kinds = {"llava": Kind.LLAVA, CoresConfig.model_type: Kind.CORES}
        return kinds.get(str(self.config.get("model_type")), Kind.OTHER)

    @property
    def finished(self) -> bool:
        """Whether it is a whole model, ours or a published LISA or CoReS, rather than a
        backbone."""
        return self.kind in (Kind.CORES, Kind.PUBLISHED_CORES)

    def refuse(self, wanted: str) -> ValueError:
        """The error for a caller that needs something else, ``wanted`` in words: it says what the
        checkpoint is and how to come by what is needed."""
        return ValueError(f"{self.name}: {wanted}, this is {self._advice()}")

    def _advice(self) -> str:
        if self.kind in (Kind.LLAVA, Kind.PUBLISHED_LLAVA):
            return (
                f"{self.kind.value}, a backbone without masks; train with it (train_ds.py --version"
                f" {self.name} --vision_pretrained SAM), merge, and give the merged folder"
            )
        if self.finished:
            return f"{self.kind.value}, not a LLaVA; load it without --vision_pretrained"
        if self.kind is Kind.ADAPTER:
            content = read_json_file(self.folder, ADAPTER_FILE)
            base = content.get("base_model_name_or_path") or "a model that it does not name"
            # Training LLaVA writes its own config.json beside the adapter, PEFT writes none.
            if self.file("config.json") is not None and published.is_published(self.config):
                return (
                    f"a LoRA adapter of LLaVA's training on {base} and not a whole model; merge it"
                    " with scripts/merge_lora_weights.py of the LLaVA code (--model-path this"
                    f" folder, --model-base {base}) and give the merged folder"
                )
            return (
                f"a LoRA adapter of {base} and not a whole model; merge it with its base first:"
                " with merge_and_unload() of PEFT, or, for an adapter of a model of this program,"
                " with `merge_lora_weights_and_save_hf_model.py --weight` this folder and"
                " `--version` its base"
            )
        if (self.folder / "ckpt").is_dir():
            return (
                "the folder of a run; merge it first: `merge_lora_weights_and_save_hf_model.py"
                f" --run {self.name} --save_path {self.name}/model`, and give {self.name}/model"
            )
        return repr(self.config.get("model_type"))

    @property
    def _has_weights(self) -> bool:
        """Whether whole weights are there; for a hub, that downloads them."""
        with suppress(FileNotFoundError):
            return weight_file(self._weight_folder).is_file()
        return False

    @contextmanager
    def _blaming(self, name: str) -> Iterator[None]:
        """``weights.blaming`` for a small file, by the name that the user gave."""
        with self._named(), blaming(self.folder / name):
            yield

    def _checked(self, names: Sequence[str]) -> None:
        """Raises ValueError for one of these files that is there and no JSON object. Whatever
        transformers reads goes through this first, as its own errors name no file."""
        for name in names:
            if name.endswith(".json") and self.file(name) is not None:
                with self._named():
                    read_json_file(self.folder, name)

    @cached_property
    def _weight_folder(self) -> Path:
        """The folder, with the weights in it."""
        if self._hub is not None:
            for name in SINGLE:  # transformers' order; no second format is downloaded.
                self._download([*SMALL_FILES, name])
                if self.file(name):
                    break
                if index := self.file(f"{name}.index.json"):
                    self._download([file.name for file in shards(index)])
                    break
        return self.folder

    @cached_property
    def _weight_names(self) -> set[str]:
        names = weight_names(self._weight_folder)
        return set(self.weights) if names is None else names

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Every weight by its name in the files, on the CPU, mapped from disk where the format
        allows."""
        folder = self._weight_folder
        with self._named():
            return read_all(folder)

    def hand_over_weights(self) -> dict[str, Tensor]:
        """``weights``, for the one model that will own their memory: it may be trained in place.
        The next who asks for them gets the files mapped anew."""
        weights = self.weights
        del self.weights
        return weights

    @cached_property
    def tokenizer(self) -> Any:
        """Able to pad. Shared by everybody who asks, who may add tokens to it."""
        self._checked([*TOKENIZERS, *TOKENIZER_PARTS])
        tokenizer = load_tokenizer(self.folder, self.name)
        # Without a limit, a published one is 1e30.
        if type(tokenizer.model_max_length) not in (int, float) or tokenizer.model_max_length < 1:
            raise ValueError(
                f"{self.name}: model_max_length in tokenizer_config.json is"
                f" {tokenizer.model_max_length!r}; it must be a number of at least 1"
            )
        return tokenizer

    @cached_property
    def generation_config(self) -> GenerationConfig | None:
        """None without a generation_config.json."""
        if self.file(GENERATION_CONFIG_NAME) is None:
            return None
        self._checked([GENERATION_CONFIG_NAME])
        with self._blaming(GENERATION_CONFIG_NAME):
            return GenerationConfig.from_pretrained(self.folder)

    @cached_property
    def image_processor(self) -> CLIPImageProcessor:
        """CLIP's image transform; for another author's layout its tower's, or CLIP's standard one
        at the tower's size."""
        borrowed = not self.file(PROCESSOR_FILE) and published.is_published(self.config)
        source = self.tower if borrowed else self
        if source is self or source.file(IMAGE_PROCESSOR_FILE):
            source._checked([IMAGE_PROCESSOR_FILE])
            with source._blaming(IMAGE_PROCESSOR_FILE):
                found = CLIPImageProcessor.from_pretrained(source.folder)
                # What its fields are is only seen in use.
                found(images=np.zeros((2, 2, 3), dtype=np.uint8), input_data_format="channels_last")
            return found
        _, _, size = published.clip_sizes(self.vision)
        return CLIPImageProcessor(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}
        )

    @cached_property
    def tower(self) -> Source:
        """The CLIP that config.json names, or ``vision_tower``. A relative folder is looked for
        beside the checkpoint first."""
        if self.vision_tower:
            return open_tower(self.vision_tower)
        name = published.tower_name(self.config, self.name)
        beside = self.folder / name
        return open_tower(str(beside) if beside.is_dir() else name)

    @cached_property
    def vision(self) -> CLIPVisionConfig:
        """The sizes of the tower."""
        tower = self.tower
        tower._checked(["config.json"])
        with tower._blaming("config.json"):
            vision = CLIPVisionConfig.from_pretrained(tower.folder)
            published.clip_sizes(vision)
        return vision

    @cached_property
    def llava(self) -> LlavaConfig:
        """transformers' config of the LLaVA, or of the one inside a LISA or CoReS."""
        try:
            rows = self.weights["model.embed_tokens.weight"].shape[0]
            image, vision = image_token_id(self.tokenizer), self.vision
            with self._blaming("config.json"):
                return published.llava_config(self.config, vision, rows, image)
        except KeyError as error:
            raise ValueError(f"{self.name}: has no weight {error}") from None
        except ValueError as error:
            raise ValueError(
                str(error) if str(error).startswith(self.name) else f"{self.name}: {error}"
            ) from None

    @cached_property
    def sam_dims(self) -> SamDims:
        """The sizes of the SAM inside a LISA or CoReS."""
        stated = self.config.get("sam")
        if not stated:
            return published.sam_dims(self.weights, self.name)
        with self._blaming("config.json"):
            return SamDims(**stated)

    @property
    def levels(self) -> list[str]:
        """The chain of tokens that a LISA or CoReS answers with."""
        return self.config.get("levels") or published.levels_of_vocabulary(
            self.tokenizer.get_vocab(), self.name
        )

    @property
    def image_marks(self) -> tuple[str, str] | None:
        """The tokens around the image, None where there are none."""
        marked = published.uses_image_marks(self.config, self.tokenizer.get_vocab())
        return published.IMAGE_MARKS if marked else None


def open_source(
    version: str | Path | Source, vision_tower: str | None = None, **arguments: Any
) -> Source:
    """The Source of a folder or hub name, or ``version`` itself if it is one.

    ``vision_tower``: CLIP for a checkpoint that does not hold its own, in place of the one that its
    config.json names. ``arguments``: those of ``from_pretrained``; what the hub needs of them is
    taken. Raises FileNotFoundError for a folder that does not exist and a hub that cannot be asked.
    """
    if isinstance(version, Source):
        if vision_tower and vision_tower != version.vision_tower:
            raise ValueError(f"{version.name}: is open with another tower than {vision_tower}")
        return version
    if looks_like_path(str(version)) and not Path(version).is_dir():
        raise FileNotFoundError(
            f"{version}: no such folder; a model is a folder or a hub name such as owner/name"
        )
    hub = {k: arguments[k] for k in HUB_ARGUMENTS if arguments.get(k) is not None}
    return Source(str(version), vision_tower or None, **hub)


def open_tower(name: str) -> Source:
    """The Source of a CLIP. Raises FileNotFoundError naming the flag that can point at a local
    copy."""
    try:
        tower = open_source(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}; --vision-tower takes a local folder of this CLIP"
        ) from None
    if tower.file("config.json") is None:
        raise FileNotFoundError(
            f"{name}: has no config.json; --vision-tower needs a CLIP folder or hub name"
        )
    return tower


def looks_like_path(source: str) -> bool:
    """Whether ``source`` is no hub name, which is "owner/name"."""
    return Path(source).exists() or source.startswith((".", "/", "~")) or source.count("/") != 1


def load_tokenizer(folder: str | Path, name: str | None = None) -> Any:
    """The tokenizer of a folder, able to pad. ``name``: for the ValueError where there is none that
    can be read."""
    if Path(folder).is_dir() and not any((Path(folder) / file).is_file() for file in TOKENIZERS):
        raise ValueError(
            f"{name or folder}: has no tokenizer ({', '.join(TOKENIZERS[:2])}); copy its files from"
            " the model that this one was trained from"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except MemoryError:
        raise
    except Exception as error:  # The Rust part raises Exception itself.
        _blame_config(Path(folder))
        reason = " ".join(str(error).split())
        raise ValueError(f"{name or folder}: has no tokenizer that can be read: {reason}") from None
    # Masks come from lengths, so padding may share its id with a real token.
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def _blame_config(folder: Path) -> None:
    """Raises ValueError where a config.json is why transformers could not read the tokenizer beside
    it: it reads the one to know the class of the other."""
    file = folder / "config.json"
    if (
        file.is_file()
        and str(read_json_file(folder, file.name).get("model_type")) in CONFIG_MAPPING
    ):
        with blaming(file):
            AutoConfig.from_pretrained(folder)


def image_token_id(tokenizer) -> int:
    """The id of "<image>", or the one that it will get."""
    known = tokenizer.get_vocab()
    return known.get(IMAGE_TOKEN, len(tokenizer))
