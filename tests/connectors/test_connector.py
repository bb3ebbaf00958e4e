"""A connector of one's own, where the library's stand: learnt, decoded with, drawn; refused where it does not fit."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmtransformer import (
    CaptionBatch,
    Captioner,
    Connector,
    Flamingo,
    LinearConnector,
    Llava,
    MLPProjector,
    PerceiverResampler,
    TextDecoder,
    TransformerConnector,
    VisionEncoderDecoder,
    ViT,
    caption_loss,
    generate,
)
from mmtransformer.weights import to_openflamingo

VOCAB = 53


class HalfOfThem(Connector):
    """Every second visual token, projected."""

    def __init__(self, visual_dim: int, dim: int) -> None:
        super().__init__()
        self.visual_dim, self.dim = visual_dim, dim
        self.proj = nn.Linear(visual_dim, dim)

    def forward(self, visual_tokens: Tensor) -> Tensor:
        return self.proj(visual_tokens[:, :, ::2])


def encoder_decoder(visual_dim: int = 20, dim: int = 28, connector: Any = None) -> VisionEncoderDecoder:
    decoder = TextDecoder(VOCAB, 24, 2, 4, max_len=31, context_dim=28)
    return VisionEncoderDecoder(ViT(24, 8, 20, 1, 4), decoder, connector=connector or HalfOfThem(visual_dim, dim))


def flamingo(visual_dim: int = 20, dim: int = 28, connector: Any = None) -> Flamingo:
    decoder = TextDecoder(VOCAB, 24, 2, 4, max_len=31)
    return Flamingo(ViT(24, 8, 20, 1, 4), decoder, connector=connector or HalfOfThem(visual_dim, dim))


def llava(projector: Any) -> Llava:
    return Llava(ViT(24, 8, 20, 1, 4), projector, TextDecoder(VOCAB, 28, 2, 4, max_len=31), 0)


def batch() -> CaptionBatch:
    tokens = torch.randint(VOCAB, (2, 7), generator=torch.Generator().manual_seed(3))
    real = torch.ones_like(tokens, dtype=torch.bool)
    pixels = torch.rand(2, 1, 3, 24, 24, generator=torch.Generator().manual_seed(5))
    return CaptionBatch(tokens, real, real, pixels=pixels)


@pytest.mark.parametrize("make", [encoder_decoder, flamingo])
def test_it_stands_where_the_librarys_own_stand(make: type[Captioner]) -> None:
    torch.manual_seed(0)
    model = make()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    caption_loss(model, batch()).backward()
    connector = next(module for module in model.modules() if isinstance(module, HalfOfThem))
    assert connector.proj.weight.grad is not None
    assert connector.proj.weight.grad.abs().sum() > 0
    model.eval()
    (greedy,), _ = generate(model, batch(), eos_id=VOCAB - 1, max_new_tokens=3)
    logits = model.logits(batch())
    assert greedy.tokens[0] == logits[0, -1].argmax()


def test_its_attention_map_knows_the_picture_only() -> None:
    model = flamingo()
    found = model.attention_map(batch())
    assert found.shape == (2, 7, 1, 3, 3)
    assert torch.equal(found, found[..., :1, :1].expand_as(found))
    assert (found > 0).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: encoder_decoder(visual_dim=19), r"visual_dim \(19\) must be the vision encoder's dim \(20\)"),
        (lambda: encoder_decoder(dim=27), r"context_dim \(28\) must be the connector's dim \(27\)"),
        (lambda: flamingo(visual_dim=19), r"visual_dim \(19\) must be the vision encoder's dim \(20\)"),
        (lambda: to_openflamingo(flamingo()), "has a HalfOfThem"),
        (lambda: flamingo(connector=MLPProjector(20, 28)), "must be a Connector.*, not a MLPProjector"),
        (lambda: encoder_decoder(connector=MLPProjector(20, 28)), "must be a Connector.*, not a MLPProjector"),
        (lambda: llava(LinearConnector(20, 28)), "must be an MLPProjector or a LinearProjector, not a LinearConnector"),
    ],
)
def test_what_does_not_fit_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "make", [lambda: TransformerConnector(20, 28), lambda: LinearConnector(20, 28), lambda: PerceiverResampler(20, 1)]
)
def test_the_librarys_own_keep_the_contract(make) -> None:
    connector = make().eval()
    visual_tokens = torch.randn(2, 3, 11, connector.visual_dim)
    found = connector(visual_tokens)
    assert found.shape[:2] == (2, 3)
    assert found.shape[3] == connector.dim
    torch.testing.assert_close(found[1:, 1:2], connector(visual_tokens[1:, 1:2]), atol=1e-5, rtol=1e-5)
