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
from mmtransformer.layers.record import record_attention
from mmtransformer.weights.captioners.openflamingo import to_openflamingo

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


class OneOfAll(HalfOfThem):
    """All visual tokens in one."""

    def forward(self, visual_tokens: Tensor) -> Tensor:
        return self.proj(visual_tokens.mean(2, keepdim=True))


class AsMany(HalfOfThem):
    """As many tokens as were given, each a mixture of all of them."""

    def forward(self, visual_tokens: Tensor) -> Tensor:
        return self.proj(visual_tokens.flip(2) + visual_tokens.mean(2, keepdim=True))


def resampler(latents: int) -> VisionEncoderDecoder:
    decoder = TextDecoder(VOCAB, 24, 2, 4, max_len=31, context_dim=20)
    return VisionEncoderDecoder(
        ViT(24, 8, 20, 1, 4), decoder, connector=PerceiverResampler(20, 1, 2, 8, latents)
    ).eval()


LOSES_PATCHES = {
    "9 latents of 9 patches": lambda: resampler(9),
    "10 of 9 and a class token": lambda: resampler(10),
    "5 latents": lambda: resampler(5),
    "a latent": lambda: resampler(1),
    "half of them": encoder_decoder,
    "one of all": lambda: encoder_decoder(connector=OneOfAll(20, 28)),
    "as many": lambda: encoder_decoder(connector=AsMany(20, 28)),
    "flamingo, half of them": flamingo,
    "flamingo, as many": lambda: flamingo(connector=AsMany(20, 28)),
}


@pytest.mark.parametrize("kind", LOSES_PATCHES)
def test_tokens_that_are_no_patches_have_no_heat_map(kind: str) -> None:
    model = LOSES_PATCHES[kind]()
    name = type(model.connector).__name__
    assert not model.has_heatmaps
    with pytest.raises(ValueError, match=f"no heat maps behind a {name}: it does not give a token for each patch"):
        model.attention_map(batch())


@pytest.mark.parametrize("make", [encoder_decoder, flamingo])
@pytest.mark.parametrize("connector", [lambda: LinearConnector(20, 28), lambda: TransformerConnector(20, 28)])
def test_tokens_of_patches_have_theirs(make: Any, connector: Any) -> None:
    torch.manual_seed(1)
    model = make(connector=connector()).eval()
    assert model.has_heatmaps
    with record_attention(model, keep="cross_attn" if isinstance(model, VisionEncoderDecoder) else "gated") as record:
        model.logits(batch())
    want = torch.stack([weights.mean(1) for weights in record.values()]).mean(0)[..., 1:]
    found = model.attention_map(batch())
    assert found.shape == (2, 7, 1, 3, 3)
    torch.testing.assert_close(found, want.view(found.shape))


def test_a_resampler_in_a_flamingo_is_followed_to_the_patches() -> None:
    model = flamingo(connector=PerceiverResampler(20, 1, 2, 8, 5))
    assert model.has_heatmaps
    assert model.attention_map(batch()).shape == (2, 7, 1, 3, 3)


def test_a_connector_that_says_that_it_keeps_what_it_does_not_is_told_so() -> None:
    model = encoder_decoder()
    model.connector.keeps_tokens = True  # pyright: ignore[reportOptionalMemberAccess]
    with pytest.raises(ValueError, match="4 weights of an image are not on its 3 x 3 patches"):
        model.attention_map(batch())


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
