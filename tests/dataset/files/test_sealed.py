"""Records that carry their own checksum."""

import json

import pytest

from dataset.files.errors import DamagedRecords
from dataset.files.sealed import seal, unseal

RECORD = {"text": 'a "quoted" – text \ud800\n', "numbers": [1, 2.5], "none": None}


def test_what_is_sealed_is_read_again():
    line = seal(RECORD)
    assert b"\n" not in line and json.loads(line)["numbers"] == [1, 2.5]
    assert unseal(line) == unseal(line + b"\n") == RECORD


def test_a_record_without_a_checksum_is_taken_as_it_is():
    assert unseal(b'{"a": 1}') == {"a": 1}


@pytest.mark.parametrize(
    "line",
    [
        seal(RECORD).replace(b"2.5", b"2.6"),
        seal(RECORD).replace(b'"}', b'0"}'),
        seal(RECORD)[:-3],
        seal(RECORD).replace(b', "crc32"', b',  "crc32"'),
        b"[1]",
        b"",
        b"[" * 100_000,
        b"\xff",
    ],
)
def test_anything_else_is_damaged(line):
    with pytest.raises(DamagedRecords):
        unseal(line)
