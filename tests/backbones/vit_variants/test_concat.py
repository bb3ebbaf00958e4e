"""Any blocks' tokens and two towers side by side, in front of every connector."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmtransformer import (
    CaptionBatch,
    ConcatViT,
    Flamingo,
    ImageTransform,
    LinearProjector,
    Llava,
    MLPProjector,
    PerceiverResampler,
    PrefixCaptioner,
    TextDecoder,
    TransformerConnector,
    VisionEncoderDecoder,
    ViT,
)
from mmtransformer.captioners.base import Captioner


def towers() -> tuple[ViT, ViT]:
    torch.manual_seed(2)
    first = ViT(24, 8, 24, 3, 3, num_registers=1)
    second = ViT(24, 8, 20, 2, 4, class_token=False, pool="attention")
    for tower in (first, second):
        for parameter in tower.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return first.eval(), second.eval()


@torch.no_grad()
def test_channels_are_the_chosen_blocks_of_both() -> None:
    (first, second), pixels = towers(), torch.randn(2, 3, 24, 24)
    joined = ConcatViT(first, second, layers=(-2, -1), second_layers=(0,))
    assert (joined.dim, joined.grid_size, joined.num_prefix_tokens) == (24 + 24 + 20, (3, 3), 0)
    found = joined.forward_features(pixels).split((24, 24, 20), dim=-1)
    before, last = (x[:, 2:] for x in first.tokens_after(pixels, [1, 2]))
    for part, wanted in zip(found, (before, last, second.tokens_after(pixels, [0])[0]), strict=True):
        assert torch.equal(part, wanted)
    normed = ConcatViT(first, second).forward_features(pixels)
    assert torch.equal(normed[..., :24], first.forward_features(pixels)[:, 2:])
    assert torch.equal(normed[..., 24:], second.forward_features(pixels))
    wide = torch.randn(1, 3, 16, 40)
    assert ConcatViT(first, second).forward_features(wide).shape == (1, 10, 44)
    joined.set_input_size((16, 40))
    assert (joined.grid_size, second.grid_size, joined.image_size) == ((2, 5), (2, 5), (16, 40))


@torch.no_grad()
def test_each_tower_gets_pixels_of_its_own_mean() -> None:
    from PIL import Image

    first, second = towers()
    first.transform = ImageTransform(24, mean=(0.1, 0.4, 0.7), std=(0.5, 0.2, 0.3))
    second.transform = replace(first.transform, mean=(0.5, 0.3, 0.2), std=(0.9, 0.6, 0.4))
    picture = Image.effect_noise((31, 40), 90.0).convert("RGB")
    pixels = first.transform(picture)[None]
    found = ConcatViT(first, second).forward_features(pixels)
    wanted = second.forward_features(second.transform(picture)[None])
    torch.testing.assert_close(found[..., 24:], wanted, atol=1e-5, rtol=1e-5)


def connectors(vision: ViT) -> list[Captioner]:
    """Every way to read a vision encoder."""
    d = vision.dim
    plain: dict[str, Any] = {"max_len": 29}
    return [
        VisionEncoderDecoder(vision, TextDecoder(31, 24, 1, 4, context_dim=d, **plain)),
        VisionEncoderDecoder(
            vision, TextDecoder(31, 24, 1, 4, context_dim=16, **plain), connector=TransformerConnector(d, 16, 1, 2)
        ),
        Flamingo(vision, TextDecoder(31, 24, 2, 4, **plain), connector=PerceiverResampler(d, 1, 2, 8, 4)),
        PrefixCaptioner(vision, TextDecoder(31, 24, 1, 4, **plain), freeze_decoder=False),
        Llava(vision, MLPProjector(d, 24), TextDecoder(31, 24, 1, 4, **plain), 30, vision_feature_layers=None),
        Llava(vision, LinearProjector(d, 24), TextDecoder(31, 24, 1, 4, **plain), 30, vision_feature_layers=None),
    ]


@pytest.mark.parametrize("number", range(6))
def test_they_feed_every_connector_and_are_saved_with_it(number: int, tmp_path: Path) -> None:
    first, second = towers()
    vision = ConcatViT(first, second, layers=(-2, -1), second_layers=(-2,))
    captioner = connectors(vision)[number]
    tokens = torch.cat((torch.full((2, 9), 30), torch.randint(0, 29, (2, 5))), 1)
    real = torch.ones_like(tokens, dtype=torch.bool)
    batch = CaptionBatch(tokens, real, real, pixels=torch.randn(2, 3, 24, 24))
    captioner(batch).loss.backward()
    got = {n for n, p in captioner.named_parameters() if p.grad is None and p.requires_grad}
    assert not {name for name in got if name.startswith("vision")}
    captioner.eval().save_pretrained(tmp_path)
    again: Any = type(captioner).from_pretrained(tmp_path)
    assert torch.equal(again.logits(batch), captioner.logits(batch))


def test_refused() -> None:
    first, second = towers()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"layers": (3,)}, r"blocks \(3,\) are to be read, but there are 3"),
        ({"layers": ()}, r"blocks \(\) are to be read"),
        ({"second_layers": (0,)}, r"second_layers \(0,\) are of a second tower, and there is none"),
    ]
    for given, said in cases:
        with pytest.raises(ValueError, match=said):
            ConcatViT(first, **given)
    with pytest.raises(ValueError, match=r"px into \(3, 3\) patches, the second \(24, 24\) px into \(6, 6\)"):
        ConcatViT(first, ViT(24, 4, 20, 1, 4))
    with pytest.raises(ValueError, match="say them as layers and second_layers"):
        ConcatViT(first, second).tokens_after(torch.zeros(1, 3, 24, 24), [0])
