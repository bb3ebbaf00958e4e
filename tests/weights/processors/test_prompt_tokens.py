"""Prompts' ids are transformers': of folders with a slow tokenizer alone, and where a class is not as its file says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from mmtransformer.weights.processors.tokens import PromptTokenizer
from support.dual import clip_vocabulary
from support.public import WORDS, byte_level, word_pieces

TEXTS = [
    "a photo of two dogs", "<image> a Photo, of é  two!", "what is this?</s> more", "[SEP] hi [MASK]", "",
    " leading  spaces\nand lines", "<image><image> 사진 <extra>word",
]  # fmt: skip


def said(path: Path, model_type: str, **config: Any) -> None:
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "config.json").write_text(json.dumps({"model_type": model_type}))


def llama(path: Path, model_type: str = "instructblip", name: str | None = "LlamaTokenizer", **config: Any) -> None:
    """A Llama's tokenizer.json as older versions wrote it: "▁" by a normalizer."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    specials = ["<unk>", "<s>", "</s>", *pieces]
    backend.train_from_iterator(
        WORDS * 3, trainers.BpeTrainer(vocab_size=370, special_tokens=specials, show_progress=False)
    )
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in pieces]
    backend = Tokenizer.from_str(json.dumps(state))
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens([AddedToken("<image>", normalized=False, special=True)])
    backend.save(str(path / "tokenizer.json"))
    named = {} if name is None else {"tokenizer_class": name}
    said(path, model_type, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **named, **config)


def gpt2(path: Path, **config: Any) -> None:
    byte_level(["<|endoftext|>", "<pad>", "</s>"]).model.save(str(path))
    ends = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    said(path, "blip-2", tokenizer_class="GPT2Tokenizer", **ends, **config)


def bert(path: Path, **config: Any) -> None:
    word_pieces().model.save(str(path))
    said(path, "blip", tokenizer_class="BertTokenizer", **config)


def otherwise(path: Path, backend: Tokenizer, model_type: str, **config: Any) -> None:
    """A tokenizer.json that says otherwise than tokenizer_config.json, which is what transformers follows."""
    backend.save(str(path / "tokenizer.json"))
    said(path, model_type, **config)


def cased() -> Tokenizer:
    backend = word_pieces()
    backend.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return backend


def added(path: Path, size: int) -> dict[str, Any]:
    """Tokens behind the vocabulary, as the published folders list them."""
    (path / "added_tokens.json").write_text(json.dumps({"<image>": size, "<extra>": size + 1}))
    return {
        "added_tokens_decoder": {
            str(size): {"content": "<image>", "special": True, "normalized": False},
            str(size + 1): {"content": "<extra>", "special": False, "normalized": False},
        }
    }


def clip(path: Path) -> None:
    vocab, merges = clip_vocabulary()
    models.BPE(vocab, merges).save(str(path))
    ends = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    said(path, "clip", tokenizer_class="CLIPTokenizer", **ends)


CASES: dict[str, Callable[[Path], None]] = {
    "llama": llama,
    "llama, legacy": lambda path: llama(path, legacy=True),
    "llama, not legacy": lambda path: llama(path, legacy=False),
    "llama, no space before": lambda path: llama(path, add_prefix_space=False),
    "llama, as a fast one": lambda path: llama(path, name="LlamaTokenizerFast"),
    "idefics names no class": lambda path: llama(path, "idefics", None),
    "llava takes the file as it is": lambda path: llama(path, "llava"),
    "llava_onevision follows the class": lambda path: llama(path, "llava_onevision"),
    "so does idefics3": lambda path: llama(path, "idefics3"),
    "a bert's capitals": lambda path: otherwise(path, cased(), "git"),
    "a bert's accents": lambda path: otherwise(
        path, cased(), "x", tokenizer_class="BertTokenizer", strip_accents=False
    ),
    "a gpt2's space": lambda path: otherwise(
        path, byte_level(["<|endoftext|>"]), "x", tokenizer_class="GPT2TokenizerFast", add_prefix_space=True
    ),
    "a plain fast one": lambda path: llama(path, name="PreTrainedTokenizerFast"),
    "gpt2": gpt2,
    "opt: bos before a text": lambda path: gpt2(path, add_bos_token=True),
    "gpt2, a space before": lambda path: gpt2(path, add_prefix_space=True),
    "gpt2, more tokens": lambda path: gpt2(path, **added(path, 330)),
    "clip": clip,
    "bert": bert,
    "bert, cased": lambda path: bert(path, do_lower_case=False),
    "bert, accents stay": lambda path: bert(path, strip_accents=False),
}


@pytest.mark.parametrize("case", CASES)
def test_ids_are_transformers(case: str, tmp_path: Path) -> None:
    CASES[case](tmp_path)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), PromptTokenizer(tmp_path)
    for text in TEXTS:
        assert ours(text) == theirs(text).input_ids, text
        assert ours(text, special=False) == theirs(text, add_special_tokens=False).input_ids, text


def test_what_cannot_be_built_is_refused_by_name(tmp_path: Path) -> None:
    gpt2(tmp_path)
    said(tmp_path, "roberta", tokenizer_class="RobertaTokenizer")
    remedy = r"AutoTokenizer\.from_pretrained\(FOLDER\)\.save_pretrained\(FOLDER\) writes a tokenizer\.json"
    with pytest.raises(ValueError, match=f"vocab.json with merges.txt of a RobertaTokenizer is read .*{remedy}"):
        PromptTokenizer(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e")
    with pytest.raises(
        ValueError, match=f"tokenizer.model is SentencePiece's file, of which only a Llama's is read here, .*{remedy}"
    ):
        PromptTokenizer(tmp_path)


def test_ids_with_gaps_are_refused(tmp_path: Path) -> None:
    gpt2(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | added(tmp_path, 340)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="'<image>' is listed with the id 340, and gets 330 behind the vocabulary"):
        PromptTokenizer(tmp_path)
