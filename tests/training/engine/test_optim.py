"""AdamW, Muon and their schedules: what is decayed, at which rate each parameter moves, what is refused."""

import copy
import math
import re
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from timm.optim.nadamw import NAdamW
from torch import nn

from mmtransformer import Flamingo, PerceiverResampler, TextDecoder, VisionEncoderDecoder, ViT, ViTPatchConfig
from mmtransformer.batch import CaptionBatch
from mmtransformer.captioners.base import caption_loss
from mmtransformer.captioners.flamingo import GatedBlockConfig
from mmtransformer.layers.kernels import Bfloat16Hardware
from mmtransformer.layers.modes import freeze
from mmtransformer.training.engine import optim
from mmtransformer.training.engine.optim import OptimConfig, adamw, muon, warmup_cosine
from mmtransformer.training.engine.parameters import lr_scales


def noise(model: VisionEncoderDecoder) -> CaptionBatch:
    tokens = torch.randint(0, model.vocab_size, (6, 7))
    every = torch.ones_like(tokens, dtype=torch.bool)
    return CaptionBatch(tokens, every, every, pixels=torch.randn(3, 1, 3, 16, 16))


def test_vectors_are_not_decayed() -> None:
    module = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), freeze(nn.Linear(5, 2)))
    matrices, vectors = adamw(module, lr=0.1, weight_decay=0.3).param_groups
    assert matrices["weight_decay"] == 0.3
    assert [p.shape for p in matrices["params"]] == [(5, 3)]
    assert vectors["weight_decay"] == 0.0
    assert len(vectors["params"]) == 3
    with pytest.raises(ValueError, match="nothing to train"):
        adamw(freeze(module), lr=0.1)


def test_warmup_and_cosine() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = warmup_cosine(optimizer, warmup_steps=4, total_steps=10, min_lr_ratio=0.1)
    rates = []
    for _ in range(12):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert rates[7] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2))))
    assert rates[10:] == pytest.approx([0.2, 0.2])
    with pytest.raises(ValueError, match=r"min_lr_ratio \(1.5\)"):
        warmup_cosine(optimizer, warmup_steps=4, total_steps=10, min_lr_ratio=1.5)


def test_muon_takes_the_matrices_of_blocks_and_leaves_the_rest_to_nadamw() -> None:
    model = VisionEncoderDecoder(ViT(16, 8, 16, 1, 2), TextDecoder(31, 16, 1, 2, context_dim=16), freeze_vision=True)
    optimizer = muon(model, lr=0.01)
    # With plain momentum the scenes are learnt later.
    assert all(group["nesterov"] for group in optimizer.param_groups)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found[names[id(parameter)]] = (bool(group.get("use_fallback")), group["weight_decay"] > 0)
    assert found["decoder.blocks.0.attn.q_proj.weight"] == (False, True)
    assert found["decoder.tok_embed.weight"] == (True, True)
    assert found["decoder.blocks.0.norm1.weight"] == (True, False)
    assert len(found) == sum(p.requires_grad for p in model.parameters())
    before = model.decoder.blocks[0].attn.q_proj.weight.clone()
    caption_loss(model, noise(model)).backward()
    optimizer.step()
    change = (model.decoder.blocks[0].attn.q_proj.weight - before).double()
    values = torch.linalg.svdvals(change)  # An orthogonal update: all directions move alike.
    assert values.median() > 0.9 * values.max()
    with pytest.raises(ValueError, match="every parameter of the model is frozen"):
        muon(freeze(model), lr=0.01)


@pytest.mark.parametrize("kind", [adamw, muon])
def test_what_a_part_names_is_not_decayed(kind: Any) -> None:
    """`no_weight_decay()` of any module inside, in timm's protocol: positions, prefix tokens, latents."""
    vision = ViT(16, 8, 16, 1, 2, num_registers=3, pool="attention")
    resampler = PerceiverResampler(16, 1, 2, 8, 5, max_images=3)
    decoder = TextDecoder(31, 16, 1, 2)
    model = Flamingo(
        vision,
        decoder,
        connector=resampler,
        gated=GatedBlockConfig(num_heads=2),
        freeze_vision=False,
        freeze_decoder=False,
    )
    task = nn.ModuleDict({"captioner": model})  # as deep inside as in a run
    for whole in (model, task):
        groups = kind(whole, lr=0.1, weight_decay=0.3).param_groups
        spared = {p for group in groups if not group["weight_decay"] for p in group["params"]}
        named = [vision.pos_embed, vision.prefix_tokens, resampler.latents, resampler.image_embed]
        assert all(p.requires_grad and p in spared for p in named)
        learned = {p for p in whole.parameters() if p.requires_grad}
        assert {p for p in learned if p.ndim <= 1} <= spared
        assert decoder.tok_embed.weight not in spared
        assert sum(len(group["params"]) for group in groups) == len(learned)


@pytest.mark.parametrize("fast", [False, True])
def test_muon_multiplies_in_bfloat16_only_where_it_is_fast(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    """A step makes a matrix orthogonal to float32's eps or to bfloat16's; timm's own Muon stays what it was."""
    from timm.optim import muon as timm

    monkeypatch.setattr(optim, "bfloat16_hardware", lambda _: Bfloat16Hardware(fast, ""))
    torch.manual_seed(0)
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(48, 32, bias=False)])})
    (weight,) = model.parameters()
    start, grad = weight.detach().clone(), torch.randn(32, 48)
    optimizer = muon(model, lr=0.1, weight_decay=0)
    weight.grad = grad.clone()
    theirs = timm.zeropower_via_newtonschulz
    optimizer.step()
    assert timm.zeropower_via_newtonschulz is theirs
    coefficients = timm.resolve_ns_coefficients("quintic", timm._COEFFICIENTS)
    wanted = theirs(grad.double(), 5, coefficients, dtype=torch.float64).float()  # momentum only scales a first step
    moved = (start - weight.detach()) / (0.1 * 0.2 * 48**0.5)
    difference = (moved - wanted).abs().max().item()
    assert (1e-3 < difference < 5e-2) if fast else difference < 1e-4


def test_muons_rest_moves_as_nadamw_at_half_the_rate() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 3), nn.LayerNorm(3))
    other = copy.deepcopy(model)
    ours = muon(model, lr=0.02, weight_decay=0.3, betas=(0.8, 0.95))
    groups = [
        {"params": [other[0].weight], "weight_decay": 0.3},
        {"params": [*other[1].parameters()], "weight_decay": 0},
    ]
    theirs = NAdamW(groups, lr=0.01, betas=(0.8, 0.95))
    for _ in range(3):
        for optimizer, net in ((ours, model), (theirs, other)):
            net.zero_grad()
            net(torch.arange(7)).pow(3).sum().backward()
            optimizer.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_layer_decay_is_timms() -> None:
    """Each parameter of a ViT with a head learns at timm's rate, and decays as there."""
    import timm
    from timm.optim import param_groups_layer_decay

    sizes: Any = {"img_size": 16, "patch_size": 8, "embed_dim": 20, "depth": 3, "num_heads": 4, "num_classes": 7}
    for pre_norm in (False, True):
        theirs = timm.models.vision_transformer.VisionTransformer(**sizes, pre_norm=pre_norm)
        named = {id(p): name for name, p in theirs.named_parameters()}
        want = {
            named[id(p)]: (group["lr_scale"], group["weight_decay"])
            for group in param_groups_layer_decay(
                theirs, 0.3, layer_decay=0.7, no_weight_decay_list=theirs.no_weight_decay()
            )
            for p in group["params"]
        }
        ours = ViT(16, 8, 20, 3, 4, num_classes=7, patches=ViTPatchConfig(pre_norm=pre_norm, bias=not pre_norm))
        optimizer = OptimConfig(lr=0.01, weight_decay=0.3, layer_decay=0.7).build(ours)
        mine = {id(p): (g["lr"] / 0.01, g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
        seen = set()
        for name, parameter in ours.named_parameters():
            there = re.sub(r"attn\.[qkv]_proj", "attn.qkv", name).replace("attn.out_proj", "attn.proj")
            there = there.replace("prefix_tokens", "cls_token").replace("first_norm", "norm_pre")
            assert mine[id(parameter)] == pytest.approx(want[there]), name
            seen.add(there)
        assert seen == want.keys()
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == sorted(rates, reverse=True)


def test_parts_learn_at_rates_of_their_own() -> None:
    model = VisionEncoderDecoder(ViT(16, 8, 16, 2, 2), TextDecoder(31, 16, 2, 2, context_dim=16))
    scales = lr_scales(model, 0.5, {"vision": 0.1, "vision.norm": 0.2, "decoder": 3.0})
    assert scales["vision.norm.weight"] == 0.2
    assert scales["vision.blocks.1.attn.q_proj.weight"] == 0.1
    assert scales["vision.blocks.0.attn.q_proj.weight"] == pytest.approx(0.05)
    assert scales["vision.pos_embed"] == pytest.approx(0.025)
    assert scales["decoder.tok_embed.weight"] == pytest.approx(0.75)
    assert scales["decoder.last_norm.bias"] == 3.0
    freeze(model.vision)
    assert not any(name.startswith("vision") for name in lr_scales(model, 0.5))
    with pytest.raises(ValueError, match='nothing that learns is in a part called "vision"; there are decoder'):
        lr_scales(model, parts={"vision": 0.1})
    optimizer = OptimConfig(lr=0.01, kind="muon", lr_scales={"decoder.blocks": 0.5}).build(model)
    assert {group["lr"] for group in optimizer.param_groups} == {0.01, 0.005}
    schedule = OptimConfig(lr=0.01, warmup_steps=0, min_lr_ratio=0.1).schedule(optimizer, 1)
    optimizer.step()
    schedule.step()
    assert sorted({group["lr"] for group in optimizer.param_groups}) == pytest.approx([0.0005, 0.001])
    for options in ({"layer_decay": 0.0}, {"layer_decay": 1.5}, {"lr_scales": {"vision": -1.0}}):
        with pytest.raises(ValueError, match=r"optim.l(ayer_decay|r_scales)"):
            OptimConfig(**options)  # pyright: ignore[reportArgumentType]


def test_rates_of_towers_of_transformers() -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes: Any = {"hidden_size": 8, "intermediate_size": 9, "num_hidden_layers": 2, "num_attention_heads": 2}
    scales = lr_scales(nn.ModuleDict({"tower": CLIPVisionModel(CLIPVisionConfig(**sizes))}), 0.5)
    found = {name.partition("vision_model.")[2] or name.removeprefix("tower."): x for name, x in scales.items()}
    assert found["embeddings.patch_embedding.weight"] == 0.25
    assert found["encoder.layers.0.mlp.fc1.bias"] == 0.5
    assert found["encoder.layers.1.mlp.fc1.bias"] == found["post_layernorm.weight"] == 1.0


def test_a_choice_of_three_is_refused_by_its_names() -> None:
    @dataclass(frozen=True)
    class Three(OptimConfig):
        kind: Literal["adamw", "muon", "sgd"] = "adamw"  # pyright: ignore[reportIncompatibleVariableOverride]

    with pytest.raises(ValueError, match=r'optim\.kind must be "adamw" or "muon" or "sgd", not "adam"'):
        Three(kind="adam")  # type: ignore[arg-type]
