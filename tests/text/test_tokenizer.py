import json
import pickle
import shutil
import time
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from mmtransformer.serialization.printable import printable
from mmtransformer.text.tokenizer import BOS, EOS, IMAGE, PAD, Tokenizer

ENGLISH = [
    "three small red stars above a striped blue circle",
    "a red star and two blue circles",
    "the red star is left of the blue circle",
    "a circle inside a star, it's red",
]
KOREAN = [
    "파란 원 위에 작은 빨간 별이 세 개 있다",
    "빨간 별과 파란 원 두 개",
    "빨간 별이 파란 원의 왼쪽에 있다",
    "별 안에 있는 빨간 원",
]
CORPUS = (ENGLISH + KOREAN) * 3
AWKWARD = [
    "", " ", "   ", "\n", "a", " a", "  a  ", "a red star", " a red star ", "\ta\r\nb\x0bc\x00d",
    "빨간 별이 세 개 있다.", " 빨간", "ㄱㄴ ㅏㅑ", "뷁", "漢字と仮名", "👩\u200d👩\u200d👧 ✨🇰🇷", "\u0301a", "e\u0301",
    "\ufeffbom", "\ufffd", "\u3000全角\u2028line", "\U0010fffd", "İıſ ﬁ ǅ",
    "hi <|eos|> there <|bos|><|pad|><|image|><|ko|>", "<|eos|>", "빨간<|eos|>별",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(CORPUS, 360, ["en", "ko"])


def nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def specials(tokenizer: Tokenizer) -> set[int]:
    ids = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, *tokenizer.prompt("en"), *tokenizer.prompt("ko")}
    return ids | {tokenizer.image_token_id} if tokenizer.image_token_id is not None else ids


# ---------------------------------------------------------------------------------------------- the law


def check_laws(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == nfc(text)
    assert tokenizer.encode(nfc(text)) == ids
    assert not specials(tokenizer) & set(ids)
    assert "".join(tokenizer.pieces(ids)) == nfc(text)
    words = tokenizer.words(ids)
    assert [word for word, _ in words] == nfc(text).split()
    assert tokenizer.backend.decode(ids, skip_special_tokens=False) == nfc(text)  # an outsider's decoding


@pytest.mark.parametrize("text", AWKWARD)
def test_round_trip_of_awkward_texts(tokenizer: Tokenizer, text: str) -> None:
    check_laws(tokenizer, text)
    check_laws(tokenizer, unicodedata.normalize("NFD", text))


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=30))
def test_round_trip_of_any_text(tokenizer: Tokenizer, text: str) -> None:
    check_laws(tokenizer, text)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([*AWKWARD, "빨", "간", " ", "a", "별", "<|", "|>", "ko"]), max_size=6))
def test_round_trip_of_mixed_texts(tokenizer: Tokenizer, parts: list[str]) -> None:
    check_laws(tokenizer, "".join(parts))


def test_korean_typed_as_jamo_gets_the_ids_of_whole_syllables(tokenizer: Tokenizer) -> None:
    jamo = unicodedata.normalize("NFD", KOREAN[0])
    assert len(jamo) > len(KOREAN[0])
    assert tokenizer.encode(jamo) == tokenizer.encode(KOREAN[0])
    retrained = Tokenizer.train([unicodedata.normalize("NFD", text) for text in CORPUS], 360, ["en", "ko"])
    assert retrained.backend.to_str() == tokenizer.backend.to_str()


def test_a_word_has_the_same_ids_at_the_start_and_inside(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("red star") == tokenizer.encode("a red star")[1:]
    assert tokenizer.encode("빨간 별") == tokenizer.encode("원 빨간 별")[-len(tokenizer.encode("빨간 별")) :]
    assert len(tokenizer.encode("red")) == 1


# -------------------------------------------------------------------------------------------- training


def test_special_tokens_come_first_then_bytes_then_merges(tokenizer: Tokenizer) -> None:
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.image_token_id) == (0, 1, 2, 3)
    assert tokenizer.languages == ("en", "ko")
    assert tokenizer.prompt() == [1]
    assert tokenizer.prompt("en") == [1, 4]
    assert tokenizer.prompt("ko") == [1, 5]
    assert tokenizer.vocab_size == 360


def test_training_depends_on_the_texts_not_their_order(tokenizer: Tokenizer) -> None:
    again = Tokenizer.train(iter(CORPUS), 360, ["en", "ko"])
    rotated = Tokenizer.train(reversed(CORPUS), 360, ["en", "ko"])
    assert again.backend.to_str() == rotated.backend.to_str() == tokenizer.backend.to_str()


def test_a_small_corpus_gives_a_smaller_vocabulary() -> None:
    empty = Tokenizer.train([], 5000)
    assert empty.vocab_size == 260
    check = "빨간 star ✨"
    assert empty.decode(empty.encode(check)) == check
    once = Tokenizer.train(["red star"], 5000)
    assert once.vocab_size == 260  # nothing occurs twice
    assert 260 < Tokenizer.train(["red star"], 5000, min_frequency=1).vocab_size < 290


def test_training_errors_have_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"vocab_size \(261\) must be at least 262: 256 bytes and 6 special tokens"):
        Tokenizer.train(CORPUS, 261, ["en", "ko"])
    assert Tokenizer.train(CORPUS, 262, ["en", "ko"]).vocab_size == 262
    with pytest.raises(ValueError, match=r"names one of them twice"):
        Tokenizer.train(CORPUS, 400, ["en", "en"])
    for code in ("English", "k", "ko kr", "eos|><|x", "", "image"):
        with pytest.raises(ValueError, match="is not a code such as"):
            Tokenizer.train(CORPUS, 400, [code])
    assert Tokenizer.train(CORPUS, 400, ["pt-BR"]).prompt("pt-BR") == [1, 4]


def test_special_tokens_in_the_corpus_stay_text() -> None:
    trained = Tokenizer.train(["a <|eos|> b <|pad|>"] * 9, 400)
    assert trained.decode(trained.encode("<|eos|> b <|pad|>")) == "<|eos|> b <|pad|>"
    assert not {0, 1, 2, 3} & set(trained.encode("<|eos|> b <|pad|> <|image|>"))


# ---------------------------------------------------------------------------------------- ids to text


def test_unknown_language_names_the_known_ones(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="language 'fr' is unknown to this tokenizer; it knows: en, ko"):
        tokenizer.prompt("fr")
    with pytest.raises(ValueError, match="it knows: none"):
        Tokenizer.train([], 260).prompt("en")


def test_decode_drops_special_tokens_and_stops_at_eos(tokenizer: Tokenizer) -> None:
    text = tokenizer.encode("빨간 별")
    assert tokenizer.decode([*tokenizer.prompt("ko"), *text, tokenizer.eos_id, *text]) == "빨간 별"
    assert tokenizer.decode([tokenizer.pad_id, *text, tokenizer.image_token_id or 0]) == "빨간 별"
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode(torch.tensor(text)) == "빨간 별"  # type: ignore[arg-type]


def test_a_cut_character_is_left_out_and_a_broken_one_is_shown(tokenizer: Tokenizer) -> None:
    ids = Tokenizer.train([], 260).encode("별✨")  # bytes only: space, 3, 3
    bare = Tokenizer.train([], 260)
    assert [bare.decode(ids[:n]) for n in range(8)] == ["", "", "", "", "별", "별", "별", "별✨"]
    assert bare.decode([ids[1], ids[0], ids[4]]) == "\ufffd "
    assert bare.decode([ids[2], *ids[1:]]) == "\ufffd별✨"
    assert bare.decode(bare.encode("cut \ufffd")) == "cut \ufffd"  # a real one stays


def test_words_own_every_token_that_holds_their_bytes() -> None:
    bare = Tokenizer.train([], 260)
    ids = [*bare.prompt(), *bare.encode("a 별"), bare.eos_id, *bare.encode("more")]
    assert bare.words(ids) == [("a", [2]), ("별", [4, 5, 6])]
    assert bare.pieces(ids) == [BOS, "", "a", " ", "별", "", "", EOS, *" more"]  # eos ends words only


def test_words_of_pieces_that_hold_several_words_or_characters(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.prompt("ko"), *tokenizer.encode("빨간  별이, 있다")]
    words = dict(tokenizer.words(ids))
    assert list(words) == ["빨간", "별이,", "있다"]
    owned = [position for positions in words.values() for position in positions]
    assert owned == sorted(set(owned))
    assert set(range(2, len(ids))) - set(owned) == {words["별이,"][0] - 1}  # the second space alone
    assert "".join(tokenizer.pieces(ids)) == f"{BOS}<|ko|>빨간  별이, 있다"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 359), max_size=20))
def test_words_and_pieces_of_any_ids(tokenizer: Tokenizer, ids: list[int]) -> None:
    """A model may write any ids, half characters too."""
    words = tokenizer.words(ids)
    assert [word for word, _ in words] == tokenizer.decode(ids).split()
    end = ids.index(tokenizer.eos_id) if tokenizer.eos_id in ids else len(ids)
    for _, positions in words:
        assert positions == sorted(set(positions))
        assert all(0 <= position < end and ids[position] > 5 for position in positions)
    pieces = tokenizer.pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(piece for piece, i in zip(pieces, ids) if i > 5).startswith(tokenizer.decode(ids))


@pytest.mark.parametrize("method", ["decode", "words", "pieces"])
def test_ids_outside_the_vocabulary_are_an_error(tokenizer: Tokenizer, method: str) -> None:
    for bad in (360, -1):
        with pytest.raises(ValueError, match=rf"id {bad} at position 1 is outside the vocabulary 0\.\.359"):
            getattr(tokenizer, method)([7, bad])


def test_a_lone_surrogate_is_a_clear_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"lone surrogate, '\\udc80' at character 2: .* read it as UTF-8"):
        tokenizer.encode("ab\udc80")


def test_long_texts_are_neither_cut_nor_slow(tokenizer: Tokenizer) -> None:
    text = "빨간별" * 20_000
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_pad(tokenizer: Tokenizer) -> None:
    tokens, attention_mask = tokenizer.pad([[5, 6, 7], [], [8]])
    assert tokens.tolist() == [[5, 6, 7], [0, 0, 0], [8, 0, 0]]
    assert attention_mask.tolist() == [[True] * 3, [False] * 3, [True, False, False]]
    assert (tokens.dtype, attention_mask.dtype) == (torch.long, torch.bool)
    tokens, attention_mask = tokenizer.pad([[5, 6, 7], [8]], side="left")
    assert tokens.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert attention_mask.tolist() == [[True] * 3, [False, False, True]]
    assert tokenizer.pad([])[0].shape == (0, 0)
    assert tokenizer.pad([[]], "left")[1].shape == (1, 0)
    with pytest.raises(ValueError, match="side is 'middle'"):
        tokenizer.pad([[1]], "middle")  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------- files and workers


def test_saved_and_loaded_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "a" / "b")
    loaded = Tokenizer.from_pretrained(tmp_path / "a" / "b")
    assert loaded.backend.to_str() == tokenizer.backend.to_str()
    for name in ("vocab_size", "pad_id", "bos_id", "eos_id", "image_token_id", "languages"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    for text in AWKWARD:
        assert loaded.encode(text) == tokenizer.encode(text)
        check_laws(loaded, text)
    loaded.save_pretrained(tmp_path / "c")
    for path in (tmp_path / "c").iterdir():
        assert path.read_bytes() == (tmp_path / "a" / "b" / path.name).read_bytes()


def test_pickled_for_a_worker_it_still_guards_special_tokens(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    for text in AWKWARD:
        check_laws(copy, text)
        assert copy.encode(text) == tokenizer.encode(text)


def test_transformers_reads_what_is_saved(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 0)
    for text in (*ENGLISH, *KOREAN, "hi <|eos|> there"):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ids == tokenizer.encode(text)
        assert theirs.decode(ids) == text


# --------------------------------------------------------------------------------- folders from elsewhere


def write(folder: Path, **files: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value), "utf-8")
    return folder


def gpt2(folder: Path) -> Path:
    """vocab.json and merges.txt, as GPT-2 was published: the special token has the last id."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    folder.mkdir()
    backend.model.save(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
    vocab["<|endoftext|>"] = len(vocab)
    return write(folder, vocab=vocab)


def test_gpt2_folder(tmp_path: Path) -> None:
    loaded = Tokenizer.from_pretrained(gpt2(tmp_path / "gpt2"))
    assert loaded.vocab_size == 301
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id, loaded.image_token_id) == (300, 300, 300, None)
    for text in (
        "a red star",
        " a red star",
        "빨간 별이 ✨",
        "it's <|endoftext|> here",
        unicodedata.normalize("NFD", "별"),
    ):
        ids = loaded.encode(text)
        assert 300 not in ids
        assert loaded.decode(ids) == text == loaded.backend.decode(ids)
        assert [word for word, _ in loaded.words(ids)] == text.split()
    assert loaded.encode("red") != loaded.encode(" red")  # as GPT-2 was trained
    loaded.save_pretrained(tmp_path / "again")
    again = Tokenizer.from_pretrained(tmp_path / "again")
    assert again.encode("a <|endoftext|>") == loaded.encode("a <|endoftext|>")
    assert again.pad_id == 300


def test_all_ends_that_a_folder_lists_end_a_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Llama 3's chat models name one end in tokenizer_config.json and all of them in generation_config.json."""
    ko = tokenizer.backend.token_to_id("<|ko|>")
    tokenizer.save_pretrained(tmp_path / "hub")
    write(tmp_path / "hub", generation_config={"eos_token_id": [ko, tokenizer.eos_id]})
    loaded = Tokenizer.from_pretrained(tmp_path / "hub")
    assert (loaded.eos_id, loaded.eos_ids) == (tokenizer.eos_id, (tokenizer.eos_id, ko))
    for end in loaded.eos_ids:
        assert loaded.decode([*loaded.encode("red"), end, *loaded.encode("blue")]) == "red"
    loaded.save_pretrained(tmp_path / "again")
    assert Tokenizer.from_pretrained(tmp_path / "again").eos_ids == loaded.eos_ids
    assert loaded.with_special_tokens(tokens=["<x>"]).eos_ids == loaded.eos_ids
    transformers = pytest.importorskip("transformers")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "again").eos_token_id == tokenizer.eos_id
    write(tmp_path / "hub", generation_config={"eos_token_id": [2, 9999]})
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id has 9999, an id without a token"):
        Tokenizer.from_pretrained(tmp_path / "hub")


def test_gpt2_folder_with_a_config(tmp_path: Path) -> None:
    folder = write(gpt2(tmp_path / "gpt2"), config={"eos_token_id": [300, 7], "bos_token_id": 65, "pad_token_id": -1})
    loaded = Tokenizer.from_pretrained(folder)
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id, loaded.eos_ids) == (65, 300, 300, (300, 7))
    assert loaded.decode(loaded.encode("(a)")) == "(a)"  # what is no special token ends no text that is there
    write(folder, config={"eos_token_id": 301})
    with pytest.raises(ValueError, match=r"gpt2/config\.json: eos_token_id is 301, an id without a token"):
        Tokenizer.from_pretrained(folder)
    write(folder, config={"model_type": "gpt2"})
    with pytest.raises(ValueError, match=r'no eos token\. Add "eos_token".*tokenizer_config\.json.*in config\.json'):
        Tokenizer.from_pretrained(folder)
    write(folder, special_tokens_map={"eos_token": {"content": "<|endoftext|>"}, "pad_token": "<pad>"})
    with pytest.raises(ValueError, match=r"special_tokens_map\.json: pad_token is '<pad>', .* 301 tokens"):
        Tokenizer.from_pretrained(folder)


def llama(folder: Path) -> Path:
    """The form of Llama's tokenizer.json: SentencePiece's "▁", bytes as <0x..>, a template that adds bos."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ("▁", "a", "r", "e", "d", "▁r", "ed", "▁red", "별", "▁별"):
        vocab[piece] = len(vocab)
    merges = [("▁", "r"), ("e", "d"), ("▁r", "ed"), ("▁", "별")]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.enable_truncation(4)
    backend.enable_padding()
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    return write(folder, tokenizer_config={"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None})


def test_llama_folder(tmp_path: Path) -> None:
    loaded = Tokenizer.from_pretrained(llama(tmp_path / "llama"))
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id, loaded.vocab_size) == (1, 2, 2, 269)
    assert loaded.encode("red 별") == [266, 268]
    for text in ("red 별 빨간 ✨ red", " a  b", "</s> red <s>", "", "a\nb"):
        ids = loaded.encode(text)
        assert not {1, 2} & set(ids)
        assert loaded.decode(ids) == text == loaded.backend.decode(ids)
        assert [word for word, _ in loaded.words(ids)] == text.split()
    assert loaded.words(loaded.encode("red 빨")) == [("red", [0]), ("빨", [2, 3, 4])]


@pytest.mark.parametrize("cased", [False, True])
def test_bert_folder(tmp_path: Path, cased: bool) -> None:
    words = "[PAD] [UNK] [CLS] [SEP] [ ] a red star ##s , . 별 ##이 sep SEP"
    (tmp_path / "vocab.txt").write_text("\n".join(words.split()), "utf-8")
    if cased:
        write(tmp_path, tokenizer_config={"do_lower_case": False})
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert (loaded.pad_id, loaded.bos_id, loaded.eos_id) == (0, 2, 3)
    ids = loaded.encode("a red, red star. stars")
    assert loaded.decode(ids) == "a red, red star. stars" == loaded.backend.decode(ids)
    assert loaded.words(ids)[-2:] == [("star.", [4, 5]), ("stars", [6, 7])]
    assert loaded.encode("A RED") == ([1, 1] if cased else loaded.encode("a red"))
    assert loaded.decode(loaded.encode("[SEP] a")) == ("[ SEP ] a" if cased else "[ sep ] a")
    if cased:  # the other one takes Hangul apart, as Google's does
        assert loaded.words(loaded.encode("a 별이")) == [("a", [0]), ("별이", [1, 2])]
    loaded.save_pretrained(tmp_path / "again")
    assert Tokenizer.from_pretrained(tmp_path / "again").encode("A stars") == loaded.encode("A stars")


# ------------------------------------------------------------------------- Korean in the hub's three other forms

SENTENCES = ["빨간 별이 세 개 있다.", "파란 원 위에 작은 빨간 별", "별빛이 파란 원을 비춘다, 밤새", "작은 별과 큰 별"]


def wordpiece(folder: Path, lowercase: bool = False) -> Path:
    """The form of Korean BERTs: a trained WordPiece; the lower-casing one takes syllables apart, as Google's does."""
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend.train_from_iterator(
        SENTENCES, trainers.WordPieceTrainer(vocab_size=90, special_tokens=specials, show_progress=False)
    )
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return kept(
        folder, backend, {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    )


def unigram(folder: Path) -> Path:
    """The form of T5, mT5 and XLM-R: SentencePiece's unigram model."""
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")])
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=80, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return kept(folder, backend, {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"})


def sentencepiece_bpe(folder: Path) -> Path:
    """The form of Llama 2: SentencePiece's BPE, with bytes for what is unknown."""
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=340, special_tokens=specials[:3], initial_alphabet=specials[3:],
                                    show_progress=False)
    )  # fmt: skip
    description = json.loads(backend.to_str())
    vocab = description["model"]["vocab"]
    vocab |= {token: len(vocab) + i for i, token in enumerate(specials[3:])}  # a trainer knows no byte tokens
    return kept(
        folder,
        tokenizers.Tokenizer.from_str(json.dumps(description)),
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    )


def kept(folder: Path, backend: tokenizers.Tokenizer, roles: dict[str, str]) -> Path:
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    return write(folder, tokenizer_config=roles | {"tokenizer_class": "PreTrainedTokenizerFast"})


FORMS = {
    "WordPiece": wordpiece,
    "WordPiece lower": lambda folder: wordpiece(folder, lowercase=True),
    "SentencePiece unigram": unigram,
    "SentencePiece BPE": sentencepiece_bpe,
}


@pytest.mark.parametrize("form", FORMS)
def test_korean_in_the_forms_of_the_hub(form: str, tmp_path: Path) -> None:
    """Ids and texts are those of transformers on the same file; words own their tokens; saved, it is the same."""
    transformers = pytest.importorskip("transformers")
    folder = FORMS[form](tmp_path / "hub")
    ours, theirs = Tokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    split = 0
    for text in (*SENTENCES, "빨간 원이 별빛", "작은 원과 파란 별."):
        ids = ours.encode(text)
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == text, "whole syllables (NFC) even of a tokenizer that takes them apart"
        assert nfc(theirs.decode(ids, clean_up_tokenization_spaces=False)).replace(" .", ".").replace(" ,", ",") == text
        words = ours.words(ids)
        assert [word for word, _ in words] == text.split()
        assert sorted({place for _, places in words for place in places}) == [
            place for place, piece in enumerate(ours.pieces(ids)) if piece.strip()
        ]
        split += sum(len(places) > 1 for _, places in words)
    assert split, "no word has several tokens: the pieces inside words were not looked at"
    ours.save_pretrained(tmp_path / "again")
    again = Tokenizer.from_pretrained(tmp_path / "again")
    for text in SENTENCES:
        assert again.decode(again.encode(text)) == ours.decode(ours.encode(text))
        assert again.encode(text) == ours.encode(text)
    unknown = ours.encode("별 뷁 별")
    assert ours.decode(unknown).startswith(ours.decode(ours.encode("별")))
    if form == "SentencePiece BPE":
        assert ours.decode(unknown) == "별 뷁 별"


def test_clip_folder(tmp_path: Path) -> None:
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "s": 3, "r": 4, "sr": 5, "sra</w>": 6, "a": 7}
    model = models.BPE(vocab, [("s", "r"), ("sr", "a</w>")], end_of_word_suffix="</w>")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)])
    backend.decoder = decoders.ByteLevel()
    backend.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, tokenizer_config={"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"})
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert loaded.decode(loaded.encode("sra a")) == "sra a"
    assert loaded.words(loaded.encode("sra a")) == [("sra", [0]), ("a", [1])]


def test_models_that_spell_special_tokens_by_themselves(tmp_path: Path) -> None:
    """A unigram model has "</s>" among its pieces, and finds it in any text."""
    pieces = ["<unk>", "</s>", "▁", "a", "</", "<", "/", "s", ">"]
    backend = tokenizers.Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.add_special_tokens([AddedToken("<unk>", special=True)])  # the one special token that text may get
    assert 1 in backend.encode("a </s> a").ids
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.from_pretrained(write(tmp_path, special_tokens_map={"eos_token": "</s>", "unk_token": "<unk>"}))
    assert 1 not in loaded.encode("a </s> a")
    assert loaded.decode(loaded.encode("a </s> a")) == "a < /s> a"
    assert 0 in loaded.encode("a ? a")


def test_truncation_of_a_hub_tokenizer_is_switched_off(tmp_path: Path) -> None:
    loaded = Tokenizer.from_pretrained(llama(tmp_path / "llama"))
    assert len(loaded.encode("red " * 50)) > 50


def test_folders_that_cannot_be_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"nowhere: no such folder"):
        Tokenizer.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json, .* it holds: nothing"):
        Tokenizer.from_pretrained(tmp_path)
    write(tmp_path, config={"a": 1})
    with pytest.raises(ValueError, match=r"it holds: config\.json"):
        Tokenizer.from_pretrained(tmp_path)
    write(tmp_path, tokenizer='{"model": ')
    with pytest.raises(ValueError, match=r"tokenizer\.json: not readable as a tokenizer: "):
        Tokenizer.from_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    write(tmp_path, config="[1]")
    with pytest.raises(ValueError, match=r"config\.json: holds a list, not an object"):
        Tokenizer.from_pretrained(tmp_path)
    write(tmp_path, config="{")
    with pytest.raises(ValueError, match=r"config\.json: not readable as JSON: "):
        Tokenizer.from_pretrained(tmp_path)
    shutil.rmtree(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    write(tmp_path, tokenizer_config=values | {"languages": ["en", "fr"]})
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: languages names 'fr', but '<\|fr\|>' is not"):
        Tokenizer.from_pretrained(tmp_path)


HUBS = {"gpt2": gpt2, "llama": llama, "bert": lambda folder: bert(folder)}


def bert(folder: Path) -> Path:
    folder.mkdir()
    words = "[PAD] [UNK] [CLS] [SEP] a red star ##s , . 별 ##이"
    (folder / "vocab.txt").write_text("\n".join(words.split()), "utf-8")
    return folder


@pytest.mark.parametrize("hub", HUBS)
def test_special_tokens_are_added_behind_those_of_a_hub(hub: str, tmp_path: Path) -> None:
    old = Tokenizer.from_pretrained(HUBS[hub](tmp_path / "hub"))
    assert old.image_token_id is None
    before = {text: old.encode(text) for text in ("a red star", "별이 <|image|> <|ko|>")}
    new = old.with_special_tokens(image_token=True, languages=["en", "ko"], tokens=["<|endofchunk|>"])
    count = old.vocab_size
    assert new.vocab_size == count + 4
    assert new.image_token_id == count
    assert new.prompt("en") == [old.bos_id, count + 1]
    assert new.prompt("ko") == [old.bos_id, count + 2]
    assert new.backend.token_to_id("<|endofchunk|>") == count + 3
    assert (new.bos_id, new.eos_id, new.pad_id) == (old.bos_id, old.eos_id, old.pad_id)
    assert (old.image_token_id, old.vocab_size, old.languages) == (None, count, ())  # the old one is as it was
    for text, ids in before.items():
        assert new.encode(text) == ids
    assert new.decode([count, *before["a red star"], count + 2]) == "a red star"
    new.save_pretrained(tmp_path / "new")
    again = Tokenizer.from_pretrained(tmp_path / "new")
    assert (again.image_token_id, again.languages, again.vocab_size) == (count, ("en", "ko"), count + 4)
    assert again.encode("별이 <|image|> <|endofchunk|>") == new.encode("별이 <|image|> <|endofchunk|>")
    assert again.with_special_tokens(image_token=True, languages=["ko"]).backend.to_str() == again.backend.to_str()
    more = again.with_special_tokens(languages=["ko", "fr", "fr"])
    assert (more.languages, more.prompt("fr")[1]) == (("en", "ko", "fr"), count + 4)
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path / "new")
    assert theirs.convert_tokens_to_ids(["<|image|>", "<|en|>", "<|ko|>"]) == [count, count + 1, count + 2]


def test_special_tokens_cannot_fall_in_gaps(tokenizer: Tokenizer) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 9, EOS: 1}, unk_token="a"))
    gaps = Tokenizer(backend, bos_token=EOS, pad_token=EOS)
    with pytest.raises(ValueError, match=r"<\|image\|> got the ids \[3\], not those from 10 on.* 3 tokens have gaps"):
        gaps.with_special_tokens(image_token=True)
    with pytest.raises(ValueError, match="language 'K-O' is not a code"):
        tokenizer.with_special_tokens(languages=["K-O"])


def test_a_decoder_learns_the_tokens_that_a_tokenizer_was_given(tmp_path: Path) -> None:
    from mmtransformer import ExtendedDecoder, TextDecoder

    old = Tokenizer.from_pretrained(llama(tmp_path / "llama"))
    new = old.with_special_tokens(image_token=True, languages=["ko"])
    decoder = TextDecoder(old.vocab_size, 24, 1, 4, max_len=29)
    decoder = ExtendedDecoder(decoder, new.vocab_size - old.vocab_size, first=old.vocab_size)
    ids = torch.tensor([[*new.prompt("ko"), new.image_token_id or 0, *new.encode("red 별")]])
    assert decoder.head(decoder(ids)).shape == (1, ids.shape[1], new.vocab_size)


def test_constructor_names_the_missing_token() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, PAD: 1, BOS: 2}, unk_token="a"))
    with pytest.raises(ValueError, match=r"the eos token '<\|eos\|>' is not among the 3 tokens"):
        Tokenizer(backend)
    with pytest.raises(ValueError, match=r"the image token '<\|image\|>' is not among the 3 tokens"):
        Tokenizer(backend, eos_token="a", image_token=IMAGE)
    with pytest.raises(ValueError, match=r"the language ko token '<\|ko\|>' is not among"):
        Tokenizer(backend, eos_token="a", languages=["ko"])


def test_gaps_among_the_ids_count() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 9, EOS: 11}, unk_token="a"))
    loaded = Tokenizer(backend, bos_token=EOS, pad_token=EOS)
    assert loaded.vocab_size == 12
    assert loaded.decode([9, 0]) == "b a"
    assert loaded.pieces([9, 5, 9]) == ["b", "", " b"]


def test_added_tokens_that_are_not_special_are_text() -> None:
    """A hub model may have whole words added behind its vocabulary, spelt as they are read."""
    backend = Tokenizer.train(CORPUS, 300).backend
    backend.add_tokens(["ĠĠ빨간별"])
    loaded = Tokenizer(backend)
    ids = loaded.encode("a ĠĠ빨간별 b")
    assert loaded.vocab_size - 1 in ids
    assert loaded.decode(ids) == "a ĠĠ빨간별 b"


def test_a_pattern_that_backtracks_is_an_error_not_a_panic() -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("(a+)+$"), "isolated")
    tokenizer = Tokenizer(backend, bos_token="a", eos_token="a", pad_token="a")
    with pytest.raises(ValueError, match=r"its pattern takes too long on a text of 41 letters, 'aaaa"):
        tokenizer.encode("a" * 40 + "b")


def test_a_terminal_obeys_no_stranger() -> None:
    assert printable("a\x1b[2Jb\r\x07 빨간 별\u202eevil\ud800\n") == "a\\x1b[2Jb\\r\\x07 빨간 별\\u202eevil\\ud800\n"
    assert (
        printable("가족 \U0001f468\u200d\U0001f469 c\u00e1\u00a0fe\t")
        == "가족 \U0001f468\u200d\U0001f469 c\u00e1\u00a0fe\t"
    )


# ------------------------------------------------------------------------------------------------ what grows


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def grown(step: str, description: dict[str, Any], times: int = 1) -> Tokenizer:
    """A tokenizer whose normaliser or pre-tokeniser is a step so many times."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<eos>": 1}, unk_token="a"))
    many = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers"}
    parts = {"type": "Sequence", many[step]: [description] * times}
    changed = json.loads(backend.to_str()) | {step: parts}
    read = tokenizers.Tokenizer.from_str(json.dumps(changed))
    return Tokenizer(read, bos_token="<eos>", eos_token="<eos>", pad_token="<eos>")


@pytest.mark.parametrize(
    ("step", "description", "times"),
    [
        ("normalizer", {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}, 34),
        ("normalizer", {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10**6}, 1),
        ("normalizer", {"type": "Replace", "pattern": {"Regex": "."}, "content": "aa"}, 34),
        ("normalizer", {"type": "Prepend", "prepend": "a" * 400}, 3),
        ("normalizer", {"type": "ByteLevel"}, 30),
        (
            "pre_tokenizer",
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            30,
        ),
    ],
)
def test_a_tokenizer_that_makes_gigabytes_of_a_word_is_refused(step: str, description: dict, times: int) -> None:
    before = time.process_time()
    with pytest.raises(ValueError, match=r"tokenizer\.json: its '\w+' and the steps before it may make [\d,]+ letters"):
        grown(step, description, times)
    assert time.process_time() - before < 2


def test_a_tokenizer_of_many_steps_is_refused_and_one_of_few_is_not() -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json: 101 steps before the words; at most 100"):
        grown("normalizer", {"type": "Lowercase"}, 101)
    assert grown("normalizer", {"type": "Replace", "pattern": {"String": "b"}, "content": "aa"}, 6).encode("b")
