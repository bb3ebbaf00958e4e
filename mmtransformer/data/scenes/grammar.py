"""Captions of a scene in any of the languages: writing them, and reading them back.

Every caption that is written names all groups (count, size, colour, fill, shape) and all relations of its scene; a
fill that is not named means "solid". Reading is tolerant: what it does not understand, it leaves out, and no text
makes it fail.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

from mmtransformer.data.scenes import english, korean
from mmtransformer.data.scenes.meaning import Facts, Phrase
from mmtransformer.data.scenes.world import Scene

MAX_PHRASINGS = 4  # so many different captions every scene has in every language


class Language(NamedTuple):
    """One language: the sentence patterns that fit a scene, and the reader of captions."""

    phrases: Callable[[Scene], list[Phrase]]
    parse: Callable[[str], Facts]


LANGUAGES = {"en": Language(english.phrases, english.parse), "ko": Language(korean.phrases, korean.parse)}


def describe(scene: Scene, language: str, phrasings: int, rng: random.Random) -> list[str]:
    """Different true captions of one scene.

    Args:
        scene: what to describe.
        language: "en" or "ko".
        phrasings: how many, at most `MAX_PHRASINGS`.
        rng: the source of chance for the choice of words.

    Raises:
        ValueError: an unknown language, or a number of phrasings out of range.
    """
    if not 1 <= phrasings <= MAX_PHRASINGS:
        raise ValueError(f"phrasings must be 1 to {MAX_PHRASINGS}, got {phrasings}")
    patterns = _language(language).phrases(scene)
    texts: dict[str, None] = {}
    while len(texts) < phrasings:
        for phrase in rng.sample(patterns, len(patterns)):
            if len(texts) < phrasings:
                texts[phrase(scene, rng)] = None
    return list(texts)


def parse(caption: str, language: str) -> Facts:
    """What a caption says, as far as it can be understood; never fails on a text.

    Raises:
        ValueError: an unknown language.
    """
    return _language(language).parse(caption)


def _language(code: str) -> Language:
    if code not in LANGUAGES:
        raise ValueError(f"no grammar for language {code!r}; there are {', '.join(LANGUAGES)}")
    return LANGUAGES[code]
