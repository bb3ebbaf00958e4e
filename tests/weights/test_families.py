"""The table of public families: each writes what it reads, and its folder names it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmtransformer import (
    AttentionConfig,
    Blip2,
    Blip2QFormer,
    CaptionBatch,
    DiffusionTransformer,
    Flamingo,
    LinearConnector,
    LinearProjector,
    Llava,
    MLPConfig,
    MLPProjector,
    NormConfig,
    PerceiverResampler,
    PositionConfig,
    QFormer,
    TextDecoder,
    TextEncoder,
    VisionEncoderDecoder,
    ViT,
    ViTBlockConfig,
    ViTOutputConfig,
    ViTPatchConfig,
    ViTPosEmbedConfig,
    ViTRopeConfig,
    weights,
)
from mmtransformer.captioners.flamingo import GatedBlockConfig
from mmtransformer.weights import FAMILIES, load_bert, save_bert
from mmtransformer.weights.families import families_for, family_of
from mmtransformer.weights.text.gemma import GEMMAS
from mmtransformer.weights.text.llama import LLAMAS

VOCAB = 53


def shaken(model: nn.Module) -> Any:
    torch.manual_seed(3)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def tower(**options: Any) -> ViT:
    return ViT(16, 8, 88, 1, 1, **options)


def gpt2(activation: Any = "gelu_tanh") -> TextDecoder:
    return TextDecoder(VOCAB, 24, 2, 4, max_len=29, mlp=MLPConfig(activation))


def llama(family: str) -> TextDecoder:
    attention = AttentionConfig(bias=family == "qwen2", out_bias=False, qk_norm="rms" if family == "qwen3" else None)
    return TextDecoder(
        VOCAB, 24, 2, 4, max_len=29, attention=attention, mlp=MLPConfig("swiglu", bias=False),
        norm=NormConfig("rms"), positions=PositionConfig("rotary"), tied=False,
    )  # fmt: skip


def blip() -> VisionEncoderDecoder:
    decoder = TextDecoder(
        VOCAB, 24, 2, 4, max_len=29, context_dim=88, mlp=MLPConfig("gelu"), norm=NormConfig(pre=False, embed=True),
        mlm_head=True,
    )  # fmt: skip
    return VisionEncoderDecoder(tower(), decoder)


def vision_encoder_decoder() -> VisionEncoderDecoder:
    return VisionEncoderDecoder(
        tower(), TextDecoder(VOCAB, 24, 2, 4, context_dim=24), connector=LinearConnector(88, 24)
    )


def gemma(family: str) -> TextDecoder:
    second = family == "gemma2"
    more: dict[str, Any] = {"window": 5, "full_interval": 2, "softcap": 3.0, "scale_dim": 7} if second else {}
    return TextDecoder(
        VOCAB, 24, 3, 4, max_len=29, attention=AttentionConfig(2, 10, bias=False, **more),
        mlp=MLPConfig("geglu_tanh", bias=False), norm=NormConfig("rms_offset", post=second),
        positions=PositionConfig("rotary", embed_scale=24**0.5), logit_softcap=4.0 if second else None,
    )  # fmt: skip


def stage2() -> Blip2:
    return Blip2(tower(), QFormer(3, 64, 2, 1, 88), gpt2("relu"))


def stage1() -> Blip2QFormer:
    return Blip2QFormer(tower(), QFormer(3, 64, 2, 1, 88, vocab_size=VOCAB), embed_dim=11, freeze_vision=True)


def openflamingo() -> Flamingo:
    resampler = PerceiverResampler(88, 2, 1, 64, 5)
    return Flamingo(
        tower(), gpt2(), connector=resampler, gated=GatedBlockConfig(mlp_without_image=True), keep_prefix_tokens=False
    )


def llava() -> Llava:
    return Llava(
        MODELS["clip"](), MLPProjector(88, 24, input_norm=False), llama("llama"), VOCAB - 1, vision_feature_layers=(-1,)
    )


def smolvlm() -> Llava:
    vision = tower(class_token=False, pool="mean")
    return Llava(
        vision,
        LinearProjector(88, 24, pixel_shuffle=2, bias=False),
        llama("llama"),
        VOCAB - 1,
        vision_feature_layers=None,
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm": lambda: tower(num_registers=2, num_classes=7),
    "clip": lambda: tower(patches=ViTPatchConfig(bias=False, pre_norm=True), output=ViTOutputConfig("pooled")),
    "siglip2": lambda: tower(
        class_token=False, pool="attention", patches=ViTPatchConfig(pos_embed=ViTPosEmbedConfig((2, 2), "bilinear"))
    ),
    "dino": lambda: tower(
        block=ViTBlockConfig(layer_scale=1.0),
        patches=ViTPatchConfig(positions="none"),
        rope=ViTRopeConfig("centered", 100.0),
    ),
    "vit": tower,
    "gpt2": gpt2,
    "opt": lambda: gpt2("relu"),
    **{family: lambda family=family: llama(family) for family in LLAMAS},
    **{family: lambda family=family: gemma(family) for family in GEMMAS},
    "bert": lambda: TextEncoder(VOCAB, 24, 2, 4, max_len=29, mlm_head=True, nsp_head=True),
    "blip": blip,
    "vision-encoder-decoder": vision_encoder_decoder,
    "dit": lambda: DiffusionTransformer(2, 4, 24, 2, 3, context_dim=7, base_grid=4),
    "blip2": stage2,
    "lavis": stage1,
    "llava": llava,
    "smolvlm": smolvlm,
    "idefics3": smolvlm,
    "openflamingo": openflamingo,
}
SAVED: dict[str, dict[str, int]] = {
    "blip": {"bos_token_id": VOCAB - 1, "sep_token_id": 2},
    "vision-encoder-decoder": {"decoder_start_token_id": 2, "eos_token_id": 2, "pad_token_id": 2},
    "blip2": {"image_token_id": VOCAB - 1},
}


def needed(name: str, model: Any) -> dict[str, Any]:
    """What a family's files leave out."""
    if name == "openflamingo":
        return {"vision": model.vision, "decoder": model.decoder}
    return {"timm": {"keep_head": True}, "lavis": {"num_heads": 1, "cls_token_id": None}}.get(name, {})


def test_every_family_is_tried_here_or_beside_its_oracle() -> None:
    assert set(FAMILIES) - {"git", "open_coca", "paligemma", "idefics", "hf"} == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_family_reads_what_it_writes(name: str, tmp_path: Path) -> None:
    model = shaken(MODELS[name]())
    family = FAMILIES[name]
    assert isinstance(model, family.makes)
    assert name in families_for(model)
    family.save(model, tmp_path, **SAVED.get(name, {}))
    assert family_of(json.loads((tmp_path / "config.json").read_text())) == name
    again = family.load(tmp_path, **needed(name, model))
    assert not again.training
    own = again.state_dict()
    for path, tensor in model.state_dict().items():
        if name == "lavis" and path.endswith("k_proj.bias") and path.startswith("vision"):
            continue  # Changes nothing, and has no name there.
        torch.testing.assert_close(own[path], tensor, atol=1e-6, rtol=1e-6, msg=path)
    again.save_pretrained(tmp_path / "ours")  # type: ignore[operator]  # What was loaded can be saved.


def test_every_public_name_stands_on_a_page() -> None:
    pages = "".join(path.read_text("utf-8") for path in (Path(__file__).parents[2] / "docs").glob("*.md"))
    assert not [name for name in weights.__all__ if not re.search(rf"\b{name}\b", pages)]


def test_what_no_family_is() -> None:
    assert family_of({"class": "ViT", "args": {}}) is None
    assert family_of({"model_type": "gpt_neox"}) is None
    assert family_of({"model_type": ["llama"]}) is None
    assert families_for(nn.Linear(2, 3)) == []


# --- doors that have no test file of an oracle's


HEADS = {
    "BertForPreTraining": {"mlm_head": True, "nsp_head": True},
    "BertForMaskedLM": {"mlm_head": True, "pooler": False},
    "BertForNextSentencePrediction": {"nsp_head": True},
    "BertModel": {},
}


@pytest.mark.parametrize("kind", HEADS)
@torch.no_grad()
def test_an_encoder_that_transformers_reads(kind: str, tmp_path: Path) -> None:
    import transformers

    encoder = shaken(TextEncoder(VOCAB, 24, 2, 4, mlp_dim=31, max_len=29, activation="relu", **HEADS[kind]))
    save_bert(encoder, tmp_path)
    theirs, report = getattr(transformers, kind).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    tokens = torch.randint(VOCAB, (3, 7))
    base: Any = theirs if kind == "BertModel" else theirs.bert
    want = base.eval()(tokens).last_hidden_state
    torch.testing.assert_close(encoder(tokens), want, atol=1e-5, rtol=1e-5)
    assert torch.equal(load_bert(tmp_path)(tokens), encoder(tokens))


def test_encoders_that_bert_cannot_be_are_not_written(tmp_path: Path) -> None:
    for options, message in (
        ({"mlm_head": True}, "pooler True, mlm_head True, nsp_head False"),
        ({"num_types": 0}, "0 token types"),
    ):
        with pytest.raises(ValueError, match=f"transformers has no BERT with .*{message}"):
            save_bert(TextEncoder(VOCAB, 24, 1, 4, **options), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_stage_2_of_lavis_from_a_file(tmp_path: Path) -> None:
    model = shaken(stage2())
    FAMILIES["lavis"].save(model, tmp_path)
    again = FAMILIES["lavis"].load(tmp_path / "model.safetensors", model.decoder, num_heads=1)
    tokens = torch.randint(VOCAB, (2, 5))
    real = torch.ones_like(tokens, dtype=torch.bool)
    given = CaptionBatch(tokens, real, real, pixels=torch.randn(2, 1, 3, 16, 16))
    logits: list[Tensor] = [m.logits(given) for m in (again, model)]  # type: ignore[operator]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


def test_a_folder_without_the_familys_tensors_is_named(tmp_path: Path) -> None:
    for name, more in (("lavis", {}), ("openflamingo", {"vision": tower(), "decoder": gpt2()})):
        FAMILIES["gpt2"].save(gpt2(), tmp_path)
        with pytest.raises(ValueError, match=f"{tmp_path} has no tensor"):
            FAMILIES[name].load(tmp_path, **more)
