"""Beam search for texts that must contain certain words, as grid beam search with shared beams.

After Hokamp and Liu (arXiv:1704.07138) and Post and Vilar (arXiv:1804.06609): besides the likeliest tokens, every beam
may go on with the next token of a word that is still owed; and the beams are dealt out in turn to those that owe least,
second least and so on, so that the words come in at the cost of likelihood, but come in.

Letters: n rows of prompts, s beams, c candidates of a row, w required words, t new tokens at most, v vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmtransformer.generation.beam_search import Beams, LengthPenalty, like, room
from mmtransformer.generation.logits_processors import (
    IMPOSSIBLE,
    Batch,
    Generated,
    GenerativeModel,
    Rules,
    stop_every,
)

Word = Sequence[Sequence[int]]
"""A required word: the ways to spell it in tokens, one of which must come."""


class ConstrainedBeams(Beams):
    """Beams that know which words each of them still owes.

    Args:
        n: rows.
        size: beams of a row.
        max_new_tokens: most new tokens.
        rules: see `Rules`.
        divide: see `LengthPenalty`.
        device: where they are kept.
        words: the required words.
    """

    def __init__(
        self,
        n: int,
        size: int,
        max_new_tokens: int,
        rules: Rules,
        divide: LengthPenalty,
        device: torch.device,
        words: Sequence[Word],
    ) -> None:
        super().__init__(n, size, max_new_tokens, rules, divide, device)
        self.spellings = [
            (turn, torch.tensor(list(ids), device=device)) for turn, word in enumerate(words) for ids in word
        ]
        self.met = torch.zeros(n, size, len(words), dtype=torch.bool, device=device)

    def advance(self, raw: Tensor, scores: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """As `Beams.advance`, with the words that are owed among the candidates, and the beams dealt out."""
        n, size, vocab = scores.shape
        wide = min(2 * size, vocab)
        likely = scores.topk(wide, dim=2).indices
        owed = self._next_tokens(step)
        token = torch.cat((likely, owed), 2)
        score = (self.running[..., None] + scores.gather(2, token)).clamp(min=10 * IMPOSSIBLE)
        twice = (token[..., :, None] == token[..., None, :]).tril(-1).any(-1)  # one token by two ways
        score = score.masked_fill(twice, 10 * IMPOSSIBLE).view(n, -1)
        beam = torch.arange(size, device=token.device)[:, None].expand(size, token.shape[2])
        beam, token = beam.reshape(1, -1).expand(n, -1), token.view(n, -1)
        said = raw.gather(2, token.view(n, size, -1)).view(n, -1)
        ids, spoken = self.extended(beam, token, said, step)
        met, missing = self._owing(ids, beam, step)

        ends, last = token == self.rules.eos_id, step + 1 == self.max_new_tokens
        possible = score > IMPOSSIBLE / 2
        total = self.divide(score, step + 1)
        # A text that owes words is kept only where its time is up, and behind all that owe less.
        ended = torch.where(missing == 0, total, total + 1e-3 * IMPOSSIBLE * missing)
        complete = possible & ((ends & (missing == 0)) | (last & ~ends))
        self.finished.offer(ended.masked_fill(~complete, IMPOSSIBLE), ids, spoken)

        keep = self._dealt(score.masked_fill(ends, 10 * IMPOSSIBLE), missing, size)
        self.running = score.masked_fill(ends, IMPOSSIBLE).gather(1, keep)
        self.finished.close(self.divide(self.running.amax(1, keepdim=True), step + 1))
        self.ids, self.spoken, self.met = (x.gather(1, like(keep, x.shape[2])) for x in (ids, spoken, met))
        return beam.gather(1, keep), token.gather(1, keep)

    def _next_tokens(self, step: int) -> Tensor:
        """The token with which each spelling would go on, or begin: (n s spellings)."""
        found = []
        for _, spelling in self.spellings:
            at = self._progress(self.ids, spelling, step)
            found.append(spelling[at.clamp(max=len(spelling) - 1)])
        return torch.stack(found, 2)

    @staticmethod
    def _progress(ids: Tensor, spelling: Tensor, length: int) -> Tensor:
        """How many tokens of a spelling the first `length` ids (n c t) end with: (n c)."""
        at = torch.zeros(ids.shape[:2], dtype=torch.long, device=ids.device)
        for k in range(1, min(len(spelling), length) + 1):
            at = at.masked_fill((ids[..., length - k : length] == spelling[:k]).all(-1), k)
        return at

    def _owing(self, ids: Tensor, beam: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Which words candidates contain (n c w), and how many tokens they owe in all (n c)."""
        met = self.met.gather(1, like(beam, self.met.shape[2]))
        left = torch.full(met.shape, 10**6, device=ids.device)
        for word, spelling in self.spellings:
            owed = len(spelling) - self._progress(ids, spelling, step + 1)
            left[..., word] = torch.minimum(left[..., word], owed)
        met = met | (left == 0)
        return met, left.masked_fill(met, 0).sum(-1)

    @staticmethod
    def _dealt(score: Tensor, missing: Tensor, size: int) -> Tensor:
        """The candidates (n s) that go on: the best of those that owe least, of those that owe second least ..."""
        better = score[:, None, :] > score[:, :, None]
        earlier = torch.arange(score.shape[1], device=score.device)
        better = better | ((score[:, None, :] == score[:, :, None]) & (earlier[None, :] < earlier[:, None]))
        rank = (better & (missing[:, None, :] == missing[:, :, None])).sum(-1)
        order = rank * (int(1e6)) + missing
        order = order + (score < IMPOSSIBLE / 2) * int(1e12)
        return order.topk(size, dim=1, largest=False).indices


def required_words(
    model: GenerativeModel[Batch],
    batch: Batch,
    rules: Rules,
    max_new_tokens: int,
    beams: ConstrainedBeams,
    num_return_sequences: int,
) -> list[list[Generated]]:
    """Beam search whose texts contain the words of `beams`; where there was no time for all, as many as could be.

    Args:
        model: what scores tokens.
        batch: its prompts.
        rules: see `Rules`.
        max_new_tokens: most new tokens.
        beams: empty ones.
        num_return_sequences: texts a row.
    """
    n, prompt = batch.tokens.shape
    logits, state = model.prefill(batch, expand_size=beams.size, max_new_tokens=max_new_tokens)
    history, known = room(batch, beams.size, max_new_tokens)
    first_row = torch.arange(n, device=logits.device)[:, None] * beams.size
    for step in range(max_new_tokens):
        raw = logits.float().log_softmax(1)
        if rules.look_back:
            history[:, prompt:] = beams.ids.flatten(0, 1)
        scores = rules.apply(raw, history[:, : prompt + step], known[:, : prompt + step], step)
        beam, token = beams.advance(*(x.view(n, beams.size, -1) for x in (raw, scores)), step)
        done = (step + 1) % stop_every(logits.device) == 0 and bool(beams.finished.done.all())
        if step + 1 == max_new_tokens or done:
            break
        state.reorder((first_row + beam).view(-1))
        logits = model.decode_step(token.view(-1), state)
    return [[text for _, text in row[:num_return_sequences]] for row in beams.finished.rows()]
