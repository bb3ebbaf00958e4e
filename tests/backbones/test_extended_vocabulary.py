"""ExtendedDecoder: new rows learn, no other bit moves, and the whole can be merged, saved and written as hubs do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmtransformer import (
    AttentionConfig,
    Decoder,
    ExtendedDecoder,
    HFDecoder,
    MLPConfig,
    NormConfig,
    PositionConfig,
    TextDecoder,
)
from mmtransformer.layers.modes import freeze
from mmtransformer.weights import load_lm, save_lm

VOCAB, NEW = 53, 3
GEMMA: dict[str, Any] = {
    "model_type": "gemma3_text", "vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2, "pad_token_id": 0,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "intermediate_size": 31,
    "max_position_embeddings": 37, "final_logit_softcapping": 3.0,
}  # fmt: skip
NEOX: dict[str, Any] = {
    "model_type": "gpt_neox", "vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "intermediate_size": 31, "max_position_embeddings": 37, "tie_word_embeddings": False,
}  # fmt: skip
INNER = {
    "tied": lambda: TextDecoder(VOCAB, 24, 2, 4, max_len=29, dropout=0.3),
    "free": lambda: TextDecoder(VOCAB, 24, 2, 4, max_len=29, tied=False),
    "scaled": lambda: TextDecoder(VOCAB, 24, 2, 4, max_len=29, positions=PositionConfig("sinusoidal", embed_scale=5.0)),
    "llama": lambda: TextDecoder(
        VOCAB,
        24,
        2,
        4,
        max_len=29,
        attention=AttentionConfig(bias=False),
        mlp=MLPConfig("swiglu", bias=False),
        norm=NormConfig("rms"),
        positions=PositionConfig("rotary"),
        tied=False,
    ),
    "gemma": lambda: HFDecoder(GEMMA),
    "neox": lambda: HFDecoder(NEOX),
}


def make(kind: str = "tied", new: int = NEW, **options: Any) -> ExtendedDecoder:
    torch.manual_seed(3)
    inner = INNER[kind]()
    for parameter in inner.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return ExtendedDecoder(inner, new, **options).eval()


def tokens(model: Decoder) -> Tensor:
    torch.manual_seed(4)
    found = torch.randint(3, VOCAB, (4, 7))
    found[0, 2], found[1, 5], found[2, 0] = VOCAB, VOCAB + 2, VOCAB + 1
    return found % model.vocab_size


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", INNER)
def test_old_tokens_are_read_and_scored_as_before(kind: str) -> None:
    model = make(kind)
    old = tokens(model) % VOCAB
    assert torch.equal(model(old), model.decoder(old))
    logits = model.head(model(old))
    assert logits.shape == (4, 7, VOCAB + NEW)
    assert torch.equal(logits[..., :VOCAB], model.decoder.head(model.decoder(old)))


@pytest.mark.parametrize("kind", INNER)
@pytest.mark.parametrize("first", [None, VOCAB - 2, 5])
def test_merged_it_is_one_decoder_with_a_larger_table(kind: str, first: int | None) -> None:
    model = make(kind, first=first)
    size = VOCAB + {None: NEW, VOCAB - 2: 1, 5: 0}[first]
    assert model.vocab_size == size
    whole = model.merged()
    assert type(whole) is type(model.decoder)
    assert whole.vocab_size == size
    asked = torch.cat((tokens(model), torch.arange(7)[None] + model.first - 2), 0) % size
    close(whole.head(whole(asked)), model.head(model(asked)))
    assert torch.equal(whole.embedding_weights[0][model.first : model.first + NEW], model.new_embed.weight)
    assert torch.equal(whole.embedding_weights[0], model.embedding_weights[0])
    assert torch.equal(whole.embedding_weights[1], model.embedding_weights[1])
    assert (whole.embedding_weights[0] is whole.embedding_weights[1]) == (model.new_head is None)


@pytest.mark.parametrize("kind", INNER)
def test_frozen_means_all_but_the_new_rows(kind: str) -> None:
    model = freeze(make(kind))
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {"new_embed.weight"} | ({"new_head.weight"} if model.new_head is not None else set())
    model.train()
    assert model.training
    assert not any(module.training for module in model.decoder.modules())
    before = {name: tensor.clone() for name, tensor in model.decoder.state_dict().items()}
    new = model.new_embed.weight.detach().clone()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1, weight_decay=0.1)
    asked = tokens(model)
    losses = []
    for _ in range(8):
        logits = model.head(model(asked[:, :-1]))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), asked[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.decoder.state_dict().items())
    assert (model.new_embed.weight != new).any(1).all()
    model.requires_grad_(True).train()
    assert all(module.training for module in model.modules())


def test_new_rows_begin_near_the_mean() -> None:
    model = make(new=200)
    table, new = model.decoder.embedding_weights[0], model.new_embed.weight
    assert (new.mean(0) - table.mean(0)).abs().max() < 0.05 * table.std()
    assert (new.std(0) / table.std(0)).mean().item() == pytest.approx(0.1, rel=0.2)


@pytest.mark.parametrize("kind", ["tied", "llama", "neox"])
def test_decoding_goes_through(kind: str) -> None:
    model = make(kind)
    asked = tokens(model)
    attention_mask = torch.ones_like(asked, dtype=torch.bool)
    attention_mask[1, :3] = False
    state = model.new_state(7)
    parts = [model(asked[:, :4], attention_mask=attention_mask[:, :4], state=state)]
    parts += [model(asked[:, i : i + 1], state=state) for i in range(4, 7)]
    close(torch.cat(parts, 1)[attention_mask], model(asked, attention_mask=attention_mask)[attention_mask])
    opened: list[int] = []
    model(asked, before_block=lambda i, x: opened.append(i) or x)
    assert opened == [0, 1]


@pytest.mark.parametrize("kind", INNER)
def test_saved_loaded_and_written_for_transformers(kind: str, tmp_path: Path) -> None:
    model = make(kind, first=VOCAB - 1)
    model.save_pretrained(tmp_path / "ours")
    again = load_lm(tmp_path / "ours")
    assert isinstance(again, ExtendedDecoder)
    asked = tokens(model)
    assert torch.equal(again.head(again(asked)), model.head(model(asked)))
    if kind in ("tied", "llama"):
        save_lm(model.merged(), tmp_path / "hub")
        hub = load_lm(tmp_path / "hub")
        assert hub.vocab_size == VOCAB - 1 + NEW
        close(hub.head(hub(asked)), model.head(model(asked)))


def test_it_is_built_around_weights_that_are_yet_to_be_read() -> None:
    """Reading a folder builds the model in memory as it comes, which now and then holds NaN."""
    inner = INNER["tied"]()
    with torch.no_grad():
        for parameter in inner.parameters():
            parameter.fill_(float("nan"))
    assert ExtendedDecoder(inner, 2).vocab_size == VOCAB + 2


def test_errors_name_the_numbers() -> None:
    for new, first, message in (
        (0, None, r"new_tokens \(0\)"),
        (2, 54, r"first \(54\).*\(0 to 53\)"),
        (2, -1, r"first \(-1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            ExtendedDecoder(INNER["tied"](), new, first=first)
    with pytest.raises(ValueError, match=r"token ids from 3 to 56.*vocabulary of 53"):
        make()(torch.tensor([[3, VOCAB + NEW]]))
