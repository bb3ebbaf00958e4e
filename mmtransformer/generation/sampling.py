"""Greedy search and sampling, a token a row at a time.

Letters: n rows of prompts, m rows of texts, v vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mmtransformer.generation.logits_processors import (
    Batch,
    Generated,
    GenerativeModel,
    Rules,
    stop_every,
    text_of,
)


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn; see `generate`."""

    temperature: float
    top_k: int | None
    top_p: float | None
    generator: torch.Generator | None

    def draw(self, scores: Tensor) -> Tensor:
        """One id a row, (m v) -> (m)."""
        scores = scores / self.temperature
        if self.top_k is not None and self.top_k < scores.shape[1]:
            least = scores.topk(self.top_k, dim=1).values[:, -1:]
            scores = scores.masked_fill(scores < least, float("-inf"))
        if self.top_p is not None and self.top_p < 1:
            ordered, order = scores.sort(dim=1, descending=True)
            before = ordered.softmax(1).cumsum(1) - ordered.softmax(1)
            dropped = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before >= self.top_p)
            scores = scores.masked_fill(dropped, float("-inf"))
        return torch.multinomial(scores.softmax(1), 1, generator=self.generator)[:, 0]


def walk(
    model: GenerativeModel[Batch],
    batch: Batch,
    rules: Rules,
    max_new_tokens: int,
    expand_size: int,
    drawing: Drawing | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields each step's tokens and their log-probabilities, (m) each; the end of a text stays its end."""
    logits, state = model.prefill(batch, expand_size=expand_size, max_new_tokens=max_new_tokens)
    prompt, device = batch.tokens.shape[1], logits.device
    history = batch.tokens.new_full((logits.shape[0], prompt + max_new_tokens), rules.eos_id)
    history[:, :prompt] = batch.tokens.repeat_interleave(expand_size, 0)
    known = batch.attention_mask.new_zeros(history.shape)
    known[:, :prompt] = batch.attention_mask.repeat_interleave(expand_size, 0)
    done = torch.zeros(logits.shape[0], dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        at, logits = prompt + step, logits.float()
        scores = rules.apply(logits, history[:, :at], known[:, :at], step)
        tokens = scores.argmax(1) if drawing is None else drawing.draw(scores)
        tokens = tokens.masked_fill(done, rules.eos_id)
        history[:, at], known[:, at] = tokens, ~done
        yield tokens, logits.log_softmax(1).gather(1, tokens[:, None])[:, 0]
        done = done | (tokens == rules.eos_id)
        if step + 1 == max_new_tokens or ((step + 1) % stop_every(device) == 0 and bool(done.all())):
            return
        logits = model.decode_step(tokens, state)


def sample(
    model: GenerativeModel[Batch],
    batch: Batch,
    rules: Rules,
    max_new_tokens: int,
    expand_size: int,
    drawing: Drawing | None,
) -> list[list[Generated]]:
    """The texts of `expand_size` samples a row, or of greedy search."""
    steps = list(walk(model, batch, rules, max_new_tokens, expand_size, drawing))
    new, scored = (torch.stack(column, 1).tolist() for column in zip(*steps, strict=True))
    texts = [text_of(ids, scores, rules.eos_id) for ids, scores in zip(new, scored, strict=True)]
    return [texts[i : i + expand_size] for i in range(0, len(texts), expand_size)]
