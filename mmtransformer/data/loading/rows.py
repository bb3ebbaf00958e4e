"""Captions as rows of ids: tokenised once, kept in flat arrays, chosen by hash.

Of pairs that have an index (`Contents`) the arrays are kept in the user's cache too, each tokenizer's by themselves.
"""

import hashlib
import json
import re
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tqdm import tqdm

from mmtransformer.data.loading.fingerprints import text_sum
from mmtransformer.data.loading.hashing import hash64
from mmtransformer.data.loading.source import Caption, Contents, Lazy, Pairs
from mmtransformer.serialization.mapped import SUFFIX, Mapped, cache_folder, mapped_or_made
from mmtransformer.serialization.printable import counted
from mmtransformer.text.tokenizer import Tokenizer

_AT_ONCE = 1 << 16  # pictures

# A mirrored picture would make these words wrong. Too many matches only cost a flip ("오른" is also "climbed").
_SIDES = re.compile(
    r"\b(?:left|right)|clockwise|왼|오른|좌측|우측|좌우|좌회전|우회전|시계\s?방향|반시계"
    r"|(?<![가-힣])[좌우](?:로|에|의|는|에서|편|상단|하단)?(?![가-힣])"
    r"|[左右]|\b(?:links|rechts|gauche|droite?s?|izquierd|derech|esquerd|direit|sinistr|destr)",
    re.IGNORECASE,
)


def names_a_side(text: str) -> bool:
    """Tell whether a caption speaks of left or right, so that its picture must not be mirrored."""
    return _SIDES.search(text) is not None


def image_token(tokenizer: Tokenizer) -> int:
    """The id of the token that stands for a picture in text.

    Raises:
        ValueError: The tokenizer has none.
    """
    if tokenizer.image_token_id is None:
        raise ValueError(
            f"the tokenizer ({tokenizer.vocab_size} tokens) has no image token, so no text can say where a picture "
            'stands; add one: "image_token" in its tokenizer_config.json names a token of the vocabulary'
        )
    return tokenizer.image_token_id


class CaptionRow(NamedTuple):
    """One caption, ready for a batch.

    Attributes:
        tokens: (q,) prompt, caption and eos; eos is missing where the caption was cut.
        prompt: How many of them are the prompt.
        is_real: Whether the caption is a target of training or of the validation loss.
    """

    tokens: np.ndarray
    prompt: int
    is_real: bool


class Opening(NamedTuple):
    """What a public model's captions stand after in training.

    Attributes:
        ids: the prompt.
        before: what stands between prompt and caption, a space where the prompt ends with a word.
    """

    ids: list[int]
    before: str


class CaptionRows:
    """The captions of one split as ids: [bos, language tag, image token if asked] + caption + eos.

    Args:
        pairs: The split.
        tokenizer: Turns captions into ids.
        max_len: The most tokens of a row, prompt and eos included. A longer caption is cut, and then it does not
            teach that it ends there.
        mark: Whether the prompt ends with the image token.
        opening: For a public model, what stands before a caption in place of that, by the question that it answers
            (None = no question); its tokens are not in `max_len`.

    Raises:
        ValueError: If the tokenizer has no image token and should have one, a picture has no caption, a caption's
            language has no tag in the tokenizer, or `max_len` leaves no room.
    """

    def __init__(
        self,
        pairs: Pairs,
        tokenizer: Tokenizer,
        max_len: int,
        *,
        mark: bool = False,
        opening: Callable[[str | None], Opening] | None = None,
    ):
        if max_len < 4 + mark:
            raise ValueError(
                f"max_len ({max_len}) must be at least {counted(4 + mark, 'token')}: bos, language, "
                f"{'image, ' * mark}one of caption, eos"
            )
        self.captions: Sequence[tuple[Caption, ...]] = Lazy(len(pairs), partial(_captions_of, pairs))
        contents: Contents | None = getattr(pairs, "contents", None)
        if contents is None:
            self.captions = [*self.captions]
        make = partial(_tokenized, pairs, self.captions, tokenizer, max_len, mark, opening, contents is not None)
        if contents is None or opening is not None:  # no file can say all that prompts of public models depend on
            self._made = make()
        else:
            path, identity = _place(contents, tokenizer, max_len, mark)
            self._made = mapped_or_made(path, identity, make)
        self._take()

    def _take(self) -> None:
        """Gives what was made its names; of a file nothing is read by that."""
        made = self._made
        arrays, about = (made.arrays, made.about) if isinstance(made, Mapped) else made
        self.tokens, self.starts, self.sizes = arrays["tokens"], arrays["starts"], arrays["sizes"]
        self.prompt, self.count, self.first = arrays["prompt"], arrays["count"], arrays["first"]
        self.mirrors: np.ndarray = arrays["mirrors"].view(bool)
        self.sums: np.ndarray | None = arrays["sums"].view(np.uint32) if "sums" in arrays else None
        self.cut, self.longest, self.asked = about["cut"], about["longest"], about["asked"]
        self.languages: tuple[str | None, ...] = tuple(about["languages"])

    def __getstate__(self) -> dict[str, Any]:
        return {"captions": self.captions, "_made": self._made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._take()

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self.captions)

    def choose(self, seed: int, epoch: int | np.ndarray, index: np.ndarray, rows: int) -> np.ndarray:
        """Choose the captions of pictures for an epoch: a pure function of (seed, epoch, index).

        A picture with more captions than rows goes through a shuffled list of them, so that none comes again before
        the others had their turn; one with fewer repeats some.

        Args:
            seed: Seed of the run.
            epoch: The epoch, or that of each picture, (b,).
            index: Pictures, (b,).
            rows: Captions of each picture, r.

        Returns:
            Caption numbers, (b r).
        """
        count, epoch = self.count[index][:, None], np.reshape(epoch, (-1, 1))
        if count.max() == 1:
            return np.repeat(self.first[index][:, None], rows, axis=1)
        turns = np.maximum(count // rows, 1)  # epochs until the list is shuffled anew
        place = np.arange(count.max())
        keys = hash64(seed, epoch // turns, index[:, None], place, 2)
        order = np.argsort(np.where(place < count, keys, np.iinfo(np.uint64).max), axis=1, kind="stable")
        column = (epoch % turns * rows + np.arange(rows)) % count
        return self.first[index][:, None] + np.take_along_axis(order, column, axis=1)

    def lengths(self, seed: int, epoch: int | np.ndarray, rows: int, index: np.ndarray | None = None) -> np.ndarray:
        """Measure the longest chosen caption of pictures (of all unless told) in an epoch, in tokens, (n,)."""
        index = np.arange(len(self)) if index is None else index
        found = np.empty(len(index), np.int64)
        for at in range(0, len(index), _AT_ONCE):  # of millions the keys that captions are shuffled by would take GB
            some = slice(at, at + _AT_ONCE)
            times = epoch if isinstance(epoch, int) else epoch[some]
            found[some] = self.sizes[self.choose(seed, times, index[some], rows)].max(axis=1)
        return found

    def row(self, caption: int, is_real: bool = True) -> CaptionRow:
        """Return one caption by its number."""
        return CaptionRow(
            self.tokens[self.starts[caption] : self.starts[caption + 1]], int(self.prompt[caption]), is_real
        )

    def fixed(self, i: int, rows: int) -> list[CaptionRow]:
        """Return the captions of picture i that evaluation uses: the first of each language, the second, and so on.

        Where there are fewer than `rows`, the first one is repeated without being counted.
        """
        seen: dict[str | None, int] = {}
        ranks = []
        for j, caption in enumerate(self.captions[i]):
            seen[caption.language] = seen.get(caption.language, -1) + 1
            ranks.append((seen[caption.language], self.languages.index(caption.language), j))
        chosen = [j for _, _, j in sorted(ranks)[:rows]]
        first = int(self.first[i])
        return [self.row(first + j) for j in chosen] + [
            self.row(first + chosen[0], is_real=False) for _ in range(rows - len(chosen))
        ]


def _captions_of(pairs: Pairs, i: int) -> tuple[Caption, ...]:
    return tuple(pairs.captions(i))


def _place(contents: Contents, tokenizer: Tokenizer, max_len: int, mark: bool) -> tuple[Path, dict[str, Any]]:
    """Where the ids of a split's captions lie, and what they are of."""
    prompts = [tokenizer.prompt(code) for code in (None, *tokenizer.languages)]
    how = [tokenizer.backend.to_str(), tokenizers.__version__, tokenizer.languages, prompts, tokenizer.eos_id]
    key = hashlib.sha256(json.dumps([*how, tokenizer.image_token_id, max_len, mark]).encode()).hexdigest()[:16]
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    return cache_folder("captions") / f"{contents.name}-{key}{SUFFIX}", {"pairs": contents.checksum, "code": code}


def _main_language(groups: Sequence[tuple[Caption, ...]]) -> str:
    """The language of most captions."""
    counts = Counter(caption.language for captions in groups for caption in captions if caption.language)
    return counts.most_common(1)[0][0] if counts else "CODE"


def _tokenized(
    pairs: Pairs,
    groups: Sequence[tuple[Caption, ...]],
    tokenizer: Tokenizer,
    max_len: int,
    mark: bool,
    opening: Callable[[str | None], Opening] | None,
    many: bool,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The captions of all pictures as ids; see `CaptionRows`. Of many progress is shown, and check sums are made."""
    languages = tuple(dict.fromkeys(c.language for captions in groups for c in captions))
    if not tokenizer.languages and len(languages) > 1:
        listed = ", ".join(map(str, languages))
        raise ValueError(
            f"the captions are in {len(languages)} languages ({listed}) but the tokenizer has no language tags. If "
            f"those without a sign of their own are of one, name it: --data.read.default_language "
            f"{_main_language(groups)}; to learn one of them alone: --data.read.languages {_main_language(groups)}; a "
            f"model that learns from the beginning may have a tokenizer trained on these: --data.tokenizer null"
        )
    tags = tokenizer.languages
    ending = [image_token(tokenizer)] if mark else []
    plain = {code: Opening(tokenizer.prompt(code if tags else None) + ending, "") for code in languages}
    tokens, sizes, prompt, count = (array("i") for _ in range(4))
    sums = array("I")
    mirrors, longest, cut, questions = bytearray(), 0, 0, 0
    asked: dict[str | None, Opening] = {}
    bar = tqdm(groups, desc="captions to ids", unit=" pictures", leave=False, dynamic_ncols=True, disable=not many)
    for i, captions in enumerate(bar):
        if not captions:
            raise ValueError(f"picture {pairs.name(i)!r} has no caption; leave it out or write one")
        for caption in captions:
            if opening is None:
                ids, before = plain[caption.language]
            elif caption.question in asked:
                ids, before = asked[caption.question]
            else:
                ids, before = asked[caption.question] = opening(caption.question)
            room = max_len + (0 if opening is None else len(ids))
            row = [*ids, *tokenizer.encode(before + caption.text), tokenizer.eos_id]
            longest = max(longest, len(row))
            cut += len(row) > room
            tokens.extend(row[:room])
            sizes.append(min(len(row), room))
            prompt.append(len(ids))
        count.append(len(captions))
        questions += captions[0].question is not None
        mirrors.append(not any(names_a_side(f"{c.question or ''} {c.text}") for c in captions))
        if many:
            sums.append(text_sum(pairs.name(i), (part for caption in captions for part in caption)))
    arrays: dict[str, np.ndarray] = {name: np.frombuffer(values, np.int32) for name, values in
              (("tokens", tokens), ("sizes", sizes), ("prompt", prompt), ("count", count))}  # fmt: skip
    arrays["mirrors"] = np.frombuffer(mirrors, np.uint8)
    arrays |= {
        name: np.concatenate([[0], np.cumsum(arrays[of], dtype=np.int64)])
        for name, of in (("starts", "sizes"), ("first", "count"))
    }
    if many:
        arrays["sums"] = np.frombuffer(sums, np.uint32).view(np.int32)
    return arrays, {"cut": cut, "longest": longest, "asked": questions, "languages": languages}
