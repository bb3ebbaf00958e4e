"""Positions against their formulas, timm's resizing, transformers' rotary angles, and by their properties."""

import math

import pytest
import torch

from mmtransformer import PositionConfig, TextDecoder
from mmtransformer.layers.positions import (
    RotaryEmbedding,
    document_positions,
    resize_positions,
    sinusoidal,
    sinusoidal_2d,
)


def test_sinusoidal_is_the_formula() -> None:
    got = sinusoidal(torch.tensor([0, 3, 50]), 10)
    for row, place in enumerate((0, 3, 50)):
        for i in range(5):
            angle = place / 10_000 ** (2 * i / 10)
            assert got[row, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert got[row, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_sinusoidal_2d_says_row_and_column() -> None:
    got = sinusoidal_2d((3, 5), 12).view(3, 5, 12)
    assert torch.equal(got[1, :, :6], got[1, :1, :6].expand(5, -1))  # A row's patches share its half.
    assert torch.equal(got[:, 2, 6:], got[:1, 2, 6:].expand(3, -1))
    assert len({tuple(p) for p in got.flatten(0, 1).tolist()}) == 15
    with pytest.raises(ValueError, match=r"dim \(10\).*4"):
        sinusoidal_2d((2, 2), 10)
    with pytest.raises(ValueError, match=r"dim \(9\)"):
        sinusoidal(torch.arange(2), 9)


@pytest.mark.parametrize("new", [(7, 11), (3, 2), (5, 5)])
def test_resizing_equals_timm(new: tuple[int, int]) -> None:
    from timm.layers import resample_abs_pos_embed  # pyright: ignore

    table = torch.randn(1, 25, 12)
    want = resample_abs_pos_embed(table, list(new), [5, 5], num_prefix_tokens=0)
    torch.testing.assert_close(resize_positions(table, (5, 5), new), want)
    with pytest.raises(ValueError, match="25 positions is not a grid of 4 x 5"):
        resize_positions(table, (4, 5), new)


def test_rotary_depends_on_the_distance_only() -> None:
    torch.manual_seed(0)
    rotary = RotaryEmbedding(10)
    q, k = torch.randn(1, 1, 1, 10), torch.randn(1, 1, 1, 10)
    at = lambda x, place: rotary(torch.tensor([place])).rotate(x)  # noqa: E731
    near = (at(q, 7) * at(k, 3)).sum()
    torch.testing.assert_close(near, (at(q, 107) * at(k, 103)).sum(), atol=1e-4, rtol=1e-4)
    assert (near - (at(q, 7) * at(k, 4)).sum()).abs() > 1e-3
    torch.testing.assert_close(at(q, 50).norm(), q.norm())


def test_rotary_is_a_complex_product() -> None:
    """Pairs (i, i + c/2) as numbers, times e to the i of the place and the rate: the paper's formula and direction."""
    x, places = torch.randn(2, 3, 5, 10, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 7, 90])
    angles = places[:, None] * 10_000.0 ** (-torch.arange(5) / 5)
    turned = torch.complex(x[..., :5], x[..., 5:]) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(RotaryEmbedding(10)(places).rotate(x), torch.cat((turned.real, turned.imag), -1))


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 64},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 4.0, "beta_slow": 0.3, "mscale": 0.7, "mscale_all_dim": 1.3,
         "original_max_position_embeddings": 64},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 40.0, "beta_slow": 0.001,
         "original_max_position_embeddings": 64},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 4.0, "beta_slow": 0.3, "truncate": False,
         "original_max_position_embeddings": 64},
        {"rope_type": "proportional", "factor": 2.0, "partial_rotary_factor": 0.7},
    ],
    ids=str,
)  # fmt: skip
def test_rotary_equals_transformers(scaling: dict | None) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_type": "default", "rope_theta": 500.0} | (scaling or {})
    config = LlamaConfig(hidden_size=48, num_attention_heads=4, max_position_embeddings=256, rope_parameters=parameters)
    places = torch.tensor([[0, 1, 5, 200], [3, 2, 9, 11]])
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), places)
    ours = RotaryEmbedding(12, theta=500.0, scaling=scaling)(places)
    torch.testing.assert_close(ours.cos, cos, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.sin, sin, atol=1e-5, rtol=1e-5)


def test_rotary_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match='"yarn"'):
        RotaryEmbedding(8, scaling={"rope_type": "yarn", "factor": 2})
    with pytest.raises(ValueError, match=r"head_dim \(7\)"):
        RotaryEmbedding(7)


def test_document_positions_restart_with_every_document() -> None:
    ids = torch.tensor([[0, 0, 0, 1, 2, 2, 5], [3, 3, 0, 0, 0, 0, 0]])
    assert document_positions(ids).tolist() == [[0, 1, 2, 0, 0, 1, 0], [0, 1, 0, 1, 2, 3, 4]]


LONGROPE = {
    "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 16,
    "short_factor": [1.0, 1.5, 2.0], "long_factor": [3.0, 5.0, 9.0],
}  # fmt: skip


def test_longrope_takes_the_long_rates_from_the_first_token_behind_the_trained_length() -> None:
    rotary = RotaryEmbedding(6, scaling=LONGROPE)
    gain = math.sqrt(1 + math.log(4) / math.log(16))
    for length, factors in ((15, "short_factor"), (16, "short_factor"), (17, "long_factor"), (18, "long_factor")):
        rates = 1 / (torch.tensor(LONGROPE[factors]) * 10_000.0 ** (torch.arange(3) / 3))
        angles = torch.arange(length)[:, None] * rates
        torch.testing.assert_close(rotary(torch.arange(length)).cos[:, :3], angles.cos() * gain)


def test_longrope_of_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    rotary = RotaryEmbedding(6, scaling=LONGROPE)
    short, long = torch.arange(12).expand(1, -1), torch.arange(8, 20).expand(1, -1)
    both = rotary(torch.cat((short, long)))
    for row, alone in ((0, rotary(short)), (1, rotary(long))):
        assert torch.equal(both.cos[row], alone.cos[0])
        assert torch.equal(both.sin[row], alone.sin[0])
    assert not torch.equal(rotary(short).cos[0, 8:], rotary(long).cos[0, :4])


@pytest.mark.parametrize("scaling", [None, LONGROPE], ids=["plain", "longrope"])
def test_rotary_built_on_meta_is_filled_by_either_way(scaling: dict | None) -> None:
    torch.manual_seed(0)
    positions = PositionConfig("rotary", scaling=scaling)
    make = lambda: TextDecoder(31, 24, 1, 4, max_len=40, positions=positions).eval()  # noqa: E731
    want, tokens = make(), torch.randint(31, (2, 20))
    for assign in (False, True):
        with torch.device("meta"):
            model = make()
        if not assign:
            model.to_empty(device="cpu")
        model.load_state_dict(want.state_dict(), assign=assign)
        assert torch.equal(model(tokens), want(tokens))
        assert torch.equal(model.double()(tokens), want.double()(tokens))
        want.float()
