"""Weights of timm and transformers: their small random models against ours with the same weights, both ways."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from timm.layers import QuickGELU
from timm.layers.mlp import GluMlp, SwiGLU, SwiGLUPacked
from timm.layers.norm import RmsNorm
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from mmtransformer import (
    AttentionConfig,
    MLPConfig,
    NormConfig,
    TextDecoder,
    VisionEncoderDecoder,
    ViT,
    ViTBlockConfig,
    ViTPatchConfig,
)
from mmtransformer.weights import ViTSettings, from_timm, from_transformers, load_vit, save_timm, to_timm
from mmtransformer.weights.text.gpt2 import decoder_to_gpt2
from mmtransformer.weights.vision.timm import timm_config, vit_from_state

BASE: dict[str, Any] = {
    "img_size": 24, "patch_size": 8, "embed_dim": 20, "depth": 2, "num_heads": 4, "mlp_ratio": 1.5, "num_classes": 0,
}  # fmt: skip
VITS: dict[str, dict[str, Any]] = {
    "vit with head": {"num_classes": 7},
    "deit, not square": {"img_size": (16, 40), "num_classes": 7},
    "dinov2": {"init_values": 1e-5, "patch_size": 6},
    "dinov2 registers": {"init_values": 1e-5, "reg_tokens": 3, "no_embed_class": True},
    "registers with positions": {"reg_tokens": 3},
    "registers, no class": {
        "reg_tokens": 2,
        "class_token": False,
        "no_embed_class": True,
        "global_pool": "avg",
        "fc_norm": False,
    },
    "siglip": {"class_token": False, "global_pool": "map", "act_layer": "gelu_tanh"},
    "clip": {"pre_norm": True, "act_layer": QuickGELU, "norm_layer": partial(nn.LayerNorm, eps=1e-5)},
    "mean of patches": {"global_pool": "avg", "fc_norm": False, "num_classes": 7},
    "mean of patches, then a norm": {"global_pool": "avg", "num_classes": 7},
    "class token, then a norm": {"fc_norm": True, "num_classes": 7},
    "no last norm": {"final_norm": False},
    "attention to patches beside prefix tokens": {"global_pool": "map", "reg_tokens": 4, "num_classes": 7},
    "attention to patches beside registers": {
        "global_pool": "map",
        "class_token": False,
        "reg_tokens": 3,
        "no_embed_class": True,
    },
    "attention to all tokens": {
        "global_pool": "map",
        "class_token": False,
        "reg_tokens": 1,
        "num_classes": 7,
        "pool_include_prefix": True,
    },
    "one channel": {"in_chans": 1},
    "no bias of queries, keys and values": {"qkv_bias": False},
    "no biases at all": {"qkv_bias": False, "proj_bias": False},
    "query and key norms": {"qk_norm": True},
    "beit 3": {"scale_attn_norm": True, "scale_mlp_norm": True, "norm_layer": partial(nn.LayerNorm, eps=1e-5)},
    "dinov2 giant": {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 3.1, "init_values": 1e-5},
    "aimv2": {
        "mlp_layer": SwiGLU,
        "act_layer": nn.SiLU,
        "norm_layer": partial(RmsNorm, eps=1e-5),
        "qkv_bias": False,
        "embed_norm_layer": partial(RmsNorm, eps=1e-5),
        "proj_bias": False,
        "class_token": False,
        "global_pool": "avg",
        "fc_norm": False,
    },
}
OTHER_BLOCKS: dict[str, dict[str, Any]] = {
    "norms behind": {"block_fn": ResPostBlock, "init_values": 0.3},
    "parallel": {"block_fn": ParallelScalingBlock, "init_values": 0.3, "qk_norm": True, "num_classes": 7},
    "parallel, no bias of queries": {"block_fn": ParallelScalingBlock, "qkv_bias": False, "reg_tokens": 2},
}  # fmt: skip


def shake(module: nn.Module) -> Any:
    for parameter in module.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return module.eval()


def timm_vit(**options: Any) -> Any:
    return shake(VisionTransformer(**BASE | options))


def close(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


def settings_of(vit: ViT) -> ViTSettings:
    order = "res_post" if vit.block.order == "res_post" else "pre"
    return ViTSettings(
        vit.num_heads, vit.grid_size, vit.block.activation, vit.block.norm_eps, vit.pool, order, vit.output.pool_prefix
    )


@pytest.mark.parametrize("classes", [0, 7])
def test_a_distilled_tower_equals_timm(classes: int) -> None:
    theirs = shake(VisionTransformerDistilled(**BASE | {"num_classes": classes}))
    ours, pixels = from_timm(theirs), torch.randn(3, 3, 24, 24)
    features = theirs.forward_features(pixels)
    close(ours.forward_features(pixels), features)
    close(ours(pixels), theirs(pixels))
    close(ours.forward_head(features, True), theirs.forward_head(features, True))
    with pytest.raises(ValueError, match="nothing like pool='distilled'"):
        to_timm(ours)


@pytest.mark.parametrize("name", OTHER_BLOCKS)
def test_other_blocks_equal_timm(name: str) -> None:
    theirs = timm_vit(**OTHER_BLOCKS[name])
    ours, pixels = from_timm(theirs), torch.randn(3, 3, 24, 24)
    close(ours.forward_features(pixels), theirs.forward_features(pixels))
    close(ours(pixels), theirs(pixels))
    ours(pixels).square().sum().backward()
    still = [n for n, p in ours.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert all("k_proj.bias" in name for name in still), still  # A bias of keys shifts all scores alike.
    with pytest.raises(ValueError, match="timm has names for ViTs of the kinds"):
        timm_config(ours)


@pytest.mark.parametrize("name", VITS)
def test_vit_equals_timm_both_ways(name: str) -> None:
    theirs = timm_vit(**VITS[name])
    ours = from_timm(theirs)
    assert not ours.training
    pixels = torch.randn(3, theirs.patch_embed.proj.in_channels, *theirs.patch_embed.img_size)
    close(ours.forward_features(pixels), theirs.forward_features(pixels))
    close(ours(pixels), theirs(pixels))
    tokens = {"norm": True, "output_fmt": "NLC", "return_prefix_tokens": True}
    for wanted, given in ((None, {}), (2, tokens), ([-1, 0], {}), ([-1, 0], tokens)):
        close(
            ours.forward_intermediates(pixels, wanted, **given), theirs.forward_intermediates(pixels, wanted, **given)
        )
    early = {"stop_early": True, "intermediates_only": True}
    close(ours.forward_intermediates(pixels, [0], **early), theirs.forward_intermediates(pixels, [0], **early))
    for given in ({}, {"reshape": True, "return_prefix_tokens": True, "norm": True}):
        close(ours.get_intermediate_layers(pixels, 2, **given), theirs.get_intermediate_layers(pixels, 2, **given))
    assert (ours.embed_dim, ours.num_features) == (theirs.embed_dim, theirs.num_features)
    state = to_timm(ours)
    back = VisionTransformer(**BASE | VITS[name])
    if VITS[name].get("no_embed_class"):  # There, positions are of patches only.
        state["pos_embed"] = state["pos_embed"][:, ours.num_prefix_tokens :]
    back.load_state_dict(state)
    close(back.eval()(pixels), theirs(pixels))
    again = vit_from_state(to_timm(ours), settings_of(ours))
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), ours.state_dict().values(), strict=True))


@pytest.mark.parametrize("size", [(40, 16), (16, 16), (56, 64)])
@pytest.mark.parametrize("name", ["deit, not square", "registers with positions", "siglip"])
def test_other_sizes_at_run_time_equal_timm(name: str, size: tuple[int, int]) -> None:
    theirs = timm_vit(**VITS[name], dynamic_img_size=True)
    ours, pixels = from_timm(theirs), torch.randn(2, 3, *size)
    close(ours.forward_features(pixels), theirs.forward_features(pixels))


def test_parameters_count_as_in_timm() -> None:
    theirs = timm_vit(num_classes=7, reg_tokens=3, no_embed_class=True)
    count = lambda model: sum(p.numel() for p in model.parameters())  # noqa: E731
    assert count(from_timm(theirs)) == count(theirs)
    with_positions = timm_vit(num_classes=7)  # Its class token's position is added in.
    assert count(from_timm(with_positions)) == count(with_positions) - 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_pool": "max", "fc_norm": False}, 'global_pool="max"'),
        ({"global_pool": "avg", "fc_norm": False, "pool_include_prefix": True}, "prefix tokens: True"),
        ({"act_layer": nn.Tanh}, "timm's Tanh"),
        ({"mlp_layer": GluMlp, "act_layer": "silu"}, "no gated MLP like timm's SiLU"),
        ({"mlp_layer": SwiGLUPacked, "act_layer": "gelu"}, "no gated MLP like timm's GELU"),
        ({"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "global_pool": "map"}, "pools with an MLP"),
        ({"block_fn": ParallelThingsBlock}, "blocks with ParallelThingsBlock: ViT knows Block"),
        ({"attn_layer": "diff"}, "blocks with DiffAttention: ViT knows Attention"),
        ({"patch_size": (8, 12)}, r"patches of 8 x 12 px"),
    ],
    ids=str,
)
def test_a_timm_model_that_does_not_fit_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_timm(timm_vit(**options))


def test_no_vit_at_all() -> None:
    with pytest.raises(ValueError, match="Linear is not a VisionTransformer, Eva or NaFlexVit"):
        from_timm(nn.Linear(2, 3))
    state, settings = timm_vit().state_dict(), settings_of(from_timm(timm_vit()))
    for name in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc2.weight"):
        with pytest.raises(ValueError, match=f'my file has no tensor "{name}"'):
            vit_from_state({k: v for k, v in state.items() if k != name}, settings, "my file")


@pytest.mark.parametrize(
    ("places", "grid", "options"),
    [
        (16, (3, 5), {}),  # with a class token; a square of 4 without one
        (9, (2, 2), {"reg_tokens": 4}),  # with five prefix tokens; a square of 3 without them
        (225, (14, 16), {}),
    ],
)
def test_positions_are_read_as_the_grid_that_was_said(
    places: int, grid: tuple[int, int], options: dict[str, Any]
) -> None:
    theirs = timm_vit(img_size=(8 * grid[0], 8 * grid[1]), **options)
    assert theirs.pos_embed.shape[1] == places
    settings = ViTSettings(4, grid, "gelu", 1e-6, "class")
    pixels = torch.randn(2, 3, 8 * grid[0], 8 * grid[1])
    close(vit_from_state(theirs.state_dict(), settings)(pixels), theirs(pixels))
    side = math.isqrt(places)
    square = replace(settings, grid=(side, side) if side**2 != places else (side + 1, side + 1))
    with pytest.raises(ValueError, match=rf"{places} positions are not those of a grid of"):
        vit_from_state(theirs.state_dict(), square)


def test_a_convolutional_stem_is_not_timms() -> None:
    with pytest.raises(ValueError, match='stem="conv"'):
        to_timm(ViT(16, 8, 20, 1, 4, patches=ViTPatchConfig(stem="conv")))


def test_settings_of_a_bare_file_are_of_their_class(tmp_path: Path) -> None:
    save_file(timm_vit().state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(TypeError, match=r"settings are a mmtransformer.weights.ViTSettings\(num_heads, .*not a dict"):
        load_vit(tmp_path / "model.safetensors", settings={"num_heads": 3})  # type: ignore[arg-type]


# --- load_vit: a folder of ours, a folder or a file with timm's names, a timm name


def write(folder: Path, config: dict[str, Any], state: dict[str, Tensor]) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(state, folder / "model.safetensors")
    return str(folder)


def test_load_vit_from_our_folder(tmp_path: Path) -> None:
    vit = shake(ViT((16, 24), 8, 20, 2, 4, num_classes=7, num_registers=2))
    assert isinstance(vit, ViT)
    vit.save_pretrained(tmp_path / "vit")
    pixels = torch.randn(2, 3, 16, 24)
    kept = load_vit(str(tmp_path / "vit"), keep_head=True)
    assert torch.equal(kept(pixels), vit(pixels))
    bare = load_vit(str(tmp_path / "vit"))
    assert bare.num_classes == 0
    assert torch.equal(bare(pixels), vit.forward_features(pixels)[:, 0])
    assert not any(name.startswith("head") for name in bare.state_dict())
    bare.save_pretrained(tmp_path / "bare")  # What was loaded can be saved.
    assert torch.equal(ViT.from_pretrained(tmp_path / "bare")(pixels), bare(pixels))


def test_load_vit_from_timms_names(tmp_path: Path) -> None:
    """A file alone does not say how many heads there are, nor which activation, epsilon and grid."""
    theirs, pixels = timm_vit(num_classes=7, act_layer=QuickGELU), torch.randn(2, 3, 24, 24)
    for norm in (theirs.norm, *(norm for block in theirs.blocks for norm in (block.norm1, block.norm2))):
        norm.eps = 1e-3
    path = tmp_path / "vit.safetensors"
    save_file(theirs.state_dict(), path)
    settings = ViTSettings(4, (3, 3), "quick_gelu", 1e-3, "class")
    close(load_vit(path, settings=settings, keep_head=True)(pixels), theirs(pixels))
    close(load_vit(path, settings=settings)(pixels), theirs.forward_features(pixels)[:, 0])
    with pytest.raises(ValueError, match=r"vit\.safetensors: tensors do not say how many heads .* give settings"):
        load_vit(path)
    with pytest.raises(ValueError, match="is no file: a folder and a name say by themselves"):
        load_vit(tmp_path, settings=settings)
    write(tmp_path / "plain", {"num_heads": 4}, theirs.state_dict())
    with pytest.raises(ValueError, match=r'config\.json has neither "class" .* nor "architecture"'):
        load_vit(tmp_path / "plain")


def test_load_vit_from_a_folder_of_timms(tmp_path: Path) -> None:
    """There the architecture says what the tensors' shapes do not: heads, activation, epsilon, pooling."""
    import timm

    args: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 16,
        "depth": 1,
        "embed_dim": 20,
        "num_heads": 5,
        "mlp_ratio": 1,
    }
    for name, classes in (("vit_base_patch16_siglip_224", 0), ("vit_base_patch32_clip_quickgelu_224", 7)):
        theirs = shake(timm.create_model(name, num_classes=classes, **args))
        config = {"architecture": name, "pretrained_cfg": {}, "model_args": args}
        folder = write(tmp_path / name, config, theirs.state_dict())
        pixels = torch.randn(2, 3, 32, 32)
        close(load_vit(folder, keep_head=True)(pixels), theirs(pixels))
    config = {"architecture": "vit_my_own", "pretrained_cfg": {}}
    with pytest.raises(ValueError, match='timm has no model "vit_my_own"'):
        load_vit(write(tmp_path / "unknown", config, theirs.state_dict()))


@pytest.mark.parametrize("name", [name for name in VITS if name != "deit, not square"])
def test_a_folder_that_timm_reads(name: str, tmp_path: Path) -> None:
    import timm

    theirs = timm_vit(**VITS[name])
    ours = from_timm(theirs)
    save_timm(ours, tmp_path)
    again = load_vit(tmp_path, keep_head=True)
    pixels = torch.randn(2, ours.patches.in_channels, *ours.image_size)
    assert torch.equal(again(pixels), ours(pixels))
    back = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    close(back(pixels), theirs(pixels))


def test_towers_that_timms_arguments_cannot_say_are_not_written(tmp_path: Path) -> None:
    for patches, block, message in (
        (ViTPatchConfig(pre_norm=True), ViTBlockConfig(), "where there is no norm before"),
        (ViTPatchConfig(), ViTBlockConfig(norm_eps=1e-12), r"this has \('layer', 1e-12, False\)"),
        (ViTPatchConfig(), ViTBlockConfig(order="res_post"), "order res_post"),
        (ViTPatchConfig(embed_norm=True), ViTBlockConfig(), "this has embed_norm True"),
        (ViTPatchConfig(), ViTBlockConfig(activation="relu"), "not built with relu"),
    ):
        with pytest.raises(ValueError, match=message):
            save_timm(ViT(16, 8, 20, 1, 4, patches=patches, block=block), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_load_vit_resizes_and_freezes(tmp_path: Path) -> None:
    theirs, pixels = timm_vit(), torch.randn(2, 3, 40, 16)
    folder = tmp_path / "vit"
    save_timm(from_timm(theirs), folder)
    vit = load_vit(folder, image_size=(40, 16), freeze=True)
    assert vit.image_size == (40, 16)
    assert not any(p.requires_grad for p in vit.parameters())
    assert torch.equal(vit(pixels), load_vit(folder)(pixels))


def test_load_vit_names_what_is_wrong(tmp_path: Path) -> None:
    faults = {
        "vit_tiny_patch16_225": r'"vit_tiny_patch16_225".*vit',
        "no/such/folder": "no/such/folder: no such folder",
        str(tmp_path / "vit.safetensors"): r"vit\.safetensors: no such file",
        str(tmp_path): r"config\.json: no such file",
    }
    for source, message in faults.items():
        with pytest.raises(ValueError, match=message):
            load_vit(source)
    save_file({"conv1.weight": torch.zeros(2, 3)}, tmp_path / "resnet.safetensors")
    with pytest.raises(ValueError, match=r'resnet\.safetensors has no tensor "patch_embed\.proj\.weight"'):
        load_vit(tmp_path / "resnet.safetensors", settings=settings_of(from_timm(timm_vit())))
    TextDecoder(53, 24, 1, 4).save_pretrained(tmp_path / "decoder")
    with pytest.raises(ValueError, match="decoder holds a TextDecoder, neither a ViT nor a captioner"):
        load_vit(str(tmp_path / "decoder"))


# --- GPT-2


def gpt2(**options: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    small: dict[str, Any] = {
        "vocab_size": 53, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 29, "n_inner": 37,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    return shake(GPT2LMHeadModel(GPT2Config(**small | options)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_inner": None, "activation_function": "relu", "layer_norm_epsilon": 1e-3},
        {"add_cross_attention": True},
        {"tie_word_embeddings": False},
    ],
    ids=str,
)
def test_decoder_equals_gpt2_both_ways(options: dict[str, Any]) -> None:
    theirs = gpt2(**options)
    ours = from_transformers(theirs)
    assert not ours.training
    tokens = torch.randint(53, (4, 11))
    cross = bool(options.get("add_cross_attention"))
    context = torch.randn(4, 7, 24) if cross else None
    given = {"encoder_hidden_states": context} if cross else {}
    close(ours.head(ours(tokens, context)), theirs(tokens, **given).logits)
    for side in ("left", "right"):
        attention_mask = torch.ones_like(tokens, dtype=torch.bool)
        for row, count in enumerate((0, 3, 1, 8)):
            attention_mask[row, slice(0, count) if side == "left" else slice(11 - count, 11)] = False
        positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        want = theirs(tokens, attention_mask=attention_mask.long(), position_ids=positions, **given).logits
        close(ours.head(ours(tokens, context, attention_mask=attention_mask))[attention_mask], want[attention_mask])
    other = gpt2(**options)
    missing, unexpected = other.load_state_dict(decoder_to_gpt2(ours), strict=False)
    assert not missing
    assert not unexpected
    close(other(tokens, **given).logits, theirs(tokens, **given).logits)
    again = from_transformers(other)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), ours.state_dict().values(), strict=True))


def test_gpt2_without_its_head() -> None:
    theirs = gpt2()
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            from_transformers(theirs.transformer).state_dict().values(),
            from_transformers(theirs).state_dict().values(),
            strict=True,
        )
    )


def test_language_models_that_do_not_fit_are_refused_by_name() -> None:
    from transformers import GPTNeoXConfig, GPTNeoXModel

    for options, message in (
        ({"activation_function": "tanh"}, "no activation like tanh"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scales attention by layer"),
        ({"scale_attn_weights": False}, "scales attention by layer, or not at all"),
    ):
        with pytest.raises(ValueError, match=message):
            from_transformers(gpt2(**options))
    neox = GPTNeoXModel(GPTNeoXConfig(vocab_size=53, hidden_size=24, intermediate_size=37, num_hidden_layers=1,
                                      num_attention_heads=4, max_position_embeddings=29))  # fmt: skip
    with pytest.raises(ValueError, match=r'GPTNeoXModel .*"gpt_neox", and known are .*gpt2, opt, llama.*HFDecoder'):
        from_transformers(neox)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": NormConfig("rms")}, "rms"),
        ({"mlp": MLPConfig("swiglu")}, "swiglu"),
        ({"attention": AttentionConfig(num_kv_heads=2)}, "num_kv_heads=2"),
        ({"attention": AttentionConfig(head_dim=5)}, "head_dim=5"),
        ({"context_dim": 19}, "context_dim 19"),
        ({"context_dim": 24, "cross_attn_every_n_layers": 2}, "every 2"),
    ],
    ids=str,
)
def test_only_decoders_of_gpt2s_kind_are_written_as_gpt2(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoder_to_gpt2(TextDecoder(53, 24, 2, 4, max_len=29, **options))


def test_the_tower_of_a_saved_captioner(tmp_path: Path) -> None:
    torch.manual_seed(5)
    vision = ViT(16, 8, 20, 1, 4)
    VisionEncoderDecoder(vision, TextDecoder(31, 20, 1, 4, context_dim=20)).save_pretrained(tmp_path)
    found = load_vit(str(tmp_path), freeze=True)
    pixels = torch.randn(2, 3, 16, 16)
    assert torch.equal(found.forward_features(pixels), vision.eval().forward_features(pixels))
    assert not any(p.requires_grad for p in found.parameters())
