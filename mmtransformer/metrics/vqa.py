"""VQA accuracy: an answer beside those that people gave (Antol et al. 2015, arXiv:1505.00468)."""

import re
from collections.abc import Sequence

_NUMBERS = ("none zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(n) for n, words in enumerate(_NUMBERS) for word in words.split()}
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_FEW = 4  # answers below which no answer could be wholly right by what three others say


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """How many people gave an answer: min(n / 3, 1) of the others, averaged over leaving out each of them.

    Of fewer than four references, as questions of one's own have, it is 1 if the answer is one of them, else 0.

    Args:
        answer: What the model says.
        references: What people said, one answer a person; VQA has ten.
    """
    said, theirs = normalize_answer(answer), [normalize_answer(text) for text in references]
    same, count = theirs.count(said), len(theirs)
    if count < _FEW:
        return float(same > 0)
    return (same * min((same - 1) / 3, 1.0) + (count - same) * min(same / 3, 1.0)) / count


def normalize_answer(text: str) -> str:
    """An answer as the official evaluation compares it: without punctuation, case and articles, numbers in digits.

    Apostrophes are left out, where that has a list of contractions that lack theirs.
    """
    text = text.replace("'", "").replace("\u2019", "")
    joined = re.search(r"\d,\d", text) is not None
    for mark in _MARKS:
        beside = f"{mark} " in text or f" {mark}" in text
        text = text.replace(mark, "" if beside or joined else " ")
    words = re.sub(r"\.(?!\d)", "", text).lower().split()
    return " ".join(_DIGITS.get(word, word) for word in words if word not in ("a", "an", "the"))
