"""Words that a text must contain, as ids: how they are spelled, and what would make other words of them.

Shapes: w words, v vocabulary.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmtransformer.text.tokenizer import Tokenizer

Word = Sequence[Sequence[int]]
"""A word: the ways to spell it in tokens, one of which must come."""


@dataclass(frozen=True)
class ForcedWords:
    """The words of a text.

    Attributes:
        words: each as the ways to spell it.
        extends: (v) bool: ids that would make another word of what stands right before them ("dog", "ntains"). None
            knows of no such ids. None of them comes behind a word that has just come; and a spelling that begins with
            one ("dog" without a space) counts at the beginning of a text only.
    """

    words: Sequence[Word] = ()
    extends: Tensor | None = None

    def only_first(self, spelling: Sequence[int]) -> bool:
        """Whether a spelling counts at the beginning of a text only."""
        return self.extends is not None and bool(self.extends[spelling[0]])

    @classmethod
    def of(cls, tokenizer: Tokenizer, words: Sequence[str], vocab_size: int) -> "ForcedWords":
        """Words as a tokenizer spells them, whole.

        Args:
            tokenizer: The tokenizer.
            words: The words.
            vocab_size: Ids that the model scores, v; it may be more than the tokenizer has.

        Raises:
            ValueError: If there are no tokens for a word: a text could not hold it.
        """
        pieces = tokenizer.token_bytes()
        for word in words:
            if (read := _letters(tokenizer.decode(tokenizer.encode(word)))) != _letters(_normalized(tokenizer, word)):
                how = f'reads "{read}"' if read else "has no token for it"
                raise ValueError(f'force_words: the tokenizer cannot spell "{word}": it {how}')
        spelled = [_spellings(tokenizer, pieces, word.strip()) for word in words]
        if any(pieces[ids[-1]].endswith(b" ") for word in spelled for ids in word):
            return cls(spelled)  # CLIP's tokens say themselves where a word ends
        extends = torch.zeros(vocab_size, dtype=torch.bool)
        extends[: len(pieces)] = torch.tensor([_goes_on(piece) for piece in pieces])
        return cls(spelled, extends)


def _spellings(tokenizer: Tokenizer, pieces: Sequence[bytes], word: str) -> list[list[int]]:
    """A word's ids at the beginning of a text and inside it, where these differ."""
    first, inside = tokenizer.encode(word), tokenizer.encode(f" {word}")
    twice = b"".join(pieces[i] for i in inside).startswith(b"  ")  # ours puts a space before every text anyway
    return [first] if twice or first == inside else [first, inside]


def _normalized(tokenizer: Tokenizer, text: str) -> str:
    """A text as the tokenizer's model is given it: without capitals, say."""
    normalizer = tokenizer.backend.normalizer
    return text if normalizer is None else normalizer.normalize_str(text)


def _letters(text: str) -> str:
    """What there is to see of a text, whatever its spaces and its form of Unicode."""
    return "".join(unicodedata.normalize("NFKC", text).replace("\u2581", "").casefold().split())


def _goes_on(piece: bytes) -> bool:
    """Whether a piece of text begins inside a word, in writing with spaces between words.

    Korean particles belong behind a word, and Chinese, Japanese and Thai have no spaces: nothing is told of those.
    """
    letter = piece[:4].decode("utf-8", "ignore")[:1]
    spaced = letter < "\u0e00" or "\u1e00" <= letter < "\u2000"
    return (letter.isalnum() and spaced) or (not letter and len(piece) == 1 and 0xC3 <= piece[0] < 0xE0)
