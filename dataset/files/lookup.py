"""From the name of a photo, as a file of annotations gives it, to the file that is meant.

Tools write names in many ways: with the backslashes of Windows, with folders in front that the
place of the photos repeats, as a URL or an absolute path of the machine that wrote them, with
letters composed in another way or in another case than the disk has. What is found is the file that
the name means beyond doubt. Where two could be meant, or none, an error says so.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from cores.dataset.files.errors import DataError, MissingDataError
from cores.dataset.files.images import IMAGE_SUFFIXES
from cores.dataset.files.paths import is_leftover, resolve_inside

# Photos of cameras and tools in formats that are not read.
UNREAD = (".heic", ".heif", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw", ".jxl", ".psd", ".svg")


class PhotoName(NamedTuple):
    """A name taken apart."""

    parts: tuple[str, ...]
    """Folders and file name."""
    is_foreign: bool
    """Whether it names a place outside of the data: a URL, an absolute path, or one with '..'."""


def parse_name(name: str) -> PhotoName:
    """The parts of a name that any system or tool has written; none for a name without any."""
    text, is_foreign = name.strip(), False
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text) or "/?d=" in text:
        url, is_foreign = urlsplit(text), True
        # Label Studio serves the files of a folder as /data/local-files/?d=<path>.
        text = (parse_qs(url.query).get("d") or [unquote(url.path)])[0]
    text = text.replace("\\", "/")
    if drive := re.match(r"[A-Za-z]:", text):
        text, is_foreign = text[drive.end() :], True
    parts = tuple(part for part in text.split("/") if part not in ("", "."))
    is_foreign |= text.startswith("/") or ".." in parts
    return PhotoName(
        parts[len(parts) - parts[::-1].index("..") :] if ".." in parts else parts, is_foreign
    )


def photo_name(entry: dict) -> str | None:
    """The name of the photo of an entry in the format of COCO, LVIS (which has URLs only) or
    EgoObjects; None where it has none."""
    for field in ("file_name", "coco_url", "url"):
        if isinstance(name := entry.get(field), str) and name.strip():
            return name
    return None


def base_name(name: str) -> str:
    """The last part of a name, "" for a name without any."""
    parts = parse_name(name).parts
    return parts[-1] if parts else ""


def _key(name: str) -> str:
    """The same for all spellings that one file may have on another system."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _stem(name: str) -> str:
    stem, dot, ending = name.rpartition(".")
    return stem if dot and f".{ending.lower()}" in (*IMAGE_SUFFIXES, *UNREAD) else name


def _rank(name: str) -> int:
    return IMAGE_SUFFIXES.index(Path(name).suffix.lower())


class Lookup:
    """Finds the files that names mean in the folders ``places``, of which earlier ones count
    first."""

    def __init__(
        self,
        places: Sequence[Path],
        follow_links: bool = False,
        any_ending: bool = True,
        by_base: bool = False,
    ):
        """``follow_links``: see ``resolve_inside``. ``any_ending``: a photo may have another ending
        than its name says. ``by_base``: folders in names count only where they are there."""
        self.places, self.follow_links = list(places), follow_links
        self.any_ending, self.by_base = any_ending, by_base
        self._listings: dict[Path, dict[str, list[str]]] = {}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_listings": {}}  # A worker lists what it needs.

    def find(self, name: str) -> Path:
        """The file that ``name`` means. Raises DataError, which is MissingDataError where no file
        fits."""
        parsed = parse_name(name)
        tries = [(place, name) for place in self.places if not parsed.is_foreign]
        tries += [(place, "/".join(parts)) for place, parts in self._tries(parsed)]
        refused = None
        for place, spelled in dict.fromkeys(tries):
            try:
                path = resolve_inside(place, spelled, self.follow_links)
            except DataError as error:  # such as a link; another place may have the file itself
                refused = refused or error
            else:
                if path.is_file():
                    return path
        if refused is not None:
            raise refused
        for other_ending in (False, True)[: 1 + self.any_ending]:
            for place, parts in self._tries(parsed):
                if found := self._listed(place, parts, other_ending):
                    return found
        raise MissingDataError(self._why(name, parsed))

    def item(self, name: str) -> Path:
        """The file that ``name`` means, or else where it was expected, for messages and skip
        lists."""
        try:
            return self.find(name)
        except DataError:
            return self.places[0] / name

    def missing(self, names: Sequence[str]) -> dict[str, str]:
        """name -> why no file could be found for it. Folders are listed once, however many names
        there are."""
        there: set[str] = set()
        for parent in {name[: name.rfind("/") + 1] for name in names}:
            if parse_name(parent).is_foreign or "\0" in parent:
                continue
            for place in self.places:
                if (place / parent).is_dir():
                    there |= {parent + entry for entry in os.listdir(place / parent)}
        found = {}
        for name in names:
            if name not in there and name not in found:
                try:
                    self.find(name)
                except DataError as error:
                    found[name] = str(error)
        return found

    def _tries(self, name: PhotoName) -> Iterator[tuple[Path, tuple[str, ...]]]:
        """(place, parts below it) where the file may be, the most telling ones first."""
        parts = name.parts
        for start in range(len(parts)):
            for place in self.places:
                # Folders in front may be left out if they are those of the place itself.
                tail = tuple(map(_key, place.parts[-start:])) if start else ()
                repeats = tail == tuple(map(_key, parts[:start]))
                if name.is_foreign or self.by_base or repeats:
                    yield place, parts[start:]

    def _listing(self, folder: Path) -> dict[str, list[str]]:
        """The names in a folder under their keys, and photos also under those of their stems."""
        if folder not in self._listings:
            found: dict[str, list[str]] = defaultdict(list)
            for entry in sorted(os.listdir(folder)) if folder.is_dir() else ():
                if not is_leftover(entry):
                    found[_key(entry)].append(entry)
                    # No name has a "/", so these keys are no other name's.
                    if Path(entry).suffix.lower() in IMAGE_SUFFIXES:
                        found[f"{_key(_stem(entry))}/"].append(entry)
                    elif Path(entry).suffix.lower() in UNREAD:
                        found[f"{_key(_stem(entry))}//"].append(entry)
            self._listings[folder] = found
        return self._listings[folder]

    def _listed(self, place: Path, parts: tuple[str, ...], other_ending: bool) -> Path | None:
        """The file of these parts below ``place`` in whatever spelling. Raises DataError where it
        could be several."""
        folder = place
        for number, part in enumerate(parts):
            is_last = number == len(parts) - 1
            key = f"{_key(_stem(part))}/" if is_last and other_ending else _key(part)
            fitting = self._listing(folder).get(key, [])
            if part in fitting:
                fitting = [part]
            elif is_last and other_ending and _stem(part) == part:
                # A name without ending means the most usual one.
                fitting = sorted(fitting, key=_rank)[:1]
            if len(fitting) > 1:
                raise DataError(
                    f"{folder}: {' and '.join(fitting)} may both be meant by {part}; keep one"
                )
            if not fitting:
                return None
            folder = resolve_inside(
                place, str((folder / fitting[0]).relative_to(place)), self.follow_links
            )
        return folder if parts and folder.is_file() else None

    def _why(self, name: str, parsed: PhotoName) -> str:
        if not parsed.parts or "\0" in name:
            return f"{name!r} is not the name of a file"
        looked = f"looked in {', '.join(map(str, self.places))}"
        for place, parts in self._tries(parsed):
            folder = place.joinpath(*parts[:-1])
            for entry in self._listing(folder).get(f"{_key(_stem(parts[-1]))}//", ()):
                return f"{folder / entry}: this format is not read; convert it to JPEG or PNG"
        if parsed.is_foreign:
            return (
                f"{name} is a place outside of the data (URLs, absolute names and '..' are"
                f" refused), and no {parsed.parts[-1]} is there; {looked}; put the photo into one"
                " of them"
            )
        return f"{name} is not there; {looked}"


class Identities:
    """What the photos of a data set are called in results: by the file's name without ending, or
    where several photos share it, by the path below their common root. Data sets without such
    photos, as all published ones are, keep short names."""

    def __init__(self, names: Iterable[str]):
        """``names``: of all photos, with "/" between folders."""
        different = set(names)
        stems = Counter(PurePosixPath(name).stem for name in different)
        self._shared = {stem for stem, count in stems.items() if count > 1}
        self._twins: set[str] = set()
        """Paths without ending that several photos have."""
        self._root, self._whole = "", False
        if self._shared:
            paths = Counter(map(_without_ending, different))
            self._twins = {path for path, count in paths.items() if count > 1}
            folders = set(map(os.path.dirname, different))
            self._root = os.path.commonpath(folders) if all(folders) else ""
            self._whole = len(set(map(self.of, different))) < len(different)

    def of(self, name: str) -> str:
        """The identity of the photo ``name``, one of those that were given."""
        stem, path = PurePosixPath(name).stem, _without_ending(name)
        if stem not in self._shared and not self._whole:
            return stem
        chosen = name if path in self._twins or self._whole else path
        return chosen[len(self._root) :].lstrip("/") if self._root else chosen


def _without_ending(name: str) -> str:
    path = PurePosixPath(name)
    return str(path.with_name(path.stem)) if path.name else name
