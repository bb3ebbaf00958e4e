"""SentencePiece's tokenizer.model of a Llama -> a tokenizer of the library `tokenizers`; no package of its is needed.

The file is a protobuf of pieces with scores. A text is split into characters, and the two neighbors whose joined piece
has the best score are joined, until none is left; what has no piece becomes bytes.
"""

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors

from mmtransformer.serialization.untrusted import check_plain

SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
LLAMAS = ("LlamaTokenizer", "LlamaTokenizerFast")
_MOST_BYTES, _MOST_LETTERS = 1 << 26, 512  # of a file, and of a piece of it
_UNKNOWN, _CONTROL, _USER, _UNUSED = 2, 3, 4, 5
_BPE = 2


class Piece(NamedTuple):
    """A piece of text, its score, and its kind: 1 = plain, 2 = unknown, 3 = control, 4 = of a user's, 6 = a byte."""

    text: str
    score: float
    kind: int


def read_pieces(path: Path) -> tuple[list[Piece], dict[int, Any], dict[int, Any]]:
    """The pieces of a SentencePiece file, and by numbers of fields what it says of its training and normalizing.

    Raises:
        ValueError: naming the file, if it is damaged or too large.
    """
    check_plain(path)
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes are more than a SentencePiece file has")
    pieces: list[Piece] = []
    said: dict[int, dict[int, Any]] = {2: {}, 3: {}}
    try:
        for field, value in _fields(path.read_bytes()):
            if field == 1:
                part = dict(_fields(value))
                text = bytes(part[1]).decode("utf-8")
                if len(text) > _MOST_LETTERS:
                    raise ValueError(f"a piece of {len(text):,} letters")
                pieces.append(Piece(text, float(part.get(2, 0.0)), int(part.get(3, 1))))
            elif field in said:
                said[field] = dict(_fields(value))
    except (ValueError, KeyError, TypeError, IndexError, struct.error) as error:
        raise ValueError(f"{path}: not readable as SentencePiece's file: {error}") from error
    if not pieces:
        raise ValueError(f"{path}: not readable as SentencePiece's file: it has no pieces")
    return pieces, said[2], said[3]


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message: numbers, and integers, floats or bytes."""
    place = 0

    def integer() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    while place < len(data):
        key = integer()
        kind = key & 7
        if kind == 0:
            yield key >> 3, integer()
            continue
        size = {1: 8, 2: -1, 5: 4}[kind]
        size = integer() if size < 0 else size
        if place + size > len(data):
            raise ValueError("it ends in the middle of a field")
        part = data[place : place + size]
        place += size
        yield key >> 3, part if kind == 2 else struct.unpack("<f" if kind == 5 else "<d", part)[0]


def merges_of(pieces: list[Piece]) -> list[tuple[str, str]]:
    """The pairs that are joined, best first: all ways in which a piece is made of two others, by its score."""
    vocab = {piece.text: i for i, piece in enumerate(pieces) if piece.kind not in (_UNKNOWN, _CONTROL, _USER)}
    found: list[tuple[float, str, str]] = []
    for piece in pieces:
        if piece.kind == 1:
            halves = ((piece.text[:i], piece.text[i:]) for i in range(1, len(piece.text)))
            found += [(-piece.score, a, b) for a, b in halves if a in vocab and b in vocab]
    found.sort(key=lambda pair: pair[0])
    return [(a, b) for _, a, b in found]


def read_llama(path: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer of a Llama's tokenizer.model, as the fast one that transformers writes.

    Args:
        path: the file.
        config: what tokenizer_config.json says: `add_bos_token` and `add_eos_token`, both false unless said, as
            transformers 5 has it (4 put the first token before a text by itself).

    Raises:
        ValueError: naming the file, for another kind of model or normalizing than Llama's.
    """
    pieces, trained, normalized = read_pieces(path)
    if trained.get(3, 1) != _BPE:
        raise ValueError(f"{path}: a model of kind {trained.get(3, 1)}, and a Llama's is of kind {_BPE} (BPE)")
    if normalized.get(2) or normalized.get(4, 1):
        raise ValueError(f"{path}: its texts are normalized (field 2, 4), and a Llama's stay as they are")
    unknown = next((piece.text for piece in pieces if piece.kind == _UNKNOWN), None)
    vocab = {piece.text: i for i, piece in enumerate(pieces)}
    if len(vocab) != len(pieces):
        raise ValueError(f"{path}: {len(pieces) - len(vocab)} of its pieces are there twice")
    model = models.BPE(vocab, merges_of(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=bool(trained.get(35)))
    backend = tokenizers.Tokenizer(model)
    ahead = [normalizers.Prepend("▁")] if normalized.get(3, 1) else []
    backend.normalizer = normalizers.Sequence([*ahead, normalizers.Replace(" ", "▁")])
    after = [decoders.Strip(" ", 1, 0)] if normalized.get(3, 1) else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *after])
    special = [piece.text for piece in pieces if piece.kind in (_UNKNOWN, _CONTROL)]
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    users = [piece.text for piece in pieces if piece.kind == _USER]
    backend.add_tokens([AddedToken(text, normalized=False) for text in users])
    ids = {"bos": trained.get(41, 1), "eos": trained.get(42, 2)}
    marks = {role: pieces[i].text for role, i in ids.items() if 0 <= i < len(pieces)}
    first = marks.get("bos") if config.get("add_bos_token", False) else None
    last = marks.get("eos") if config.get("add_eos_token", False) else None
    if first or last:
        around = " ".join([*([f"{first}:0"] if first else []), "$A:0", *([f"{last}:0"] if last else [])])
        named = [(token, vocab[token]) for token in dict.fromkeys((first, last)) if token]
        backend.post_processor = processors.TemplateProcessing(single=around, special_tokens=named)
    return backend
