"""RestrictedLMHead: the head's own logits for the allowed tokens, nothing for the rest, prepacked or not."""

import copy
import pickle

import pytest
import torch
from torch import nn

from mmtransformer.layers.restricted_head import NEVER, RestrictedLMHead
from mmtransformer.layers.weight_prepacking import prepack_weights

KEPT = [1, 4, 5, 9]


def heads(bias: bool = True) -> tuple[nn.Linear, RestrictedLMHead]:
    torch.manual_seed(0)
    head = nn.Linear(16, 11, bias=bias)
    return head, RestrictedLMHead(head, [9, 4, 1, 5, 4])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_allowed_tokens_have_the_heads_logits(bias: bool, grad: bool) -> None:
    head, restricted = heads(bias)
    x = torch.randn(2, 3, 16)
    with torch.set_grad_enabled(grad):
        expected, found = head(x), restricted(x)
    rest = [i for i in range(11) if i not in KEPT]
    torch.testing.assert_close(found[..., KEPT], expected[..., KEPT], atol=1e-6, rtol=1e-6)
    assert (found[..., rest] == NEVER).all()
    assert (found.softmax(-1)[..., rest] == 0).all()
    assert {n for n, _ in restricted.named_parameters()} == {n for n, _ in head.named_parameters()}
    assert restricted.state_dict().keys() == head.state_dict().keys()


def test_gradients_are_the_heads() -> None:
    head, restricted = heads()
    x = torch.randn(5, 16)
    restricted(x)[:, KEPT].square().sum().backward()
    found = restricted.weight.grad
    head.weight.grad = None
    head(x)[:, KEPT].square().sum().backward()
    torch.testing.assert_close(found, head.weight.grad)


def test_a_weight_that_changed_is_read_again() -> None:
    head, restricted = heads()
    x = torch.randn(2, 16)
    with torch.no_grad():
        restricted(x)
        head.weight.mul_(2)
        torch.testing.assert_close(restricted(x)[:, KEPT], head(x)[:, KEPT])
        half = copy.deepcopy(restricted).to(torch.bfloat16)
        assert half(x.bfloat16()).dtype == torch.bfloat16
        again = pickle.loads(pickle.dumps(restricted))
        assert torch.equal(again(x), restricted(x))


@pytest.mark.parametrize("int8", [False, True])
def test_it_is_prepacked_like_other_layers(int8: bool) -> None:
    head, restricted = heads()
    x = torch.randn(4, 16)
    model = prepack_weights(nn.Sequential(nn.Linear(16, 16), restricted), int8=int8)
    assert model[1] is restricted
    with torch.inference_mode():
        found = restricted(x)
        assert type(restricted._own_rows()) is not nn.Linear
        torch.testing.assert_close(found[:, KEPT], head(x)[:, KEPT], atol=0.05 if int8 else 1e-5, rtol=0)


@pytest.mark.parametrize("allowed", [[], [-1, 2], [11]])
def test_ids_that_there_are_not(allowed: list[int]) -> None:
    with pytest.raises(ValueError, match="a head of 11 tokens is restricted to at least one of the ids 0 to 10"):
        RestrictedLMHead(nn.Linear(16, 11), allowed)
