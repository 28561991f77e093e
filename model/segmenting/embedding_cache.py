"""SAM's image embeddings on disk: the image encoder is frozen, so an image costs it once, not once
per epoch.

``train_ds.py --sam_cache DIR`` fills the cache as it trains and uses what is there;
utils/precompute/sam_cache.py fills it beforehand.

::

    DIR/used, lock                     bytes in use, for the limit
        <weights>-<image size>-fp16/ab/abcd….safetensors

An entry's name is the hash of the image's pixels, its folder the hash of the encoder's weights, so
nothing can be taken for something else, and data sets and runs may share a DIR. Entries appear
whole or not at all, so any number of ranks, workers and killed runs may meet in one DIR; each has a
checksum, and one that is broken, or of before there were checksums, is computed again. A full cache
stays as it is, because for images drawn at random no other choice of what to store is better.

What training sees does not depend on what the cache held: a fresh embedding is rounded as a stored
one is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from filelock import BaseFileLock, FileLock
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

logger = logging.getLogger(__name__)

# What an entry of each --sam_cache_dtype holds.
FORMATS = {
    "fp16": {"values": torch.float16},
    "int8": {"values": torch.int8, "scale": torch.float32},
}
DTYPES = tuple(FORMATS)
GIGABYTE = 10**9
CHECKSUM = "crc32"
STALE_SECONDS = 3600  # The writer of a partial file of this age is gone.


def encoder_fingerprint(encoder: nn.Module, image_size: int) -> str:
    """Names what turns pixels into an embedding: the encoder's weights with their dtype, and the
    size of its input."""
    digest = hashlib.blake2b(digest_size=10)
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return f"{digest.hexdigest()}-{image_size}"


def pack(embedding: Tensor, dtype: str) -> dict[str, Tensor]:
    """An embedding (C, G, G) as it is stored.

    fp16 has an error of at most 2⁻¹¹ of each value. int8 has steps of 1/127 of the largest
    magnitude in each channel, and an error of at most half a step.
    """
    values = embedding.detach().float().cpu()
    if dtype == "fp16":
        return {"values": values.half().contiguous()}
    largest = values.abs().amax(dim=(1, 2), keepdim=True)
    scale = largest.clamp(min=torch.finfo(torch.float32).tiny) / 127
    return {"values": (values / scale).round().to(torch.int8).contiguous(), "scale": scale}


def checksum(stored: dict[str, Tensor]) -> str:
    """CRC-32 of what ``pack`` made: names, formats, sizes and bytes."""
    value = 0
    for name, tensor in sorted(stored.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def seal(stored: dict[str, Tensor]) -> bytes:
    """The file of what ``pack`` made."""
    return save(stored, {CHECKSUM: checksum(stored)})


def unseal(content: bytes) -> dict[str, Tensor]:
    """What ``seal`` made a file of. Raises ValueError or SafetensorError for any other content."""
    stored = load(content)
    length = int.from_bytes(content[:8], "little")
    expected = json.loads(content[8 : 8 + length]).get("__metadata__", {}).get(CHECKSUM)
    if expected is None:
        raise ValueError("it has no checksum, so it is of an older version")
    if expected != checksum(stored):
        raise ValueError("its checksum is wrong")
    return stored


def unpack(stored: dict[str, Tensor]) -> Tensor:
    """The embedding float32 (C, G, G) of what ``pack`` made."""
    values = stored["values"].float()
    return values * stored["scale"] if "scale" in stored else values


class SamCache:
    """One folder of embeddings of one encoder."""

    def __init__(
        self,
        root: str | Path,
        name: str,
        dtype: str = "fp16",
        limit_gb: float = 0.0,
        shape: tuple[int, int, int] | None = None,
    ):
        """``name``: see ``encoder_fingerprint``. ``limit_gb``: the most that ``root`` may hold, in
        10⁹ bytes; 0: no limit. ``shape``: the (C, G, G) of every embedding, None for any.

        Raises ValueError for an unknown dtype or a negative limit, OSError where ``root`` cannot be
        written.
        """
        if dtype not in DTYPES:
            raise ValueError(f"--sam_cache_dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
        if limit_gb < 0:
            raise ValueError(f"--sam_cache_gb {limit_gb}: must not be negative; 0 means no limit")
        self.root, self.dtype, self.limit = Path(root), dtype, int(limit_gb * GIGABYTE)
        self.folder = self.root / f"{name}-{dtype}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.shape, self._told = shape, False
        self.closed = False  # True once this cache or its disk is full.
        with self._lock:
            self._write_used(self._count())

    @property
    def _lock(self) -> BaseFileLock:
        """Held by one process at a time, and given back when that process is killed."""
        return FileLock(self.root / "lock")

    @staticmethod
    def key(image: np.ndarray) -> str:
        """The name of an image uint8 (H, W, 3): a hash of its content, whatever its file."""
        digest = hashlib.blake2b(str(image.shape).encode(), digest_size=20)
        digest.update(np.ascontiguousarray(image).data)
        return digest.hexdigest()

    def has(self, key: str) -> bool:
        return self._path(key).is_file()

    def load(self, key: str) -> Tensor | None:
        """The embedding float32 (C, G, G), None if it is not there or is not what was stored. The
        first of these is said by each process, and each is removed, to be computed again."""
        try:
            stored = unseal(self._path(key).read_bytes())
            if {name: tensor.dtype for name, tensor in stored.items()} != FORMATS[self.dtype]:
                raise ValueError(f"it is not {self.dtype}")
            embedding = unpack(stored)
            if self.shape is not None and tuple(embedding.shape) != self.shape:
                raise ValueError(f"its shape is {tuple(embedding.shape)}, not {self.shape}")
            return embedding
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            level = logging.DEBUG if self._told else logging.WARNING
            logger.log(level, "%s: not used (%s); computed again", self._path(key), error)
            self._told = True
            with contextlib.suppress(OSError):
                self._path(key).unlink()
            return None

    def store(self, key: str, embedding: Tensor) -> Tensor:
        """Stores an embedding (C, G, G) if there is room; returns it as ``load`` will, on its
        device in its dtype. One that is not finite is not stored."""
        stored = pack(embedding, self.dtype)
        kept = unpack(stored)
        if not self.closed and not self.has(key) and kept.isfinite().all():
            self._write(self._path(key), seal(stored))
        return kept.to(embedding)

    def used(self) -> int:
        """Bytes in ``root``, of all encoders."""
        with self._lock:
            return self._read_used()

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _write(self, path: Path, content: bytes) -> None:
        if not self._reserve(len(content)):
            self._close(
                f"the cache is full (--sam_cache_gb {self.limit / GIGABYTE:g}); it stays as it is"
            )
            return
        partial = path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}.partial")
        try:
            path.parent.mkdir(exist_ok=True)
            with partial.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(path)
        except OSError as error:  # A full disk must not stop a run, which can do without a cache.
            with contextlib.suppress(OSError):
                partial.unlink()
            self._close(f"{error}; nothing more is stored")

    def _close(self, reason: str) -> None:
        self.closed = True
        logger.warning("%s: %s", self.root, reason)

    def _reserve(self, size: int) -> bool:
        with self._lock:
            used = self._read_used() + size
            if self.limit and used > self.limit:
                return False
            self._write_used(used)
            return True

    def _read_used(self) -> int:
        try:
            return int((self.root / "used").read_text())
        except (FileNotFoundError, ValueError):  # A process was killed while it wrote the number.
            return self._count()

    def _write_used(self, size: int) -> None:
        (self.root / "used").write_text(str(size))

    def _count(self) -> int:
        """Bytes of all entries; removes what killed writers left."""
        total = 0
        for file in self.root.glob("*/*/*"):
            with contextlib.suppress(FileNotFoundError):  # Another process may rename or remove it.
                status = file.stat()
                if file.suffix == ".partial" and time.time() - status.st_mtime > STALE_SECONDS:
                    file.unlink()
                else:
                    total += status.st_size
        return total
