"""TransformerConnector: encoder blocks over visual tokens."""

import pytest
import torch

from mmtransformer import TransformerConnector


def test_an_adapter_drops_tokens_in_training_only() -> None:
    torch.manual_seed(0)
    connector, x = TransformerConnector(20, 12, 2, 3, token_dropout=0.4), torch.randn(2, 10, 20)
    assert connector(x).shape == (2, 6, 12)
    connector.eval()
    assert connector(x).shape == (2, 10, 12)
    order = torch.randperm(10)
    torch.testing.assert_close(connector(x)[:, order], connector(x[:, order]), atol=1e-5, rtol=1e-5)
    plain = TransformerConnector(20, 12, 0).eval()
    want = plain.last_norm(plain.proj(plain.norm(x)))
    assert torch.equal(plain(x), want)


def test_a_share_of_tokens_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"token_dropout.*not 1\.0"):
        TransformerConnector(20, 12, 1, 3, token_dropout=1.0)
