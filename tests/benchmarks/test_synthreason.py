"""The interval over seeds, worked out by hand."""

import pytest

from benchmarks.synthreason import differences, interval_over_seeds


def test_interval_by_hand():
    # Mean 3, deviations -2, -1, 0, 1, 2: s = sqrt(10 / 4), s / sqrt(5) = 0.7071.
    mean, lower, upper = interval_over_seeds([1, 2, 3, 4, 5])
    assert mean == 3
    assert (lower, upper) == pytest.approx((3 - 2.776 * 0.70711, 3 + 2.776 * 0.70711), abs=1e-4)


def test_only_seeds_that_both_methods_have_count():
    def row(method: str, seed: int, giou: float) -> dict:
        scores = {"giou": giou}
        return {"method": method, "seed": seed, "free": scores, "teacher_forced": scores}

    runs = [row("cores", 0, 0.7), row("cores", 1, 0.8), row("cores", 2, 0.1)]
    runs += [row("lisa", 0, 0.6), row("lisa", 1, 0.7), row("llm_seg", 0, 0.5)]
    lines = differences(runs).splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "cores minus lisa, free gIoU, 2 paired seeds",
        "cores minus lisa, teacher_forced gIoU, 2 paired seeds",
    ]
    assert "+10.0" in lines[0]
