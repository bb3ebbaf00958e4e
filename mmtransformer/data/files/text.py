"""Text out of users' files: decoding by line, white space, missing values, languages."""

import hashlib
import re
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

# what spreadsheets and data frames write for a missing cell; as a caption it would be learnt as a word
MISSING = frozenset(("", "na", "n/a", "#n/a", "<na>", "nan", "null", "none", "nil"))
LANGUAGES = {
    "korean": "ko", "kor": "ko", "kr": "ko", "한국어": "ko", "한글": "ko", "국문": "ko",
    "english": "en", "eng": "en", "영어": "en", "영문": "en",
    "japanese": "ja", "chinese": "zh", "german": "de", "french": "fr", "spanish": "es",
}  # fmt: skip
# endings of column names that say a language; "id" and "no" are left out, for "caption_id" and "caption_no"
CODES = frozenset(
    (
        *("ar", "bg", "bn", "cs", "da", "de", "el", "en", "es", "et", "fa", "fi", "fr", "he", "hi"),
        *("hr", "hu", "it", "ja", "ko", "lt", "lv", "ms", "nl", "pl", "pt", "ro", "ru", "sk", "sl"),
        *("sr", "sv", "sw", "ta", "te", "th", "tr", "uk", "ur", "vi", "zh"),
    )
)
SPLITS = {
    "train": "train", "training": "train", "trn": "train", "restval": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val", "eval": "val", "evaluation": "val",
    "test": "test", "testing": "test", "tst": "test",
    "학습": "train", "훈련": "train", "트레이닝": "train", "트레인": "train", "검증": "val", "밸리데이션": "val",
    "벨리데이션": "val", "평가": "test", "시험": "test", "테스트": "test",
    "训练": "train", "訓練": "train", "学習": "train", "验证": "val", "驗證": "val", "検証": "val",
    "测试": "test", "測試": "test", "評価": "test", "テスト": "test",
}  # fmt: skip
_BEHIND = ("용", "셋", "세트", "데이터", "데이터셋", "用", "集", "データ", "セット")  # 학습용, 训练集
SPLITS |= {name + end: split for name, split in SPLITS.items() if not name.isascii() for end in _BEHIND}


CONTROLS = "control characters in texts, such as NUL, taken out"
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")  # those that are no white space


# letters of each language, and their share of a line: kanji stand between kana, and Korean bytes make none of these
_GUESSES = (
    ("Shift-JIS, Japanese Windows", "cp932", r"[ぁ-んァ-ヶ]", 0.2),
    ("CP949, Korean Windows", "cp949", "[가-힣]", 0.6),
    ("GB18030, Chinese Windows", "gb18030", r"[一-鿿，。]", 0.6),
)


class Line(NamedTuple):
    """One line of a text file: its number from 1, and its text, or None where it isn't valid text."""

    number: int
    text: str | None
    hint: str = ""


def lines(data: bytes) -> Iterator[Line]:
    """Decodes a text file line by line, so that one bad byte costs one line and is found by its number.

    UTF-8 and UTF-16, with or without a byte order mark. Lines end with LF, CR LF or, in a file that has
    no LF at all, CR; never at the other characters that `str.splitlines` cuts at.
    """
    if (wide := utf_16(data)) is not None:
        data = data.decode(wide, "replace").encode("utf-8")
    data = data.removeprefix(b"\xef\xbb\xbf")
    end = b"\n" if b"\n" in data or b"\r" not in data else b"\r"
    raw = data.split(end)
    if raw[-1] == b"":
        raw.pop()
    for number, line in enumerate(raw, 1):
        line = line.removesuffix(b"\r")
        try:
            yield Line(number, line.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield Line(number, None, _encoding(line, error))


def utf_16(data: bytes) -> str | None:
    """Which UTF-16 a text is in, by its mark, or by the zeros beside its first two letters; None of any other."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    zeros = bytes(byte == 0 for byte in data[:4])
    return {b"\0\1\0\1": "utf-16-le", b"\1\0\1\0": "utf-16-be"}.get(zeros)


def guess_encoding(data: bytes) -> tuple[str, str]:
    """The encoding that most letters of what is not UTF-8 would make sense in: what it is called, and its name."""
    for title, codec, letters, share in _GUESSES:
        text = data.decode(codec, "replace")
        foreign = [char for char in text if not char.isascii()]
        if len(foreign) > 1 and len(re.findall(letters, text)) > share * len(foreign):
            return title, codec
    return "Latin-1", "latin-1"


def _encoding(line: bytes, error: UnicodeDecodeError) -> str:
    """What is wrong with a line, and the encoding that it may be in."""
    guess, name = guess_encoding(line)
    return (
        f"byte 0x{line[error.start]:02x} at column {error.start + 1} (it may be {guess}): save the file as UTF-8, or "
        f"say --encoding {name} (in `mmt fit`: --data.read.encoding {name}; in Python: "
        f"read=ReadOptions(encoding='{name}'))"
    )


def normalize_text(text: str) -> str:
    """One line of composed Unicode without control characters, and single spaces."""
    text = text if text.isascii() else unicodedata.normalize("NFC", text.replace("\ufeff", " "))
    text = " ".join(text.split())
    return text if text.isprintable() else " ".join(without_controls(text).split())


def without_controls(text: str) -> str:
    """A text without control characters; white space stays."""
    return _CONTROLS.sub("", text)


def shown_controls(text: str) -> str | None:
    """The part of a text around its first control character that is no white space, escapes written out; None if it has
    none.
    """
    found = _CONTROLS.search(text)
    return None if found is None else repr(text[max(found.start() - 30, 0) : found.start() + 30])


def is_missing(text: str) -> bool:
    """Whether a normalised text stands for "no value"."""
    return len(text) <= 6 and text.casefold() in MISSING


def is_broken(text: str) -> bool:
    """Whether a text holds half of a surrogate pair, as JSON can, which no encoder takes."""
    return not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text)


def language_code(name: str) -> str | None:
    """Returns the code of a language, ko for "Korean", "ko-KR" and "ko"; None for an empty cell.

    Raises:
        ValueError: If the name is neither empty nor a language.
    """
    key = name.strip().casefold()
    if is_missing(key):
        return None
    key = LANGUAGES.get(key, re.split("[-_]", key)[0])
    if not re.fullmatch("[a-z]{2,3}", key):
        raise ValueError(f"{name!r} is not a language code such as en or ko")
    return key


def is_korean(text: str) -> bool:
    """Whether a caption is Korean: a syllable of Hangul counts as much as three Latin letters."""
    if text.isascii():
        return False
    hangul = sum("가" <= char <= "힣" or "ㄱ" <= char <= "ㅣ" for char in text)
    return hangul > 0 and 3 * hangul >= sum(char.isascii() and char.isalpha() for char in text)


def split_word(name: str) -> str | None:
    """The split that a file or folder name says, such as "captions_train2017.json": train; None if it says none."""
    found = {SPLITS[word] for word in re.findall("[a-z가-힣぀-ヿ一-鿿]+", name.casefold()) if word in SPLITS}
    return found.pop() if len(found) == 1 else None


def hash_share(name: str) -> float:
    """A number in [0, 1) that only depends on the name: whether what is so called goes to val."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64
