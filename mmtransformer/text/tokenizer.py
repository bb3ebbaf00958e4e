"""Text to ids and back, on top of the library `tokenizers`.

The round-trip law of a trained tokenizer: `decode(encode(x)) == unicodedata.normalize("NFC", x)` for every
text x, in any language. NFC, so that Korean typed as separate jamo (as file names from macOS are) gets the
ids of the same syllables typed whole; nothing else is folded: case, spaces and line ends stay.

Every text is encoded behind one added space, which decoding takes away again. Without it "red" at the start
of a caption and " red" inside would be two unrelated ids, and the small vocabularies of caption corpora
would learn each word twice. (`add_prefix_space` of `tokenizers` skips texts that start with a space, so it
cannot give back " red" and "red" as they were; an unconditional space can.)
"""

import codecs
import copy
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from mmtransformer.serialization.hub import check_name
from mmtransformer.serialization.writing import made_folder
from mmtransformer.text.token_bytes import TokenBytes
from mmtransformer.text.tokenizer_files import (
    check_encodable,
    check_growth,
    check_languages,
    find_ends,
    find_token,
    read_backend,
    read_end_ids,
    read_languages,
    read_settings,
)

PAD, BOS, EOS, IMAGE = "<|pad|>", "<|bos|>", "<|eos|>", "<|image|>"


class Tokenizer:
    """Turns text into ids and ids into text; user text never becomes a special token.

    Make one with `Tokenizer.train(...)` or `Tokenizer.from_pretrained(...)`. It can be pickled, so it travels to
    data-loading workers.

    Args:
        backend: The tokenizer of the library `tokenizers`; the object is taken over, not copied.
        bos_token: The token that every prompt starts with.
        eos_token: The token that ends a caption.
        more_eos_tokens: Others that end what a model writes, as Llama 3's chat models have.
        pad_token: The token that fills rows up. It may be `eos_token`: padding is told by `attention_mask`, never by
            the id.
        image_token: The token that stands for a picture inside text, if there is one.
        languages: Language codes; each has a token such as `<|ko|>`.

    Raises:
        ValueError: If one of these tokens is not in the vocabulary.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token: str = BOS,
        eos_token: str = EOS,
        more_eos_tokens: Sequence[str] = (),
        pad_token: str = PAD,
        image_token: str | None = None,
        languages: Sequence[str] = (),
    ):
        vocab = backend.get_vocab()
        roles = {"bos": bos_token, "eos": eos_token, "pad": pad_token, "image": image_token}
        roles |= {f"language {code}": f"<|{code}|>" for code in languages}
        roles = {role: token for role, token in roles.items() if token is not None}
        for role, token in (*roles.items(), *(("eos", token) for token in more_eos_tokens)):
            if token not in vocab:
                raise ValueError(f"the {role} token {token!r} is not among the {len(vocab)} tokens")
        backend.no_truncation()  # a hub tokenizer.json may cut texts at 128 tokens without a word
        backend.no_padding()
        backend.add_special_tokens([AddedToken(token, special=True) for token in roles.values()])
        backend.encode_special_tokens = True  # tokenizer.json and pickles do not keep it
        self.backend = backend
        self.bos_token, self.eos_token, self.pad_token, self.image_token = bos_token, eos_token, pad_token, image_token
        self.more_eos_tokens, self.languages = tuple(more_eos_tokens), tuple(languages)
        self.vocab_size: int = max(vocab.values()) + 1  # ids may have gaps, so not len(vocab)
        self.bos_id, self.eos_id, self.pad_id = vocab[bos_token], vocab[eos_token], vocab[pad_token]
        self.eos_ids: tuple[int, ...] = (self.eos_id, *(vocab[token] for token in more_eos_tokens))
        self.image_token_id: int | None = None if image_token is None else vocab[image_token]
        self._language_ids = {code: vocab[f"<|{code}|>"] for code in self.languages}
        added = backend.get_added_tokens_decoder()
        self._specials = frozenset(i for i, token in added.items() if token.special)
        self._ends = {self.eos_id} | (self._specials & {*self.eos_ids})
        description = check_growth(json.loads(backend.to_str()))
        self._token_bytes = TokenBytes(backend, description, {i: token.content for i, token in added.items()})
        model = description["model"]
        unk = model.get("unk_id", vocab.get(model.get("unk_token")))
        self.unk_id: int | None = None if unk in (self.bos_id, self.pad_id, *self.eos_ids) else unk
        self._forbidden = self._specials - {unk}  # no text gets them
        self.decomposes = self._token_bytes.decomposes

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocab_size} tokens{', languages ' * bool(self.languages)}{', '.join(self.languages)})"

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, languages: Sequence[str] = (), *, min_frequency: int = 2
    ) -> Self:
        """Trains a byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2), lossless on any text.

        The result depends on the texts only, not on their order.

        Args:
            texts: The training texts.
            vocab_size: The most ids to use. The special tokens come first, then the 256 bytes, then merges;
                a corpus that supports fewer merges gives a smaller vocabulary.
            languages: Language codes such as "en", "ko"; each gets a token that opens its captions.
            min_frequency: A pair of pieces is merged only if it occurs at least so often.

        Raises:
            ValueError: If `vocab_size` is too small, or a language code is malformed or doubled.
        """
        check_languages(languages)
        if len(set(languages)) != len(languages):
            raise ValueError(f"languages {list(languages)} names one of them twice")
        specials = [PAD, BOS, EOS, IMAGE, *(f"<|{code}|>" for code in languages)]
        if vocab_size < 256 + len(specials):
            raise ValueError(
                f"vocab_size ({vocab_size}) must be at least {256 + len(specials)}: "
                f"256 bytes and {len(specials)} special tokens"
            )
        backend = tokenizers.Tokenizer(models.BPE())
        backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Prepend(" ")])
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            special_tokens=[AddedToken(token, special=True) for token in specials],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(iter(texts), trainer)
        return cls(backend, image_token=IMAGE, languages=languages)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Reads a tokenizer that `save_pretrained` or a hub wrote: `tokenizer.json`, GPT-2's `vocab.json` and
        `merges.txt`, or BERT's `vocab.txt`.

        The bos, eos and pad tokens are looked up in `tokenizer_config.json`, `special_tokens_map.json`,
        `config.json` and `generation_config.json`, in this order; all that any of them lists as `eos_token_id` end a
        text. A missing bos is replaced by the cls token
        (BERT) or else by eos (GPT-2 and OPT start texts with it); a missing eos by sep (BERT); a missing pad
        by eos, as the hub's language models were trained without padding and `attention_mask` masks it anyway.

        Raises:
            ValueError: If no tokenizer or no eos token is found, or a file cannot be read; names the file and key.
        """
        folder = Path(check_name(folder))
        settings = read_settings(folder)
        backend = read_backend(folder, settings)
        vocab = backend.get_vocab()
        find = partial(find_token, folder, settings, vocab)
        eos = find("eos", "sep")
        if eos is None:
            raise ValueError(
                f'{folder}: no eos token. Add "eos_token": "..." to {folder / "tokenizer_config.json"} '
                f"(looked for eos_token, eos_token_id and sep_token in {', '.join(settings) or 'no config file'})"
            )
        found = cls(
            backend,
            bos_token=find("bos", "cls") or eos,
            eos_token=eos,
            more_eos_tokens=[token for token in find_ends(folder, settings, vocab) if token != eos],
            pad_token=find("pad") or eos,
            image_token=find("image") or (IMAGE if IMAGE in vocab else None),
            languages=read_languages(folder, settings, vocab),
        )
        return found.ending_with(read_end_ids(folder, settings) or found.eos_ids)

    def with_special_tokens(
        self, *, image_token: bool = False, languages: Sequence[str] = (), tokens: Sequence[str] = ()
    ) -> Self:
        """Returns a tokenizer with more special tokens: what a hub's tokenizer lacks to drive a multimodal model.

        Tokens that are there keep their ids. The others get the ids from `vocab_size` on, in the order of the
        arguments, so `ExtendedDecoder(decoder, more.vocab_size - old.vocab_size, first=old.vocab_size)` is a decoder
        that knows them.

        Args:
            image_token: Whether `<|image|>` is wanted, which stands for a picture inside text.
            languages: Codes of languages that are wanted beside those known; each gets a token such as `<|ko|>`.
            tokens: Others, such as "<|endofchunk|>"; no text will get them.

        Raises:
            ValueError: If a language code is malformed, or the ids of the vocabulary have gaps that new ids fall in.
        """
        check_languages(languages)
        known = (*self.languages, *(code for code in dict.fromkeys(languages) if code not in self.languages))
        image = self.image_token or (IMAGE if image_token else None)
        wanted = [IMAGE] * (image_token and self.image_token is None) + [f"<|{code}|>" for code in known] + list(tokens)
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        new = [token for token in dict.fromkeys(wanted) if backend.token_to_id(token) is None]
        backend.add_special_tokens([AddedToken(token, special=True) for token in wanted])
        ids = [backend.token_to_id(token) for token in new]
        if ids != list(range(self.vocab_size, self.vocab_size + len(new))):
            raise ValueError(
                f"{', '.join(new)} got the ids {ids}, not those from {self.vocab_size} on: this tokenizer's "
                f"{len(self.backend.get_vocab())} tokens have gaps among their ids"
            )
        more = type(self)(
            backend,
            bos_token=self.bos_token,
            eos_token=self.eos_token,
            more_eos_tokens=self.more_eos_tokens,
            pad_token=self.pad_token,
            image_token=image,
            languages=known,
        )
        return more.ending_with(self.eos_ids)

    def ending_with(self, eos_ids: Sequence[int]) -> Self:
        """Returns the same tokenizer with other ids that end a text, the first of which ends captions in training.

        They need not be special: BLIP-2's OPT ends at a line's end, which texts may hold all the same.

        Raises:
            ValueError: If there is none, or one is no id of the vocabulary.
        """
        if not eos_ids or not all(0 <= i < self.vocab_size for i in eos_ids):
            raise ValueError(f"eos_token_id {list(eos_ids)}: must be ids of the {self.vocab_size} tokens")
        new = copy.copy(self)
        new.eos_id, new.eos_ids = eos_ids[0], tuple(eos_ids)
        new._ends = self._specials & {*eos_ids}
        return new

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, which the hub's libraries read as well."""
        folder = made_folder(folder)
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "pad_token": self.pad_token,
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": True,
            "languages": list(self.languages),
        }
        if list(self.eos_ids) != [self.backend.token_to_id(x) for x in (self.eos_token, *self.more_eos_tokens)]:
            config["end_ids"] = list(self.eos_ids)
        if self.more_eos_tokens:
            config["eos_token_id"] = list(self.eos_ids)
        if self.image_token is not None:
            config["image_token"] = self.image_token
        self.backend.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", "utf-8")

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.backend.encode_special_tokens = True

    # ------------------------------------------------------------------------------------------- using it

    def prompt(self, language: str | None = None) -> list[int]:
        """Returns the ids that a caption starts after: bos, and the language's token if one is named."""
        if language is None:
            return [self.bos_id]
        if language not in self._language_ids:
            known = ", ".join(self.languages) or "none"
            raise ValueError(
                f"language {language!r} is unknown to this tokenizer; it knows: {known} (others: `with_special_tokens`)"
            )
        return [self.bos_id, self._language_ids[language]]

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without special tokens, whatever the text says."""
        check_encodable(text)
        ids = self._ids(text)
        if not self._forbidden.isdisjoint(ids):  # a word list or a unigram model can spell "</s>" by itself
            for token in map(self._token, self._forbidden):
                text = text.replace(token, f"{token[:1]} {token[1:]}")
            ids = self._ids(text)
            ids = [i for i in ids if i not in self._forbidden]
        return ids

    def _ids(self, text: str) -> list[int]:
        try:
            return self.backend.encode(text, add_special_tokens=False).ids
        except BaseException as error:  # a pattern that tries too many ways ends in Rust's panic, which is no Exception
            if not type(error).__name__.startswith("PanicException"):
                raise
            raise ValueError(
                f"tokenizer.json: its pattern takes too long on a text of {len(text):,} letters, {text[:9]!r} ({error})"
            ) from None

    def encode_source(self, text: str) -> list[int]:
        """Returns what an encoder reads of a text: its ids and the end; which language it is in, the model sees."""
        return [*self.encode(text), self.eos_id]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids: up to eos, without special tokens.

        A character whose last bytes are missing at the end (the caption was cut) is left out.
        """
        data = b"".join(data for _, data in self._bytes(ids))
        data = data.removesuffix(b" ") if self._token_bytes.strips_end else data
        return self._token_bytes.composed(codecs.getincrementaldecoder("utf-8")("replace").decode(data))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Returns what each id adds to the text, one printable piece an id.

        A character split over several ids stands whole in the first one and the others get "". Special
        tokens show their names, also after eos.
        """
        pieces = [self._token(int(i)) if int(i) in self._specials else "" for i in ids]
        for char, owners in self._characters(ids, stop=False):
            pieces[owners[0]] += char
        return pieces

    def words(self, ids: Sequence[int]) -> list[tuple[str, list[int]]]:
        """Returns the words of `decode(ids).split()`, each with the positions in `ids` of its tokens.

        Every token that holds a byte of a word belongs to it, so a syllable split over several byte tokens
        brings all of them; a token of white space alone belongs to no word.
        """
        words: list[tuple[str, list[int]]] = []
        inside = False
        for char, owners in self._characters(ids):
            if char.isspace():
                inside = False
                continue
            text, positions = words.pop() if inside else ("", [])
            positions += [owner for owner in owners if owner not in positions[-1:]]
            words.append((text + char, positions))
            inside = True
        return [(self._token_bytes.composed(word), positions) for word, positions in words]

    def token_bytes(self) -> list[bytes]:
        """Returns the bytes that each id stands for, white space included; none for special tokens."""
        ids = range(self.vocab_size)
        return [b"" if i in self._specials else self._token_bytes[i] for i in ids]

    def pad(self, rows: Sequence[Sequence[int]], side: Literal["right", "left"] = "right") -> tuple[Tensor, Tensor]:
        """Makes one rectangle of rows of different lengths.

        Args:
            rows: The ids of each row.
            side: Where the padding goes: "right" to train, "left" to generate.

        Returns:
            tokens: (b q) long.
            attention_mask: (b q) bool, True = a real token.
        """
        if side not in ("right", "left"):
            raise ValueError(f'side is {side!r}, must be "right" or "left"')
        length = max((len(row) for row in rows), default=0)
        tokens = torch.full((len(rows), length), self.pad_id, dtype=torch.long)
        attention_mask = torch.zeros(len(rows), length, dtype=torch.bool)
        for i, row in enumerate(rows):
            where = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
            tokens[i, where] = torch.as_tensor(row, dtype=torch.long)
            attention_mask[i, where] = True
        return tokens, attention_mask

    def _token(self, index: int) -> str:
        return self.backend.id_to_token(index) or ""  # None for an id in a gap of a hub vocabulary

    def _bytes(self, ids: Sequence[int], stop: bool = True) -> Iterator[tuple[int, bytes]]:
        """Yields the position and the bytes of each id that is text."""
        strip = self._token_bytes.strips_space
        for position, token in enumerate(map(int, ids)):
            if not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"id {token} at position {position} is outside the vocabulary 0..{self.vocab_size - 1}"
                )
            if stop and token in self._ends:
                break
            if token in self._specials:
                continue
            data = self._token_bytes[token]
            if strip and data:
                data, strip = data.removeprefix(b" "), False
            yield position, data

    def _characters(self, ids: Sequence[int], stop: bool = True) -> Iterator[tuple[str, list[int]]]:
        """Yields each character of the text with the positions of the ids that hold its bytes."""
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        pending: list[int] = []  # the position of the id of each byte that is not yet part of a character
        for position, data in self._bytes(ids, stop):
            for byte in data:
                pending.append(position)
                chars = utf8.decode(bytes([byte]))
                for i, char in enumerate(chars):
                    waiting = len(chars) - 1 - i + len(utf8.getstate()[0])
                    yield char, list(dict.fromkeys(pending[: len(pending) - waiting]))
                    pending = pending[len(pending) - waiting :]
