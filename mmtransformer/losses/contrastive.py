"""Losses of images with texts: contrastive, matching and generation, each importable alone.

    loss = itc_loss(image_features, text_features, temperature)  # (b l e), (n e): as many texts for every image

They are means over the global batch of all processes, in the sense that data-parallel training asks for: the MEAN over
the processes of what each returns is the loss of the global batch, and the mean of their gradients (what DDP computes)
is its gradient, however the batch was cut. One process is the case of a mean over one; no process group is needed.

Shapes: b images and n texts of this process, B and N those of all processes, l vectors of an image, e width of a
vector, m rows, q tokens, d width of a token.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtransformer.losses.distributed import all_gather_rows, global_mean, row_offset, world_size
from mmtransformer.losses.next_token import next_token_loss

MAX_LOGIT_SCALE = 100.0
"""The most that CLIP's softmax multiplies similarities by: a steeper one made its training unstable (section 2.5)."""

# ---------------------------------------------------------------------------------------------- contrastive


class Similarity(NamedTuple):
    """How near this process's images and texts are to those of all processes; ids say what belongs together.

    Attributes:
        of_images: (b N).
        of_texts: (n B).
        image_ids: (b) long; -1 = a padding sample, which is neither asked nor found.
        text_ids: (n) long, the id of a text's image.
        all_image_ids: (B).
        all_text_ids: (N).
        text_keys: (n) long, the same for texts that are the same, which belong to each other's images too; None = a
            text belongs to its own image alone.
        all_text_keys: (N).
    """

    of_images: Tensor
    of_texts: Tensor
    image_ids: Tensor
    text_ids: Tensor
    all_image_ids: Tensor
    all_text_ids: Tensor
    text_keys: Tensor | None = None
    all_text_keys: Tensor | None = None

    def texts_of_images(self) -> Tensor:
        """Which texts belong to this process's images: (b N) bool."""
        same = self.image_ids[:, None] == self.all_text_ids
        if self.text_keys is not None and self.all_text_keys is not None:
            own = self.text_keys.unflatten(0, (len(self.image_ids), -1))
            same = same | (own[:, :, None] == self.all_text_keys).any(1)
        return same & (self.image_ids >= 0)[:, None] & (self.all_text_ids >= 0)

    def images_of_texts(self) -> Tensor:
        """Which images this process's texts belong to: (n B) bool."""
        same = self.text_ids[:, None] == self.all_image_ids
        if self.text_keys is not None and self.all_text_keys is not None:
            others = self.all_text_keys.unflatten(0, (len(self.all_image_ids), -1))
            same = same | (self.text_keys[:, None, None] == others).any(2)
        return same & (self.text_ids >= 0)[:, None] & (self.all_image_ids >= 0)

    def right(self) -> tuple[Tensor, Tensor]:
        """The shares of this process's images, and of its texts, whose nearest counterpart belongs to them."""
        shares = []
        for scores, same, real in (
            (self.of_images, self.texts_of_images(), self.all_text_ids >= 0),
            (self.of_texts, self.images_of_texts(), self.all_image_ids >= 0),
        ):
            nearest = scores.detach().masked_fill(~real, -torch.inf).argmax(1, keepdim=True)
            shares.append(same.gather(1, nearest).sum() / same.any(1).sum().clamp(min=1))
        return shares[0], shares[1]


def image_ids(names: Sequence[str], loss_mask: Tensor) -> Tensor | None:
    """What image each of a batch is, the same in every process: what `compare` takes as image_ids.

    Args:
        names: the b images' names; none = all are different, and the result is None.
        loss_mask: (n q) bool, the tokens that are to be predicted of the n texts, n / b of each image side by side.

    Returns:
        (b) long; -1 where none of an image's texts has a target: a padding sample.
    """
    if not names:
        return None
    digests = (hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names)
    numbers = [int.from_bytes(digest, "little") >> 1 for digest in digests]
    counted = loss_mask.unflatten(0, (len(names), -1)).flatten(1).any(1)
    return torch.tensor(numbers, device=loss_mask.device).masked_fill(~counted, -1)


def text_keys(tokens: Tensor, attention_mask: Tensor) -> Tensor:
    """A number for each text, the same for the same text however it is padded: (n q) long and bool -> (n) long."""
    places = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    mixed = (tokens + 1) * -0x61C8864680B583EB + places * 0x2545F4914F6CDD1D  # 64 bits that wrap around
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return mixed.masked_fill(~attention_mask, 0).sum(1)


def compare(
    image_features: Tensor,
    text_features: Tensor,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    *,
    text_keys: Tensor | None = None,
    gather_grad: bool = True,
) -> Similarity:
    """Similarities of images and texts; of an image's vectors the one that is nearest to the text counts (BLIP-2).

    Args:
        image_features: (b l e), or (b e), L2-normed.
        text_features: (n e), L2-normed.
        image_ids: (b) long, what image it is, anywhere in the global batch; None = all are different.
        text_ids: (n) long, the id of its image; None = each image has n / b texts, side by side.
        text_keys: (n) long, the same for the same text, see the function of this name: such texts belong to each
            other's images too. All images then have n / b texts, side by side, in all processes.
        gather_grad: whether gradients reach the processes that candidates came from, see `all_gather_rows`.

    Raises:
        ValueError: if widths differ, or the texts cannot be shared out.
    """
    images, texts = image_features, text_features
    images = images.unsqueeze(1) if images.ndim == 2 else images
    if images.ndim != 3 or texts.ndim != 2 or images.shape[-1] != texts.shape[-1]:
        shapes = f"{tuple(images.shape)} and {tuple(texts.shape)}"
        raise ValueError(f"images are (b l e) or (b e) and texts (n e) of one width, not {shapes}")
    b, n = images.shape[0], texts.shape[0]
    if image_ids is None:
        image_ids = torch.arange(b, device=texts.device) + row_offset(b, texts.device)
    if text_ids is None:
        if b == 0 or n % b:
            raise ValueError(f"{n} texts cannot be shared out among {b} images: give text_ids")
        text_ids = image_ids.repeat_interleave(n // b)
    if image_ids.shape != (b,) or text_ids.shape != (n,):
        raise ValueError(f"ids are ({b}) and ({n}), not {tuple(image_ids.shape)} and {tuple(text_ids.shape)}")
    kind = torch.promote_types(images.dtype, torch.float32)
    with torch.autocast(images.device.type, enabled=False):  # Divided by a temperature, bfloat16's steps are large.
        images, texts = images.to(kind), texts.to(kind)
        of_images = torch.einsum("b l e, n e -> b n l", images, all_gather_rows(texts, grad=gather_grad)).amax(-1)
        if world_size() == 1:
            of_texts = of_images.transpose(0, 1)
        else:
            everyone = all_gather_rows(images, grad=gather_grad)
            of_texts = torch.einsum("b l e, n e -> n b l", everyone, texts).amax(-1)
    everyone_ids = all_gather_rows(image_ids), all_gather_rows(text_ids)
    all_keys = None if text_keys is None else all_gather_rows(text_keys)
    return Similarity(of_images, of_texts, image_ids, text_ids, *everyone_ids, text_keys, all_keys)


def contrastive_loss(similarity: Similarity, temperature: Tensor | float, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of finding an image's texts and a text's image, the mean of both ways.

    Where several texts belong to an image (or an image stands twice in the batch) they share the target.

    Args:
        similarity: from `compare`.
        temperature: what similarities are divided by, a scalar.
        label_smoothing: share of the target that is spread over all candidates.
    """
    return softmax_loss(similarity, 1 / temperature, label_smoothing=label_smoothing)


def softmax_loss(
    similarity: Similarity, logit_scale: Tensor | float, *, label_smoothing: float = 0.0, hardness: float = 0.0
) -> Tensor:
    """`contrastive_loss` by a scale, and with negatives that count the more, the more they are confused.

    Args:
        similarity: from `compare`.
        logit_scale: what similarities are multiplied by, a scalar.
        label_smoothing: share of the target that is spread over all candidates.
        hardness: the weights of a row's negatives are a softmax of their logits times this, 1 in the mean, and taken
            for constants (arXiv:2010.04592, eq. 4; of images and texts: arXiv:2301.02280); 0 = all count alike.
    """
    s = similarity
    to_texts = s.of_images * logit_scale, s.texts_of_images(), s.all_text_ids >= 0
    to_images = s.of_texts * logit_scale, s.images_of_texts(), s.all_image_ids >= 0
    return sum(_one_way(*way, label_smoothing, hardness) for way in (to_texts, to_images)) / 2  # pyright: ignore


def hard_negative_log_weights(logits: Tensor, negative: Tensor, hardness: float) -> Tensor:
    """The logarithms of the negatives' weights (m k), 0 of what is none; see `softmax_loss`."""
    steep = (hardness * logits.detach()).masked_fill(~negative, torch.finfo(logits.dtype).min)
    weights = steep.log_softmax(-1) + negative.sum(-1, keepdim=True).clamp(min=1).to(steep.dtype).log()
    return weights.masked_fill(~negative, 0.0)


def _one_way(logits: Tensor, same: Tensor, real: Tensor, smoothing: float, hardness: float) -> Tensor:
    asked = same.any(1)  # Not padding samples, nor images without a text.
    if hardness:
        logits = logits + hard_negative_log_weights(logits, real & ~same, hardness)
    log_probs = logits.masked_fill(~real, torch.finfo(logits.dtype).min).log_softmax(-1)
    targets = same.to(log_probs.dtype) / same.sum(1, keepdim=True).clamp(min=1)
    if smoothing:
        targets = targets * (1 - smoothing) + smoothing * real.to(targets.dtype) / real.sum().clamp(min=1)
    losses = -(targets * log_probs).sum(1)
    return global_mean((losses * asked).sum(), asked.sum())


def itc_loss(
    image_features: Tensor,
    text_features: Tensor,
    temperature: Tensor | float,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    label_smoothing: float = 0.0,
    gather_grad: bool = True,
) -> Tensor:
    """Image-text contrastive loss (ALBEF, arXiv:2107.07651; max over queries: BLIP-2, arXiv:2301.12597).

    Args:
        image_features: (b l e), or (b e), L2-normed.
        text_features: (n e), L2-normed.
        temperature: what similarities are divided by, a scalar; BLIP-2 learns it from 0.07.
        image_ids: (b) long, what image it is; None = all are different.
        text_ids: (n) long, the id of its image; None = each image has n / b texts, side by side.
        label_smoothing: share of the target that is spread over all candidates; BLIP-2's 0.1.
        gather_grad: whether gradients reach the processes that candidates came from.

    Returns:
        A scalar.
    """
    similarity = compare(image_features, text_features, image_ids, text_ids, gather_grad=gather_grad)
    return contrastive_loss(similarity, temperature, label_smoothing=label_smoothing)


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    image_ids: Tensor | None = None,
    gather_grad: bool = True,
) -> Tensor:
    """CLIP's symmetric loss (arXiv:2103.00020), also CoCa's: vectors (b e) and (n e), L2-normed.

    Args:
        image_features: (b e).
        text_features: (n e), n / b for each image, side by side.
        logit_scale: what similarities are multiplied by, a scalar, as of open_clip's ClipLoss: not its logarithm,
            which is what models learn, and which CLIP keeps below that of `MAX_LOGIT_SCALE`.
        image_ids: (b) long, what image it is; -1 = a padding sample, which takes no part; None = all are different.
        gather_grad: whether gradients reach the processes that candidates came from.
    """
    return softmax_loss(compare(image_features, text_features, image_ids, gather_grad=gather_grad), logit_scale)


def refuse_empty(attention_mask: Tensor) -> None:
    """Refuses texts without any token, (n q) bool and padded on the right: they would fit every image.

    Raises:
        ValueError: naming the first of them (on a CPU: elsewhere it would be a wait for the device).
    """
    if attention_mask.device.type == "cpu" and not bool(attention_mask[:, :1].all()):
        row = int((~attention_mask[:, 0]).nonzero()[0])
        raise ValueError(f"text {row} of {len(attention_mask)} is empty, and would fit every image: leave it out")


# ------------------------------------------------------------------------------------------------- matching


def itm_loss(logits: Tensor, match: Tensor, is_real: Tensor | None = None) -> Tensor:
    """Image-text matching: do this image and this text belong together?

    Args:
        logits: (m 2), no and yes.
        match: (m) bool.
        is_real: (m) bool, which rows count, the others being padding; None = all.

    Returns:
        A scalar, the mean over all real rows of all processes.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits, match.long(), reduction="none")
    is_real = torch.ones_like(match) if is_real is None else is_real
    return global_mean((losses * is_real).sum(), is_real.sum())


# ----------------------------------------------------------------------------------------------- generation


def itg_loss(
    hidden: Tensor, tokens: Tensor, loss_mask: Tensor, head: Callable[[Tensor], Tensor], *, label_smoothing: float = 0.0
) -> Tensor:
    """Image-grounded text generation: cross-entropy of each target token, given the image and the tokens before it.

    Args:
        hidden: (n q d), or (n q-1 d) without the last token's, which predicts nothing.
        tokens: (n q) long.
        loss_mask: (n q) bool, which tokens are to be predicted; the first cannot be.
        head: hidden states (m d) -> logits (m vocab).
        label_smoothing: share of the target that is spread over the vocabulary.

    Returns:
        A scalar, the mean over all target tokens of all processes.

    Raises:
        ValueError: if there is one process and no target token (on a CPU: elsewhere the mean is 0).
    """
    loss = next_token_loss(hidden, tokens, loss_mask, head, label_smoothing=label_smoothing)
    if tokens.device.type == "cpu" and world_size() == 1 and not int(loss.count):
        raise ValueError(f"none of the {tokens.shape[0]} texts has a target token")
    return global_mean(loss.sum, loss.count)
