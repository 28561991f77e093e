"""Tables of Hugging Face datasets and Parquet as own data: where they lie, what a row may hold,
pictures inside them, bad ones."""

import io
import json
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cores.dataset import check
from cores.dataset.files.errors import DataError, MissingDataError
from cores.dataset.files.faults import Faults, read_skip_list
from cores.dataset.readers.own.arrow import PYARROW
from cores.dataset.readers.own.dataset import OwnData
from cores.dataset.sample import LoaderOptions, check_sample
from tests.dataset.test_check import ROOT, run_block
from tests.dataset_toys import LEVELS, write_image
from tests.own_toys import RECTANGLE, SIZE, box, runs, write_mask

EVAL = LoaderOptions(LEVELS, training=False)
MASK = box(1, 1, 4, 4)
DOG = {"query": "the dog", "polygons": [[float(v) for point in RECTANGLE for v in point]]}


@pytest.fixture
def arrow():
    return pytest.importorskip("pyarrow", reason=f"needs {PYARROW} (requirements-optional.txt)")


def encoded(pixels: np.ndarray, form: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form, **options)
    return stream.getvalue()


def photo(value: int = 60, name: str | None = None) -> dict:
    """datasets' Image; every ``value`` is another picture."""
    return {"bytes": encoded(np.full((*SIZE, 3), value, np.uint8)), "path": name}


def mask(pixels: np.ndarray = MASK, **options: object) -> dict:
    return {"bytes": encoded(pixels.astype(np.uint8) * 255, **options), "path": None}


def as_table(rows: list[dict]) -> object:
    """A pyarrow.Table; what some rows lack is null there."""
    import pyarrow

    return pyarrow.Table.from_pylist(
        [dict.fromkeys(name for other in rows for name in other) | row for row in rows]
    )


def write_parquet(path: Path, rows: list[dict]) -> Path:
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(as_table(rows), path)
    return path


def write_saved(folder: Path, rows: list[dict], files: int = 1) -> Path:
    """As Dataset.save_to_disk writes it."""
    import pyarrow.ipc

    folder.mkdir(parents=True)
    table, names = as_table(rows), [f"data-{n:05d}-of-{files:05d}.arrow" for n in range(files)]
    for number, name in enumerate(names):
        part = table.take(list(range(number, len(rows), files)))
        with pyarrow.ipc.new_stream(str(folder / name), table.schema) as stream:
            stream.write_table(part)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": name} for name in names]})
    )
    return folder


def samples(root: Path, spec: str, options: LoaderOptions = EVAL) -> list:
    loader = OwnData(root, spec, options)
    found = [loader.sample(index, np.random.default_rng(0)) for index in range(len(loader))]
    for sample in found:
        check_sample(sample, LEVELS)
    return found


def asked(sample) -> list[str]:
    return [
        c.turns[0][0].split(" in this image")[0].removeprefix("What is ")
        for c in sample.conversations
    ]


def test_without_pyarrow_one_line_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(
        DataError,
        match=rf"^{tmp_path}/own/a.parquet: is read with pyarrow, .*: pip install {PYARROW}$",
    ):
        OwnData(tmp_path, "a", EVAL)
    (finding,), _ = check.inspect_all(tmp_path, None)
    assert finding.name == "own:a|all" and f"pip install {PYARROW}" in finding.line()


@pytest.mark.parametrize(
    ("write", "spec"),
    [
        (lambda own, rows: write_parquet(own / "a.parquet", rows), "a"),
        (lambda own, rows: write_parquet(own / "a" / "train.parquet", rows), "a|train"),
        (
            lambda own, rows: [
                write_parquet(own / "a" / f"val-{n:05d}-of-00002.parquet", rows[n::2])
                for n in (0, 1)
            ],
            "a|val",
        ),
        (lambda own, rows: write_saved(own / "a", rows), "a|all"),
        (lambda own, rows: write_saved(own / "a" / "val", rows, files=2), "a|val"),
        (
            lambda own, rows: (
                write_saved(own / "a" / "other", rows),
                (own / "a" / "dataset_dict.json").write_text('{"splits": ["other"]}'),
            ),
            "a|other",
        ),
    ],
    ids=["one file", "split", "pieces", "saved", "saved in two files", "saved splits"],
)
def test_every_place_gives_the_same(tmp_path, arrow, write, spec):
    rows = [
        DOG | {"image": photo(60 + n, f"{n}.png"), "query": [f"dog {n}", "an animal"]}
        for n in range(4)
    ]
    write(tmp_path / "own", rows)
    found = samples(tmp_path, spec)
    assert sorted((s.id, s.image[0, 0, 0], *asked(s)) for s in found) == [
        (str(n), 60 + n, f"dog {n}") for n in range(4)
    ]
    assert all((s.conversations[0].masks == box(2, 2, 6, 5)).all() for s in found)
    (finding,), _ = check.inspect_all(tmp_path, None)
    assert (finding.images, finding.opened, finding.bad, finding.error) == (4, 4, [], "")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ({"mask": mask()}, MASK),
        ({"mask": mask()["bytes"]}, MASK),
        ({"mask": mask(form="TIFF")}, MASK),
        ({"mask": "m.png"}, MASK),
        ({"rle": runs(box(5, 2, 9, 8))}, box(5, 2, 9, 8)),
        ({"rle": {"size": list(SIZE), "counts": b"X11g1"}}, None),
        ({"rle": {"size": None, "counts": None}, "polygons": []}, box(0, 0, 0, 0)),
        ({"targets": [{"mask": mask(), "rle": None}]}, MASK),
        ({"mask": mask(), "ignore": mask(box(8, 8, 9, 9))}, MASK),
    ],
    ids=["picture", "bytes", "tiff", "name", "runs", "compressed", "empty", "targets", "ignore"],
)
def test_a_target_is_exact_however_it_is_written(tmp_path, arrow, shape, expected):
    write_mask(tmp_path / "own" / "a" / "masks" / "m.png", MASK)
    if expected is None:
        codec = pytest.importorskip("pycocotools.mask")
        shape, expected = {"rle": codec.encode(np.asfortranarray(MASK, np.uint8))}, MASK
    write_parquet(
        tmp_path / "own" / "a" / "train.parquet", [{"image": photo(), "query": "it"} | shape]
    )
    ((conversation,),) = (s.conversations for s in samples(tmp_path, "a"))
    assert (conversation.masks == expected[None]).all()
    assert (conversation.ignore is not None) == ("ignore" in shape)


def test_rows_about_the_same_picture_are_one_sample(tmp_path, arrow):
    rows = [{"image": photo(), "query": query, "mask": mask()} for query in ("a", "b")] + [
        DOG | {"image": photo(9)}
    ]
    write_saved(tmp_path / "own" / "a", rows)
    assert sorted(map(asked, samples(tmp_path, "a"))) == [["a", "b"], ["the dog"]]


def test_pictures_may_be_files_beside_the_table(tmp_path, arrow):
    write_image(tmp_path / "own" / "a" / "images" / "0.jpg", SIZE)
    write_image(tmp_path / "own" / "a" / "val" / "images" / "1.jpg", SIZE)
    for folder, image in (("train", "0.jpg"), ("val", {"bytes": None, "path": "1.jpg"})):
        rows = [DOG | {"image": image}]
        write_saved(tmp_path / "own" / "b", rows).rename(tmp_path / "own" / "a" / f"{folder}.new")
    for file in (tmp_path / "own" / "a" / "val.new").iterdir():
        file.rename(tmp_path / "own" / "a" / "val" / file.name)
    (tmp_path / "own" / "a" / "val.new").rmdir()
    (tmp_path / "own" / "a" / "train.new").rename(tmp_path / "own" / "a" / "train")
    assert [
        Path(s.image_path).name
        for split in ("train", "val")
        for s in samples(tmp_path, f"a|{split}")
    ] == ["0.jpg", "1.jpg"]


def test_what_holds_for_files_holds_inside(tmp_path, arrow):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90°
    turned = encoded(np.zeros((*SIZE[::-1], 3), np.uint8), "JPEG", exif=exif)
    rows = [
        DOG | {"image": {"bytes": turned, "path": "/home/me/000000000009.jpg"}},
        DOG | {"image": photo(name="C:\\x\\b.png")},
    ]
    write_parquet(tmp_path / "own" / "a.parquet", rows)
    first, second = samples(tmp_path, "a")
    assert first.image.shape == (*SIZE, 3)
    assert (first.id, second.id) == ("000000000009", "b")
    excluding = LoaderOptions(LEVELS, training=False, excluded_coco=frozenset({9}))
    assert [s.id for s in samples(tmp_path, "a", excluding)] == ["b"]


def bomb() -> bytes:
    """A PNG of a few bytes that claims 10,000 × 10,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 10000, 10000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + header
        + struct.pack(">I", zlib.crc32(header))
        + b"\0\0\0\x0aIDAT"
    )


CUT = encoded(np.random.default_rng(0).integers(0, 255, (*SIZE, 3), np.uint8), "JPEG")[:-40]
BAD_ROWS = {
    "no image": ({"image": None}, ":row 1", '"image"|needs "image"|name of an image'),
    "no query": ({"query": None}, ":row 1", '"query" must be a text'),
    "no shape": (
        {"polygons": None},
        ":row 1",
        "needs one of mask, rle and polygons, none is given",
    ),
    "two shapes": ({"mask": mask()}, ":row 1", "mask and polygons are given"),
    "mask is no picture": (
        {"polygons": None, "mask": {"bytes": b"x", "path": None}},
        ":row 1",
        '"mask" is no PNG',
    ),
    "mask is a JPEG": ({"polygons": None, "mask": mask(form="JPEG")}, ":row 1", '"mask" is no PNG'),
    "broken mask": (
        {"polygons": None, "mask": {"bytes": b"\x89PNGx", "path": None}},
        ":row 1",
        "row 1/mask/row 1: not a readable",
    ),
    "mask of another size": (
        {"polygons": None, "mask": mask(MASK[:5])},
        ":row 1",
        "row 1/mask/row 1: the mask is 5×12",
    ),
    "ignore is no picture": (
        {"ignore": {"bytes": b"x", "path": None}},
        ":row 1",
        '"ignore" is no PNG',
    ),
    "two points": (
        {"polygons": [[1.0, 2.0, 3.0, 4.0]]},
        ":row 1",
        "polygon 0 needs at least three points",
    ),
    "image is no picture": (
        {"image": {"bytes": b"x", "path": "b.jpg"}},
        ":row 1/image/b.jpg",
        "not a readable image .unknown format",
    ),
    "image is cut off": (
        {"image": {"bytes": CUT, "path": "b.jpg"}},
        ":row 1/image/b.jpg",
        "broken image",
    ),
    "bomb": (
        {"image": {"bytes": bomb(), "path": None}},
        ":row 1/image/row 1",
        "exceeds limit of 89478485 pixels",
    ),
    "leaves the folder": (
        {"image": {"bytes": None, "path": "../../x.png"}},
        ":row 1",
        "is not a file name inside this folder",
    ),
    "absolute": (
        {"image": {"bytes": None, "path": "/etc/passwd"}},
        ":row 1",
        "is not a file name inside this folder",
    ),
    "not there": ({"image": {"bytes": None, "path": "x.png"}}, ":row 1", "x.png is not there"),
    "repeated": ({"image": photo(60)}, ":row 1", "repeats row 0 of train.parquet"),
}


@pytest.mark.parametrize(("change", "item", "message"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_a_bad_row_is_named_and_can_be_left_out(tmp_path, arrow, change, item, message):
    good = [DOG | {"image": photo(60)}, DOG | {"image": photo(200)}]
    table = write_parquet(
        tmp_path / "own" / "a" / "train.parquet",
        [good[0], DOG | {"image": photo(7)} | change, good[1]],
    )
    with pytest.raises(DataError, match=message) as error:
        samples(tmp_path, "a")
    assert (
        f"{table}:row 1" in str(error.value)
        and "\n" not in str(error.value)
        and "0x" not in str(error.value)
    )
    assert (
        check.main(
            ["--dataset_dir", str(tmp_path), "--all", "--fix-list", str(tmp_path / "bad.jsonl")]
        )
        == 1
    )
    listed = read_skip_list(tmp_path / "bad.jsonl")
    assert [bad.item for bad in listed] == [f"own/a/train.parquet{item}"]
    found = samples(
        tmp_path, "a", LoaderOptions(LEVELS, training=False, faults=Faults(tmp_path, skip=listed))
    )
    sound = [s for s in found if s.conversations]
    assert sorted(s.image[0, 0, 0] for s in sound) == [60, 200]


def test_leaving_out_a_row_renames_no_picture(tmp_path, arrow):
    """The picture is bad and listed; the row that it is named after is listed, too."""
    broken = {"bytes": b"x", "path": None}
    rows = [{"image": broken, "query": "a"}, DOG | {"image": broken}, DOG | {"image": photo()}]
    write_parquet(tmp_path / "own" / "a" / "train.parquet", rows)
    check.main(["--dataset_dir", str(tmp_path), "--all", "--fix-list", str(tmp_path / "bad.jsonl")])
    listed = read_skip_list(tmp_path / "bad.jsonl")
    assert [bad.item for bad in listed] == [
        f"own/a/train.parquet:row 0{rest}" for rest in ("", "/image/row 0")
    ]
    assert (
        len(
            samples(
                tmp_path,
                "a",
                LoaderOptions(LEVELS, training=False, faults=Faults(tmp_path, skip=listed)),
            )
        )
        == 1
    )


def test_a_text_is_never_taken_for_a_picture_inside(tmp_path, arrow):
    write_parquet(tmp_path / "elsewhere.parquet", [DOG | {"image": photo()}])
    write_parquet(
        tmp_path / "own" / "a.parquet",
        [DOG | {"image": f"{tmp_path}/elsewhere.parquet:row 0/image/x"}],
    )
    with pytest.raises(DataError, match="absolute names and '..' are refused"):
        samples(tmp_path, "a")


def spoil(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            lambda own: spoil(write_parquet(own / "a.parquet", [DOG | {"image": photo()}])),
            "a.parquet: not a readable table",
        ),
        (
            lambda own: spoil(
                write_saved(own / "a", [DOG | {"image": photo()}]) / "data-00000-of-00001.arrow"
            ),
            "own/a: not a readable",
        ),
        (lambda own: write_parquet(own / "a.parquet", [DOG]), 'a.parquet: has no column "image"'),
        (
            lambda own: write_parquet(own / "a.parquet", [{"image": photo(), "mask": mask()}]),
            'has no column "query"',
        ),
        (
            lambda own: (write_saved(own / "a", [DOG]) / "state.json").write_text("{}"),
            'must name the "_data_files"',
        ),
        (
            lambda own: (write_saved(own / "a", [DOG]) / "state.json").write_text(
                '{"_data_files": [{"filename": "../b.arrow"}]}'
            ),
            r"'\.\./b.arrow' is not a file name inside this folder",
        ),
        (
            lambda own: (
                write_saved(own / "a" / "b", [DOG]).parent / "dataset_dict.json"
            ).write_text('{"splits": 3}'),
            'dataset_dict.json: must name the "splits"',
        ),
        (
            lambda own: write_parquet(own / "a" / "train-00001-of-00002.parquet", [DOG]),
            "train-00000-of-00002.parquet: is not there",
        ),
    ],
    ids=["cut Parquet", "cut Arrow", "image", "query", "state", "outside", "splits", "piece"],
)
def test_a_bad_table_is_one_line(tmp_path, arrow, write, message):
    write(tmp_path / "own")
    with pytest.raises(DataError, match=message) as error:
        samples(tmp_path, "a")
    assert "\n" not in str(error.value)


def test_a_table_that_was_replaced_is_noticed(tmp_path, arrow):
    path = write_parquet(
        tmp_path / "own" / "a.parquet", [DOG | {"image": photo(60 + n)} for n in range(2)]
    )
    loader = OwnData(tmp_path, "a", EVAL)
    write_parquet(path, [DOG | {"image": photo()}])
    with pytest.raises(DataError, match="is not the table it was when its rows were read"):
        loader.sample(1, np.random.default_rng(0))
    path.unlink()
    with pytest.raises(MissingDataError, match="a.parquet: does not exist"):
        loader.sample(1, np.random.default_rng(0))


def test_the_example_of_the_guide(tmp_path, monkeypatch, arrow):
    pytest.importorskip(
        "datasets", reason="the example writes with datasets (requirements-optional.txt)"
    )
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    guide = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    run_block("python", guide.split("```py\n")[1].split("```")[0], tmp_path)
    findings, _ = check.inspect_all(tmp_path / "data" / "mine", None)
    assert {f.name: (f.images, f.counts["queries"], f.counts["targets"]) for f in findings} == {
        "own:signs|train": (6, 18, 18),
        "own:signs|val": (2, 6, 6),
        "own:signs-hub|train": (6, 18, 18),
        "own:signs-hub|val": (2, 6, 6),
    }
    assert all(finding.is_clean for finding in findings)
