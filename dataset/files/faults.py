"""Items that cannot be used: which ones are left out on purpose, what happens when a new one is
met, and where it is written down.

An *item* is what can be left out by itself: an image (all that is asked about it goes with it), the
JSON of one query, one line of a table. It is named by its path below the data folder,
"reason_seg/ReasonSeg/train/000.json", with the place in the file where several items share one:
"own/parts.jsonl:12", "llava_dataset/llava_instruct_150k.json:record 12".

A skip list has one JSON object per line: ``dataset`` ("ReasonSeg|train"), ``item`` and ``reason``.
``python -m dataset.check`` writes one and training reads it (``--skip_list``). Training writes the
bad items that it meets into ``skipped.jsonl``, in the same format.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock

from cores.dataset.files.errors import DataError, NothingToAsk
from cores.dataset.files.text import read_text
from cores.dataset.files.write import write_text

logger = logging.getLogger(__name__)

SKIPPED = "skipped.jsonl"  # the skip list that a run writes into its folder
SKIP_LIST_BEGINS = b'{"dataset": "'


@dataclass(frozen=True)
class BadItem:
    """One line of a skip list."""

    dataset: str
    item: str
    reason: str

    @property
    def key(self) -> tuple[str, str]:
        """A list made for one split serves another one that holds the same file."""
        return self.dataset.split("|")[0], self.item


def read_skip_list(path: str | Path) -> list[BadItem]:
    """The items of a skip list. Raises DataError naming file, line and field."""
    if Path(path).is_file() and not Path(path).stat().st_size:
        return []  # the list of data without any bad item, which read_text would refuse
    found = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict) or any(
            not isinstance(entry.get(k), str) or not entry[k] for k in ("dataset", "item")
        ):
            raise DataError(
                f'{path}:{number}: a skip list has one {{"dataset": text, "item": text, "reason":'
                " text} per line"
            )
        found.append(BadItem(entry["dataset"], entry["item"], str(entry.get("reason", ""))))
    return found


def write_skip_list(items: list[BadItem], path: str | Path) -> None:
    text = "".join(json.dumps(asdict(item)) + "\n" for item in items)
    write_text(Path(path), text)


@contextmanager
def blame(item: str | Path) -> Iterator[None]:
    """Marks a DataError that the block raises as one about ``item``, not about the whole sample."""
    try:
        yield
    except DataError as error:
        if error.item is None:
            error.item = str(item)
        raise


class Together:
    """Collects the faults of several items of one sample, so that all are named at once."""

    def __init__(self) -> None:
        self.found: list[DataError] = []

    @contextmanager
    def about(self, item: str | Path) -> Iterator[None]:
        """Keeps a DataError of the block, as one about ``item``."""
        try:
            with blame(item):
                yield
        except NothingToAsk:
            raise
        except DataError as error:
            self.found.append(error)

    def raise_all(self) -> None:
        """Raises the first of them, if there is any, with the others in it."""
        if self.found:
            self.found[0].others = tuple(self.found[1:])
            raise self.found[0]


class Faults:
    """What a loader does about bad items. By default it raises the first one and leaves nothing
    out."""

    def __init__(
        self,
        root: str | Path = ".",
        tolerant: bool = False,
        skip: list[BadItem] | None = None,
        report: str | Path | None = None,
    ):
        """``root``: the data folder, below which items are named. ``tolerant``: bad items are left
        out and noted instead of raised. ``skip``: items that are left out without being opened.
        ``report``: file to which every new bad item is added once, whichever process meets it."""
        self.root = Path(root)
        self.tolerant = tolerant
        self.found: dict[tuple[str, str], BadItem] = {}
        self.left_out: Counter[str] = Counter()
        self.remarks: dict[str, None] = {}
        self._skip = {item.key for item in skip or []}
        self._report = None if report is None else Path(report)
        self._reported: set[tuple[str, str]] = set()
        self._read = 0  # The first _read bytes of the report are in _reported.

    @property
    def leaves_out(self) -> bool:
        """Whether anything may be left out. If not, the first bad item is an error, and nobody
        needs to look for more of them."""
        return self.tolerant or self.has_skip_list

    @property
    def has_skip_list(self) -> bool:
        return bool(self._skip)

    def name(self, item: str | Path) -> str:
        """The item below the data folder, with "/" on every system."""
        path = Path(item)
        return (path.relative_to(self.root) if path.is_relative_to(self.root) else path).as_posix()

    def skips(self, dataset: str, item: str | Path) -> bool:
        """Whether the skip list holds the item; if so, ``left_out`` counts it for the data set."""
        listed = self.has_skip_list and BadItem(dataset, self.name(item), "").key in self._skip
        self.left_out[dataset] += listed
        return listed

    @contextmanager
    def guard(self, dataset: str, item: str | Path) -> Iterator[None]:
        """Catches a DataError of the block and notes it, or lets it through if bad items are not
        tolerated."""
        try:
            yield
        except DataError as error:
            if not self.tolerant:
                raise
            self.note(dataset, item, error)

    def note(self, dataset: str, item: str | Path, error: DataError) -> None:
        """Writes down, here, in the log and in the report, the items that ``error`` blames; it is
        ``item`` where it blames none."""
        for one in (error, *error.others):
            blamed = one.item or item
            if self.note_all(dataset, [(blamed, one)]):
                logger.warning("%s: %s is left out: %s", dataset, self.name(blamed), one)

    def remark(self, dataset: str, text: str) -> None:
        """Keeps, once, what is sound but not asked, for ``dataset.check`` to list."""
        if text not in self.remarks:
            self.remarks[text] = None
            logger.info("%s: %s", dataset, text)

    def leave_out(self, dataset: str, items: Sequence[tuple[str | Path, str]]) -> None:
        """Notes the bad entries of a file, (item, reason) pairs that were found all at once, with
        one line in the log, or raises the first. Those on the skip list are passed over."""
        first: dict[str | Path, str] = {}
        for item, reason in items:
            first.setdefault(item, reason)  # An image may have several bad annotations.
        bad = [(item, reason) for item, reason in first.items() if not self.skips(dataset, item)]
        if bad and not self.tolerant:
            raise DataError(bad[0][1])
        if self.note_all(dataset, bad):
            logger.warning(
                "%s: %d bad entries are left out, for example: %s", dataset, len(bad), bad[0][1]
            )

    def note_all(self, dataset: str, items: Sequence[tuple[str | Path, object]]) -> int:
        """Writes down (item, reason) pairs, without logging them; returns how many were new to
        this process."""
        new = [
            BadItem(dataset, self.name(item), " ".join(str(reason).split()))
            for item, reason in items
        ]
        new = [bad for bad in new if bad.key not in self.found]
        self.found |= {bad.key: bad for bad in new}
        if new and self._report is not None:
            self._add_to_report(self._report, new)
        return len(new)

    def _add_to_report(self, report: Path, items: list[BadItem]) -> None:
        """Ranks and workers share the file: whoever holds the lock first reads what the others have
        added. The system releases the lock of a process that is killed."""
        report.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{report}.lock"), report.open("a+b") as stream:
            stream.seek(self._read)
            self._reported |= {BadItem(**json.loads(line)).key for line in stream}
            for bad in items:
                if bad.key not in self._reported:
                    self._reported.add(bad.key)
                    stream.write(json.dumps(asdict(bad)).encode() + b"\n")
            self._read = stream.tell()
