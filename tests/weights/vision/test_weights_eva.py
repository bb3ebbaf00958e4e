"""timm's Eva towers against ours with the same weights: EVA, DINOv3, Perception Encoder, rotary ViTs."""

from functools import partial
from typing import Any

import pytest
import torch
from timm.models.eva import Eva
from torch import Tensor, nn

from mmtransformer import ViT, ViTRopeConfig
from mmtransformer.weights import from_timm, to_timm

BASE: dict[str, Any] = {
    "img_size": 24, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 1.5, "num_classes": 7,
}  # fmt: skip
ROPE: dict[str, Any] = {"use_rot_pos_emb": True, "ref_feat_shape": (2, 2)}
FIVE = partial(nn.LayerNorm, eps=1e-5)
DINO: dict[str, Any] = {
    "use_rot_pos_emb": True, "use_abs_pos_emb": False, "rope_type": "dinov3", "rope_temperature": 100,
    "rope_rotate_half": True, "num_reg_tokens": 4, "init_values": 1e-5, "norm_layer": FIVE, "use_fc_norm": False,
}  # fmt: skip
PE: dict[str, Any] = {
    "attn_type": "rope", "use_rot_pos_emb": True, "ref_feat_shape": (3, 3), "rope_grid_offset": 1.0,
    "rope_grid_indexing": "xy", "use_pre_transformer_norm": True, "norm_layer": FIVE,
}  # fmt: skip
AXIAL: dict[str, Any] = {
    "use_rot_pos_emb": True, "rope_grid_indexing": "xy", "rope_temperature": 100.0, "init_values": 1e-5,
    "use_fc_norm": False, "use_post_transformer_norm": True,
}  # fmt: skip
MIXED: dict[str, Any] = {**AXIAL, "rope_type": "mixed", "rope_temperature": 10.0, "global_pool": "token"}
EVAS: dict[str, dict[str, Any]] = {
    "eva giant": {},
    "eva giant, token": {"global_pool": "token"},
    "eva02 tiny": {**ROPE, "swiglu_mlp": True},
    "eva02 base": {**ROPE, "swiglu_mlp": True, "scale_mlp": True, "qkv_fused": False},
    "eva02 clip": {**ROPE, "swiglu_mlp": True, "scale_mlp": True, "qkv_fused": False, "scale_attn_inner": True,
                   "global_pool": "token"},
    "eva02 enormous": {"use_post_norm": True, "global_pool": "token"},
    "no bias": {**ROPE, "qkv_bias": False},
    "dinov3": {**DINO, "qkv_bias": False, "global_pool": "avg", "use_post_transformer_norm": True},
    "dinov3 with biases": {**DINO, "qkv_bias": True, "global_pool": "token"},
    "dinov3 plus": {**DINO, "qkv_bias": False, "swiglu_mlp": True, "swiglu_align_to": 8, "global_pool": "token"},
    "perception encoder": {**PE, "global_pool": "map", "attn_pool_num_heads": 4, "attn_pool_mlp_ratio": 2.0},
    "perception encoder, lang": {**PE, "init_values": 0.1, "class_token": False, "global_pool": "avg",
                                 "use_post_transformer_norm": False, "use_fc_norm": False},
    "axial": {**AXIAL, "use_abs_pos_emb": False, "global_pool": "token"},
    "axial and a table": {**AXIAL, "no_embed_class": True, "global_pool": "token"},
    "registers, average, query norms": {**ROPE, "rope_grid_indexing": "xy", "attn_type": "rope", "qkv_bias": False,
                                        "class_token": False, "num_reg_tokens": 1, "no_embed_class": True,
                                        "qk_norm": True},
    "mixed": {**MIXED, "use_abs_pos_emb": False},
    "mixed and a table": {**MIXED, "no_embed_class": True},
}  # fmt: skip


def eva(**options: Any) -> Any:
    torch.manual_seed(2)
    model = Eva(**BASE | options)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", EVAS)
@torch.no_grad()
def test_vit_equals_eva(name: str) -> None:
    theirs = eva(**EVAS[name])
    ours, pixels = from_timm(theirs), torch.randn(3, 3, 24, 24)
    assert not ours.training
    close(ours.forward_features(pixels), theirs.forward_features(pixels))
    close(ours(pixels), theirs(pixels))
    between = theirs.forward_intermediates(pixels, indices=[0], output_fmt="NLC", intermediates_only=True)[0]
    close(ours.tokens_after(pixels, [0])[0][:, ours.num_prefix_tokens :], between)


@pytest.mark.parametrize("size", [(40, 16), (16, 16)])
@pytest.mark.parametrize(
    "name", ["eva02 base", "dinov3", "perception encoder", "axial and a table", "mixed and a table"]
)
@torch.no_grad()
def test_other_sizes_at_run_time_equal_timm(name: str, size: tuple[int, int]) -> None:
    theirs = eva(**EVAS[name], dynamic_img_size=True)
    ours, pixels = from_timm(theirs), torch.randn(2, 3, *size)
    close(ours.forward_features(pixels), theirs.forward_features(pixels))


def test_what_was_loaded_is_saved_and_not_written_as_another(tmp_path: Any) -> None:
    ours, pixels = from_timm(eva(**EVAS["mixed"])), torch.randn(1, 3, 24, 32)
    ours.save_pretrained(tmp_path)
    # Not to the bit: weights mapped from a file lie elsewhere in memory, and MKL adds up in another order there.
    torch.testing.assert_close(ViT.from_pretrained(tmp_path)(pixels), ours(pixels), rtol=1e-5, atol=1e-6)
    for name in ("eva02 tiny", "mixed", "perception encoder"):
        with pytest.raises(ValueError, match="timm's VisionTransformer has nothing like rope"):
            to_timm(from_timm(eva(**EVAS[name])))
    assert from_timm(eva(**EVAS["eva giant"])).rope == ViTRopeConfig()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_pool": "max"}, "nothing like global_pool"),
        ({"patch_size": (8, 12)}, "nothing like .*square patches=2"),
        ({"init_values": 0.1, "attn_only_layer_scale": True}, "layer scale of both branches"),
        ({"attn_type": "rope", "qkv_fused": False, "num_kv_heads": 1}, "num_kv_heads=1"),
        ({**ROPE, "rope_type": "mrope", "rope_mrope_section": (1, 1, 2)}, "by RotaryEmbeddingMRope in a way"),
        ({"use_fc_norm": True, "use_post_transformer_norm": True}, "norms tokens, and what they are pooled to"),
    ],
    ids=str,
)
def test_an_eva_that_does_not_fit_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_timm(eva(**options))
