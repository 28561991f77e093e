"""The index gives back what the file holds, is built once, and survives everything but a wrong
annotation file."""

import io
import json
import logging
import multiprocessing
import os
import signal
import tempfile
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from cores.dataset.files import index as index_module
from cores.dataset.files import store as store_module
from cores.dataset.files.errors import DamagedRecords, DataError, MissingDataError
from cores.dataset.files.index import CocoIndex, RecordIndex
from cores.dataset.files.json_stream import JsonReader, parse_stream
from cores.dataset.files.store import open_store
from cores.dataset.readers.coco import CocoInstances
from cores.dataset.sample import LoaderOptions
from tests.dataset_toys import SAMPLES, write_image, write_json

FORK = multiprocessing.get_context("fork")
PHOTOS = SAMPLES / "coco" / "annotations" / "instances_train2017.json"


def coco(images: int = 3, annotations: int = 7) -> dict:
    """Names are sorted the other way round than images; annotation j lies on image j % images and
    is a crowd if j is 3."""
    names = [f"{999 - i}.jpg" for i in range(images)]
    return {
        "info": {"year": 2017},
        "images": [
            {"id": 10 + i, "file_name": n, "height": 10, "width": 12, "x": [i]}
            for i, n in enumerate(names)
        ],
        "annotations": [
            {
                "id": 100 + j,
                "image_id": 10 + j % images,
                "category_id": 1 + j % 2,
                "segmentation": [[0, 0, 5, 0, 5, j]],
            }
            | {"iscrowd": int(j == 3), "area": j + 0.5, "bbox": [0, 0, 5, j]}
            for j in range(annotations)
        ],
        "categories": [
            {"id": 1, "name": "dog", "supercategory": "animal"},
            {"id": 2, "name": "cat"},
        ],
    }


def assert_same(index: CocoIndex, content: dict) -> None:
    images = sorted(content["images"], key=lambda image: image["file_name"])
    assert list(index.file_names) == [image["file_name"] for image in images]
    assert [index.image(i) for i in range(len(index))] == images
    for position, image in enumerate(images):
        own = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        assert index.annotations(position) == own
        rows = index.rows(position)
        assert index.annotation_ids[rows].tolist() == [a["id"] for a in own]
        assert index.category_ids[rows].tolist() == [a["category_id"] for a in own]
        assert index.is_crowd[rows].tolist() == [bool(a.get("iscrowd")) for a in own]
        assert (position in index.with_instances()) == any(not a.get("iscrowd") for a in own)
        assert index.image(index.image_position(image["id"])) == image
    for annotation in content["annotations"]:
        assert index.annotation(annotation["id"]) == annotation
    assert index.categories == {c["id"]: c for c in content["categories"]}


def stores(cache: Path) -> list[Path]:
    return sorted(path.parent for path in cache.glob("*/header.json"))


def snapshot(cache: Path) -> dict[str, bytes]:
    """Everything in the cache but the empty lock files and the stamps."""
    files = (
        path
        for path in cache.rglob("*")
        if path.is_file() and path.suffix != ".lock" and path.parent.name != "stamps"
    )
    return {str(path.relative_to(cache)): path.read_bytes() for path in files}


@pytest.fixture
def builds(monkeypatch) -> list[Path]:
    """The files whose index was built."""
    done = []
    real = store_module._build

    def build(source, *arguments):
        done.append(source)
        real(source, *arguments)

    monkeypatch.setattr(store_module, "_build", build)
    return done


@pytest.fixture
def settled(monkeypatch):
    """Files count as settled at once, so that their stamps are trusted."""
    monkeypatch.setattr(store_module, "SETTLED_NS", -(10**18))


# ------------------------------------------------------------------------------------- same content

NUMBERS = st.integers() | st.floats(allow_nan=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
IDS = st.integers(-(2**63), 2**63 - 1)


@st.composite
def contents(draw) -> dict:
    """A COCO file with any ids, names, further fields and order of its parts."""

    def entries(ids, fields):
        extra = st.dictionaries(st.text(), VALUES, max_size=2)
        return [draw(extra) | {"id": i} | draw(st.fixed_dictionaries(fields)) for i in ids]

    size = st.integers(1, 2000)
    unique = {"unique": True, "max_size": 4}
    images = entries(
        draw(st.lists(IDS, **unique)), {"file_name": st.text(), "height": size, "width": size}
    )
    categories = entries(draw(st.lists(IDS, **unique)), {"name": st.text()})
    annotations = []
    if images and categories:
        of = {
            "image_id": st.sampled_from([i["id"] for i in images]),
            "category_id": st.sampled_from([c["id"] for c in categories]),
        }
        of |= {
            "segmentation": st.lists(st.lists(NUMBERS, max_size=6), max_size=2).filter(
                lambda drawn: drawn != [[]]  # what detectors write for "no mask"
            ),
            "iscrowd": st.integers(0, 1),
        }
        annotations = entries(draw(st.lists(IDS, unique=True, max_size=8)), of)
    parts = {
        "images": images,
        "annotations": annotations,
        "categories": categories,
        "info": draw(VALUES),
    }
    return {key: parts[key] for key in draw(st.permutations(sorted(parts)))}


@given(
    content=contents(),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
    bom=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_whatever_a_file_holds_comes_back(content, indent, ascii_only, bom):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.json"
        path.write_text(
            json.dumps(content, indent=indent, ensure_ascii=ascii_only),
            encoding="utf-8-sig" if bom else "utf-8",
        )
        assert_same(CocoIndex.open(path, Path(folder) / "cache"), content)


def test_windows_1252(tmp_path):
    content = coco()
    content["categories"][0]["name"] = "caniche naïf"
    (tmp_path / "a.json").write_bytes(json.dumps(content, ensure_ascii=False).encode("cp1252"))
    assert_same(CocoIndex.open(tmp_path / "a.json", tmp_path / "cache"), content)


@pytest.mark.skipif(not PHOTOS.exists(), reason=f"the real samples are not at {PHOTOS}")
def test_real_annotations(tmp_path):
    assert_same(CocoIndex.open(PHOTOS, tmp_path), json.loads(PHOTOS.read_text()))


def test_ids_and_positions_that_are_not_there(tmp_path):
    index = CocoIndex.open(write_json(tmp_path / "a.json", coco()), tmp_path / "cache")
    for call in (index.image, index.annotations, index.rows):
        for position in (-1, 3):
            with pytest.raises(IndexError):
                call(position)
    for call, wrong in (
        (index.image_position, 13),
        (index.image_position, 9),
        (index.annotation, 107),
        (index.annotation, 10),
    ):
        with pytest.raises(KeyError):
            call(wrong)


def read_all(reader: JsonReader):
    """A value by the reader's own means."""
    if reader.peek() == "{":
        return {key: read_all(reader) for key in reader.members()}
    if reader.peek() == "[":
        return [
            value for value, text in reader.items() if json.loads(text) == value or value != value
        ]
    return reader.value()[0]


@given(value=VALUES, indent=st.sampled_from([None, 1]), window=st.integers(1, 9))
@example(value=[-1.5e-300, 10], indent=None, window=1)
@example(value=-1.5e-300, indent=None, window=1)
@settings(max_examples=100, deadline=None)
def test_the_window_of_the_reader_does_not_matter(value, indent, window):
    text = f" {json.dumps(value, indent=indent)}\r\n"
    reader = JsonReader(io.StringIO(text, newline=""), window)
    assert read_all(reader) == value
    reader.end()


def test_the_window_stays_small():
    """Of 300 kB in entries of 30 no more is held than two windows; an entry that is longer is held
    as a whole."""
    reader = JsonReader(
        io.StringIO(json.dumps([{"id": i, "x": "abc"} for i in range(10_000)] + ["y" * 5000])),
        window=1000,
    )
    held = [len(reader._text) for _ in reader.items()]
    assert max(held[:-1]) < 2100 and 5000 < held[-1] < 20_000


def test_the_reader_says_where_it_failed():
    def fails(text, message):
        reader = JsonReader(io.StringIO(text), window=3)
        with pytest.raises(ValueError, match=message):
            (read_all(reader), reader.end())

    fails('{"a": 1', "character 7, where the file ends")
    fails('{"a": 1 "b": 2}', ", or } is expected at character 8")
    fails('{"a" 1}', ": is expected at character 5")
    fails("{1: 2}", "a key in quotes is expected at character 1")
    fails("[1, 2] 3", "extra data at character 7")
    fails('{"long enough": [1, tru]}', "Expecting value at character 20")


# ---------------------------------------------------------------------------------------- bad files


def change(content: dict, key: str, number: int, **fields) -> dict:
    entry = {
        name: value for name, value in (content[key][number] | fields).items() if value is not ...
    }
    return content | {key: [*content[key][:number], entry, *content[key][number + 1 :]]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (change(coco(), "images", 1, id=10), '"images" holds the id 10 twice'),
        (change(coco(), "annotations", 2, id=100), '"annotations" holds the id 100 twice'),
        (change(coco(), "categories", 1, id=1), '"categories" holds the id 1 twice'),
        (
            change(coco(), "annotations", 2, image_id=9),
            "annotation 102 names an unknown image or category",
        ),
        (
            change(coco(), "annotations", 2, category_id=3),
            "annotation 102 names an unknown image or category",
        ),
        (
            change(coco(), "annotations", 2, segmentation=...),
            '"annotations" entry 2 lacks the field "segmentation"',
        ),
        (
            change(coco(), "annotations", 2, image_id=...),
            '"annotations" entry 2 lacks the field "image_id"',
        ),
        (
            change(coco(), "annotations", 2, id="x"),
            '"annotations" entry 2: "id" must be a whole number',
        ),
        (
            change(coco(), "annotations", 2, id=2**63),
            '"annotations" entry 2: "id" must be a whole number',
        ),
        (
            change(coco(), "annotations", 2, iscrowd="no"),
            '"annotations" entry 2: "iscrowd" must be 0 or 1',
        ),
        (
            change(coco(), "images", 0, file_name=...),
            '"images" entry 0 lacks the field "file_name"',
        ),
        (change(coco(), "images", 0, file_name=3), '"images" entry 0: "file_name" must be a text'),
        (
            change(coco(), "images", 0, height=None),
            '"images" entry 0: "height" and "width" must be whole numbers',
        ),
        (change(coco(), "categories", 1, name=...), '"categories" entry 1 lacks the field "name"'),
        (coco() | {"images": [3]}, '"images" entry 0 is not an object'),
        ("", 'has no list "images"; a COCO instances file is expected'),
        (
            coco() | {"categories": None},
            'has no list "categories"; a COCO instances file is expected',
        ),
        ([], 'has no list "images"; a COCO instances file is expected'),
    ],
)
def test_bad_entries_are_named(tmp_path, content, message):
    with pytest.raises(DataError, match=f"a.json: {message}") as error:
        CocoIndex.open(write_json(tmp_path / "a.json", content), tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert not snapshot(tmp_path / "cache"), "nothing is left of the attempt"


def test_a_file_cut_off_anywhere_is_an_error(tmp_path):
    text = json.dumps(coco(2, 2))
    for length in range(0, len(text), 3):
        (tmp_path / "a.json").write_text(text[:length])
        with pytest.raises(DataError, match="a.json: not valid JSON .*at character") as error:
            CocoIndex.open(tmp_path / "a.json", tmp_path / "cache")
        assert "\n" not in str(error.value)
    (tmp_path / "a.json").write_text(text + "x")
    with pytest.raises(DataError, match="not valid JSON .extra data"):
        CocoIndex.open(tmp_path / "a.json", tmp_path / "cache")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(MissingDataError, match="no.json: does not exist"):
        CocoIndex.open(tmp_path / "no.json", tmp_path / "cache")
    with pytest.raises(MissingDataError, match="no.json: does not exist"):
        parse_stream(tmp_path / "no.json", JsonReader.value)
    with pytest.raises(DataError, match="cannot be read"):
        CocoIndex.open(tmp_path, tmp_path / "cache")
    (tmp_path / "a.json").write_bytes(b'{"images": "\x81"}')  # neither UTF-8 nor Windows-1252
    with pytest.raises(DataError, match="a.json: is not UTF-8, and gives no usual words"):
        CocoIndex.open(tmp_path / "a.json", tmp_path / "cache")


def test_a_file_that_changes_while_it_is_read(tmp_path, monkeypatch):
    path = write_json(tmp_path / "a.json", coco())
    real = index_module.build_coco

    def build_coco(source, writer, tolerant):
        real(source, writer, tolerant)
        write_json(path, coco(annotations=8))

    monkeypatch.setattr(index_module, "build_coco", build_coco)
    with pytest.raises(DataError, match="changed while its index was built"):
        CocoIndex.open(path, tmp_path / "cache")
    assert not snapshot(tmp_path / "cache")


# -------------------------------------------------------------------------------- one build, shared


def test_an_index_is_built_once_per_content(tmp_path, builds, settled):
    path = write_json(tmp_path / "a.json", coco())
    for _ in range(2):
        assert_same(CocoIndex.open(path, tmp_path / "cache"), coco())
    path.rename(tmp_path / "b.json")
    CocoIndex.open(tmp_path / "b.json", tmp_path / "cache")
    (tmp_path / "b.json").touch()
    CocoIndex.open(tmp_path / "b.json", tmp_path / "cache")
    assert len(builds) == 1, "another place or time of the same content is no reason"
    write_json(path, coco(annotations=8))
    assert_same(CocoIndex.open(path, tmp_path / "cache"), coco(annotations=8))
    assert len(builds) == len(stores(tmp_path / "cache")) == 2


def test_a_known_file_is_not_read_again(tmp_path, builds, monkeypatch, settled):
    path = write_json(tmp_path / "a.json", coco())
    CocoIndex.open(path, tmp_path / "cache")
    monkeypatch.setattr(store_module.hashlib, "file_digest", None)  # cannot be called
    CocoIndex.open(path, tmp_path / "cache")
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(TypeError):
        CocoIndex.open(path, tmp_path / "cache")


def test_a_file_that_has_just_changed_is_not_trusted(tmp_path):
    """Two versions of one size within a tick of the clock look the same from outside."""
    path = write_json(tmp_path / "a.json", coco())
    CocoIndex.open(path, tmp_path / "cache")
    status = path.stat()
    path.write_text(path.read_text().replace("dog", "fox"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert CocoIndex.open(path, tmp_path / "cache").categories[1]["name"] == "fox"


def test_a_broken_stamp_is_only_a_lost_shortcut(tmp_path, builds, settled):
    path = write_json(tmp_path / "a.json", coco())
    CocoIndex.open(path, tmp_path / "cache")
    (stamp,) = (tmp_path / "cache" / "stamps").iterdir()
    for junk in ("", "[]", '{"signature": 1}', stamp.read_text()[:-5]):
        stamp.write_text(junk)
        assert_same(CocoIndex.open(path, tmp_path / "cache"), coco())
    assert len(builds) == 1


def slow_build(source: Path, writer: store_module.StoreWriter) -> None:
    with (source.parent / "builds").open("a") as log:
        log.write(f"{os.getpid()}\n")
    time.sleep(0.3)
    writer.json("content", source.read_text())


def test_of_many_processes_one_builds(tmp_path):
    source = tmp_path / "a.json"
    source.write_text("content")

    def rank():
        assert (
            open_store(source, "toy-1", slow_build, tmp_path / "cache").json("content") == "content"
        )

    ranks = [FORK.Process(target=rank) for _ in range(5)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0] * 5
    assert len((tmp_path / "builds").read_text().split()) == 1


def write_data(root: Path, images: int = 3) -> Path:
    content = coco(images, 40)
    for image in content["images"]:
        write_image(root / "coco" / "train2017" / image["file_name"])
    write_json(root / "coco" / "annotations" / "instances_train2017.json", content)
    return root


class Drawn:
    """A map-style data set of one loader, as a process that is started anew can import it."""

    def __init__(self, root: Path):
        self.loader = CocoInstances(root, "train2017", LoaderOptions(("SEG",)))

    def __len__(self) -> int:
        return len(self.loader)

    def __getitem__(self, index: int) -> list:
        sample = self.loader.sample(index, np.random.default_rng(index))
        return [[c.turns[0][0], int(c.masks.sum())] for c in sample.conversations]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_read_the_same_however_they_are_started(tmp_path, start):
    data = Drawn(write_data(tmp_path))
    loader = DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context=start)
    assert list(loader) == [data[i] for i in range(3)]


def test_a_pickle_holds_the_name_of_the_file_only(tmp_path, builds, monkeypatch):
    monkeypatch.setenv("CORES_CACHE", str(tmp_path / "cache"))
    loader = CocoInstances(write_data(tmp_path), "train2017", LoaderOptions(("SEG",)))
    text = ForkingPickler.dumps(loader)
    assert (
        len(text)
        < 1500
        < (tmp_path / "coco" / "annotations" / "instances_train2017.json").stat().st_size
    )
    assert_same(ForkingPickler.loads(text).index, coco(3, 40))
    assert len(builds) == 1
    write_json(loader.source, coco(3, 41))
    with pytest.raises(DataError, match="is not the file it was when this process was started"):
        ForkingPickler.loads(text)


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("CORES_CACHE", str(tmp_path / "file"))
    path = write_json(tmp_path / "a.json", coco())
    for _ in range(2):
        assert_same(CocoIndex.open(path), coco())
    kept = tmp_path / "tmp" / f"cores-index-{os.getuid()}"
    assert len(stores(kept)) == 1 and kept.stat().st_mode & 0o777 == 0o700
    assert caplog.text.count("cannot be written, so the index of") == 1 and str(kept) in caplog.text
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    with pytest.raises(DataError, match="cannot be used for the index .* set CORES_CACHE"):
        CocoIndex.open(path)


def test_a_cache_filled_by_its_owner_serves_those_who_may_only_read(
    tmp_path, monkeypatch, builds, caplog
):
    path = write_json(tmp_path / "a.json", coco())
    CocoIndex.open(path, tmp_path / "cache")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(store_module, "_writable", lambda root: False)
    assert_same(CocoIndex.open(path, tmp_path / "cache"), coco())
    assert len(builds) == 1 and not caplog.text


def test_the_default_cache(monkeypatch):
    monkeypatch.setenv("CORES_CACHE", "/big")
    assert store_module.cache_root() == Path("/big/index")
    monkeypatch.delenv("CORES_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert store_module.cache_root() == Path("/x/cores/index")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert store_module.cache_root() == Path("/home/me/.cache/cores/index")
    monkeypatch.setenv("CORES_CACHE", "~/mine")
    assert store_module.cache_root() == Path("/home/me/mine/index")


def test_a_long_build_is_announced(tmp_path, monkeypatch, caplog):
    CocoIndex.open(write_json(tmp_path / "a.json", coco()), tmp_path / "cache")
    assert not caplog.text
    monkeypatch.setattr(store_module, "LARGE", 100)
    CocoIndex.open(write_json(tmp_path / "a.json", coco(2)), tmp_path / "cache")
    assert "a.json: its index is built, once, in" in caplog.text


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module.os, "fsync", full)
    with pytest.raises(
        DataError,
        match="a.json cannot be written .No space left on device.; free space or set CORES_CACHE",
    ):
        CocoIndex.open(write_json(tmp_path / "a.json", coco()), tmp_path / "cache")
    assert not snapshot(tmp_path / "cache")


# ----------------------------------------------------------------------------------- damaged stores


def damage(path: Path, how: str) -> None:
    if how == "delete":
        path.unlink()
        return
    content = path.read_bytes()
    middle = len(content) // 2
    cut = {
        "cut": content[:middle],
        "flip": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "empty": b"",
    }
    path.write_bytes(cut[how])


@pytest.mark.parametrize("how", ["delete", "cut", "flip", "empty"])
def test_a_damaged_store_is_found_and_built_again(tmp_path, builds, how):
    path = write_json(tmp_path / "a.json", coco())
    CocoIndex.open(path, tmp_path / "cache")
    (folder,) = stores(tmp_path / "cache")
    clean = snapshot(tmp_path / "cache")
    names = sorted(file.name for file in folder.iterdir())
    assert len(names) > 10
    for name in names:
        damage(folder / name, how)
        assert_same(CocoIndex.open(path, tmp_path / "cache"), coco())
        assert snapshot(tmp_path / "cache") == clean, name
    assert len(builds) == 1 + len(names)


def test_damage_while_it_is_in_use_is_repaired_once(tmp_path, builds):
    path = write_json(tmp_path / "a.json", coco())
    first, second = (CocoIndex.open(path, tmp_path / "cache") for _ in range(2))
    (folder,) = stores(tmp_path / "cache")
    damage(folder / "annotations.bin", "flip")  # both have this file mapped
    assert_same(first, coco())
    assert_same(second, coco())
    assert len(builds) == 2


def test_a_record_that_stays_damaged_is_no_endless_loop(tmp_path, monkeypatch):
    index = CocoIndex.open(write_json(tmp_path / "a.json", coco(1, 1)), tmp_path / "cache")
    real = store_module.RecordsWriter.add
    monkeypatch.setattr(
        "cores.dataset.files.store.RecordsWriter.add",
        lambda self, blob: real(self, blob) or self._sums.append(self._sums.pop() ^ 1),
    )
    damage(index._store.folder / "annotations.bin", "flip")
    with pytest.raises(DamagedRecords):
        index.annotations(0)


def test_another_format_is_built_again(tmp_path, builds, monkeypatch):
    path = write_json(tmp_path / "a.json", coco())
    CocoIndex.open(path, tmp_path / "cache")
    monkeypatch.setattr(store_module, "FORMAT", store_module.FORMAT + 1)
    assert_same(CocoIndex.open(path, tmp_path / "cache"), coco())
    CocoIndex.open(path, tmp_path / "cache")
    assert len(builds) == 2


def test_leftovers_are_no_store(tmp_path):
    path = write_json(tmp_path / "a.json", coco())
    CocoIndex.open(path, tmp_path / "cache")
    (folder,) = stores(tmp_path / "cache")
    clean = snapshot(tmp_path / "cache")
    folder.rename(folder.with_name(f"{folder.name}.partial"))
    folder.mkdir()
    (folder / "junk").write_text("")
    assert_same(CocoIndex.open(path, tmp_path / "cache"), coco())
    assert snapshot(tmp_path / "cache") == clean


# -------------------------------------------------------------------------------------------- kills


def killed_at_sync(path: Path, cache: Path, number: int) -> bool:
    """Builds in a process that dies at its ``number``-th fsync. Whether it came so far."""

    def build():
        left, real = iter(range(number)), os.fsync

        def fsync(handle):
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            real(handle)

        os.fsync = fsync
        CocoIndex.open(path, cache)

    process = FORK.Process(target=build)
    process.start()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def assert_recovers(path: Path, cache: Path, clean: dict[str, bytes], content: dict) -> None:
    assert_same(CocoIndex.open(path, cache), content)
    assert snapshot(cache) == clean


def test_a_killed_build_leaves_no_trace(tmp_path):
    path = write_json(tmp_path / "a.json", coco())
    CocoIndex.open(path, tmp_path / "clean")
    clean = snapshot(tmp_path / "clean")
    for number in (0, 8, 17):
        cache = tmp_path / str(number)
        assert killed_at_sync(path, cache, number)
        assert not stores(cache) or any(
            folder.name.endswith(".partial") for folder in stores(cache)
        )
        assert_recovers(path, cache, clean, coco())


@pytest.mark.chaos
def test_a_build_killed_at_any_point_leaves_no_trace(tmp_path):
    path = write_json(tmp_path / "a.json", coco(40, 400))
    CocoIndex.open(path, tmp_path / "clean")
    clean = snapshot(tmp_path / "clean")
    number = 0
    while killed_at_sync(path, tmp_path / f"sync{number}", number):
        assert_recovers(path, tmp_path / f"sync{number}", clean, coco(40, 400))
        number += 1
    assert number > 15, "every file is synced, then its folder"


@pytest.mark.chaos
def test_builds_killed_at_random_times_leave_no_trace(tmp_path):
    content = coco(200, 20_000)
    path = write_json(tmp_path / "a.json", content)
    started = time.perf_counter()
    CocoIndex.open(path, tmp_path / "clean")
    seconds, clean = time.perf_counter() - started, snapshot(tmp_path / "clean")
    unfinished = 0
    for number, delay in enumerate(np.random.default_rng(0).uniform(0, 1.2 * seconds, 25)):
        cache = tmp_path / str(number)
        ranks = [FORK.Process(target=CocoIndex.open, args=(path, cache)) for _ in range(2)]
        for process in ranks:
            process.start()
        time.sleep(delay)
        ranks[number % 2].kill()  # the one that builds or the one that waits
        for process in ranks:
            process.join(60)
        assert ranks[1 - number % 2].exitcode == 0, "the other one is not held up"
        unfinished += ranks[number % 2].exitcode != 0
        index = CocoIndex.open(path, cache)
        assert len(index) == 200 and index.annotation(100) == content["annotations"][0]
        assert snapshot(cache) == clean
    assert unfinished > 5


# --------------------------------------------------------------------------------- lists of records


def prepare(source: Path, entry: dict, number: int) -> tuple[str, dict]:
    if "name" not in entry:
        raise DataError(f"{source}: record {number} has no name")
    return entry["name"], {"length": len(entry["name"])}


def test_lists_of_records(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = write_json(tmp_path / "a.json", [{"name": "abc", "rest": 1}, {"name": "é"}])
    for _ in range(2):
        index = RecordIndex.open(path, "toy-1", prepare, tmp_path / "cache")
        assert list(index.names) == ["abc", "é"] and list(index) == [{"length": 3}, {"length": 1}]
        with pytest.raises(IndexError):
            index[2]
    assert caplog.text.count("index built") == 1
    assert list(ForkingPickler.loads(ForkingPickler.dumps(index))) == list(index)
    for content, message in (
        ([], "must be a non-empty list"),
        ({}, "must be a non-empty list"),
        ([{}], "record 0 has no name"),
    ):
        with pytest.raises(DataError, match=f"a.json: {message}"):
            RecordIndex.open(write_json(path, content), "toy-1", prepare, tmp_path / "cache")
