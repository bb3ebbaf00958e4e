"""Nearest embeddings by plain products, in blocks that fit into a core's cache; and groups of those that are alike.

One core goes through 100,000 half-precision embeddings of width 512 in 15 ms: a block becomes float32 in the cache and
is multiplied there, so sums are as precise as of float32 and memory is read once. At that speed no approximate index is
needed, and nothing is missed. One core it is, since threads would meet at the end of each of 200 blocks: on a machine
that did other work, two of them took 50 times as long.

Shapes: n embeddings of the index, q queries, k found, g groups.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 512  # of a block: 1 MB of float32 at width 512, a core's second cache
_PART = 512 * _ROWS  # rows whose scores are held before the best are taken: memory stays the same for millions
_SIDE = 1024  # rows, and columns, of a block of pairs


def nearest(queries: Tensor, embeddings: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest of each query by their products, best first; of equals the one that stands first.

    Args:
        queries: (q d) float32.
        embeddings: (n d) of any float type; may be the memory of a mapped file.
        k: How many; all n where there are fewer.

    Returns:
        Scores (q k) float32, and places (q k) int64.

    Raises:
        ValueError: If a score is not finite.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        best = [(torch.empty(0), torch.empty(0, dtype=torch.long)) for _ in queries]
        for start in range(0, len(embeddings), _PART):
            scores = _products(queries, embeddings[start : start + _PART])
            if not scores.isfinite().all():
                raise ValueError("holds numbers that are not finite")
            for i, row in enumerate(scores):
                least = row.topk(min(k, len(row)), sorted=False).values.min()
                places = (row >= least).nonzero().flatten()  # of equals all, so that the first can be taken
                found = torch.cat([best[i][0], row[places]])
                order = found.argsort(descending=True, stable=True)[:k]
                best[i] = found[order], torch.cat([best[i][1], places + start])[order]
    finally:
        torch.set_num_threads(threads)
    return torch.stack([values for values, _ in best]), torch.stack([places for _, places in best])


def _products(queries: Tensor, embeddings: Tensor) -> Tensor:
    """Queries (q d) times embeddings (n d): (q n) float32."""
    scores, block = torch.empty(len(queries), len(embeddings)), torch.empty(_ROWS, embeddings.shape[1])
    for at in range(0, len(embeddings), _ROWS):
        rows = embeddings[at : at + _ROWS]
        torch.mm(queries, block[: len(rows)].copy_(rows).T, out=scores[:, at : at + len(rows)])
    return scores


def groups_alike(
    embeddings: Tensor,
    threshold: float | None,
    same: Sequence[int] | np.ndarray,
    *,
    step: Callable[[int], object] = lambda rows: None,
) -> list[list[int]]:
    """Groups in which each is alike another one: the connected parts of the graph of cosines at or above a threshold.

    Of n squared cosines a block is in memory at a time, each pair once. What is known to be the same joins without any.

    Args:
        embeddings: (n d) of any float type.
        threshold: The least cosine of two that are alike; None = only the same count.
        same: (n,) of each the place of the first that is the same as it, its own if it is the first: only firsts are
            compared.
        step: Is told of so many rows more that have been compared.

    Returns:
        (g) the places of each group of two and more, in order; groups by their first.

    Raises:
        ValueError: If a cosine is not finite.
    """
    parent = np.array(same, dtype=np.int64)
    firsts = np.flatnonzero(parent == np.arange(len(parent)))
    compared, least = (0, 2.0) if threshold is None else (len(firsts), threshold)
    for row in range(0, compared, _SIDE):
        rows = firsts[row : row + _SIDE]
        left = F.normalize(embeddings[torch.from_numpy(rows)].float(), dim=-1)
        for column in range(row, len(firsts), _SIDE):
            columns = firsts[column : column + _SIDE]
            right = left if column == row else F.normalize(embeddings[torch.from_numpy(columns)].float(), dim=-1)
            cosines = left @ right.T
            if not cosines.isfinite().all():
                raise ValueError("holds numbers that are not finite")
            alike = cosines >= least
            if column == row:
                alike.fill_diagonal_(False)
            for i in alike.any(1).nonzero().flatten().tolist():
                _join(parent, int(rows[i]), columns[alike[i].numpy()])
        step(len(rows))
    roots = _roots(parent, np.arange(len(parent)))
    order = np.argsort(roots, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(roots[order])) + 1)
    return sorted(part.tolist() for part in parts if len(part) > 1)


def _roots(parent: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The group of each place: the smallest place in it."""
    roots = parent[places]
    while not np.array_equal(roots, above := parent[roots]):
        roots = above
    parent[places] = roots  # paths stay short
    return roots


def _join(parent: np.ndarray, one: int, others: np.ndarray) -> None:
    """Makes one group of a place and others; all at once, since a place may be alike thousands."""
    roots = np.unique(_roots(parent, np.append(others, one)))
    parent[roots] = roots[0]
