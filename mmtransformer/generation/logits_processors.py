"""What every search has in common: the model's contract, rules on scores, and the text that comes out.

Letters: n rows of prompts, m rows of texts (beams or samples of a prompt), t tokens so far, v vocabulary.
"""

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from mmtransformer.captioners.base import State

IMPOSSIBLE = -1e9
"""Finite, so that sums and comparisons of impossible candidates stay ordered and free of NaN."""


class Prompts(Protocol):
    """What a search reads of a batch; the model reads the rest (pictures, source texts)."""

    tokens: Tensor
    """(n q) long, padded on the left."""
    attention_mask: Tensor
    """(n q) bool, True = a real token."""


Batch = TypeVar("Batch", bound=Prompts, contravariant=True)


class GenerativeModel(Protocol[Batch]):
    """What a search needs of a model: every `Captioner` has it, every `Decoder`, and the 2017 `Transformer`."""

    @property
    def training(self) -> bool:
        """Whether it is in training mode."""
        ...

    @property
    def max_len(self) -> int:
        """Most text tokens of a row, prompt included."""
        ...

    def prefill(
        self, batch: Batch, *, expand_size: int = 1, max_new_tokens: int = 40
    ) -> tuple[Tensor, State]:
        """See `Captioner.prefill`."""
        ...

    def decode_step(self, tokens: Tensor, state: Any) -> Tensor:
        """See `Captioner.step`."""
        ...

    def eval(self) -> Any:
        """Evaluation mode."""
        ...

    def train(self, mode: bool = True) -> Any:
        """Training mode."""
        ...


@dataclass(frozen=True)
class Generated:
    """One text that was generated.

    Attributes:
        tokens: its ids, without the prompt and the end-of-sequence.
        log_prob: log-probability of the whole text under the model, natural log, the end-of-sequence included.
        token_log_probs: that of each token of `tokens`.
        finished: whether the model ended it; False = cut at `max_new_tokens`.
    """

    tokens: list[int]
    log_prob: float
    token_log_probs: list[float]
    finished: bool


def text_of(ids: list[int], log_probs: list[float], eos_id: int) -> Generated:
    """The text that new ids are, up to their first end-of-sequence."""
    finished = eos_id in ids
    length = ids.index(eos_id) if finished else len(ids)
    return Generated(ids[:length], sum(log_probs[: length + finished]), log_probs[:length], finished)


@dataclass(frozen=True)
class Rules:
    """What is done to the scores of the next token before one is chosen; the names and effects are transformers'.

    Attributes:
        eos_id: the id that ends a text.
        min_new_tokens: no end before so many tokens.
        repetition_penalty: above 1, tokens of prompt and text get less likely (CTRL, arXiv:1909.05858).
        no_repeat_ngram_size: no n-gram of this length comes twice; 0 = they may.
    """

    eos_id: int
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0

    @property
    def look_back(self) -> bool:
        """Whether what was written before matters."""
        return self.repetition_penalty != 1.0 or self.no_repeat_ngram_size > 0

    def apply(self, scores: Tensor, history: Tensor, known: Tensor, new_tokens: int) -> Tensor:
        """Changed scores (m v), for rows whose prompt and text are `history` (m t) where `known` (m t) is True."""
        if self.repetition_penalty != 1.0:
            used = torch.zeros_like(scores, dtype=torch.int8)
            used = used.scatter_add_(1, history, known.to(torch.int8)).bool()
            penalised = torch.where(
                scores < 0, scores * self.repetition_penalty, scores / self.repetition_penalty
            )
            scores = torch.where(used, penalised, scores)
        size = self.no_repeat_ngram_size
        if size and history.shape[1] >= size:
            grams, real = history.unfold(1, size, 1), known.unfold(1, size, 1).all(-1)
            last = history[:, history.shape[1] - size + 1 :]
            repeats = (grams[..., :-1] == last[:, None]).all(-1) & real
            banned = torch.zeros_like(scores, dtype=torch.int8)
            banned = banned.scatter_add_(1, grams[..., -1], repeats.to(torch.int8)).bool()
            scores = scores.masked_fill(banned, float("-inf"))
        if new_tokens < self.min_new_tokens:
            scores = scores.clone()
            scores[:, self.eos_id] = float("-inf")
        return scores


def stop_every(device: torch.device) -> int:
    """After how many steps it is looked whether all texts have ended: on a GPU every look waits for it."""
    return 1 if device.type == "cpu" else 8
