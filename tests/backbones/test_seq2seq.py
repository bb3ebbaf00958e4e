"""The 2017 Transformer against its definition, against torch.nn.Transformer, and by its properties."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtransformer import Seq2SeqBatch, Transformer, generate, record_attention
from mmtransformer.layers.attention import Attention
from mmtransformer.weights.shared.keys import convert_back, key_mappings

VOCAB, DIM, HEADS = 53, 20, 5
EOS = 2


def make(norm_first: bool = False, **options: Any) -> Transformer:
    torch.manual_seed(2)
    arguments: dict[str, Any] = {"decoder_depth": 3, "mlp_dim": 37, "max_len": 29} | options
    model = Transformer(VOCAB, DIM, 2, HEADS, norm_first=norm_first, **arguments)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def pairs(side: str = "right") -> Seq2SeqBatch:
    """Three sources of 11, 7 and 3 tokens, three targets of 7, 5 and 2."""
    torch.manual_seed(3)
    source, tokens = torch.randint(3, VOCAB, (3, 11)), torch.randint(3, VOCAB, (3, 7))
    return Seq2SeqBatch(source, lengths(11, (11, 7, 3), side), tokens, lengths(7, (7, 5, 2), side), tokens > 0)


def lengths(width: int, counts: tuple[int, ...], side: str = "right") -> Tensor:
    right = torch.arange(width) < torch.tensor(counts)[:, None]
    return right if side == "right" else right.flip(1)


# --- the definition


def sinusoids(count: int) -> Tensor:
    table = torch.zeros(count, DIM, dtype=torch.float64)
    for place in range(count):
        for i in range(DIM // 2):
            angle = torch.tensor(place / 10000 ** (2 * i / DIM), dtype=torch.float64)
            table[place, 2 * i], table[place, 2 * i + 1] = angle.sin(), angle.cos()
    return table


def normed(norm: Any, x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def heads(attn: Any, x: Tensor, context: Tensor, causal: bool = False) -> Tensor:
    """Concat(head_1 ... head_h) W_O, one head at a time (section 3.2.2)."""
    found, width = [], DIM // HEADS
    for h in range(HEADS):
        part = slice(h * width, (h + 1) * width)
        q, k, v = attn.q_proj(x)[:, part], attn.k_proj(context)[:, part], attn.v_proj(context)[:, part]
        scores = q @ k.T / width**0.5
        if causal:
            scores = scores + torch.full_like(scores, float("-inf")).triu(1)
        found.append(scores.softmax(-1) @ v)
    return attn.out_proj(torch.cat(found, -1))


def definition(model: Any, source: Tensor, tokens: Tensor) -> Tensor:
    """One pair without padding, post-norm, in float64: logits (q vocab)."""
    weight = model.decoder.tok_embed.weight
    x = weight[source] * DIM**0.5 + sinusoids(len(source))
    feed = lambda mlp, x: mlp.fc2(mlp.fc1(x).clamp(min=0))  # noqa: E731
    for block in model.blocks:
        x = normed(block.norm1, x + heads(block.attn, x, x))
        x = normed(block.norm2, x + feed(block.mlp, x))
    y = weight[tokens] * DIM**0.5 + sinusoids(len(tokens))
    for block in model.decoder.blocks:
        y = normed(block.norm1, y + heads(block.attn, y, y, causal=True))
        y = normed(block.norm_cross, y + heads(block.cross_attn, y, x))
        y = normed(block.norm2, y + feed(block.mlp, y))
    return y @ weight.T


@torch.no_grad()
def test_logits_are_the_papers() -> None:
    batch = pairs()
    logits = make().logits(batch)
    assert logits.shape == (3, 7, VOCAB)
    model = make().double()
    for row in range(3):
        source = batch.source[row, batch.source_attention_mask[row]]
        tokens = batch.tokens[row, batch.attention_mask[row]]
        want = definition(model, source, tokens)
        torch.testing.assert_close(logits[row, : len(tokens)].double(), want, atol=2e-5, rtol=2e-5)


# --- torch.nn.Transformer with the same weights


TORCH_KEYS = {
    f"{side}.layers.*.{source}": f"{prefix}blocks.*.{target}"
    for side, prefix in (("encoder", ""), ("decoder", "decoder."))
    for source, target in {
        "self_attn.in_proj_weight": "attn.[q,k,v]_proj.weight",
        "self_attn.in_proj_bias": "attn.[q,k,v]_proj.bias",
        "self_attn.out_proj": "attn.out_proj",
        "multihead_attn.in_proj_weight": "cross_attn.[q,k,v]_proj.weight",
        "multihead_attn.in_proj_bias": "cross_attn.[q,k,v]_proj.bias",
        "multihead_attn.out_proj": "cross_attn.out_proj",
        "linear[1,2]": "mlp.fc[1,2]",
        "norm1": "norm1",
        "norm2": "norm2" if side == "encoder" else "norm_cross",
        "norm3": "none" if side == "encoder" else "norm2",
    }.items()
} | {"encoder.norm": "last_norm", "decoder.norm": "decoder.last_norm"}
"""Which tensors of `torch.nn.Transformer` are which of ours."""


@pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning")
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@torch.no_grad()
def test_equals_torch_nn_transformer(norm_first: bool) -> None:
    model, batch = make(norm_first), pairs()
    theirs = nn.Transformer(DIM, HEADS, 2, 3, 37, norm_first=norm_first, batch_first=True)
    if not norm_first:  # It puts a norm behind the last one, which the paper does not have.
        theirs.encoder.norm = theirs.decoder.norm = None
    own = model.state_dict()
    theirs.load_state_dict(convert_back(key_mappings(TORCH_KEYS, own), own))
    want = theirs.eval()(
        model.embed(batch.source),
        model.decoder.embed(batch.tokens, torch.arange(7)),
        tgt_mask=nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.bool),
        src_key_padding_mask=~batch.source_attention_mask,
        tgt_key_padding_mask=~batch.attention_mask,
        memory_key_padding_mask=~batch.source_attention_mask,
        tgt_is_causal=True,
    )
    torch.testing.assert_close(
        model.hidden_states(batch)[batch.attention_mask], want[batch.attention_mask], atol=1e-5, rtol=1e-5
    )


def test_parameters_of_base_and_big() -> None:
    """The paper says 65 and 213 million, rounded; no one vocabulary gives both, its own of 37000 gives these."""
    counts = {}
    with torch.device("meta"):
        for name in Transformer.presets:
            model = Transformer.preset(name)
            counts[name] = sum(p.numel() for p in model.parameters())
            assert model.decoder.lm_head.weight is model.decoder.tok_embed.weight
    assert counts == {"base": 63_082_496, "big": 214_245_376}


# --- properties


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@torch.no_grad()
def test_cached_decoding_equals_one_pass(norm_first: bool) -> None:
    """Prompts padded on the left, three copies of a row, shuffled between the steps."""
    model, batch = make(norm_first), pairs("left")
    logits, state = model.prefill(batch, expand_size=3, max_new_tokens=4)
    rows = torch.arange(3).repeat_interleave(3)
    history = batch.tokens[rows]
    for step in range(4):
        whole = lengths(7 + step, (7 + step, 5 + step, 2 + step), "left")[rows]
        source = model.encode(batch.source, attention_mask=batch.source_attention_mask)
        want = model.head(model.decode(history, source, attention_mask=whole)[:, -1])
        torch.testing.assert_close(logits, want, atol=2e-5, rtol=2e-5)
        order = torch.cat([3 * i + torch.randperm(3) for i in range(3)])
        state.reorder(order)
        new = torch.randint(3, VOCAB, (9,))
        history = torch.cat((history[order], new[:, None]), 1)
        if step < 3:
            logits = model.decode_step(new, state)


@torch.no_grad()
def test_the_source_is_projected_once() -> None:
    model, batch, calls = make(), pairs(), []
    for block in model.decoder.blocks:
        assert isinstance(block.cross_attn, Attention)  # pyright: ignore[reportAttributeAccessIssue]
        block.cross_attn.k_proj.register_forward_hook(lambda *_: calls.append(1))  # pyright: ignore
    _, state = model.prefill(batch, expand_size=2, max_new_tokens=3)
    for _ in range(2):
        model.decode_step(torch.full((6,), 5), state)
    assert len(calls) == model.decoder_depth
    assert all(kv.k.shape[0] == 3 for kv in state.source.context if not isinstance(kv, Tensor))


@torch.no_grad()
def test_padding_changes_nothing_on_either_side() -> None:
    model, batch = make(), pairs()
    logits = model.logits(batch)
    for row, (k, q) in enumerate([(11, 7), (7, 5), (3, 2)]):
        alone = Seq2SeqBatch(batch.source[row : row + 1, :k], lengths(k, (k,)), batch.tokens[row : row + 1, :q],
                          lengths(q, (q,)), batch.loss_mask[row : row + 1, :q])  # fmt: skip
        torch.testing.assert_close(model.logits(alone)[0], logits[row, :q], atol=1e-5, rtol=1e-5)
    left = pairs("left")
    left.source, left.tokens = batch.source.clone(), batch.tokens.clone()
    for row, (k, q) in enumerate([(11, 7), (7, 5), (3, 2)]):
        left.source[row], left.tokens[row] = batch.source[row].roll(11 - k), batch.tokens[row].roll(7 - q)
    source = model.encode(left.source, attention_mask=left.source_attention_mask)
    moved = model.head(model.decode(left.tokens, source, attention_mask=left.attention_mask))
    torch.testing.assert_close(moved[left.attention_mask], logits[batch.attention_mask], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_lies_in_padding_changes_no_bit() -> None:
    model, batch = make(), pairs()
    before = model.logits(batch)
    batch.source = torch.where(batch.source_attention_mask, batch.source, 7)
    batch.tokens = torch.where(batch.attention_mask, batch.tokens, 7)
    assert torch.equal(model.logits(batch)[batch.attention_mask], before[batch.attention_mask])


@torch.no_grad()
def test_later_targets_change_nothing_and_every_source_token_matters() -> None:
    model, batch = make(), pairs()
    before = model.logits(batch)
    batch.tokens[:, 4] = (batch.tokens[:, 4] + 1) % VOCAB
    after = model.logits(batch)
    assert torch.equal(after[:, :4], before[:, :4])
    assert not torch.isclose(after[0, 4:], before[0, 4:]).all(-1).any()
    for place in range(11):
        changed = pairs()
        changed.source[0, place] = (changed.source[0, place] + 1) % VOCAB
        assert not torch.isclose(model.logits(changed)[0], before[0]).all(-1)[:4].any()


@torch.no_grad()
def test_embeddings_in_front_of_the_source() -> None:
    """BLIP-2's queries: read without a position of their own, whatever the padding behind them."""
    model, batch = make(), pairs()
    queries = torch.randn(3, 4, DIM)
    found = model.encode(batch.source, attention_mask=batch.source_attention_mask, prefix_embeds=queries)
    assert isinstance(found.context, Tensor)
    assert found.attention_mask is not None
    assert found.attention_mask.sum(1).tolist() == [15, 11, 7]
    for row, k in enumerate((11, 7, 3)):
        x = torch.cat((queries[row : row + 1], model.embed(batch.source[row : row + 1, :k])), 1)
        for block in model.blocks:
            x = block(x)
        torch.testing.assert_close(found.context[row, : 4 + k], x[0], atol=1e-5, rtol=1e-5)
    unpadded = model.encode(batch.source[:1], prefix_embeds=queries[:1])
    assert unpadded.attention_mask is None
    with pytest.raises(ValueError, match=r"3 sources must be \(3, any, 20\), not \(3, 4, 19\)"):
        model.encode(batch.source, prefix_embeds=torch.zeros(3, 4, 19))


def test_dropout_falls_on_embeddings_branches_and_attention_in_training_only() -> None:
    batch = pairs()
    bare = Transformer(VOCAB, DIM, 0, HEADS, decoder_depth=0, dropout=0.25)
    context = bare.encode(batch.source).context
    assert isinstance(context, Tensor)
    dropped = float((context == 0).float().mean())
    assert 0.15 < dropped < 0.35
    torch.testing.assert_close(context[context != 0], (bare.embed(batch.source) / 0.75)[context != 0])
    model = make(dropout=0.25)
    layers = [module.p for module in model.modules() if isinstance(module, nn.Dropout) and module.p]
    assert layers == [0.25] * (1 + 2 * model.depth + 1 + model.decoder_depth)  # one for all of a decoder block
    rates = [module.dropout for module in model.modules() if isinstance(module, Attention)]
    assert rates == [0.25] * model.depth + [0.25, 0.0] * model.decoder_depth
    assert torch.equal(model.logits(batch), model.logits(batch))
    assert not torch.equal(model.train().logits(batch), model.logits(batch))


# --- generation


@pytest.mark.parametrize(("power", "offset"), [(0.6, 5.0), (1.0, 0.0), (2.0, 0.0)])
def test_wide_beams_find_the_best_text_of_all(power: float, offset: float) -> None:
    """All texts of at most 3 tokens, scored by the paper's length penalty (or transformers')."""
    torch.manual_seed(5)
    model = Transformer(5, DIM, 1, HEADS, mlp_dim=37, max_len=7).eval()
    source, prompt = torch.tensor([[3, 4, 1]]), torch.tensor([[3]])
    batch = Seq2SeqBatch(source, source > 0, prompt, prompt > 0, prompt < 0)
    texts = [list(ids) for count in range(3) for ids in itertools.product((0, 1, 3, 4), repeat=count)]
    texts = [[*ids, EOS] for ids in texts] + [list(ids) for ids in itertools.product((0, 1, 3, 4), repeat=3)]
    scores = {}
    with torch.no_grad():
        for ids in texts:
            tokens = torch.tensor([[3, *ids]])
            read = Seq2SeqBatch(source, source > 0, tokens, tokens >= 0, tokens >= 0)
            spoken = model.logits(read).log_softmax(-1)[0, :-1].gather(1, tokens[0, 1:, None]).sum()
            scores[tuple(ids)] = float(spoken) / ((offset + len(ids)) / (offset + 1)) ** power
    best = sorted(scores, key=lambda ids: -scores[ids])[:3]
    found = generate(model, batch, eos_id=EOS, max_new_tokens=3, num_beams=64, num_return_sequences=3,
                     length_penalty=power, length_offset=offset)[0]  # fmt: skip
    assert [(*text.tokens, *[EOS] * text.finished) for text in found] == best
    with pytest.raises(ValueError, match=r"length_offset must be at least 0\.0, not -1\.5"):
        generate(model, batch, eos_id=EOS, max_new_tokens=3, length_offset=-1.5)


def test_learns_to_write_backwards() -> None:
    """The whole of it, post-norm and all: 5 letters in, the same 5 in reverse order out."""
    model = Transformer(13, 32, 2, 4, mlp_dim=64, max_len=9, dropout=0.0).train()
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98), eps=1e-9)
    loss = torch.tensor(0.0)
    for step in range(1, 241):
        for group in optimizer.param_groups:
            group["lr"] = 0.004 * min(step / 60, (60 / step) ** 0.5)
        letters = torch.randint(3, 13, (64, 5))
        tokens = torch.cat((torch.full((64, 1), 1), letters.flip(1)), 1)
        batch = Seq2SeqBatch(letters, letters > 0, tokens, tokens > 0, tokens > 1)
        loss = F.cross_entropy(model.logits(batch)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1
    letters = torch.randint(3, 13, (32, 5))
    prompt = torch.ones(32, 1, dtype=torch.long)
    batch = Seq2SeqBatch(letters, letters > 0, prompt, prompt > 0, prompt > 1)
    written = [texts[0].tokens for texts in generate(model, batch, eos_id=EOS, max_new_tokens=5)]
    right = sum(a == b for a, b in zip(written, letters.flip(1).tolist(), strict=True))
    assert right >= 30
    with record_attention(model.decoder, keep="cross_attn") as record:
        model.logits(batch)
    assert all(weights.shape == (32, 4, 1, 5) for weights in record.values())


# --- errors, folders


def test_errors_say_the_numbers() -> None:
    model = make()
    with pytest.raises(ValueError, match=r"dim \(21\) must be even"):
        Transformer(VOCAB, 21)
    with pytest.raises(ValueError, match=r"source of 30 tokens.* 29 at most"):
        model.encode(torch.zeros(1, 30, dtype=torch.long))
    with pytest.raises(ValueError, match=r"token ids from 3 to 53.*vocabulary of 53"):
        model.encode(torch.tensor([[3, VOCAB]]))
    with pytest.raises(ValueError, match=r"30 tokens.* 29 positions"):
        model.decode(torch.zeros(1, 30, dtype=torch.long), model.encode(torch.tensor([[3]])))
    with pytest.raises(ValueError, match="more than the 29"):
        generate(model, pairs(), eos_id=EOS, max_new_tokens=23)


@pytest.mark.parametrize("options", [{}, {"norm_first": True, "tied": False, "activation": "gelu"}], ids=str)
def test_saved_and_loaded(options: dict[str, Any], tmp_path: Path) -> None:
    model, batch = make(**options), pairs()
    model.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path)
    assert torch.equal(again.logits(batch), model.logits(batch))
    assert (again.decoder.lm_head.weight is again.decoder.tok_embed.weight) == options.get("tied", True)


def test_batches_move_and_are_cut() -> None:
    batch = pairs()
    short = batch.truncate(4)
    assert (short.tokens.shape, short.attention_mask.shape, short.loss_mask.shape) == ((3, 4), (3, 4), (3, 4))
    assert short.source.shape == (3, 11)
    moved = batch.to("meta")
    assert all(x.device.type == "meta" for x in vars(moved).values() if isinstance(x, Tensor))
