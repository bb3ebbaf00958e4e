"""ViT against its definition, against timm (test_weights has the variants), and by its properties."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmtransformer import ViT, ViTBlockConfig, ViTPatchConfig, freeze
from mmtransformer.backbones.patches import ConvStem
from mmtransformer.layers.masks import drop_tokens
from mmtransformer.layers.positions import sinusoidal_2d

SMALL: dict[str, Any] = {"image_size": (16, 24), "patch_size": 8, "dim": 20, "depth": 3, "num_heads": 4, "mlp_dim": 29}


def small(**options: Any) -> ViT:
    torch.manual_seed(1)
    vit = ViT(**SMALL | options)
    for parameter in vit.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return vit.eval()


def normed(layer: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(layer, nn.LayerNorm)
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias


def definition(vit: Any, pixels: Tensor) -> Tensor:
    """The paper, one picture and one head at a time, in float64: normed visual tokens (b p d)."""
    vit, found = vit.double(), []
    size, heads = vit.patch_size, vit.num_heads
    width = vit.dim // heads
    for image in pixels.double():
        rows = []
        for top in range(0, image.shape[1], size):
            for left in range(0, image.shape[2], size):
                patch = image[:, top : top + size, left : left + size].reshape(-1)
                rows.append(vit.patch_embed.proj.weight @ patch)
                if vit.patches.bias:
                    rows[-1] = rows[-1] + vit.patch_embed.proj.bias
        x = torch.stack(rows) + vit.pos_embed[0]
        if vit.prefix_tokens is not None:
            x = torch.cat((vit.prefix_tokens[0], x))
        if vit.patches.pre_norm:
            x = normed(vit.first_norm, x)
        for block in vit.blocks:
            scale1, scale2 = (
                branch[0].gamma if vit.block.layer_scale is not None else 1.0
                for branch in (block.branch1, block.branch2)
            )
            y, out = normed(block.norm1, x), []
            q, k, v = (layer(y) for layer in (block.attn.q_proj, block.attn.k_proj, block.attn.v_proj))
            for h in range(heads):
                part = slice(h * width, (h + 1) * width)
                out.append((q[:, part] @ k[:, part].T / math.sqrt(width)).softmax(-1) @ v[:, part])
            x = x + scale1 * block.attn.out_proj(torch.cat(out, 1))
            y = block.mlp.fc1(normed(block.norm2, x))
            x = x + scale2 * block.mlp.fc2(y * 0.5 * (1 + torch.erf(y / 2**0.5)))
        found.append(normed(vit.norm, x))
    return torch.stack(found)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"class_token": False, "pool": "mean"},
        {"num_registers": 3, "block": ViTBlockConfig(layer_scale=0.3)},
        {"patches": ViTPatchConfig(5, bias=False, pre_norm=True), "block": ViTBlockConfig(norm_eps=1e-3)},
    ],
    ids=str,
)
def test_visual_tokens_are_the_definition(options: dict[str, Any]) -> None:
    vit = small(**options)
    pixels = torch.randn(2, vit.patches.in_channels, 16, 24)
    got = vit.forward_features(pixels)
    assert got.shape == (2, 6 + vit.num_prefix_tokens, vit.num_features)
    torch.testing.assert_close(got.double(), definition(vit, pixels), atol=2e-5, rtol=2e-5)


def test_a_convolutional_stem_is_the_definition() -> None:
    """Each convolution halves the picture and doubles the channels; a norm over the whole picture; GELU."""
    vit, pixels = small(patches=ViTPatchConfig(stem="conv"), num_registers=2), torch.randn(2, 3, 16, 40)
    assert isinstance(vit.patch_embed, ConvStem)
    stem: Any = vit.patch_embed
    assert [conv.out_channels for conv in stem.convs] == [5, 10, 20]
    got, x = stem(pixels), pixels.double()
    for conv, norm in zip(stem.convs, stem.norms, strict=True):
        padded = nn.functional.pad(x, (1, 1, 1, 1))
        windows = padded.unfold(2, 3, 2).unfold(3, 3, 2)  # (b c gh gw y x)
        x = torch.einsum("bchwyx,ocyx->bohw", windows, conv.weight.double()) + conv.bias.double()[:, None, None]
        centred = x - x.mean((1, 2, 3), keepdim=True)
        x = centred / (centred.square().mean((1, 2, 3), keepdim=True) + norm.eps).sqrt()
        x = x * norm.weight.double()[:, None, None] + norm.bias.double()[:, None, None]
        x = x * 0.5 * (1 + torch.erf(x / 2**0.5))
    want = x.flatten(2).mT @ stem.proj.weight.double().T + stem.proj.bias.double()
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=2e-5)
    assert vit.forward_features(pixels).shape == (2, 3 + 10, 20)


def test_positions_start_from_noise_or_from_sinusoids() -> None:
    noise, waves = (
        ViT(**SMALL, patches=ViTPatchConfig(positions=kind)).pos_embed for kind in ("learned", "sinusoidal")
    )
    assert torch.equal(waves.data[0], 0.5 * sinusoidal_2d((2, 3), 20))
    assert waves.requires_grad
    assert 0.01 < noise.std().item() < 0.03


def test_pools_and_head() -> None:
    pixels = torch.randn(2, 3, 16, 24)
    for pool, first in (("class", None), ("mean", 3)):
        vit = small(num_registers=2, pool=pool, num_classes=7)
        features = vit.forward_features(pixels)
        want = features[:, 0] if first is None else features[:, first:].mean(1)
        assert torch.equal(vit.forward_head(features, pre_logits=True), want)
        assert torch.equal(vit(pixels), vit.head(want))
        assert vit(pixels).shape == (2, 7)
    vit = small(pool="attention", class_token=False)
    assert vit.attn_pool is not None
    assert vit(pixels).shape == (2, 20)
    assert torch.equal(vit(pixels), vit.attn_pool(vit.forward_features(pixels))[:, 0])


def test_a_batch_equals_one_by_one() -> None:
    vit, pixels = small(num_classes=7), torch.randn(5, 3, 16, 24)
    alone = torch.cat([vit(image[None]) for image in pixels])
    torch.testing.assert_close(vit(pixels), alone, atol=1e-5, rtol=1e-5)


def test_without_positions_the_order_of_patches_does_not_matter() -> None:
    vit, pixels = small(pool="mean"), torch.randn(2, 3, 16, 24)
    swapped = torch.cat((pixels[..., 8:], pixels[..., :8]), -1)
    assert (vit(pixels) - vit(swapped)).abs().max() > 1e-2  # With positions it does.
    vit.pos_embed.data.zero_()
    torch.testing.assert_close(vit(pixels), vit(swapped), atol=1e-5, rtol=1e-5)


def test_positions_are_resized_at_run_time_as_once_and_for_all() -> None:
    vit, pixels = small(), torch.randn(2, 3, 40, 24)
    at_run_time = vit(pixels)
    before = sum(1 for _ in vit.parameters())
    vit.set_input_size((40, 24))
    assert vit.image_size == (40, 24)
    assert vit.grid_size == (5, 3)
    assert vit.pos_embed.shape == (1, 15, 20)
    assert vit.pos_embed.requires_grad
    assert sum(1 for _ in vit.parameters()) == before
    assert torch.equal(vit(pixels), at_run_time)
    freeze(vit).set_input_size(32)
    assert vit.image_size == (32, 32)
    assert not vit.pos_embed.requires_grad


def test_intermediates_are_those_of_the_pass() -> None:
    vit, pixels = small(), torch.randn(2, 3, 16, 24)
    last, first = vit.tokens_after(pixels, [-1, 0], norm=True)
    assert torch.equal(last, vit.forward_features(pixels))
    assert torch.equal(first, vit.norm(vit.blocks[0](vit.embed(pixels)[0])))
    (raw,) = vit.tokens_after(pixels, [1])
    assert torch.equal(vit.norm(vit.blocks[2](raw)), last)
    for wrong in (3, -4):
        with pytest.raises(ValueError, match=rf"\[{wrong}\].*there are 3"):
            vit.tokens_after(pixels, [wrong])


def test_recomputed_blocks_give_the_same_gradients() -> None:
    vit, pixels, grads = small(block=ViTBlockConfig(dropout=0.3)).train(), torch.randn(2, 3, 16, 24), []
    for again in (False, True):
        vit.zero_grad()
        vit.set_grad_checkpointing(again)
        torch.manual_seed(3)
        vit(pixels).square().sum().backward()
        grads.append([p.grad for p in vit.parameters()])
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_patches_are_dropped_in_training_only_and_stay_in_order() -> None:
    x = torch.arange(11.0).expand(501, 11)[..., None].clone()
    kept = drop_tokens(x, 0.4)
    assert kept.shape == (501, 7, 1)
    assert (kept[:, 1:] > kept[:, :-1]).all()
    share = torch.bincount(kept.long().flatten(), minlength=11) / 501
    assert (share - 7 / 11).abs().max() < 0.1
    assert drop_tokens(x, 0.99).shape[1] == 1
    vit, pixels = small(patches=ViTPatchConfig(patch_dropout=0.5)), torch.randn(2, 3, 16, 24)
    assert torch.equal(vit(pixels), vit(pixels))
    seen: list[tuple[int, ...]] = []
    vit.blocks[0].register_forward_hook(lambda _, args, __: seen.append(tuple(args[0].shape)))
    assert not torch.equal(vit.train()(pixels), vit(pixels))
    assert seen == [(2, 4, 20), (2, 4, 20)]  # The class token is never dropped.


def test_stochastic_depth_rises_with_depth() -> None:
    blocks: Any = small(block=ViTBlockConfig(drop_path=0.2)).blocks
    rates = [[getattr(step, "rate", 0) for step in block.branch1] for block in blocks]
    assert rates == [[], [0.1], [0.2]]


@pytest.mark.parametrize(
    ("size", "published"),
    # Features only, at 224 px; H has patches of 14 px.
    [("tiny", 5_524_416), ("small", 21_665_664), ("base", 85_798_656), ("large", 303_301_632), ("huge", 630_764_800)],
)
def test_parameter_counts_are_the_published(size: str, published: int) -> None:
    with torch.device("meta"):
        vit = ViT.preset(size)
    # The class token's position is added into the class token, so there is one vector less.
    assert sum(p.numel() for p in vit.parameters()) == published - vit.dim


def test_deit_ti_with_its_head_counts_as_published() -> None:
    with torch.device("meta"):
        vit = ViT.preset("tiny", num_classes=1000)
    with pytest.raises(ValueError, match='ViT has no preset "giant": it has tiny, small, base, large, huge'):
        ViT.preset("giant")
    assert sum(p.numel() for p in vit.parameters()) == 5_717_416 - vit.dim


def test_weights_start_as_documented() -> None:
    vit = ViT(32, 8, 64, 2, 4, num_registers=4, num_classes=31)
    for name, parameter in vit.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        elif parameter.numel() > 300:
            assert 0.018 < parameter.std().item() < 0.022, name


def test_timm_makes_its_groups_with_layer_decay() -> None:
    from timm.optim import create_optimizer_v2  # pyright: ignore[reportPrivateImportUsage]

    vit = small(num_registers=2, pool="attention", num_classes=7, patches=ViTPatchConfig(pre_norm=True))
    optimizer = create_optimizer_v2(vit, "adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    names = {id(p): name for name, p in vit.named_parameters()}
    found = {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
    assert set(found) == set(names.values())
    spared = {name for name, group in found.items() if group["weight_decay"] == 0}
    assert vit.no_weight_decay() <= spared
    assert all(name in vit.no_weight_decay() or dict(vit.named_parameters())[name].ndim == 1 for name in spared)
    scales = [found[name]["lr_scale"] for name in ("pos_embed", "blocks.0.norm1.weight", "blocks.2.norm1.weight")]
    assert scales[0] < scales[1] < scales[2] <= found["head.weight"]["lr_scale"] == 1.0
    assert found["prefix_tokens"]["lr_scale"] == found["first_norm.weight"]["lr_scale"] == scales[0]


def test_errors_name_the_numbers() -> None:
    faults: list[tuple[dict[str, Any], str]] = [
        ({"image_size": (16, 23)}, r"16 x 23.*\(8\)"),
        ({"pool": "max"}, 'not "max"'),
        ({"patches": ViTPatchConfig(stem="conv"), "dim": 22, "num_heads": 2}, r"patch_size \(8\).*dim \(22\)"),
        ({"patches": ViTPatchConfig(stem="conv"), "image_size": 12, "patch_size": 6}, r"patch_size \(6\).*dim \(20\)"),
        ({"class_token": False}, 'pool="class" needs class_token'),
        ({"block": ViTBlockConfig(drop_path=1.5)}, r"not 1\.5"),
        ({"dim": 21}, r"dim \(21\).*num_heads \(4\)"),
        ({"block": ViTBlockConfig(activation="swish")}, '"swish"'),
    ]
    for options, message in faults:
        with pytest.raises(ValueError, match=message):
            ViT(**SMALL | options)
    for arguments, message in (
        ({"stem": "wide"}, 'not "wide"'),
        ({"positions": "rotary"}, 'not "rotary"'),
        ({"patch_dropout": 1.0}, r"not 1\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            ViTPatchConfig(**arguments)
    vit = small()
    with pytest.raises(ValueError, match=r"16 x 25 px.*8 px"):
        vit(torch.randn(2, 3, 16, 25))
    with pytest.raises(ValueError, match=r"\(b 3 height width\), not \(2, 1, 16, 24\)"):
        vit(torch.randn(2, 1, 16, 24))
    with pytest.raises(ValueError, match="30 x 30"):
        vit.set_input_size(30)


@pytest.mark.filterwarnings("ignore")  # torch's tracer warns of shapes that it takes for constants
def test_a_trace_gives_what_the_vit_gives() -> None:
    vit = ViT(image_size=24, patch_size=8, dim=20, depth=2, num_heads=4).eval()
    traced = torch.jit.trace(vit, torch.randn(3, 3, 24, 24))
    pixels = torch.randn(3, 3, 24, 24)
    torch.testing.assert_close(traced(pixels), vit(pixels))


@pytest.mark.parametrize("pool", ["class", "distilled", "mean"])
def test_another_classifier_is_one_of_its_own(tmp_path: Path, pool: Any) -> None:
    vit, pixels = small(pool=pool, num_registers=2, num_classes=5).double().eval(), torch.randn(2, 3, 16, 24).double()
    features = vit.forward_features(pixels)
    for classes in (7, 0, 3):
        vit.reset_classifier(classes)
        assert vit(pixels).shape == (2, classes or 20)
        assert torch.equal(vit.forward_features(pixels), features)
        assert not vit.get_classifier().training
        assert len(vit.get_classifier().state_dict()) == (0 if not classes else 4 if pool == "distilled" else 2)
        vit.save_pretrained(tmp_path / str(classes))
        again = ViT.from_pretrained(tmp_path / str(classes)).double()
        assert again.num_classes == classes
        assert torch.equal(again(pixels), vit(pixels))
    with pytest.raises(ValueError, match=r"num_classes.*-1"):
        vit.reset_classifier(-1)
    with torch.device("meta"):
        bare = small()
    bare.reset_classifier(4)
    assert bare.head.weight.is_meta


def test_intermediates_say_what_they_cannot_give() -> None:
    vit, pixels = small(patches=ViTPatchConfig(patch_dropout=0.5)).train(), torch.randn(2, 3, 16, 24)
    with pytest.raises(ValueError, match="no grid: output_fmt NLC"):
        vit.forward_intermediates(pixels)
    assert vit.get_intermediate_layers(pixels)[0].shape == (2, 3, 20)
    for wrong in (0, 4, [3], []):
        with pytest.raises(ValueError, match="were asked for, but there are 3"):
            vit.eval().forward_intermediates(pixels, wrong)
    with pytest.raises(ValueError, match='"NCHW" or "NLC", not "BCHW"'):
        vit.forward_intermediates(pixels, output_fmt="BCHW")  # pyright: ignore
