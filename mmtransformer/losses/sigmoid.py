"""SigLIP's loss: each pair of an image and a text is judged by itself (arXiv:2303.15343)."""

import torch.nn.functional as F
from torch import Tensor

from mmtransformer.losses.contrastive import Similarity, harder
from mmtransformer.losses.distributed import global_mean


def sigmoid_loss(similarity: Similarity, scale: Tensor, bias: Tensor, *, hardness: float = 0.0) -> Tensor:
    """The sum over all pairs of -log sigmoid(z (scale s + bias)), z = 1 where they belong together, else -1, a text.

    Args:
        similarity: from `compare`; pairs with padding samples do not count.
        scale: what similarities s are multiplied by, a scalar.
        bias: what is added, a scalar; SigLIP learns it from -10.
        hardness: see `softmax_loss`.

    Returns:
        A scalar, whose mean over the processes is the sum over all pairs divided by the number of texts.
    """
    s = similarity
    logits = s.of_images * scale + bias
    same, real = s.texts_of_images(), (s.image_ids >= 0)[:, None] & (s.all_text_ids >= 0)
    losses = -F.logsigmoid(logits.where(same, -logits))
    if hardness:
        losses = losses * harder(logits, real & ~same, hardness).exp()
    return global_mean((losses * real).sum(), (s.text_ids >= 0).sum())
