"""How annotation tools lay out what they export, below ``own/<name>``: which file holds which
split, and in which folders its photos may be.

==============================  ==================================================================
CVAT, Datumaro                  annotations/instances_<subset>.json, images/<subset>/
Roboflow                        <split>/_annotations.coco.json beside the photos
Label Studio                    result.json, images/
FiftyOne                        labels.json, data/; with several splits, in a folder each
Supervisely                     <data set>/ann/*.json, <data set>/img/
labelme, AnyLabeling            <split>/*.json beside the photos
==============================  ==================================================================
"""

from __future__ import annotations

import re
from pathlib import Path

from cores.dataset.files.errors import DataError, MissingDataError
from cores.dataset.files.lookup import Lookup
from cores.dataset.files.paths import list_files, list_folders, named_inside
from cores.dataset.files.text import read_json
from cores.dataset.readers.own.arrow import PARQUET, first_pieces, is_saved, saved_sources, stem_of
from cores.dataset.readers.own.dialects import advice, is_one_set

TABLES = (".jsonl", ".csv", PARQUET)
# A single file of one of these names is that split and not everything.
SPLITS = ("train", "val", "test")
# They lie among the data of Supervisely.
SETTINGS_OF_TOOLS = ("meta.json", "obj_class_to_machine_color.json")
_SYNONYMS = {"valid": "val", "validation": "val", "dev": "val", "training": "train"}
_SYNONYMS |= {"testing": "test"}
_PREFIX = re.compile(r"(?:instances|annotations|labels)_(?=.)")
PHOTO_FOLDERS = ("images", "data", "img", "imgs", "image", "photos", "frames", "JPEGImages")


def split_of(name: str) -> str:
    """The split that a file or folder of that name is: "val" for "valid" and for
    "instances_validation"."""
    plain = _PREFIX.sub("", name)
    return _SYNONYMS.get(plain.lower(), plain)


class OwnFolder:
    """The data set ``name`` under ``root``."""

    def __init__(self, root: Path, name: str, follow_links: bool = False):
        self.root, self.name, self.follow_links = root, name, follow_links
        self.folder = named_inside(root, name)

    def _list(self, folder: Path, *suffixes: str) -> list[Path]:
        found = list_files(folder, suffixes or (".json", *TABLES), self.follow_links)
        return [path for path in found if path.name.lower() not in SETTINGS_OF_TOOLS]

    def _file_of(self, folder: Path, stem: str) -> Path | None:
        """The file that holds the data or the split ``stem``, if there is one. Raises DataError
        for several."""
        paths = [folder / f"{stem}{suffix}" for suffix in (".json", *TABLES)]
        found = [path for path in paths if path.is_file()] + first_pieces(folder, stem)
        if len(found) > 1:
            raise DataError(
                f"{folder}: has {' and '.join(path.name for path in found)}; keep the one that is"
                " to be used"
            )
        return found[0] if found else None

    def _is_per_image(self, folder: Path) -> bool:
        """Whether a folder holds JSONs of one image each. Only the first one is read; a broken
        JSON counts as one."""
        first = next(iter(self._list(folder, ".json")), None)
        if first is None:
            return False
        try:
            return not is_one_set(read_json(first))
        except DataError:
            return True

    def _in_split(self, folder: Path) -> Path | None:
        """What holds the data of a split's own ``folder``: its ann/ of Supervisely, or the only
        file in it or in its annotations/ that holds several images."""
        for place in (folder, folder / "ann", folder / "annotations"):
            files = self._list(place, ".json") if place.is_dir() else []
            if files and self._is_per_image(place):
                return place
            if len(files) > 1:
                raise DataError(
                    f"{place}: has {' and '.join(path.name for path in files)}; keep the one that"
                    " is to be used"
                )
            if files:
                return files[0]
        return None

    def sources(self) -> dict[str, Path]:
        """split -> file or folder. The split is "" if all data are in one place, whose rows or
        images may name their splits.

        Raises DataError that says what is expected, and MissingDataError that lists the data sets
        that are there.
        """
        single = self._file_of(self.root, self.name) if self.root.is_dir() else None
        if single is not None:
            return {"": single}
        if not self.folder.is_dir():
            known = ", ".join(own_names(self.root, self.follow_links)) or "none"
            raise MissingDataError(f"{self.folder}: no such data set; {self.root} holds: {known}")
        if saved := saved_sources(self.folder, self.follow_links):
            return saved
        if self._is_per_image(self.folder):
            return {"": self.folder}
        found: dict[str, Path] = {}
        for place in (self.folder, self.folder / "annotations", self.folder / "Annotations"):
            if found or not place.is_dir():
                continue
            if place != self.folder and self._is_per_image(place):
                return {"": place}
            paths = self._list(place)
            instances = [path for path in paths if path.stem.startswith("instances_")]
            for stem in sorted(set(map(stem_of, instances or paths))):
                if file := self._file_of(place, stem):
                    found[stem] = file
        has_files = bool(found)
        for path in list_folders(self.folder):
            if path.name in found or path.name.lower() == "annotations":
                continue
            if is_saved(path) or self._is_per_image(path):
                found[path.name] = path
            elif not has_files and (source := self._in_split(path)):
                found[path.name] = source
        if not found:
            raise DataError(
                f"{self.folder}: holds no data; it needs train.json (COCO), train.jsonl, .csv or"
                f" .parquet, or train/ with labelme JSONs{advice(self.folder)}"
            )
        named = {split_of(stem): path for stem, path in found.items()}
        if len(named) < len(found):  # "val" and "valid" stay apart.
            named = found
        is_everything = len(named) == 1 and not named.keys() & set(SPLITS)
        return {"": next(iter(named.values()))} if is_everything else named

    def photos(self, source: Path, split: str) -> Lookup:
        """The photos of a source, the nearest places first."""
        return self._lookup(source, split, PHOTO_FOLDERS, any_ending=True)

    def masks(self, source: Path) -> Lookup:
        """The PNGs that a table names."""
        return self._lookup(source, "", ("masks",), any_ending=False)

    def _lookup(
        self, source: Path, split: str, folders: tuple[str, ...], any_ending: bool
    ) -> Lookup:
        beside = [source if source.is_dir() else source.parent]
        if is_saved(source) or source.name == "ann":
            beside.append(source.parent)
        while beside[-1] != self.folder and beside[-1].is_relative_to(self.folder):
            beside.append(beside[-1].parent)
        stem = stem_of(source)
        names = (stem, _PREFIX.sub("", stem), split, *_spellings(split))
        inner = [name for name in dict.fromkeys(names) if name] if any_ending else []
        places: list[Path] = []
        for here in beside:
            near = [here, here / folders[0], *(here / name for name in inner[:1])]
            places += near if here == beside[0] else []
            for name in inner:
                places += [here / folder / name for folder in folders] + [here / name]
                places += [here / name / folder for folder in folders]
            places += [here, *(here / folder for folder in folders)]
        found = [place for place in dict.fromkeys(places) if place.is_dir()]
        return Lookup(found, self.follow_links, any_ending, by_base=source.is_dir())


def _spellings(split: str) -> list[str]:
    return [name for name, meant in _SYNONYMS.items() if meant == split]


def own_names(root: Path, follow_links: bool = False) -> list[str]:
    """The names of the data sets under ``root``."""
    if not root.is_dir():
        return []
    files = {stem_of(path) for path in list_files(root, (".json", *TABLES), follow_links)}
    return sorted(files | {path.name for path in list_folders(root)} - {"images", "masks"})
