"""HFDecoder: language models of transformers that TextDecoder cannot be, behind our methods."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from mmtransformer import CaptionBatch, Decoder, HFDecoder, generate
from mmtransformer.serialization.pretrained import to_config

VOCAB, LENGTH = 53, 9
IDS: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE = IDS | {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
LONG = WIDE | {"intermediate_size": 31, "max_position_embeddings": 37}
GEMMA = LONG | {"head_dim": 6, "num_key_value_heads": 2, "sliding_window": 11, "query_pre_attn_scalar": 6}
GPT = IDS | {"n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 37}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt_neox": LONG,
    "bloom": IDS | {"hidden_size": 24, "n_layer": 3, "n_head": 4},
    "mpt": IDS | {"d_model": 24, "n_layers": 3, "n_heads": 4, "max_seq_len": 37},
    "phi": LONG | {"partial_rotary_factor": 0.67},
    "gemma": LONG | {"head_dim": 6, "num_key_value_heads": 2},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "falcon": WIDE,
    "opt": WIDE | {"ffn_dim": 31, "max_position_embeddings": 37, "word_embed_proj_dim": 16,
                   "do_layer_norm_before": False},
    "gpt2": GPT,
    "gptj": GPT | {"rotary_dim": 4},
    "gpt_neo": IDS | {"hidden_size": 24, "num_layers": 3, "num_heads": 4, "max_position_embeddings": 37,
                      "window_size": 5, "attention_types": [[["global", "local", "global"], 1]]},
    "llama": LONG,
    "qwen2": LONG | {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "olmo2": LONG,
    "granite": LONG | {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "cohere": LONG,
    "mixtral": LONG | {"hidden_size": 32, "intermediate_size": 32, "num_local_experts": 3,
                       "num_key_value_heads": 2},
}  # fmt: skip
NO_MASKS = {"bloom"}


def make(family: str, **options: Any) -> HFDecoder:
    torch.manual_seed(1)
    decoder = HFDecoder(CONFIGS[family] | {"model_type": family} | options)
    for parameter in decoder.parameters():
        parameter.data += 0.15 * torch.randn_like(parameter)
    return decoder.eval()


def tokens(rows: int = 4) -> Tensor:
    torch.manual_seed(2)
    return torch.randint(3, VOCAB, (rows, LENGTH))


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_it_is_the_model_bit_for_bit_and_keeps_its_names(family: str) -> None:
    decoder, asked = make(family), tokens()
    assert isinstance(decoder, Decoder)
    assert json.loads(json.dumps(to_config(decoder)))["args"]["config"]["model_type"] == family
    want, names = decoder.model(asked, use_cache=False).logits, list(decoder.model.state_dict())
    assert torch.equal(decoder.head(decoder(asked)), want)
    opened: list[int] = []

    def door(i: int, x: Tensor) -> Tensor:
        opened.append(i)
        assert x.shape == (4, LENGTH, decoder.dim)
        return x + torch.zeros(decoder.dim)

    assert torch.equal(decoder.head(decoder(asked, before_block=door)), want)
    assert opened == list(range(decoder.depth)) == [0, 1, 2]
    moved = decoder.head(decoder(asked, before_block=lambda i, x: x + (i == 1)))
    assert (moved != want).any(-1).all()
    # Nothing is left behind: no hook, no name, and the model on its own is what it was.
    assert not any(module._forward_pre_hooks for module in decoder.modules())
    assert list(decoder.model.state_dict()) == names
    assert torch.equal(decoder.model(asked, use_cache=False).logits, want)
    positions = torch.arange(LENGTH)
    assert torch.equal(decoder.forward_embeds(decoder.embed(asked, positions), positions), decoder(asked))


def test_hooks_are_gone_after_a_door_that_fails() -> None:
    decoder = make("gpt_neox")
    with pytest.raises(KeyError):
        decoder(tokens(), before_block=lambda i, x: {}[i])
    assert not any(module._forward_pre_hooks for module in decoder.modules())


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_padding_changes_nothing_and_caches_neither(family: str) -> None:
    decoder, asked = make(family), tokens()
    attention_mask = torch.ones_like(asked, dtype=torch.bool)
    attention_mask[1, :3] = attention_mask[2, :4] = False
    for real in (attention_mask, attention_mask.flip(1)):
        found = decoder.head(decoder(asked, attention_mask=real))
        for row in range(4):
            close(found[row][real[row]], decoder.head(decoder(asked[row][real[row]][None]))[0])
    whole = decoder.head(decoder(asked, attention_mask=attention_mask))
    state, order = decoder.new_state(LENGTH), torch.tensor([2, 2, 0, 1, 3])
    state.reorder(order[:1])  # nothing yet
    decoder(asked[:, :5], attention_mask=attention_mask[:, :5], state=state)
    state.reorder(order)
    assert state.length == 5
    parts = [decoder(asked[order, i : i + 1], state=state) for i in range(5, LENGTH)]
    close(decoder.head(torch.cat(parts, 1)), whole[order, 5:])
    state = decoder.new_state(LENGTH)  # without padding
    parts = [decoder(asked[:, start:end], state=state) for start, end in ((0, 4), (4, 7), (7, 8), (8, 9))]
    close(torch.cat(parts, 1), decoder(asked))


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(family: str) -> None:
    decoder, asked = make(family), tokens()
    ids = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1]).expand(4, -1)
    if family in NO_MASKS or family == "qwen2":  # whose window of 4 a mask would undo
        with pytest.raises(ValueError, match="ignores masks" if family in NO_MASKS else r"9 tokens.*window of 4"):
            decoder(asked, document_ids=ids)
        return
    packed = decoder(asked, document_ids=ids)
    close(packed[:, :4], decoder(asked[:, :4]))
    close(packed[:, 4:], decoder(asked[:, 4:]))


def test_padding_is_remembered_where_a_mask_was_given() -> None:
    decoder = make("llama")
    tokens, following = torch.randint(3, VOCAB, (2, 5)), torch.randint(3, VOCAB, (2, 1))
    attention_mask = torch.arange(5) >= torch.tensor([0, 2])[:, None]
    seen = []
    for mask in (None, attention_mask[:, None] & torch.ones(5, 5, dtype=torch.bool).tril()):
        state = decoder.new_state(9)
        decoder(tokens, attention_mask=attention_mask, mask=mask, state=state)
        seen.append(decoder(following, state=state))
    torch.testing.assert_close(seen[1], seen[0])


@pytest.mark.parametrize("family", ["gpt_neox", "bloom", "gemma2", "qwen2"])
@pytest.mark.parametrize("beams", [1, 3])
def test_it_writes_what_transformers_generate_writes(family: str, beams: int) -> None:
    decoder, asked = make(family), tokens(3)
    attention_mask = torch.ones_like(asked, dtype=torch.bool)
    attention_mask[1, :4] = False
    asked[~attention_mask] = 0
    found = generate(
        decoder, CaptionBatch(asked, attention_mask, ~attention_mask), eos_id=2, max_new_tokens=8, num_beams=beams
    )
    want = decoder.model.generate(
        asked, attention_mask=attention_mask.long(), max_new_tokens=8, num_beams=beams, do_sample=False, use_cache=True
    )[:, LENGTH:].tolist()
    for (mine,), theirs in zip(found, want, strict=True):
        assert mine.tokens == (theirs[: theirs.index(2)] if 2 in theirs else theirs)


def test_later_tokens_change_no_earlier_one_and_gradients_reach_the_door() -> None:
    decoder, asked = make("gpt_neox"), tokens()
    decoder.requires_grad_(False)
    gate = nn.Parameter(torch.zeros(decoder.dim))
    decoder.head(decoder(asked, before_block=lambda i, x: x + gate)).sum().backward()
    assert gate.grad is not None
    assert gate.grad.abs().sum() > 0
    other = asked.clone()
    other[:, 5:] = 3
    assert torch.equal(decoder(asked)[:, :5], decoder(other)[:, :5])


@pytest.mark.parametrize("family", ["gpt_neox", "bloom", "gemma3_text", "opt"])
def test_saved_and_loaded(family: str, tmp_path: Path) -> None:
    decoder, asked = make(family), tokens()
    decoder.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["class"] == "HFDecoder"
    again = HFDecoder.from_pretrained(tmp_path)
    assert torch.equal(again(asked), decoder(asked))
    assert again.max_len == decoder.max_len == (2048 if family == "bloom" else 37)


def test_a_folder_of_the_hub_is_loaded_strictly(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    decoder, asked = make("gpt_neox"), tokens()
    decoder.model.save_pretrained(tmp_path)
    assert torch.equal(HFDecoder.from_folder(tmp_path)(asked), decoder(asked))
    state = load_file(tmp_path / "model.safetensors")
    first = next(iter(state))
    for wrong, message in (
        ({k: v for k, v in state.items() if k != first}, "missing_keys"),
        (state | {"gpt_neox.layers.9.x": torch.zeros(2)}, "unexpected_keys"),
        (state | {first: torch.zeros(2, 3)}, "mismatch|size"),
    ):
        save_file(wrong, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            HFDecoder.from_folder(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="transformers cannot load it"):
        HFDecoder.from_folder(tmp_path)


def test_code_from_outside_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("raise SystemExit('ran')\n")
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.A", "AutoModelForCausalLM": "mine.B"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="transformers cannot load it"):
        HFDecoder.from_folder(tmp_path)
    with pytest.raises(ValueError, match='family "mine"'):
        HFDecoder(config)


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match='family "nothing"'):
        HFDecoder({"model_type": "nothing"})
    with pytest.raises(ValueError, match='family "None"'):
        HFDecoder({})
    with pytest.raises(ValueError, match='cannot build a language model of the family "clip"'):
        HFDecoder({"model_type": "clip"})
    decoder = make("gpt_neox")
    with pytest.raises(ValueError, match=r"38 tokens.*37 positions"):
        decoder(torch.zeros(1, 38, dtype=torch.long))
    with pytest.raises(ValueError, match=r"38 tokens.*37 positions"):
        decoder.new_state(38)
    with pytest.raises(ValueError, match=r"token ids from 3 to 53.*vocabulary of 53"):
        decoder(torch.tensor([[3, VOCAB]]))
    with pytest.raises(ValueError, match="bool tensors"):
        decoder(tokens(), mask="causal")
    assert HFDecoder(CONFIGS["bloom"] | {"model_type": "bloom"}, max_len=19).max_len == 19


def test_models_without_a_cache_of_tokens_run_but_do_not_decode() -> None:
    config = transformers.MambaConfig(vocab_size=VOCAB, hidden_size=24, num_hidden_layers=2)
    decoder = HFDecoder.from_model(transformers.MambaForCausalLM(config).eval())
    asked = tokens()
    assert torch.equal(decoder.head(decoder(asked)), decoder.model(asked, use_cache=False).logits)
    with pytest.raises(ValueError, match="mamba family keeps a state"):
        decoder.new_state(9)


def test_a_model_whose_logits_are_made_otherwise_is_refused() -> None:
    class Louder(transformers.GPT2LMHeadModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            found = super().forward(*args, **kwargs)
            found.logits = 2 * found.logits
            return found

    config = transformers.GPT2Config(**GPT)
    with pytest.raises(ValueError, match=r"Louder are not its head's.*off by [0-9.]+"):
        HFDecoder.from_model(Louder(config))
