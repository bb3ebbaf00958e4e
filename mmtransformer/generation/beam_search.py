"""Beam search over all rows at once, in groups that avoid each other's words if asked.

Letters: n rows of prompts, s beams of a group, m = n * s rows of texts, c candidates of a row, t new tokens at most,
v vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmtransformer.generation.logits_processors import (
    IMPOSSIBLE,
    Batch,
    Generated,
    GenerativeModel,
    Prompts,
    Rules,
    stop_every,
    text_of,
)


@dataclass(frozen=True)
class LengthPenalty:
    """What a text's log-probability is divided by: ((offset + tokens) / (offset + 1)) ** power."""

    power: float
    offset: float = 0.0

    def __call__(self, log_probs: Tensor, tokens: int) -> Tensor:
        return log_probs / ((self.offset + tokens) / (self.offset + 1)) ** self.power


class Finished:
    """The best texts of each row that have ended: scores, new ids and their log-probabilities, best first."""

    def __init__(self, n: int, kept: int, max_new_tokens: int, eos_id: int, device: torch.device) -> None:
        self.kept, self.eos_id = kept, eos_id
        self.scores = torch.full((n, kept), IMPOSSIBLE, device=device)
        self.ids = torch.full((n, kept, max_new_tokens), eos_id, dtype=torch.long, device=device)
        self.spoken = torch.zeros(n, kept, max_new_tokens, device=device)
        self.done = torch.zeros(n, 1, dtype=torch.bool, device=device)

    def offer(self, scores: Tensor, ids: Tensor, spoken: Tensor) -> None:
        """Takes in candidates: scores (n c), IMPOSSIBLE where not ended; ids and log-probabilities (n c t)."""
        scores = scores.masked_fill(self.done, IMPOSSIBLE)
        self.scores, pick = torch.cat((self.scores, scores), 1).topk(self.kept, dim=1)
        self.ids = torch.cat((self.ids, ids), 1).gather(1, like(pick, ids.shape[2]))
        self.spoken = torch.cat((self.spoken, spoken), 1).gather(1, like(pick, ids.shape[2]))

    def close(self, hope: Tensor) -> None:
        """A row is done when its worst kept text is as good as what is hoped of the running ones, (n 1)."""
        self.done = self.done | ((self.scores[:, -1:] > IMPOSSIBLE / 2) & (self.scores[:, -1:] >= hope))

    def rows(self) -> list[list[tuple[float, Generated]]]:
        """For each row its texts with their scores, best first."""
        columns = self.scores.tolist(), self.ids.tolist(), self.spoken.tolist()
        return [
            [
                (score, text_of(new, said, self.eos_id))
                for score, new, said in zip(*row, strict=True)
                if score > IMPOSSIBLE / 2
            ]
            for row in zip(*columns, strict=True)
        ]


class Beams:
    """The running texts of one group, and those that have ended; transformers' rules of when a row is done."""

    def __init__(
        self,
        n: int,
        size: int,
        max_new_tokens: int,
        rules: Rules,
        divide: LengthPenalty,
        device: torch.device,
    ) -> None:
        self.size, self.rules, self.divide, self.max_new_tokens = size, rules, divide, max_new_tokens
        self.ids = torch.full((n, size, max_new_tokens), rules.eos_id, dtype=torch.long, device=device)
        self.spoken = torch.zeros(n, size, max_new_tokens, device=device)
        self.running = torch.full((n, size), IMPOSSIBLE, device=device)
        self.running[:, 0] = 0.0  # At first all beams are the same: one is enough.
        self.finished = Finished(n, size, max_new_tokens, rules.eos_id, device)

    def advance(self, raw: Tensor, scores: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Chooses the next tokens from log-probabilities and scores after all rules, (n s v) each.

        Returns:
            Which beam each new one goes on from, and its token: (n s) each.
        """
        n, size, vocab = scores.shape
        width = min(2 * size, size * vocab)
        total = self.running[..., None] + scores
        # What is among the best of all has a token that is among the best of the tokens' best: one search over (n v).
        likely = total.amax(1).topk(min(width, vocab), dim=1).indices
        total, at = total.gather(2, likely[:, None].expand(-1, size, -1)).flatten(1).topk(width, dim=1)
        beam, token = at // likely.shape[1], likely.gather(1, at % likely.shape[1])
        said = raw.reshape(n, -1).gather(1, beam * vocab + token)
        ids, spoken = self.extended(beam, token, said, step)
        ends, last = token == self.rules.eos_id, step + 1 == self.max_new_tokens
        complete = ends | last
        complete[:, size:] = False  # Only a candidate that would have stayed in the beam may finish.
        ended = self.divide(total, step + 1).masked_fill(~complete, IMPOSSIBLE)
        self.finished.offer(ended, ids, spoken)
        self.running, keep = total.masked_fill(ends, IMPOSSIBLE).topk(size, dim=1)
        self.finished.close(self.divide(self.running[:, :1], step + 1))
        self.ids, self.spoken = (x.gather(1, like(keep, x.shape[2])) for x in (ids, spoken))
        return beam.gather(1, keep), token.gather(1, keep)

    def extended(self, beam: Tensor, token: Tensor, said: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The ids and log-probabilities of candidates, (n c t) each, from beams, tokens and theirs (n c)."""
        ids = self.ids.gather(1, like(beam, self.max_new_tokens))
        spoken = self.spoken.gather(1, like(beam, self.max_new_tokens))
        ids[..., step], spoken[..., step] = token, said
        return ids, spoken


def beam_search(
    model: GenerativeModel[Batch],
    batch: Batch,
    rules: Rules,
    max_new_tokens: int,
    groups: list[Beams],
    num_return_sequences: int,
    diversity_penalty: float = 0.0,
) -> list[list[Generated]]:
    """Beam search (transformers' rules), or diverse beam search with several groups (arXiv:1610.02424).

    A group's scores of a token are lowered by `diversity_penalty` for each beam of earlier groups that has just taken
    it (the paper's Hamming diversity).

    Args:
        model: what scores tokens.
        batch: its prompts.
        rules: see `Rules`.
        max_new_tokens: most new tokens.
        groups: empty beams of equal size.
        num_return_sequences: texts a row.
        diversity_penalty: see above.
    """
    n, prompt = batch.tokens.shape
    size, beams = groups[0].size, sum(group.size for group in groups)
    logits, state = model.prefill(batch, expand_size=beams, max_new_tokens=max_new_tokens)
    device, vocab = logits.device, logits.shape[1]
    history, known = room(batch, beams, max_new_tokens)
    first_row = torch.arange(n, device=device)[:, None] * beams
    for step in range(max_new_tokens):
        raw = logits.float().log_softmax(1)
        if rules.look_back:
            torch.cat([group.ids for group in groups], 1, out=history.view(n, beams, -1)[..., prompt:])
        at = prompt + step
        scores = rules.apply(raw, history[:, :at], known[:, :at], step).view(n, beams, vocab)
        sources, tokens = [], []
        for turn, group in enumerate(groups):
            mine = slice(turn * size, (turn + 1) * size)
            own = scores[:, mine]
            if turn and diversity_penalty:
                taken = torch.zeros(n, vocab, device=device)
                earlier = torch.cat(tokens, 1)
                taken.scatter_add_(1, earlier, torch.ones_like(earlier, dtype=taken.dtype))
                own = own - diversity_penalty * taken[:, None]
            beam, token = group.advance(raw.view(n, beams, vocab)[:, mine], own, step)
            sources.append(beam + turn * size)
            tokens.append(token)
        if step + 1 == max_new_tokens or ((step + 1) % stop_every(device) == 0 and _all_done(groups)):
            break
        state.reorder((first_row + torch.cat(sources, 1)).view(-1))
        logits = model.decode_step(torch.cat(tokens, 1).view(-1), state)
    found = zip(*(group.finished.rows() for group in groups), strict=True)
    ordered = [sorted((text for part in parts for text in part), key=lambda x: -x[0]) for parts in found]
    return [[text for _, text in row[:num_return_sequences]] for row in ordered]


def room(batch: Prompts, expand_size: int, max_new_tokens: int) -> tuple[Tensor, Tensor]:
    """Prompts with room for new ids behind them, and which are real (new ones are): (m prompt + t) each."""
    tokens, attention_mask = (
        x.repeat_interleave(expand_size, 0) for x in (batch.tokens, batch.attention_mask)
    )
    return (
        torch.nn.functional.pad(tokens, (0, max_new_tokens)),
        torch.nn.functional.pad(attention_mask, (0, max_new_tokens), value=True),
    )


def _all_done(groups: list[Beams]) -> bool:
    return bool(torch.stack([group.finished.done.all() for group in groups]).all())


def like(index: Tensor, width: int) -> Tensor:
    """An index (n c) over rows of a tensor (n s width)."""
    return index[..., None].expand(-1, -1, width)
