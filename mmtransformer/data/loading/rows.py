"""Captions as rows of ids: tokenised once, kept in flat arrays, chosen by hash."""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mmtransformer.data.loading.hashing import hash64
from mmtransformer.data.loading.source import Caption, Pairs
from mmtransformer.serialization.printable import counted
from mmtransformer.text.tokenizer import Tokenizer

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
    if tokenizer.image_id is None:
        raise ValueError(
            f"the tokenizer ({tokenizer.vocab_size} tokens) has no image token, so no text can say where a picture "
            'stands; add one: "image_token" in its tokenizer_config.json names a token of the vocabulary'
        )
    return tokenizer.image_id


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
        self.cut, self.longest = 0, 0
        self.captions: list[tuple[Caption, ...]] = [tuple(pairs.captions(i)) for i in range(len(pairs))]
        self.languages = tuple(dict.fromkeys(c.language for captions in self.captions for c in captions))
        if not tokenizer.languages and len(self.languages) > 1:
            raise ValueError(
                f"the captions are in {len(self.languages)} languages ({', '.join(map(str, self.languages))}) but the "
                f"tokenizer has no language tags; train one on these captions (tokenizer: null)"
            )
        tags = tokenizer.languages
        ending = [image_token(tokenizer)] if mark else []
        plain = {code: Opening(tokenizer.prompt(code if tags else None) + ending, "") for code in self.languages}
        tokens, starts, prompt = [], [0], []
        asked: dict[str | None, Opening] = {}
        for i, captions in enumerate(self.captions):
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
                self.longest = max(self.longest, len(row))
                if len(row) > room:
                    self.cut += 1
                tokens.append(np.asarray(row[:room], np.int32))
                starts.append(starts[-1] + len(tokens[-1]))
                prompt.append(len(ids))
        self.count = np.array([len(captions) for captions in self.captions])
        self.first = np.concatenate([[0], np.cumsum(self.count)])
        self.tokens, self.starts, self.prompt = np.concatenate(tokens), np.array(starts), np.array(prompt)
        sided = (any(names_a_side(f"{c.question or ''} {c.text}") for c in captions) for captions in self.captions)
        self.mirrors = ~np.array([*sided], bool)

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
        turns = np.maximum(count // rows, 1)  # epochs until the list is shuffled anew
        place = np.arange(count.max())
        keys = hash64(seed, epoch // turns, index[:, None], place, 2)
        order = np.argsort(np.where(place < count, keys, np.iinfo(np.uint64).max), axis=1, kind="stable")
        column = (epoch % turns * rows + np.arange(rows)) % count
        return self.first[index][:, None] + np.take_along_axis(order, column, axis=1)

    def lengths(self, seed: int, epoch: int | np.ndarray, rows: int, index: np.ndarray | None = None) -> np.ndarray:
        """Measure the longest chosen caption of pictures (of all unless told) in an epoch, in tokens, (n,)."""
        index = np.arange(len(self)) if index is None else index
        return np.diff(self.starts)[self.choose(seed, epoch, index, rows)].max(axis=1)

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
