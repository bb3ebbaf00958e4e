"""Language models of transformers against our decoders with the same weights: in memory, in folders, both ways."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from mmtransformer import (
    AttentionConfig,
    Decoder,
    ExtendedDecoder,
    MLPConfig,
    NormConfig,
    PositionConfig,
    TextDecoder,
    Tokenizer,
)
from mmtransformer.backbones.hf.decoder import HFDecoder
from mmtransformer.weights import from_transformers, load_lm, save_lm
from mmtransformer.weights.text.llama import rope_of
from mmtransformer.weights.text.lm import lm_to_transformers

VOCAB, LENGTH = 53, 23
LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 31, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
OPT: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 31,
    "max_position_embeddings": 29, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def rope(kind: str, **numbers: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 700.0, **numbers}}


OLD = {"original_max_position_embeddings": 16}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("OPT", {}),
    "opt, gelu, untied": ("OPT", {"activation_function": "gelu", "tie_word_embeddings": False}),
    "llama": ("Llama", {}),
    "llama 2 with biases, tied": ("Llama", {"attention_bias": True, "tie_word_embeddings": True}),
    "llama, wide heads": ("Llama", {"head_dim": 10}),
    "llama linear": ("Llama", rope("linear", factor=4.0)),
    "llama dynamic": ("Llama", rope("dynamic", factor=4.0)),
    "llama 3": ("Llama", rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, **OLD)),
    "llama yarn": ("Llama", rope("yarn", factor=4.0, **OLD)),
    "llama yarn, all numbers": (
        "Llama",
        rope("yarn", factor=4.0, beta_fast=5.0, beta_slow=2.0, mscale=0.7, mscale_all_dim=1.3, truncate=False, **OLD),
    ),
    "llama longrope": (
        "Llama",
        rope("longrope", factor=4.0, short_factor=[1.0, 1.1, 1.3], long_factor=[1.0, 2.0, 4.0], **OLD),
    ),
    "llama proportional": ("Llama", rope("proportional", factor=2.0, partial_rotary_factor=0.7)),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral with a window": ("Mistral", {"sliding_window": 5}),
    "mistral, heads do not divide": ("Mistral", {"sliding_window": None, "hidden_size": 22, "head_dim": 6}),
    "qwen2": ("Qwen2", {}),
    "qwen2 with a window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
    "qwen3": ("Qwen3", {"head_dim": 10}),
    "qwen3 with biases": ("Qwen3", {"head_dim": 10, "attention_bias": True, "rms_norm_eps": 1e-3}),
    "gemma": ("Gemma", {"head_dim": 10, "tie_word_embeddings": True}),
    "gemma, older": ("Gemma", {"head_dim": 6, "hidden_act": "gelu", "attention_bias": True}),
    "gemma2": ("Gemma2", {"head_dim": 10, "sliding_window": 5, "query_pre_attn_scalar": 13,
                          "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma2 without caps": ("Gemma2", {"head_dim": 6, "sliding_window": 99, "query_pre_attn_scalar": 6,
                                       "attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2, "tie_word_embeddings": True}),
}  # fmt: skip


def make(name: str) -> Any:
    family, options = MODELS[name]
    base = OPT if family == "OPT" else LLAMA
    config = getattr(transformers, f"{family}Config")(**base | options)
    torch.manual_seed(4)
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.15 * torch.randn_like(parameter)
    return theirs


def padded(side: str, rows: int = 4, length: int = LENGTH) -> Tensor:
    attention_mask = torch.ones(rows, length, dtype=torch.bool)
    for row, count in enumerate((0, 5, 11, 1)):
        attention_mask[row, slice(0, count) if side == "left" else slice(length - count, length)] = False
    return attention_mask


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_equal_transformers(name: str) -> None:
    theirs = make(name)
    ours = from_transformers(theirs)
    assert not ours.training
    tokens = torch.randint(3, VOCAB, (4, LENGTH))
    close(ours.head(ours(tokens)), theirs(tokens).logits)
    short = tokens[:, :13]  # within the 16 that scaled models were trained on
    close(ours.head(ours(short)), theirs(short).logits)
    for side in ("left", "right"):
        attention_mask = padded(side)
        given: dict[str, Any] = {"attention_mask": attention_mask.long()}
        if MODELS[name][0] != "OPT":  # OPT takes them from the mask by itself.
            given["position_ids"] = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        found = ours.head(ours(tokens, attention_mask=attention_mask))
        # LongRoPE: transformers chooses factors for the whole batch by its longest row, ours for each row by its own.
        rows = [slice(None)] if "longrope" not in name else [slice(i, i + 1) for i in range(len(tokens))]
        for row in rows:
            want = theirs(tokens[row], **{key: x[row] for key, x in given.items()}).logits
            close(found[row][attention_mask[row]], want[attention_mask[row]])


@pytest.mark.parametrize("name", [name for name in MODELS if "longrope" not in name])  # its angles change with length
@torch.no_grad()
def test_decoding_with_caches_equals_transformers_and_the_whole(name: str) -> None:
    theirs = make(name)
    ours = from_transformers(theirs)
    tokens, attention_mask = torch.randint(3, VOCAB, (4, LENGTH)), padded("left")
    whole = ours.head(ours(tokens, attention_mask=attention_mask))
    state = ours.new_state(LENGTH)
    parts = [ours(tokens[:, :14], attention_mask=attention_mask[:, :14], state=state)]
    parts += [ours(tokens[:, i : i + 1], state=state) for i in range(14, LENGTH)]
    close(ours.head(torch.cat(parts, 1))[attention_mask], whole[attention_mask])
    text = theirs.generate(
        tokens, attention_mask=attention_mask.long(), max_new_tokens=6, min_new_tokens=6, do_sample=False
    )[:, LENGTH:]
    state, new, found = ours.new_state(LENGTH + 6), tokens, []
    for step in range(6):
        logits = ours.head(ours(new, attention_mask=attention_mask if step == 0 else None, state=state)[:, -1])
        logits[:, 2] = -1e9  # the end of sequence
        new = logits.argmax(-1, keepdim=True)
        found.append(new)
    assert torch.cat(found, 1).tolist() == text.tolist()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_way_back(name: str, tmp_path: Path) -> None:
    theirs = make(name)
    ours = from_transformers(theirs)
    save_lm(ours, tmp_path, theirs.config.model_type)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert type(again) is type(theirs)
    tokens = torch.randint(3, VOCAB, (4, LENGTH))
    close(again.eval()(tokens).logits, theirs(tokens).logits)
    same(load_lm(tmp_path), ours)


def same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(a, other.state_dict()[name]) for name, a in one.state_dict().items())


@pytest.mark.parametrize("name", ["opt", "llama 3", "mistral with a window", "qwen2", "qwen3", "gemma2", "smollm3"])
@pytest.mark.parametrize("sharded", [False, True])
@torch.no_grad()
def test_hub_folders_load_without_transformers(name: str, sharded: bool, tmp_path: Path, no_hf: None) -> None:
    theirs = make(name)
    theirs.save_pretrained(tmp_path, max_shard_size="9KB" if sharded else "1GB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 if sharded else (tmp_path / "model.safetensors").is_file()
    tokens = torch.randint(3, VOCAB, (4, LENGTH))
    want = theirs(tokens).logits
    found = load_lm(tmp_path)
    assert isinstance(found, TextDecoder)
    close(found.head(found(tokens)), want)


@pytest.mark.parametrize("name", ["mistral, heads do not divide", "qwen3", "smollm3"])
@torch.no_grad()
def test_the_family_chosen_is_one_that_transformers_takes(name: str, tmp_path: Path) -> None:
    """A Llama's width must be a multiple of its heads there, a Mistral's need not be."""
    theirs = make(name)
    save_lm(from_transformers(theirs), tmp_path)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    tokens = torch.randint(3, VOCAB, (4, LENGTH))
    close(again.eval()(tokens).logits, theirs(tokens).logits)


@pytest.fixture
def no_hf(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing transformers fails, as where the extra is not installed; what this file has imported stays usable."""
    import builtins

    real = builtins.__import__

    def refuse(name: str, scope: Any = None, *rest: Any, **named: Any) -> Any:
        if name.split(".")[0] == "transformers" and (scope or {}).get("__name__", "").startswith("mmtransformer"):
            raise ImportError("no transformers here")
        return real(name, scope, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)


def test_without_transformers_other_families_are_refused_with_the_remedy(tmp_path: Path, no_hf: None) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt_neox"}')
    with pytest.raises(ValueError, match=r'"gpt_neox" is not one of.*gpt2, opt, llama.*pip install transformers'):
        load_lm(tmp_path)


def test_gpt2_folder_and_ours(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=4, n_positions=29)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path / "hub")
    found = load_lm(tmp_path / "hub")
    assert isinstance(found, TextDecoder)
    tokens = torch.randint(VOCAB, (3, 11))
    close(found.head(found(tokens)), theirs(tokens).logits)
    found.save_pretrained(tmp_path / "ours")
    same(load_lm(tmp_path / "ours"), found)


def test_a_model_that_text_decoder_cannot_be_is_a_hub_decoder(tmp_path: Path) -> None:
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "opt-350m": ("OPT", OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
        "window in some layers": ("Qwen2", LLAMA | {"use_sliding_window": True, "max_window_layers": 1}),
        "neox": ("GPTNeoX", {k: v for k, v in LLAMA.items() if k not in ("rms_norm_eps", "num_key_value_heads")}),
    }
    tokens = torch.randint(3, VOCAB, (3, 11))
    for name, (family, options) in cases.items():
        config = getattr(transformers, f"{family}Config")(**options)
        theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
        theirs.save_pretrained(tmp_path / name)
        found = load_lm(tmp_path / name)
        assert isinstance(found, HFDecoder), name
        assert torch.equal(found.head(found(tokens)), theirs(tokens).logits), name
        with pytest.raises(ValueError, match=r"HFDecoder|TextDecoder"):
            from_transformers(theirs)


def test_recipes_build_an_extended_language_model_and_its_tokenizer(tmp_path: Path) -> None:
    from jsonargparse import ArgumentParser

    tokenizer = Tokenizer.train(["a red star", "빨간 별"], 300)
    decoder = TextDecoder(tokenizer.vocab_size, 24, 2, 4, max_len=29)
    save_lm(decoder, tmp_path, tokenizer=tokenizer)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["pad_token_id"], config["bos_token_id"], config["eos_token_id"]) == (0, 1, 2)

    def build(decoder: Decoder, tokenizer: Tokenizer | str) -> tuple[Any, Any]:
        return decoder, tokenizer

    parser, source = ArgumentParser(), str(tmp_path)
    parser.add_function_arguments(build)
    languages = {"source": source, "languages": ["en", "ko"]}
    given = {
        "decoder": {"class_path": "mmtransformer.weights.load_lm", "init_args": {"source": source, "new_tokens": 2}},
        "tokenizer": {"class_path": "mmtransformer.weights.load_tokenizer", "init_args": languages},
    }
    built = parser.instantiate(parser.parse_object(given))
    assert isinstance(built.decoder, ExtendedDecoder)
    assert built.decoder.vocab_size == built.tokenizer.vocab_size == tokenizer.vocab_size + 2
    same(built.decoder.decoder, decoder)
    assert built.tokenizer.prompt("ko") == [1, tokenizer.vocab_size + 1]


# --- what is refused


def folder(path: Path, name: str = "llama") -> tuple[Path, dict[str, Any]]:
    make(name).save_pretrained(path)
    return path, json.loads((path / "config.json").read_text())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, r"only 0\.5 of a head's"),
        ({"rope_parameters": {"a": {"rope_type": "default"}, "b": None}}, "different rotary positions"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"rope_parameters": {"rope_type": "new"}}, 'unknown rope_type "new"'),
        ({"hidden_size": "wide"}, "dim must be a whole number, not 'wide'"),
        ({"num_attention_heads": 0, "head_dim": None}, "num_heads must be at least 1, not 0"),
        ({"model_type": ["llama"]}, 'nor "model_type"'),
        ({"num_hidden_layers": 2}, r"unknown: model\.layers\.2\..*\(9 in all\)"),
        ({"num_hidden_layers": 4}, r"missing: model\.layers\.3\..*\(9 in all\)"),
        ({"vocab_size": 54}, r"\(53, 24\), the model wants \(54, 24\)"),
    ],
    ids=str,
)  # fmt: skip
def test_configs_that_do_not_fit_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path, no_hf: None
) -> None:
    path, config = folder(tmp_path)
    (path / "config.json").write_text(json.dumps(config | options))
    with pytest.raises(ValueError, match=message):
        load_lm(path)


def test_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        load_lm(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        load_lm(tmp_path)
    path, config = folder(tmp_path / "a")
    (path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r'neither "class".*nor "model_type"'):
        load_lm(path)
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: cut short, or not a file of torch 1\.6 or later"):
        load_lm(path)
    index = path / "model.safetensors.index.json"
    for text, message in (
        ("{}", 'no "weight_map"'),
        ('{"weight_map": {"a": "../b.safetensors"}}', r"\.\./b\.safetensors, which is not a file of this folder"),
        (
            '{"weight_map": {"a": "b.safetensors"}}',
            r"lacks 1 of 1 file that model\.safetensors\.index\.json names, b\.safetensors the first",
        ),
    ):
        index.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_lm(path)
    (path / "pytorch_model.bin").rename(path / "b.safetensors")
    index.write_text('{"weight_map": {"a": "b.safetensors", "model.norm.weight": "b.safetensors"}}')
    with pytest.raises(ValueError, match=r"no shard has a \(1 in all\)"):
        load_lm(path)
    shutil.rmtree(path)
    from mmtransformer import ViT

    ViT(16, 8, 20, 1, 4).save_pretrained(path)
    with pytest.raises(ValueError, match="holds a ViT, not a language model"):
        load_lm(path)


def test_tied_weights_that_differ_are_refused() -> None:
    theirs = make("llama 2 with biases, tied")
    state = dict(theirs.state_dict())
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    from mmtransformer.weights.text.lm import decoder_from_state

    with pytest.raises(ValueError, match=r"my file: .* ties lm_head\.weight to model\.embed_tokens\.weight, but"):
        decoder_from_state(theirs.config.to_dict(), state, "my file")


LLAMA_GROUPS: dict[str, Any] = {
    "attention": AttentionConfig(bias=False),
    "mlp": MLPConfig("swiglu", bias=False),
    "norm": NormConfig("rms"),
    "positions": PositionConfig("rotary"),
}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": PositionConfig("rotary")}, "rotary"),
        (LLAMA_GROUPS | {"attention": AttentionConfig(out_bias=False, qk_norm="rms")}, "out_bias=False"),
        (LLAMA_GROUPS | {"context_dim": 19}, "context_dim 19"),
        ({"norm": NormConfig(pre=False)}, "pre=False"),
    ],
    ids=str,
)
def test_decoders_of_no_family_are_not_written(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        save_lm(TextDecoder(53, 24, 2, 4, max_len=29, **options), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_gpt2_or_opt_as_asked() -> None:
    decoder = TextDecoder(53, 24, 2, 4, max_len=29, mlp=MLPConfig("relu"))
    assert lm_to_transformers(decoder)[0]["model_type"] == "opt"
    assert lm_to_transformers(decoder, "gpt2")[0]["model_type"] == "gpt2"
    assert lm_to_transformers(TextDecoder(53, 24, 2, 4))[0]["model_type"] == "gpt2"
    with pytest.raises(ValueError, match='cannot be written as "qwen3"; it can be as opt, gpt2'):
        lm_to_transformers(decoder, "qwen3")


def test_rope_in_old_and_new_spelling() -> None:
    base = {"model_type": "llama", "max_position_embeddings": 64}
    assert rope_of(base, "") == (1e4, None)
    assert rope_of(base | {"rope_theta": 5e5, "rope_scaling": None}, "") == (5e5, None)
    old = base | {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = base | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}}
    assert rope_of(old, "")[0] == rope_of(new, "")[0] == 5e5
    assert (rope_of(old, "")[1] or {})["rope_type"] == (rope_of(new, "")[1] or {})["rope_type"] == "linear"
    yarn = base | {"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 16}}
    assert (rope_of(yarn, "")[1] or {})["factor"] == 4.0


def test_angles_stay_float32_in_a_model_of_bfloat16() -> None:
    ours = from_transformers(make("llama yarn"))
    rotary = ours.rotary
    assert rotary is not None
    positions = torch.arange(60)
    want = rotary(positions).sin
    ours.bfloat16()
    assert ours.blocks[0].attn.q_proj.weight.dtype == torch.bfloat16
    assert torch.equal(rotary(positions).sin, want)
    assert (ours(torch.randint(3, VOCAB, (2, LENGTH))).float()).isfinite().all()


def test_windows_forget_and_stay_within_packed_documents() -> None:
    ours = from_transformers(make("mistral with a window"))
    tokens = torch.randint(3, VOCAB, (2, LENGTH))
    other = tokens.clone()
    other[:, 0] = (other[:, 0] + 1) % VOCAB
    reach = 3 * (5 - 1)  # depth times what a window adds
    changed = (ours(tokens) != ours(other)).any(-1)
    assert changed[:, : reach + 1].all()
    assert not changed[:, reach + 1 :].any()
    document_ids = (torch.arange(LENGTH) >= 9).long().expand(2, -1)
    packed = ours(tokens, document_ids=document_ids)
    close(packed[:, :9], ours(tokens[:, :9]))
    close(packed[:, 9:], ours(tokens[:, 9:]))


@pytest.mark.skipif("MMT_DATA" not in os.environ, reason="MMT_DATA names no folder of real data")
def test_a_real_tiny_llama_tells_transformers_story() -> None:
    path = Path(os.environ["MMT_DATA"]) / "weights" / "stories260k"
    ours, tokenizer = load_lm(path), Tokenizer.from_pretrained(path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path)
    prompt = torch.tensor([[tokenizer.bos_id, *tokenizer.encode("Once upon a time")]])
    count = 200
    want = theirs.generate(prompt, max_new_tokens=count, do_sample=False, eos_token_id=None)[0].tolist()
    state, new, found = ours.new_state(prompt.shape[1] + count), prompt, prompt[0].tolist()
    with torch.no_grad():
        for _ in range(count):
            new = ours.head(ours(new, state=state)[:, -1]).argmax(-1, keepdim=True)
            found.append(int(new))
    assert found == want
    print(tokenizer.decode(found), file=sys.stderr)
