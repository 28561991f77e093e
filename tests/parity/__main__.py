"""Compares this program with recorded runs of the published LISA and CoReS code.

    python -m tests.parity CASE_DIR [CASE_DIR …] [--tolerance 10] [--all]

A case folder holds either a model (``weights.safetensors`` under the published names,
``config.json``, ``inputs`` and ``outputs.safetensors``, ``noise.json`` with the noise floor of the
published code itself), or recorded tokenisation (``values.json`` with "cases" and "tokenize"), or
recorded utilities. A model case is written out as a published checkpoint folder and loaded by
``CoresForReasoningSegmentation.from_pretrained``, as a user would.

A float tensor may differ by ``--tolerance`` times its noise floor, a loss by 1e-4, a metric by
1e-4, a mask by no pixel, token ids and labels not at all. A pixel whose recorded logit is nearer to
0 than the noise floor is undecided and not counted; the table says how many there are. Exit code 0:
everything agrees; 1: something does not; 2: no such case.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cores.dataset import command

if __name__ == "__main__":
    command.guard()

import torch

from tests.parity import model as parity_model
from tests.parity import parts as parity_parts
from tests.parity.table import Table, read_json, read_noise


def compare_case(folder: Path, factor: float = 10.0) -> Table:
    """Everything that a case folder records. Raises FileNotFoundError or ValueError for a folder
    that is no case."""
    if not folder.is_dir():
        raise FileNotFoundError("no such folder")
    table = Table(str(folder), factor, read_noise(folder / "noise.json"))
    if (folder / "weights.safetensors").is_file():
        parity_model.compare(folder, table)
        return table
    values = folder / "values.json"
    if not values.is_file():
        raise FileNotFoundError(
            f"{folder}: no case here; it needs weights.safetensors or values.json"
        )
    content = read_json(values)
    (parity_parts.compare_tokens if "cases" in content else parity_parts.compare_utilities)(
        folder, content, table
    )
    return table


def _factor(text: str) -> float:
    if not 0 <= float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of times")
    return float(text)


@command.entry()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.parity", description=__doc__.splitlines()[0]
    )
    parser.add_argument("cases", nargs="+", type=Path, metavar="CASE_DIR")
    parser.add_argument(
        "--tolerance",
        type=_factor,
        default=10.0,
        help="how many times the noise floor is allowed (default: 10)",
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="print every comparison, not only the largest of each run",
    )
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    ok = True
    for folder in args.cases:
        try:
            table = compare_case(folder, args.tolerance)
        except (OSError, ValueError) as error:
            print(f"error: {folder}: {error}", file=sys.stderr)
            return 2
        except (KeyError, IndexError) as error:
            print(f"error: {folder}: the case is incomplete, it lacks {error}", file=sys.stderr)
            return 2
        print(table.text(args.all))
        ok &= table.ok
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
