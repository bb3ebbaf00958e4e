"""Rotary positions of patches: written out in float64, and what must not change under them."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmtransformer import ViT, ViTPatchConfig, ViTRopeConfig
from mmtransformer.backbones.grid_rope import GridRotary, keep_angles
from mmtransformer.layers.attention import RotaryAngles
from mmtransformer.layers.masks import keep_tokens

GRID, PREFIX, WIDTH, HEADS, DEPTH = (3, 5), 2, 12, 3, 2
KINDS: dict[str, ViTRopeConfig] = {
    "eva": ViTRopeConfig("axial", reference=(4, 7)),
    "perception encoder": ViTRopeConfig("axial", offset=1.0, order="xy"),
    "dinov3": ViTRopeConfig("centered", 100.0),
    "learned": ViTRopeConfig("mixed", 10.0, order="xy"),
}


def make(name: str) -> GridRotary:
    torch.manual_seed(1)
    return GridRotary(WIDTH, HEADS, DEPTH, KINDS[name])


def angle(module: GridRotary, block: int, head: int, row: int, column: int, pair: int) -> float:
    """How far one pair of channels of one patch turns."""
    config = module.config
    at = [row + config.offset, column + config.offset]
    if config.reference:
        at = [x / size * wanted for x, size, wanted in zip(at, GRID, config.reference, strict=True)]
    if config.kind == "centered":
        at = [2 * (x + 0.5) / size - 1 for x, size in zip(at, GRID, strict=True)]
    first, second = at if config.order == "yx" else reversed(at)
    if config.kind == "mixed":
        rates = module.freqs.detach().double()[:, block, head, pair]
        return float(first * rates[0] + second * rates[1])
    quarter = WIDTH // 4
    turn = (first if pair < quarter else second) * config.theta ** -(pair % quarter / quarter)
    return turn * 2 * math.pi if config.kind == "centered" else turn


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_patches_are_turned_as_the_definition_says(name: str) -> None:
    module = make(name)
    ropes = module(GRID, PREFIX, torch.device("cpu"))
    assert len(ropes) == DEPTH
    x = torch.randn(1, HEADS, PREFIX + GRID[0] * GRID[1], WIDTH, dtype=torch.float64)
    for block, rope in enumerate(ropes):
        want = x.clone()
        for head in range(HEADS):
            for patch in range(GRID[0] * GRID[1]):
                for pair in range(WIDTH // 2):
                    turn = angle(module, block, head, *divmod(patch, GRID[1]), pair)
                    a, b = x[0, head, PREFIX + patch, [pair, pair + WIDTH // 2]].tolist()
                    turned = (a * math.cos(turn) - b * math.sin(turn), b * math.cos(turn) + a * math.sin(turn))
                    want[0, head, PREFIX + patch, [pair, pair + WIDTH // 2]] = torch.tensor(turned).double()
        torch.testing.assert_close(rope.rotate(x), want, atol=3e-6, rtol=1e-5)
        assert torch.equal(rope.rotate(x)[:, :, :PREFIX], x[:, :, :PREFIX])  # Prefix tokens do not turn.


@pytest.mark.parametrize("name", ["perception encoder", "learned"])
@torch.no_grad()
def test_scores_depend_on_distances_alone(name: str) -> None:
    """Two patches moved together by a row and two columns meet as before."""
    rope = make(name)(GRID, 0, torch.device("cpu"))[1]
    q, k = torch.randn(2, 1, HEADS, 1, WIDTH).expand(-1, -1, -1, GRID[0] * GRID[1], -1)
    scores = rope.rotate(q) @ rope.rotate(k).transpose(-1, -2)
    at = lambda row, column: row * GRID[1] + column  # noqa: E731
    here, there = scores[..., at(0, 1), at(1, 2)], scores[..., at(1, 3), at(2, 4)]
    torch.testing.assert_close(here, there, atol=1e-5, rtol=1e-5)
    assert (here - scores[..., at(0, 1), at(1, 1)]).abs().min() > 1e-3


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_patches_that_stay_keep_their_angles(name: str) -> None:
    rope = make(name)(GRID, PREFIX, torch.device("cpu"))[0]
    kept = torch.tensor([[0, 3, 4, 14], [1, 2, 7, 8]])
    x = torch.randn(2, HEADS, PREFIX + 15, WIDTH)
    few = torch.cat((torch.arange(PREFIX).expand(2, -1), kept + PREFIX), 1)

    def choose(x: Tensor) -> Tensor:
        return torch.stack([keep_tokens(head, few) for head in x.unbind(1)], 1)

    found = keep_angles(rope, kept, PREFIX)
    assert isinstance(found, RotaryAngles)
    torch.testing.assert_close(found.rotate(choose(x)), choose(rope.rotate(x)))


@pytest.mark.parametrize("name", KINDS)
def test_a_tower_learns_with_patches_left_out(name: str) -> None:
    vit = ViT(
        24,
        8,
        24,
        DEPTH,
        3,
        num_registers=2,
        patches=ViTPatchConfig(positions="none", patch_dropout=0.5),
        rope=KINDS[name],
    )
    pixels = torch.randn(2, 3, 24, 32)
    vit.train()
    vit.set_grad_checkpointing()
    again: Any = vit.forward_features(pixels)
    assert again.shape == (2, 3 + 6, 24)
    again.square().sum().backward()
    still = [n for n, p in vit.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert all(name.endswith("k_proj.bias") for name in still), still
    vit.eval()
    whole, moved = (vit.forward_features(x) for x in (pixels, pixels.flip(3)))
    assert (whole[:, 3:].mean(1) - moved[:, 3:].mean(1)).abs().max() > 1e-6  # Without a table, places still count.
    vit.bfloat16()
    assert vit.forward_features(pixels).isfinite().all()


def test_heads_and_words_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="heads of 4 n channels, not 6"):
        ViT(16, 8, 24, 1, 4, rope=ViTRopeConfig("axial"))
    with pytest.raises(ValueError, match=r'rope must be .* not "spiral"'):
        ViTRopeConfig("spiral")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='order must be "yx" or "xy", not "zz"'):
        ViTRopeConfig("axial", order="zz")  # type: ignore[arg-type]
