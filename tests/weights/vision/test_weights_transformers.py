"""transformers' ViT, DeiT, DINOv2, DINOv3 and SigLIP 2 (NaFlex): equal at every layer and size, and back."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor, nn

from mmtransformer import ViT, ViTBlockConfig, ViTOutputConfig, ViTPatchConfig, ViTPosEmbedConfig, ViTRopeConfig
from mmtransformer.weights import load_vit, save_dino, save_siglip2, save_vit
from mmtransformer.weights.vision.dino import vision_from_dino
from mmtransformer.weights.vision.siglip2 import vision_from_siglip2
from mmtransformer.weights.vision.vit import vision_from_vit

SMALL: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 28, "patch_size": 7,
}  # fmt: skip
OTHER: dict[str, Any] = {
    "hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 20, "patch_size": 4,
}  # fmt: skip
GATED = {"use_swiglu_ffn": True, "mlp_ratio": 3, "use_mask_token": False}
FREE: dict[str, Any] = {"intermediate_size": 37}
SIGLIP2: dict[str, Any] = {**SMALL, **FREE, "num_patches": 16}
SIGLIP2.pop("image_size")
TEXT = {"vocab_size": 53, "hidden_size": 12, "intermediate_size": 19, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": 11, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}  # fmt: skip
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViT", "ViTModel", SMALL | FREE),
    "vit, other": ("ViT", "ViTModel", OTHER | {"intermediate_size": 61, "qkv_bias": False, "hidden_act": "gelu_new"}),
    "vit, classifies": ("ViT", "ViTForImageClassification", SMALL | FREE),
    "deit": ("DeiT", "DeiTModel", SMALL | FREE),
    "deit, other": ("DeiT", "DeiTModel", OTHER | {"layer_norm_eps": 1e-5}),
    "dinov2": ("Dinov2", "Dinov2Model", SMALL),
    "dinov2, gated": ("Dinov2", "Dinov2Model", OTHER | GATED),
    "dinov2, classifies": ("Dinov2", "Dinov2ForImageClassification", SMALL),
    "dinov2, backbone": ("Dinov2", "Dinov2Backbone", SMALL),
    "dinov2 with registers": ("Dinov2WithRegisters", "Dinov2WithRegistersModel", SMALL | {"mlp_ratio": 2}),
    "dinov2 with registers, other": (
        "Dinov2WithRegisters",
        "Dinov2WithRegistersModel",
        OTHER | {"num_register_tokens": 1, "use_swiglu_ffn": True},
    ),
    "dinov3": ("DINOv3ViT", "DINOv3ViTModel", SMALL | FREE),
    "dinov3, gated": (
        "DINOv3ViT",
        "DINOv3ViTModel",
        OTHER | FREE | {"num_register_tokens": 3, "use_gated_mlp": True, "hidden_act": "silu", "rope_theta": 50.0},
    ),
    "dinov3, other biases": ("DINOv3ViT", "DINOv3ViTModel", SMALL | FREE | {"key_bias": True, "query_bias": False}),
    "dinov3, no biases": ("DINOv3ViT", "DINOv3ViTModel", SMALL | FREE | {"query_bias": False, "value_bias": False}),
    "siglip 2": ("Siglip2Vision", "Siglip2VisionModel", SIGLIP2),
    "siglip 2, other": (
        "Siglip2Vision",
        "Siglip2VisionModel",
        SIGLIP2 | {"num_patches": 25, "vision_use_head": False, "num_hidden_layers": 2, "hidden_act": "gelu"},
    ),
    "siglip 2, dual": ("Siglip2", "Siglip2Model", {"vision_config": SIGLIP2, "text_config": TEXT}),
}  # fmt: skip
SAVE = {"vit": save_vit, "deit": save_vit, "siglip2_vision_model": save_siglip2}
FOLDED = ("cls_token", "distillation_token", "position_embeddings", "mask_token")
"""Names of tensors that come back otherwise: positions of prefix tokens are added into these."""


def built(name: str) -> Any:
    torch.manual_seed(0)
    family, kind, options = CASES[name]
    config = getattr(transformers, f"{family}Config")(**options)
    model = getattr(transformers, kind)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tower_of(model: Any) -> Any:
    for name in ("vit", "dinov2", "vision_model"):
        model = getattr(model, name, model)
    return model


def run(tower: nn.Module, pixels: Tensor, patch: int) -> Any:
    """What transformers computes for whole images."""
    if type(tower).__name__.startswith("Siglip2"):
        grid = (pixels.shape[2] // patch, pixels.shape[3] // patch)
        patches = rearrange(pixels, "b c (gh y) (gw x) -> b (gh gw) (y x c)", y=patch, x=patch)
        mask = torch.ones(patches.shape[:2], dtype=torch.long)
        shapes = torch.tensor([grid] * len(pixels))
        return tower(patches, mask, shapes, output_hidden_states=True)
    return tower(pixel_values=pixels, output_hidden_states=True)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_every_layer_equal_and_written_back(name: str, tmp_path: Path) -> None:
    model = built(name)
    model.save_pretrained(tmp_path / "theirs")
    ours = load_vit(tmp_path / "theirs")
    assert not ours.training
    assert ours.num_classes == 0
    tower, kind = tower_of(model), model.config.model_type
    if name == "dinov2, backbone":
        tower = transformers.Dinov2Model(model.config).eval()
        tower.load_state_dict(model.state_dict())
    fixed = kind in ("vit", "deit")
    sizes = [ours.image_size] + [(2 * ours.patch_size, 5 * ours.patch_size)] * (not fixed)
    for size in sizes:
        pixels = torch.randn(2, 3, *size)
        theirs = run(tower, pixels, ours.patch_size)
        torch.testing.assert_close(ours.forward_features(pixels), theirs.last_hidden_state, atol=1e-5, rtol=1e-5)
        for i, tokens in enumerate(ours.tokens_after(pixels, list(range(ours.depth)))):
            torch.testing.assert_close(tokens, theirs.hidden_states[i + 1], atol=1e-5, rtol=1e-5)
        if theirs.pooler_output is not None and not fixed:
            torch.testing.assert_close(ours(pixels), theirs.pooler_output, atol=1e-5, rtol=1e-5)

    kind = "siglip2_vision_model" if kind == "siglip2" else kind
    SAVE.get(kind, save_dino)(ours, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["model_type"] == kind
    read: Any
    kind_of_model = getattr(transformers, config["architectures"][0])
    read, info = kind_of_model.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    pixels = torch.randn(2, 3, *ours.image_size)
    again, before = run(read.eval(), pixels, ours.patch_size), run(tower, pixels, ours.patch_size)
    torch.testing.assert_close(again.last_hidden_state, before.last_hidden_state, atol=1e-6, rtol=1e-6)
    found = read.state_dict()
    for key, tensor in tower.state_dict().items():
        if not key.endswith(FOLDED) and not key.startswith("pooler"):
            assert torch.equal(found[key], tensor), key
    for key, tensor in load_vit(tmp_path / "ours").state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[key]), key


@torch.no_grad()
def test_names_in_memory_are_read_too() -> None:
    read = {"Dinov2Model": vision_from_dino, "DINOv3ViTModel": vision_from_dino, "ViTModel": vision_from_vit,
            "Siglip2VisionModel": vision_from_siglip2}  # fmt: skip
    for name in ("vit", "dinov2", "dinov2, gated", "dinov3", "siglip 2"):
        model = built(name)
        ours = read[type(model).__name__](model.config.to_dict(), model.state_dict(), "here")
        pixels = torch.randn(1, 3, *ours.image_size)
        theirs = run(model, pixels, ours.patch_size).last_hidden_state
        torch.testing.assert_close(ours.forward_features(pixels), theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_classifier_is_kept_or_refused(tmp_path: Path) -> None:
    model = built("vit, classifies")
    model.save_pretrained(tmp_path / "vit")
    ours, pixels = load_vit(tmp_path / "vit", keep_head=True), torch.randn(2, 3, 28, 28)
    torch.testing.assert_close(ours(pixels), model(pixels).logits, atol=1e-5, rtol=1e-5)
    built("dinov2, classifies").save_pretrained(tmp_path / "dino")
    with pytest.raises(ValueError, match=r"classifies by classifier.bias, classifier.weight, .* without keep_head"):
        load_vit(tmp_path / "dino", keep_head=True)


def test_what_is_usual_may_be_left_out(tmp_path: Path) -> None:
    """Of old files, whose config.json says less."""
    for name, gone in (
        ("dinov2", ("mlp_ratio", "qkv_bias", "layer_norm_eps", "hidden_act", "use_swiglu_ffn", "num_channels")),
        ("dinov3", ("rope_theta", "layer_norm_eps", "hidden_act", "use_gated_mlp", "num_register_tokens", "key_bias")),
        ("siglip 2", ("hidden_act", "layer_norm_eps", "vision_use_head", "num_channels")),
    ):
        model = built(name)
        model.save_pretrained(tmp_path / name)
        path = tmp_path / name / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({key: value for key, value in config.items() if key not in gone}))
        ours, pixels = load_vit(tmp_path / name), torch.randn(1, 3, 28, 28)
        theirs = run(model, pixels, 7).last_hidden_state
        torch.testing.assert_close(ours.forward_features(pixels), theirs, atol=1e-5, rtol=1e-5)


def test_refused(tmp_path: Path) -> None:
    model = built("dinov2")
    for change, said in (
        ({"model_type": "swin"}, r'a "swin", not one of dinov2, dinov2_with_registers, dinov3_vit'),
        ({"hidden_act": "mish"}, "no activation like mish"),
        ({"patch_size": [7, 3]}, "patches of 7 x 3 px"),
        ({"image_size": [28, 35]}, r"image_size \(28, 35\) is not square"),
        ({"num_hidden_layers": 4}, "missing: encoder.layer.3"),
    ):
        with pytest.raises(ValueError, match=said):
            vision_from_dino(model.config.to_dict() | change, model.state_dict(), "here")
    third = built("dinov3")
    for change, said in (
        ({"mlp_bias": False}, "mlp_bias is False, and ViT has only True"),
        ({"use_gated_mlp": True}, "a gated MLP with gelu"),
    ):
        with pytest.raises(ValueError, match=said):
            vision_from_dino(third.config.to_dict() | change, third.state_dict(), "here")
    plain = ViTBlockConfig(layer_scale=1.0)
    for save, vit, said in (
        (save_dino, ViT(16, 8, 16, 1, 2), "dinov2 has nothing like layer_scale=True"),
        (save_dino, ViT(16, 8, 16, 1, 2, block=plain), "nothing like patches"),
        (save_dino, ViT(16, 8, 16, 1, 2, block=plain, num_registers=2, mlp_dim=21), "mlp_dim=False"),
        (save_dino, ViT((16, 8), 8, 16, 1, 2, block=plain, num_registers=2), "image_size=False"),
        (
            save_dino,
            ViT(16, 8, 16, 1, 2, block=plain, rope=ViTRopeConfig("axial")),
            "dinov3_vit has nothing like .*rope",
        ),
        (save_siglip2, ViT(16, 8, 16, 1, 2), "NaFlex tower has nothing like class_token=True"),
        (save_siglip2, ViT(16, 8, 16, 1, 2, class_token=False, pool="mean"), "nothing like patches"),
        (save_vit, ViT(16, 8, 16, 1, 2, num_registers=2), "num_registers=2"),
        (save_vit, ViT(16, 8, 16, 1, 2, output=ViTOutputConfig("none")), "output.norm="),
        (
            save_vit,
            ViT(16, 8, 16, 1, 2, patches=ViTPatchConfig(pos_embed=ViTPosEmbedConfig((3, 3)))),
            "patches.pos_embed.grid=",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            save(vit, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "swin"}))
    with pytest.raises(ValueError, match=r'"model_type" is \'swin\', not one of clip, .*dinov3_vit, vit, deit'):
        load_vit(tmp_path)
    for name in ("resnet50", "swin_tiny_patch4_window7_224", "vit_base_r50_s16_224"):
        with pytest.raises(ValueError, match=rf"{name}: timm's .*docs/towers.md lists the names that load"):
            load_vit(name)
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_resnet"}))
    with pytest.raises(ValueError, match=r"test_resnet is timm's ResNet, which is not a ViT that loads"):
        load_vit(tmp_path)
