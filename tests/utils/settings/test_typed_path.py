"""What people type, paste or drop where a path or a question may stand."""

import pytest

from cores.utils.settings.typed_path import names_a_path, refuse_no_file, typed_path


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pics").mkdir()
    for name in ("photo (1).jpg", "it's.jpg", "a dog.jpg", "pics/dog.jpg", "truck.jpg"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (r"photo\ \(1\).jpg", "photo (1).jpg"),
        ("'photo (1).jpg' ", "photo (1).jpg"),
        (r"it\'s.jpg", "it's.jpg"),
        (r"'it'\''s.jpg'", "it's.jpg"),
        ('"it\'s.jpg"', "it's.jpg"),
        ("it's.jpg", "it's.jpg"),
        ("a dog.jpg", "a dog.jpg"),
        ("file://{here}/a%20dog.jpg", "a dog.jpg"),
        ("file://localhost{here}/photo%20%281%29.jpg", "photo (1).jpg"),
        (r"pics\dog.jpg", "pics/dog.jpg"),
    ],
)
def test_a_path_as_terminals_drop_it(pictures, text, name):
    text = text.replace("{here}", str(pictures))
    assert names_a_path(text)
    assert typed_path(text).resolve() == pictures / name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pics/dgo.jpg", "did you mean dog.jpg?"),
        ("trcuk.jpg", "did you mean truck.jpg?"),
        ("pics/dgo", "no such picture"),
        (r"C:\Users\me\my dog.jpg", "Windows"),
        (r"\\server\share\a.jpg", "Windows"),
        ("https://example.com/view.jpg", "download"),
        ("https://example.com/view", "download"),
        ("file:///nowhere/a%20b.jpg", "/nowhere/a b.jpg"),
        ("/some/path", "no folder /some"),
        ("./my photos/a dgo.jpg", "no folder my photos"),
        ("赤い箱.jpg", "no such picture"),
    ],
)
def test_a_path_with_a_slip_is_one_and_says_so(pictures, text, words):
    assert names_a_path(text)
    with pytest.raises(ValueError, match="picture|address") as error:
        refuse_no_file(typed_path(text), text)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "What is a .jpg?",
        "and/or",
        "which part of the car/bus is open",
        "the thing in pics/dog.jpg",
        "segment truck.jpg",
        "don't",
        "is 3/4 of it red?",
        "'the wheel'",
        "/imgae x",
        "/undo",
        ".jpg",
        "~",
        "x" * 5000,
        "a\0b",
    ],
)
def test_a_question_stays_one(pictures, text):
    assert not names_a_path(text)


def test_a_folder_is_no_picture(pictures):
    with pytest.raises(ValueError, match="is a folder"):
        refuse_no_file(typed_path("pics"))
