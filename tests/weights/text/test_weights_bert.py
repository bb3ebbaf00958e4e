"""Weights of transformers' BERT: small random models against ours with the same weights, both ways."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmtransformer import TextDecoder
from mmtransformer.weights import from_transformers, load_bert
from mmtransformer.weights.text.bert import encoder_to_bert


def bert(kind: str = "BertForPreTraining", **options: Any) -> Any:
    import transformers

    small: dict[str, Any] = {
        "vocab_size": 53, "hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 5,
        "intermediate_size": 37, "max_position_embeddings": 29, "type_vocab_size": 3,
    }  # fmt: skip
    model = getattr(transformers, kind)(transformers.BertConfig(**small | options))
    for parameter in model.parameters():
        parameter.data += 0.15 * torch.randn_like(parameter)
    return model.eval()


def rows() -> tuple[Tensor, Tensor, Tensor]:
    tokens, types = torch.randint(53, (3, 11)), torch.randint(3, (3, 11))
    return tokens, types, torch.arange(11) < torch.tensor([11, 7, 3])[:, None]


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3, "type_vocab_size": 1}, {"hidden_act": "relu"}],
    ids=str,
)
@torch.no_grad()
def test_encoder_equals_bert_both_ways(options: dict[str, Any]) -> None:
    theirs, (tokens, types, attention_mask) = bert(**options), rows()
    types = types.clamp(max=options.get("type_vocab_size", 3) - 1)
    ours = from_transformers(theirs)
    assert not ours.training
    given = {"input_ids": tokens, "token_type_ids": types, "attention_mask": attention_mask.long()}
    want = theirs(**given)
    hidden = ours(tokens, types, attention_mask=attention_mask)
    close(hidden[attention_mask], theirs.bert(**given).last_hidden_state[attention_mask])
    close(ours.pool(hidden), theirs.bert(**given).pooler_output)
    close(ours.mlm_logits(hidden)[attention_mask], want.prediction_logits[attention_mask])
    close(ours.nsp_logits(hidden), want.seq_relationship_logits)
    close(ours.mlm_logits(ours(tokens)), theirs(tokens).prediction_logits)
    other = bert(**options)
    other.load_state_dict(encoder_to_bert(ours))  # strict: every tensor, and none besides
    close(other(**given).prediction_logits, want.prediction_logits)
    again = from_transformers(other)
    pairs = zip(again.state_dict().values(), ours.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@torch.no_grad()
def test_left_padding_equals_bert_with_its_positions_said() -> None:
    theirs, (tokens, types, attention_mask) = bert(), rows()
    attention_mask = attention_mask.flip(1)
    positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    want = theirs.bert(tokens, attention_mask.long(), types, positions).last_hidden_state
    close(from_transformers(theirs)(tokens, types, attention_mask=attention_mask)[attention_mask], want[attention_mask])


@pytest.mark.parametrize(
    ("kind", "heads"),
    [
        ("BertModel", (True, False, False)),
        ("BertForMaskedLM", (False, True, False)),
        ("BertForNextSentencePrediction", (True, False, True)),
    ],
)
@torch.no_grad()
def test_other_berts_bring_the_heads_they_have(kind: str, heads: tuple[bool, ...]) -> None:
    theirs, (tokens, types, attention_mask) = bert(kind), rows()
    ours = from_transformers(theirs)
    assert (ours.pooler, ours.mlm_head, ours.nsp_head) == heads
    hidden = ours(tokens, types, attention_mask=attention_mask)
    found = theirs(tokens, attention_mask.long(), types)
    if kind == "BertModel":
        close(hidden[attention_mask], found.last_hidden_state[attention_mask])
        assert set(encoder_to_bert(ours)) == {f"bert.{name}" for name in theirs.state_dict()}
    elif kind == "BertForMaskedLM":
        close(ours.mlm_logits(hidden)[attention_mask], found.logits[attention_mask])
    else:
        close(ours.nsp_logits(hidden), found.logits)


def test_berts_that_do_not_fit_are_refused_by_name() -> None:
    for options, message in (
        ({"hidden_act": "tanh"}, "no activation like tanh"),
        ({"is_decoder": True}, "is a decoder"),
        ({"tie_word_embeddings": False}, "MLM head of its own"),
        ({"position_embedding_type": "relative_key"}, '"relative_key" positions'),
    ):
        with pytest.raises(ValueError, match=message):
            from_transformers(bert(**options))
    with pytest.raises(ValueError, match=r"unknown: classifier\.bias, classifier\.weight \(2 in all\)"):
        from_transformers(bert("BertForSequenceClassification"))
    with pytest.raises(ValueError, match="Linear is not a model of transformers that is read here"):
        from_transformers(nn.Linear(2, 3))


# --- load_bert


@torch.no_grad()
def test_load_encoder_from_folders(tmp_path: Path) -> None:
    theirs, (tokens, types, attention_mask) = bert(), rows()
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load_bert(str(tmp_path / "theirs"))
    want = theirs(tokens, attention_mask.long(), types).prediction_logits
    close(loaded.mlm_logits(loaded(tokens, types, attention_mask=attention_mask))[attention_mask], want[attention_mask])
    loaded.save_pretrained(tmp_path / "ours")
    again = load_bert(str(tmp_path / "ours"))
    assert torch.equal(again(tokens, types), loaded(tokens, types))
    assert again.mlm_head
    assert again.nsp_head


@torch.no_grad()
def test_names_of_the_first_releases(tmp_path: Path) -> None:
    """gamma and beta, a buffer of positions, and a config that says less."""
    theirs, (tokens, _, _) = bert(), rows()
    old = {}
    for name, tensor in theirs.state_dict().items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        old[name] = tensor.clone()
    del old["cls.predictions.decoder.weight"], old["cls.predictions.decoder.bias"]
    old["bert.embeddings.position_ids"] = torch.arange(29)[None]
    save_file(old, tmp_path / "model.safetensors")
    keys = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    config = {key: getattr(theirs.config, key) for key in (*keys, "max_position_embeddings", "type_vocab_size")}
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "bert"}), "utf-8")
    ours = load_bert(str(tmp_path))
    close(ours.mlm_logits(ours(tokens)), theirs(tokens).prediction_logits)


def test_load_encoder_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no/such/folder: no such folder"):
        load_bert("no/such/folder")
    TextDecoder(53, 24, 1, 4).save_pretrained(tmp_path / "decoder")
    with pytest.raises(ValueError, match="holds a TextDecoder, not a TextEncoder"):
        load_bert(str(tmp_path / "decoder"))
    (tmp_path / "config.json").write_text('{"model_type": "roberta"}', "utf-8")
    with pytest.raises(ValueError, match=r'config\.json: model_type is "roberta", not "bert"'):
        load_bert(str(tmp_path))
    bert().save_pretrained(tmp_path)
    state = {k: v for k, v in bert().state_dict().items() if "layer.1.output.dense" not in k and "decoder" not in k}
    save_file({k: v.clone() for k, v in state.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: bert\.encoder\.layer\.1\.output\.dense\.weight.*\(2 in all\)"):
        load_bert(str(tmp_path))
