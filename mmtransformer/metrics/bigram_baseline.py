"""Guessing a hidden token from how often tokens stand beside each other: the baseline of masked language models.

    unigram    the most frequent token, always
    bigram     the likeliest between its two neighbours: P(w | left) P(w | right) / P(w), as if the neighbours did not
               know of each other; a neighbour that is hidden too says nothing

Shapes: t ids of all texts one after the other, n texts, m hidden tokens, v vocabulary.
"""

from typing import Self

import numpy as np


class BigramBaseline:
    """Counts pairs of tokens side by side, and guesses hidden ones from both neighbours.

    Args:
        vocab_size: Number of ids v.
        strength: How many sightings of a neighbour weigh as much as the tokens' own frequencies.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(self, vocab_size: int, strength: float = 1.0) -> None:
        if vocab_size < 1 or strength <= 0:
            raise ValueError(f"vocab_size ({vocab_size}) must be at least 1 and strength ({strength}) above 0")
        self.vocab_size, self.strength = vocab_size, strength

    def fit(self, tokens: np.ndarray, starts: np.ndarray, loss_mask: np.ndarray) -> Self:
        """Counts texts.

        Args:
            tokens: (t,) the ids of all texts, what opens and ends them included.
            starts: (n + 1,) where each text begins; the last one is t.
            loss_mask: (t,) bool, the ids that may be hidden; the others are only neighbours.

        Returns:
            Itself.

        Raises:
            ValueError: If loss_mask is all False.
        """
        tokens = np.asarray(tokens, np.int64)
        if not loss_mask.any():
            raise ValueError(f"none of the {len(tokens)} ids is in loss_mask: there is nothing to count")
        counts = np.bincount(tokens[loss_mask], minlength=self.vocab_size).astype(float)
        self.unigram = int(counts.argmax())
        """The most frequent id."""
        self._share = counts / counts.sum()
        place = np.arange(len(tokens)) - np.repeat(starts[:-1], np.diff(starts))
        after = np.flatnonzero(loss_mask & (place > 0))
        last = np.zeros(len(tokens), bool)
        last[starts[1:] - 1] = True
        before = np.flatnonzero(loss_mask & ~last)
        self._beside = (
            _Table(tokens[after - 1], tokens[after], self.vocab_size),  # what follows a left neighbour
            _Table(tokens[before + 1], tokens[before], self.vocab_size),  # what stands before a right one
        )
        return self

    def predict(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """The bigrams' guesses.

        Args:
            left: (m,) the token before each hidden one; below 0 = it is hidden too, or there is none.
            right: (m,) the token after it.

        Returns:
            (m,) ids.
        """
        pairs, where = np.unique(np.stack([left, right], axis=1), axis=0, return_inverse=True)
        found = np.array([self._likeliest(int(a), int(b)) for a, b in pairs], np.int64)
        return found[where.reshape(-1)]

    def _likeliest(self, left: int, right: int) -> int:
        score = self._share.copy()
        for neighbour, table in zip((left, right), self._beside, strict=True):
            if neighbour < 0:
                continue
            ids, counts = table.of(neighbour)
            # P(w | neighbour) / P(w), up to a factor that is the same for all w: 1 where the two were never seen.
            score[ids] *= 1 + counts / (self.strength * self._share[ids])
        return int(score.argmax())


class _Table:
    """How often each id stands beside each neighbour, sorted by neighbour."""

    def __init__(self, neighbours: np.ndarray, ids: np.ndarray, vocab_size: int) -> None:
        keys, self._counts = np.unique(neighbours * vocab_size + ids, return_counts=True)
        self._ids = keys % vocab_size
        self._starts = np.searchsorted(keys // vocab_size, np.arange(vocab_size + 1))

    def of(self, neighbour: int) -> tuple[np.ndarray, np.ndarray]:
        where = slice(self._starts[neighbour], self._starts[neighbour + 1])
        return self._ids[where], self._counts[where]
