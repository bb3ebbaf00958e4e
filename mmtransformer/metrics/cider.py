"""CIDEr-D, as the official COCO caption evaluation counts it.

Vedantam, Zitnick and Parikh, "CIDEr: Consensus-based Image Description Evaluation", CVPR 2015. N-grams
are weighed by how few pictures' references have them, so the score of a caption depends on the whole set
of references: compare runs on the same set only. The official quirks are kept: the length that the
Gaussian penalty compares is the number of 2-grams, and with one picture every weight, and so the score, is 0.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from mmtransformer.metrics.bleu import ngrams

_SIGMA = 6.0
_Gram = tuple[str, ...]


def cider_d(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> np.ndarray:
    """Score every caption of a set.

    Args:
        candidates: The words of each picture's caption.
        references: The words of each picture's references, one reference at least, in the same order.

    Returns:
        One score a picture, 0 to 10; their mean is the score of the set.
    """
    cooked = [[_counts(reference) for reference in refs] for refs in references]
    frequency: Counter[_Gram] = Counter()
    for refs in cooked:
        frequency.update(set().union(*refs))
    images = math.log(len(candidates)) if candidates else 0.0
    weight = {gram: images - math.log(times) for gram, times in frequency.items()}
    scores = np.zeros(len(candidates))
    for i, (candidate, refs) in enumerate(zip(candidates, cooked, strict=True)):
        mine, norms, length = _vector(_counts(candidate).items(), weight, images)
        total = 0.0
        for ref in refs:
            total += _similarity(mine, norms, length, ref, weight)
        scores[i] = 10.0 * total / 4 / len(refs)
    return scores


def _counts(words: Sequence[str]) -> Counter[_Gram]:
    counts: Counter[_Gram] = Counter()
    for n in range(1, 5):
        counts.update(ngrams(words, n))
    return counts


def _vector(
    counts: Iterable[tuple[_Gram, int]], weight: dict[_Gram, float], unseen: float
) -> tuple[dict[_Gram, float], list[float], int]:
    vector: dict[_Gram, float] = {}
    squares = [0.0] * 4
    length = 0
    for gram, times in counts:
        value = times * weight.get(gram, unseen)
        vector[gram] = value
        n = len(gram)
        squares[n - 1] += value * value
        if n == 2:
            length += times
    return vector, [math.sqrt(square) for square in squares], length


def _similarity(
    mine: dict[_Gram, float], norms: list[float], length: int, ref: Counter[_Gram], weight: dict[_Gram, float]
) -> float:
    theirs, their_norms, their_length = _vector(ref.items(), weight, 0.0)
    products = [0.0] * 4
    for gram, value in theirs.items():  # in an order that no hash of a text changes: sums differ in their last digit
        if gram in mine:
            products[len(gram) - 1] += min(mine[gram], value) * value
    total = 0.0
    for product, a, b in zip(products, norms, their_norms, strict=True):
        if a != 0 and b != 0:
            total += product / (a * b)
    return total * math.exp(-((length - their_length) ** 2) / (2 * _SIGMA**2))
