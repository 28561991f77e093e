"""What a case is, and the list of all of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

DOCUMENT = Path(__file__).parents[2] / "docs" / "robustness.md"
BEGIN, END = "<!-- cases: begin -->", "<!-- cases: end -->"
MODULES = (
    "annotations",
    "layouts",
    "words",
    "weights",
    "caches",
    "runs",
    "ranks",
    "commands",
    "pages",
)
OUTCOMES = ("right", "refused")


@dataclass(frozen=True)
class FaultCase:
    """One input or accident that users of this field report."""

    module: str
    """The file of tests/faults that holds it, its kind."""
    name: str
    """The name of the function that makes the input, runs the program and asserts."""
    given: str
    """The input, in words."""
    outcome: str
    """"right" (the program does what was meant) or "refused" (one line that names the remedy)."""
    now: str
    """What the program does, in words."""
    run: Callable[[Path], None]
    """Gets an empty folder."""


_CASES: list[FaultCase] = []


def case(given: str, outcome: str, now: str) -> Callable:
    """Registers a function ``(tmp_path) -> None`` as a case. Raises ValueError for another
    outcome than "right" and "refused"."""
    if outcome not in OUTCOMES:
        raise ValueError(f"outcome {outcome!r}: write one of {', '.join(OUTCOMES)}")

    def register(run: Callable[[Path], None]) -> Callable[[Path], None]:
        module = run.__module__.rpartition(".")[2]
        _CASES.append(FaultCase(module, run.__name__, given, outcome, now, run))
        return run

    return register


def all_cases() -> list[FaultCase]:
    """The cases of all modules, in the order of ``MODULES`` and of each file."""
    for name in MODULES:
        importlib.import_module(f"tests.faults.{name}")
    return sorted(_CASES, key=lambda found: MODULES.index(found.module))


def table() -> str:
    """All cases as Markdown: a count, then a table per kind."""
    cases = all_cases()
    counts = {outcome: sum(c.outcome == outcome for c in cases) for outcome in OUTCOMES}
    lines = [
        f"{len(cases)} cases: {counts['right']} are handled as meant, {counts['refused']} are"
        " refused in one line that names the remedy.",
    ]
    for module in MODULES:
        found = [c for c in cases if c.module == module]
        if not found:
            continue
        lines += ["", f"### {module.capitalize()}", "", "| input | now |", "| --- | --- |"]
        lines += [f"| {c.given} | {c.outcome}: {c.now} |" for c in found]
    return "\n".join(lines)
