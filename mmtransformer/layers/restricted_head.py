"""RestrictedLMHead: a language model's last layer, computed for the allowed tokens of its vocabulary only."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from mmtransformer.layers.linear import Linear, linear

NEVER = -1e4
"""The logit of what is left out: no probability in any number format, and sums of it stay finite (guidance)."""


class RestrictedLMHead(Linear):
    """A head over another's weight and bias that computes allowed tokens alone: the others' logits are `NEVER`.

    The logits of the allowed ones are the head's own, so what a search says is what it said before, as long as it says
    nothing else; their rows are read alone, which for captions is a small part of a vocabulary of 50,257.

    Args:
        head: the layer whose parameters are shared; weight (vocab_size d).
        allowed_token_ids: the tokens that may be written.

    Raises:
        ValueError: if there are none, or one is outside the vocabulary.
    """

    allowed_token_ids: Tensor

    def __init__(self, head: nn.Linear, allowed_token_ids: Collection[int]) -> None:
        nn.Module.__init__(self)
        ids = sorted(set(allowed_token_ids))
        if not ids or ids[0] < 0 or ids[-1] >= head.out_features:
            last = head.out_features - 1
            raise ValueError(f"a head of {last + 1} tokens is restricted to at least one of the ids 0 to {last}")
        self.in_features, self.out_features = head.in_features, head.out_features
        self.weight, self.bias, self.training = head.weight, head.bias, head.training
        self.register_buffer("allowed_token_ids", torch.tensor(ids, device=head.weight.device), persistent=False)
        self.layer: type[nn.Linear] | None = None
        """What the allowed rows are prepacked as, see `weight_prepacking.prepack_weights`."""
        self._rows: tuple[tuple[Any, ...], nn.Linear] | None = None

    def forward(self, input: Tensor) -> Tensor:
        """(... d) -> (... vocab_size)."""
        if torch.is_grad_enabled():
            bias = None if self.bias is None else self.bias[self.allowed_token_ids]
            logits = linear(input, self.weight[self.allowed_token_ids], bias)
        else:
            logits = self._own_rows()(input)
        whole = logits.new_full((*logits.shape[:-1], self.out_features), NEVER)
        return whole.index_copy_(-1, self.allowed_token_ids, logits)

    def _own_rows(self) -> nn.Linear:
        """The allowed rows as a layer of their own, made anew after the weight has changed."""
        w = self.weight
        state = (w.data_ptr(), w.dtype, w.device, self.layer, None if w.is_inference() else w._version)
        if self._rows is None or self._rows[0] != state:
            rows = Linear(self.in_features, len(self.allowed_token_ids), bias=self.bias is not None, device="meta")
            rows.weight = nn.Parameter(w.detach()[self.allowed_token_ids], requires_grad=False)
            if self.bias is not None:
                rows.bias = nn.Parameter(self.bias.detach()[self.allowed_token_ids], requires_grad=False)
            self._rows = state, rows if self.layer is None else self.layer(rows)  # type: ignore[call-arg]
        return self._rows[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_rows": None}
