"""A Llama's tokenizer.model without tokenizer.json: ids by its definition, and beside SentencePiece where that is."""

import importlib.util
import json
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from mmtransformer.text.sentencepiece_files import merges_of, read_pieces
from mmtransformer.text.tokenizer import Tokenizer
from mmtransformer.weights.processors.tokens import PromptTokenizer

TEXTS = [
    "two dogs run", "a red star and a red dog", "빨간 별과 두 개", "naïve 日本語 🦩", " leading  spaces", "<s> no mark",
    "",
]  # fmt: skip
JOINED = [
    "ed", "re", "red", "▁red", "do", "dog", "▁dog", "▁dogs", "▁a", "an", "▁and", "tw", "▁two", "빨간", "▁빨간",
    "▁별", "▁  ",
]  # fmt: skip


def varint(number: int) -> bytes:
    found = b""
    while number > 0x7F:
        found, number = found + bytes([number & 0x7F | 0x80]), number >> 7
    return found + bytes([number])


def field(number: int, value: Any) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def pieces() -> list[tuple[str, float, int]]:
    """As a Llama has them: marks, bytes, what is joined, letters; scores are ranks."""
    marks = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    letters = sorted({letter for text in TEXTS[:3] for letter in text.replace(" ", "▁")} | {*"빨간별과두개 "})
    bytes_ = [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    return [*marks, *bytes_, *((text, -float(i), 1) for i, text in enumerate(JOINED + letters))]


def model(kind: int = 2, **said: Any) -> bytes:
    rows = said.get("rows", pieces())
    data = b"".join(field(1, field(1, t.encode()) + field(2, s) + field(3, k)) for t, s, k in rows)
    trained = field(3, kind) + field(35, 1) + field(40, 0) + field(41, 1) + field(42, 2)
    return data + field(2, trained) + field(3, field(1, b"identity") + field(3, 1) + field(4, said.get("squeezed", 0)))


def folder(path: Path, data: bytes, **config: Any) -> Path:
    (path / "tokenizer.model").write_bytes(data)
    said = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (path / "tokenizer_config.json").write_text(json.dumps(said | config))
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return path


def definition(text: str) -> list[int]:
    """Neighbors whose joined piece has the best score are joined, the leftmost first; what is no piece is bytes."""
    rows = pieces()
    vocab = {t: (i, score) for i, (t, score, kind) in enumerate(rows) if kind == 1}
    parts = [*("▁" + text.replace(" ", "▁"))] if text else []
    while True:
        pairs = [a + b for a, b in pairwise(parts)]
        found = [(-vocab[pair][1], i) for i, pair in enumerate(pairs) if pair in vocab]
        if not found:
            break
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [i for part in parts for i in ([vocab[part][0]] if part in vocab else [3 + byte for byte in part.encode()])]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_by_the_definition(text: str, tmp_path: Path) -> None:
    tokenizer, prompts = Tokenizer.from_pretrained(folder(tmp_path, model())), PromptTokenizer(tmp_path)
    want = definition(text)
    assert tokenizer.encode(text) == want
    assert tokenizer.decode(want) == text
    if not text.startswith((" ", "<s>")):  # where transformers 5 has ids of its own: tests/weights/processors
        assert prompts(text) == [1, *want]
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))
    assert prompts("<s>", special=False) == [1]


@pytest.mark.parametrize(
    ("said", "around"),
    [({}, ([], [])), ({"add_bos_token": False}, ([], [])), ({"add_eos_token": True}, ([], [2])),
     ({"add_bos_token": True, "add_eos_token": True}, ([1], [2]))],
)  # fmt: skip
def test_what_stands_around_a_text_is_said(
    said: dict[str, bool], around: tuple[list[int], list[int]], tmp_path: Path
) -> None:
    """Nothing, unless tokenizer_config.json says so: as transformers 5.23 has it, beside SentencePiece's package."""
    path = folder(tmp_path, model())
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"} | said
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    want = around[0] + definition("a red star") + around[1]
    assert PromptTokenizer(path)("a red star") == want
    if importlib.util.find_spec("sentencepiece"):
        assert AutoTokenizer.from_pretrained(path)("a red star").input_ids == want


@pytest.mark.parametrize("text", TEXTS)
def test_they_are_sentencepieces(text: str, tmp_path: Path) -> None:
    theirs = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_proto=model())
    assert Tokenizer.from_pretrained(folder(tmp_path, model())).encode(text) == theirs.encode(text)


def test_what_joins_is_in_the_order_of_scores(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model())
    read, *_ = read_pieces(tmp_path / "tokenizer.model")
    found = [a + b for a, b in merges_of(read)]
    assert list(dict.fromkeys(found)) == [text for text in JOINED if text in found]
    assert ("re", "d") in merges_of(read)
    assert ("r", "ed") in merges_of(read)


BAD: dict[str, tuple[bytes, str]] = {
    "half a file": (model()[:-7], "it ends in the middle of a field"),
    "nothing": (b"", "it has no pieces"),
    "something else": (b"\x0a\xff\xff\xff", "not readable as SentencePiece's file"),
    "a unigram": (model(1), r"a model of kind 1, and a Llama's is of kind 2 \(BPE\)"),
    "spaces squeezed": (model(squeezed=1), "its texts are normalized"),
    "a piece that never ends": (model(rows=[("x" * 600, 0.0, 1)]), "a piece of 600 letters"),
    "a piece twice": (model(rows=[*pieces(), *pieces()[-2:]]), "2 of its pieces are there twice"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_bad_is_named(kind: str, tmp_path: Path) -> None:
    data, message = BAD[kind]
    with pytest.raises(ValueError, match=message) as told:
        Tokenizer.from_pretrained(folder(tmp_path, data))
    assert "\n" not in str(told.value)
    assert str(tmp_path / "tokenizer.model") in str(told.value)


def test_another_class_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="of which only a Llama's is read here, not that of a T5Tokenizer"):
        Tokenizer.from_pretrained(folder(tmp_path, model(), tokenizer_class="T5Tokenizer"))
