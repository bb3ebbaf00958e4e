"""Tokenizers as transformers reads them: for prompts, where special tokens of a template are tokens, not text."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from mmtransformer.text.tokenizer_files import read_backend, read_settings

_AS_WRITTEN = ("llava", "llava_next", "vipllava", "smolvlm", "qwen2", "siglip2")
"""Model types whose tokenizer.json transformers takes as it is."""
_REBUILT = ("LlamaTokenizer", "BertTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer")
_USUAL = {"idefics": "LlamaTokenizer", "blip": "BertTokenizer", "git": "BertTokenizer"} | dict.fromkeys(
    ("blip-2", "instructblip"), "GPT2Tokenizer"
)
"""The class where the files name none."""


def _as_class(backend: tokenizers.Tokenizer, settings: Mapping[str, Mapping[str, Any]]) -> tokenizers.Tokenizer:
    """A tokenizer as its class in transformers has it, which is not always what its tokenizer.json says.

    transformers 5 takes vocabulary, merges, added tokens and what stands around a text from the file. What is done to a
    text before it is cut it takes from tokenizer_config.json: a Llama's "▁" before a text (`legacy`: before every piece
    between special tokens), whether a BERT lowers capitals, whether a GPT-2 reads a text as behind a space.
    """
    config = settings.get("tokenizer_config.json", {})
    name, kind = config.get("tokenizer_class"), settings.get("config.json", {}).get("model_type")
    name = str(name or _USUAL.get(str(kind))).removesuffix("Fast")
    if kind in _AS_WRITTEN or name not in _REBUILT:
        return backend
    state, spaced = json.loads(backend.to_str()), config.get("add_prefix_space")
    bytewise = "ByteLevel" in str(state)
    if name == "BertTokenizer":
        state["normalizer"] = {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": config.get("tokenize_chinese_chars", True),
            "strip_accents": config.get("strip_accents"),
            "lowercase": config.get("do_lower_case", True),
        }
    elif name == "LlamaTokenizer" and not bytewise:
        scheme = "never" if spaced is False else "always" if config.get("legacy") else "first"
        state["normalizer"], state["model"]["unk_token"] = None, None
        state["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    elif name != "LlamaTokenizer" and bytewise:
        steps = state["pre_tokenizer"].get("pretokenizers", [state["pre_tokenizer"]])
        steps[-1]["add_prefix_space"] = bool(spaced)
    return tokenizers.Tokenizer.from_str(json.dumps(state))


class PromptTokenizer:
    """Turns prompts into ids as transformers does: "<image>" in a prompt is one token, and bos comes by itself.

    It can be pickled, so it travels to data-loading workers.

    Args:
        folder: holds the tokenizer's files.

    Raises:
        ValueError: as `read_backend`.
    """

    def __init__(self, folder: Path) -> None:
        settings = read_settings(folder)
        self.backend: tokenizers.Tokenizer = _as_class(read_backend(folder, settings), settings)
        self.backend.no_truncation()
        self.backend.no_padding()

    def __call__(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of a prompt.

        Args:
            text: the prompt.
            special: whether the tokenizer puts its own tokens around it (bos, [CLS], ...).
        """
        return self.backend.encode(text, add_special_tokens=special).ids
