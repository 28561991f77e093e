"""The benchmark of the server of OpenAI's protocol, in small: nothing is mixed or lost."""

import pytest

from benchmarks.serve import measure
from tests.scripted import scripted_model


@pytest.mark.slow
def test_nothing_is_mixed_and_memory_is_flat():
    report = measure(str(scripted_model()), clients=12, requests=100, pictures=16)
    assert (report["wrong"], report["different_answers"]) == (0, 16)
    assert [row["requests"] for row in report["rows"]] == list(range(10, 101, 10))
    assert report["rows"][-1]["memory_mb"] - report["rows"][1]["memory_mb"] < 60
