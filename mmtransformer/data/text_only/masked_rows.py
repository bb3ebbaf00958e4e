"""Texts with hidden words, alone or in pairs, as rows: what BERT is trained on (Devlin et al., arXiv:1810.04805).

A row is [bos, text, eos], or [bos, one text, eos, another text, eos]: half of the time the other text is of the same
group (a caption of the same picture), else of another one, and the model is to tell which.

Shapes: n texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmtransformer.batch import Batch
from mmtransformer.data.loading.hashing import hash64
from mmtransformer.data.loading.sampler import SampleIndex
from mmtransformer.data.loading.source import Caption
from mmtransformer.data.text_only.masking import Masking
from mmtransformer.text.tokenizer import Tokenizer


@dataclass
class MaskedBatch(Batch):
    """Rows with hidden tokens.

    Attributes:
        tokens: (b q) long, as the model sees them.
        labels: (b q) long, as they were.
        loss_mask: (b q) bool, True = a token that the model must fill in.
        words: (b q) long, number of each token's word in its row; below 0 = special tokens and padding.
        types: (b q) long, 0 = first text, 1 = second.
        attention_mask: (b q) bool, True = a real token.
        next_sentence_label: (b) long, 0 = both texts are of one group, 1 = they are not, -1 = there is no second text.
        names: the rows' names.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    words: Tensor
    types: Tensor
    attention_mask: Tensor
    next_sentence_label: Tensor
    names: tuple[str, ...] = ()


class MaskedRows:
    """The texts of one split as ids and words, and which pairs an epoch makes of them.

    Args:
        groups: The split, texts that belong together side by side.
        tokenizer: Turns texts into ids.
        masking: Tells words.
        max_len: The most tokens of a row; the longer text of a pair loses its end until both fit.
        nsp: Whether rows are pairs of texts (next sentence prediction).
        seed: Seed of the pairs.

    Attributes:
        cut: Texts that are longer than a row by themselves.

    Raises:
        ValueError: If there is no text, or `max_len` leaves no room.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Caption]],
        tokenizer: Tokenizer,
        masking: Masking,
        *,
        max_len: int,
        nsp: bool = True,
        seed: int = 0,
    ) -> None:
        if max_len < 5:
            raise ValueError(f"max_len ({max_len}) must be at least 5 tokens: bos, text, eos, text, eos")
        self.max_len, self.nsp, self.seed = max_len, nsp, seed
        self.ids = [np.array(tokenizer.encode(text.text)) for group in groups for text in group]
        if not self.ids:
            raise ValueError("there are no texts (0)")
        self.words = [masking.words(ids) for ids in self.ids]
        self.sizes = np.array([len(ids) for ids in self.ids])
        count = np.array([len(group) for group in groups])
        first = np.cumsum(count) - count
        self._count, self._first = np.repeat(count, count), np.repeat(first, count)
        self.cut = int((self.sizes > max_len - 2).sum())

    def __len__(self) -> int:
        """The number of rows: each text is the first of one."""
        return len(self.ids)

    def seconds(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The second text of every row of an epoch (n,), and whether it is of another group (n,) 0, 1.

        Both are -1 where a row has one text: a text without fellows would always be beside a stranger. A pure function
        of (seed, epoch).
        """
        n = len(self)
        index = np.arange(n)
        alone = (self._count < 2) | (self._count == n) | (not self.nsp)
        coin, near, far = (hash64(self.seed, epoch, index, word) for word in (20, 21, 22))
        fellows = np.maximum(self._count - 1, 1)
        step = 1 + (near % fellows.astype(np.uint64)).astype(np.int64)
        fellow = self._first + (index - self._first + step) % self._count
        strangers = np.maximum(n - self._count, 1)
        stranger = (far % strangers.astype(np.uint64)).astype(np.int64)
        stranger += np.where(stranger >= self._first, self._count, 0)
        other = (coin >> np.uint64(63)).astype(np.int64)
        return np.where(alone, -1, np.where(other == 1, stranger, fellow)), np.where(alone, -1, other)

    def lengths(self, epoch: int) -> np.ndarray:
        """The tokens of every row of an epoch, (n,)."""
        second, _ = self.seconds(epoch)
        more = np.where(second >= 0, self.sizes[second] + 1, 0)
        return np.minimum(2 + self.sizes + more, self.max_len)

    def keep(self, one: int, two: int | None) -> tuple[int, int]:
        """How many tokens of two texts (or one) of these sizes a row holds."""
        room = self.max_len - 2 - (two is not None)
        two = two or 0
        while one + two > room:  # the longer one first, as BERT's authors do
            longer = max(one, two)
            shorter = min(one, two)
            off = max(1, min(one + two - room, longer - shorter))
            one, two = (one - off, two) if one >= two else (one, two - off)
        return one, two


class MaskedSample(NamedTuple):
    """One row before anything is hidden.

    Attributes:
        ids: (q,) with bos and eos.
        words: (q,) numbers of words, -1 = bos and eos.
        second: Where the second text begins; q if there is none.
        next_sentence_label: Whether that is of another group: 0, 1, or -1 if there is none.
        keys: (3,) seed, epoch, index: what the hidden words depend on.
        is_real: Whether the row counts.
    """

    ids: np.ndarray
    words: np.ndarray
    second: int
    next_sentence_label: int
    keys: tuple[int, int, int]
    is_real: bool


class MaskedDataset(Dataset[MaskedSample]):
    """One split's rows; what it returns depends on the `SampleIndex` only.

    Args:
        rows: The rows.
        bos_id: What opens a row.
        eos_id: What ends each text.
        training: Other pairs and masks every epoch; else always those of epoch 0.
    """

    def __init__(self, rows: MaskedRows, bos_id: int, eos_id: int, *, training: bool = True) -> None:
        self.rows, self.bos_id, self.eos_id, self.training = rows, bos_id, eos_id, training
        self._made: tuple[int, np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.rows)

    def __getitem__(self, pick: SampleIndex) -> MaskedSample:
        """A row of an epoch."""
        rows, epoch = self.rows, pick.epoch if self.training else 0
        if self._made is None or self._made[0] != epoch:
            self._made = (epoch, *rows.seconds(epoch))
        two, other = int(self._made[1][pick.index]), int(self._made[2][pick.index])
        sizes = rows.keep(int(rows.sizes[pick.index]), int(rows.sizes[two]) if two >= 0 else None)
        ids = [[self.bos_id], rows.ids[pick.index][: sizes[0]], [self.eos_id]]
        first = rows.words[pick.index][: sizes[0]]
        words = [[-1], first, [-1]]
        if two >= 0:
            ids += [rows.ids[two][: sizes[1]], [self.eos_id]]
            words += [rows.words[two][: sizes[1]] + (first.max(initial=-1) + 1), [-1]]
        return MaskedSample(
            np.concatenate(ids).astype(np.int64),
            np.concatenate(words).astype(np.int64),
            sizes[0] + 2,
            other,
            (rows.seed, epoch, pick.index),
            pick.is_real,
        )


class MaskedCollate:
    """Makes one `MaskedBatch` of rows.

    Args:
        masking: Hides words.
        pad_id: The id that fills the rows up.
        name: The split's name.
    """

    def __init__(self, masking: Masking, pad_id: int, name: str) -> None:
        self.masking, self.pad_id, self.name = masking, pad_id, name

    def __call__(self, samples: list[MaskedSample]) -> MaskedBatch:
        """Pad, and hide words."""
        lengths = np.array([len(sample.ids) for sample in samples])
        place = np.arange(lengths.max())
        attention_mask = place < lengths[:, None]
        labels, words = (
            np.full(attention_mask.shape, self.pad_id, np.int64),
            np.full(attention_mask.shape, -1, np.int64),
        )
        labels[attention_mask] = np.concatenate([sample.ids for sample in samples])
        words[attention_mask] = np.concatenate([sample.words for sample in samples])
        keys = np.array([sample.keys for sample in samples])
        tokens, loss_mask = self.masking.hide(labels, words, keys)
        is_real = np.array([sample.is_real for sample in samples])
        second = np.array([sample.second for sample in samples])
        other = np.where(is_real, np.array([sample.next_sentence_label for sample in samples]), -1)
        found = {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": loss_mask & is_real[:, None],
            "words": words,
            "types": (attention_mask & (place >= second[:, None])).astype(np.int64),
            "attention_mask": attention_mask,
            "next_sentence_label": other,
        }
        names = tuple(f"{self.name} {sample.keys[2]}" for sample in samples if sample.is_real)
        return MaskedBatch(**{key: torch.from_numpy(array) for key, array in found.items()}, names=names)
