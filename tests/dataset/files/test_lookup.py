"""Names become the files that are meant, or an error; photos keep names of their own."""

import copy

import pytest

from cores.dataset.files.errors import DataError, MissingDataError
from cores.dataset.files.lookup import Identities, Lookup, parse_name


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("name", "parts", "is_foreign"),
    [
        ("a.jpg", ("a.jpg",), False),
        ("./x//a.jpg", ("x", "a.jpg"), False),
        ("x\\a.jpg", ("x", "a.jpg"), False),
        ("C:\\x\\a.jpg", ("x", "a.jpg"), True),
        ("/x/a.jpg", ("x", "a.jpg"), True),
        ("../x/a.jpg", ("x", "a.jpg"), True),
        ("x/../../a.jpg", ("a.jpg",), True),
        ("https://h.org/x/a%20b.jpg?t=1#f", ("x", "a b.jpg"), True),
        ("s3://bucket/x/a.jpg", ("x", "a.jpg"), True),
        ("/data/local-files/?d=x%5Ca.jpg", ("x", "a.jpg"), True),
        (" ", (), False),
        ("..", (), True),
    ],
)
def test_parts_of_a_name(name, parts, is_foreign):
    assert parse_name(name) == (parts, is_foreign)


def test_the_nearest_place_and_the_exact_name_count_first(tmp_path):
    touch(tmp_path, "one/a.jpg", "two/a.jpg", "two/A.jpg", "two/b.png")
    lookup = Lookup([tmp_path / "one", tmp_path / "two"])
    assert lookup.find("a.jpg") == tmp_path / "one" / "a.jpg"
    assert lookup.find("A.jpg") == tmp_path / "two" / "A.jpg"
    assert lookup.find("b.jpg") == tmp_path / "two" / "b.png"
    assert lookup.missing(["a.jpg", "b.jpg", "c.jpg"]).keys() == {"c.jpg"}
    assert copy.copy(lookup).find("B.PNG") == tmp_path / "two" / "b.png"


def test_folders_in_front_that_the_place_repeats(tmp_path):
    place = touch(tmp_path, "coco/train2017/a.jpg") / "coco" / "train2017"
    assert Lookup([place]).find("coco/train2017/a.jpg") == place / "a.jpg"
    assert Lookup([place]).find("Train2017\\a.JPG") == place / "a.jpg"
    with pytest.raises(MissingDataError, match="val2017/a.jpg is not there; looked in"):
        Lookup([place]).find("val2017/a.jpg")
    assert Lookup([place], by_base=True).find("val2017/a.jpg") == place / "a.jpg"


def test_what_could_be_several_files_is_refused(tmp_path):
    touch(tmp_path, "a.png", "a.webp", "B.jpg", "b.JPG")
    for name in ("a.jpg", "b.jpg"):
        with pytest.raises(DataError, match="may both be meant by"):
            Lookup([tmp_path]).find(name)
    with pytest.raises(MissingDataError):  # A mask is no photo of another ending.
        Lookup([tmp_path], any_ending=False).find("a.jpg")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "/", "../../x.jpg", "a\0.jpg", "\ud800", "x" * 999]
)
def test_names_of_no_file(tmp_path, name):
    touch(tmp_path.parent, "x.jpg")
    with pytest.raises(DataError) as caught:
        Lookup([touch(tmp_path, "a.jpg").resolve()]).find(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["x/a.jpg", "b.jpg"], ["a", "b"]),
        (["cam1/1.jpg", "cam2/1.jpg", "cam2/2.jpg"], ["cam1/1", "cam2/1", "2"]),
        (["/r/images/cam1/1.jpg", "/r/images/cam2/1.jpg"], ["cam1/1", "cam2/1"]),
        (["1.jpg", "cam/1.jpg"], ["1", "cam/1"]),
        (["a.jpg", "a.png"], ["a.jpg", "a.png"]),
        (["a.jpg", "a.png", "a.jpg.png"], ["a.jpg", "a.png", "a.jpg.png"]),
    ],
)
def test_identities(names, expected):
    identities = Identities(names)
    assert [identities.of(name) for name in names] == expected
