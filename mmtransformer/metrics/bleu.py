"""BLEU-1 to BLEU-4 of a set of captions, as the official COCO caption evaluation counts it.

Papineni et al., "BLEU: a Method for Automatic Evaluation of Machine Translation", ACL 2002. The numbers
of one caption add up to the numbers of the set, so any resampled set is one matrix product away.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

# The official scorer's guards against empty captions; they are visible in the twelfth digit.
_SMALL, _TINY = 1e-9, 1e-15


def bleu_statistics(candidate: Sequence[str], references: Sequence[Sequence[str]]) -> list[int]:
    """Count what BLEU needs to know of one caption.

    Args:
        candidate: The words of the caption.
        references: The words of each reference, one reference at least.

    Returns:
        Ten numbers: words of the caption, words of the reference that is closest in length (the shorter
        one of two), how many 1- to 4-grams the caption has, and how many of those are in the references
        (each at most as often as in the one reference that has it most).
    """
    length = len(candidate)
    closest = min((abs(len(reference) - length), len(reference)) for reference in references)[1]
    row = [length, closest, *(max(0, length - k) for k in range(4))]
    for n in range(1, 5):
        mine = Counter(ngrams(candidate, n))
        correct = 0
        if mine:
            best: dict[tuple[str, ...], int] = {}
            for reference in references:
                for gram, times in Counter(ngrams(reference, n)).items():
                    if gram in mine and times > best.get(gram, 0):
                        best[gram] = times
            correct = sum(min(times, best.get(gram, 0)) for gram, times in mine.items())
        row.append(correct)
    return row


def bleu(sums: np.ndarray) -> np.ndarray:
    """Turn counts into BLEU.

    Args:
        sums: The ten numbers of ``bleu_statistics`` in the last dimension, summed over a set of captions
            (the score of the set) or not summed (the score of each caption).

    Returns:
        BLEU-1, -2, -3 and -4 in the last dimension, as fractions of 1.
    """
    sums = np.asarray(sums, dtype=np.float64)
    length, closest, guessed, correct = sums[..., 0], sums[..., 1], sums[..., 2:6], sums[..., 6:10]
    precision = np.cumprod((correct + _TINY) / (guessed + _SMALL), axis=-1) ** (1.0 / np.arange(1, 5))
    ratio = (length + _TINY) / (closest + _SMALL)
    brevity = np.exp(np.minimum(0.0, 1.0 - 1.0 / ratio))
    return precision * brevity[..., None]


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """List the n-grams of a caption, in order."""
    return list(zip(*(words[k:] for k in range(n)), strict=False))
