"""LoRA: the paper's formula, nothing changed at first, the base untouched, and merging that changes nothing."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from mmtransformer import Blip2, CaptionBatch, QFormer, TextDecoder, VisionEncoderDecoder, ViT, caption_loss
from mmtransformer.layers.lora import add_lora, merge_lora
from mmtransformer.weights import load_lm, save_lm, save_timm

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


def test_dropout_is_the_products_own() -> None:
    model = perturbed(add_lora(decoder(), rank=3, dropout=0.5).double()).train()
    assert not torch.equal(model(TOKENS), model(TOKENS))
    assert torch.equal(model.eval()(TOKENS), model(TOKENS))


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


def test_layers_that_have_products_are_merged_before_they_get_others() -> None:
    model = perturbed(add_lora(decoder(), rank=2).double())
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.q_proj has LoRA already: merge_lora\(model\) first"):
        add_lora(model, rank=3)
    before = model(TOKENS)
    assert torch.allclose(add_lora(merge_lora(model), rank=3).double()(TOKENS), before, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_other_layers_get_products_beside() -> None:
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "proj": nn.Linear(4, 4)})
    add_lora(add_lora(model, ["q_proj"]), ["proj"])  # q_proj ends so, and is not called so
    assert all(hasattr(layer, "lora_A") for layer in model.values())


def test_one_name_is_told_to_be_a_list() -> None:
    with pytest.raises(ValueError, match=r'target_modules is a list of names: \["q_proj"\], not "q_proj"'):
        add_lora(decoder(), "q_proj")


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="add_lora needs peft: pip install"):
        add_lora(decoder())


def test_a_language_model_for_a_recipe(tmp_path) -> None:
    decoder().float().save_pretrained(tmp_path)
    model = load_lm(tmp_path, lora_rank=3, lora_target_modules=["q_proj", "fc2"])
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.split(".")[-4] + n.split(".")[-3] for n in trainable} == {
        "q_projlora_A", "q_projlora_B", "fc2lora_A", "fc2lora_B",
    }  # fmt: skip
    blip2 = Blip2(ViT(16, 8, 16, 1, 2), QFormer(3, 16, 1, 2, 16, dropout=0.0), model, freeze_decoder=False).train()
    batch = CaptionBatch(TOKENS, TOKENS >= 0, TOKENS >= 0, pixels=torch.randn(3, 1, 3, 16, 16))
    caption_loss(blip2, batch, reduction="sum").sum.backward()
    learned = {n for n, p in blip2.decoder.named_parameters() if p.grad is not None}
    assert learned == trainable
    perturbed(model)
    before = blip2.eval().logits(batch)
    merge_lora(blip2).save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(Blip2.from_pretrained(tmp_path / "merged").logits(batch), before, atol=1e-5, rtol=1e-4)


def test_a_head_that_is_the_embedding_is_refused() -> None:
    """Its product would be added to the embedding too, when it is merged."""
    with pytest.raises(ValueError, match="lm_head shares its weight with another layer"):
        add_lora(TextDecoder(31, 24, 1, 4), ["q_proj", "lm_head"])
    one_memory = TextDecoder(31, 24, 1, 4)
    attn = one_memory.blocks[0].attn
    attn.k_proj.weight = torch.nn.Parameter(attn.q_proj.weight.detach())
    with pytest.raises(ValueError, match="q_proj shares its weight with another layer"):
        add_lora(one_memory)
    untied = add_lora(TextDecoder(31, 24, 1, 4, tied=False), ["lm_head"])
    tokens = torch.randint(31, (2, 5))
    torch.nn.init.normal_(untied.get_parameter("lm_head.lora_B.default.weight"))
    before = untied.head(untied(tokens))
    merged = merge_lora(untied)
    torch.testing.assert_close(merged.head(merged(tokens)), before, atol=1e-5, rtol=1e-5)


def test_saving_before_merging_names_what_merges(tmp_path: Path) -> None:
    said = r"LoRA's products beside its weights \(.*lora_A.*, the first of \d+\): .*merge_lora\(model\) adds"
    lm, vit = add_lora(TextDecoder(31, 24, 1, 4)), add_lora(ViT(16, 8, 16, 1, 2))
    saves: list[Callable[[Path], None]] = [
        lm.save_pretrained,
        partial(save_lm, lm),
        partial(save_timm, vit),
        VisionEncoderDecoder(vit, TextDecoder(31, 16, 1, 2, context_dim=16)).save_pretrained,
    ]
    for save in saves:
        with pytest.raises(ValueError, match=said):
            save(tmp_path / "saved")
        assert not [*tmp_path.iterdir()]
    save_lm(merge_lora(lm), tmp_path / "saved")
