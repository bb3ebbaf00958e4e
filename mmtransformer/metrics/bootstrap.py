"""Confidence intervals and a paired test by resampling pictures, from statistics kept for each picture.

A score of a set is a function of sums over its pictures (BLEU: counts; CIDEr-D: score and 1). So the
scores of 1000 resampled sets are one matrix product: how often each picture was drawn, times its statistics.

Shapes: n pictures, s statistics of a picture, r resamples, m scores.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# (... s) sums over pictures -> (... m) scores.
Combine = Callable[[np.ndarray], np.ndarray]

_BLOCK = 4_000_000  # draws held at once


@dataclass(frozen=True)
class Comparison:
    """The difference between two runs on the same pictures: the second minus the first.

    Args:
        difference: The second score minus the first.
        low: Lower end of the 95 % interval of the difference, pictures resampled together.
        high: Upper end.
        p_value: How often a difference of this size, either way, would come from swapping the two runs'
            captions at random, picture by picture, if the runs were equally good.
    """

    difference: float
    low: float
    high: float
    p_value: float


def bootstrap_intervals(
    statistics: np.ndarray, combine: Combine, *, n_resamples: int = 1000, seed: int = 0, confidence: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Resample pictures with replacement and return the middle range of the scores.

    Args:
        statistics: (n s), what each picture adds to the sums.
        combine: Turns sums (... s) into scores (... m).
        n_resamples: How many sets to draw.
        seed: The same seed gives the same intervals.
        confidence: Share of the resampled scores between the two ends.

    Returns:
        Lower and upper ends, (m) each.

    Raises:
        ValueError: If there is no picture, fewer than 2 resamples, or a confidence outside 0 to 1.
    """
    _check(len(statistics), n_resamples, confidence)
    scores = combine(_drawn_sums(statistics, n_resamples, seed))
    tail = (1 - confidence) / 2
    low, high = np.quantile(scores, [tail, 1 - tail], axis=0)
    return low, high


def paired_test(
    first: np.ndarray,
    second: np.ndarray,
    combine: Combine,
    *,
    n_resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> list[Comparison]:
    """Compare two runs on the same pictures.

    The interval resamples pictures, both runs together (paired bootstrap); the p-value swaps the runs
    picture by picture (approximate randomisation, Noreen 1989), which tests "no difference" directly.

    Args:
        first: (n s), what each picture adds to the sums of the first run.
        second: (n s), of the second run, pictures in the same order.
        combine: Turns sums (... s) into scores (... m).
        n_resamples: How many sets to draw, and how many swaps.
        seed: The same seed gives the same figures.
        confidence: Share of the resampled differences in the interval.

    Returns:
        One comparison a score, m in all.

    Raises:
        ValueError: If the shapes differ, or as ``bootstrap_intervals``.
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(
            f"the two runs have statistics of shape {first.shape} and {second.shape}; give one row a picture each"
        )
    _check(len(first), n_resamples, confidence)
    difference = combine(second.sum(0)) - combine(first.sum(0))
    drawn = combine(_drawn_sums(second, n_resamples, seed)) - combine(_drawn_sums(first, n_resamples, seed))
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail], axis=0)
    rng = np.random.default_rng((seed, 1))
    extreme = np.zeros_like(difference)
    gap, total = second - first, first.sum(0) + second.sum(0)
    for rows in _blocks(n_resamples, len(first)):
        swap = rng.integers(0, 2, size=(rows, len(first)), dtype=np.int8).astype(np.float64)
        one = first.sum(0) + swap @ gap
        swapped = combine(total - one) - combine(one)
        extreme += (np.abs(swapped) >= np.abs(difference) - 1e-12).sum(0)
    p_values = (1 + extreme) / (1 + n_resamples)
    return [
        Comparison(*(float(x) for x in row)) for row in zip(np.atleast_1d(difference), low, high, p_values, strict=True)
    ]


def _drawn_sums(statistics: np.ndarray, n_resamples: int, seed: int) -> np.ndarray:
    """Return the sums (r s) of resampled sets of pictures."""
    rng = np.random.default_rng((seed, 0))
    images = len(statistics)
    statistics = np.asarray(statistics, dtype=np.float64)
    sums = np.empty((n_resamples, statistics.shape[1]))
    start = 0
    for rows in _blocks(n_resamples, images):
        drawn = rng.integers(0, images, size=(rows, images), dtype=np.int64)
        drawn += np.arange(rows)[:, None] * images
        times = np.bincount(drawn.ravel(), minlength=rows * images).reshape(rows, images)
        sums[start : start + rows] = times.astype(np.float64) @ statistics
        start += rows
    return sums


def _blocks(n_resamples: int, images: int) -> list[int]:
    size = max(1, _BLOCK // images)
    return [min(size, n_resamples - start) for start in range(0, n_resamples, size)]


def _check(images: int, n_resamples: int, confidence: float) -> None:
    if images == 0:
        raise ValueError("no picture to resample; give one row of statistics a picture")
    if n_resamples < 2:
        raise ValueError(f"n_resamples ({n_resamples}) must be at least 2")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence ({confidence}) must lie between 0 and 1")
