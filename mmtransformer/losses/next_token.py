"""The loss of predicting the next token: the one place where labels are shifted.

Shapes: n rows, m places that predict a token.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtransformer.batch import SumAndCount
from mmtransformer.batch.base import num_targets


def next_token_loss(
    hidden: Tensor, tokens: Tensor, loss_mask: Tensor, head: Callable[[Tensor], Tensor], *, label_smoothing: float = 0.0
) -> SumAndCount:
    """Cross-entropy of the target tokens, each predicted by the position before it.

    The head runs on the positions that predict a target, so logits of prompts and padding never exist.

    Args:
        hidden: (n q d), or (n q-1 d) without the last token's, which predicts nothing.
        tokens: (n q) long.
        loss_mask: (n q) bool, True = to be predicted; the first token of a row never is.
        head: hidden states (m d) -> logits (m vocab).
        label_smoothing: share of the target's probability that is spread over the vocabulary (arXiv:1512.00567).

    Returns:
        The sum, and the number of targets; both zero, and the gradient too, where there is no target.
    """
    count = None if torch.compiler.is_compiling() else num_targets(loss_mask)
    if count is None:
        places = loss_mask[:, 1:].nonzero(as_tuple=True)  # a wait for the device: a mask as index would wait thrice
    else:
        places = torch.nonzero_static(loss_mask[:, 1:], size=count).unbind(1)
    chosen = tokens[:, 1:][places]
    logits = head(hidden[places])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits, chosen, reduction="sum", label_smoothing=label_smoothing)
    return SumAndCount(total, torch.tensor(chosen.numel(), device=total.device))
