"""Models of transformers in memory: each becomes what its folder becomes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
)

from mmtransformer import CLIP, Captioner, ViT
from mmtransformer.weights import FAMILIES, from_transformers, load_clip, load_vit
from mmtransformer.weights.families import family_of
from support import dual, hub
from support.public import noisy

SIZES: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 29, "num_hidden_layers": 2, "num_attention_heads": 3, "patch_size": 7,
}  # fmt: skip
FIXED = SIZES | {"image_size": 21}
TOWERS: dict[str, Callable[[], nn.Module]] = {
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**FIXED)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**FIXED)),
    "siglip2": lambda: Siglip2VisionModel(Siglip2VisionConfig(**SIZES, num_patches=9)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**FIXED, mlp_ratio=2)),
    "dinov3": lambda: DINOv3ViTModel(DINOv3ViTConfig(**FIXED)),
    "vit": lambda: ViTForImageClassification(ViTConfig(**FIXED, num_labels=5)),
    "deit": lambda: DeiTModel(DeiTConfig(**FIXED)),
}
DUAL = ("clip", "metaclip_2", "siglip", "siglip2", "siglip2 naflex", "chinese_clip", "altclip", "dual, bert")


def same(found: nn.Module, want: nn.Module) -> None:
    assert type(found) is type(want)
    assert not found.training
    here, there = found.state_dict(), want.state_dict()
    assert here.keys() == there.keys()
    for name, tensor in here.items():
        torch.testing.assert_close(tensor, there[name], atol=0, rtol=0, msg=name)


@pytest.mark.parametrize("family", hub.FAMILIES)
def test_a_captioner(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = noisy(hub.FAMILIES[family](tmp_path))
    theirs.save_pretrained(tmp_path)
    found = from_transformers(theirs)
    assert isinstance(found, Captioner)
    name = family_of(json.loads((tmp_path / "config.json").read_text()))
    same(found, FAMILIES[str(name)].load(tmp_path))


@pytest.mark.parametrize("kind", DUAL)
def test_a_dual_encoder(kind: str, tmp_path: Path) -> None:
    found = from_transformers(dual.write(tmp_path, kind))
    assert isinstance(found, CLIP)
    same(found, load_clip(tmp_path))


@pytest.mark.parametrize("name", TOWERS)
def test_a_vision_encoder(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = noisy(TOWERS[name]())
    theirs.save_pretrained(tmp_path)
    found = from_transformers(theirs)
    assert isinstance(found, ViT)
    same(found, load_vit(tmp_path))


def test_what_is_read_nowhere_is_named() -> None:
    with pytest.raises(ValueError, match=r'^Linear is not .* "None", and known are clip, .* HFCaptioner run others'):
        from_transformers(nn.Linear(2, 3))
