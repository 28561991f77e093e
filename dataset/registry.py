"""The one list of data sets: what each is called, which files it has and how it is opened. The
command line and dataset/check.py use it.

A new data set is one ``DatasetEntry``. Sets that users add by putting files into place (folders
under reason_seg and own, splits of COCO, files of LLaVA) are found by ``entries``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cores.dataset.files.errors import DataError
from cores.dataset.files.paths import is_leftover, list_files, list_folders
from cores.dataset.readers.coco import CocoInstances
from cores.dataset.readers.llm_seg40k import NAME as LLM_SEG40K
from cores.dataset.readers.llm_seg40k import LlmSeg40K
from cores.dataset.readers.own.dataset import EVERYTHING, OwnData
from cores.dataset.readers.own.dataset import FOLDER as OWN
from cores.dataset.readers.own.layouts import OwnFolder, own_names
from cores.dataset.readers.parts import PART_SOURCES, PartSegmentation
from cores.dataset.readers.reasoning import ReasoningSegmentation
from cores.dataset.readers.referring import SETS, ReferringSegmentation
from cores.dataset.readers.semantic import LABEL_MAPS, SemanticSegmentation
from cores.dataset.readers.vqa import VisualQuestionAnswering
from cores.dataset.sample import LoaderOptions, Sample


class Loader(Protocol):
    """A map-style source of samples."""

    dataset: str
    """Data set and split as in messages and skip lists: "ReasonSeg|train"."""

    def __len__(self) -> int: ...

    def path(self, index: int) -> Path:
        """The image of sample ``index``."""

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Sample ``index``, a pure function of it and of what ``rng`` draws. Raises DataError."""


Opener = Callable[[Path, str, LoaderOptions], Loader]
"""(data folder, name or split, options) -> loader."""


@dataclass(frozen=True)
class DatasetEntry:
    """A data set. In its file names, {split} stands for what ``splits`` has for a split; a folder
    ends with "/"."""

    name: str
    """Before the "|" of --val_dataset: "refcoco"."""
    family: str
    """Its name in --dataset: "refer_seg"."""
    splits: Mapping[str, str]
    """Behind the "|" of --val_dataset -> in the file names."""
    files: tuple[str, ...]
    """The files that belong to it alone, below the data folder, with their official names."""
    open: Opener
    shared: tuple[str, ...] = ()
    """Files and folders that other data sets have, too, such as COCO's photos."""
    source: str = ""
    """The release that the files come with."""
    alternatives: Mapping[str, str] = field(default_factory=dict)
    """A folder -> another one that may be there instead."""

    def missing(self, root: Path, split: str) -> list[str]:
        """The files of a split that are not there; a folder must hold something."""
        names = (*self.files, *self.shared)
        return [self._named(name, split) for name in names if not self._exists(root, name, split)]

    def is_there(self, root: Path, split: str) -> bool:
        """Whether any file is there that belongs to this split and to no other data set."""
        names = [name for name in self.files if "{split}" in name] or self.files
        return any(self._exists(root, name, split) for name in names)

    def _named(self, name: str, split: str) -> str:
        return name.format(split=self.splits[split])

    def _exists(self, root: Path, name: str, split: str) -> bool:
        for choice in (name, self.alternatives.get(name, name)):
            path = root / self._named(choice, split)
            if name.endswith("/"):
                if path.is_dir() and not all(is_leftover(entry.name) for entry in path.iterdir()):
                    return True
            elif path.is_file():
                return True
        return False


def semantic_loader(
    root: Path, name: str, options: LoaderOptions, split: str | None = None
) -> Loader:
    """The loader of a semantic set, from label maps or from parts; ``split`` defaults to its
    training split."""
    if name in LABEL_MAPS:
        return SemanticSegmentation(root, name, options, split)
    if name in PART_SOURCES:
        return PartSegmentation(root, name, options, split)
    known = ", ".join((*LABEL_MAPS, *PART_SOURCES))
    raise ValueError(f"unknown semantic data set {name!r}; known: {known}")


def reasoning_loader(root: Path, spec: str, options: LoaderOptions) -> Loader:
    """The loader of "name|split" for a folder under reason_seg."""
    is_llm_seg = spec.split("|")[0] == LLM_SEG40K
    return (LlmSeg40K if is_llm_seg else ReasoningSegmentation)(root, spec, options)


def _opener(loader: Opener, name: str) -> Opener:
    """Opens the splits of a data set by a ``loader`` of "name|split"."""
    return lambda root, split, options: loader(root, f"{name}|{split}", options)


def _same(*splits: str) -> dict[str, str]:
    """Splits whose names in the file names are those of the command line."""
    return {split: split for split in splits}


def _semantic(
    name: str, splits: tuple[str, ...], files: tuple[str, ...], source: str, **more: Any
) -> DatasetEntry:
    def open_split(root: Path, split: str, options: LoaderOptions) -> Loader:
        return semantic_loader(root, name, options, split)

    return DatasetEntry(name, "sem_seg", _same(*splits), files, open_split, source=source, **more)


def _referring(
    name: str, source: str = "REFER (Licheng Yu); COCO 2014", **splits: tuple[str, ...]
) -> DatasetEntry:
    """A referring set; ``splits``: who divided it -> the splits."""
    references = "grefs({split}).json" if name == "grefcoco" else "refs({split}).p"
    return DatasetEntry(
        name,
        "refer_seg",
        {f"{by}|{split}": by for by, names in splits.items() for split in names},
        (f"refer_seg/{name}/{references}", f"refer_seg/{name}/instances.json"),
        _opener(ReferringSegmentation, name),
        shared=(f"refer_seg/{SETS[name].images}/",),
        source=source,
    )


UNC = ("train", "val", "testA", "testB")
OFFICIAL: tuple[DatasetEntry, ...] = (
    _semantic(
        "ade20k",
        ("training", "validation"),
        ("ade20k/images/{split}/", "ade20k/annotations/{split}/"),
        "MIT Scene Parsing (ADEChallengeData2016)",
    ),
    _semantic(
        "cocostuff",
        ("train2017", "val2017"),
        ("cocostuff/{split}/",),
        'COCO-Stuff, "stuffthingmaps"; COCO 2017',
        shared=("coco/{split}/",),
    ),
    _semantic(
        "mapillary",
        ("training", "validation"),
        (
            "mapillary/{split}/images/",
            "mapillary/{split}/v2.0/labels/",
            "mapillary/config_v2.0.json",
        ),
        "Mapillary Vistas 2.0",
    ),
    _semantic(
        "paco_lvis",
        ("train", "val"),
        ("vlpart/paco/annotations/paco_lvis_v1_{split}.json",),
        "PACO; COCO 2017",
        shared=("coco/",),
    ),
    _semantic(
        "pascal_part",
        ("train", "val"),
        ("vlpart/pascal_part/{split}.json", "vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages/"),
        "PASCAL VOC 2010 and PASCAL-Part, JSON by VLPart's script",
    ),
    _semantic(
        "partimagenet",
        ("train", "val"),
        ("vlpart/partimagenet/{split}.json", "vlpart/partimagenet/images/"),
        "PartImageNet, JSON by VLPart's script",
        alternatives={"vlpart/partimagenet/images/": "vlpart/partimagenet/{split}/"},
    ),
    _semantic(
        "synthreason",
        ("train", "val"),
        ("synth_sem/images/{split}/", "synth_sem/annotations/{split}/", "synth_sem/classes.json"),
        "python -m dataset.synthetic",
    ),
    DatasetEntry(
        "coco",
        "coco",
        _same("train2017", "val2017"),
        ("coco/annotations/instances_{split}.json",),
        CocoInstances,
        shared=("coco/{split}/",),
        source="COCO 2017",
    ),
    _referring(
        "refclef",
        "REFER (Licheng Yu); SAIAPR TC-12",
        unc=(*UNC, "testC"),
        berkeley=("train", "val", "test"),
    ),
    _referring("refcoco", unc=UNC, google=("train", "val", "test")),
    _referring("refcoco+", unc=UNC),
    _referring("refcocog", umd=("train", "val", "test"), google=("train", "val")),
    _referring("grefcoco", "gRefCOCO (GRES); COCO 2014", unc=UNC),
    DatasetEntry(
        LLM_SEG40K,
        "reason_seg",
        {"train": "train", "val": "validation", "test": "test"},
        (f"reason_seg/{LLM_SEG40K}/{{split}}.json",),
        _opener(LlmSeg40K, LLM_SEG40K),
        shared=("coco/train2017/", "ego_objects/images/"),
        source="LLM-Seg; COCO 2017; EgoObjects",
    ),
    DatasetEntry(
        "ReasonSeg",
        "reason_seg",
        _same("train", "val", "test"),
        ("reason_seg/ReasonSeg/{split}/",),
        _opener(ReasoningSegmentation, "ReasonSeg"),
        source="LISA",
    ),
    DatasetEntry(
        "vqa",
        "vqa",
        _same("llava_instruct_150k"),
        ("llava_dataset/{split}.json",),
        VisualQuestionAnswering,
        shared=("coco/train2017/",),
        source="LLaVA-Instruct-150K",
    ),
)
# How the names in --<family>_data are read: "ade20k", "ReasonSeg|train", "train2017".
TRAINING: dict[str, Opener] = {
    "sem_seg": semantic_loader,
    "refer_seg": ReferringSegmentation,
    "coco": CocoInstances,
    "reason_seg": reasoning_loader,
    "vqa": VisualQuestionAnswering,
    OWN: OwnData,
}


def entries(root: str | Path, follow_links: bool = False) -> list[DatasetEntry]:
    """The official data sets, then those of the user's own that are found under ``root``."""
    root = Path(root)
    coco, own = _coco_files(root, follow_links), _own_sets(root, follow_links)
    return [*OFFICIAL, *_reasoning_sets(root), *coco, *own]


def _folders(path: Path) -> list[str]:
    return [folder.name for folder in list_folders(path)]


def _reasoning_sets(root: Path) -> Iterator[DatasetEntry]:
    """Folders in ReasonSeg's layout."""
    base = root / "reason_seg"
    for name in sorted(set(_folders(base)) - {entry.name for entry in OFFICIAL}):
        splits = _same(*(split for split in _folders(base / name) if split != "explanatory"))
        files = (f"reason_seg/{name}/{{split}}/",)
        yield DatasetEntry(name, "reason_seg", splits, files, _opener(reasoning_loader, name))


def _coco_files(root: Path, follow_links: bool) -> Iterator[DatasetEntry]:
    """Splits that the user has put into COCO's and LLaVA's folders."""
    official = {entry.name: entry for entry in OFFICIAL}
    known = {*official["coco"].splits, *official["vqa"].splits}
    for entry in (official["coco"], official["vqa"]):
        place = root / entry.files[0]
        prefix = place.name.split("{")[0]
        is_there = place.parent.is_dir()
        files = list_files(place.parent, (".json",), follow_links) if is_there else []
        names = [path.stem for path in files if path.name.startswith(prefix)]
        splits = _same(*(s for name in names if (s := name.removeprefix(prefix)) not in known))
        if splits:
            yield replace(entry, splits=splits, source="")


def _own_sets(root: Path, follow_links: bool) -> Iterator[DatasetEntry]:
    for name in own_names(root / OWN, follow_links):
        splits, place = [EVERYTHING], root / OWN / name
        try:
            sources = OwnFolder(root / OWN, name, follow_links).sources()
        except DataError:
            # Opening the set raises this error again, where it does not hide the other sets.
            sources = {"": place}
        if "" in sources:
            place = sources[""]
        else:
            splits = list(sources)
        end = "" if place.is_file() else "/"
        files = (place.relative_to(root).as_posix() + end,)
        yield DatasetEntry(f"{OWN}:{name}", OWN, _same(*splits), files, _opener(OwnData, name))


def open_training(
    family: str, dataset_dir: str | Path, name: str, options: LoaderOptions
) -> Loader:
    """The loader of one name in --<family>_data. Raises ValueError, which lists the known names, or
    DataError about its files."""
    if family not in TRAINING:
        raise ValueError(f"unknown data set {family!r}; known: {', '.join(TRAINING)}")
    return TRAINING[family](Path(dataset_dir), name, options)


def open_evaluation(dataset_dir: str | Path, name: str, options: LoaderOptions) -> Loader:
    """The loader of --val_dataset. Raises ValueError for a name without split, or DataError about
    its files."""
    root = Path(dataset_dir)
    dataset, _, split = name.partition("|")
    if "||" in name:
        raise ValueError(
            f"--val_dataset {name!r}: one evaluation set at a time; run the command once for each"
        )
    if not split:
        raise ValueError(
            f'--val_dataset {name!r} names no split; write it as "ReasonSeg|val", "coco|val2017" or'
            ' "own:parts|val"'
        )
    if dataset.startswith(f"{OWN}:"):
        return OwnData(root, name.removeprefix(f"{OWN}:"), options)
    known = {entry.name: entry for entry in OFFICIAL}
    elsewhere = dataset in known or (root / "reason_seg" / dataset).exists()
    if not elsewhere and dataset in own_names(root / OWN, options.follow_links):
        raise ValueError(f'--val_dataset {name!r}: is a set of your own; write "{OWN}:{name}"')
    opener = known[dataset].open if dataset in known else _opener(reasoning_loader, dataset)
    return opener(root, split, options)
