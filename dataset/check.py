"""Looks at the data before a training does: what is there, what is missing and where it belongs,
what is broken.

    python -m dataset.check --dataset_dir ./dataset_dir    # opens eight images of every data set
    python -m dataset.check --dataset_dir ./dataset_dir --all --out check --fix-list bad.jsonl

``--out`` is a folder for contact sheets, one for every data set: images with their targets and
queries. ``--fix-list`` is a file for the bad items, one a line; ``train_ds.py --skip_list
bad.jsonl`` leaves out exactly these. Exit code: 0; 1 if something is bad; 2 for a wrong flag.
"""

from __future__ import annotations

import logging
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from cores.dataset import command

if __name__ == "__main__":
    command.guard()

import numpy as np
from tqdm import tqdm

from cores.dataset.conversation.turns import answer_text
from cores.dataset.conversation.wordings import SENTENCE_QUESTIONS
from cores.dataset.drawing import QueryCard, card_sheet
from cores.dataset.files.errors import MissingDataError
from cores.dataset.files.faults import SKIP_LIST_BEGINS, BadItem, Faults, write_skip_list
from cores.dataset.files.paths import require_folder, typed_folder
from cores.dataset.files.write import prepare_output, refuse_foreign
from cores.dataset.numbers import in_range
from cores.dataset.registry import DatasetEntry, entries
from cores.dataset.sample import LoaderOptions, Sample, check_sample

LEVELS = ("LOC", "SEG")
SHEET_CELLS = 24  # pictures on a contact sheet
CELLS_PER_IMAGE = 2  # queries shown of one image; more only if few images are opened


@dataclass
class Finding:
    """What was found about one split of one data set."""

    name: str
    """As --val_dataset has it: "ReasonSeg|val"."""
    missing: list[str] = field(default_factory=list)
    """Official names of files that are not there."""
    absent: str = ""
    """Why its files are not enough: they lack this split, or all of its images."""
    error: str = ""
    """Why it cannot be opened at all."""
    images: int = 0
    opened: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    """In the opened images: "queries", "targets" and, among these, "empty" ones."""
    bad: list[BadItem] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    """What is sound but not asked, or may be meant in another way."""
    cells: list[QueryCard] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        return not self.bad and not self.error

    def line(self) -> str:
        """The finding as one line of the report."""
        if self.missing:
            return f"incomplete: {', '.join(self.missing)} is not there"
        if self.absent:
            return f"incomplete: {self.absent}"
        if self.error:
            return f"cannot be opened: {self.error}"
        counts = self.counts
        empty = f" ({counts['empty']} empty)" if counts["empty"] else ""
        bad = f", {len(self.bad)} bad" if self.bad else ""
        return (
            f"{self.images} images, {self.opened} opened: {counts['queries']} queries,"
            f" {counts['targets']} targets{empty}{bad}"
        )


def inspect(
    entry: DatasetEntry, split: str, root: Path, samples: int | None, follow_links: bool = False
) -> Finding:
    """Opens a split, which runs the checks of its loader, and then ``samples`` of its images,
    spread evenly over it, or all of them for None."""
    finding = Finding(f"{entry.name}|{split}", missing=entry.missing(root, split))
    if finding.missing:
        return finding
    faults = Faults(root, tolerant=True)
    options = LoaderOptions(
        LEVELS, training=False, skip_missing=True, faults=faults, follow_links=follow_links
    )
    try:
        loader = entry.open(root, split, options)
    except MissingDataError as error:
        finding.absent = str(error)
    except ValueError as error:
        finding.error = str(error)
    else:
        finding.images = len(loader)
        count = len(loader) if samples is None else min(samples, len(loader))
        chosen = np.linspace(0, len(loader) - 1, count).round().astype(int).tolist()
        for index in tqdm(chosen, desc=finding.name, unit="image", leave=False, disable=None):
            with faults.guard(loader.dataset, loader.path(index)):
                sample = loader.sample(index, np.random.default_rng(index))
                check_sample(sample, LEVELS)
                finding.opened += 1
                _add_sample(sample, finding, max(CELLS_PER_IMAGE, SHEET_CELLS // count))
    finding.bad, finding.remarks = list(faults.found.values()), list(faults.remarks)
    return finding


def _add_sample(sample: Sample, finding: Finding, cells: int) -> None:
    """Adds the counts of a sample to ``finding``, and its first ``cells`` queries to the contact
    sheet."""
    for number, conversation in enumerate(sample.conversations):
        finding.counts["queries"] += len(conversation.turns)
        finding.counts["targets"] += len(conversation.masks)
        finding.counts["empty"] += sum(not mask.any() for mask in conversation.masks)
        if number < cells and len(finding.cells) < SHEET_CELLS:
            question, reply = conversation.turns[0]
            note = "" if len(conversation.masks) else answer_text(reply)
            # Questions about sentences end with the same request, which the sheet leaves out.
            query = question.removesuffix(SENTENCE_QUESTIONS[0].removeprefix("{text}"))
            finding.cells.append(
                QueryCard(
                    sample.image, conversation.masks, conversation.ignore, query, note, sample.id
                )
            )


def inspect_all(
    root: Path, samples: int | None, only: list[str] | None = None, follow_links: bool = False
) -> tuple[list[Finding], list[DatasetEntry]]:
    """(findings of all splits of which something is there, sets of which nothing is). Raises
    ValueError for an unknown name in ``only``."""
    known = entries(root, follow_links)
    if only and (unknown := set(only) - {entry.name for entry in known}):
        names = ", ".join(dict.fromkeys(entry.name for entry in known))
        raise ValueError(f"--only {sorted(unknown)[0]}: no such data set; known here: {names}")
    findings, absent = [], []
    for entry in known:
        if only and entry.name not in only:
            continue
        there = [split for split in entry.splits if entry.is_there(root, split)]
        findings += [inspect(entry, split, root, samples, follow_links) for split in there]
        if not there:
            absent.append(entry)
    return findings, absent


def report(findings: list[Finding], absent: list[DatasetEntry]) -> str:
    """What was found, as text."""
    names = [finding.name for finding in findings] + [entry.name for entry in absent]
    width = max(map(len, names), default=0)
    lines = []
    for finding in findings:
        lines.append(f"{finding.name.ljust(width)}  {finding.line()}")
        lines += [
            f"{' ' * width}    {' '.join(bad.item.split())}: {bad.reason}" for bad in finding.bad
        ]
        lines += [
            f"{' ' * width}    note: {' '.join(remark.split())}" for remark in finding.remarks
        ]
    if absent:
        lines += ["", "Not there, and where it is expected:"]
    for entry in absent:
        splits = list(dict.fromkeys(entry.splits.values()))
        shown = splits[0] if len(splits) == 1 else "{" + ",".join(splits) + "}"
        expected = ", ".join((*entry.files, *entry.shared)).replace("{split}", shown)
        source = f"  ({entry.source})" if entry.source else ""
        lines.append(f"{entry.name.ljust(width)}  {expected}{source}")
    # File names may hold half of a surrogate pair, which cannot be printed.
    return "\n".join(lines).encode("utf-8", "backslashreplace").decode()


def write_sheets(findings: list[Finding], folder: Path) -> list[Path]:
    """One contact sheet for every data set that could be opened. Returns the files."""
    written = []
    for finding in findings:
        if finding.cells:
            path = folder / f"{re.sub('[|:/]', '-', finding.name)}.png"
            card_sheet(finding.cells, path, f"{finding.name}: {finding.line()}")
            written.append(path)
    return written


def build_parser() -> command.Parser:
    parser = command.Parser((__doc__ or "").split("\n")[0], "python -m dataset.check")
    parser.add_argument(
        "--dataset_dir",
        required=True,
        type=typed_folder,
        help="root of all data sets, as for train_ds.py",
    )
    parser.add_argument("--out", type=Path, help="folder for one contact sheet per data set")
    parser.add_argument(
        "--samples",
        type=in_range(int, 1),
        default=8,
        help="images of each split to open (default: 8)",
    )
    parser.add_argument("--all", action="store_true", help="open every image")
    parser.add_argument(
        "--only", help='names of data sets, joined by "||" (default: whatever is there)'
    )
    parser.add_argument(
        "--fix-list", type=Path, help="file for the bad items, for train_ds.py --skip_list"
    )
    parser.add_argument(
        "--follow_links", action="store_true", help="files may be links out of the data folder"
    )
    return parser


@command.entry()
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    logger = logging.getLogger("dataset")
    level = logger.level
    logger.setLevel(logging.ERROR)  # The report names what is left out, but no encodings.
    logging.getLogger("cores.dataset.files.text").setLevel(logging.WARNING)
    try:
        if args.fix_list is not None:
            refuse_foreign(args.fix_list, SKIP_LIST_BEGINS, "--fix-list")
        root = require_folder(args.dataset_dir, "the data")
        only = args.only.split("||") if args.only else None
        samples = None if args.all else args.samples
        prepare_output("--out", args.out, is_folder=True)
        prepare_output("--fix-list", args.fix_list)
        findings, absent = inspect_all(root, samples, only, args.follow_links)
    finally:
        logger.setLevel(level)
    print("\n".join(map(command.shown, report(findings, absent).split("\n"))))
    bad = [item for finding in findings for item in finding.bad]
    broken = [finding for finding in findings if finding.error]
    print(
        f"\n{len(findings)} splits, {len(bad)} bad items, {len(broken)} splits that cannot be"
        " opened"
    )
    if args.out is not None:
        print(*(f"sheet: {path}" for path in write_sheets(findings, args.out)), sep="\n")
    if args.fix_list is not None:
        write_skip_list(bad, args.fix_list)
        print(f"{args.fix_list}: {len(bad)} items to be left out by train_ds.py --skip_list")
    return 0 if all(finding.is_clean for finding in findings) else 1


if __name__ == "__main__":
    sys.exit(main())
