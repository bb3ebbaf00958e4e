"""Greedy search and sampling, a token a row at a time.

Shapes: n rows of prompts, m rows of texts, t new tokens at most.
"""

import zlib
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmtransformer.batch import CaptionBatch, Seq2SeqBatch
from mmtransformer.batch.images import token_mask
from mmtransformer.generation.base import GenerationResult, TokenBatch
from mmtransformer.generation.config import GenerationConfig
from mmtransformer.generation.logits_processors import logits_processors, top_k, top_p


class Sampler:
    """The likeliest token of every row, or a drawn one.

    Args:
        batch: prompts.
        config: how to search.
        eos_ids: the ids that end a text.
        row_seeds: for each row what its noise comes from, besides the seed; see `checksums`.
        num_tokens: see `generate`.
    """

    def __init__(
        self,
        batch: TokenBatch,
        config: GenerationConfig,
        eos_ids: Tensor,
        row_seeds: Sequence[int] | None = None,
        num_tokens: int | None = None,
    ) -> None:
        self.config, self.eos_ids = config, eos_ids
        self.expand_size, self.prompt_length = config.num_return_sequences, batch.tokens.shape[1]
        room = (0, config.max_new_tokens)
        self.ids = F.pad(batch.tokens.repeat_interleave(self.expand_size, 0), room)
        self.real = F.pad(batch.attention_mask.repeat_interleave(self.expand_size, 0), room, value=True)
        self.processors = logits_processors(config, eos_ids, self.prompt_length, num_tokens)
        self.done = torch.zeros(len(self.ids), dtype=torch.bool, device=eos_ids.device)
        self.log_probs: list[Tensor] = []
        if config.do_sample:
            keys = checksums(batch) if row_seeds is None else row_seeds
            self.noise = torch.tensor(noise(config, keys), device=eos_ids.device)

    def advance(self, logits: Tensor, step: int) -> tuple[None, Tensor]:
        """See `Search`; what stands behind a text's end is not read."""
        at, logits = self.prompt_length + step, logits.float()
        scores = logits
        for processor in self.processors:
            scores = processor(scores, self.ids[:, :at], self.real[:, :at])
        tokens = self.draw(scores, self.noise[:, step]) if self.config.do_sample else scores.argmax(1)
        self.ids[:, at] = tokens
        self.log_probs.append(logits.log_softmax(1).gather(1, tokens[:, None])[:, 0])
        self.done = self.done | torch.isin(tokens, self.eos_ids)
        return None, tokens

    def draw(self, scores: Tensor, noise: Tensor) -> Tensor:
        """One id a row from numbers that lie evenly in [0, 1): (m v) and (m) -> (m)."""
        scores = scores / self.config.temperature
        if self.config.top_k is not None:
            scores = top_k(scores, self.config.top_k)
        if self.config.top_p is not None and self.config.top_p < 1:
            scores = top_p(scores, self.config.top_p)
        shares = scores.softmax(1).cumsum(1)
        return torch.searchsorted(shares, noise[:, None] * shares[:, -1:], right=True)[:, 0]

    def texts(self) -> list[list[GenerationResult]]:
        """For each prompt its texts, in the order drawn."""
        new = self.ids[:, self.prompt_length : self.prompt_length + len(self.log_probs)].tolist()
        scored, ends = torch.stack(self.log_probs, 1).tolist(), self.eos_ids.tolist()
        found = [GenerationResult.until_end(*text, ends) for text in zip(new, scored, strict=True)]
        return [found[i : i + self.expand_size] for i in range(0, len(found), self.expand_size)]


def noise(config: GenerationConfig, row_seeds: Sequence[int]) -> np.ndarray:
    """The numbers that tokens are drawn with, even in [0, 1): (m t) float32.

    They depend on the seed, the content of the row and the number of the sample, so neither on the row's place nor on
    its batch.
    """
    rows = [
        np.random.default_rng([config.seed, key, number]).random(config.max_new_tokens, np.float32)
        for key in row_seeds
        for number in range(config.num_return_sequences)
    ]
    return np.stack(rows) * np.float32(1 - 2**-22)  # a share of 1 would, rounded, be behind the last token


def checksums(batch: TokenBatch, seen: TokenBatch | None = None) -> list[int]:
    """A number for each row, from its pictures or its source text and its prompt, padding left out.

    Args:
        batch: the prompts.
        seen: where pictures stand as they were given, if the batch holds what was computed of them.
    """
    seen = batch if seen is None else seen
    tokens, real, samples = batch.tokens.cpu(), batch.attention_mask.cpu(), [0]
    if isinstance(seen, CaptionBatch) and (seen.pixels is not None or seen.visual_tokens is not None):
        visual = [*seen.visual.float().cpu()]
        if seen.patch_grids is not None:  # What fills up depends on the other pictures.
            there = token_mask(seen.patch_grids.cpu(), seen.visual.shape[2])
            visual = [x[mask] for x, mask in zip(visual, there, strict=True)]
        elif seen.image_mask is not None:
            visual = [x[mask] for x, mask in zip(visual, seen.image_mask.cpu(), strict=True)]
        samples = [zlib.crc32(x.numpy().tobytes()) for x in visual]
    elif isinstance(seen, Seq2SeqBatch):
        sources, masks = seen.source.cpu(), seen.source_attention_mask.cpu()
        samples = [_of_ids(*row) for row in zip(sources, masks, strict=True)]
    share = len(tokens) // len(samples)
    rows = zip(tokens, real, strict=True)
    return [_of_ids(*row, samples[i // share]) for i, row in enumerate(rows)]


def _of_ids(ids: Tensor, real: Tensor, begun: int = 0) -> int:
    return zlib.crc32(ids[real].numpy().tobytes(), begun)
