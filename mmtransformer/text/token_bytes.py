"""Which bytes each token of a tokenizer stands for, in the four ways that tokenizers write them."""

import re
import unicodedata
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import tokenizers

_HEX_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes(dict[int, bytes]):
    """The bytes of each id, told by its token when they are first asked for; none for an id without a token.

    Tokens are byte letters (GPT-2), or have "▁" (SentencePiece), "##" (BERT) or "</w>" (CLIP).

    Args:
        backend: Knows each id's token.
        description: The parsed `tokenizer.json`.
        added: The content of each added token: it stands for itself.
    """

    def __init__(self, backend: tokenizers.Tokenizer, description: dict[str, Any], added: dict[int, str]):
        super().__init__()
        self.backend, self.added = backend, added
        steps = list(_steps(description.get("decoder")))
        types = {step["type"] for step in steps}
        model = description["model"]
        self.suffix = model.get("end_of_word_suffix") or ""
        self.prefix = model.get("continuing_subword_prefix") or ""
        if "ByteLevel" in types:
            self.kind = "bytes"
        elif types & {"Metaspace", "ByteFallback", "Replace"}:
            self.kind = "sentencepiece"
        elif "WordPiece" in types or not types:
            self.kind = "words"
        elif "BPEDecoder" in types:
            self.kind = "suffix"
        else:
            raise ValueError(
                f"tokenizer.json: decoder {sorted(types)} is not one of ByteLevel, Metaspace, WordPiece, BPEDecoder"
            )
        self.strips_space = self.kind == "words" or any(
            (step["type"] == "Strip" and step["content"] == " " and step["start"] > 0)
            or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
            for step in steps
        )
        self.strips_end = bool(self.suffix)  # the space of the last word's "</w>"
        self.table = _byte_table()
        norm, apart = backend.normalizer, unicodedata.normalize("NFD", "가")
        self.decomposes = norm is not None and apart in norm.normalize_str("가")
        """Whether texts are read in parts of characters, as an uncased BERT reads Hangul: its words are letters."""
        self.composed: Callable[[str], str] = partial(unicodedata.normalize, "NFC") if self.decomposes else str
        """From a decoded text to one of whole characters, as people write it (NFC)."""

    def __missing__(self, index: int) -> bytes:
        self[index] = data = self._bytes_of(self.backend.id_to_token(index) or "", index)
        return data

    def _bytes_of(self, token: str, index: int) -> bytes:
        if not token or index in self.added:
            return token.encode()
        if self.kind == "bytes":
            if self.suffix and token.endswith(self.suffix):
                token = token.removesuffix(self.suffix) + "Ġ"
            try:
                return bytes(self.table[char] for char in token)
            except KeyError:
                return token.encode()
        if self.kind == "sentencepiece":
            byte = _HEX_BYTE.fullmatch(token)
            return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()
        if self.kind == "suffix":
            return token.replace(self.suffix or "</w>", " ").encode()
        if self.prefix and token.startswith(self.prefix):
            return token.removeprefix(self.prefix).encode()
        return (token if token in (".", ",", "!", "?") else " " + token).encode()


def _byte_table() -> dict[str, int]:
    """Returns GPT-2's letter for every byte: itself if it can be seen, else the next letter from U+0100."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(0x100 + i): byte for i, byte in enumerate(unseen)}


def byte_letters() -> list[str]:
    """GPT-2's letters in its own order: those of bytes that can be seen, then the others'."""
    return list(_byte_table())


def _steps(decoder: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if decoder is not None and decoder["type"] == "Sequence":
        for step in decoder["decoders"]:
            yield from _steps(step)
    elif decoder is not None:
        yield decoder
