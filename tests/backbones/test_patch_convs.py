"""PatchConvs by its definition, one token at a time, and a DiffusionTransformer that stands between its halves."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmtransformer.backbones.diffusion_transformer import DiffusionTransformer
from mmtransformer.backbones.patch_convs import PatchConvs
from mmtransformer.weights import save_dit


def make() -> PatchConvs:
    torch.manual_seed(0)
    convs = PatchConvs(3, 5, 12, 8, 2).double()
    for parameter in convs.parameters():
        nn.init.normal_(parameter, std=0.3)
    return convs


def test_by_definition() -> None:
    convs: Any = make()
    images = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    tokens, skips = convs.encode(images)
    one, two, three = convs.down
    a = F.silu(F.conv2d(images, one.weight, one.bias, padding=1))
    b = F.silu(F.conv2d(a, two.weight, two.bias, stride=2, padding=1))
    c = F.silu(F.conv2d(b, three.weight, three.bias, stride=2, padding=1))
    assert [s.shape for s in skips] == [(2, 2, 16, 24), (2, 4, 8, 12), (2, 8, 4, 6)]
    assert tokens.shape == (2, 6, 12)
    for k in range(6):
        row, column = divmod(k, 3)
        patch = c[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten(1)
        torch.testing.assert_close(tokens[:, k], convs.embed(patch))
    condition = torch.randn(2, 12, dtype=torch.float64)
    x = torch.zeros_like(c)
    for k in range(6):
        row, column = divmod(k, 3)
        x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = convs.unembed(tokens[:, k]).view(2, 8, 2, 2)
    for conv, gate, skip in zip(convs.up, convs.gates, (c, b, a), strict=True):
        x = x + skip * (1 + F.linear(F.silu(condition), gate.weight, gate.bias))[:, :, None, None]
        x = F.conv2d(x, conv.weight, conv.bias, padding=1)
        if conv is not convs.up[-1]:
            x = F.silu(x).repeat_interleave(2, 2).repeat_interleave(2, 3)
    found = convs.decode(tokens, skips, condition)
    assert found.shape == (2, 5, 16, 24)
    torch.testing.assert_close(found, x)


def test_a_transformer_between_its_halves() -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "patch_size": 8,
        "dim": 16,
        "depth": 2,
        "num_heads": 2,
        "context_dim": 7,
        "conv_width": 2,
    }
    model = DiffusionTransformer(**settings)
    images, times, context = torch.randn(2, 3, 16, 24), torch.tensor([0.2, 0.9]), torch.randn(2, 4, 7)
    assert not model(images, times, context).any()  # zero at the start, as without convolutions
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.double().eval()
    images, times, context = images.double(), times.double(), context.double()
    found = model(images, times, context)
    assert found.shape == images.shape
    torch.testing.assert_close(model(images[1:], times[1:], context[1:]), found[1:])
    assert not torch.allclose(model(images, times, context + 1), found)
    assert not torch.allclose(model(images, times.flip(0), context), found)


def test_diffusers_has_no_convolutions_around_its_blocks(tmp_path: Path) -> None:
    model = DiffusionTransformer(8, dim=16, depth=1, num_heads=2, context_dim=7, base_grid=2, conv_width=2)
    with pytest.raises(ValueError, match="PixArtTransformer2DModel has nothing like conv_width=2"):
        save_dit(model, tmp_path / "there")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 6}, r"patch_size \(6\) must be divisible by 4 for convolutions"),
        ({"bottleneck_dim": 5}, "bottleneck_dim is for linear patches: leave it out with conv_width"),
        ({"conv_width": 0}, r"conv_width \(0\) must be at least 1"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"patch_size": 8, "dim": 16, "depth": 1, "num_heads": 2, "conv_width": 2}
    with pytest.raises(ValueError, match=message):
        DiffusionTransformer(**settings | changes)
