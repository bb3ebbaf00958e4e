"""Sources with their targets: what encoder-decoders read."""

from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from mmtransformer.batch.base import Batch, as_mask


@dataclass
class Seq2SeqBatch(Batch):
    """Sources with their targets.

    Attributes:
        source: (n k) long, padded on either side.
        source_attention_mask: (n k) bool, True = a real token.
        tokens: (n q) long: prompt, target and end-of-sequence, padded on the right; a prompt alone, on the left.
        attention_mask: (n q) bool, True = a real token.
        loss_mask: (n q) bool, True = a token that the model must predict: target and end, not prompt, not padding.
        names: what the n rows are called in messages.

    Raises:
        ValueError: if a mask holds other numbers than 0 and 1.
    """

    source: Tensor
    source_attention_mask: Tensor
    tokens: Tensor
    attention_mask: Tensor
    loss_mask: Tensor
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.source_attention_mask = as_mask(self.source_attention_mask, "source_attention_mask")
        self.attention_mask = as_mask(self.attention_mask, "attention_mask")
        self.loss_mask = as_mask(self.loss_mask, "loss_mask")

    def truncate(self, length: int) -> Self:
        """The batch with only the first `length` tokens of every target."""
        return replace(
            self,
            tokens=self.tokens[:, :length],
            attention_mask=self.attention_mask[:, :length],
            loss_mask=self.loss_mask[:, :length],
        )
