"""LoRA: the paper's formula, nothing changed at first, the base untouched, and merging that changes nothing."""

import sys

import pytest
import torch

from mmtransformer import TextDecoder, ViT
from mmtransformer.lora import add_lora, merge_lora

TOKENS = torch.randint(0, 31, (3, 7), generator=torch.Generator().manual_seed(0))


def decoder() -> TextDecoder:
    torch.manual_seed(0)
    return TextDecoder(31, 20, 3, 5).double().eval()


def perturbed(model: TextDecoder) -> TextDecoder:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def test_the_formula() -> None:
    plain = decoder()
    model = perturbed(add_lora(decoder(), ["q_proj", "fc1"], rank=3, alpha=7.0).double())
    state = model.state_dict()
    with torch.no_grad():
        for name, layer in plain.named_modules():
            if name.endswith(("q_proj", "fc1")):
                a, b = (state[f"{name}.lora_{x}.default.weight"] for x in "AB")
                layer.weight.add_(7.0 / 3 * b @ a)
        assert torch.allclose(model(TOKENS), plain(TOKENS), atol=1e-12)


def test_nothing_changes_at_first_and_only_the_products_learn() -> None:
    plain, model = decoder(), add_lora(decoder(), rank=3)
    assert torch.equal(model(TOKENS), plain(TOKENS))
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 3 * 2 * 2
    assert all("lora_" in name for name in trainable)


def test_merged_it_is_an_ordinary_model_that_says_the_same(tmp_path) -> None:
    model = perturbed(add_lora(decoder(), rank=2).double())
    before = model(TOKENS)
    assert not torch.allclose(before, decoder()(TOKENS))
    merge_lora(model)
    assert torch.allclose(model(TOKENS), before, atol=1e-12)
    assert model.state_dict().keys() == decoder().state_dict().keys()
    model.save_pretrained(tmp_path)
    again = TextDecoder.from_pretrained(tmp_path)
    assert torch.allclose(again(TOKENS), before.float(), atol=1e-5)
    vit = ViT(16, 8, 16, 1, 2)
    assert merge_lora(vit) is vit  # without LoRA nothing happens


def test_a_vision_tower_takes_it_too() -> None:
    vit = ViT(16, 8, 16, 2, 2).eval()
    pixels = torch.randn(2, 3, 16, 16)
    before = vit.forward_features(pixels)
    assert torch.equal(add_lora(vit, ["q_proj"]).forward_features(pixels), before)


def test_a_name_that_no_layer_has() -> None:
    with pytest.raises(ValueError, match=r'no linear layer is called "q_prj"; there are .*q_proj'):
        add_lora(decoder(), ["q_prj"])


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"mmtransformer\[lora\]"):
        add_lora(decoder())
