"""In which encoding a text is that is not UTF-8: proved from its letters, or refused.

Bytes of one encoding are often valid in several others, where they are other words. An encoding is
plausible if all that it makes of the bytes is usual in its languages: Latin letters inside words,
Chinese characters of the common half of the national standard, Korean syllables that are frequent.
A text is read only if exactly one encoding is plausible.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable

BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_OPENING, _CLOSING, _DASHES = set("‘‚“„‹«¡¿"), set("’”›»…"), set("–—\u00a0")
_SIGNS = set("€™§©®°±²³µ¹º¼½¾×£¥")  # only by themselves, as in 20° or m²
_LATIN = re.compile(r"[A-Za-zÀ-ÖØ-öø-ÿŠšŽžŒœŸ]+")
_TURKISH = re.compile(r"[A-Za-zÀ-ÖØ-öø-ÿŠšŒœŸıİşŞğĞ]+")
_WORDS_OF_ONE_LETTER = set("àÀéÉèÈáÁóÓíÍúÚåÅöÖøØæÆ")
# The syllables that make up most of Korean text.
_FREQUENT_HANGUL = set(
    "가각간갈감갑강같개거건걸검것게겨격견결경계고곡곤골공과관광교구국군권규그극근글금급기긴길김까꽃"
    "끄끝나난날남납내너널네녀년념노녹논놀농높누눈느는늘능니님다단달담답당대더덕던도독돈돌동되된두둘"
    "드든들등디따때또라락란람랑래량러런럼레려력련령로록론료루류르른를름리린림마막만많말망매머먹면명모"
    "목몸못무문물미민밀바박반받발밤방배백번법벽변별병보복본봉부북분불붉비빛빨사산살삼상새색생서석선설"
    "섬성세소속손송수숙순술숨스습승시식신실심십싸쓰씨아안않알암압앞애액야약양어언얼엄업없에여역연열염"
    "영예오온올옷와왕왜외요욕용우운울움원월위유육율은을음응의이익인일임입있자작잔잘잠장재저적전절점정"
    "제조족존종좋죄주준줄중즉증지직진질집짜차착찬창채책처천철첫청체초촌총최추축출충치친칠칼커컴컵코크"
    "큰키타탁탄탈태터털테토통투트특파판팔패퍼페편평포폭표품풍프플피필하학한할함합항해행향허헌현형호혹"
    "홍화확환활황회획효후훈휴흐흑흔희흰히힘차개람빨노란의자동물컵책상"
)


def _is_latin(text: str, letters: re.Pattern = _LATIN) -> bool:
    """Western European text: every accented letter is in a word with plain ones, and every sign
    stands where signs stand."""
    for word in letters.findall(text):
        if word.isascii():
            continue
        plain = sum(letter.isascii() for letter in word)
        is_cased = word.islower() or word.isupper() or word[1:].islower()
        if len(word) == 1:
            if word not in _WORDS_OF_ONE_LETTER:
                return False
        elif not is_cased or not plain or plain * 2 < len(word) - 1:
            return False
    for before, sign, after in zip(f" {text}", text, f"{text[1:]} ", strict=False):
        if sign.isascii() or letters.fullmatch(sign):
            continue
        touches = not before.isascii() or not after.isascii()
        if not (
            (sign in _OPENING and not before.isalnum())
            or (sign in _CLOSING and (not after.isalnum() or (sign == "’" and before.isalnum())))
            or (sign in _DASHES and not touches)
            or (sign in _SIGNS and not touches)
        ):
            return False
    return True


def _is_turkish(text: str) -> bool:
    # Bytes that only Turkish and Icelandic have; without one, the text is that of Windows-1252.
    return bool(set(text) & set("ıİşŞğĞ")) and _is_latin(text, _TURKISH)


def _is_chinese(encoding: str, common: range, signs: tuple[int, ...]) -> Callable[[str], bool]:
    """The test for a two-byte standard, whose rows ``common`` have its usual characters."""

    def test(text: str) -> bool:
        found = 0
        for character in text:
            if character.isascii():
                continue
            try:
                row = character.encode(encoding)[0]
            except UnicodeEncodeError:
                return False
            if row in common and "一" <= character <= "鿿" and _is_usual(character):
                found += 1
            elif row not in signs:
                return False
        # A letter of Latin text swallows the one behind it; Chinese has no small letters beside it.
        return found > 0 and (encoding == "gb2312" or not _TOUCHES_SMALL.search(text))

    return test


_TOUCHES_SMALL = re.compile(r"[a-z][^\x00-\x7f]|[^\x00-\x7f][a-z]")


def _is_usual(character: str) -> bool:
    """Not one of the rare half of the characters that simplified Chinese has; traditional ones,
    which it has not, may be usual."""
    try:
        return character.encode("gb2312")[0] < 0xD8
    except UnicodeEncodeError:
        return True


def _is_japanese(text: str) -> bool:
    kana = [c for c in text if "ぁ" <= c <= "ヿ"]
    others = [c for c in text if not c.isascii() and not "ぁ" <= c <= "ヿ"]
    rows = [c.encode("cp932")[0] for c in others]
    return (
        bool(kana or any(row != 0x81 for row in rows))
        and all(0x88 <= row <= 0x98 or row == 0x81 for row in rows)
        and not _TOUCHES_SMALL.search(text)
    )


def _is_korean(text: str) -> bool:
    letters = {c for c in text if not c.isascii()}
    return letters <= _FREQUENT_HANGUL


def _words(letters: str, word: str) -> Callable[[str], bool]:
    """The test that all foreign characters are ``letters`` in words like ``word`` (regular
    expressions), without Latin letters in them."""
    run, whole = re.compile(rf"[A-Za-z{letters}]*[{letters}][A-Za-z{letters}]*"), re.compile(word)

    def test(text: str) -> bool:
        found = run.findall(text)
        return (
            run.sub("", text).isascii()
            and all(map(whole.fullmatch, found))
            and max(map(len, found), default=0) > 2
        )

    return test


_RUSSIAN = _words(
    "А-яЁё",
    r"[ВСКУОИАЯвскуоиая]|(?=.*[аеёиоуыэюяАЕЁИОУЭЮЯ])(?!.*[бвгджзйклмнпрстфхцчшщъь]{5})"
    r"[А-ЯЁа-яё][а-яё]+",
)
_GREEK = _words("Ά-ώ", r"[ΑΟΗΩαοη]|(?=[^άέήίόύώ]*[άέήίόύώΆΈΉΊΌΎΏ][^άέήίόύώ]*$)[Ά-ώ][ά-ώ]+")
_HEBREW = _words("א-ת", r"[אבגדהוזחטיכלמנסעפצקרשת]*[א-ת]")
_ARABIC = _words("ء-ي", r"(?:(?![ةى])[ء-غف-ي])+[ةى]?")
# A vowel before or after a consonant, a tone above; letters that are rare are left out.
_THAI = _words("ก-๛", r"(?!.*[ก-ฮ]{4})(?:[เ-ไ]?(?![ฃฅฆฌฎฏฐฑฒฤฦฬ])[ก-ฮ](?:[ัิ-ฺ็]?[่-๎]?|[่-๋]?[ะาำ]))+")

# (its name in Python, its name in messages, whether a text that it gives is plausible)
CANDIDATES: tuple[tuple[str, str, Callable[[str], bool]], ...] = (
    ("cp1252", "Windows-1252", _is_latin),
    ("gb18030", "GB18030", _is_chinese("gb2312", range(0xB0, 0xD8), (0xA1, 0xA3))),
    ("big5", "Big5", _is_chinese("big5", range(0xA4, 0xC7), (0xA1,))),
    ("cp932", "Shift-JIS", _is_japanese),
    ("euc_kr", "EUC-KR", _is_korean),
    ("cp1251", "Windows-1251", _RUSSIAN),
    ("cp1253", "Windows-1253", _GREEK),
    ("cp1254", "Windows-1254", _is_turkish),
    ("cp1255", "Windows-1255", _HEBREW),
    ("cp1256", "Windows-1256", _ARABIC),
    ("cp874", "Windows-874", _THAI),
)


def marked_encoding(raw: bytes) -> str | None:
    """The encoding that the start of a file declares, by a byte order mark or by its zeros."""
    if marked := next((name for mark, name in BOMS if raw.startswith(mark)), None):
        return marked
    if len(raw) > 3 and raw.count(b"\0", 0, 4) == 2:
        # Of the first two characters, which are ASCII in JSON and tables, every second byte.
        return {(1, 3): "utf-16-le", (0, 2): "utf-16-be"}.get(
            tuple(i for i in range(4) if not raw[i])  # type: ignore[arg-type]
        )
    return None


def proves_little(text: str) -> bool:
    """Whether a text that was read as UTF-8 has hardly more than ASCII: one or two letters without
    others beside them."""
    foreign = re.findall(r"\w*[^\W\x00-\x7f]\w*", text) if not text.isascii() else []
    return bool(foreign) and all(len(word) < 3 and not re.search("[a-z]", word) for word in foreign)


def plausible_encodings(raw: bytes) -> dict[str, str]:
    """Encoding -> its name and a word that it gives, for messages, of all that are plausible for
    bytes that are not UTF-8."""
    found = {}
    for encoding, title, is_plausible in CANDIDATES:
        try:
            text = raw.decode(encoding)
        except UnicodeDecodeError:
            continue
        if is_plausible(text):
            found[encoding] = f'{title} ("{_sample(text)}")'
            if encoding == "euc_kr" and len({c for c in text if not c.isascii()}) >= 3:
                # Hardly any Chinese text happens to have frequent syllables only.
                found = {name: shown for name, shown in found.items() if name == encoding}
    return found


def _sample(text: str) -> str:
    """The first words with letters beyond ASCII, in one line."""
    found = re.search(r"[^\W\d_]*[^\x00-\x7f][^\x00-\x1f\"\\]{0,15}", text)
    return " ".join(found[0].split())[:16] if found else ""
