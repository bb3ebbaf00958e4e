"""Beam search for texts that must contain certain words, as grid beam search with shared beams.

After Hokamp and Liu (arXiv:1704.07138) and Post and Vilar (arXiv:1804.06609): besides the likeliest tokens, every beam
may go on with the next token of a word that is still unmet; and the beams are allocated in turn to those that miss the
fewest tokens, second fewest and so on, so that the words come in at the cost of likelihood, but come in.

Shapes: n rows of prompts, s beams, c candidates of a row, w forced words, t new tokens at most.
"""

import torch
from torch import Tensor

from mmtransformer.generation.beam_search import IMPOSSIBLE, Beams
from mmtransformer.generation.config import GenerationConfig
from mmtransformer.generation.forced_words import ForcedWords


class ConstrainedBeams(Beams):
    """Beams that know which words each of them still misses.

    Where there is no time for all words, texts contain as many as could be.

    Args:
        n: rows.
        size: beams of a row.
        config: how to search.
        eos_ids: the ids that end a text.
        forced: the words.
    """

    def __init__(self, n: int, size: int, config: GenerationConfig, eos_ids: Tensor, forced: ForcedWords) -> None:
        super().__init__(n, size, config, eos_ids)
        self.spellings = [
            (number, torch.tensor(list(ids), device=eos_ids.device), forced.only_first(ids))
            for number, word in enumerate(forced.words)
            for ids in word
        ]
        self.met = torch.zeros(n, size, len(forced.words), dtype=torch.bool, device=eos_ids.device)
        self.just_met = torch.zeros(n, size, 1, dtype=torch.bool, device=eos_ids.device)
        self.extends = None if forced.extends is None else forced.extends.to(eos_ids.device)

    def advance(self, log_probs: Tensor, scores: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """As `Beams.advance`, with the unmet words among the candidates, and the beams allocated."""
        n, size, vocab = scores.shape
        if self.extends is not None:
            scores = scores.masked_fill(self.just_met & self.extends, IMPOSSIBLE)
        likely = scores.topk(min((1 + len(self.eos_ids)) * size, vocab), dim=2).indices
        token = torch.cat((likely, self._next_tokens(step)), 2)
        score = (self.running[..., None] + scores.gather(2, token)).clamp(min=10 * IMPOSSIBLE)
        twice = (token[..., :, None] == token[..., None, :]).tril(-1).any(-1)  # one token by two ways
        score = score.masked_fill(twice, 10 * IMPOSSIBLE).view(n, -1)
        beam = torch.arange(size, device=token.device)[:, None].expand(size, token.shape[2])
        beam, token = beam.reshape(1, -1).expand(n, -1), token.view(n, -1)
        ids, token_log_probs = self.extended(beam, token, log_probs, step)
        met, missing = self._missing(ids, beam, step)

        ends, last = torch.isin(token, self.eos_ids), step + 1 == self.config.max_new_tokens
        possible = score > IMPOSSIBLE / 2
        stuck = ~(possible & ~ends).any(1, keepdim=True)  # whatever is missing, the texts cannot go on
        total = score / self.lengths[step]
        # A text that misses words is kept only where its time is up, and behind all that miss fewer tokens.
        ended = torch.where(missing == 0, total, total + 1e-3 * IMPOSSIBLE * missing)
        complete = possible & ((ends & ((missing == 0) | stuck)) | (last & ~ends))

        keep = self._allocated(score.masked_fill(ends, 10 * IMPOSSIBLE), missing, size)
        self.running = score.masked_fill(ends, IMPOSSIBLE).gather(1, keep)
        best_possible = self.running.amax(1, keepdim=True) / self.lengths[step]
        self.collect(ended.masked_fill(~complete, IMPOSSIBLE), ids, token_log_probs, best_possible)
        before = self.met.gather(1, beam[..., None].expand(-1, -1, met.shape[2]))
        just_met = (met & ~before).any(2, keepdim=True)
        self.ids, self.log_probs, self.met, self.just_met = (
            x.gather(1, keep[..., None].expand(-1, -1, x.shape[2])) for x in (ids, token_log_probs, met, just_met)
        )
        return beam.gather(1, keep), token.gather(1, keep)

    def _next_tokens(self, step: int) -> Tensor:
        """The token with which each spelling would go on, or begin: (n s spellings)."""
        found = []
        for _, spelling, only_first in self.spellings:
            at = self._progress(self.ids, spelling, step, only_first)
            found.append(spelling[at.clamp(max=len(spelling) - 1)])
        return torch.stack(found, 2)

    @staticmethod
    def _progress(ids: Tensor, spelling: Tensor, length: int, only_first: bool) -> Tensor:
        """How many tokens of a spelling the first `length` ids (n c t) end with: (n c)."""
        at = torch.zeros(ids.shape[:2], dtype=torch.long, device=ids.device)
        for k in range(max(length, 1) if only_first else 1, min(len(spelling), length) + 1):
            at = at.masked_fill((ids[..., length - k : length] == spelling[:k]).all(-1), k)
        return at

    def _missing(self, ids: Tensor, beam: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Which words candidates contain (n c w), and how many tokens they miss in all (n c)."""
        met = self.met.gather(1, beam[..., None].expand(-1, -1, self.met.shape[2]))
        left = torch.full(met.shape, 10**6, device=ids.device)
        for word, spelling, only_first in self.spellings:
            unmet = len(spelling) - self._progress(ids, spelling, step + 1, only_first)
            left[..., word] = torch.minimum(left[..., word], unmet)
        met = met | (left == 0)
        return met, left.masked_fill(met, 0).sum(-1)

    @staticmethod
    def _allocated(score: Tensor, missing: Tensor, size: int) -> Tensor:
        """The candidates (n s) that go on: the best of those that miss fewest, of those that miss second fewest ..."""
        better = score[:, None, :] > score[:, :, None]
        earlier = torch.arange(score.shape[1], device=score.device)
        better = better | ((score[:, None, :] == score[:, :, None]) & (earlier[None, :] < earlier[:, None]))
        rank = (better & (missing[:, None, :] == missing[:, :, None])).sum(-1)
        order = rank * (int(1e6)) + missing
        order = order + (score < IMPOSSIBLE / 2) * int(1e12)
        return order.topk(size, dim=1, largest=False).indices
