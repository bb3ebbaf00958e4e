"""Beam search over all rows at once, in groups that avoid each other's words if asked.

Shapes: n rows of prompts, s beams of a group, m = n * s rows of texts, c candidates of a row, t new tokens at most.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtransformer.generation.base import GenerationResult, TokenBatch
from mmtransformer.generation.config import GenerationConfig
from mmtransformer.generation.logits_processors import logits_processors

IMPOSSIBLE = -1e9
"""Finite, so that sums and comparisons of impossible candidates stay ordered and free of NaN."""


class Beams:
    """The running texts of one group, and those that have ended; transformers' rules of when a row is done.

    Args:
        n: rows.
        size: beams of a row.
        config: how to search.
        eos_ids: the ids that end a text.
    """

    def __init__(self, n: int, size: int, config: GenerationConfig, eos_ids: Tensor) -> None:
        device, shape = eos_ids.device, (n, size, config.max_new_tokens)
        self.size, self.config, self.eos_ids = size, config, eos_ids
        offset = config.length_offset
        # A negative penalty takes the length as a share of the longest, which orders texts alike: a multiple of the
        # length to a high power would come to what is `IMPOSSIBLE`.
        unit = 1 if config.length_penalty >= 0 else config.max_new_tokens
        lengths = (((offset + t + 1) / (offset + unit)) ** config.length_penalty for t in range(config.max_new_tokens))
        self.lengths = list(lengths)  # what the log-probability of a text is divided by, by its last step
        self.ids = eos_ids[0].expand(shape).clone()  # what is not written ends the text
        self.log_probs = torch.zeros(shape, device=device)
        self.running = torch.full((n, size), IMPOSSIBLE, device=device)
        self.running[:, 0] = 0.0  # At first all beams are the same: one is enough.
        self.done = torch.zeros(n, 1, dtype=torch.bool, device=device)
        self.ended_scores = torch.full((n, size), IMPOSSIBLE, device=device)  # best first, as what follows
        self.ended_ids, self.ended_log_probs = torch.zeros_like(self.ids), torch.zeros_like(self.log_probs)

    def advance(self, log_probs: Tensor, scores: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Chooses the next tokens from log-probabilities, and scores after all processors, (n s v) each.

        Returns:
            Which beam each new one goes on from, and its token: (n s) each.
        """
        size, vocab = scores.shape[1:]
        width = min((1 + len(self.eos_ids)) * size, size * vocab)  # enough to go on if all ends come first
        total = self.running[..., None] + scores
        # What is among the best of all has a token that is among the best of the tokens' best: one search over (n v).
        likely = total.amax(1).topk(min(width, vocab), dim=1).indices
        total, at = total.gather(2, likely[:, None].expand(-1, size, -1)).flatten(1).topk(width, dim=1)
        beam, token = at // likely.shape[1], likely.gather(1, at % likely.shape[1])
        ids, token_log_probs = self.extended(beam, token, log_probs, step)
        ends = torch.isin(token, self.eos_ids)
        complete = ends | (step + 1 == self.config.max_new_tokens)
        complete[:, size:] = False  # Only a candidate that would have stayed in the beam may finish.
        ended = (total / self.lengths[step]).masked_fill(~complete, IMPOSSIBLE)
        self.running, keep = total.masked_fill(ends, IMPOSSIBLE).topk(size, dim=1)
        self.collect(ended, ids, token_log_probs, self.running[:, :1] / self.lengths[step])
        places = keep[..., None].expand(-1, -1, ids.shape[2])
        self.ids, self.log_probs = ids.gather(1, places), token_log_probs.gather(1, places)
        return beam.gather(1, keep), token.gather(1, keep)

    def extended(self, beam: Tensor, token: Tensor, log_probs: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The ids and log-probabilities of candidates (n c t), from beams and tokens (n c) and all (n s v)."""
        places = beam[..., None].expand(-1, -1, self.config.max_new_tokens)
        ids, token_log_probs = self.ids.gather(1, places), self.log_probs.gather(1, places)
        ids[..., step] = token
        token_log_probs[..., step] = log_probs.flatten(1).gather(1, beam * log_probs.shape[2] + token)
        return ids, token_log_probs

    def collect(self, scores: Tensor, ids: Tensor, log_probs: Tensor, best_possible: Tensor) -> None:
        """Takes in texts that have ended, and closes the rows that can get no better ones.

        Args:
            scores: (n c), IMPOSSIBLE where a candidate has not ended.
            ids: (n c t).
            log_probs: (n c t), those of the ids.
            best_possible: (n 1), the best score that a running text can still come to, as transformers sees it.
        """
        scores = torch.cat((self.ended_scores, scores.masked_fill(self.done, IMPOSSIBLE)), 1)
        self.ended_scores, best = scores.topk(self.size, dim=1)
        places = best[..., None].expand(-1, -1, ids.shape[2])
        self.ended_ids = torch.cat((self.ended_ids, ids), 1).gather(1, places)
        self.ended_log_probs = torch.cat((self.ended_log_probs, log_probs), 1).gather(1, places)
        worst = self.ended_scores[:, -1:]
        self.done = self.done | ((worst > IMPOSSIBLE / 2) & (worst >= best_possible))


class BeamSearch:
    """Beam search (transformers' rules), or diverse beam search with several groups (arXiv:1610.02424).

    A group's scores of a token are lowered by `diversity_penalty` for each beam of earlier groups that has just taken
    it (the paper's Hamming diversity).

    Args:
        batch: prompts.
        config: how to search.
        eos_ids: the ids that end a text.
        groups: empty beams of equal size.
        num_tokens: see `generate`.
    """

    def __init__(
        self,
        batch: TokenBatch,
        config: GenerationConfig,
        eos_ids: Tensor,
        groups: Sequence[Beams],
        num_tokens: int | None = None,
    ) -> None:
        n, self.prompt_length = batch.tokens.shape
        self.config, self.eos_ids, self.groups, self.expand_size = config, eos_ids, groups, config.num_beams
        room = (0, config.max_new_tokens)
        self.ids = F.pad(batch.tokens.repeat_interleave(config.num_beams, 0), room)
        self.real = F.pad(batch.attention_mask.repeat_interleave(config.num_beams, 0), room, value=True)
        self.processors = logits_processors(config, eos_ids, self.prompt_length, num_tokens)
        self.first_row = torch.arange(n, device=eos_ids.device)[:, None] * config.num_beams

    def advance(self, logits: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """See `Search`."""
        n, beams, at = len(self.first_row), self.expand_size, self.prompt_length + step
        log_probs = logits.float().log_softmax(1)
        scores = log_probs
        if self.processors:
            texts = self.ids.view(n, beams, -1)[..., self.prompt_length :]
            torch.cat([group.ids for group in self.groups], 1, out=texts)
        for processor in self.processors:
            scores = processor(scores, self.ids[:, :at], self.real[:, :at])
        log_probs, scores = log_probs.view(n, beams, -1), scores.view(n, beams, -1)
        sources, tokens = [], []
        for first, group in zip(range(0, beams, self.groups[0].size), self.groups, strict=True):
            mine = slice(first, first + group.size)
            own = scores[:, mine]
            if first and self.config.diversity_penalty:
                earlier = torch.cat(tokens, 1)
                taken = torch.zeros_like(own[:, 0]).scatter_add_(1, earlier, torch.ones_like(own[:, 0, :first]))
                own = own - self.config.diversity_penalty * taken[:, None]
            beam, token = group.advance(log_probs[:, mine], own, step)
            sources.append(beam + first)
            tokens.append(token)
        self.done = torch.cat([group.done for group in self.groups])
        return (self.first_row + torch.cat(sources, 1)).flatten(), torch.cat(tokens, 1).flatten()

    def texts(self) -> list[list[GenerationResult]]:
        """For each prompt its texts, best first."""
        columns = ("ended_scores", "ended_ids", "ended_log_probs")
        rows = zip(*(torch.cat([getattr(group, x) for group in self.groups], 1).tolist() for x in columns), strict=True)
        ends, found = self.eos_ids.tolist(), []
        for row in rows:
            texts = sorted(zip(*row, strict=True), key=lambda text: -text[0])[: self.config.num_return_sequences]
            kept = [(ids, said) for score, ids, said in texts if score > IMPOSSIBLE / 2]
            found.append([GenerationResult.until_end(ids, said, ends) for ids, said in kept])
        return found
