"""save_pretrained and from_pretrained: bit for bit there and back, and every fault named."""

import inspect
import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import mmtransformer
from mmtransformer import (
    CLIP,
    AttentionConfig,
    Blip2,
    Blip2QFormer,
    BlipITM,
    BlipVQA,
    CoCa,
    ConcatViT,
    DiffusionConfig,
    DiffusionTransformer,
    ExtendedDecoder,
    Flamingo,
    GatedBlockConfig,
    Git,
    HFDecoder,
    HFSeq2Seq,
    ImageGenerator,
    ImageTransform,
    LinearAttention,
    LinearConnector,
    LinearProjector,
    Llava,
    MLPConfig,
    MLPProjector,
    NormConfig,
    OpenCoCa,
    PaliGemma,
    PerceiverResampler,
    PositionConfig,
    PrefixCaptioner,
    QFormer,
    TextDecoder,
    TextEncoder,
    TextEncoderTower,
    TextToImageModel,
    TextTower,
    Transformer,
    TransformerConnector,
    VisionEncoderDecoder,
    ViT,
    ViTBlockConfig,
    ViTOutputConfig,
    ViTPatchConfig,
    ViTRopeConfig,
)
from mmtransformer.captioners.tiles import TileConfig
from mmtransformer.cli import main
from mmtransformer.layers.lora import add_lora
from mmtransformer.serialization.checksums import checksum
from mmtransformer.serialization.pretrained import (
    FORMAT_VERSION,
    Pretrained,
    find_folder,
    from_config,
    load_strictly,
    read_json,
    rebuilt,
    rehash,
    to_config,
)
from mmtransformer.serialization.weight_files import read_safetensors
from support.latents import autoencoder

VISION: dict[str, Any] = {"image_size": (16, 24), "patch_size": 8, "dim": 20, "depth": 1, "num_heads": 4}


def vision(changes: dict[str, Any]) -> dict[str, Any]:
    return VISION | changes


def decoder(**options: Any) -> TextDecoder:
    arguments: dict[str, Any] = {"max_len": 29} | options
    return TextDecoder(53, 24, 2, 4, **arguments)


def captioner(**options: Any) -> VisionEncoderDecoder:
    connector = TransformerConnector(20, 12, 1, 3, dropout=0.1, token_dropout=0.2)
    return VisionEncoderDecoder(ViT(**VISION), decoder(context_dim=12), connector=connector, **options)


def qformer(**options: Any) -> QFormer:
    sizes: dict[str, Any] = {"num_queries": 3, "dim": 12, "depth": 2, "num_heads": 3, "visual_dim": 20}
    arguments: dict[str, Any] = {"cross_attention_frequency": 1, "mlp_dim": 29, "dropout": 0.2, "norm_eps": 1e-5}
    return QFormer(**sizes | arguments | options)


MODELS: dict[str, Callable[[], Any]] = {
    "ViT": lambda: ViT(
        **VISION, mlp_dim=29, num_registers=3, pool="attention", num_classes=7,
        patches=ViTPatchConfig(bias=False, pre_norm=True, patch_dropout=0.1),
        block=ViTBlockConfig("quick_gelu", 1e-3, 0.5, 0.1, 0.1),
    ),
    "ViT with a stem": lambda: ViT(
        **VISION, patches=ViTPatchConfig(1, "conv", positions="sinusoidal"), class_token=False, pool="mean",
        transform=ImageTransform(28, "crop", (0.1, 0.2, 0.3), crop_fraction=0.9),
    ),
    "ViT of other blocks": lambda: ViT(
        **VISION, patches=ViTPatchConfig(embed_norm=True), output=ViTOutputConfig("none"),
        block=ViTBlockConfig(
            "swiglu", norm="rms", qkv_bias=False, bias=False, qk_norm=True, attn_norm=True, mlp_norm=True
        ),
    ),
    "ViT of parallel blocks": lambda: ViT(
        **vision({"num_heads": 5}), block=ViTBlockConfig(order="parallel"), pool="attention",
        rope=ViTRopeConfig("axial", 1e3, 1.0, "xy", (2, 3)), output=ViTOutputConfig("pooled", 2, 13, True),
    ),
    "ViT of two heads": lambda: ViT(**VISION, num_registers=1, pool="distilled", num_classes=3),
    "ViT that learns to turn": lambda: ViT(
        **vision({"num_heads": 5}), patches=ViTPatchConfig(positions="none"), rope=ViTRopeConfig("mixed", 10.0)
    ),
    "TextDecoder": lambda: decoder(),
    "TextDecoder of another kind": lambda: decoder(
        mlp_dim=31, context_dim=19, cross_attn_every_n_layers=2,
        attention=AttentionConfig(2, 10, out_bias=False, qk_norm="rms"), mlp=MLPConfig("swiglu", bias=False),
        norm=NormConfig("rms", 1e-3), tied=False, dropout=0.1, logit_softcap=4.0,
        positions=PositionConfig("rotary", 5e3, {"rope_type": "linear", "factor": 2.0}),
    ),
    "TextDecoder with a window": lambda: decoder(
        attention=AttentionConfig(bias=False, window=5), mlp=MLPConfig("relu", bias=False), norm=NormConfig(pre=False),
        mlm_head=True,
        positions=PositionConfig("rotary", nope_interval=2, embed_scale=2.0),
    ),
    "ExtendedDecoder": lambda: ExtendedDecoder(decoder(tied=False), 3, first=52),
    "HFDecoder": lambda: HFDecoder(
        {"model_type": "gpt_neox", "vocab_size": 53, "hidden_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 4, "intermediate_size": 31},
        max_len=29,
    ),
    "MLPProjector": lambda: MLPProjector(20, 12, 7, pixel_shuffle=2, input_norm=False, bias=False),
    "LinearProjector": lambda: LinearProjector(20, 12, pixel_shuffle=2, bias=False),
    "LinearConnector": lambda: LinearConnector(20, 12),
    "TransformerConnector": lambda: TransformerConnector(20, 12, 2, 3, dropout=0.1, token_dropout=0.2),
    "VisionEncoderDecoder": lambda: captioner(freeze_vision=True),
    "VisionEncoderDecoder with a frozen decoder": lambda: captioner(freeze_decoder=True),
    "PerceiverResampler": lambda: PerceiverResampler(
        20, 1, 3, 10, 5, mlp_dim=31, activation="relu", qk_norm="layer", max_frames=2, max_images=3, norm_eps=1e-3
    ),
    "Flamingo": lambda: Flamingo(
        ViT(**VISION), decoder(), connector=PerceiverResampler(20, 1, 3, 10, 5), cross_attn_every_n_layers=2,
        gated=GatedBlockConfig(
            3, 10, "rms", "swiglu", 31, "rms", 1e-3, per_channel=True, mlp_without_image=True, dropout=0.1),
        visible_images="all_previous", keep_prefix_tokens=False, freeze_vision=False,
        freeze_decoder=False,
    ),
    "Flamingo before chosen blocks": lambda: Flamingo(ViT(**VISION), decoder(), cross_layers=[1]),
    "QFormer": lambda: qformer(vocab_size=37, max_len=11),
    "Blip2QFormer": lambda: Blip2QFormer(
        ViT(**VISION), qformer(vocab_size=37), embed_dim=7, cls_token_id=36, freeze_vision=True, train_vision_norm=True,
        init_temperature=0.1,
    ),
    "Blip2": lambda: Blip2(
        ViT(**VISION), qformer(vocab_size=37), decoder(), instruct=True, freeze_vision=False, freeze_decoder=False
    ),
    "Blip2 with a norm that learns": lambda: Blip2(ViT(**VISION), qformer(), decoder(), train_vision_norm=True),
    "PrefixCaptioner": lambda: PrefixCaptioner(
        ViT((16, 32), 8, 20, 1, 4), decoder(), hidden_dim=13, pixel_shuffle=2, freeze_vision=False, freeze_decoder=False
    ),
    "Git": lambda: Git(
        ViT(**VISION), decoder(norm=NormConfig(pre=False, embed=True)), num_frames=3, freeze_vision=True,
        freeze_decoder=True,
    ),
    "BlipVQA": lambda: BlipVQA(
        ViT(**VISION), TextEncoder(53, 24, 2, 4, context_dim=20), decoder(context_dim=24), freeze_vision=True
    ),
    "BlipITM": lambda: BlipITM(ViT(**VISION), TextEncoder(53, 24, 2, 4, context_dim=20), embed_dim=7),
    "OpenCoCa": lambda: OpenCoCa(
        ViT(**VISION), 37, 24, 2, 1, 3, max_len=13, num_queries=5, pool_heads=2, activation="quick_gelu",
        norm_eps=1e-3, freeze_vision=True,
    ),
    "Llava": lambda: Llava(
        ViT(**vision({"depth": 3}), class_token=True), MLPProjector(40, 24), decoder(), 3,
        vision_feature_layers=(-2, -3), keep_prefix_tokens=True, freeze_vision=False, freeze_decoder=False,
    ),
    "Llava of tiles": lambda: Llava(
        ViT(**vision({"image_size": 16})), LinearProjector(20, 24), decoder(), 3, vision_feature_layers=None,
        tiles=TileConfig(((16, 32),), 9, single_only=True),
    ),
    "PaliGemma": lambda: PaliGemma(
        ViT(**VISION), decoder(), image_token_id=3, freeze_vision=False, freeze_decoder=True
    ),
    "CoCa": lambda: CoCa(
        ViT(**VISION), decoder(), decoder(context_dim=20, positions=PositionConfig("rotary")),
        num_queries=5, num_heads=4, embed_dim=7, caption_weight=1.5, contrastive_weight=0.5, freeze_vision=True,
    ),
    "TextEncoder": lambda: TextEncoder(
        53, 24, 2, 4, mlp_dim=31, max_len=17, num_types=3, activation="relu", norm_eps=1e-5, pooler=False,
        mlm_head=True, dropout=0.2,
    ),
    "TextEncoder that reads a context": lambda: TextEncoder(53, 24, 2, 4, context_dim=20),
    "TextEncoder that compares sentences": lambda: TextEncoder(53, 24, 2, 4, nsp_head=True),
    "Transformer": lambda: Transformer(
        53, 24, 2, 4, decoder_depth=1, mlp_dim=31, max_len=17, norm_first=True, activation="gelu", norm_eps=1e-3,
        tied=False, dropout=0.2,
    ),
    "HFSeq2Seq": lambda: HFSeq2Seq(
        {"model_type": "t5", "vocab_size": 53, "d_model": 24, "d_kv": 6, "d_ff": 31, "num_layers": 2,
         "num_heads": 4, "decoder_start_token_id": 0},
        max_len=29,
    ),
    "HFAutoencoder": autoencoder,
    "DiffusionTransformer": lambda: DiffusionTransformer(
        2, 4, 20, 1, 4, mlp_dim=31, out_channels=8, context_dim=7, num_classes=5, modulation="block", bottleneck_dim=6,
        base_grid=4, pooled_context=True, qk_norm="layer",
    ),
    "DiffusionTransformer between convolutions": lambda: DiffusionTransformer(
        4, 3, 20, 1, 4, context_dim=7, conv_width=2
    ),
    "TextToImageModel": lambda: TextToImageModel(
        TextEncoder(23, 20, 1, 4, max_len=17), DiffusionTransformer(2, 3, 20, 1, 4, context_dim=20),
        diffusion=DiffusionConfig(logit_mean=0.3), text_dropout_prob=0.2, freeze_text=True,
    ),
    "TextToImageModel on latents": lambda: TextToImageModel(
        TextEncoder(23, 20, 1, 4, max_len=17), DiffusionTransformer(2, 4, 20, 1, 4, context_dim=20),
        autoencoder=autoencoder(),
    ),
    "TextTower": lambda: TextTower(
        23, 20, 1, 4, max_len=17, mlp_dim=31, causal=False, pool="last", pad_id=1, add_bos_token=False,
        activation="gelu_tanh", norm_eps=1e-6, dropout=0.1,
    ),
    "TextEncoderTower": lambda: TextEncoderTower(TextEncoder(23, 20, 1, 4, max_len=17, pooler=False), embed_dim=9),
    "TextEncoderTower of a pooler": lambda: TextEncoderTower(TextEncoder(23, 20, 1, 4, max_len=17)),
    "CLIP": lambda: CLIP(
        ViT(**VISION), TextTower(23, 20, 1, 4, max_len=17), embed_dim=9, text_bias=True, pool_heads=4, loss="sigmoid",
        hardness=0.5, freeze_vision=True,
    ),
    "ConcatViT": lambda: ConcatViT(ViT(**VISION), ViT(**VISION), layers=(-1,), second_layers=(0, -1)),
    "VisionEncoderDecoder without connector": lambda: VisionEncoderDecoder(ViT(**VISION), decoder(context_dim=20)),
}  # fmt: skip


def public_models() -> list[type]:
    found = [getattr(mmtransformer, name) for name in mmtransformer.__all__]
    return [
        kind
        for kind in found
        if isinstance(kind, type) and issubclass(kind, Pretrained) and not inspect.isabstract(kind)
    ]


def test_every_public_model_is_tried_here() -> None:
    assert {kind.__name__ for kind in public_models()} == {name.split(" ")[0] for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_constructor_arguments_are_attributes_and_build_the_model_again(name: str) -> None:
    model = MODELS[name]()
    for argument in list(inspect.signature(type(model).__init__).parameters)[1:]:
        assert hasattr(model, argument), argument
    config = to_config(model)
    again = from_config(json.loads(json.dumps(config)))
    assert to_config(again) == config
    assert repr(again) == repr(model)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


@pytest.mark.parametrize("kind", public_models(), ids=lambda kind: kind.__name__)
def test_every_optional_argument_is_tried_here_with_another_value(kind: type) -> None:
    models = [make() for name, make in MODELS.items() if name.split(" ")[0] == kind.__name__]
    for argument in inspect.signature(kind.__init__).parameters.values():
        if argument.default is not inspect.Parameter.empty:
            values = [getattr(model, argument.name) for model in models]
            assert any(value != argument.default for value in values), argument.name


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "new" / "folder")
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]
    again = type(model).from_pretrained(tmp_path / "new" / "folder")
    assert not again.training
    ours, theirs = model.state_dict(), again.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]


def test_tied_weights_are_written_once_and_stay_tied(tmp_path: Path) -> None:
    model = captioner()
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    tied = {"decoder.lm_head.weight", "decoder.tok_embed.weight"}
    assert len(tied & set(written)) == 1
    again = VisionEncoderDecoder.from_pretrained(tmp_path)
    assert again.decoder.lm_head.weight is again.decoder.tok_embed.weight
    shared = written.pop((tied & set(written)).pop())
    for name in tied:  # Either name fills both.
        save_file(written | {name: shared}, tmp_path / "model.safetensors")
        rehash(tmp_path)
        again = VisionEncoderDecoder.from_pretrained(tmp_path)
        assert torch.equal(again.decoder.tok_embed.weight, model.decoder.tok_embed.weight)
    save_file(written | dict(zip(sorted(tied), (shared, shared.clone()))), tmp_path / "model.safetensors")
    rehash(tmp_path)
    VisionEncoderDecoder.from_pretrained(tmp_path)
    save_file(written | dict(zip(sorted(tied), (shared, shared + 1))), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"tied.*decoder\.lm_head\.weight and decoder\.tok_embed\.weight"):
        VisionEncoderDecoder.from_pretrained(tmp_path)


def test_captions_are_the_same_after_loading(tmp_path: Path) -> None:
    model = captioner().eval()
    model.save_pretrained(tmp_path)
    tokens = torch.randint(53, (2, 5))
    batch = mmtransformer.CaptionBatch(tokens, tokens >= 0, tokens >= 0, torch.randn(2, 1, 3, 16, 24))
    again = mmtransformer.Captioner.from_pretrained(tmp_path)  # The contract's class loads any bridge.
    assert isinstance(again, VisionEncoderDecoder)
    assert torch.equal(again.logits(batch), model.logits(batch))


def test_a_part_that_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    class Mine(ViT):
        pass

    model = VisionEncoderDecoder(Mine(**VISION), decoder(context_dim=20))
    with pytest.raises(ValueError, match=r"vision \(.*Mine\) cannot be saved: it is not found under this name again"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    model = captioner()
    model.connector = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match=r"connector \(torch.*Identity\) cannot be saved: only what is a .*Pretrained"):
        to_config(model)


def edit(folder: Path, change: Any) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    change(config)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update({"class": "GPT5"}), 'no model class "GPT5"'),
        (lambda c: c.update({"class": "generate"}), 'no model class "generate"'),
        (lambda c: c.update({"class": "Tokenizer"}), 'no model class "Tokenizer"'),
        (lambda c: c.update({"class": ["ViT"]}), "no model class"),
        (lambda c: c.update({"class": "Captioner", "args": {}}), "Captioner cannot be built"),
        (lambda c: c["args"].update({"detph": 3}), r"TextDecoder has no argument detph; it has .*depth"),
        (lambda c: c["args"].pop("vocab_size"), r"TextDecoder cannot be built.*vocab_size"),
        (lambda c: c["args"].update({"num_heads": 5}), r"cannot be built: .*\(24\).*\(5\)"),
        (lambda c: c["args"].update({"dim": "wide"}), "TextDecoder cannot be built"),
        (lambda c: c.pop("args"), "a model is described by"),
        (lambda c: c.update({"args": [1]}), "a model is described by"),
        (lambda c: c.update({"more": 1}), "a model is described by"),
        (lambda c: c.update({"model_type": "blip"}), r"of transformers \(blip\): docs/weights.md"),
    ],
)
def test_a_config_that_is_wrong_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    decoder().save_pretrained(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(ValueError, match=message) as caught:
        TextDecoder.from_pretrained(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_a_nested_fault_is_named(tmp_path: Path) -> None:
    for key, value, message in (
        ("patch", 3, "ViT has no argument patch"),
        ("patches", 3, r"ViT cannot be built: patches is 3, not .*ViTPatchConfig"),
        ("patches", {"stem": "wide"}, "patches: stem is 'wide'|stem must be .* not \"wide\""),
        ("patches", {"stems": "conv"}, r"patches: unknown keys \['stems'\]"),
        ("block", {"drop_path": "much"}, "block: drop_path is 'much'"),
    ):
        captioner().save_pretrained(tmp_path)
        edit(tmp_path, lambda c: c["args"]["vision"]["args"].update({key: value}))  # noqa: B023
        with pytest.raises(ValueError, match=message):
            VisionEncoderDecoder.from_pretrained(tmp_path)


def test_another_class_is_refused(tmp_path: Path) -> None:
    decoder().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path} holds a TextDecoder, not a ViT"):
        ViT.from_pretrained(tmp_path)
    captioner().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"holds a VisionEncoderDecoder, not a CLIP, a dual .*; it captions: `mmt caption`"
    ):
        CLIP.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a TextToImageModel, a model that draws; it captions"):
        ImageGenerator.from_pretrained(tmp_path)
    CLIP(ViT(16, 8, 24, 1, 4), TextTower(300, 20, 1, 2), embed_dim=13).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a CLIP, not a Captioner; it compares .*save_transformers"):
        mmtransformer.Captioner.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (lambda s: s.pop("blocks.0.mlp.fc1.bias"), ["missing: blocks.0.mlp.fc1.bias"]),
        (lambda s: s.update({"blocks.7.mlp.fc1.bias": torch.zeros(3)}), ["not in the model: blocks.7.mlp.fc1.bias"]),
        (lambda s: s.update({"last_norm.bias": torch.zeros(23)}), ["last_norm.bias is (23,)", "wants (24,)"]),
        (lambda s: s.update({"last_norm.bias": torch.zeros(1, 24)}), ["(1, 24)", "(24,)"]),
        (
            lambda s: [s.pop(k) for k in list(s) if k.startswith("blocks.1")],
            ["missing: blocks.1.norm1.weight", "and 11 more"],
        ),
        (
            lambda s: (s.pop("last_norm.weight"), s.update({"ln_f.weight": torch.zeros(24)})),
            ["missing: last_norm.weight", "not in the model: ln_f.weight"],
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, change: Any, messages: list[str]) -> None:
    decoder().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as caught:
        TextDecoder.from_pretrained(tmp_path)
    for message in [*messages, str(tmp_path / "model.safetensors"), "TextDecoder"]:
        assert message in str(caught.value)


def test_nothing_is_loaded_where_something_does_not_fit() -> None:
    model, before = decoder(), {k: v.clone() for k, v in decoder().state_dict().items()}
    model.load_state_dict(before)
    other = {k: v + 1 for k, v in before.items()} | {"more": torch.zeros(2)}
    with pytest.raises(ValueError, match="here does not fit"):
        load_strictly(model, other, "here")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_a_damaged_file_is_named(tmp_path: Path, kept: int) -> None:
    decoder().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    fault = "not a whole safetensors file" if kept else "an empty file"
    with pytest.raises(ValueError, match=rf"model\.safetensors: {fault}.* download it again"):
        TextDecoder.from_pretrained(tmp_path)


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    model = decoder()
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        TextDecoder.from_pretrained(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        TextDecoder.from_pretrained(tmp_path)
    decoder().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors: no such file"):
        TextDecoder.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json is a file, and a model is a folder: name "):
        TextDecoder.from_pretrained(tmp_path / "config.json")
    for name in (tmp_path / "none", "a/b/c"):
        with pytest.raises(ValueError, match="no such folder"):
            TextDecoder.from_pretrained(name)
    with pytest.raises(ValueError, match=r"someone/captioner: no such folder here, the hub is out of reach"):
        find_folder("someone/captioner")  # Tests reach no network.


def test_what_no_hub_can_have_is_only_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("runs/nope", "모델", "학습/모델", "a/b/c"):
        with pytest.raises(ValueError, match=f"^{name}: no such folder$"):
            find_folder(name)
    with pytest.raises(ValueError, match=r"^runs/lm_scenes/model: no such folder; .* fit --config lm_scenes` leaves"):
        find_folder("runs/lm_scenes/model")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "not a JSON file"), (b"\xff\xfe", "not a JSON file"), (b"[1]", "holds a list, not a JSON object")],
)
def test_files_that_are_not_json_objects_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        read_json(tmp_path / "config.json")


def test_weights_may_be_read_by_those_who_may_read_the_config(tmp_path: Path) -> None:
    decoder().save_pretrained(tmp_path)
    modes = {name: (tmp_path / name).stat().st_mode & 0o777 for name in ("config.json", "model.safetensors")}
    assert modes["model.safetensors"] == modes["config.json"]


# --- what could not be loaded is not saved; versions


@pytest.mark.parametrize("name", MODELS)
def test_what_a_model_would_be_again_takes_no_memory_and_no_random_numbers(name: str) -> None:
    config, before = to_config(MODELS[name]()), torch.get_rng_state()
    again = rebuilt(config)
    assert again is not None
    assert all(p.is_meta for p in again.parameters())
    assert torch.equal(torch.get_rng_state(), before)


def unreadable(kind: str) -> tuple[Any, str]:
    model = Blip2(ViT(**VISION), qformer(vocab_size=53, dim=24, num_heads=4), decoder(), instruct=True)
    if kind == "a tie of one's own":
        assert model.qformer.tok_embed is not None
        model.qformer.tok_embed.weight = model.decoder.tok_embed.weight
        return model, "tok_embed.weight"
    if kind == "one memory":
        assert model.qformer.tok_embed is not None
        model.qformer.tok_embed.weight.data = model.decoder.tok_embed.weight.data
        return model, "tok_embed.weight"
    if kind == "one memory, turned":
        query, key = (model.decoder.blocks[0].attn.get_submodule(f"{name}_proj") for name in "qk")
        key.weight = torch.nn.Parameter(query.get_parameter("weight").detach().T)
        return model, r"blocks\.0\.attn\..*_proj\.weight"
    if kind == "a block used twice":
        model.decoder.blocks[1] = model.decoder.blocks[0]
        return model, r"decoder\.blocks\.0\."
    if kind == "a tie undone":
        model.decoder.lm_head.weight = torch.nn.Parameter(model.decoder.lm_head.weight.clone())
        return model, r"lm_head\.weight, decoder\.tok_embed\.weight"
    if kind == "another layer":
        model.decoder.blocks[0].attn = LinearAttention(model.decoder.blocks[0].attn)
        return model, r"decoder\.blocks\.0\.attn\.directions"
    add_lora(model.decoder)
    return model, "lora_.*merge_lora"


KINDS = ["a tie of one's own", "one memory", "one memory, turned", "a block used twice", "a tie undone",
         "another layer", "lora"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_could_not_be_loaded_is_not_saved(kind: str, tmp_path: Path) -> None:
    model, message = unreadable(kind)
    with pytest.raises(ValueError, match=f"Blip2 is not saved.*{message}"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_parameters_that_are_parts_of_one_vector_are_saved_apart(tmp_path: Path) -> None:
    """As `vector_to_parameters` leaves them."""
    model = decoder()
    torch.nn.utils.vector_to_parameters(torch.randn(sum(p.numel() for p in model.parameters())), model.parameters())
    model.save_pretrained(tmp_path)
    again = TextDecoder.from_pretrained(tmp_path)
    assert all(torch.equal(*both) for both in zip(model.parameters(), again.parameters(), strict=True))
    size = sum(p.numel() for p in model.parameters()) * 4
    assert size < (tmp_path / "model.safetensors").stat().st_size < size + 10_000


def test_a_folder_has_a_version_and_room_for_other_uses(tmp_path: Path) -> None:
    model = decoder(attention=AttentionConfig(num_kv_heads=2))
    model.save_pretrained(tmp_path, metadata={"hash": "ab12"})
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert (config["format_version"], config["class"]) == (FORMAT_VERSION, "TextDecoder")
    assert config["args"]["attention"]["num_kv_heads"] == 2
    assert config["metadata"] == {"hash": "ab12"}
    again = TextDecoder.from_pretrained(tmp_path)
    assert again.attention == model.attention
    for version in (FORMAT_VERSION - 1, FORMAT_VERSION + 1, None):
        edit(tmp_path, lambda c: c.update({"format_version": version}))  # noqa: B023
        with pytest.raises(ValueError, match=f"config.json: format_version is {version}.*reads {FORMAT_VERSION}: "):
            TextDecoder.from_pretrained(tmp_path)


def test_a_folder_says_which_version_wrote_it_where_it_cannot_be_loaded(tmp_path: Path) -> None:
    key, here = "mmtransformer_version", mmtransformer.__version__
    decoder().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text("utf-8"))[key] == here
    edit(tmp_path, lambda c: c.update({key: "9.8"}))
    TextDecoder.from_pretrained(tmp_path)
    wrote = rf"; mmtransformer 9\.8 wrote it, and this is {re.escape(here)}$"
    edit(tmp_path, lambda c: c["args"].update(later=1))
    with pytest.raises(ValueError, match=f"TextDecoder has no argument later; it has .*{wrote}"):
        TextDecoder.from_pretrained(tmp_path)
    edit(tmp_path, lambda c: c.update({"class": "LaterDecoder"}))
    with pytest.raises(ValueError, match=f'mmtransformer has no model class "LaterDecoder"{wrote}'):
        TextDecoder.from_pretrained(tmp_path)
    edit(tmp_path, lambda c: c.update(format_version=FORMAT_VERSION + 1))
    with pytest.raises(ValueError, match=f"load it with the version that saved it{wrote}"):
        TextDecoder.from_pretrained(tmp_path)
    edit(tmp_path, lambda c: c.update({"format_version": FORMAT_VERSION, key: here}))
    for _ in range(2):  # written by this one; by one that wrote no version
        with pytest.raises(ValueError, match=r'has no model class "LaterDecoder"$'):
            TextDecoder.from_pretrained(tmp_path)
        edit(tmp_path, lambda c: c.pop(key, None))


def flip(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(bytes(data))


def test_any_flipped_bit_of_the_weights_is_found(tmp_path: Path) -> None:
    model = decoder()
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    draw = random.Random(5)
    for _ in range(40):
        flip(path, draw.randrange(start, len(whole)), draw.randrange(8))
        with pytest.raises(ValueError, match=r"model\.safetensors: (damaged|.* NaN)"):
            TextDecoder.from_pretrained(tmp_path)
        path.write_bytes(whole)
    TextDecoder.from_pretrained(tmp_path)


def test_the_check_sum_sees_bits_zeros_blocks_and_names() -> None:
    """Of tensors of several blocks and a rest, of any type."""
    torch.manual_seed(3)
    state = {"a": torch.randn(3, 4096, 5), "b": torch.randn(7, dtype=torch.bfloat16), "c": torch.randint(9, (11,))}
    known = {checksum(state)}
    assert checksum(dict(reversed(state.items()))) in known
    flat = state["a"].reshape(-1)
    for at in (0, 8191, 8192, 40_000, len(flat) - 1):  # a block is 8192 of them
        for changed in (-flat[at], torch.tensor(0.0), flat[at] * (1 + 2**-22)):
            other = flat.clone()
            other[at] = changed
            known.add(checksum(state | {"a": other.view(3, 4096, 5)}))
    moved = torch.cat([flat[8192:16384], flat[:8192], flat[16384:]]).view(3, 4096, 5)
    zeros = torch.cat([flat[:20_000], torch.zeros(1024), flat[21_024:]]).view(3, 4096, 5)
    known |= {checksum(state | {"a": other}) for other in (moved, zeros, state["a"].view(4096, 3, 5))}
    known |= {checksum({"a": state["b"], "b": state["a"], "c": state["c"]}), checksum({"a": state["a"]})}
    assert len(known) == 1 + 15 + 3 + 2


def test_weights_of_another_tool_are_refused_until_they_are_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decoder().save_pretrained(tmp_path, metadata={"a": 1})
    state = {name: tensor.half().float() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"by another tool: .* run: mmt rehash {tmp_path}"):
        TextDecoder.from_pretrained(tmp_path)
    assert main(["rehash", str(tmp_path)]) == 0
    assert "check sum" in capsys.readouterr().out
    again = TextDecoder.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], state[name]) for name in state)
    assert json.loads((tmp_path / "config.json").read_text())["metadata"] == {"a": 1}
    edit(tmp_path, lambda c: c.pop("weights_checksum"))  # as folders of before are
    flip(tmp_path / "model.safetensors", -1)
    TextDecoder.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no such"):
        rehash(tmp_path / "nowhere")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_that_are_nan_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    model = decoder().to(dtype)
    with torch.no_grad():
        model.last_norm.weight[2:4] = math.nan  # pyright: ignore[reportIndexIssue]
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.safetensors: last_norm\.weight has 2 numbers that are NaN, of 24"):
        TextDecoder.from_pretrained(tmp_path)
    large = {"a": torch.full((7,), 3e38), "b": torch.tensor([-math.inf])}  # its sum is infinite, and no NaN
    save_file(large, tmp_path / "other.safetensors")
    assert len(read_safetensors(tmp_path / "other.safetensors")) == 2


@pytest.mark.parametrize("name", ["HFDecoder", "HFSeq2Seq"])
def test_a_hub_models_mode_is_that_of_what_it_holds(name: str) -> None:
    model: Any = MODELS[name]()
    for mode in (False, True):
        model.model.train(mode)
        assert type(model).from_model(model.model, max_len=29).training is mode
