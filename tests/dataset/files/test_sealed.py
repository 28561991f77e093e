"""Records that carry their own checksum."""

import json

import pytest

from cores.dataset.files.errors import DamagedRecords
from cores.dataset.files.sealed import read_sealed, seal, unseal, write_sealed

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


# ------------------------------------------------------------------------------------------ files

CONTENT = {"epoch": 3, "best": 0.1 + 0.2, "recent": [1e-300, 2.5], "names": {"ü": None}}


def test_every_bit_counts(tmp_path):
    file = tmp_path / "f.json"
    write_sealed(file, CONTENT)
    assert read_sealed(file) == CONTENT
    whole, noticed = file.read_bytes(), 0
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        found = error = None
        try:
            found = read_sealed(file)
        except ValueError as raised:
            error = str(raised)
        if error is None:
            # White space at the end does not count; a checksum under another name is an unknown
            # entry, which the reader of the content refuses.
            assert found == CONTENT or found.keys() - CONTENT.keys()
        else:
            assert error.startswith(f"{file}: damaged") and "\n" not in error
            noticed += 1
    assert noticed > 7 * len(whole)


@pytest.mark.parametrize("content", [b"", b"[1]", b"null", b"\xff", b"{", b"[" * 10**5])
def test_what_is_no_object(tmp_path, content):
    (tmp_path / "f.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"f\.json: damaged"):
        read_sealed(tmp_path / "f.json")


def test_what_is_not_there_and_what_is_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_sealed(tmp_path / "f.json")
    with pytest.raises(ValueError, match="cannot be read"):
        read_sealed(tmp_path)


def test_one_without_a_checksum_says_what_it_says(tmp_path):
    (tmp_path / "f.json").write_text('{"a": 1}')
    assert read_sealed(tmp_path / "f.json") == {"a": 1}
