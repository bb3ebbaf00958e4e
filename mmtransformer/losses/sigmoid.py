"""SigLIP's loss: each pair of an image and a text is judged by itself (arXiv:2303.15343)."""

import torch.nn.functional as F
from torch import Tensor

from mmtransformer.losses.contrastive import Similarity, compare, hard_negative_log_weights
from mmtransformer.losses.distributed import global_mean


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    image_ids: Tensor | None = None,
    gather_grad: bool = True,
) -> Tensor:
    """SigLIP's loss of vectors (b e) and (n e), L2-normed; see `clip_loss` for what is shared.

    Args:
        image_features: (b e).
        text_features: (n e), n / b for each image, side by side.
        logit_scale: what similarities are multiplied by, a scalar; SigLIP learns its logarithm, from log 10.
        logit_bias: what is then added, a scalar; SigLIP learns it from -10.
        image_ids: (b) long, what image it is; -1 = a padding sample, which takes no part; None = all are different.
        gather_grad: whether gradients reach the processes that candidates came from.
    """
    similarity = compare(image_features, text_features, image_ids, gather_grad=gather_grad)
    return sigmoid_loss(similarity, logit_scale, logit_bias)


def sigmoid_loss(
    similarity: Similarity, logit_scale: Tensor | float, logit_bias: Tensor | float, *, hardness: float = 0.0
) -> Tensor:
    """The sum over all pairs of -log sigmoid(z (scale s + bias)), z = 1 where they belong together, else -1, a text.

    Args:
        similarity: from `compare`; pairs with padding samples do not count.
        logit_scale: what similarities s are multiplied by, a scalar.
        logit_bias: what is added, a scalar.
        hardness: see `softmax_loss`.

    Returns:
        A scalar, whose mean over the processes is the sum over all pairs divided by the number of texts.
    """
    s = similarity
    logits = s.of_images * logit_scale + logit_bias
    same, real = s.texts_of_images(), (s.image_ids >= 0)[:, None] & (s.all_text_ids >= 0)
    losses = -F.logsigmoid(logits.where(same, -logits))
    if hardness:
        losses = losses * hard_negative_log_weights(logits, real & ~same, hardness).exp()
    return global_mean((losses * real).sum(), (s.text_ids >= 0).sum())
