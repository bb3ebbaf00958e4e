"""TextEncoder against its definition and by its properties; transformers: weights/text/test_weights_bert.py."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmtransformer import TextEncoder, record_attention

VOCAB, DIM, HEADS = 53, 20, 5


def make(**options: Any) -> TextEncoder:
    torch.manual_seed(2)
    arguments: dict[str, Any] = {"mlp_dim": 37, "max_len": 29, "mlm_head": True, "nsp_head": True} | options
    encoder = TextEncoder(VOCAB, DIM, 3, HEADS, **arguments)
    for parameter in encoder.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return encoder.eval()


def rows() -> tuple[Tensor, Tensor, Tensor]:
    """Three rows of 11, 7 and 3 tokens: ids, types, and which are real."""
    torch.manual_seed(3)
    tokens, types = torch.randint(VOCAB, (3, 11)), torch.randint(2, (3, 11))
    return tokens, types, torch.arange(11) < torch.tensor([11, 7, 3])[:, None]


def normed(norm: Any, x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def definition(encoder: Any, tokens: Tensor, types: Tensor) -> Tensor:
    """One row without padding, one head at a time: hidden states (q d)."""
    x = encoder.tok_embed.weight[tokens] + encoder.pos_embed.weight[: len(tokens)] + encoder.type_embed.weight[types]
    x, width = normed(encoder.norm, x), DIM // HEADS
    for block in encoder.blocks:
        found = []
        for h in range(HEADS):
            part = slice(h * width, (h + 1) * width)
            q, k, v = (layer(x)[:, part] for layer in (block.attn.q_proj, block.attn.k_proj, block.attn.v_proj))
            found.append((q @ k.T / width**0.5).softmax(-1) @ v)
        x = normed(block.norm1, x + block.attn.out_proj(torch.cat(found, -1)))
        x = normed(block.norm2, x + block.mlp.fc2(gelu(block.mlp.fc1(x))))
    return x


@torch.no_grad()
def test_hidden_states_and_heads_are_the_definition() -> None:
    encoder, (tokens, types, attention_mask) = make(), rows()
    hidden = encoder(tokens, types, attention_mask=attention_mask)
    words, follows = encoder.mlm_logits(hidden), encoder.nsp_logits(hidden)
    assert (hidden.shape, words.shape, follows.shape) == ((3, 11, DIM), (3, 11, VOCAB), (3, 2))
    exact: Any = make().double()
    for row, count in enumerate((11, 7, 3)):
        x = definition(exact, tokens[row, :count], types[row, :count])
        torch.testing.assert_close(hidden[row, :count].double(), x, atol=2e-5, rtol=2e-5)
        head = exact.mlm_proj
        scores = normed(head.norm, gelu(head.dense(x))) @ exact.tok_embed.weight.T + head.bias
        torch.testing.assert_close(words[row, :count].double(), scores, atol=5e-5, rtol=5e-5)
        judged = exact.nsp_proj(torch.tanh(exact.pool_proj(x[0])))
        torch.testing.assert_close(follows[row].double(), judged, atol=2e-5, rtol=2e-5)


def test_parameters_of_bert_base() -> None:
    with torch.device("meta"):
        count = lambda **options: sum(p.numel() for p in TextEncoder(**options).parameters())  # noqa: E731
        assert count() == 109_482_240
        assert count(pooler=False) == 109_482_240 - 768 * 769
        assert count(mlm_head=True, nsp_head=True) == 110_106_428


# --- properties


@torch.no_grad()
def test_padding_on_either_side_changes_nothing() -> None:
    encoder, (tokens, types, attention_mask) = make(), rows()
    hidden = encoder(tokens, types, attention_mask=attention_mask)
    for row, count in enumerate((11, 7, 3)):
        alone = encoder(tokens[row : row + 1, :count], types[row : row + 1, :count])
        torch.testing.assert_close(alone[0], hidden[row, :count], atol=1e-5, rtol=1e-5)
    other = torch.where(attention_mask, tokens, (tokens + 1) % VOCAB)
    assert torch.equal(encoder(other, types, attention_mask=attention_mask)[attention_mask], hidden[attention_mask])
    shifts = (11 - attention_mask.sum(1)).tolist()
    left = lambda x: torch.stack([line.roll(by) for line, by in zip(x, shifts, strict=True)])  # noqa: E731
    moved = encoder(left(tokens), left(types), attention_mask=left(attention_mask))
    torch.testing.assert_close(moved[left(attention_mask)], hidden[attention_mask], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_every_token_sees_all_of_its_row_and_no_other() -> None:
    encoder, (tokens, types, _) = make(), rows()
    hidden = encoder(tokens, types)
    for place in range(11):
        changed = tokens.clone()
        changed[1, place] = (changed[1, place] + 1) % VOCAB
        after = encoder(changed, types)
        assert torch.equal(after[[0, 2]], hidden[[0, 2]])
        assert not torch.isclose(after[1], hidden[1]).all(-1).any()


@torch.no_grad()
def test_order_and_types_matter() -> None:
    encoder, (tokens, types, _) = make(), rows()
    hidden = encoder(tokens, types)
    assert not torch.isclose(encoder(tokens.flip(1), types.flip(1)).flip(1), hidden).all(-1).any()
    assert not torch.isclose(encoder(tokens, 1 - types), hidden).all(-1).any()
    assert torch.equal(encoder(tokens), encoder(tokens, torch.zeros_like(types)))


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_packed_documents_are_as_if_alone(padded: bool) -> None:
    encoder, (tokens, types, _) = make(), rows()
    counts = (5, 2, 4)
    document_ids = torch.tensor([[0] * 5 + [1] * 2 + [2] * 4])
    attention_mask = torch.arange(11)[None] < 10 if padded else None
    packed = encoder(tokens[:1], types[:1], document_ids=document_ids, attention_mask=attention_mask)[0].split(counts)
    for document, ids, kinds in zip(packed, tokens[0].split(counts), types[0].split(counts), strict=True):
        real = slice(None, 3) if padded and len(ids) == 4 else slice(None)
        alone = encoder(ids[None, real], kinds[None, real])[0]
        torch.testing.assert_close(document[real], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_attention_is_recorded_and_sums_to_one_over_real_tokens() -> None:
    encoder, (tokens, types, attention_mask) = make(), rows()
    with record_attention(encoder) as record:
        encoder(tokens, types, attention_mask=attention_mask)
    assert list(record) == ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]
    for weights in record.values():
        assert weights.shape == (3, HEADS, 11, 11)
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, HEADS, 11))
        assert not weights.masked_select(~attention_mask[:, None, None, :]).any()


def test_dropout_only_in_training() -> None:
    encoder, (tokens, types, _) = make(dropout=0.5), rows()
    assert torch.equal(encoder(tokens, types), encoder(tokens, types))
    encoder.train()
    assert not torch.equal(encoder(tokens, types), encoder(tokens, types))
    bare = TextEncoder(VOCAB, DIM, 0, HEADS, dropout=0.25)
    hidden = bare(tokens, types)
    assert 0.15 < float((hidden == 0).float().mean()) < 0.35
    torch.testing.assert_close(hidden[hidden != 0], (bare.embed(tokens, types) / 0.75)[hidden != 0])


# --- errors, folders


def test_errors_say_the_numbers() -> None:
    bare = make(pooler=False, mlm_head=False, nsp_head=False, num_types=0)
    tokens, types, _ = rows()
    hidden = bare(tokens)
    with pytest.raises(ValueError, match=r"without its pooler.*pooler=True"):
        bare.pool(hidden)
    with pytest.raises(ValueError, match=r"without its mlm_head.*mlm_head=True"):
        bare.mlm_logits(hidden)
    with pytest.raises(ValueError, match=r"without its nsp_head"):
        make(nsp_head=False).nsp_logits(hidden)
    with pytest.raises(ValueError, match=r"num_types 0"):
        bare(tokens, types)
    with pytest.raises(ValueError, match=r"needs pooler=True"):
        TextEncoder(VOCAB, DIM, 1, HEADS, pooler=False, nsp_head=True)
    with pytest.raises(ValueError, match=r"30 tokens.*29 positions"):
        bare(torch.zeros(1, 30, dtype=torch.long))
    with pytest.raises(ValueError, match=r"token ids from 3 to 53.*vocabulary of 53"):
        bare(torch.tensor([[3, VOCAB]]))
    with pytest.raises(ValueError, match=r"dim \(20\) must be divisible by num_heads \(3\)"):
        TextEncoder(VOCAB, DIM, 1, 3)


@pytest.mark.parametrize(
    "options", [{}, {"pooler": False, "nsp_head": False, "mlm_head": False, "num_types": 3}], ids=str
)
def test_saved_and_loaded(options: dict[str, Any], tmp_path: Path) -> None:
    encoder, (tokens, types, attention_mask) = make(**options), rows()
    encoder.save_pretrained(tmp_path)
    again = TextEncoder.from_pretrained(tmp_path)
    assert torch.equal(
        again(tokens, types, attention_mask=attention_mask), encoder(tokens, types, attention_mask=attention_mask)
    )
