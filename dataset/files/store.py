"""Stores on disk: tables that are made once from a large annotation file and then mapped into
memory by every process that needs them.

::

    <cache>/<kind>-<content hash>/         one store: header.json, *.npy (arrays), *.bin (records)
    <cache>/stamps/<hash of path>.json     what an annotation file was when it was last seen:
                                           its size, times, inode and content hash

The cache is ``$CORES_CACHE/index`` or ``~/.cache/cores/index``. A store is written in a
``.partial`` folder under a lock and renamed when it is complete, so a process that is killed on the
way leaves nothing that could be mistaken for a store.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
import zlib
from array import array
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from cores.dataset.files.errors import DataError, MissingDataError, reason_of
from cores.dataset.files.packed import PackedRecords
from cores.dataset.files.paths import refuse_endless, typed_folder
from cores.dataset.files.write import sync

logger = logging.getLogger(__name__)

FORMAT = 1
HEADER = "header.json"
CHUNK = 1 << 24
LARGE = 1 << 27  # bytes; the index of a larger file takes several seconds
# A file that changed less than this ago may change again without getting a new time, within one
# tick of its file system's clock.
SETTLED_NS = 2_000_000_000


class StoreWriter:
    """Fills the folder of a store."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.sizes: dict[str, int] = {}
        self.checksums: dict[str, int] = {}

    def array(self, name: str, values: np.ndarray) -> None:
        np.save(self.folder / f"{name}.npy", values)
        self.finish(f"{name}.npy")

    def json(self, name: str, value: Any) -> None:
        (self.folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
        self.finish(f"{name}.json")

    def records(self, name: str, small: bool = False) -> RecordsWriter:
        """A context manager whose ``add`` appends one record. ``small``: the file is verified as a
        whole whenever the store is opened. Each record is verified when it is read in any case."""
        return RecordsWriter(self, name, small)

    def finish(self, name: str, verify: bool = True) -> None:
        """Declares the file ``name`` complete. ``verify``: its checksum is compared whenever the
        store is opened."""
        sync(self.folder / name)
        self.sizes[name] = (self.folder / name).stat().st_size
        if verify:
            self.checksums[name] = _checksum(self.folder / name)

    def close(self, digest: str) -> None:
        """Writes the header, last of all, because a folder without a header is not a store."""
        header = json.dumps(
            {"format": FORMAT, "source": digest, "sizes": self.sizes, "checksums": self.checksums}
        )
        (self.folder / HEADER).write_text(
            f"{header}\n{zlib.crc32(header.encode())}\n", encoding="utf-8"
        )
        sync(self.folder / HEADER)
        sync(self.folder)


class RecordsWriter:
    """Writes records into one file, and where each ends and its checksum into arrays beside it."""

    def __init__(self, store: StoreWriter, name: str, small: bool):
        self._store, self._name, self._small = store, name, small
        self._ends, self._sums = array("q", [0]), array("I")

    def __enter__(self) -> RecordsWriter:
        self._stream = (self._store.folder / f"{self._name}.bin").open("wb")
        return self

    def add(self, blob: bytes) -> None:
        """``blob``: JSON in UTF-8."""
        self._stream.write(blob)
        self._ends.append(self._ends[-1] + len(blob))
        self._sums.append(zlib.crc32(blob))

    def __exit__(self, kind, error, trace) -> None:
        self._stream.close()
        if kind is None:
            self._store.finish(f"{self._name}.bin", verify=self._small)
            self._store.array(f"{self._name}.ends", np.array(self._ends, dtype=np.int64))
            self._store.array(f"{self._name}.sums", np.array(self._sums, dtype=np.uint32))


class IndexStore:
    """A finished store. What it returns is mapped, read-only and shared with every other
    process."""

    def __init__(self, folder: Path, digest: str):
        """Raises ValueError if the folder is not a whole store of this format for the content
        ``digest``."""
        try:
            text, checksum, rest = (folder / HEADER).read_text(encoding="utf-8").split("\n")
            if int(checksum) != zlib.crc32(text.encode()) or rest:
                raise ValueError("its header is damaged")
            header = json.loads(text)
        except FileNotFoundError:
            raise ValueError("it has no header") from None
        if (header["format"], header["source"]) != (FORMAT, digest):
            raise ValueError("it has another format or source")
        for name, size in header["sizes"].items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != size:
                raise ValueError(f"{name} is missing or cut off")
        # Records are too large to be read at every start, so each has a checksum of its own.
        for name, expected in header["checksums"].items():
            if _checksum(folder / name) != expected:
                raise ValueError(f"{name} is damaged")
        self.folder, self.digest = folder, digest
        status = (folder / HEADER).stat()
        self.identity = (status.st_ino, status.st_mtime_ns)

    def array(self, name: str) -> np.ndarray:
        path = self.folder / f"{name}.npy"
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        # A plain view, because np.memmap's own class makes element access several times slower.
        return mapped.view(np.ndarray)

    def json(self, name: str) -> Any:
        return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))

    def records(self, name: str) -> PackedRecords:
        path = self.folder / f"{name}.bin"
        empty = path.stat().st_size == 0  # An empty file cannot be mapped.
        buffer = np.empty(0, np.uint8) if empty else np.memmap(path, np.uint8, "r").view(np.ndarray)
        return PackedRecords.over(buffer, self.array(f"{name}.ends"), self.array(f"{name}.sums"))


Build = Callable[[Path, StoreWriter], None]
# Size, time of the last change of the content and of anything in ns, inode. Only the second time
# tells of an edit in place after which the first was put back, as rsync -t and cp -p do.
Signature = tuple[int, int, int, int]


def open_store(
    source: str | Path,
    kind: str,
    build: Build,
    cache_dir: Path | None = None,
    damaged: IndexStore | None = None,
) -> IndexStore:
    """The store of ``source``, made by ``build(source, writer)`` if there is none. Of several
    processes one builds it and the others wait.

    ``kind``: what the store holds and the version of ``build``, such as "coco-1". ``damaged``: a
    store with records that cannot be read; it is replaced, unless another process has already done
    so. Raises DataError where ``source`` cannot be used or the cache cannot be written.
    """
    source, wanted = Path(source), cache_root(cache_dir)
    root = wanted if _writable(wanted) else _temporary_root()
    signature = _signature(source)
    digest = content_hash(source, root)
    name = f"{kind}-{digest[:32]}"
    if damaged is None:
        # A cache that cannot be written may still hold the store, filled by its owner.
        for folder in dict.fromkeys((wanted / name, root / name)):
            if (store := _try_open(folder, digest)) is not None:
                return store
    if root != wanted:
        logger.warning(
            "%s cannot be written, so the index of %s is kept in %s; set CORES_CACHE to choose",
            wanted,
            source,
            root,
        )
    folder = root / name
    with _locked(root / f"{name}.lock", source):
        store = _try_open(folder, digest)
        if store is None or (damaged is not None and store.identity == damaged.identity):
            _build(source, folder, digest, build, signature)
            store = IndexStore(folder, digest)
    return store


def _try_open(folder: Path, digest: str) -> IndexStore | None:
    if not folder.exists():
        return None
    try:
        return IndexStore(folder, digest)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        logger.warning("%s: %s; it is built again", folder, error)
        return None


def _build(source: Path, folder: Path, digest: str, build: Build, signature: Signature) -> None:
    started = time.perf_counter()
    # A build that takes a minute is announced with a warning, which every log shows.
    level = logging.WARNING if signature[0] > LARGE else logging.INFO
    logger.log(level, "%s: its index is built, once, in %s", source, folder)
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # We hold the lock: its writer was killed.
        partial.mkdir()
        writer = StoreWriter(partial)
        build(source, writer)
        writer.close(digest)
        if _signature(source) != signature:  # The content hash may be that of the old content.
            raise DataError(
                f"{source}: changed while its index was built; start again when it is complete"
            )
        shutil.rmtree(folder, ignore_errors=True)  # A sound store would have been opened.
        partial.rename(folder)
        sync(folder.parent)
    except OSError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{folder}: the index of {source} cannot be written ({reason_of(error)}); free space or"
            " set CORES_CACHE"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    logger.info("%s: index built in %.1f s", source, time.perf_counter() - started)


def _locked(path: Path, source: Path) -> FileLock:
    """The lock, acquired; leaving its ``with`` block releases it. The system releases the lock of a
    process that is killed."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("%s: waiting for the process that builds its index", source)
        lock.acquire()
    return lock


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """The folder of all stores: ``cache_dir``, or else the one that the environment names."""
    if cache_dir is not None:
        return Path(cache_dir)
    if base := os.environ.get("CORES_CACHE"):
        return typed_folder(base) / "index"
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cores" / "index"
    except RuntimeError:  # The user of a container may have neither a name nor a HOME.
        return _temporary_root()


def _writable(root: Path) -> bool:
    try:
        (root / "stamps").mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(root, os.W_OK | os.X_OK) and os.access(root / "stamps", os.W_OK | os.X_OK)


def _temporary_root() -> Path:
    """A folder of this user alone, the same for every process of this machine."""
    root = Path(tempfile.gettempdir()) / f"cores-index-{os.getuid()}"
    try:
        (root / "stamps").mkdir(parents=True, exist_ok=True, mode=0o700)
        ours = root.lstat().st_uid == os.getuid() and not root.is_symlink()
    except OSError:
        ours = False
    if not ours:
        raise DataError(
            f"{root}: cannot be used for the index of annotation files; set CORES_CACHE to a folder"
            " of your own"
        )
    root.chmod(0o700)
    return root


def content_hash(source: Path, root: Path) -> str:
    """SHA-256 of the file's content. The file is not read again while its size, times and inode
    are those of its stamp."""
    signature = _signature(source)
    place = hashlib.sha256(os.fsencode(source.resolve())).hexdigest()[:32]
    stamp = root / "stamps" / f"{place}.json"
    try:
        seen = json.loads(stamp.read_text(encoding="utf-8"))
        if tuple(seen["signature"]) == signature and len(seen["sha256"]) == 64:
            return seen["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # The file is new or its stamp is cut off, so the hash is computed.
    try:
        with source.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({reason_of(error)})") from None
    if time.time_ns() - max(signature[1:3]) > SETTLED_NS and _signature(source) == signature:
        with suppress(OSError):  # The stamp is only a shortcut; a full disk must not stop the run.
            partial = stamp.with_name(f"{stamp.name}.{os.getpid()}.partial")
            seen = {"file": str(source), "signature": signature, "sha256": digest}
            partial.write_text(json.dumps(seen), encoding="utf-8")
            partial.replace(stamp)
    return digest


def _signature(source: Path) -> Signature:
    refuse_endless(source)
    try:
        status = source.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise MissingDataError(
            f"{source}: does not exist; check --dataset_dir and the names of the data sets"
        ) from None
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror})") from None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return value
