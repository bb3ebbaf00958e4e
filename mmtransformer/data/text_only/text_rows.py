"""Texts as rows of ids without padding: tokenised once, and put together so that rows are exactly full.

For how full a row is, lengths alone matter, and texts of one length can stand for each other. So which lengths make up
which row is settled once, and an epoch only says which text stands in which place of its length: a pure function of
(seed, epoch), with every text in exactly one place. Between epochs texts meet other neighbours, which they do not see.
"""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from mmtransformer.data.loading.hashing import hash64
from mmtransformer.data.loading.source import Caption
from mmtransformer.text.tokenizer import Tokenizer

_MOST_TRIPLES = 256  # tokens of room up to which three texts are looked for, at its square in time


class TextRow(NamedTuple):
    """One row of packed texts.

    Attributes:
        tokens: (q,) ids.
        document_ids: (q,) number of each token's text in the row, from 0.
        loss_mask: (q,) bool: text and end, not prompts, not the tokens that a part of a long text repeats.
        parts: Numbers of the parts (see `TextRows`) in it, from left to right.
    """

    tokens: np.ndarray
    document_ids: np.ndarray
    loss_mask: np.ndarray
    parts: np.ndarray


class TextRows:
    """The texts of one split as packed rows of ids, each text [bos, language tag] + text + eos.

    A text of more than `max_len` tokens is divided into parts, each of which stands for itself and begins with the
    last token of the one before, so that every token is predicted once.

    Args:
        texts: The split.
        tokenizer: Turns texts into ids.
        max_len: The most tokens that see each other.
        row_len: Tokens of a row.
        seed: Seed of the rows.

    Attributes:
        languages: The languages of the texts, None where there is none.
        divided: Texts that were divided.
        longest: Tokens of the longest text.

    Raises:
        ValueError: If there is no text, a language has no tag in the tokenizer, or a length leaves no room.
    """

    def __init__(
        self, texts: Sequence[Caption], tokenizer: Tokenizer, *, max_len: int, row_len: int, seed: int = 0
    ) -> None:
        if not texts:
            raise ValueError("there are no texts (0)")
        if max_len < 4:
            raise ValueError(f"max_len ({max_len}) must be at least 4 tokens: bos, language, one of text, eos")
        if row_len < max_len:
            raise ValueError(f"row_len ({row_len}) must be at least max_len ({max_len})")
        self.seed, self.row_len = seed, row_len
        self.languages = tuple(dict.fromkeys(text.language for text in texts))
        if not tokenizer.languages and len(self.languages) > 1:
            raise ValueError(
                f"the texts are in {len(self.languages)} languages ({', '.join(map(str, self.languages))}) but the "
                f"tokenizer has no language tags; train one on these texts (tokenizer: null)"
            )
        prompts = {code: tokenizer.prompt(code if tokenizer.languages else None) for code in self.languages}
        ids = [[*prompts[text.language], *tokenizer.encode(text.text), tokenizer.eos_id] for text in texts]
        sizes = np.array([len(row) for row in ids])
        self.tokens = np.concatenate([np.asarray(row, np.int32) for row in ids])
        """(t,) ids of all texts, one after the other."""
        self.starts = np.concatenate([[0], np.cumsum(sizes)])
        """(n + 1,) where each text begins."""
        self.prompt = np.array([len(prompts[text.language]) for text in texts])
        self.language = np.array([self.languages.index(text.language) for text in texts])
        self.bytes = np.array([len(text.text.encode()) for text in texts])
        self.words = np.array([len(text.text.split()) for text in texts])
        self.longest, self.divided = int(sizes.max()), int((sizes > max_len).sum())
        # A part of m tokens goes on where the one before it ended, but for one token that both have.
        count = np.maximum(1, -(-(sizes - 1) // (max_len - 1)))
        self.text_of = np.repeat(np.arange(len(texts)), count)
        """(p,) the text of every part."""
        place = np.arange(len(self.text_of)) - np.repeat(np.cumsum(count) - count, count)
        self._begin = self.starts[self.text_of] + place * (max_len - 1)
        self._end = np.minimum(self._begin + max_len, self.starts[self.text_of + 1])
        self.first = place == 0
        """(p,) bool: the part is the text's first, or all of it."""
        self._skip = np.where(place == 0, self.prompt[self.text_of], 1)
        self.lengths = self._end - self._begin
        """(p,) tokens of every part."""
        plan = fill_rows(self.lengths, row_len, seed)
        slots = np.concatenate([np.asarray(row) for row in plan])
        self._slots = np.argsort(slots, kind="stable")
        self._rows = np.concatenate([[0], np.cumsum([len(row) for row in plan])])
        self._filled: tuple[int, np.ndarray] | None = None

    @cached_property
    def bits_per_byte(self) -> float:
        """What makes bits a byte of text of a mean loss in nats a target token."""
        return float(self.loss_mask.sum() / self.bytes.sum() / math.log(2.0))

    def __len__(self) -> int:
        """The number of rows, the same in every epoch."""
        return len(self._rows) - 1

    @property
    def padding(self) -> float:
        """The share of the rows' places that holds no token."""
        return 1 - float(self.lengths.sum()) / (len(self) * self.row_len)

    @property
    def loss_mask(self) -> np.ndarray:
        """(t,) bool: which of `tokens` are to be predicted: texts and ends, not prompts."""
        sizes = np.diff(self.starts)
        return np.arange(len(self.tokens)) >= np.repeat(self.starts[:-1] + self.prompt, sizes)

    def parts(self, epoch: int) -> np.ndarray:
        """Which part stands where in an epoch, row after row: (p,), each part once."""
        if self._filled is None or self._filled[0] != epoch:
            by_length = np.lexsort((hash64(self.seed, epoch, np.arange(len(self.lengths)), 7), self.lengths))
            parts = np.empty_like(by_length)
            parts[self._slots] = by_length
            self._filled = (epoch, parts)
        return self._filled[1]

    def row(self, epoch: int, i: int) -> TextRow:
        """Row i of an epoch."""
        parts = self.parts(epoch)[self._rows[i] : self._rows[i + 1]]
        spans = [slice(self._begin[part], self._end[part]) for part in parts]
        sizes = self.lengths[parts]
        first = np.repeat(np.cumsum(sizes) - sizes, sizes)
        return TextRow(
            tokens=np.concatenate([self.tokens[span] for span in spans]),
            document_ids=np.repeat(np.arange(len(parts)), sizes),
            loss_mask=np.arange(len(first)) - first >= np.repeat(self._skip[parts], sizes),
            parts=parts,
        )


def fill_rows(lengths: np.ndarray, row_len: int, seed: int = 0) -> list[list[int]]:
    """Makes rows of at most `row_len` tokens out of texts of these lengths, nearly all of them exactly full.

    Texts come in a random order; where one, two or three texts of lengths that are still there fill what is left of a
    row exactly, those end it. Where the next text does not fit, the longest that does is taken. So only the last rows,
    when few texts are left to choose from, have room to spare.

    Args:
        lengths: (n,) tokens of each text, from 1 to `row_len`.
        row_len: Tokens of a row.
        seed: Seed of the order.

    Returns:
        The lengths in each row.
    """
    left = np.bincount(lengths, minlength=row_len + 1)
    order = lengths[np.argsort(hash64(seed, np.arange(len(lengths)), 6), kind="stable")].tolist()
    early = [0] * (row_len + 1)  # texts of a length that were placed before it was their turn
    near, shortest = 2 * int(np.median(lengths)), int(lengths.min())
    rows: list[list[int]] = []
    at = 0
    while True:
        row, room = list[int](), row_len
        while room:
            while at < len(order) and early[order[at]]:
                early[order[at]] -= 1
                at += 1
            if at == len(order):
                break
            rest = room - order[at]
            ending = room <= near or (rest < shortest and rest != 0)
            if ending and (some := _exactly(left, room)):
                ahead = some
            elif order[at] <= room:
                some, ahead = [order[at]], []
                at += 1
            elif len(fits := np.flatnonzero(left[: room + 1])):
                ahead = some = [int(fits[-1])]
            else:
                break
            for length in some:
                left[length] -= 1
            for length in ahead:
                early[length] += 1
            row += some
            room -= sum(some)
        if not row:
            return rows
        rows.append(row)


def _exactly(left: np.ndarray, room: int) -> list[int]:
    """One, two or three lengths that are `left` and make up the room; of those, the most frequent; [] if none do."""
    one, other = left[1:room], left[room - 1 : 0 : -1]
    both = np.minimum(one, other)
    if room % 2 == 0 and room > 1:
        both[room // 2 - 1] //= 2
    pair = int(both.argmax()) if len(both) else 0
    if left[room] and (not len(both) or left[room] >= both[pair]):
        return [room]
    if len(both) and both[pair]:
        return [pair + 1, room - pair - 1]
    if room <= _MOST_TRIPLES:
        for first in np.flatnonzero(left[1:room]) + 1:
            left[first] -= 1
            rest = room - int(first)
            both = np.minimum(left[1:rest], left[rest - 1 : 0 : -1])
            if rest % 2 == 0 and len(both):
                both[rest // 2 - 1] //= 2
            left[first] += 1
            if both.any():
                second = int(both.argmax()) + 1
                return [int(first), second, rest - second]
    return []
