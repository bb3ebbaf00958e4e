"""Logits processors: what is done to the scores of the next token before one is chosen, as transformers knows them.

Shapes: m rows of texts, t tokens of prompt and text so far.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mmtransformer.generation.config import GenerationConfig

LogitsProcessor = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Scores (m v), ids (m t) and which of these are real (m t) -> changed scores (m v)."""

BANNED = float("-inf")


def logits_processors(
    config: GenerationConfig, eos_ids: Tensor, prompt_length: int, num_tokens: int | None = None
) -> list[LogitsProcessor]:
    """Those that a search's settings ask for, in the order in which they act.

    Args:
        config: the settings.
        eos_ids: the ids that end a text.
        prompt_length: tokens of the (padded) prompts.
        num_tokens: see `generate`.
    """
    found: list[LogitsProcessor] = []
    if config.repetition_penalty != 1.0:
        found.append(partial(repetition_penalty, penalty=config.repetition_penalty))
    if config.min_new_tokens:
        found.append(partial(min_length, least=prompt_length + config.min_new_tokens, eos_ids=eos_ids))
    if config.no_repeat_ngram_size:
        found.append(partial(no_repeat_ngram, size=config.no_repeat_ngram_size, eos_ids=eos_ids))
    if num_tokens is not None:
        found.insert(0, partial(known_tokens, num_tokens=num_tokens))
    return found


def known_tokens(scores: Tensor, ids: Tensor, real: Tensor, *, num_tokens: int) -> Tensor:
    """Bans the ids from `num_tokens` on."""
    scores = scores.clone()
    scores[:, num_tokens:] = BANNED
    return scores


def repetition_penalty(scores: Tensor, ids: Tensor, real: Tensor, *, penalty: float) -> Tensor:
    """Makes tokens of prompt and text less likely, above a penalty of 1 (CTRL, arXiv:1909.05858)."""
    used = _marked(ids, real, scores.shape[1])
    return torch.where(used, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def min_length(scores: Tensor, ids: Tensor, real: Tensor, *, least: int, eos_ids: Tensor) -> Tensor:
    """Bans the end of a text of fewer than `least` tokens, those of its prompt included."""
    return scores.index_fill(1, eos_ids, BANNED) if ids.shape[1] < least else scores


def no_repeat_ngram(scores: Tensor, ids: Tensor, real: Tensor, *, size: int, eos_ids: Tensor) -> Tensor:
    """Bans what would make an n-gram come twice; a text that may not go on with any token ends."""
    if ids.shape[1] < size:
        return scores
    grams, whole = ids.unfold(1, size, 1), real.unfold(1, size, 1).all(-1)
    last = ids[:, ids.shape[1] - size + 1 :]
    repeats = (grams[..., :-1] == last[:, None]).all(-1) & whole
    scores = scores.masked_fill(_marked(grams[..., -1], repeats, scores.shape[1]), BANNED)
    stuck = scores.amax(1, keepdim=True) == BANNED
    return scores.index_copy_(1, eos_ids[:1], scores[:, eos_ids[:1]].masked_fill(stuck, 0.0))


def top_k(scores: Tensor, k: int) -> Tensor:
    """Bans all but the k likeliest tokens, and those as likely as the last of them."""
    if k >= scores.shape[1]:
        return scores
    return scores.masked_fill(scores < scores.topk(k, dim=1).values[:, -1:], BANNED)


def top_p(scores: Tensor, p: float) -> Tensor:
    """Bans all but the fewest tokens that hold this share of probability (nucleus, arXiv:1904.09751)."""
    ordered, order = scores.sort(dim=1, descending=True)
    before = ordered.softmax(1).cumsum(1) - ordered.softmax(1)
    dropped = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before >= p)
    return scores.masked_fill(dropped, BANNED)


def _marked(ids: Tensor, where: Tensor, vocab: int) -> Tensor:
    """Which ids of the vocabulary stand anywhere in a row where it counts: (m v) bool."""
    found = torch.zeros(ids.shape[0], vocab + 1, dtype=torch.bool, device=ids.device)
    return found.scatter_(1, ids.masked_fill(~where, vocab), True)[:, :vocab]
