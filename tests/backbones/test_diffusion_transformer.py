"""DiffusionTransformer by its definition in float64, against diffusers' DiT and PixArt, and by its properties."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtransformer.backbones.diffusion_transformer import DiffusionTransformer, grid_positions

DIM, HEADS, TEXT = 24, 2, 7


def noisy(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 0.1)
    return model.eval()


def make(**changes) -> DiffusionTransformer:
    torch.manual_seed(0)
    settings = {"patch_size": 2, "dim": DIM, "depth": 3, "num_heads": HEADS, "out_channels": 5, "context_dim": TEXT}
    model = noisy(DiffusionTransformer(**settings | changes))
    assert isinstance(model, DiffusionTransformer)
    return model


def inputs(dtype: torch.dtype = torch.float32, size: tuple[int, int] = (8, 6)) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    images, context = torch.randn(2, 3, *size, dtype=dtype), torch.randn(2, 5, TEXT, dtype=dtype)
    return images, torch.tensor([0.037, 0.801], dtype=dtype), context, mask


def norm(x: Tensor, eps: float) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()


def attend(attn: nn.Module, x: Tensor, context: Tensor) -> Tensor:
    q, k, v = attn.q_proj(x), attn.k_proj(context), attn.v_proj(context)
    out, c = torch.zeros_like(q), DIM // HEADS
    for h in range(HEADS):
        part = slice(h * c, (h + 1) * c)
        asked, asking = attn.k_norm(k[:, part]), attn.q_norm(q[:, part])
        out[:, part] = (asking @ asked.T / math.sqrt(c)).softmax(-1) @ v[:, part]
    return attn.out_proj(out)


def by_hand(model: DiffusionTransformer, image: Tensor, time: float, context: Tensor, label: int | None) -> Tensor:
    """The papers, one image and one patch at a time."""
    p, shared = model.patch_size, model.modulation == "shared"
    height, width = image.shape[1] // p, image.shape[2] // p
    i = torch.arange(128, dtype=torch.float64)
    angles = 1000 * time * torch.exp(-math.log(10_000) * i / (128 if shared else 127))
    condition = model.time_embed.fc2(F.silu(model.time_embed.fc1(torch.cat((angles.cos(), angles.sin())))))
    if model.class_embed is not None:
        condition = condition + model.class_embed.weight[model.num_classes if label is None else label]
    if model.pool_proj is not None and len(context):
        condition = condition + model.pool_proj(model.context_proj(context).mean(0))
    tokens = []
    for y in range(height):
        for x in range(width):
            patch = image[:, y * p : (y + 1) * p, x * p : (x + 1) * p].flatten()
            rates = 10_000.0 ** (-torch.arange(DIM // 4, dtype=torch.float64) / (DIM // 4))
            place = torch.cat([(x * rates).sin(), (x * rates).cos(), (y * rates).sin(), (y * rates).cos()])
            tokens.append(model.patch_embed(patch) + place)
    h = torch.stack(tokens)
    text = model.context_proj(context) if model.context_proj is not None else None
    for block in model.blocks:
        own = (
            model.shared_modulation.proj(F.silu(condition)).view(6, DIM) + block.modulation.table
            if shared
            else block.modulation.proj(F.silu(condition)).view(6, DIM)
        )
        z = norm(h, 1e-6) * (1 + own[1]) + own[0]
        h = h + own[2] * attend(block.attn, z, z)
        if text is not None:
            h = h + attend(block.cross_attn, h, text)
        h = h + own[5] * block.mlp(norm(h, 1e-6 if shared else 1e-5) * (1 + own[4]) + own[3])
    last = (
        model.last_modulation.table + condition
        if shared
        else model.last_modulation.proj(F.silu(condition)).view(2, DIM)
    )
    h = model.head(norm(h, 1e-6) * (1 + last[1]) + last[0])
    out = torch.zeros(model.out_channels, *image.shape[1:], dtype=torch.float64)
    for k, token in enumerate(h):
        y, x = divmod(k, width)
        out[:, y * p : (y + 1) * p, x * p : (x + 1) * p] = token.view(p, p, -1).permute(2, 0, 1)
    return out


@pytest.mark.parametrize("modulation", ["shared", "block"])
@pytest.mark.parametrize("num_classes", [0, 4])
@pytest.mark.parametrize("text", [True, False])
def test_by_definition(modulation: str, num_classes: int, text: bool) -> None:
    model = make(modulation=modulation, num_classes=num_classes, context_dim=TEXT if text else None).double()
    images, times, context, mask = inputs(torch.float64)
    labels = torch.tensor([2, num_classes]) if num_classes else None
    given = (context,) if text else ()
    found = model(images, times, *given, context_mask=mask if text else None, labels=labels)
    for b in range(2):
        want = by_hand(model, images[b], float(times[b]), context[b][mask[b]], None if labels is None else [2, 4][b])
        torch.testing.assert_close(found[b], want, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("modulation", ["shared", "block"])
@pytest.mark.parametrize("qk_norm", ["rms", "layer", None])
def test_a_text_in_the_adaptive_norms_by_definition(modulation: str, qk_norm: str | None) -> None:
    model = make(modulation=modulation, pooled_context=True, qk_norm=qk_norm).double()
    images, times, context, mask = inputs(torch.float64)
    found = model(images, times, context, context_mask=mask)
    for b in range(2):
        want = by_hand(model, images[b], float(times[b]), context[b][mask[b]], None)
        torch.testing.assert_close(found[b], want, atol=1e-10, rtol=1e-10)
    kept = model.project_context(context, mask)
    assert torch.equal(model(images, times, kept, context_mask=mask), found)
    second = kept.select(torch.tensor([1]))
    torch.testing.assert_close(model(images[1:], times[1:], second, context_mask=mask[1:]), found[1:])


def test_a_hidden_text_adds_nothing_to_the_time() -> None:
    model = make(pooled_context=True)
    images, times, context, mask = inputs()
    none = torch.zeros_like(mask)
    pooled = model.project_context(context, none).pooled
    assert pooled is not None
    assert not pooled.any()
    found = model(images, times, context, context_mask=none)
    assert torch.equal(found, model(images, times, context * 3 + 1, context_mask=none))
    with pytest.raises(ValueError, match="pooled_context=True pools the text's tokens: it needs context_dim"):
        make(pooled_context=True, context_dim=None)


def test_it_is_the_identity_at_the_start() -> None:
    """adaLN-Zero: every block gives back its tokens, and the whole gives zeros."""
    for modulation, pooled in (("shared", False), ("block", True)):
        model = DiffusionTransformer(
            2, 3, DIM, 3, HEADS, context_dim=TEXT, num_classes=3, modulation=modulation, pooled_context=pooled
        )
        images, times, context, _ = inputs()
        seen: list[tuple[Tensor, Tensor]] = []
        for block in model.blocks:
            block.register_forward_hook(lambda _, args, out, seen=seen: seen.append((args[0], out)))
        assert not model(images, times, context).any()
        assert len(seen) == 3
        assert all(torch.equal(before, after) for before, after in seen)
        assert seen[0][0].std() > 0.1


def test_any_size_and_shape_of_image() -> None:
    model = make()
    images, times, context, _ = inputs(size=(4, 14))
    assert model(images, times, context).shape == (2, 5, 4, 14)
    with pytest.raises(ValueError, match="images of 5 x 6 are not divided by the patch of 2"):
        model(torch.zeros(1, 3, 5, 6), times[:1], context[:1])


def test_padding_of_the_text_and_other_rows_do_not_matter() -> None:
    model = make()
    images, times, context, mask = inputs()
    found = model(images, times, context, context_mask=mask)
    changed = context.masked_fill(~mask[..., None], 9.0)
    assert torch.equal(model(images, times, changed, context_mask=mask), found)
    alone = model(images[1:], times[1:], context[1:, :3])
    torch.testing.assert_close(found[1:], alone, atol=1e-5, rtol=1e-5)


def test_a_text_is_projected_once() -> None:
    model = make()
    images, times, context, mask = inputs()
    kept = model.project_context(context)
    assert torch.equal(model(images, times, kept, context_mask=mask), model(images, times, context, context_mask=mask))


def test_no_token_of_a_text_is_no_text_at_all() -> None:
    """A mask of nothing but padding: cross-attention adds its bias only, whatever the text is."""
    model = make()
    images, times, context, mask = inputs()
    none = torch.zeros_like(mask)
    found = model(images, times, context, context_mask=none)
    assert torch.equal(found, model(images, times, context * 3 + 1, context_mask=none))
    assert torch.isfinite(found).all()


def test_positions_of_a_base_grid_keep_their_distances() -> None:
    small, large = grid_positions((4, 4), DIM, 4), grid_positions((8, 8), DIM, 4)
    torch.testing.assert_close(large.view(8, 8, DIM)[::2, ::2], small.view(4, 4, DIM))
    torch.testing.assert_close(grid_positions((4, 4), DIM), small)


def test_every_parameter_learns() -> None:
    model = make(num_classes=3).train()
    images, times, context, _ = inputs()
    model(images, times, context, labels=torch.tensor([0, 3])).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"modulation": "none"}, "modulation must be"), ({"dim": 22, "num_heads": 2}, "divisible by 4")],
)
def test_what_cannot_be_built_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusionTransformer(**settings)
    with pytest.raises(ValueError, match="a text is needed exactly where"):
        make()(*inputs()[:2])
