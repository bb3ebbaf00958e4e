"""QFormer by its definition in float64, by its masks, and by what its passes share."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from mmtransformer import QFormer, record_attention
from mmtransformer.connectors.qformer_block import Mode, mode_mask
from mmtransformer.layers import attention, masks
from mmtransformer.layers.attention import Attention

L, DIM, DEPTH, HEADS, VISUAL, VOCAB = 3, 20, 5, 4, 14, 23
MODES: list[Mode] = ["bidirectional", "multimodal_causal", "unimodal"]


def qformer(dtype: torch.dtype = torch.float32, dropout: float = 0.0, cross_attention_frequency: int = 2) -> QFormer:
    torch.manual_seed(2)
    model = QFormer(
        L, DIM, DEPTH, HEADS, VISUAL, cross_attention_frequency=cross_attention_frequency,
        mlp_dim=31, vocab_size=VOCAB, max_len=11, dropout=dropout,
    )  # fmt: skip
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def inputs(rows: int = 4, images: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    attention_mask = torch.arange(7) < torch.tensor([7, 5, 1, 6])[torch.arange(rows) % 4, None]
    return torch.randn(images, 13, VISUAL, dtype=dtype), torch.randint(VOCAB, (rows, 7)), attention_mask


def attended(x: Tensor, context: Tensor, layer: Attention, allowed: Tensor | None) -> Tensor:
    """Multi-head attention of one row, head by head: (q d), (k d') -> (q d)."""
    q, k, v = layer.q_proj(x), layer.k_proj(context), layer.v_proj(context)
    out = []
    for head in range(HEADS):
        part = slice(head * DIM // HEADS, (head + 1) * DIM // HEADS)
        scores = q[:, part] @ k[:, part].T / math.sqrt(DIM / HEADS)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -math.inf)
        out.append(scores.softmax(-1) @ v[:, part])
    return layer.out_proj(torch.cat(out, -1))


def by_definition(model: QFormer, visual: Tensor, tokens: Tensor | None, allowed: Tensor | None) -> Tensor:
    """One row: [queries; text] through every block, the text past cross-attention and through its own MLP."""

    def normed(x: Tensor, norm: torch.nn.Module) -> Tensor:
        return layer_norm(x, (DIM,), norm.weight, norm.bias, 1e-12)

    x = model.query_tokens[0]
    if tokens is not None:
        x = torch.cat((x, model.tok_embed.weight[tokens] + model.pos_embed.weight[: len(tokens)]))
    x = normed(x, model.norm)
    for i, block in enumerate(model.blocks):
        x = normed(x + attended(x, x, block.attn, allowed), block.norm1)
        queries, text = x[:L], x[L:]
        if i % model.cross_attention_frequency == 0:
            seen = attended(queries, visual, block.cross_attn, None)
            queries = normed(queries + seen, block.norm_cross)
        hidden = block.query_mlp.fc2(gelu(block.query_mlp.fc1(queries)))
        queries = normed(queries + hidden, block.query_norm)
        text = normed(text + block.mlp.fc2(gelu(block.mlp.fc1(text))), block.norm2)
        x = torch.cat((queries, text))
    return x


@pytest.mark.parametrize("cross_attention_frequency", [1, 2, 3])
def test_queries_alone_are_the_definition(cross_attention_frequency: int) -> None:
    model, (visual, _, _) = (
        qformer(torch.float64, cross_attention_frequency=cross_attention_frequency),
        inputs(dtype=torch.float64),
    )
    queries = model(visual)
    assert queries.shape == (2, L, DIM)
    assert model.cross_layers == list(range(0, DEPTH, cross_attention_frequency))
    for row in range(2):
        torch.testing.assert_close(queries[row], by_definition(model, visual[row], None, None))
    assert (queries - queries.mean(1, keepdim=True)).abs().max() > 0.1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padded", [False, True])
def test_each_mode_is_one_pass_under_its_mask(mode: Mode, padded: bool) -> None:
    model, (visual, tokens, attention_mask) = qformer(torch.float64), inputs(dtype=torch.float64)
    attention_mask = attention_mask if padded else torch.ones_like(attention_mask)
    queries, text = model.encode_pair(visual, tokens, attention_mask if padded else None, mode)
    assert queries.shape == (4, L, DIM)
    assert text.shape == (4, 7, DIM)
    allowed = mode_mask(mode, L, attention_mask)
    for row in range(4):
        want = by_definition(model, visual[row // 2], tokens[row], allowed[row])
        torch.testing.assert_close(queries[row], want[:L])
        torch.testing.assert_close(text[row][attention_mask[row]], want[L:][attention_mask[row]])


def test_an_instruction_joins_the_queries() -> None:
    model, (visual, tokens, attention_mask) = qformer(), inputs()
    queries = model(visual, tokens, attention_mask)
    torch.testing.assert_close(queries, model.encode_pair(visual, tokens, attention_mask)[0], atol=1e-5, rtol=1e-5)
    assert (queries - model(visual).repeat_interleave(2, 0)).abs().amax((1, 2)).min() > 1e-3
    torch.testing.assert_close(model(visual, tokens), model.encode_pair(visual, tokens)[0], atol=1e-5, rtol=1e-5)


def test_the_masks_in_print() -> None:
    attention_mask = torch.tensor([[True, True, False]])
    want = {
        "bidirectional": ["####.", "####.", "####.", "####.", "####."],
        "multimodal_causal": ["##...", "##...", "###..", "####.", "####."],
        "unimodal": ["##...", "##...", "..##.", "..##.", "..##."],
    }
    for mode in MODES:
        printed = masks.show(mode_mask(mode, 2, attention_mask)[0], rows=["q", "q", "a", "b", "-"])
        assert [line.split()[1] for line in printed.splitlines()] == want[mode]


def test_the_passes_of_training_are_the_modes() -> None:
    model, (visual, tokens, attention_mask) = qformer(), inputs()
    projected = model.project_visual(visual)
    assert len(projected) == 3
    seen = model.encode_queries(projected)
    assert len(seen.memory) == DEPTH
    for mode, text in (
        ("multimodal_causal", model.encode_text(tokens, attention_mask, seen)),
        ("unimodal", model.encode_text(tokens, attention_mask)),
    ):
        queries, want = model.encode_pair(visual, tokens, attention_mask, mode)
        torch.testing.assert_close(text[attention_mask], want[attention_mask], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(seen.queries.repeat_interleave(2, 0), queries, atol=1e-5, rtol=1e-5)
    together = model.encode_pair(projected, tokens, attention_mask)
    torch.testing.assert_close(together, model.encode_pair(visual, tokens, attention_mask), atol=0, rtol=0)


def test_images_are_projected_once_for_all_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (visual, tokens, attention_mask) = qformer(), inputs()
    calls = []
    project = Attention.project_kv

    def counted(self: Attention, context: Tensor) -> attention.KeyValue:
        calls.append(context.shape[1])
        return project(self, context)

    monkeypatch.setattr(Attention, "project_kv", counted)
    seen = model.encode_queries(projected := model.project_visual(visual))
    model.encode_text(tokens, attention_mask, seen)
    model.encode_pair(projected, tokens, attention_mask)
    assert calls.count(13) == 3
    calls.clear()
    model.encode_pair(visual, tokens, attention_mask, "multimodal_causal")
    assert calls.count(13) == 3


def test_rows_of_one_image_are_as_if_each_had_a_copy() -> None:
    model, (visual, tokens, attention_mask) = qformer(), inputs()
    copied = visual.repeat_interleave(2, 0)
    for mode in MODES:
        shared, own = (
            model.encode_pair(visual, tokens, attention_mask, mode),
            model.encode_pair(copied, tokens, attention_mask, mode),
        )
        torch.testing.assert_close(shared, own, atol=1e-5, rtol=1e-5)


def test_padding_changes_nothing() -> None:
    model, (visual, tokens, attention_mask) = qformer(), inputs()
    other = tokens.where(attention_mask, (tokens + 5) % VOCAB)
    seen = model.encode_queries(visual)
    for given in (seen, None):
        first, second = (
            model.encode_text(tokens, attention_mask, given),
            model.encode_text(other, attention_mask, given),
        )
        assert torch.equal(first[attention_mask], second[attention_mask])
        short = model.encode_text(
            tokens[2:3, :1], attention_mask[2:3, :1], None if given is None else model.encode_queries(visual[1:])
        )
        torch.testing.assert_close(short[0], first[2, :1], atol=1e-5, rtol=1e-5)
    assert torch.equal(model(visual, tokens, attention_mask), model(visual, other, attention_mask))


def test_the_text_mlps_do_not_compute_padding() -> None:
    model, (visual, tokens, attention_mask) = qformer(), inputs()
    assert not attention_mask.all()
    rows: list[int] = []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda _, given, __: rows.append(given[0].shape[:-1].numel()))
    real = int(attention_mask.sum())
    model.encode_text(tokens, attention_mask)
    assert rows == [real] * DEPTH
    model.encode_text(tokens, attention_mask, model.encode_queries(visual))
    model.encode_pair(visual, tokens, attention_mask)
    assert rows == [real] * 3 * DEPTH
    model(visual, tokens, attention_mask)
    assert rows == [real] * (4 * DEPTH - 1)  # Nobody reads the text's last state.


def test_what_the_modes_hide_leaves_no_trace() -> None:
    model, (visual, tokens, attention_mask) = qformer(), inputs()
    attention_mask = torch.ones_like(attention_mask)
    seen = model.encode_queries(visual)
    later = tokens.clone()
    later[:, 4:] = (later[:, 4:] + 1) % VOCAB
    first, second = (model.encode_text(tokens, attention_mask, seen), model.encode_text(later, attention_mask, seen))
    assert torch.equal(first[:, :4], second[:, :4])
    assert not torch.isclose(first[:, 4:], second[:, 4:]).all(-1).any()
    elsewhere = model.encode_queries(visual + torch.randn_like(visual))
    assert not torch.isclose(model.encode_text(tokens, attention_mask, elsewhere), first).all(-1).any()
    assert (
        not torch.isclose(model.encode_text(later, attention_mask), model.encode_text(tokens, attention_mask))
        .all(-1)
        .any()
    )


def test_order_of_visual_tokens_means_nothing() -> None:
    model, (visual, _, _) = qformer(), inputs()
    torch.testing.assert_close(model(visual.flip(1)), model(visual), atol=1e-5, rtol=1e-5)


def test_dropout_differs_from_image_to_image_and_stops_in_evaluation() -> None:
    model, (visual, tokens, attention_mask) = qformer(dropout=0.5), inputs()
    same = visual[:1].expand(2, -1, -1)
    assert torch.equal(*model(same))
    model.train()
    memory = model.encode_queries(same).memory
    assert memory[0].k.shape[0] == 2
    assert not torch.isclose(memory[0].k[0], memory[0].k[1]).all()
    for part in model.encode_pair(same, tokens[:2], attention_mask[:2]):
        assert torch.isfinite(part).all()


def test_gradients_reach_everything() -> None:
    model, (visual, tokens, attention_mask) = qformer().train(), inputs()
    visual.requires_grad_()
    seen = model.encode_queries(visual)
    sum(
        x.square().sum() for x in (seen.queries, model.encode_text(tokens, attention_mask, seen)[attention_mask])
    ).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert visual.grad is not None
    assert (visual.grad.abs().amax((1, 2)) > 0).all()


def test_queries_start_apart_and_drift_further() -> None:
    torch.manual_seed(0)
    model = QFormer(L, DIM, 2, HEADS, VISUAL, dropout=0.0)
    assert 0.015 < model.query_tokens.std() < 0.025
    queries = model(torch.randn(2, 5, VISUAL))
    assert (queries[:, 0] - queries[:, 1]).abs().max() > 0.1
    with torch.no_grad():
        model.query_tokens.zero_()
    queries = model(torch.randn(2, 5, VISUAL))
    torch.testing.assert_close(queries[:, 0], queries[:, 1])  # Why they must not start at zero.


def test_attention_can_be_recorded() -> None:
    model, (visual, tokens, attention_mask) = qformer(), inputs()
    with record_attention(model) as record:
        model.encode_pair(visual, tokens, attention_mask)
    assert record["blocks.0.cross_attn"].shape == (4, HEADS, L, 13)
    assert record["blocks.4.attn"].shape == (4, HEADS, L + 7, L + 7)
    assert not record["blocks.4.attn"][2, :, :, L + 1 :].any()


@pytest.mark.parametrize("joint", [False, True])
def test_what_queries_hold_is_followed_from_block_to_block(joint: bool) -> None:
    model, (visual, tokens, attention_mask) = qformer(), inputs(images=4)
    with record_attention(model) as record:
        model(visual, tokens, attention_mask) if joint else model(visual)
    held = model.attention_map(record)
    assert held.shape == (4, L, 13)
    for row in range(4):
        want = [[0.0] * 13 for _ in range(L)]
        for i in range(DEPTH):
            among = record[f"blocks.{i}.attn"].mean(1)[row if joint or i else 0]
            mixed = [[sum(float(among[j, m]) * want[m][p] for m in range(L)) for p in range(13)] for j in range(L)]
            want = [[(a + b) / 2 for a, b in zip(old, new, strict=True)] for old, new in zip(want, mixed, strict=True)]
            if i % 2 == 0:
                seen = record[f"blocks.{i}.cross_attn"].mean(1)[row]
                want = [[(want[j][p] + float(seen[j, p])) / 2 for p in range(13)] for j in range(L)]
        torch.testing.assert_close(held[row], torch.tensor(want), atol=1e-5, rtol=1e-5)
    assert (held.sum(-1) <= 1).all()


def test_saved_and_loaded(tmp_path: object) -> None:
    model, (visual, tokens, attention_mask) = qformer(), inputs()
    model.save_pretrained(str(tmp_path))
    again = QFormer.from_pretrained(str(tmp_path))
    assert torch.equal(again(visual, tokens, attention_mask), model(visual, tokens, attention_mask))
    assert again.norm_eps == 1e-12


def test_half_precision_features_are_read() -> None:
    model, (visual, _, _) = qformer(), inputs()
    torch.testing.assert_close(model(visual.bfloat16()), model(visual), atol=0.2, rtol=0.2)
    want = model(visual)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(visual).float(), want, atol=0.2, rtol=0.2)


def test_published_sizes() -> None:
    with torch.device("meta"):
        for width, want in ((1408, 105_137_664), (1024, 101_598_720), (768, 99_239_424)):
            model = QFormer(visual_dim=width)
            found = sum(p.numel() for name, p in model.named_parameters() if name != "query_tokens")
            assert found == want
        model = QFormer(vocab_size=30_523)  # BERT's words and [DEC]
        sizes = {name: p.numel() for name, p in model.named_parameters()}
    words = sizes["tok_embed.weight"] + sizes["pos_embed.weight"]
    assert round(words / 1e6, 1) == 23.8
    assert round((sum(sizes.values()) - words) / 1e6, 1) == 161.8


def test_errors() -> None:
    model, (visual, tokens, attention_mask) = qformer(), inputs()
    with pytest.raises(ValueError, match=r"12 tokens, but this Q-Former has 11 positions"):
        model.encode_text(torch.zeros(1, 12, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\(n p 14\) for this Q-Former, not \(2, 13, 15\)"):
        model(torch.randn(2, 13, 15))
    with pytest.raises(ValueError, match=r"\(n p 14\) for this Q-Former, not \(13, 14\)"):
        model(visual[0])
    with pytest.raises(ValueError, match=r"rows of text \(3\) must be a multiple of images \(2\)"):
        model.encode_pair(visual, tokens[:3], attention_mask[:3])
    with pytest.raises(ValueError, match=r"rows of text \(3\) must be a multiple of images \(2\)"):
        model(visual, tokens[:3], attention_mask[:3])
    with pytest.raises(ValueError, match=r"rows of text \(3\) must be a multiple of images \(2\)"):
        model.encode_text(tokens[:3], attention_mask[:3], model.encode_queries(visual))
    with pytest.raises(ValueError, match=r"for 2 blocks were given, but 3 read the image"):
        model(model.project_visual(visual)[:2])
    with pytest.raises(ValueError, match="bidirectional, multimodal_causal, unimodal, not causal"):
        model.encode_pair(visual, tokens, attention_mask, "causal")
    with pytest.raises(ValueError, match="bidirectional, multimodal_causal, unimodal, not causal"):
        mode_mask("causal", 2, attention_mask)
    with pytest.raises(ValueError, match=r"ids from 0 to 23 .* vocabulary of 23"):
        model.encode_text(torch.tensor([[0, 23]]))
    with pytest.raises(ValueError, match="no text stream: build it with vocab_size"):
        QFormer(L, DIM, 2, HEADS, VISUAL).encode_text(tokens)
    with pytest.raises(
        ValueError, match=r"num_queries \(0\), depth \(2\) and cross_attention_frequency \(2\) must be at least 1"
    ):
        QFormer(0, DIM, 2, HEADS, VISUAL)
    with pytest.raises(
        ValueError, match=r"num_queries \(3\), depth \(2\) and cross_attention_frequency \(0\) must be at least 1"
    ):
        QFormer(L, DIM, 2, HEADS, VISUAL, cross_attention_frequency=0)
