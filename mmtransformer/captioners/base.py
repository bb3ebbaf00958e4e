"""What a captioner is: pictures and a prompt -> logits, whatever the bridge between vision and language.

Everything above (training, generation, evaluation) speaks only to this contract, so a bridge is exchanged in a word.

Letters: b samples, i pictures of a sample, p visual tokens of a picture, n = b * r rows of text (r texts share a
sample's pictures, and are consecutive), q text tokens, d width of a token, gh gw rows and columns of patches.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self, TypeVar

from torch import Tensor, nn

from mmtransformer.backbones.vit import ViT
from mmtransformer.batch import Batch
from mmtransformer.losses.next_token import Loss, next_token_loss
from mmtransformer.serialization.pretrained import Pretrained

Module = TypeVar("Module", bound=nn.Module)


@dataclass
class CaptionBatch(Batch):
    """Pictures with their texts.

    Attributes:
        tokens: (n q) long: prompt, caption and end-of-sequence, padded on the right; a prompt alone, on the left.
        attention_mask: (n q) bool, True = a real token.
        loss_mask: (n q) bool, True = a token that the model must predict: caption and end, not prompt, not padding.
        pixels: (b i 3 height width).
        visual_tokens: (b i p d), what `Captioner.encode` makes of pixels, in their place (a feature cache).
        names: the b samples' names.
        references: the b samples' captions, each (text, language).
        image_mask: (b i) bool, which of a sample's pictures are real, where samples have different numbers; None = all.
        image_index: (n q) long: number (from 1) of the last picture that has come up to and including a token, 0 = none
            in its own document; None = all pictures stand before the text.
        first_image_index: (n q) long: number of the first picture of the token's own document; None = 1.
        document_ids: (n q) long: number (from 0) of the token's document in a packed row; None = one document a row.
    """

    tokens: Tensor
    attention_mask: Tensor
    loss_mask: Tensor
    pixels: Tensor | None = None
    visual_tokens: Tensor | None = None
    names: tuple[str, ...] = ()
    references: tuple[tuple[tuple[str, str | None], ...], ...] = ()
    image_mask: Tensor | None = None
    image_index: Tensor | None = None
    first_image_index: Tensor | None = None
    document_ids: Tensor | None = None

    @property
    def visual(self) -> Tensor:
        """The pictures in whatever form they came, pixels or cached tokens: (b i ...).

        Raises:
            ValueError: if the batch has neither.
        """
        visual = self.pixels if self.visual_tokens is None else self.visual_tokens
        if visual is None:
            raise ValueError("a batch needs pixels or visual_tokens, this one has neither")
        return visual

    def truncate(self, length: int) -> Self:
        """The batch with only the first `length` tokens of every row."""
        rows = ("tokens", "attention_mask", "loss_mask", "image_index", "first_image_index", "document_ids")
        found = {name: getattr(self, name) for name in rows}
        return replace(self, **{name: x[:, :length] for name, x in found.items() if x is not None})


class State(Protocol):
    """What a captioner remembers between decoding steps."""

    def reorder(self, rows: Tensor) -> None:
        """Keeps the given rows of text, in their order; a row stays within its sample's rows (beams)."""
        ...


class Captioner(Pretrained, nn.Module, ABC):
    """The contract of every bridge. Towers whose parameters are all frozen stay in evaluation mode."""

    vision: ViT

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of token ids that the head scores."""

    @property
    @abstractmethod
    def max_len(self) -> int:
        """Most text tokens of a row, prompt included."""

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """The vision tower's tokens, (b i 3 height width) -> (b i p d): what a feature cache keeps."""

    @abstractmethod
    def hidden_states(self, batch: CaptionBatch) -> Tensor:
        """Hidden states before the head, for right-padded rows: (n q d)."""

    @abstractmethod
    def head(self, hidden: Tensor) -> Tensor:
        """Logits: (... d) -> (... vocab)."""

    @abstractmethod
    def prefill(
        self, batch: CaptionBatch, *, expand_size: int = 1, max_new_tokens: int = 40
    ) -> tuple[Tensor, State]:
        """Reads pictures and left-padded prompts, once; then every row stands `expand_size` times, side by side.

        Returns:
            Logits of the first new token (n * copies, vocab), and the state to give to `decode_step`.
        """

    @abstractmethod
    def decode_step(self, tokens: Tensor, state: Any) -> Tensor:
        """Adds one token a row to what `prefill` gave: (m) long -> logits of the next (m vocab), m = n copies."""

    @abstractmethod
    def attention_map(self, batch: CaptionBatch) -> Tensor:
        """Where each text token looks in the pictures: (n q i gh gw), at most 1 in sum over all patches."""

    def loss(self, batch: CaptionBatch, *, label_smoothing: float = 0.0) -> Loss:
        """What is trained on: the loss of the captions, for most captioners."""
        return caption_loss(self, batch, label_smoothing=label_smoothing)

    def logits(self, batch: CaptionBatch) -> Tensor:
        """Logits of every token of right-padded rows: (n q vocab)."""
        return self.head(self.hidden_states(batch))

    def visual_tokens(self, batch: CaptionBatch) -> Tensor:
        """The batch's visual tokens (b i p d): those of a cache, else of its pixels.

        Raises:
            ValueError: if the batch has neither.
        """
        if batch.visual_tokens is not None:
            return batch.visual_tokens
        if batch.pixels is None:
            raise ValueError("a batch needs pixels or visual_tokens, this one has neither")
        return self.encode(batch.pixels.to(next(self.vision.parameters()).dtype))

    def train(self, mode: bool = True) -> Self:
        """Training mode for all but frozen towers: no dropout, no stochastic depth where nothing learns."""
        super().train(mode)
        for tower in self.children():
            if is_frozen(tower):
                tower.eval()
        return self


def freeze(module: Module) -> Module:
    """Takes a tower out of training: no gradients, evaluation mode (which `Captioner.train` then keeps)."""
    return module.requires_grad_(False).eval()


def is_frozen(module: nn.Module) -> bool:
    """Whether a module has parameters, and none of them learns."""
    parameters = list(module.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)


def caption_loss(captioner: Captioner, batch: CaptionBatch, *, label_smoothing: float = 0.0) -> Loss:
    """Cross-entropy of the target tokens (`next_token_loss`); zero, gradient too, where there are none.

    Args:
        captioner: the model.
        batch: right-padded rows.
        label_smoothing: share of the target's probability that is spread over the vocabulary.

    Raises:
        ValueError: if a row is longer than the captioner can read.
    """
    check_rows(captioner, batch)
    hidden = captioner.hidden_states(batch.truncate(batch.tokens.shape[1] - 1))
    return next_token_loss(
        hidden, batch.tokens, batch.loss_mask, captioner.head, label_smoothing=label_smoothing
    )


def check_rows(captioner: Captioner, batch: CaptionBatch) -> None:
    """Refuses rows that cannot be read to their end.

    Raises:
        ValueError: if a row is longer than the captioner can read.
    """
    if batch.tokens.shape[1] > captioner.max_len:
        raise ValueError(
            f"rows of {batch.tokens.shape[1]} tokens, but the captioner reads {captioner.max_len} at most"
        )
