"""Numbers that people give, on a command line or in a file: what may be said of a number is said in
one place, and NaN and infinity are never numbers."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from collections.abc import Callable

LARGEST_INT = 2**31 - 1  # what counters of any library hold


def refuse_outside(
    value: float, low: float | None = None, high: float | None = None, above: bool = False
) -> None:
    """Raises ValueError for a number outside, for NaN and for infinity: "is 2; it must be a finite
    number of at least 0 and of at most 1". ``above``: ``low`` itself is refused, too."""
    most = LARGEST_INT if high is None and isinstance(value, int) else high
    sound = math.isfinite(value) and (most is None or value <= most)
    sound = sound and (low is None or (value > low if above else value >= low))
    if not sound:
        limits = [] if low is None else [f"{'above' if above else 'of at least'} {low}"]
        if most is not None and (high is not None or value > most):
            limits.append(f"of at most {most}")
        raise ValueError(f"is {value}; it must be a finite number {' and '.join(limits)}".rstrip())


def in_range(
    kind: type, low: float | None = 0, high: float | None = None, above: bool = False
) -> Callable[[str], float]:
    """A ``type=`` of argparse: int or float, checked as ``refuse_outside`` does."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            what = "whole number" if kind is int else "number"
            raise ArgumentTypeError(f"{text!r} is no {what}") from None
        try:
            refuse_outside(value, low, high, above)
        except ValueError as error:
            raise ArgumentTypeError(str(error)) from None
        return value

    return read
