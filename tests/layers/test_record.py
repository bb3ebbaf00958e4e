"""record_attention: the right weights, beside a result that stays bit for bit the same."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmtransformer import Attention, AttentionConfig, PositionConfig, TextDecoder, ViT, record_attention


def decoder(**options: object) -> TextDecoder:
    torch.manual_seed(5)
    model = TextDecoder(31, 24, 2, 4, max_len=17, context_dim=19, **options)  # pyright: ignore[reportArgumentType]
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def softmax_weights(layer: Attention, x: Tensor, context: Tensor, allowed: Tensor) -> Tensor:
    """The definition, one head at a time in float64: (b h q k)."""
    x, context, layer = x.double(), context.double(), layer.double()
    q, k, width = layer.q_proj(x), layer.k_proj(context), layer.head_dim
    found = []
    for head in range(layer.num_heads):
        part = slice(head * width, (head + 1) * width)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / width**0.5
        found.append(scores.masked_fill(~allowed, -torch.inf).softmax(-1))
    return torch.stack(found, 1)


def test_weights_are_the_definition() -> None:
    model, tokens, context = decoder(), torch.randint(31, (3, 5)), torch.randn(3, 7, 19)
    asked: dict[str, Tensor] = {}
    for name in ("norm1", "norm_cross"):
        layer = model.blocks[1].get_submodule(name)
        layer.register_forward_hook(lambda _, __, out, name=name: asked.update({name: out}))
    with record_attention(model) as record:
        model(tokens, context)
    names = ["blocks.0.attn", "blocks.0.cross_attn", "blocks.1.attn", "blocks.1.cross_attn"]
    assert sorted(record) == names
    causal = torch.ones(5, 5).tril() > 0
    block: Any = model.blocks[1]
    want = softmax_weights(block.attn, asked["norm1"], asked["norm1"], causal)
    torch.testing.assert_close(record[names[2]].double(), want, atol=1e-6, rtol=1e-5)
    want = softmax_weights(block.cross_attn, asked["norm_cross"], context, torch.ones(5, 7) > 0)
    torch.testing.assert_close(record[names[3]].double(), want, atol=1e-6, rtol=1e-5)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_the_result_is_the_same_and_the_hooks_go() -> None:
    model, tokens, context = decoder(), torch.randint(31, (3, 5)), torch.randn(3, 7, 19)
    before = model(tokens, context)
    with record_attention(model) as record:
        assert hooks(model) == 4
        assert torch.equal(model(tokens, context), before)
    assert hooks(model) == 0
    assert all(not w.requires_grad and w.dtype == torch.float32 for w in record.values())
    kept = {name: w.clone() for name, w in record.items()}
    model(tokens.flip(0), context)
    assert all(torch.equal(record[name], w) for name, w in kept.items())
    with pytest.raises(RuntimeError, match="in the middle"), record_attention(model):
        raise RuntimeError("in the middle")
    assert hooks(model) == 0


def test_training_is_the_same() -> None:
    model, tokens, context = decoder(dropout=0.3).train(), torch.randint(31, (3, 5)), torch.randn(3, 7, 19)
    grads = []
    for recorded in (False, True):
        model.zero_grad()
        torch.manual_seed(1)
        if recorded:
            with record_attention(model):
                model(tokens, context).square().sum().backward()
        else:
            model(tokens, context).square().sum().backward()
        grads.append(model.get_parameter("blocks.0.attn.q_proj.weight").grad)
    assert grads[0] is not None
    assert torch.equal(*grads)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("padded", [False, True])
def test_decoding_with_a_cache_keeps_the_last_weights(positions: Any, padded: bool) -> None:
    model, tokens, context = (
        decoder(positions=PositionConfig(positions)),
        torch.randint(31, (3, 6)),
        torch.randn(3, 7, 19),
    )
    attention_mask = torch.ones(3, 6, dtype=torch.bool)
    attention_mask[1, :2] = not padded
    with record_attention(model) as full:
        model(tokens, context, attention_mask=attention_mask)
    results = []
    for recorded in (False, True):
        state = model.new_state()
        model(tokens[:, :4], context, attention_mask=attention_mask[:, :4], state=state)
        if not recorded:
            results += [model(tokens[:, i : i + 1], context, state=state) for i in (4, 5)]
            continue
        with record_attention(model) as last:
            results += [model(tokens[:, i : i + 1], context, state=state) for i in (4, 5)]
        assert state.length == 6  # Looking added nothing to the cache.
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])
    for name, weights in last.items():
        torch.testing.assert_close(weights, full[name][:, :, -1:], atol=1e-6, rtol=1e-5)


def test_layers_are_kept_by_part_of_the_name_or_function() -> None:
    model, tokens, context = decoder(), torch.randint(31, (3, 5)), torch.randn(3, 7, 19)
    with record_attention(model, keep="cross_attn") as record:
        model(tokens, context)
    assert list(record) == ["blocks.0.cross_attn", "blocks.1.cross_attn"]
    with record_attention(model, keep=lambda name: name.startswith("blocks.1.")) as record:
        model(tokens, context)
    assert list(record) == ["blocks.1.attn", "blocks.1.cross_attn"]
    with pytest.raises(ValueError, match="'crossattn' in its name"), record_attention(model, "crossattn"):
        pass


def test_rows_sum_to_one_and_grouped_heads_are_recorded_each() -> None:
    model = decoder(attention=AttentionConfig(num_kv_heads=2, qk_norm="rms"), positions=PositionConfig("rotary"))
    with record_attention(model) as record:
        model(torch.randint(31, (6, 5)), torch.randn(3, 7, 19))
    assert record["blocks.0.attn"].shape == (6, 4, 5, 5)
    assert record["blocks.0.cross_attn"].shape == (6, 4, 5, 7)
    for weights in record.values():
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_a_vit_is_recorded_with_its_pool() -> None:
    vit = ViT((16, 24), 8, 24, 2, 4, pool="attention").eval()
    with record_attention(vit) as record:
        vit(torch.randn(2, 3, 16, 24))
    assert record["blocks.1.attn"].shape == (2, 4, 7, 7)
    assert record["attn_pool.attn"].shape == (2, 4, 1, 6)  # the class token is not pooled
