"""The one list of data sets: what each is called, which files it has, how it is opened. The command
line and the check read it.

A new data set is one ``Entry``. Sets that a user names (folders under reason_seg and own, splits of
COCO, files of LLaVA) are found on the disk by ``entries``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from dataset.files.errors import DataError
from dataset.files.paths import list_files
from dataset.readers.coco import CocoInstances
from dataset.readers.llm_seg40k import NAME as LLM_SEG40K
from dataset.readers.llm_seg40k import LlmSeg40K
from dataset.readers.own.dataset import EVERYTHING, OwnData, find_sources, own_names
from dataset.readers.own.dataset import FOLDER as OWN
from dataset.readers.parts import SOURCES, PartSegmentation
from dataset.readers.reasoning import ReasoningSegmentation
from dataset.readers.referring import SETS, ReferringSegmentation
from dataset.readers.semantic import LABEL_MAPS, SemanticSegmentation
from dataset.readers.vqa import VisualQuestionAnswering
from dataset.sample import LoaderOptions, Sample


class Loader(Protocol):
    """A map-style source of samples."""

    dataset: str

    def __len__(self) -> int: ...

    def path(self, index: int) -> Path:
        """The image of sample ``index``."""

    def sample(self, index: int, rng: np.random.Generator) -> Sample: ...


Opener = Callable[[Path, str, LoaderOptions], Loader]  # (data folder, split, options)


@dataclass(frozen=True)
class Entry:
    """A data set."""

    name: str
    """Before the "|" of --val_dataset: "refcoco"."""
    family: str
    """Its name in --dataset: "refer_seg"."""
    splits: Mapping[str, str]
    """What stands behind the "|" -> what {split} stands for in the file names."""
    files: tuple[str, ...]
    """What belongs to it alone, below the data folder, with the official names; a folder ends with
    "/"."""
    open: Opener
    shared: tuple[str, ...] = ()
    """Files and folders that other data sets have, too: COCO's photos."""
    source: str = ""
    """The release that the files come with."""
    alternatives: Mapping[str, str] = field(default_factory=dict)
    """A folder -> another one that may be there instead."""

    def expected(self, split: str, shared: bool = True) -> list[str]:
        """The files of a split, below the data folder."""
        return [
            name.format(split=self.splits[split])
            for name in (*self.files, *(self.shared if shared else ()))
        ]

    def missing(self, root: Path, split: str) -> list[str]:
        """Those that are not there; a folder must hold something."""
        return [name for name in self.expected(split) if not self._is_there(root, name, split)]

    def is_there(self, root: Path, split: str) -> bool:
        """Whether any file that belongs to this split, and to no other data set, is there."""
        names = [name for name in self.files if "{split}" in name] or self.files
        return any(
            self._is_there(root, name.format(split=self.splits[split]), split) for name in names
        )

    def _is_there(self, root: Path, name: str, split: str) -> bool:
        other = {
            k.format(split=self.splits[split]): v.format(split=self.splits[split])
            for k, v in self.alternatives.items()
        }
        return _exists(root, name) or (name in other and _exists(root, other[name]))


def _exists(root: Path, name: str) -> bool:
    path = root / name
    return path.is_dir() and any(path.iterdir()) if name.endswith("/") else path.is_file()


def _same(*splits: str) -> dict[str, str]:
    return {split: split for split in splits}


def semantic_loader(
    root: Path, name: str, options: LoaderOptions, split: str | None = None
) -> Loader:
    """The loader of a semantic set, from label maps or from parts; ``split`` defaults to its
    training split."""
    known = dict.fromkeys(LABEL_MAPS, SemanticSegmentation) | dict.fromkeys(SOURCES, PartSegmentation)
    if name not in known:
        raise ValueError(f"unknown semantic data set {name!r}; known: {', '.join(known)}")
    return known[name](root, name, options, split)


def reasoning_loader(root: Path, spec: str, options: LoaderOptions) -> Loader:
    """The loader of "name|split" for a folder under reason_seg."""
    return (LlmSeg40K if spec.split("|")[0] == LLM_SEG40K else ReasoningSegmentation)(
        root, spec, options
    )


def _semantic(name: str) -> Opener:
    return lambda root, split, options: semantic_loader(root, name, options, split)


def _reasoning(name: str) -> Opener:
    return lambda root, split, options: reasoning_loader(root, f"{name}|{split}", options)


def _referring(name: str) -> Opener:
    return lambda root, split, options: ReferringSegmentation(root, f"{name}|{split}", options)


def _own(name: str) -> Opener:
    return lambda root, split, options: OwnData(root, f"{name}|{split}", options)


def _refer(name: str, **splits: tuple[str, ...]) -> Entry:
    """A referring set; ``splits``: who divided it -> the splits."""
    divided = {f"{by}|{split}": by for by, names in splits.items() for split in names}
    references = "grefs({split}).json" if name == "grefcoco" else "refs({split}).p"
    files = (f"refer_seg/{name}/{references}", f"refer_seg/{name}/instances.json")
    shared = (f"refer_seg/{SETS[name].images}/",)
    source = {
        "grefcoco": "gRefCOCO (GRES); COCO 2014",
        "refclef": "REFER (Licheng Yu); SAIAPR TC-12",
    }
    return Entry(
        name,
        "refer_seg",
        divided,
        files,
        _referring(name),
        shared,
        source.get(name, "REFER (Licheng Yu); COCO 2014"),
    )


OFFICIAL: tuple[Entry, ...] = (
    Entry(
        "ade20k",
        "sem_seg",
        _same("training", "validation"),
        ("ade20k/images/{split}/", "ade20k/annotations/{split}/"),
        _semantic("ade20k"),
        source="MIT Scene Parsing (ADEChallengeData2016)",
    ),
    Entry(
        "cocostuff",
        "sem_seg",
        _same("train2017", "val2017"),
        ("cocostuff/{split}/",),
        _semantic("cocostuff"),
        shared=("coco/{split}/",),
        source='COCO-Stuff, "stuffthingmaps"; COCO 2017',
    ),
    Entry(
        "mapillary",
        "sem_seg",
        _same("training", "validation"),
        (
            "mapillary/{split}/images/",
            "mapillary/{split}/v2.0/labels/",
            "mapillary/config_v2.0.json",
        ),
        _semantic("mapillary"),
        source="Mapillary Vistas 2.0",
    ),
    Entry(
        "paco_lvis",
        "sem_seg",
        _same("train", "val"),
        ("vlpart/paco/annotations/paco_lvis_v1_{split}.json",),
        _semantic("paco_lvis"),
        shared=("coco/",),
        source="PACO; COCO 2017",
    ),
    Entry(
        "pascal_part",
        "sem_seg",
        _same("train", "val"),
        ("vlpart/pascal_part/{split}.json", "vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages/"),
        _semantic("pascal_part"),
        source="PASCAL VOC 2010 and PASCAL-Part, JSON by VLPart's script",
    ),
    Entry(
        "partimagenet",
        "sem_seg",
        _same("train", "val"),
        ("vlpart/partimagenet/{split}.json", "vlpart/partimagenet/images/"),
        _semantic("partimagenet"),
        source="PartImageNet, JSON by VLPart's script",
        alternatives={"vlpart/partimagenet/images/": "vlpart/partimagenet/{split}/"},
    ),
    Entry(
        "synthreason",
        "sem_seg",
        _same("train", "val"),
        ("synth_sem/images/{split}/", "synth_sem/annotations/{split}/", "synth_sem/classes.json"),
        _semantic("synthreason"),
        source="python -m dataset.synthetic",
    ),
    Entry(
        "coco",
        "coco",
        _same("train2017", "val2017"),
        ("coco/annotations/instances_{split}.json",),
        CocoInstances,
        shared=("coco/{split}/",),
        source="COCO 2017",
    ),
    _refer(
        "refclef",
        unc=("train", "val", "testA", "testB", "testC"),
        berkeley=("train", "val", "test"),
    ),
    _refer("refcoco", unc=("train", "val", "testA", "testB"), google=("train", "val", "test")),
    _refer("refcoco+", unc=("train", "val", "testA", "testB")),
    _refer("refcocog", umd=("train", "val", "test"), google=("train", "val")),
    _refer("grefcoco", unc=("train", "val", "testA", "testB")),
    Entry(
        LLM_SEG40K,
        "reason_seg",
        {"train": "train", "val": "validation", "test": "test"},
        (f"reason_seg/{LLM_SEG40K}/{{split}}.json",),
        _reasoning(LLM_SEG40K),
        shared=("coco/train2017/", "ego_objects/images/"),
        source="LLM-Seg; COCO 2017; EgoObjects",
    ),
    Entry(
        "ReasonSeg",
        "reason_seg",
        _same("train", "val", "test"),
        ("reason_seg/ReasonSeg/{split}/",),
        _reasoning("ReasonSeg"),
        source="LISA",
    ),
    Entry(
        "vqa",
        "vqa",
        _same("llava_instruct_150k"),
        ("llava_dataset/{split}.json",),
        VisualQuestionAnswering,
        shared=("coco/train2017/",),
        source="LLaVA-Instruct-150K",
    ),
)
# How --<family>_data is read: "ade20k", "ReasonSeg|train", "train2017".
TRAINING: dict[str, Callable[[Path, str, LoaderOptions], Loader]] = {
    "sem_seg": semantic_loader,
    "refer_seg": ReferringSegmentation,
    "coco": CocoInstances,
    "reason_seg": reasoning_loader,
    "vqa": VisualQuestionAnswering,
    OWN: OwnData,
}


def entries(root: str | Path) -> list[Entry]:
    """The official data sets, then those that are found under ``root`` only."""
    root = Path(root)
    return [*OFFICIAL, *_reasoning_sets(root), *_coco_files(root), *_own_sets(root)]


def _folders(path: Path) -> list[str]:
    return (
        sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
        if path.is_dir()
        else []
    )


def _reasoning_sets(root: Path) -> list[Entry]:
    base = root / "reason_seg"
    found = []
    for name in sorted(set(_folders(base)) - {entry.name for entry in OFFICIAL}):
        splits = [split for split in _folders(base / name) if split != "explanatory"]
        found.append(
            Entry(
                name,
                "reason_seg",
                _same(*splits),
                (f"reason_seg/{name}/{{split}}/",),
                _reasoning(name),
            )
        )
    return found


def _coco_files(root: Path) -> list[Entry]:
    """Splits that the user has put under COCO's and LLaVA's folders."""
    known = {split for entry in OFFICIAL if entry.name in ("coco", "vqa") for split in entry.splits}
    found = []
    for kind, pattern in (
        ("coco", "coco/annotations/instances_{split}.json"),
        ("vqa", "llava_dataset/{split}.json"),
    ):
        official = next(entry for entry in OFFICIAL if entry.name == kind)
        place = Path(pattern)
        prefix = place.name.split("{")[0]
        files = (
            list_files(root / place.parent, (".json",)) if (root / place.parent).is_dir() else []
        )
        splits = [path.stem[len(prefix) :] for path in files if path.name.startswith(prefix)]
        splits = [split for split in splits if split not in known]
        if splits:
            found.append(
                Entry(kind, kind, _same(*splits), (pattern,), official.open, official.shared)
            )
    return found


def _own_sets(root: Path) -> list[Entry]:
    found = []
    for name in own_names(root / OWN):
        try:
            sources = find_sources(root / OWN, name)
        except DataError:  # opening it says the same again, where one set does not hide the others
            found.append(
                Entry(f"{OWN}:{name}", OWN, _same(EVERYTHING), (f"{OWN}/{name}/",), _own(name))
            )
            continue
        splits = [EVERYTHING] if "" in sources else list(sources)
        place = (
            next(iter(sources.values())).relative_to(root).as_posix()
            if "" in sources
            else f"{OWN}/{name}/"
        )
        files = (place + "/" if (root / place).is_dir() and not place.endswith("/") else place,)
        found.append(Entry(f"{OWN}:{name}", OWN, _same(*splits), files, _own(name)))
    return found


def open_training(
    family: str, dataset_dir: str | Path, name: str, options: LoaderOptions
) -> Loader:
    """The loader of one name of --<family>_data. Raises ValueError that lists the known families,
    DataError for its files."""
    if family not in TRAINING:
        raise ValueError(f"unknown data set {family!r}; known: {', '.join(TRAINING)}")
    return TRAINING[family](Path(dataset_dir), name, options)


def open_evaluation(dataset_dir: str | Path, name: str, options: LoaderOptions) -> Loader:
    """The loader of --val_dataset. Raises ValueError for a name without split, DataError for its
    files."""
    root = Path(dataset_dir)
    dataset, _, split = name.partition("|")
    if not split:
        raise ValueError(
            f'--val_dataset {name!r} names no split; write it as "ReasonSeg|val", "coco|val2017" or'
            ' "own:parts|val"'
        )
    if dataset.startswith(f"{OWN}:"):
        return OwnData(root, name.removeprefix(f"{OWN}:"), options)
    known = {entry.name: entry for entry in OFFICIAL}
    opener = known[dataset].open if dataset in known else _reasoning(dataset)
    return opener(root, split, options)
