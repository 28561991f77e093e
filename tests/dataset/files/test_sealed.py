"""JSON with a checksum: whatever a disk does to it is noticed, or changes nothing."""

import pytest

from dataset.files.sealed import read_sealed, write_sealed

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
        try:
            found = read_sealed(file)
        except ValueError:
            noticed += 1
        else:
            # White space does not count; a checksum under another name is an unknown entry, which
            # the reader of the content refuses.
            assert found == CONTENT or found.keys() - CONTENT.keys()
    assert noticed > 4 * len(whole)


@pytest.mark.parametrize("content", [b"", b"[1]", b"null", b"\xff", b"{", b"[" * 10**5])
def test_what_is_no_object(tmp_path, content):
    (tmp_path / "f.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"f\.json: damaged .*$"):
        read_sealed(tmp_path / "f.json")


def test_what_is_not_there_and_what_is_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_sealed(tmp_path / "f.json")
    with pytest.raises(ValueError, match="cannot be read"):
        read_sealed(tmp_path)


def test_one_without_a_checksum_says_what_it_says(tmp_path):
    (tmp_path / "f.json").write_text('{"a": 1}')
    assert read_sealed(tmp_path / "f.json") == {"a": 1}
