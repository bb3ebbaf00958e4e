"""What generation needs of a model, what a search is, and what comes out.

Shapes: n rows of prompts, m rows of texts (beams or samples of a prompt, side by side).
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from mmtransformer.captioners.base import State


class TokenBatch(Protocol):
    """What a search reads of a batch; the model reads the rest (pictures, source texts)."""

    tokens: Tensor
    """(n q) long, padded on the left."""
    attention_mask: Tensor
    """(n q) bool, True = a real token."""


BatchT = TypeVar("BatchT", bound=TokenBatch, contravariant=True)


class GenerativeModel(Protocol[BatchT]):
    """What generation needs of a model: every `Captioner` has it, every `Decoder`, and the 2017 `Transformer`."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids that it scores."""
        ...

    @property
    def max_len(self) -> int:
        """Most text tokens of a row, prompt included."""
        ...

    def prefill(self, batch: BatchT, *, expand_size: int = 1, max_new_tokens: int = 40) -> tuple[Tensor, State]:
        """See `Captioner.prefill`."""
        ...

    def decode_step(self, tokens: Tensor, state: Any) -> Tensor:
        """See `Captioner.decode_step`."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """All of its modules, which are in evaluation mode while it writes."""
        ...


@dataclass(frozen=True)
class GenerationResult:
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

    @classmethod
    def until_end(cls, ids: list[int], log_probs: list[float], ends: Collection[int]) -> "GenerationResult":
        """The text that new ids are, up to the first that ends it."""
        length = next((i for i, token in enumerate(ids) if token in ends), len(ids))
        finished = length < len(ids)
        return cls(ids[:length], sum(log_probs[: length + finished]), log_probs[:length], finished)


class Search(Protocol):
    """What chooses the tokens: greedy search and sampling (`Sampler`), or beams (`BeamSearch`)."""

    expand_size: int
    """Texts that are written after each prompt."""
    done: Tensor
    """Bool: all True once no token is needed any more."""

    def advance(self, logits: Tensor, step: int) -> tuple[Tensor | None, Tensor]:
        """Chooses the next token of every text.

        Args:
            logits: (m v).
            step: how many tokens have been chosen before.

        Returns:
            Which row each text goes on from (m), None where each goes on from its own; and its token (m).
        """
        ...

    def texts(self) -> list[list[GenerationResult]]:
        """For each prompt its texts, best first; or in the order drawn."""
        ...
