"""Every case is run; the document tells of exactly these."""

import pytest

from tests.faults.case import BEGIN, DOCUMENT, END, all_cases, table


@pytest.mark.parametrize("found", all_cases(), ids=lambda found: f"{found.module}-{found.name}")
def test_case(found, tmp_path):
    found.run(tmp_path)


def test_document():
    text = DOCUMENT.read_text(encoding="utf-8")
    shown = text.partition(BEGIN)[2].partition(END)[0].strip()
    assert shown == table(), "run `python -m tests.faults`"
