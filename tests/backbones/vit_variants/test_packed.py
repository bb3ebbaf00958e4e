"""Pictures of native size in one row: each gets what it gets alone, forward and backward."""

from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from mmtransformer import (
    PackedImages,
    ViT,
    ViTBlockConfig,
    ViTPatchConfig,
    ViTPosEmbedConfig,
    ViTRopeConfig,
    packed_features,
    packed_forward,
)
from mmtransformer.layers.attention import attend
from mmtransformer.layers.masks import Segments, broadcast

SIZES = [(24, 40), (8, 8), (40, 24), (24, 40), (56, 16)]
PLAIN: dict[str, Any] = {"num_registers": 2, "num_classes": 7}
VITS: dict[str, dict[str, Any]] = {
    "learned": PLAIN,
    "learned, of a grid of their own": {
        **PLAIN,
        "patches": ViTPatchConfig(pos_embed=ViTPosEmbedConfig((4, 4), "bilinear", antialias=False, square=True)),
    },
    "attention pooling": {"class_token": False, "pool": "attention"},
    "axial": {**PLAIN, "rope": ViTRopeConfig("axial", reference=(3, 3))},
    "centered": {"patches": ViTPatchConfig(positions="none"), "rope": ViTRopeConfig("centered", 100.0)},
    "mixed": {**PLAIN, "rope": ViTRopeConfig("mixed", 10.0, order="xy")},
    "parallel, norms of queries": {"pool": "mean", "block": ViTBlockConfig(order="parallel", qk_norm=True)},
}  # fmt: skip


def vit(name: str) -> ViT:
    torch.manual_seed(4)
    model = ViT(24, 8, 24, 2, 3, **VITS[name])
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def pictures() -> list[Tensor]:
    torch.manual_seed(5)
    return [torch.randn(3, *size) for size in SIZES]


def close(a: Tensor, b: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-5)


@pytest.mark.parametrize("name", VITS)
def test_each_picture_gets_what_it_gets_alone(name: str) -> None:
    model, images = vit(name), pictures()
    packed = PackedImages.of(images, 8)
    assert (len(packed), packed.patches.shape) == (5, (15 + 1 + 15 + 15 + 14, 192))
    with torch.no_grad():
        for tokens, image in zip(packed_features(model, packed), images, strict=True):
            close(tokens, model.forward_features(image[None])[0])
        close(packed_forward(model, packed), torch.cat([model(image[None]) for image in images]))
        for tokens, image in zip(packed_features(model, packed, [-2, 1]), images, strict=True):
            close(tokens, torch.cat(model.tokens_after(image[None], [-2, 1]), -1)[0])


@pytest.mark.parametrize("name", VITS)
def test_gradients_are_the_sum_of_each_pictures(name: str) -> None:
    images = pictures()
    model, alone = vit(name).train(), vit(name).train()
    model.set_grad_checkpointing()
    packed_forward(model, PackedImages.of(images, 8)).square().sum().backward()
    sum(alone(image[None]).square().sum() for image in images).backward()  # pyright: ignore[reportAttributeAccessIssue]
    for (path, one), two in zip(model.named_parameters(), alone.parameters(), strict=True):
        if two.grad is None:
            assert one.grad is None, path
            continue
        assert one.grad is not None, path
        scale = max(1.0, float(two.grad.abs().max()))
        close(one.grad / scale, two.grad / scale)


@torch.no_grad()
def test_another_picture_changes_no_other() -> None:
    model, images = vit("axial"), pictures()
    before = packed_features(model, PackedImages.of(images, 8))
    images[2] = torch.randn_like(images[2])
    after = packed_features(model, PackedImages.of(images, 8))
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, True, False, True, True]


def test_segments_are_a_block_diagonal_mask() -> None:
    segments = Segments((3, 1, 3, 4))
    q, k, v = torch.randn(3, 2, 4, 11, 8, dtype=torch.float64)
    mask = broadcast(segments, 11, 11, q.device)
    assert mask is not None
    assert mask.sum() == 9 + 1 + 9 + 16
    torch.testing.assert_close(attend(q, k, v, segments), attend(q, k, v, mask))
    torch.testing.assert_close(attend(q, k, v, segments, softcap=2.0), attend(q, k, v, mask, softcap=2.0))
    with pytest.raises(ValueError, match="segments of 11 tokens are not for 10 queries"):
        attend(q[:, :, :10], k[:, :, :10], v[:, :, :10], segments)


@torch.no_grad()
def test_naflex_of_transformers_with_its_padding() -> None:
    """What SigLIP 2 computes of pictures that it pads, here without padding."""
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    from mmtransformer.weights.vision.siglip2 import vision_from_siglip2

    torch.manual_seed(1)
    config = Siglip2VisionConfig(
        hidden_size=24, intermediate_size=37, num_hidden_layers=2, num_attention_heads=3, num_patches=9, patch_size=8
    )
    theirs: Any = Siglip2VisionModel(config).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    ours, images = vision_from_siglip2(config.to_dict(), theirs.state_dict(), "here"), pictures()
    rows = [rearrange(x, "c (gh y) (gw x) -> (gh gw) (y x c)", y=8, x=8) for x in images]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.tensor([[1] * len(row) + [0] * (padded.shape[1] - len(row)) for row in rows])
    packed = PackedImages.of(images, 8)
    found = theirs(padded, mask, torch.tensor(packed.grids))
    close(packed_forward(ours, packed), found.pooler_output)
    for i, tokens in enumerate(packed_features(ours, packed)):
        close(tokens, found.last_hidden_state[i, : len(tokens)])


@torch.no_grad()
def test_naflex_of_timm_with_its_padding() -> None:
    from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

    from mmtransformer.weights import from_timm

    torch.manual_seed(1)
    cfg = NaFlexVitCfg(
        patch_size=8, embed_dim=24, depth=2, num_heads=3, pos_embed_grid_size=(4, 4), reg_tokens=2, global_pool="avg",
        fc_norm=True, pos_embed_ar_preserving=True,
    )  # fmt: skip
    theirs, images = NaFlexVit(cfg, num_classes=7).eval(), pictures()
    rows = [rearrange(x, "c (gh y) (gw x) -> (gh gw) (y x c)", y=8, x=8) for x in images]
    packed = PackedImages.of(images, 8)
    patches = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    coord, valid = torch.zeros(5, patches.shape[1], 2, dtype=torch.long), torch.zeros(patches.shape[:2]).bool()
    for i, (gh, gw) in enumerate(packed.grids):
        coord[i, : gh * gw] = torch.cartesian_prod(torch.arange(gh), torch.arange(gw))
        valid[i, : gh * gw] = True
    found = theirs({"patches": patches, "patch_coord": coord, "patch_valid": valid})
    close(packed_forward(from_timm(theirs), packed), found)


def test_refused() -> None:
    with pytest.raises(ValueError, match=r"picture 1 of \(3, 24, 20\) is not .* divisible by 8: an ImageTransform"):
        PackedImages.of([torch.zeros(3, 8, 8), torch.zeros(3, 24, 20)], 8)
    with pytest.raises(ValueError, match="at least one picture"):
        PackedImages.of([], 8)
    packed = PackedImages.of([torch.zeros(3, 8, 8)], 8)
    with pytest.raises(ValueError, match=r"stem=\"conv\""):
        packed_features(ViT(16, 8, 24, 1, 3, patches=ViTPatchConfig(stem="conv")), packed)
    with pytest.raises(ValueError, match=r"drop_path \(0.1\) are drawn for a row"):
        packed_features(ViT(16, 8, 24, 1, 3, block=ViTBlockConfig(drop_path=0.1)).train(), packed)
    with pytest.raises(ValueError, match=r"patches are \(s 48\) for this ViT, not \(1, 192\)"):
        packed_features(ViT(16, 4, 24, 1, 3), packed)
    with pytest.raises(ValueError, match=r"blocks \[3\] were asked for, but there are 1"):
        packed_features(ViT(16, 8, 24, 1, 3), packed, [3])
