"""Keys and values that are kept: of a context, projected once, and of the tokens so far."""

from typing import NamedTuple

import torch
from torch import Tensor


class KeyValue(NamedTuple):
    """Keys and values, each (b g k c), already projected: what a cross-attention cache is."""

    k: Tensor
    v: Tensor

    def select(self, rows: Tensor) -> "KeyValue":
        """Returns the given rows, in their order; `rows` is (b) long."""
        return KeyValue(self.k.index_select(0, rows), self.v.index_select(0, rows))


class KVCache:
    """Keys and values of the tokens so far, for one self-attention layer.

    Room for `max_len` tokens is taken at the first append and never grows; beams are reordered in place of rows.

    Args:
        max_len: the most tokens that the cache will hold.
    """

    def __init__(self, max_len: int) -> None:
        self.max_len = max_len
        self.length = 0
        self.cache_position: Tensor | None = None
        """(1) long: where the next token goes, once the cache is static; `length` then counts no further."""
        self._kv: KeyValue | None = None
        self._spare: KeyValue | None = None

    def append(self, new: KeyValue) -> KeyValue:
        """Adds the keys and values of new tokens, returns those of all tokens so far (static: of all that fit).

        Raises:
            ValueError: if the tokens do not fit.
        """
        if self.cache_position is not None:
            k, v = self.view()
            return KeyValue(k.index_copy_(2, self.cache_position, new.k), v.index_copy_(2, self.cache_position, new.v))
        count = new.k.shape[2]
        end = self.length + count
        if end > self.max_len:
            raise ValueError(f"the cache holds {self.max_len} tokens, but {end} are needed: raise max_len")
        if self._kv is None:
            self._kv = KeyValue(*(x.new_empty(*x.shape[:2], self.max_len, x.shape[3]) for x in new))
        k, v = self._kv
        k.narrow(2, self.length, count).copy_(new.k)
        v.narrow(2, self.length, count).copy_(new.v)
        self.length = end
        return KeyValue(k.narrow(2, 0, end), v.narrow(2, 0, end))

    def view(self) -> KeyValue:
        """The keys and values of all tokens so far; of a static cache, of all that there is room for."""
        if self._kv is None:
            raise ValueError("the cache is empty")
        if self.cache_position is not None:
            return self._kv
        return KeyValue(*(x.narrow(2, 0, self.length) for x in self._kv))

    def make_static(self, cache_position: Tensor) -> None:
        """From now on tokens come one by one, and each costs the same operations on the same tensors.

        Args:
            cache_position: (1) long, where the next token goes; who calls moves it on.
        """
        assert self._kv is not None
        for x in self._kv:
            x[:, :, self.length :] = 0  # Weight 0 times what is not finite would not be 0.
        self.cache_position = cache_position

    @torch.no_grad()  # Decoding only; and what is written into given memory could have no gradient.
    def reorder(self, rows: Tensor) -> None:
        """Keeps the given rows (b), in their order; a row may be named more than once (beams)."""
        if self._kv is None:
            return
        held = self._kv
        shape = (rows.shape[0], *held.k.shape[1:])
        if self._spare is None or self._spare.k.shape != shape:
            self._spare = KeyValue(held.k.new_empty(shape), held.v.new_empty(shape))
        used = held.k.shape[2] if self.cache_position is not None else self.length
        for x, kept in zip(held, self._spare, strict=True):
            torch.index_select(x.narrow(2, 0, used), 0, rows, out=kept.narrow(2, 0, used))
        if self.cache_position is not None and shape == held.k.shape:  # What is recorded knows this memory, no other.
            for x, kept in zip(held, self._spare, strict=True):
                x.copy_(kept)
            return
        self._kv, self._spare = self._spare, held if held.k.shape == shape else None
