"""What `check` finds wrong with captions."""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Protocol

from mmtransformer.data.loading.source import Caption, Pairs
from mmtransformer.text.markup import find_markup

Kind = tuple[str, list[str], int, bool, str]
"""What, the offenders, out of how many, whether it may hurt, remedy."""
_HTML = "--normalize html (data.read.normalize) puts the characters in their place and takes tags out"


class TokenizerLike(Protocol):
    """What a check needs of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        ...


def caption_kinds(
    splits: Mapping[str, Pairs],
    captions: dict[str, list[list[Caption]]],
    tokenizer: TokenizerLike | None,
    max_len: int,
    around: int,
) -> list[Kind]:
    """What is wrong with captions, those of all splits together.

    Args:
        splits: The pairs of each.
        captions: Of each split, those of its pictures.
        tokenizer: Counts their tokens; None counts words.
        max_len: The most tokens of a caption.
        around: How many of these are taken by what stands around it.
    """
    room, unit, total = max_len - around, "tokens" if tokenizer else "words", 0
    cut: list[str] = []
    short: list[str] = []
    html: list[str] = []
    again: list[str] = []
    lost: list[str] = []
    unknown: dict[str | None, list[str]] = defaultdict(list)
    words = Counter()
    unk_id = getattr(tokenizer, "unk_id", None)
    for name, groups in captions.items():
        for i, group in enumerate(groups):
            often = Counter(text for text, _, asked in group if not asked)
            again += [f"{splits[name].name(i)}: {text[:60]!r}, {n} times" for text, n in often.items() if n > 1]
            for text, language, asked in group:
                total += 1
                parts = text.split()
                ids = tokenizer.encode(text) if tokenizer else None
                count = len(parts if ids is None else ids)
                words[language] += len(parts)
                if tokenizer and ids and unk_id in ids:
                    some = (word for word in parts if unk_id in tokenizer.encode(word))
                    unknown[language] += [f"{splits[name].name(i)}: {word[:60]!r}" for word in some]
                if count > room:
                    cut.append(f"{splits[name].name(i)}: {count} {unit}: {text[:60]}...")
                if (sign := find_markup(text)) is not None:
                    html.append(f"{splits[name].name(i)}: {sign} in {text[:60]!r}")
                if "\ufffd" in text:
                    lost.append(f"{splits[name].name(i)}: {text[:60]!r}")
                if _says_little(text) and not asked:
                    short.append(f"{splits[name].name(i)}: {text!r}")
    remedy = f"raise max_len ({max_len}) or split them into sentences"
    write = "words that the tokenizer has no tokens for, and the model cannot learn"
    other = "start from a model that knows these letters, or train one whose tokenizer is made of these captions"
    return [
        *((write + (f", in {code}" if code else ""), some, words[code], True, other) for code, some in unknown.items()),
        (f"captions longer than {room} {unit}, to be cut", cut, total, True, remedy),
        ("captions that say next to nothing", short, total, True, "rewrite them"),
        ("captions with letters that were lost (U+FFFD)", lost, total, True, "save them in UTF-8 from where they came"),
        ("captions that a picture has several times", again, total, False, "leave one of each, or they weigh more"),
        ("captions with HTML or marks in them, which a model would learn to write", html, total, False, _HTML),
    ]


def _says_little(text: str) -> bool:
    """No letter or digit at all, or a single one that isn't a word by itself, as one syllable of Korean can be."""
    letters = [char for char in text if char.isalnum()]
    return not letters or (len(letters) == 1 and unicodedata.east_asian_width(letters[0]) not in "WF")
