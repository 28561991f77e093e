"""Caches and records."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from cores.dataset.files.errors import DataError
from cores.dataset.files.store import content_hash
from cores.dataset.generate.journal import Answer, Journal, read_answers
from cores.dataset.proposals import Found, ProposalSource, ProposalStore, encode_counts
from cores.dataset.readers.own import arrow
from cores.model.segmenting.embedding_cache import SamCache
from tests.faults.case import case


def flips(content: bytes, step: int = 1) -> list[bytes]:
    """``content`` with one bit the other way, for every ``step``-th bit."""
    out = []
    for bit in range(0, 8 * len(content), step):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        out.append(bytes(damaged))
    return out


def read_or_refusal(read: Callable[[], Any]) -> tuple[Any, str]:
    """(what is read, "") or (None, the one line of the DataError)."""
    try:
        return read(), ""
    except DataError as error:
        return None, str(error)


def found(image: np.ndarray) -> Found:
    masks = np.zeros((2, *image.shape[:2]), dtype=bool)
    masks[0, 2:6, 3:9], masks[1, 1:4, 1:4] = True, True
    return Found(image.shape[:2], encode_counts(masks), [24, 9], [0.5, 0.25])


@case(
    given="one bit flipped, the file cut or masks of another size, in the store of proposals, with"
    " and without its checksum",
    outcome="right",
    now="nothing hangs or is used; the entry is computed again and said once, or refused in one"
    " line where no SAM is at hand",
)
def proposals(root: Path) -> None:
    image = np.zeros((20, 30, 3), dtype=np.uint8)
    truth = found(image)
    store = ProposalStore(root, "settings")
    store.write(image, truth)
    file = store.path(image)
    sealed = file.read_bytes()
    old = json.dumps({k: v for k, v in json.loads(sealed).items() if k != "crc32"}).encode()
    file.write_bytes(old)
    assert store.read(image) == truth, "a file of an older version is read"
    huge = {"size": [100_000, 100_000], "masks": truth.masks, "areas": [24, 9], "quality": [1, 1]}
    others = [b"", b"null", b"[" * 100_000, sealed[:-9], json.dumps(huge).encode()]
    for content in (*flips(sealed, 5), *others):
        file.write_bytes(content)
        read, refusal = read_or_refusal(lambda: store.read(image))
        assert read == truth or (str(file) in refusal and "precompute_proposals" in refusal)
    # Without a checksum only what masks must be is known; a quality may change.
    for content in flips(old, 5):
        file.write_bytes(content)
        read, refusal = read_or_refusal(lambda: store.read(image))
        same = read and (read.size, read.masks, read.areas) == (
            truth.size,
            truth.masks,
            truth.areas,
        )
        assert same or str(file) in refusal
    file.write_bytes(others[-1])
    calls: list[int] = []
    compute = lambda image: calls.append(1) or truth  # noqa: E731
    source = ProposalSource("area", 2, 4, store, compute)
    assert len(source(image, "x")) == len(source(image, "x")) == 2
    assert len(calls) == 1 and file.read_bytes() == sealed


@case(
    given="one bit flipped in an entry of SAM's cache; entries of zeros, whole numbers, another"
    " shape, NaN, or of an older version without a checksum",
    outcome="right",
    now="the entry is computed again; the first one is said",
)
def embeddings(root: Path) -> None:
    cache = SamCache(root, "name", shape=(2, 4, 4))
    values = torch.randn(2, 4, 4)
    truth = cache.store("abc", values)
    (file,) = root.glob("*/*/*.safetensors")
    whole = file.read_bytes()
    zeros = {"values": torch.zeros(2, 4, 4, dtype=torch.float16)}
    others = [
        save(zeros),
        save({"values": torch.zeros(2, 4, 4, dtype=torch.int64)}),
        save({"values": torch.zeros(3, 4, 4, dtype=torch.float16)}),
        save({"values": values.half()}),
    ]
    logging.disable(logging.WARNING)
    try:
        used = 0
        for content in (*flips(whole, 29), *others):
            file.write_bytes(content)
            loaded = cache.load("abc")
            used += loaded is not None
            assert loaded is None or torch.equal(loaded, truth)
            assert torch.equal(cache.store("abc", values), truth)
    finally:
        logging.disable(logging.NOTSET)
    assert used < 4, "at most spaces in the header of the file may change without harm"
    cache.store("nan", torch.full((2, 4, 4), float("nan")))
    assert not cache.has("nan")


def parquet(root: Path, **columns) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="requirements-optional.txt")
    pytest.importorskip("pyarrow.parquet")
    file = root / "own.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file


@case(
    given="one bit flipped in a Parquet that was unpacked into the cache",
    outcome="right",
    now="it is unpacked again",
)
def unpacked_parquet(root: Path) -> None:
    file = parquet(root, image=["a.jpg", "b.jpg"], query=["the cat", "the dog"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CORES_CACHE", str(root / "cache"))
        logging.disable(logging.WARNING)
        try:
            rows = [read() for _, _, read in arrow.arrow_rows(file)]
            (unpacked,) = root.glob("cache/index/*/table.arrow")
            whole = unpacked.read_bytes()
            for content in flips(whole, 331):
                unpacked.write_bytes(content)
                arrow._mapped.cache_clear()  # As a new start does.
                assert [read() for _, _, read in arrow.arrow_rows(file)] == rows
                assert unpacked.read_bytes() == whole
        finally:
            arrow._mapped.cache_clear()
            logging.disable(logging.NOTSET)


@case(
    given="a Parquet of some kilobytes that unpacks to gigabytes",
    outcome="refused",
    now="one line with the limit and the variable that raises it",
)
def parquet_bomb(root: Path) -> None:
    file = parquet(root, image=["a.jpg"] * 500, query=["x" * 100_000] * 500)
    assert file.stat().st_size < 100_000
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CORES_CACHE", str(root / "cache"))
        patch.setattr(arrow, "GIGABYTE", 10**7)  # 50 MB against 10 MB, to be quick.
        with pytest.raises(DataError, match="CORES_UNPACKED_GB") as error:
            next(arrow.arrow_rows(file))
        assert str(file) in str(error.value)
        patch.setenv("CORES_UNPACKED_GB", "4")
        assert len(list(arrow.arrow_rows(parquet(root, image=["a.jpg"], query=["x"])))) == 1


@case(
    given="an annotation file edited in place whose time was put back (rsync --inplace -t)",
    outcome="right",
    now="its index is built again",
)
def time_put_back(root: Path) -> None:
    (root / "stamps").mkdir()
    file = root / "train.json"
    file.write_text('{"a": 1}')
    os.utime(file, (0, 0))
    stamp = lambda: next((root / "stamps").iterdir())  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "cores.dataset.files.store.SETTLED_NS", -(10**12)
        )  # The test cannot wait for it.
        first = content_hash(file, root)
        assert json.loads(stamp().read_text())["sha256"] == first
        file.write_text('{"a": 2}')
        os.utime(file, (0, 0))
        assert content_hash(file, root) != first


@case(
    given="one bit flipped in the journal of `dataset.generate`",
    outcome="refused",
    now="names the line, whose request is sent again once it is removed",
)
def journal(root: Path) -> None:
    file = root / "journal.jsonl"
    writer = Journal(file)
    writer.append("one", Answer("the cat that sleeps — \ud800", "stop", 3, 4), model="m")
    writer.append("two", Answer("the dog", "stop"))
    writer.close()
    whole = file.read_bytes()
    truth, length = read_answers(file)
    assert length == len(whole) and truth["two"].text == "the dog"
    for content in flips(whole, 5):
        file.write_bytes(content)
        read, refusal = read_or_refusal(lambda: read_answers(file)[0])
        # Of the end of the last line only the line is lost, as of one that a kill has cut off.
        lost = content[:-1] == whole[:-1] and read == {"one": truth["one"]}
        assert lost or read == truth or (file.name in refusal and "damaged; remove it" in refusal)
    old = [json.loads(line) for line in whole.splitlines()]
    file.write_text(
        "".join(json.dumps({k: v for k, v in o.items() if k != "crc32"}) + "\n" for o in old)
    )
    assert read_answers(file)[0] == truth, "a journal of an older version is read"


@case(
    given="a worker of `utils.precompute_proposals --jobs 2` that is killed",
    outcome="refused",
    now="one line, exit code 4; what was computed is kept",
)
def killed_worker(root: Path) -> None:
    from concurrent.futures.process import BrokenProcessPool

    from cores.utils.precompute import proposals as command
    from tests.backbone_toys import flags, toys
    from tests.faults.weights import said

    class Pool:
        """One whose process dies after the first image; a real one is a slow test."""

        def __init__(self, *_):
            pass

        def map(self, *_, **__):
            yield "computed"
            raise BrokenProcessPool("A process in the process pool was terminated abruptly")

        def shutdown(self, **_):
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "ProcessPoolExecutor", Pool)
        argv = flags(toys(), method="llm_seg", levels="SEG", proposals=root, features="sam")
        code, line = said(command.main, [*argv, "--jobs", "2"])
    assert code == 4 and "the same command" in line and line.strip().count("\n") == 0, line
