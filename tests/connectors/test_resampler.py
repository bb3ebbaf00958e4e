"""PerceiverResampler: its definition in float64, and its properties (the outsider is in test_weights_flamingo)."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmtransformer import PerceiverResampler, record_attention

DIM, DEPTH, HEADS, WIDTH, LATENTS = 14, 3, 5, 6, 7


def resampler(**options: Any) -> PerceiverResampler:
    torch.manual_seed(1)
    model = PerceiverResampler(DIM, DEPTH, HEADS, WIDTH, LATENTS, mlp_dim=23, **options)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def layer_norm(x: Tensor, norm: Any, eps: float) -> Tensor:
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
    return x * norm.weight + norm.bias


def definition(model: PerceiverResampler, x: Tensor) -> Tensor:
    """One picture's tokens (t p d), in float64, head by head."""
    if model.frame_embed is not None:
        x = torch.stack([frame + model.frame_embed[t] for t, frame in enumerate(x)])
    x, latents = x.flatten(0, 1), model.latents
    activation = {"gelu": lambda y: 0.5 * y * (1 + torch.erf(y / 2**0.5)), "relu": lambda y: y * (y > 0)}
    blocks: Any = model.blocks
    for block in blocks:
        asking = layer_norm(latents, block.norm1, model.norm_eps)
        asked = torch.cat((layer_norm(x, block.norm_context, model.norm_eps), asking))
        heads, attn = [], block.attn
        for h in range(HEADS):
            some = slice(h * WIDTH, (h + 1) * WIDTH)
            q, k, v = asking @ attn.q_proj.weight[some].T, asked @ attn.k_proj.weight[some].T, None
            v = asked @ attn.v_proj.weight[some].T
            if model.qk_norm:
                q, k = layer_norm(q, attn.q_norm, model.norm_eps), layer_norm(k, attn.k_norm, model.norm_eps)
            weights = (q @ k.T / WIDTH**0.5).exp()
            heads.append(weights / weights.sum(-1, keepdim=True) @ v)
        latents = latents + torch.cat(heads, -1) @ attn.out_proj.weight.T
        hidden = layer_norm(latents, block.norm2, model.norm_eps) @ block.mlp.fc1.weight.T
        latents = latents + activation[model.activation](hidden) @ block.mlp.fc2.weight.T
    return layer_norm(latents, model.last_norm, model.norm_eps)


KINDS: dict[str, dict[str, Any]] = {
    "openflamingo": {},
    "idefics": {"activation": "relu", "qk_norm": "layer", "norm_eps": 1e-3},
    "frames": {"max_frames": 4},
}


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_definition(kind: str) -> None:
    model = resampler(**KINDS[kind]).double()
    frames = 3 if kind == "frames" else 1
    x = torch.randn(2, 3, frames, 11, DIM, dtype=torch.float64)
    found = model(x)
    assert found.shape == (2, 3, LATENTS, DIM)
    for b in range(2):
        for i in range(3):
            torch.testing.assert_close(found[b, i], definition(model, x[b, i]), atol=1e-10, rtol=1e-10)


def test_a_image_is_a_video_of_one_frame() -> None:
    model, x = resampler(), torch.randn(2, 3, 11, DIM)
    assert torch.equal(model(x), model(x.unsqueeze(2)))
    timed = resampler(max_frames=3)
    later = torch.zeros(2, 3, 2, 11, DIM)
    later[:, :, 1] = x
    assert timed(x).shape == (2, 3, LATENTS, DIM)
    assert not torch.allclose(timed(later), timed(later.flip(2)), atol=1e-3)  # It knows which frame came first.


def test_images_are_gathered_each_by_itself() -> None:
    model, x = resampler(), torch.randn(2, 3, 11, DIM)
    found = model(x)
    other = x.clone()
    other[1, 2] += torch.randn(11, DIM)
    changed = (model(other) != found).flatten(2).any(-1)
    assert changed.tolist() == [[False, False, False], [False, False, True]]
    torch.testing.assert_close(model(x[:1, 1:2]), found[:1, 1:2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(x[:, [2, 0, 1]]), found[:, [2, 0, 1]], atol=1e-5, rtol=1e-5)


def test_order_of_visual_tokens_does_not_matter_and_that_of_images_can() -> None:
    model, x = resampler(), torch.randn(2, 3, 11, DIM)
    torch.testing.assert_close(model(x[:, :, torch.randperm(11)]), model(x), atol=1e-5, rtol=1e-5)
    numbered = resampler(max_images=3)
    assert not torch.allclose(numbered(x[:, [1, 0, 2]])[:, [1, 0, 2]], numbered(x), atol=1e-3)
    assert numbered(x[:, :2]).shape == (2, 2, LATENTS, DIM)


def test_latents_look_at_patches_and_latents_together() -> None:
    model, x = resampler(), torch.randn(2, 3, 11, DIM)
    with record_attention(model) as record:
        model(x)
    assert [weights.shape for weights in record.values()] == [(6, HEADS, LATENTS, 11 + LATENTS)] * DEPTH
    for weights in record.values():
        torch.testing.assert_close(weights.sum(-1), torch.ones(6, HEADS, LATENTS))


def test_everything_learns() -> None:
    model = resampler(max_frames=2, max_images=3)
    (model(torch.randn(2, 3, 2, 5, DIM)) * torch.randn(2, 3, LATENTS, DIM)).sum().backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []
    assert not any(isinstance(m, nn.Linear) and m.bias is not None for m in model.modules())


def test_number_of_parameters_is_openflamingos() -> None:
    with torch.device("meta"):
        model = PerceiverResampler(1024)
    assert sum(p.numel() for p in model.parameters()) == 63_019_008


def test_errors_name_the_numbers() -> None:
    with pytest.raises(ValueError, match="num_latents must be at least 1, not 0"):
        PerceiverResampler(DIM, num_latents=0)
    with pytest.raises(ValueError, match=rf"\(b i p {DIM}\).*not \(2, 11, {DIM}\)"):
        resampler()(torch.randn(2, 11, DIM))
    with pytest.raises(ValueError, match=rf"\(b i p {DIM}\).*not \(2, 3, 11, 15\)"):
        resampler()(torch.randn(2, 3, 11, 15))
    with pytest.raises(ValueError, match=r"3 frames.*max_frames is None"):
        resampler()(torch.randn(2, 3, 3, 11, DIM))
    with pytest.raises(ValueError, match=r"3 frames.*max_frames is 2"):
        resampler(max_frames=2)(torch.randn(2, 3, 3, 11, DIM))
    with pytest.raises(ValueError, match=r"3 images.*max_images is 2"):
        resampler(max_images=2)(torch.randn(2, 3, 11, DIM))


def test_saved_and_loaded_it_is_the_same(tmp_path: Any) -> None:
    model = resampler(max_frames=2, qk_norm="layer", activation="relu")
    model.save_pretrained(tmp_path)
    again, x = PerceiverResampler.from_pretrained(tmp_path), torch.randn(1, 1, 2, 5, DIM)
    assert torch.equal(again(x), model(x))
