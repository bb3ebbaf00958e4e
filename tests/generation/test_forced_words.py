"""Words that a text must hold are words that its tokenizer can spell."""

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from mmtransformer.generation.forced_words import ForcedWords
from mmtransformer.text.tokenizer import Tokenizer


def uncased() -> Tokenizer:
    """As an uncased BERT's: accents and capitals are none to it."""
    words = ["[PAD]", "[UNK]", "[SEP]", "a", "red", "star", "##s", "cafe", "don", "'", "t"]
    backend = tokenizers.Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(["[PAD]", "[UNK]", "[SEP]"])
    return Tokenizer(backend, bos_token="[SEP]", eos_token="[SEP]", pad_token="[PAD]")


def sentencepiece() -> Tokenizer:
    """Without tokens for bytes; what it does not know is a text of its own."""
    pieces = [
        ("<unk>", 0.0),
        ("</s>", 0.0),
        ("▁", -2.0),
        ("▁a", -1.0),
        ("▁red", -1.0),
        ("star", -1.0),
        ("s", -2.0),
        ("별", -2.0),
    ]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.normalizer, backend.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return Tokenizer(backend, bos_token="</s>", eos_token="</s>", pad_token="</s>")


def letters_alone() -> Tokenizer:
    """Byte letters without the alphabet of all bytes: it leaves out what it does not know."""
    backend = tokenizers.Tokenizer(models.BPE({w: i for i, w in enumerate(["</s>", "s", "t", "a", "r", "Ġ"])}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return Tokenizer(backend, bos_token="</s>", eos_token="</s>", pad_token="</s>")


def ours() -> Tokenizer:
    return Tokenizer.train(["a red star", "빨간 별"] * 3, 290)


@pytest.mark.parametrize(
    ("make", "spelled", "unspelled"),
    [
        (uncased, ["star", "Stars", "Café", "a red star", "don't"], ["별", "ring", "red 별", "★"]),
        (sentencepiece, ["stars", "별", " a red star", "ｓｔａｒ"], ["ring", "고리", "red ring", "🌟"]),
        (letters_alone, ["star", "a rat"], ["Star", "starry", "별"]),
        (ours, ["star", "Ring", "고리", "별", "🌟", "a  b"], []),
    ],
    ids=["BERT's", "sentencepiece's", "letters alone", "ours"],
)
def test_a_word_without_tokens_is_refused(make: type[Tokenizer], spelled: list[str], unspelled: list[str]) -> None:
    tokenizer = make()
    assert len(ForcedWords.of(tokenizer, spelled, tokenizer.vocab_size).words) == len(spelled)
    for word in unspelled:
        with pytest.raises(ValueError, match=f'force_words: the tokenizer cannot spell "{word}": it '):
            ForcedWords.of(tokenizer, ["star", word], tokenizer.vocab_size)
