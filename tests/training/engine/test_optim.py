"""AdamW, Muon and their schedules: what is decayed, at which rate each parameter moves, what is refused."""

import copy
import math
from typing import Any

import pytest
import torch
from timm.optim.nadamw import NAdamW
from torch import nn

from mmtransformer import EncoderDecoder, Flamingo, PerceiverResampler, TextDecoder, ViT
from mmtransformer.captioners.base import CaptionBatch, caption_loss, freeze
from mmtransformer.captioners.flamingo import GatedConfig
from mmtransformer.training.engine.optim import adamw, muon, warmup_cosine


def noise(model: EncoderDecoder) -> CaptionBatch:
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
    model = EncoderDecoder(ViT(16, 8, 16, 1, 2), TextDecoder(31, 16, 1, 2, cross_dim=16), freeze_vision=True)
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
        vision, decoder, resampler=resampler, gated=GatedConfig(num_heads=2), freeze_vision=False, freeze_decoder=False
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
