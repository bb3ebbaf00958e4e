"""What counting alone can do: an n-gram model with interpolated, modified Kneser-Ney smoothing.

The baseline of language models (Chen and Goodman 1999, sections 3 and 4.1; counts at the start of texts and the
fall-back as in KenLM, Heafield et al. 2013). It counts the very ids that the model beside it reads, so their
perplexities compare.

    P(w | h) = max(c(hw) - D, 0) / c(h) + (what the discounts D leave) * P(w | h without its first id)

The longest n-grams are counted as they occur; of a shorter one it is counted how many different ids come before it
("Francisco" is frequent, but only after "San"), and how often it begins a text. All counts stand in sorted arrays:
millions of ids take seconds.

Shapes: t ids of all texts one after the other, n texts, m ids that are predicted.
"""

from collections.abc import Iterator
from typing import NamedTuple, Self

import numpy as np

_FALL_BACK = (0.5, 1.0, 1.5)  # where a small corpus' counts of counts give no discounts


class _Level(NamedTuple):
    """The n-grams of one length.

    Attributes:
        keys: (grams,) sorted: number of the n-gram without its last id, times vocab_size, plus the last id.
        gain: (grams,) what is left of each count after its discount, divided by its context's total.
        rest: (contexts,) the share that a context's discounts leave to shorter ones; 1 where nothing followed it.
    """

    keys: np.ndarray
    gain: np.ndarray
    rest: np.ndarray


class NGram:
    """An n-gram model over ids.

    Args:
        order: n, the ids of the longest n-grams.
        vocab_size: Number of ids, which share evenly what even the single ids' discounts leave.

    Raises:
        ValueError: If a number is below 1.
    """

    def __init__(self, order: int, vocab_size: int) -> None:
        if order < 1 or vocab_size < 1:
            raise ValueError(f"order ({order}) and vocab_size ({vocab_size}) must be at least 1")
        self.order, self.vocab_size = order, vocab_size
        self._levels: list[_Level] = []

    def fit(self, tokens: np.ndarray, starts: np.ndarray, loss_mask: np.ndarray) -> Self:
        """Counts texts.

        Args:
            tokens: (t,) the ids of all texts.
            starts: (n + 1,) where each text begins; the last one is t.
            loss_mask: (t,) bool, the ids that are predicted; the others (prompts) are only seen.

        Returns:
            Itself.

        Raises:
            ValueError: If loss_mask is all False, or one is outside the vocabulary.
        """
        tokens = self._checked(tokens)
        if not loss_mask.any():
            raise ValueError(f"none of the {len(tokens)} ids is in loss_mask: there is nothing to count")
        place = _places(starts)
        keys = [np.arange(self.vocab_size)]
        grams = [tokens]  # of each length, the number of the n-gram that ends at an id; -1 across a text's start
        for k in range(1, self.order):
            inside = np.flatnonzero(place >= k)
            made = grams[-1][inside - 1] * self.vocab_size + tokens[inside]
            found, number = np.unique(made, return_inverse=True)
            keys.append(found)
            grams.append(np.full(len(tokens), -1))
            grams[-1][inside] = number
        self._levels = []
        for k in range(self.order):
            begins = loss_mask & (place == k) if k + 1 < self.order else loss_mask & (place >= k)
            counts = np.bincount(grams[k][begins], minlength=len(keys[k]))
            if k + 1 < self.order:  # and one for every different id before it
                at = np.flatnonzero(loss_mask & (place > k))
                _, first = np.unique(grams[k + 1][at], return_index=True)
                counts += np.bincount(grams[k][at[first]], minlength=len(keys[k]))
            contexts = len(keys[k - 1]) if k else 1
            self._levels.append(_level(keys[k], counts, keys[k] // self.vocab_size, contexts))
        return self

    def log_probs(self, tokens: np.ndarray, starts: np.ndarray, loss_mask: np.ndarray) -> np.ndarray:
        """The natural logarithm of each predicted id's probability, (m,); the arguments are those of `fit`.

        Raises:
            ValueError: If nothing was counted yet, or an id is outside the vocabulary.
        """
        if not self._levels:
            raise ValueError("this n-gram model has counted nothing yet: call fit first")
        tokens = self._checked(tokens)
        probability = np.full(len(tokens), 1 / self.vocab_size)
        for level, context, gram in self._look_up(tokens, _places(starts)):
            known = context >= 0
            probability[known] *= level.rest[context[known]]
            seen = gram >= 0
            probability[seen] += level.gain[gram[seen]]
        return np.log(probability[loss_mask])

    def _look_up(self, tokens: np.ndarray, place: np.ndarray) -> Iterator[tuple[_Level, np.ndarray, np.ndarray]]:
        """Each length's table, with the numbers of the context before and of the n-gram at each id; -1 = unknown."""
        context = np.zeros(len(tokens), np.int64)
        for k, level in enumerate(self._levels):
            key = np.where(context >= 0, context * self.vocab_size + tokens, -1)
            at = np.minimum(np.searchsorted(level.keys, key), len(level.keys) - 1)
            gram = np.where(len(level.keys) and level.keys[at] == key, at, -1) if len(level.keys) else context * 0 - 1
            yield level, context, gram
            context = np.where(place > k, np.concatenate([[-1], gram[:-1]]), -1)

    def _checked(self, tokens: np.ndarray) -> np.ndarray:
        tokens = np.asarray(tokens, np.int64)
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            raise ValueError(
                f"ids from {tokens.min()} to {tokens.max()} were given to an n-gram model of {self.vocab_size} ids"
            )
        return tokens


def _places(starts: np.ndarray) -> np.ndarray:
    """Each id's place in its text, from 0."""
    sizes = np.diff(starts)
    return np.arange(starts[-1]) - np.repeat(starts[:-1], sizes)


def _level(keys: np.ndarray, counts: np.ndarray, context: np.ndarray, contexts: int) -> _Level:
    off = np.array([0.0, *discounts(counts)])[np.minimum(counts, 3)]
    total = np.bincount(context, weights=counts, minlength=contexts)
    left = np.bincount(context, weights=off, minlength=contexts)
    rest = np.divide(left, total, out=np.ones(contexts), where=total > 0)
    gain = np.divide(counts - off, total[context], out=np.zeros(len(keys)), where=total[context] > 0)
    return _Level(keys, gain, rest)


def discounts(counts: np.ndarray) -> tuple[float, float, float]:
    """What is taken off counts of 1, of 2, and of 3 and more, from how many there are of 1 to 4 (Chen and Goodman)."""
    n1, n2, n3, n4 = (int((counts == c).sum()) for c in (1, 2, 3, 4))
    if min(n1, n2, n3) == 0:
        return _FALL_BACK
    y = n1 / (n1 + 2 * n2)
    found = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    if not all(0 <= d <= c for c, d in enumerate(found, 1)):
        return _FALL_BACK
    return found
