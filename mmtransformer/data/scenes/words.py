"""One fact of a group as a word or two: the short answers of `SceneDocuments`, in English and Korean."""

from typing import Literal

from mmtransformer.data.scenes import english, korean
from mmtransformer.data.scenes.korean import COLOR_WORDS, SHAPE_WORDS
from mmtransformer.data.scenes.world import Group

Fact = Literal["color", "shape", "count", "size", "fill"]
_COUNTS = {"en": english.NUMBERS, "ko": korean.NUMBERS}
_SIZES = {"small": "작다", "large": "크다"}
_FILLS = {"solid": "꽉 찬", "striped": "줄무늬", "dotted": "점무늬", "outlined": "속이 빈"}


def say(group: Group, fact: Fact, language: str) -> str:
    """One fact of a group: "red", "star", "three", "small", "striped"; "빨간색", "별", "셋", "작다", "줄무늬".

    Args:
        group: what to speak of.
        fact: what to say of it.
        language: "en" or "ko".
    """
    if fact == "count":
        return _COUNTS[language][group.count]
    word = getattr(group, fact)
    if language == "en":
        return word
    if fact == "color":
        return COLOR_WORDS[word] if COLOR_WORDS[word].endswith("색") else f"{COLOR_WORDS[word]}색"
    return {"shape": SHAPE_WORDS, "size": _SIZES, "fill": _FILLS}[fact][word]
