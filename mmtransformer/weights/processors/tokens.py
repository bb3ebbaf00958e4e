"""Tokenizers as transformers reads them: for prompts, where special tokens of a template are tokens, not text."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from mmtransformer.text.tokenizer_files import read_backend, read_settings

_AS_WRITTEN = ("llava", "llava_next", "llava_onevision", "vipllava", "smolvlm", "idefics3", "qwen2", "siglip2")
"""Model types whose tokenizer.json transformers takes as it is."""


def _as_class(backend: tokenizers.Tokenizer, settings: Mapping[str, Mapping[str, Any]]) -> tokenizers.Tokenizer:
    """A tokenizer as its class in transformers has it, which is not always what its tokenizer.json says.

    Of a LlamaTokenizer, transformers 5 takes vocabulary, merges, added tokens and what stands around a text from the
    file, and puts "▁" before a text (`legacy`: before every piece between special tokens) itself.
    """
    config = settings.get("tokenizer_config.json", {})
    name, kind = config.get("tokenizer_class"), settings.get("config.json", {}).get("model_type")
    name = "LlamaTokenizer" if name is None and kind == "idefics" else name
    state = json.loads(backend.to_str())
    if str(name).removesuffix("Fast") != "LlamaTokenizer" or kind in _AS_WRITTEN or "ByteLevel" in str(state):
        return backend
    spaced, legacy = config.get("add_prefix_space"), bool(config.get("legacy", False))
    scheme = "never" if spaced is False else "always" if legacy else "first"
    state["normalizer"], state["model"]["unk_token"] = None, None
    state["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
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
