"""TextDecoder against its definition, against transformers' GPT-2, Llama, Qwen2 and Qwen3, and by its properties."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmtransformer import AttentionConfig, MLPConfig, NormConfig, PositionConfig, TextDecoder
from mmtransformer.backbones.decoder import DecoderState
from mmtransformer.layers import masks

VOCAB, DIM, CROSS = 53, 24, 19

LLAMA: dict[str, Any] = {
    "attention": AttentionConfig(num_kv_heads=2, bias=False),
    "mlp": MLPConfig("swiglu", bias=False),
    "norm": NormConfig("rms", 1e-6),
    "positions": PositionConfig("rotary"),
    "mlp_dim": 31,
    "tied": False,
}
BERT: dict[str, Any] = {"norm": NormConfig(pre=False, embed=True), "mlp": MLPConfig("gelu"), "mlm_head": True}
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2 cross": {"context_dim": CROSS},
    "llama": LLAMA | {"attention": AttentionConfig(num_kv_heads=2, bias=False, qk_norm="rms")},
    "llama cross": LLAMA | {"context_dim": CROSS, "cross_attn_every_n_layers": 2},
    "bert cross": BERT | {"context_dim": CROSS},
}


def make(kind: str = "gpt2", **options: Any) -> TextDecoder:
    torch.manual_seed(2)
    arguments: dict[str, Any] = {"depth": 3, "num_heads": 4, "max_len": 29} | KINDS[kind] | options
    decoder = TextDecoder(VOCAB, DIM, **arguments)
    for parameter in decoder.parameters():
        parameter.data += 0.15 * torch.randn_like(parameter)
    return decoder.eval()


def inputs(decoder: TextDecoder, rows: int = 4, length: int = 7) -> tuple[Tensor, Tensor | None]:
    torch.manual_seed(3)
    tokens = torch.randint(VOCAB, (rows, length))
    return tokens, None if decoder.context_dim is None else torch.randn(rows, 11, CROSS)


def normed(layer: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(layer, nn.LayerNorm)
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias


def looked(layer: Any, x: Tensor, context: Tensor, causal: bool) -> Tensor:
    """Attention one query and one head at a time."""
    q, k, v, out = layer.q_proj(x), layer.k_proj(context), layer.v_proj(context), torch.zeros_like(x)
    for i in range(len(x)):
        seen = slice(0, i + 1) if causal else slice(None)
        for h in range(layer.num_heads):
            part = slice(h * layer.head_dim, (h + 1) * layer.head_dim)
            weights = (k[seen, part] @ q[i, part] / layer.head_dim**0.5).softmax(0)
            out[i, part] = weights @ v[seen, part]
    return layer.out_proj(out)


def definition(decoder: TextDecoder, tokens: Tensor, context: Tensor) -> Tensor:
    """GPT-2 with cross-attention, one row at a time, in float64: logits (b q vocab)."""
    decoder, found = decoder.double(), []
    blocks: Any = decoder.blocks
    assert decoder.pos_embed is not None
    for row, image in zip(tokens, context.double(), strict=True):
        x = decoder.tok_embed.weight[row] + decoder.pos_embed.weight[: len(row)]
        for block in blocks:
            y = normed(block.norm1, x)
            x = x + looked(block.attn, y, y, causal=True)
            x = x + looked(block.cross_attn, normed(block.norm_cross, x), image, causal=False)
            y = block.mlp.fc1(normed(block.norm2, x))
            y = 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))
            x = x + block.mlp.fc2(y)
        found.append(normed(decoder.last_norm, x) @ decoder.tok_embed.weight.T)
    return torch.stack(found)


def test_logits_are_the_definition() -> None:
    decoder = make("gpt2 cross")
    tokens, context = inputs(decoder)
    assert context is not None
    logits = decoder.head(decoder(tokens, context))
    assert logits.shape == (4, 7, VOCAB)
    torch.testing.assert_close(logits.double(), definition(decoder, tokens, context), atol=2e-5, rtol=2e-5)


def llama_state(theirs: nn.Module, depth: int) -> dict[str, Tensor]:
    state = theirs.state_dict()
    names = {"model.embed_tokens.": "tok_embed.", "model.norm.": "last_norm.", "lm_head.": "lm_head."}
    for i in range(depth):
        there, here = f"model.layers.{i}.", f"blocks.{i}."
        names |= {f"{there}self_attn.o_proj.": f"{here}attn.out_proj.", f"{there}self_attn.": f"{here}attn."}
        names |= {f"{there}input_layernorm.": f"{here}norm1.", f"{there}mlp.": f"{here}mlp."}
        names[f"{there}post_attention_layernorm."] = f"{here}norm2."
    ours = {}
    for name, tensor in state.items():
        start = next(start for start in names if name.startswith(start))
        ours[names[start] + name.removeprefix(start)] = tensor
    return ours


@pytest.mark.parametrize("family", ["Llama", "Llama3", "Qwen2", "Qwen3"])
def test_llama_families_equal_transformers(family: str) -> None:
    import transformers

    name = family.removesuffix("3") if family == "Llama3" else family
    scaling = {
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 500.0}
    positions, attention, tied = PositionConfig("rotary", 500.0), AttentionConfig(2, bias=False), False
    if family == "Llama3":
        rope, positions = scaling | {"rope_theta": 500.0}, replace(positions, scaling=scaling)
    if family == "Qwen2":
        attention, tied = AttentionConfig(2, out_bias=False), True
    if family == "Qwen3":
        attention = AttentionConfig(2, 10, bias=False, qk_norm="rms")
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCAB, hidden_size=DIM, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=attention.head_dim or 6, intermediate_size=31, max_position_embeddings=64, rms_norm_eps=1e-6,
        rope_parameters=rope, tie_word_embeddings=tied, pad_token_id=0,
        attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(4)
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.15 * torch.randn_like(parameter)
    options = {"attention": attention, "positions": positions, "tied": tied}
    ours = TextDecoder(VOCAB, DIM, 3, 4, max_len=64, **LLAMA | options).eval()
    ours.load_state_dict(llama_state(theirs, 3))
    tokens, _ = inputs(ours, length=23)
    torch.testing.assert_close(ours.head(ours(tokens)), theirs(tokens).logits, atol=1e-4, rtol=1e-4)
    attention_mask = torch.ones_like(tokens, dtype=torch.bool)
    attention_mask[1, :5] = attention_mask[2, :11] = False
    positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    want = theirs(tokens, attention_mask=attention_mask.long(), position_ids=positions).logits[attention_mask]
    torch.testing.assert_close(
        ours.head(ours(tokens, attention_mask=attention_mask))[attention_mask], want, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
def test_later_tokens_change_no_bit_of_earlier_ones(kind: str) -> None:
    decoder = make(kind)
    tokens, context = inputs(decoder)
    other = tokens.clone()
    other[:, 4:] = (other[:, 4:] + torch.randint(1, VOCAB, (4, 3))) % VOCAB
    before, after = decoder(tokens, context), decoder(other, context)
    assert torch.equal(before[:, :4], after[:, :4])
    assert (before[:, 4:] != after[:, 4:]).any(-1).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(kind: str, side: str) -> None:
    decoder = make(kind)
    tokens, context = inputs(decoder)
    attention_mask = torch.ones_like(tokens, dtype=torch.bool)
    for row, count in enumerate((0, 3, 1, 6)):
        attention_mask[row, slice(0, count) if side == "left" else slice(7 - count, 7)] = False
    hidden = decoder(tokens, context, attention_mask=attention_mask)
    assert hidden.isfinite().all()
    assert torch.equal(
        hidden[attention_mask],
        decoder(tokens.masked_fill(~attention_mask, 1), context, attention_mask=attention_mask)[attention_mask],
    )
    for row in range(4):  # A batch is its rows one by one.
        alone = decoder(tokens[row][attention_mask[row]][None], None if context is None else context[row, None])
        torch.testing.assert_close(hidden[row][attention_mask[row]], alone[0], atol=1e-5, rtol=1e-5)
    if side == "right":  # There the causal mask alone hides it.
        torch.testing.assert_close(
            hidden[attention_mask], decoder(tokens, context)[attention_mask], atol=1e-5, rtol=1e-5
        )


def decode(decoder: TextDecoder, tokens: Tensor, context: Tensor | None, cuts: list[int], **given: Any) -> Tensor:
    """Hidden states of a row read in pieces, with a cache."""
    state = decoder.new_state(tokens.shape[1])
    attention_mask, parts = given.get("attention_mask"), []
    for start, end in zip([0, *cuts], [*cuts, tokens.shape[1]], strict=True):
        piece = None if attention_mask is None else attention_mask[:, start:end]
        piece = None if piece is None or (start and bool(piece.all())) else piece
        parts.append(decoder(tokens[:, start:end], context, attention_mask=piece, state=state))
    assert state.length == tokens.shape[1]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", [None, "left", "right", "long"])
def test_cached_equals_uncached(kind: str, padding: str | None) -> None:
    decoder = make(kind)
    tokens, context = inputs(decoder)
    attention_mask = torch.ones_like(tokens, dtype=torch.bool)
    if padding == "left":
        attention_mask[1, :2] = attention_mask[3, :1] = False
    if padding == "right":  # The prompt is padded, the new tokens are not.
        attention_mask[1, 2:4] = attention_mask[3, 3] = False
    if padding == "long":  # Whole pieces are padding.
        attention_mask[1, :5] = attention_mask[3, 4:6] = False
    given = {} if padding is None else {"attention_mask": attention_mask}
    full = decoder(tokens, context, **given)
    for cuts in ([4, 5, 6], [1, 2, 3, 4, 5, 6], [4], [2, 4, 6]):
        got = decode(decoder, tokens, context, cuts, **given)
        torch.testing.assert_close(got[attention_mask], full[attention_mask], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_reordered_with_their_padding_and_positions(kind: str) -> None:
    decoder = make(kind)
    tokens, context = inputs(decoder)
    attention_mask = torch.ones_like(tokens, dtype=torch.bool)
    attention_mask[1, :2] = attention_mask[3, :1] = False
    state, order = decoder.new_state(7), torch.tensor([3, 1, 1, 0, 2])
    decoder(tokens[:, :4], context, attention_mask=attention_mask[:, :4], state=state)
    state.reorder(order)
    got = decoder(tokens[order, 4:], None if context is None else context[order], state=state)
    full = decoder(tokens, context, attention_mask=attention_mask)[order, 4:]
    torch.testing.assert_close(got, full, atol=1e-5, rtol=1e-5)


def test_an_empty_state_has_nothing_to_reorder() -> None:
    state = DecoderState(3, 5)
    state.reorder(torch.tensor([1, 0]))
    assert state.length == 0


@pytest.mark.parametrize("kind", ["gpt2 cross", "llama cross"])
def test_rows_share_a_context_as_if_each_had_its_own(kind: str) -> None:
    decoder = make(kind)
    tokens, context = inputs(decoder, rows=6)
    assert context is not None
    shared = decoder(tokens, context[:3])
    torch.testing.assert_close(shared, decoder(tokens, context[:3].repeat_interleave(2, 0)), atol=1e-5, rtol=1e-5)
    projected = decoder.project_context(context[:3])
    assert len(projected) == len(decoder.cross_layers)
    assert torch.equal(shared, decoder(tokens, projected))
    order = torch.randperm(11)
    torch.testing.assert_close(shared, decoder(tokens, context[:3, order]), atol=1e-5, rtol=1e-5)


def test_only_the_last_of_every_few_blocks_reads_the_context() -> None:
    layers = {
        every: make("gpt2 cross", depth=5, cross_attn_every_n_layers=every).cross_layers for every in (1, 2, 3, 5)
    }
    assert layers == {1: [0, 1, 2, 3, 4], 2: [1, 3], 3: [2], 5: [4]}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_packed_documents_do_not_see_each_other(kind: str) -> None:
    decoder = make(kind)
    tokens, _ = inputs(decoder)
    ids = torch.tensor([0, 0, 0, 1, 1, 1, 1]).expand(4, 7)
    allowed = masks.dense(masks.all_of(masks.causal(), masks.documents(ids)), 4, 7, 7)
    packed = decoder(tokens, mask=allowed)
    torch.testing.assert_close(packed[:, :3], decoder(tokens[:, :3]), atol=1e-5, rtol=1e-5)
    other = tokens.clone()
    other[:, :3] = (other[:, :3] + 1) % VOCAB
    assert torch.equal(packed[:, 3:], decoder(other, mask=allowed)[:, 3:])
    if kind == "llama":  # Rotary positions are relative: a document is the same wherever it starts.
        torch.testing.assert_close(packed[:, 3:], decoder(tokens[:, 3:]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_row_is_its_documents_one_by_one(kind: str) -> None:
    """Also behind other documents, with padding at the end, and where the row is longer than the decoder's max_len."""
    decoder = make(kind).double()
    tokens, context = inputs(decoder, length=11)
    context = None if context is None else context.double()
    tokens = torch.cat((tokens, tokens, tokens), dim=1)
    assert tokens.shape[1] > decoder.max_len
    sizes = (5, 11, 1, 13, 3)
    ids = torch.repeat_interleave(torch.arange(5), torch.tensor(sizes)).expand(len(tokens), -1)
    packed = decoder(tokens, context, document_ids=ids)
    pieces = [decoder(piece, context) for piece in tokens.split(sizes, dim=1)]
    torch.testing.assert_close(packed, torch.cat(pieces, dim=1), atol=1e-12, rtol=1e-10)
    attention_mask = torch.arange(33) < 31
    cut = decoder(tokens, context, document_ids=ids, attention_mask=attention_mask.expand(len(tokens), -1))
    torch.testing.assert_close(cut[:, attention_mask], packed[:, attention_mask], atol=1e-12, rtol=1e-10)
    other = tokens.clone()
    other[:, 5:16] = (other[:, 5:16] + 1) % VOCAB
    changed = decoder(other, context, document_ids=ids)
    assert torch.equal(changed[:, :5], packed[:, :5])
    assert torch.equal(changed[:, 16:], packed[:, 16:])


def test_segments_refuse_what_does_not_go_with_them() -> None:
    decoder = make()
    with pytest.raises(ValueError, match=r"document has 30 tokens.*29 positions"):
        decoder(torch.zeros(1, 31, dtype=torch.long), document_ids=torch.tensor([[0] + 30 * [1]]))
    ids = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="give no state"):
        decoder(ids, document_ids=ids, state=decoder.new_state(3))
    with pytest.raises(ValueError, match="give no mask"):
        decoder(ids, document_ids=ids, mask="causal")


def test_the_door_opens_before_every_block() -> None:
    decoder = make()
    tokens, _ = inputs(decoder)
    seen: list[int] = []

    def door(i: int, x: Tensor) -> Tensor:
        seen.append(i)
        return x + i

    got = decoder(tokens, before_block=door)
    assert seen == [0, 1, 2]
    x = decoder.embed(tokens, torch.arange(7))
    for i, block in enumerate(decoder.blocks):
        x = block(x + i, mask="causal")
    assert torch.equal(got, decoder.last_norm(x))


def test_run_continues_from_embeddings() -> None:
    decoder = make()
    tokens, _ = inputs(decoder)
    positions = torch.arange(7)
    assert torch.equal(decoder.forward_embeds(decoder.embed(tokens, positions), positions), decoder(tokens))


def test_dropout_acts_in_training_only() -> None:
    decoder = make("gpt2 cross", dropout=0.2)
    tokens, context = inputs(decoder)
    assert torch.equal(decoder(tokens, context), decoder(tokens, context))
    decoder.train()
    assert not torch.equal(decoder(tokens, context), decoder(tokens, context))


def test_tied_and_untied_heads() -> None:
    tied, free = make(), make(tied=False)
    assert tied.lm_head.weight is tied.tok_embed.weight
    assert free.lm_head.weight is not free.tok_embed.weight
    count = lambda model: sum(p.numel() for p in model.parameters())  # noqa: E731
    assert count(free) - count(tied) == VOCAB * DIM


def test_gpt2_counts_as_published() -> None:
    with torch.device("meta"):
        decoder = TextDecoder(50_257)
    assert sum(p.numel() for p in decoder.parameters()) == 124_439_808


def test_weights_start_as_gpt2s() -> None:
    decoder = TextDecoder(301, 64, 5, 4, context_dim=32)
    branches = 2 * 5 + 5
    for name, parameter in decoder.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            last = name.endswith(("out_proj.weight", "fc2.weight"))
            want = 0.02 / branches**0.5 if last else 0.02
            assert parameter.std().item() == pytest.approx(want, rel=0.1), name


def test_errors_name_the_numbers() -> None:
    faults: list[tuple[dict[str, Any], str]] = [
        ({"cross_attn_every_n_layers": 4}, r"cross_attn_every_n_layers \(4\).*depth \(3\)"),
        ({"cross_attn_every_n_layers": 0}, r"cross_attn_every_n_layers \(0\)"),
        ({"mlm_head": True, "mlp": MLPConfig("swiglu")}, 'cannot be "swiglu"'),
        ({"norm": NormConfig("batch")}, '"batch"'),  # pyright: ignore[reportArgumentType]
        ({"mlp": MLPConfig("geglu")}, '"geglu"'),  # pyright: ignore[reportArgumentType]
        ({"attention": AttentionConfig(num_kv_heads=3)}, r"\(4\).*\(3\)"),
        ({"positions": PositionConfig("rotary"), "attention": AttentionConfig(head_dim=7)}, r"\(7\)"),
        ({"positions": PositionConfig("rotary", scaling={"rope_type": "yarn"})}, '"yarn"'),
    ]
    for options, message in faults:
        with pytest.raises(ValueError, match=message):
            TextDecoder(VOCAB, DIM, 3, 4, **options)
    with pytest.raises(ValueError, match='"alibi"'):
        PositionConfig("alibi")  # pyright: ignore[reportArgumentType]
    decoder = make()
    with pytest.raises(ValueError, match=r"30 tokens.*29 positions"):
        decoder(torch.zeros(2, 30, dtype=torch.long))
    with pytest.raises(ValueError, match=r"30 tokens.*29 positions"):
        decoder.new_state(30)
    state = decoder.new_state(5)
    decoder(torch.zeros(2, 4, dtype=torch.long), state=state)
    with pytest.raises(ValueError, match="holds 5 tokens, but 6"):
        decoder(torch.zeros(2, 2, dtype=torch.long), state=state)
    with pytest.raises(ValueError, match=r"token ids from 3 to 53.*vocabulary of 53"):
        decoder(torch.tensor([[3, VOCAB]]))
    with pytest.raises(ValueError, match=r"token ids from -1 to 3.*vocabulary of 53"):
        decoder(torch.tensor([[3, -1]]))
    with pytest.raises(ValueError, match="has cross-attention, but no context was given"):
        make("gpt2 cross")(torch.tensor([[3]]))
    with pytest.raises(ValueError, match="has no cross-attention, but a context was given"):
        decoder(torch.tensor([[3]]), torch.randn(1, 7, DIM))
    crossing = make("gpt2 cross")
    with pytest.raises(ValueError, match=r"for 2 blocks.* 3 read"):
        crossing(torch.tensor([[3]]), crossing.project_context(torch.randn(1, 7, CROSS))[:2])
