"""Tokenizers as transformers reads them: for prompts, where special tokens of a template are tokens, not text."""

from pathlib import Path

import tokenizers

from mmtransformer.text.tokenizer_files import read_backend, read_settings


class PromptTokenizer:
    """Turns prompts into ids as transformers does: "<image>" in a prompt is one token, and bos comes by itself.

    It can be pickled, so it travels to data-loading workers.

    Args:
        folder: holds the tokenizer's files.

    Raises:
        ValueError: as `read_backend`.
    """

    def __init__(self, folder: Path) -> None:
        self.backend: tokenizers.Tokenizer = read_backend(folder, read_settings(folder))
        self.backend.no_truncation()
        self.backend.no_padding()

    def __call__(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of a prompt.

        Args:
            text: the prompt.
            special: whether the tokenizer puts its own tokens around it (bos, [CLS], ...).
        """
        return self.backend.encode(text, add_special_tokens=special).ids
