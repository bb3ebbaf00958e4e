"""The loss of the next token where the number of targets is known before, and where it is not."""

import pytest
import torch
from torch import nn

from mmtransformer.losses import next_token
from mmtransformer.losses.next_token import next_token_loss


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_a_known_number_of_targets_changes_nothing(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = torch.Generator().manual_seed(3)
    tokens = torch.randint(7, (4, 6), generator=chance)
    mask = torch.rand(4, 6, generator=chance) < share
    hidden = torch.randn(4, 6, 5, generator=chance, requires_grad=True)
    head = nn.Linear(5, 7)

    def told() -> tuple[float, int, torch.Tensor]:
        hidden.grad = None
        loss = next_token_loss(hidden, tokens, mask, head)
        loss.sum.backward()
        assert hidden.grad is not None
        return loss.sum.item(), int(loss.count), hidden.grad

    one, count, gradient = told()
    monkeypatch.setattr(next_token, "num_targets", lambda loss_mask: int(loss_mask[:, 1:].sum()))
    other, known, same = told()
    assert (one, count) == (other, known)
    assert count == int(mask[:, 1:].sum())
    assert torch.equal(gradient, same)
