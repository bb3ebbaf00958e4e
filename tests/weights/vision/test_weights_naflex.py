"""timm's NaFlexVit against ours with the same weights: one table of positions for images of every size and shape."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

from mmtransformer import ViT, ViTPosEmbedConfig
from mmtransformer.weights import from_timm, load_vit, save_timm

BASE: dict[str, Any] = {
    "patch_size": 8, "embed_dim": 20, "depth": 2, "num_heads": 4, "mlp_ratio": 1.5, "pos_embed_grid_size": (5, 3),
}  # fmt: skip
GAP: dict[str, Any] = {"init_values": 1e-5, "global_pool": "avg", "reg_tokens": 4, "fc_norm": True}
RADIO: dict[str, Any] = {
    "class_token": True, "global_pool": "token", "final_norm": False, "pos_embed_interp_mode": "bilinear",
    "pos_embed_ar_preserving": True, "pos_embed_antialias": False, "reg_tokens": 3,
}  # fmt: skip
NAFLEX: dict[str, dict[str, Any]] = {
    "gap": GAP,
    "par": {**GAP, "pos_embed_ar_preserving": True},
    "parfac": {**GAP, "pos_embed_ar_preserving": True, "pos_embed": "factorized", "pos_embed_grid_size": (4, 4)},
    "fac": {**GAP, "pos_embed": "factorized"},
    "siglip": {"act_layer": "gelu_tanh", "global_pool": "map", "pos_embed_interp_mode": "bilinear"},
    "radio, corners": {**RADIO, "init_values": 1e-5, "pos_embed_align_corners": True},
    "radio": RADIO,
    "convolved, pixels channel by channel": {"embed_proj_type": "conv", "global_pool": "avg", "fc_norm": False},
    "channels first": {"patchify_channels_last": False, "global_pool": "map"},
    "norm before": {"pre_norm": True, "class_token": True, "global_pool": "token"},
    "normed patches": {"embed_norm_layer": "layernorm", "class_token": True, "global_pool": "token"},
}
SIZES = [(40, 24), (16, 16), (64, 24), (8, 72)]


def naflex(**options: Any) -> Any:
    torch.manual_seed(3)
    model = NaFlexVit(NaFlexVitCfg(**BASE | options), num_classes=7)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("name", NAFLEX)
@torch.no_grad()
def test_vit_equals_naflexvit_at_every_size(name: str) -> None:
    theirs = naflex(**NAFLEX[name])
    ours = from_timm(theirs)
    assert ours.table_grid == ours.grid_size == theirs.embeds.pos_embed_grid_size
    for size in SIZES:
        pixels = torch.randn(2, 3, *size)
        torch.testing.assert_close(ours.forward_features(pixels), theirs.forward_features(pixels), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours(pixels), theirs(pixels), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_another_size_leaves_its_table_as_it_is_and_a_folder_keeps_how_it_is_resized(tmp_path: Path) -> None:
    ours, pixels = from_timm(naflex(**NAFLEX["radio, corners"])), torch.randn(1, 3, 64, 24)
    before = ours(pixels)
    ours.set_input_size((64, 24))
    assert (ours.grid_size, ours.table_grid, ours.image_size) == ((8, 3), (5, 3), (64, 24))
    assert torch.equal(ours(pixels), before)
    ours.save_pretrained(tmp_path)
    again = ViT.from_pretrained(tmp_path)
    assert again.patches.pos_embed == ViTPosEmbedConfig(
        (5, 3), "bilinear", antialias=False, align_corners=True, square=True
    )
    # Not to the bit: weights mapped from a file lie elsewhere in memory, and MKL adds up in another order there.
    torch.testing.assert_close(again(pixels), before, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"timm's VisionTransformer has nothing like pos_embed.grid=\(5, 3\)"):
        save_timm(ours, tmp_path / "timm")
    config = json.loads((tmp_path / "config.json").read_text())
    config["args"]["patches"]["pos_embed"]["interpolation"] = "cubic"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="patches: pos_embed: interpolation is 'cubic'"):
        ViT.from_pretrained(tmp_path)


@torch.no_grad()
def test_a_folder_of_timms_and_its_usual_size(tmp_path: Path) -> None:
    import timm

    name, args = "naflexvit_base_patch16_siglip", {"depth": 1, "embed_dim": 20, "num_heads": 5, "mlp_ratio": 1.0}
    theirs: Any = timm.create_model(name, num_classes=0, **args).eval()
    (tmp_path / "config.json").write_text(json.dumps({"architecture": name, "model_args": args}))
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    ours, pixels = load_vit(tmp_path), torch.randn(1, 3, 96, 160)
    assert ours.image_size == theirs.pretrained_cfg["input_size"][1:]
    torch.testing.assert_close(ours(pixels), theirs(pixels), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope_type": "axial", "attn_type": "rope"}, "blocks with EvaBlock: ViT knows Block"),
        ({"patch_size": (8, 4)}, "square patches=False"),
        ({**NAFLEX["parfac"], "pos_embed_grid_size": (5, 3)}, "square table=False"),
        ({"dynamic_img_pad": True}, "padding of images=True"),
        ({"pos_embed": "none"}, "pos_embed=False"),
        ({"global_pool": "map", "attn_pool_num_heads": 2}, "heads of pooling=False"),
    ],
    ids=str,
)
def test_a_naflexvit_that_does_not_fit_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_timm(naflex(**options))


def test_odd_tables() -> None:
    for bad, message in (({"interpolation": "linear"}, '"bicubic" or "bilinear"'), ({"grid": (0, 2)}, "two positive")):
        with pytest.raises(ValueError, match=message):
            ViTPosEmbedConfig(**bad)  # pyright: ignore[reportArgumentType]
