"""CLIP's and SigLIP's towers of transformers: equal outputs at every layer, there and back, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from mmtransformer import ViT, ViTBlockConfig, ViTOutputConfig, ViTPatchConfig
from mmtransformer.weights import load_vit, save_clip
from mmtransformer.weights.vision.clip import vision_from_clip

SMALL = {"hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 21,
         "patch_size": 7}  # fmt: skip
OTHER = {"hidden_size": 20, "intermediate_size": 53, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 20,
         "patch_size": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-4}  # fmt: skip
TEXT = {"vocab_size": 53, "hidden_size": 12, "intermediate_size": 19, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": 11, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}  # fmt: skip


def noisy(model: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


MODELS = {
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**SMALL)),
    "clip, other": lambda: CLIPVisionModel(CLIPVisionConfig(**OTHER)),
    "clip, dual": lambda: CLIPModel(CLIPConfig(vision_config=SMALL, text_config=TEXT, projection_dim=13)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**SMALL)),
    "siglip, other": lambda: SiglipVisionModel(SiglipVisionConfig(**OTHER, vision_use_head=False)),
    "siglip, dual": lambda: SiglipModel(SiglipConfig(vision_config=SMALL, text_config=TEXT)),
}


@pytest.fixture(params=MODELS, name="model")
def any_model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return noisy(MODELS[request.param]())


@torch.no_grad()
def test_every_layer_equal_and_written_back(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "theirs")
    ours = load_vit(tmp_path / "theirs")
    tower = getattr(model, "vision_model", model)
    pixels = torch.randn(2, 3, *ours.image_size)
    theirs = tower(pixel_values=pixels, output_hidden_states=True)
    torch.testing.assert_close(ours.forward_features(pixels), theirs.last_hidden_state, atol=1e-5, rtol=1e-5)
    for i, tokens in enumerate(ours.tokens_after(pixels, list(range(ours.depth)))):
        torch.testing.assert_close(tokens, theirs.hidden_states[i + 1], atol=1e-5, rtol=1e-5)
    if theirs.pooler_output is not None:
        torch.testing.assert_close(ours(pixels), theirs.pooler_output, atol=1e-5, rtol=1e-5)

    save_clip(ours, tmp_path / "ours")
    kind = CLIPVisionModel if ours.class_token else SiglipVisionModel
    read: Any
    read, info = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    again = read(pixel_values=pixels, output_hidden_states=True)
    torch.testing.assert_close(again.last_hidden_state, theirs.last_hidden_state, atol=1e-6, rtol=1e-6)
    folded = ("class_embedding", "position_embedding.weight")  # A class token's position is added into it.
    for name, tensor in tower.state_dict().items():
        if ours.class_token is False or not name.endswith(folded):
            assert torch.equal(read.state_dict()[name], tensor), name
    for name, tensor in load_vit(tmp_path / "ours").state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name


@torch.no_grad()
def test_names_with_and_without_the_old_prefix_and_with_old_buffers() -> None:
    model: Any = noisy(CLIPVisionModel(CLIPVisionConfig(**SMALL)))
    config, state = model.config.to_dict(), model.state_dict()
    bare = {name.removeprefix("vision_model."): tensor for name, tensor in state.items()}
    old = {f"vision_model.{name}": tensor for name, tensor in bare.items()}
    old["vision_model.embeddings.position_ids"] = torch.arange(10)[None]
    pixels = torch.randn(1, 3, 21, 21)
    expected = model(pixel_values=pixels).last_hidden_state
    for tensors in (bare, old):
        found = vision_from_clip(config, tensors, "here").forward_features(pixels)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    normed = vision_from_clip(config, bare, "here", norm="tokens")
    every = torch.nn.functional.layer_norm(expected, (24,), bare["post_layernorm.weight"], bare["post_layernorm.bias"])
    torch.testing.assert_close(normed.forward_features(pixels), every, atol=1e-5, rtol=1e-5)


def test_what_is_usual_may_be_left_out(tmp_path: Path) -> None:
    siglip = SiglipVisionModel(SiglipVisionConfig(**SMALL))
    siglip.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("num_channels", "hidden_act", "layer_norm_eps", "vision_use_head"):
        del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = load_vit(tmp_path)
    assert ours.block == ViTBlockConfig("gelu_tanh", 1e-6)
    assert ours.pool == "attention"


def test_refused(tmp_path: Path) -> None:
    model: Any = CLIPVisionModel(CLIPVisionConfig(**SMALL))
    state = model.state_dict()
    for change, said in (
        ({"hidden_act": "mish"}, "no activation like mish"),
        ({"patch_size": [7, 3]}, "patches of 7 x 3 px"),
        ({"num_hidden_layers": 4}, "missing: encoder.layers.3"),
        ({"model_type": "dinov2"}, 'a "dinov2", not one of CLIP or SigLIP'),
    ):
        with pytest.raises(ValueError, match=said):
            vision_from_clip(model.config.to_dict() | change, state, "here")
    with pytest.raises(ValueError, match=r"unknown: strange \(1 in all\)"):
        vision_from_clip(model.config.to_dict(), {"strange": torch.ones(2), **state}, "here")
    for vit, said in (
        (ViT(16, 8, 16, 1, 2), "has nothing like patches"),
        (ViT(16, 8, 16, 1, 2, class_token=False, pool="mean", num_registers=1), "num_registers=1"),
        (
            ViT(16, 8, 16, 1, 2, patches=ViTPatchConfig(bias=False, pre_norm=True), output=ViTOutputConfig("none")),
            "output.norm='none'",
        ),
        (ViT(16, 8, 16, 1, 2, class_token=False, pool="mean", block=ViTBlockConfig("swiglu")), "activation=False"),
        (ViT((16, 24), 8, 16, 1, 2, class_token=False, pool="mean"), "image_size="),
    ):
        with pytest.raises(ValueError, match=said):
            save_clip(vit, tmp_path / "none")
    assert not (tmp_path / "none").exists()
