"""Encodings are proved, or refused: no word ever becomes another one."""

import pytest

from cores.dataset.files import text
from cores.dataset.files.encodings import plausible_encodings
from cores.dataset.files.errors import DataError
from cores.dataset.files.text import read_text

WORDS = {
    "gb18030": ("汽车", "红色的杯子", "人", "电动车", "穿着蓝色衣服的男人"),
    "big5": ("汽車", "紅色的杯子", "白貓", "狗", "電動車"),
    "cp932": ("車", "赤い箱", "自動車", "リンゴ"),
    "euc_kr": ("자동차", "빨간 상자", "신호등"),
    "cp1251": ("машина", "красная коробка"),
    "cp1253": ("αυτοκίνητο",),
    "cp1256": ("سيارة",),
    "cp1252": ("café", "the dog’s bowl", "“what” is it…", "20 °C", "m²", "Straße", "niño", "été"),
}


@pytest.mark.parametrize(("encoding", "word"), [(e, w) for e, ws in WORDS.items() for w in ws])
def test_words_that_prove_their_encoding(encoding, word):
    assert list(plausible_encodings(f'{{"label": "{word}"}}'.encode(encoding))) == [encoding]


@pytest.mark.parametrize(
    ("encoding", "word"),
    [("gb18030", "猫狗"), ("cp1251", "человек"), ("cp1254", "kırmızı"), ("cp1250", "żółty")],
)
def test_words_that_could_be_others_are_refused(tmp_path, encoding, word):
    (tmp_path / "a.json").write_bytes(word.encode(encoding))
    with pytest.raises(DataError, match="a.json: is not UTF-8, and .*; save it as UTF-8"):
        read_text(tmp_path / "a.json")


def test_other_files_of_a_folder_decide(tmp_path):
    for number, word in enumerate(("猫狗", "猫", "汽车", "plain")):
        (tmp_path / f"{number}.json").write_bytes(word.encode("gbk"))
    assert [read_text(tmp_path / f"{n}.json") for n in range(3)] == ["猫狗", "猫", "汽车"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_unicode(tmp_path, encoding):
    (tmp_path / "a.json").write_bytes('{"x": "é"}'.encode(encoding))
    assert read_text(tmp_path / "a.json") == '{"x": "é"}'


def test_nothing_is_guessed_of_utf_8(tmp_path, monkeypatch):
    """Guessing is slower than all else that is done with a JSON."""
    guessed = []
    monkeypatch.setattr(text, "plausible_encodings", lambda raw: guessed.append(raw) or {})
    for number, words in enumerate(("a dog", "the naïve visitor", "汽")):
        path = tmp_path / str(number) / "a.json"
        path.parent.mkdir()
        path.write_text(words, encoding="utf-8")
        assert read_text(path) == words
    assert not guessed
