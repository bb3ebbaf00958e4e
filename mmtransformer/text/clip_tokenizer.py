"""CLIP's tokenizer from the files that it was published as, without a tokenizer.json."""

import gzip
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from mmtransformer.serialization.untrusted import check_plain
from mmtransformer.text.token_bytes import byte_letters

START, END = "<|startoftext|>", "<|endoftext|>"
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
_MERGES = 49152 - 256 - 2  # of the file's many more
_MOST = 1 << 24  # bytes of text in the file, three times its own
_WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def clip_backend(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> tokenizers.Tokenizer:
    """The tokenizer of CLIP's vocabulary and merges: small letters, words that end with </w>, between two marks."""
    model = models.BPE(dict(vocab), [*merges], end_of_word_suffix="</w>", unk_token=END)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    marks = [(token, vocab[token]) for token in (START, END)]
    backend.post_processor = processors.TemplateProcessing(single=f"{START}:0 $A:0 {END}:0", special_tokens=marks)
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in (START, END)])
    return backend


def read_clip_vocabulary(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer of OpenAI's `bpe_simple_vocab_16e6.txt.gz`, which open_clip has in its package.

    Raises:
        ValueError: naming the file, if it is damaged or another.
    """
    check_plain(path)
    try:
        with gzip.open(path) as file:
            text = file.read(_MOST).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a vocabulary of CLIP: {error}") from error
    pairs = [tuple(line.split()) for line in text.split("\n")[1 : 1 + _MERGES]]
    if len(pairs) != _MERGES or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"{path}: not a vocabulary of CLIP: it has no {_MERGES:,} merges of two")
    merges = [(a, b) for a, b in pairs]  # pyright: ignore[reportAssignmentType]
    letters = byte_letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(a + b for a, b in merges), START, END]
    try:
        return clip_backend({token: index for index, token in enumerate(tokens)}, merges)
    except Exception as error:  # `tokenizers` has no narrower one
        raise ValueError(f"{path}: not a vocabulary of CLIP: {error}") from error
