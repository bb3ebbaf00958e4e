"""What a captioner is: images and a prompt -> logits, whatever connects vision and language.

Everything above (training, generation, evaluation) speaks only to this contract, so a connector is exchanged in a word.

Shapes: n rows of text, r of each of the b samples, side by side: they share its images; gh gw rows and columns of
patches; c numbers of a patch (its channels, rows and columns).
"""

from abc import ABC, abstractmethod
from typing import Any, Literal, Self, overload

import torch
from einops import rearrange
from torch import Tensor, nn

from mmtransformer.backbones.base import State
from mmtransformer.backbones.vit import ViT
from mmtransformer.backbones.vit_variants.padded import padded_features
from mmtransformer.batch import CaptionBatch, ModelOutput, SumAndCount
from mmtransformer.batch.base import check_shape, with_images
from mmtransformer.batch.captions import DOCUMENT_FIELDS, check_texts
from mmtransformer.batch.images import token_mask
from mmtransformer.layers.modes import freeze, is_frozen
from mmtransformer.layers.record import has_attention
from mmtransformer.losses.next_token import next_token_loss
from mmtransformer.serialization.pretrained import Pretrained

INSTRUCTION = ("instruction", "instruction_attention_mask")
"""The fields that an `InstructBatch` adds."""
NATIVE = (*DOCUMENT_FIELDS, "image_sizes", *INSTRUCTION)
"""What a captioner does not read that takes images of native size (`patch_grids`), but no documents."""


class Captioner(Pretrained, nn.Module, ABC):
    """The contract of every captioner: a vision encoder, a language model, and what connects them.

    `forward` gives the loss. A captioner's own file shows its `hidden_states`, which reads like the figure of its
    paper, and how it decodes (`prefill`, `decode_step`). Parts whose parameters are all frozen stay in evaluation mode.
    What of the vision encoder no captioner reads, its pooling and its classes, is frozen: it would get no gradient,
    which plain data-parallel training does not take.

    Args:
        vision: the vision encoder; its `forward_features` gives the visual tokens.
        freeze_vision: whether it is taken out of training (its features can then be cached): in place, so also in other
            models that share it.
        train_vision_norm: whether the last norm of a frozen one learns, as in BLIP-2's own code; `forward_features`
            then gives, and a cache keeps, the tokens before it.

    Raises:
        ValueError: for `train_vision_norm` without `freeze_vision`.
    """

    decoder: Any
    """The language model: a `Decoder`, or an encoder-decoder."""
    unsupported_fields: tuple[str, ...] = (*DOCUMENT_FIELDS, "image_sizes", "patch_grids", *INSTRUCTION)
    """Fields of a batch that this captioner does not support, and refuses."""

    def __init__(self, vision: ViT, *, freeze_vision: bool = False, train_vision_norm: bool = False) -> None:
        super().__init__()
        if train_vision_norm and not freeze_vision:
            raise ValueError(
                "train_vision_norm is for a frozen vision encoder: in one that learns, its norm learns anyway"
            )
        if not hasattr(vision, "forward_features"):
            raise TypeError(f"vision must be a vision encoder, such as a ViT, not {type(vision).__name__}")
        self.vision, self.freeze_vision, self.train_vision_norm = vision, freeze_vision, train_vision_norm
        if freeze_vision:
            freeze(vision)
            vision.norm.requires_grad_(train_vision_norm)
        for part in (vision.attn_pool, vision.head):
            if part is not None:
                part.requires_grad_(False)

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the head scores."""
        return self.decoder.vocab_size

    @property
    def max_len(self) -> int:
        """Most text tokens of a row, prompt included."""
        return self.decoder.max_len

    def forward(self, batch: CaptionBatch, *, label_smoothing: float = 0.0, return_logits: bool = False) -> ModelOutput:
        """The loss of the captions, each token given the images and the tokens before it.

        Args:
            batch: images and right-padded rows of text.
            label_smoothing: share of the target's probability that is spread over the vocabulary.
            return_logits: whether to give the logits of every token, not only the loss.

        Raises:
            ValueError: if a row is longer than can be read or not padded on the right, or the batch has fields that
                this captioner does not support.
        """
        check_rows(self, batch)
        q = batch.tokens.shape[1] - (not return_logits)  # The last token predicts nothing.
        hidden = self.hidden_states(batch.truncate(q))
        logits, head = None, self.head
        if return_logits:
            hidden = logits = head(hidden)
            head = nn.Identity()
        sums = next_token_loss(hidden, batch.tokens, batch.loss_mask, head, label_smoothing=label_smoothing)
        return ModelOutput(sums, logits)

    @abstractmethod
    def hidden_states(self, batch: CaptionBatch) -> Tensor:
        """Hidden states before the head, for right-padded rows: (n q d)."""

    def head(self, hidden: Tensor) -> Tensor:
        """Logits: (... d) -> (... vocab)."""
        return self.decoder.head(hidden)

    @abstractmethod
    def prefill(self, batch: CaptionBatch, *, expand_size: int = 1, max_new_tokens: int = 40) -> tuple[Tensor, State]:
        """Reads images and left-padded prompts, once; then every row stands `expand_size` times, side by side.

        Returns:
            Logits of the first new token (n * expand_size, vocab), and the state to give to `decode_step`.
        """

    def decode_step(self, tokens: Tensor, state: Any) -> Tensor:
        """Adds one token a row to what `prefill` gave: (n) long -> logits of the next (n vocab)."""
        return self.decoder.head(self.decoder(tokens[:, None], state=state)[:, 0])

    @property
    def has_heatmaps(self) -> bool:
        """Whether `attention_map` can say where in an image a word comes from; see `heatmap_error`."""
        return self.heatmap_error is None

    @property
    def heatmap_error(self) -> str | None:
        """Why there are no heat maps, None = there are: a language model that runs in transformers records nothing."""
        writer = getattr(self, "decoder", self)  # A Q-Former writes by itself.
        if has_attention(writer):
            return None
        return f"there are no heat maps of a {type(writer).__name__}, which runs in transformers"

    @abstractmethod
    def attention_map(self, batch: CaptionBatch) -> Tensor:
        """Where each text token looks in the images: (n q i gh gw), at most 1 in sum over all patches."""

    def logits(self, batch: CaptionBatch) -> Tensor:
        """Logits of every token of right-padded rows: (n q vocab)."""
        check_rows(self, batch)
        return self.head(self.hidden_states(batch))

    def forward_features(self, pixels: Tensor, patch_grids: Tensor | None = None) -> Tensor:
        """The vision encoder's tokens, not pooled, before a last norm that learns: (b i 3 h w) -> (b i p d).

        Args:
            pixels: of a batch.
            patch_grids: of a batch, where its pixels are patches; the tokens are filled up with zeros.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_vision):
            if patch_grids is not None:
                return padded_features(self.vision, pixels, patch_grids, [-1] if self.train_vision_norm else None)
            pixels = pixels if pixels.ndim == 5 else with_images(pixels)
            features = self._features(rearrange(pixels, "b i c h w -> (b i) c h w"))
        return features.unflatten(0, pixels.shape[:2])

    def _features(self, pixels: Tensor) -> Tensor:
        """What `forward_features` reads of the vision encoder's tokens: (n 3 height width) -> (n p d)."""
        if self.train_vision_norm:
            return self.vision.tokens_after(pixels, [-1])[0]
        return self.vision.forward_features(pixels)

    def visual_tokens(self, batch: CaptionBatch) -> Tensor:
        """The batch's visual tokens (b i p d), normed: those of a cache, else of its pixels.

        Raises:
            ValueError: if the batch has neither, or fields that this captioner does not support.
        """
        self.check_fields(batch)
        visual = batch.visual
        if batch.visual_tokens is None:
            grids = batch.patch_grids
            visual = self.forward_features(visual) if grids is None else self.forward_features(visual, grids)
        norm = self.vision.norm
        return norm(visual.to(next(norm.parameters()).dtype)) if self.train_vision_norm else visual

    def visual_mask(self, batch: CaptionBatch, count: int) -> Tensor | None:
        """Which of the `count` visual tokens of each image are those of a real one: (b i count) bool; None = all."""
        real = None if batch.image_mask is None else batch.image_mask[..., None].expand(-1, -1, count)
        if batch.patch_grids is None:
            return real
        found = token_mask(batch.patch_grids, count, self.vision.num_prefix_tokens)
        return found if real is None else found & real

    def check_fields(self, batch: CaptionBatch) -> None:
        """Refuses a batch with fields that this captioner does not support.

        Raises:
            ValueError: naming the first of them.
        """
        for name in self.unsupported_fields:
            if getattr(batch, name, None) is not None:
                raise ValueError(f"{type(self).__name__} does not support the batch field {name}")

    def grid(self, batch: CaptionBatch) -> tuple[int, int]:
        """Rows and columns of an image's patches, of those with sizes of their own what maps are drawn on."""
        if batch.pixels is None or batch.patch_grids is not None:
            return self.vision.grid_size
        return self.vision.dynamic_feat_size(*batch.pixels.shape[3:])

    def train(self, mode: bool = True) -> Self:
        """Training mode for all but frozen parts: no dropout, no stochastic depth where nothing learns."""
        super().train(mode)
        for part in self.children():
            if is_frozen(part) or (part is self.vision and self.freeze_vision):  # Its last norm may learn.
                part.eval()
        return self

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay spares, beside biases and norms: those that its parts name."""
        return {
            f"{path}.{name}"
            for path, part in self.named_modules()
            if path and hasattr(part, "no_weight_decay")
            for name in part.no_weight_decay()  # pyright: ignore[reportCallIssue]
        }


@overload
def caption_loss(
    captioner: Captioner, batch: CaptionBatch, *, label_smoothing: float = 0.0, reduction: Literal["mean"] = "mean"
) -> Tensor: ...
@overload
def caption_loss(
    captioner: Captioner, batch: CaptionBatch, *, label_smoothing: float = 0.0, reduction: Literal["sum"]
) -> SumAndCount: ...
def caption_loss(
    captioner: Captioner,
    batch: CaptionBatch,
    *,
    label_smoothing: float = 0.0,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor | SumAndCount:
    """Cross-entropy of the captions alone, also where a captioner trains on other losses beside it.

    Args:
        captioner: the model.
        batch: right-padded rows.
        label_smoothing: share of the target's probability that is spread over the vocabulary.
        reduction: "mean" over the predicted tokens, a scalar; or their "sum" and count.

    Returns:
        Zero, gradient too, where no token is to be predicted.

    Raises:
        TypeError: of a model around a captioner, whose own call gives the loss (and in DDP shares the gradient).
        ValueError: as `Captioner.forward`, and for another reduction.
    """
    if not hasattr(captioner, "hidden_states"):
        kind = type(captioner).__name__
        raise TypeError(
            f"caption_loss is of a Captioner, not of what is around one, a {kind}: call that, wrapper(batch).loss"
        )
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum", not "{reduction}"')
    output = Captioner.forward(captioner, batch, label_smoothing=label_smoothing)
    return output.loss if reduction == "mean" else output.sums


def check_rows(captioner: Captioner, batch: CaptionBatch) -> None:
    """Refuses rows of text that would not be read as they are meant.

    Raises:
        TypeError: of what is no batch, such as a tensor of pixels alone.
        ValueError: as `check_texts`, if masks are not of the tokens or images, a row is longer than the captioner can
            read, or (on a CPU: elsewhere it would be a wait for the device) has padding that is not at its end or is
            to be predicted.
    """
    if not hasattr(batch, "attention_mask"):
        what = "tensor" if isinstance(batch, Tensor) else type(batch).__name__
        raise TypeError(
            f"{type(captioner).__name__} reads a CaptionBatch, pixels with their texts, not a {what}: CaptionData's "
            f"loader makes such batches; what writes texts for pictures alone is ImageCaptioner"
        )
    mask, given = batch.attention_mask, [batch.tokens, batch.attention_mask, batch.loss_mask]
    if any(x.ndim != 2 or x.shape != batch.tokens.shape for x in given):
        each = "{}, {} and {}".format(*([*x.shape] for x in given))
        raise ValueError(f"tokens, attention_mask and loss_mask are (n q), all alike, not {each}")
    check_texts(batch)
    for name in DOCUMENT_FIELDS:
        check_shape(getattr(batch, name), name, batch.tokens.shape, "tokens")
    if batch.pixels is not None:
        check_shape(batch.image_mask, "image_mask", batch.pixels.shape[:2], "images")
    if mask.shape[1] > captioner.max_len:
        way = f"let CaptionData(max_len={captioner.max_len}) cut them, or give the decoder a larger max_len"
        raise ValueError(f"rows of {mask.shape[1]} tokens, but the captioner reads {captioner.max_len} at most: {way}")
    if mask.device.type == "cpu" and not torch.compiler.is_compiling():
        late = (mask[:, 1:] > mask[:, :-1]).any(1)
        if bool(late.any()):
            raise ValueError(
                f"row {int(late.nonzero()[0])} has real tokens behind padding: only prompts are padded on the left"
            )
        if bool((fill := (batch.loss_mask & ~mask).any(1)).any()):
            raise ValueError(
                f"loss_mask asks for padding in row {int(fill.nonzero()[0])}, where attention_mask is False: a loss is "
                "of real tokens, so give loss_mask & attention_mask"
            )
