"""The restricted unpickler: reads plain data of any protocol, runs nothing, and says what it
refused."""

import os
import pickletools
from collections import Counter

import numpy as np
import pytest

from cores.dataset.files.errors import DataError, MissingDataError
from cores.dataset.files.refs_pickle import read_pickle
from tests.official_layouts import pickled

PLAIN = [
    {
        "ref_id": 1,
        "ann_id": 2**40,
        "split": "train",
        "sentences": [{"sent": "the café", "tokens": ["a"], "x": (1.5, None, True)}],
    }
]


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data_of_every_protocol(tmp_path, protocol):
    (tmp_path / "refs.p").write_bytes(pickled(PLAIN, protocol))
    assert read_pickle(tmp_path / "refs.p") == PLAIN


def test_texts_of_python_2(tmp_path):
    """Protocol 0 as Python 2 wrote it: byte texts, longs, unicode by an instruction of its own; and
    a set by name."""
    (tmp_path / "refs.p").write_bytes(
        b"(lp0\n(dp1\nS'sent'\np2\nS'caf\\xc3\\xa9'\np3\nsS'id'\nL581857L\nsS'raw'\nVnew\nsa."
    )
    assert read_pickle(tmp_path / "refs.p") == [{"sent": "café", "id": 581857, "raw": "new"}]
    (tmp_path / "refs.p").write_bytes(b"c__builtin__\nset\n((lI1\naI2\natR.")
    assert read_pickle(tmp_path / "refs.p") == {1, 2}


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


EVIL = {
    "posix.system": pickled([Evil()], 2),
    "os.system": b"cos\nsystem\n(S'touch pwned'\ntR.",
    "nt.system": b"(S'touch pwned'\nint\nsystem\n.",  # the INST instruction
    "builtins.eval": b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x041+1\x85R.",
    "__builtin__.execfile": b"c__builtin__\nexecfile\n(S'x.py'\ntR.",
    "builtins.getattr": b"cbuiltins\ngetattr\n(cbuiltins\nlist\nS'append'\ntR.",
    "builtins.range": b"cbuiltins\nrange\n(I1000000000\ntR.",
    "builtins.str.format": b"\x80\x04\x8c\x08builtins\x8c\nstr.format\x93.",
    "copy_reg._reconstructor": b"ccopy_reg\n_reconstructor\n(cbuiltins\nobject\nt.",
    "numpy.core.multiarray.scalar": (
        pickled(np.float64(1), 2).replace(b"numpy._core", b"numpy.core")
    ),
}


@pytest.mark.parametrize("name", EVIL)
def test_whatever_it_asks_for_is_named_and_not_run(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "refs.p").write_bytes(EVIL[name])
    with pytest.raises(DataError, match=rf"refs.p: refused, .*asks for {name}\)") as error:
        read_pickle(tmp_path / "refs.p")
    assert "\n" not in str(error.value) and not (tmp_path / "pwned").exists()


def test_persistent_objects_and_extensions_are_refused(tmp_path):
    for blob in (b"Pnumber 1\n.", b"\x82\x01."):
        (tmp_path / "refs.p").write_bytes(blob)
        with pytest.raises(DataError, match=r"refs.p: "):
            read_pickle(tmp_path / "refs.p")


def test_damaged_files_are_one_line(tmp_path):
    path, whole = tmp_path / "refs.p", pickled(PLAIN * 3, 2)
    with pytest.raises(MissingDataError, match="refs.p: does not exist"):
        read_pickle(path)
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(DataError, match=r"refs.p: ") as error:
            read_pickle(path)
        assert "\n" not in str(error.value)


def test_a_file_with_wrong_bytes_is_read_or_refused(tmp_path):
    path, whole = tmp_path / "refs.p", pickled(PLAIN * 3, 2)
    generator = np.random.default_rng(0)
    # not those that take a length of up to 8 bytes: a wrong one reserves gigabytes before it is
    # found out
    short = [
        opcode.code
        for opcode in pickletools.opcodes
        if opcode.arg is None or opcode.arg.n in (0, 1, 2, -1)
    ]
    outcomes = Counter()
    for _ in range(400):
        blob = bytearray(whole)
        for at in generator.integers(len(blob), size=2):
            blob[at] = ord(short[int(generator.integers(len(short)))])
        path.write_bytes(bytes(blob))
        try:
            read_pickle(path)
            outcomes["read"] += 1
        except DataError as error:
            outcomes["\n" in str(error)] += 1
    assert outcomes[False] > 100 and outcomes["read"] > 10 and not outcomes[True]
