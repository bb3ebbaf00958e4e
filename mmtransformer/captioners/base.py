"""What a captioner is: images and a prompt -> logits, whatever connects vision and language.

Everything above (training, generation, evaluation) speaks only to this contract, so a connector is exchanged in a word.

Shapes: n rows of text, r of each of the b samples, side by side: they share its images; gh gw rows and columns of
patches; c numbers of a patch (its channels, rows and columns).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self, TypeVar, overload

import torch
from einops import rearrange
from torch import Tensor, nn

from mmtransformer.backbones.base import State
from mmtransformer.backbones.vit import ViT
from mmtransformer.backbones.vit_variants.padded import pad_images, padded_features, token_mask
from mmtransformer.batch import Batch, as_mask, check_shape, with_images
from mmtransformer.losses.next_token import SumAndCount, next_token_loss
from mmtransformer.serialization.pretrained import Pretrained

Module = TypeVar("Module", bound=nn.Module)

# The fields of a `CaptionBatch` that have a place for every text token.
_TOKEN_FIELDS = ("tokens", "attention_mask", "loss_mask", "image_index", "first_image_index", "document_ids")

_DOCUMENTS = ("image_index", "first_image_index", "document_ids")
INSTRUCTION = ("instruction", "instruction_attention_mask")
"""The fields that an `InstructBatch` adds."""
NATIVE = (*_DOCUMENTS, "image_sizes", *INSTRUCTION)
"""What a captioner does not read that takes images of native size (`patch_grids`), but no documents."""


@dataclass
class CaptionBatch(Batch):
    """Images with their texts.

    Attributes:
        tokens: (n q) long: prompt, caption and end-of-sequence, padded on the right; a prompt alone, on the left.
        attention_mask: (n q) bool, True = a real token.
        loss_mask: (n q) bool, True = a token that the model must predict: caption and end, not prompt, not padding.
        pixels: (b i 3 height width); (b 3 height width) is taken as one image a sample. With `patch_grids` patches
            (b i p c), filled up to the most that an image has.
        visual_tokens: (b i p d), what `Captioner.forward_features` makes of pixels, in their place (a feature cache).
        names: the b samples' names. In contrastive losses, samples of one name are no negatives of each other.
        references: the b samples' captions, each (text, language).
        questions: what is asked of each of the b samples, None where nothing is; () = of none.
        image_mask: (b i) bool, which of a sample's images are real, where samples have different numbers; None = all.
        image_index: (n q) long: number (from 1) of the last image that has come up to and including a token, 0 = none
            in its own document; None = all images stand before the text.
        first_image_index: (n q) long: number of the first image of the token's own document; None = 1.
        document_ids: (n q) long: number (from 0) of the token's document in a packed row; None = one document a row.
        patch_grids: (b i 2) long, rows and columns of patches of each image, where images have sizes of their own
            (`ImageTransform` with resize "native"); 0 = no image. None = all have one size.

    Raises:
        ValueError: if pixels have another number of dimensions, or masks other numbers than 0 and 1.
    """

    tokens: Tensor
    attention_mask: Tensor
    loss_mask: Tensor
    pixels: Tensor | None = None
    visual_tokens: Tensor | None = None
    names: tuple[str, ...] = ()
    references: tuple[tuple[tuple[str, str | None], ...], ...] = ()
    questions: tuple[str | None, ...] = ()
    image_mask: Tensor | None = None
    image_index: Tensor | None = None
    first_image_index: Tensor | None = None
    document_ids: Tensor | None = None
    patch_grids: Tensor | None = None

    def __post_init__(self) -> None:
        if self.pixels is not None and self.pixels.ndim != 5 and self.patch_grids is None:
            self.pixels = with_images(self.pixels)
        if not (self.attention_mask.dtype == self.loss_mask.dtype == torch.bool):
            self.attention_mask = as_mask(self.attention_mask, "attention_mask")
            self.loss_mask = as_mask(self.loss_mask, "loss_mask")

    @classmethod
    def from_pixels(cls, pixels: Sequence[Tensor], patch_size: int | None = None) -> Self:
        """Images (3 height width), one a sample, without texts.

        Args:
            pixels: of one size; with `patch_size` of any that it divides.
            patch_size: side of the vision encoder's patches, px, where images have sizes of their own.
        """
        none = torch.zeros(len(pixels), 0, dtype=torch.long)
        if patch_size is None:
            return cls(none, none.bool(), none.bool(), pixels=torch.stack([*pixels])[:, None])
        patches, grids = pad_images([[image] for image in pixels], patch_size)
        return cls(none, none.bool(), none.bool(), pixels=patches, patch_grids=grids)

    @property
    def visual(self) -> Tensor:
        """The images in whatever form they came, pixels or cached tokens: (b i ...).

        Raises:
            ValueError: if the batch has neither.
        """
        visual = self.pixels if self.visual_tokens is None else self.visual_tokens
        if visual is None:
            raise ValueError("a batch needs pixels or visual_tokens, this one has neither")
        return visual

    def pick_images(self, order: Tensor) -> Self:
        """The batch with other images in its samples' places: numbers (b i) among all of its b * i, read in a row."""
        images = {name: getattr(self, name) for name in ("pixels", "visual_tokens", "patch_grids")}
        kept = {name: x.flatten(0, 1)[order.to(x.device)] for name, x in images.items() if x is not None}
        return replace(self, **kept)

    def truncate(self, length: int) -> Self:
        """The batch with only the first `length` tokens of every row."""
        texts = {name: getattr(self, name) for name in _TOKEN_FIELDS}
        return replace(self, **{name: x[:, :length] for name, x in texts.items() if x is not None})


@dataclass(frozen=True)
class ModelOutput:
    """What a captioner's `forward` gives.

    Attributes:
        sums: the loss as a sum and a count, for training over micro-batches and processes, which divides at the end.
        logits: (n q vocab), of every token, where they were asked for; else None: training needs those of the
            predicted tokens only, and makes no others.
        terms: what the loss is made of, by name (detached scalars), where it is made of several.
    """

    sums: SumAndCount
    logits: Tensor | None = None
    terms: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def loss(self) -> Tensor:
        """The mean over what is predicted, a scalar, 0 where nothing is: what to call `backward` on."""
        return self.sums.sum / self.sums.count.clamp(min=1)


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
        train_norm: whether the last norm of a frozen one learns, as in BLIP-2's own code; `forward_features` then
            gives, and a cache keeps, the tokens before it.

    Raises:
        ValueError: for `train_norm` without `freeze_vision`.
    """

    decoder: Any
    """The language model: a `Decoder`, or an encoder-decoder."""
    unsupported_fields: tuple[str, ...] = (*_DOCUMENTS, "image_sizes", "patch_grids", *INSTRUCTION)
    """Fields of a batch that this captioner does not support, and refuses."""

    def __init__(self, vision: ViT, *, freeze_vision: bool = False, train_norm: bool = False) -> None:
        super().__init__()
        if train_norm and not freeze_vision:
            raise ValueError("train_norm is for a frozen vision encoder: in one that learns, its norm learns anyway")
        if not hasattr(vision, "forward_features"):
            raise TypeError(f"vision must be a vision encoder, such as a ViT, not {type(vision).__name__}")
        self.vision, self.freeze_vision, self.train_norm = vision, freeze_vision, train_norm
        if freeze_vision:
            freeze(vision)
            vision.norm.requires_grad_(train_norm)
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
        """Whether `attention_map` can say anything: a language model that runs in transformers records nothing."""
        return True

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
                return padded_features(self.vision, pixels, patch_grids, [-1] if self.train_norm else None)
            pixels = pixels if pixels.ndim == 5 else with_images(pixels)
            features = self._features(rearrange(pixels, "b i c h w -> (b i) c h w"))
        return features.unflatten(0, pixels.shape[:2])

    def _features(self, pixels: Tensor) -> Tensor:
        """What `forward_features` reads of the vision encoder's tokens: (n 3 height width) -> (n p d)."""
        if self.train_norm:
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
        return norm(visual.to(next(norm.parameters()).dtype)) if self.train_norm else visual

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


def freeze(module: Module) -> Module:
    """Takes a part out of training: no gradients, evaluation mode (which `Captioner.train` then keeps)."""
    return module.requires_grad_(False).eval()


def is_frozen(module: nn.Module) -> bool:
    """Whether a module has parameters, and none of them learns."""
    parameters = list(module.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)


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
        ValueError: as `Captioner.forward`, and for another reduction.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum", not "{reduction}"')
    output = Captioner.forward(captioner, batch, label_smoothing=label_smoothing)
    return output.loss if reduction == "mean" else output.sums


def check_rows(captioner: Captioner, batch: CaptionBatch) -> None:
    """Refuses rows of text that would not be read as they are meant.

    Raises:
        TypeError: of what is no batch, such as a tensor of pixels alone.
        ValueError: if masks are not of the tokens or images, a row is longer than the captioner can read, or (on a CPU:
            elsewhere it would be a wait for the device) has padding that is not at its end.
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
    for name in _DOCUMENTS:
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
