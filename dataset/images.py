"""Reading files of a data set: pictures, label maps, JSON, run-length masks. Every error is one line naming the file.

H and W are the height and width of a picture in the *original* frame, which is the picture as a viewer shows it: the
orientation stored in EXIF is already applied.
"""

from __future__ import annotations

import codecs
import json
import struct
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from pycocotools import mask as rle_codec

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


class DataError(ValueError):
    """A file of a data set is missing, broken or contradicts another one. The message names the file and what to do.

    ``item``: the file, or the place in one, that is to blame, where it is not the whole sample (see dataset/faults.py).
    """

    item: str | None = None


class MissingDataError(DataError, FileNotFoundError):
    """A file or folder that a data set needs is not there."""


class NothingToAsk(DataError):
    """A sound image in which nothing may be asked for, such as one of void classes only. Training takes another one."""


def named_inside(root: str | Path, name: str) -> Path:
    """The path ``root/name`` for a ``name`` that the user typed. It may be a link: large folders often are.

    Raises DataError for an empty or absolute name and for '..'.
    """
    relative = Path(name)
    if not name or "\0" in name or relative.is_absolute() or ".." in relative.parts:
        raise DataError(f"{root}: {name!r} is not a file name inside this folder; absolute names and '..' are refused")
    return Path(root) / relative


def resolve_inside(root: str | Path, name: str) -> Path:
    """The path ``root/name`` for a ``name`` that was read from a file, if it stays inside ``root``.

    Raises DataError for an empty or absolute name, for '..', for a symbolic link that leaves ``root`` and for what no file
    can be called.
    """
    path = named_inside(root, name)
    try:
        leaves = not path.resolve().is_relative_to(Path(root).resolve())
        path.exists()
    except (OSError, RuntimeError, UnicodeError) as error:  # too long a name, a loop of links, half a character
        raise DataError(f"{root}: {name!r} cannot be opened ({_reason(error)}); correct the name") from None
    if leaves:
        raise DataError(f"{path}: is a link that leaves {root}; copy the file or link the whole folder")
    return path


def require_folder(path: str | Path, what: str) -> Path:
    """``path`` as a Path, or a MissingDataError that says ``what`` is expected there."""
    path = Path(path)
    if not path.is_dir():
        reason = "is not a folder" if path.exists() else "does not exist"
        raise MissingDataError(f"{path}: {reason}; {what} is expected there (check --dataset_dir)")
    return path


def list_files(folder: Path, suffixes: Iterable[str]) -> list[Path]:
    """The files of ``folder`` with one of the lower-case ``suffixes``, sorted by name and not as the disk likes.

    Raises DataError for a symbolic link that leaves ``folder``.
    """
    wanted = tuple(suffixes)
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in wanted and not path.name.startswith("."))
    return [resolve_inside(folder, path.name) if path.is_symlink() else path for path in found]


class Embedded(Protocol):
    """A picture that is no file of its own; ``str`` gives what messages call it."""

    def open(self, mode: str) -> BinaryIO: ...


def _as_file(path: str | Path | Embedded) -> Path | Embedded:
    return path if hasattr(path, "open") else Path(path)


def _open(path: Path | Embedded) -> Image.Image:
    """The file, not yet decoded. One that claims more pixels than Pillow's limit (89 million) is refused with that limit."""
    file = path if isinstance(path, Path) else path.open("rb")
    try:
        with warnings.catch_warnings():  # Pillow only warns below twice its limit
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(file)
    except FileNotFoundError:
        raise MissingDataError(f"{path}: image does not exist; restore it or remove its entry from the data set") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else _reason(error)
        raise DataError(f"{path}: not a readable image ({reason}); replace or remove the file") from None


def _reason(error: Exception) -> str:
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)  # which repeats the path
    return " ".join(said.split()) or type(error).__name__


def _load(picture: Image.Image, path: Path | Embedded) -> None:
    try:
        picture.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: broken image ({_reason(error)}); replace or remove the file") from None


def rgb_array(picture: Image.Image) -> np.ndarray:
    """A decoded picture as uint8 (H, W, 3) RGB, turned as its EXIF orientation says, transparent parts on white.

    Raises ValueError for a mode without an RGB equivalent.
    """
    if picture.mode == "F":  # Pillow would take 0 to 1 for black
        raise ValueError("floating-point pixels have no known range; save it with 8 or 16 bits")
    return np.array(_to_rgb(_turned(picture)))


def _turned(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except (OSError, ValueError, SyntaxError, struct.error, TypeError, ZeroDivisionError):
        return picture  # broken EXIF says nothing about the pixels


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode in ("I", "I;16", "I;16B", "I;16L"):  # 16-bit grey: Pillow's own conversion would clip at 255
        return Image.fromarray((np.asarray(picture, dtype=np.float32) / 257).clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        # what lies under transparent pixels is arbitrary, and a viewer shows paper there
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def read_image(path: str | Path | Embedded, size: tuple[int, int] | None = None) -> np.ndarray:
    """The picture as uint8 (H, W, 3) RGB. Grey, palette, CMYK, 16-bit and transparent files are converted.

    ``size``: the (H, W) of its annotations. A picture that has this size only without its EXIF orientation is not turned:
    whoever annotated it saw it lying.

    Raises MissingDataError if the file is not there and DataError if it cannot be decoded completely.
    """
    path = _as_file(path)
    with _open(path) as picture:
        _load(picture, path)
        try:
            pixels = rgb_array(picture)
        except ValueError as error:
            raise DataError(f"{path}: cannot be converted to RGB ({_reason(error)})") from None
        if size is not None and pixels.shape[:2] != tuple(size) == (picture.height, picture.width):
            return np.array(_to_rgb(picture))
        return pixels


def read_label(path: str | Path | Embedded) -> np.ndarray:
    """A label map (grey or palette PNG, 8 or 16 bit) as int32 (H, W). Raises DataError for colour images."""
    path = _as_file(path)
    with _open(path) as picture:
        _load(picture, path)
        if picture.mode not in ("L", "P", "1", "I", "I;16", "I;16B"):
            raise DataError(f"{path}: a label map must have one channel, this image has mode {picture.mode}")
        return np.array(picture).astype(np.int32)


def probe_images(paths: Iterable[Path | Embedded]) -> None:
    """Finds missing, foreign and cut-off files before any long work, reading only the two ends of each healthy file."""
    for path in paths:
        with _open(path) as picture:
            if picture.format == "JPEG" and not _ends_like_jpeg(path):
                _load(picture, path)  # a cut-off file fails here; one that only carries an unusual tail passes


def _ends_like_jpeg(path: Path | Embedded) -> bool:
    with path.open("rb") as stream:
        stream.seek(0, 2)
        stream.seek(max(0, stream.tell() - 64))
        return b"\xff\xd9" in stream.read()


def read_text(path: str | Path) -> str:
    """A text file in UTF-8 or, as some ReasonSeg files are, in Windows-1252. Raises DataError naming the file."""
    path = Path(path)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise MissingDataError(f"{path}: does not exist; check the path (of a data set: --dataset_dir and its name)") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or _reason(error)}); a text file is expected") from None
    if not raw.strip(b"\0 \r\n\t"):
        raise DataError(f"{path}: the file is empty; restore or remove it")
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in raw[:4]:
        raise DataError(f"{path}: is written in UTF-16 or UTF-32; save it as UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        pass
    try:
        return raw.decode("cp1252")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: neither UTF-8 nor Windows-1252 ({_reason(error)}); save it as UTF-8") from None


def read_json(path: str | Path) -> Any:
    """The content of a JSON file, encoded as ``read_text`` says. Raises DataError naming the file."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({_reason(error)}); repair or remove the file") from None


def check_size(found: tuple[int, ...], image: tuple[int, ...], path: str | Path, what: str) -> None:
    """Refuses a mask, label map or entry whose (H, W) differs from its image's."""
    if tuple(found[:2]) != tuple(image[:2]):
        found_size, image_size = (f"{size[0]}×{size[1]}" for size in (found, image))
        raise DataError(f"{path}: {what} is {found_size} (height × width) but its image is {image_size}")


def read_claimed(path: str | Path, entry: dict, source: object) -> np.ndarray:
    """``read_image`` for an entry of ``source``. Raises DataError unless the picture has the entry's height and width."""
    size = entry["height"], entry["width"]
    image = read_image(path, size)
    check_size(size, image.shape, path, f"the size in {source}")
    return image


def _run_total(text: str) -> int:
    """The number of pixels that compressed run lengths cover. Raises ValueError for a text that is none.

    A number is written in groups of five bits, lowest first, each as one character from "0" on with the sixth bit set if
    another group follows; from the fourth number on it is the difference to the number two places before it.
    """
    codes = np.frombuffer(text.encode("latin-1", "replace"), dtype=np.uint8).astype(np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise ValueError("not compressed run lengths")
    starts = np.flatnonzero(np.concatenate([[True], (codes[:-1] & 32) == 0]))
    sizes = np.diff([*starts, len(codes)])
    if sizes.max() > 7:
        raise ValueError("a run is too long")
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, sizes))
    numbers = np.add.reduceat((codes & 31) << shifts, starts)
    numbers -= np.where(codes[starts + sizes - 1] & 16, np.int64(1) << (5 * sizes), 0)  # two's complement
    for parity in (1, 2):
        numbers[parity::2] = np.cumsum(numbers[parity::2])
    if (numbers < 0).any():
        raise ValueError("a run is negative")
    return int(numbers.sum())


def decode_rle(rle: Any, size: tuple[int, int], path: str | Path, field: str) -> np.ndarray:
    """A COCO run-length mask ({"size": [H, W], "counts": text or list}) as bool (H, W).

    ``size``: the (H, W) that the mask must have. Raises DataError naming ``path`` and ``field`` for anything malformed.
    """
    counts = rle.get("counts") if isinstance(rle, dict) else None
    claimed = rle.get("size") if isinstance(counts, (str, list)) else None
    if not isinstance(claimed, list) or len(claimed) != 2 or not all(isinstance(side, (int, float)) for side in claimed):
        raise DataError(f'{path}: "{field}" must be {{"size": [height, width], "counts": …}}')
    check_size(tuple(claimed), size, path, f'"{field}"')
    height, width = size
    try:
        if isinstance(counts, list):
            if any(not isinstance(run, int) or run < 0 for run in counts) or sum(counts) != height * width:
                raise ValueError(f"the runs do not add up to {height * width} pixels")
            rle = rle_codec.frPyObjects({"size": [height, width], "counts": counts}, height, width)
        elif (total := _run_total(counts)) != height * width:  # pycocotools would show memory where the runs are too few
            raise ValueError(f"the runs add up to {total} pixels, the image has {height * width}")
        return rle_codec.decode({"size": [height, width], "counts": rle["counts"]}).astype(bool)
    except (ValueError, TypeError) as error:
        raise DataError(f'{path}: "{field}" is not a valid run-length mask ({_reason(error)})') from None


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """A mask bool (H, W) as COCO's compressed run lengths, ready for JSON: {"size": [H, W], "counts": text}."""
    rle = rle_codec.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


class DamagedRecords(Exception):
    """A record is not what was written."""


class PackedRecords:
    """A read-only list of JSON-like records in one flat buffer.

    A million small Python objects are copied into every worker process as soon as their reference counts change; one
    buffer is shared between them for good, and between all processes where it is a mapped file (dataset/store.py).
    """

    def __init__(self, records: Iterable[Any]):
        blobs = [json.dumps(record, separators=(",", ":")).encode() for record in records]
        self._ends = np.cumsum([0] + [len(blob) for blob in blobs])
        self._buffer = np.frombuffer(b"".join(blobs), dtype=np.uint8)
        self._sums = None

    @classmethod
    def over(cls, buffer: np.ndarray, ends: np.ndarray, sums: np.ndarray) -> PackedRecords:
        """Records written before. ``buffer``: uint8, record i is [ends[i], ends[i + 1]); ``sums``: CRC-32 of each, uint32."""
        packed = cls.__new__(cls)
        packed._buffer, packed._ends, packed._sums = buffer, ends, sums
        return packed

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Any:
        """Record ``index``. Raises IndexError, or DamagedRecords where its checksum is another."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        blob = self._buffer[self._ends[index] : self._ends[index + 1]].tobytes()
        if self._sums is not None and zlib.crc32(blob) != self._sums[index]:
            raise DamagedRecords(index)
        return json.loads(blob)
