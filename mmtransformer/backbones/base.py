"""What every causal language model of the library is to the bridges: `Decoder`, and what it remembers: `DecoderState`.

Letters: b rows, q new tokens, k tokens so far, d width of a token, e width of an embedding, n rows of a table.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from mmtransformer.layers import masks
from mmtransformer.layers.attention import KVCache, Mask


class Cache(Protocol):
    """Keys and values of the tokens so far, of one layer or of many."""

    @property
    def length(self) -> int:
        """Tokens so far."""
        ...

    def reorder(self, rows: Tensor) -> None:
        """Keeps the given rows (b) long, in their order."""
        ...


@dataclass
class PromptBatch:
    """Texts to go on from, for `generate`.

    Attributes:
        tokens: (b q) long, padded on the left.
        attention_mask: (b q) bool, True = a real token.
    """

    tokens: Tensor
    attention_mask: Tensor


class DecoderState:
    """What decoding remembers of the tokens so far: a cache a block, the padding, and each row's next position.

    Args:
        depth: number of blocks.
        max_len: most tokens, prompt included.
        caches: other caches than those of our own blocks; None = a `KVCache` a block.
    """

    def __init__(self, depth: int, max_len: int, *, caches: Sequence[Cache] | None = None) -> None:
        self.caches = [KVCache(max_len) for _ in range(depth)] if caches is None else list(caches)
        self.max_len = max_len
        self.positions: Tensor | None = None
        """(b) long: the position that a row's next token gets."""
        self.cache_position: Tensor | None = None
        """(1) long: the place that the next token gets in the caches, once the state is fixed."""
        self._attention_mask: Tensor | None = None  # (b max_len); None as long as no token is padding.

    @property
    def length(self) -> int:
        """Tokens so far, padding included; of a fixed state, when it was fixed."""
        return self.caches[0].length

    @property
    def past(self) -> int | Tensor:
        """Tokens before the next one, as a tensor where the state is fixed."""
        return self.length if self.cache_position is None else self.cache_position

    def make_static(self) -> None:
        """From now on tokens come one by one, and a step does the same operations on the same tensors every time.

        So a step can be recorded and played again (`CudaGraphDecoder`).

        Raises:
            ValueError: if nothing was read yet, or the caches are not the library's own.
        """
        for cache in self.caches:
            if not isinstance(cache, KVCache):
                raise ValueError(
                    f"a {type(cache).__name__} grows with every token, so no step is like another: only decoders of "
                    "the library's own blocks can be recorded"
                )
        if self.positions is None:
            raise ValueError("a state is fixed after its prompt was read, and this one has read nothing")
        rows, device = self.positions.shape[0], self.positions.device
        if self._attention_mask is None:
            self._attention_mask = torch.arange(self.max_len, device=device).expand(rows, -1) < self.length
        self.cache_position = torch.full((1,), self.length, device=device)
        for cache in self.caches:
            cache.make_static(self.cache_position)  # pyright: ignore[reportAttributeAccessIssue]  # All are KVCaches.

    def reorder(self, rows: Tensor) -> None:
        """Keeps the given rows (b) long, in their order; a row may be named more than once."""
        for cache in self.caches:
            cache.reorder(rows)
        if self._attention_mask is not None:
            self._attention_mask = kept_rows(self._attention_mask, rows)
        if self.positions is not None:
            self.positions = kept_rows(self.positions, rows)

    def keys(
        self, rows: int, count: int, attention_mask: Tensor | None, device: torch.device
    ) -> Tensor | None:
        """Which keys, those so far and `count` new ones, are real tokens: (b k) bool; None = all.

        Args:
            rows: b.
            count: how many tokens a row come next.
            attention_mask: which of them are real (b count); None = all.
            device: where they are.
        """
        if self.cache_position is not None:
            assert self._attention_mask is not None
            return self._attention_mask.index_fill_(1, self.cache_position, True)
        end = self.length + count
        if self._attention_mask is None and attention_mask is not None:
            self._attention_mask = torch.zeros(rows, self.max_len, dtype=torch.bool, device=device)
            self._attention_mask[:, : self.length] = True
        if self._attention_mask is None:
            return None
        if end > self.max_len:
            raise ValueError(f"the state holds {self.max_len} tokens, but {end} are needed: raise max_len")
        self._attention_mask[:, self.length : end] = True if attention_mask is None else attention_mask
        return self._attention_mask[:, :end]

    def advance(self, positions: Tensor, attention_mask: Tensor | None, rows: int, count: int) -> None:
        """Notes the positions of `count` tokens a row that have just been cached."""
        if self.cache_position is not None:
            assert self.positions is not None
            self.positions += 1
            self.cache_position += 1
            return
        following = (positions + 1).expand(rows, count)
        if (
            attention_mask is not None
        ):  # Padding takes no position, also where all of a row's new tokens are padding.
            following = following.masked_fill(~attention_mask, 0)
        last = following.max(dim=-1).values
        self.positions = last if self.positions is None else last.maximum(self.positions)


def kept_rows(x: Tensor, rows: Tensor) -> Tensor:
    """The given rows of a tensor, in their order: in the same memory if they are as many."""
    kept = x.index_select(0, rows)
    return x.copy_(kept) if kept.shape == x.shape else kept


class State(Protocol):
    """What a model remembers between decoding steps."""

    def reorder(self, rows: Tensor) -> None:
        """Keeps the given rows of text, in their order; beams stay within the rows of their sample."""
        ...


AnyState = TypeVar("AnyState", bound=State)


def repeat_rows(logits: Tensor, state: AnyState, expand_size: int) -> tuple[Tensor, AnyState]:
    """Logits (b v) and the state of decoding with every row `expand_size` times, side by side (beams, samples)."""
    if expand_size == 1:
        return logits, state
    rows = torch.arange(len(logits), device=logits.device).repeat_interleave(expand_size)
    state.reorder(rows)
    return logits.index_select(0, rows), state


class Decoder(nn.Module, ABC):
    """The contract of a causal language model: tokens -> logits, with caches, and a door for bridges.

    `TextDecoder` (our own blocks), `HubDecoder` (any language model of transformers) and `ExtendedVocabulary` (either,
    with new tokens) keep it, and bridges need no more than it.

    Attributes:
        vocab_size: number of token ids.
        dim: width d of a token between the blocks.
        depth: number of blocks.
        max_len: most tokens of a row, prompt included.
    """

    vocab_size: int
    dim: int
    depth: int
    max_len: int

    @abstractmethod
    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """The embeddings of tokens (b q), as they stand in the table: (b q e)."""

    @abstractmethod
    def add_positions(self, x: Tensor, positions: Tensor) -> Tensor:
        """What the first block reads of embeddings (b q e) at positions (q) or (b q): (b q d)."""

    @abstractmethod
    def forward_embeds(
        self,
        x: Tensor,
        positions: Tensor,
        *,
        attention_mask: Tensor | None = None,
        mask: Mask | None = None,
        state: DecoderState | None = None,
        before_block: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """As `forward`, from what `embed` gave: for bridges with other tokens in front."""

    @abstractmethod
    def head(self, hidden: Tensor) -> Tensor:
        """Logits of the next token: (... d) -> (... vocab_size)."""

    @abstractmethod
    def logits(self, hidden: Tensor, table: Tensor) -> Tensor:
        """Logits of other tokens, whose rows of the head are given: (... d), (n e) -> (... n)."""

    @property
    @abstractmethod
    def embedding_weights(self) -> tuple[Tensor, Tensor]:
        """The weights of the embedding and of the head, each (vocab_size e): the same tensor where they are tied."""

    @property
    def embed_scale_of(self) -> float:
        """What `embed_tokens` multiplies the rows of the table with."""
        return 1.0

    def new_state(self, max_len: int | None = None) -> DecoderState:
        """An empty state for decoding up to `max_len` tokens.

        Raises:
            ValueError: if the decoder has fewer positions.
        """
        max_len = self.max_len if max_len is None else max_len
        if max_len > self.max_len:
            raise ValueError(
                f"{max_len} tokens were asked for, but this decoder has {self.max_len} positions"
            )
        return DecoderState(self.depth, max_len)

    def prefill(
        self, batch: PromptBatch, *, expand_size: int = 1, max_new_tokens: int = 40
    ) -> tuple[Tensor, DecoderState]:
        """Reads left-padded prompts, so that `generate` writes what follows; then every row stands `expand_size` times.

        Returns:
            Logits of the first new token (b * copies, vocab_size), and the state to give to `decode_step`.
        """
        state = self.new_state(batch.tokens.shape[1] + max_new_tokens)
        attention_mask = None if bool(batch.attention_mask.all()) else batch.attention_mask
        logits = self.head(self(batch.tokens, attention_mask=attention_mask, state=state)[:, -1])
        return repeat_rows(logits, state, expand_size)

    def decode_step(self, tokens: Tensor, state: DecoderState) -> Tensor:
        """Adds a token to each row: (b) -> logits of the next (b vocab_size)."""
        return self.head(self(tokens[:, None], state=state)[:, 0])

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """What the first block reads: tokens (b q) at positions (q) or (b q) -> (b q d)."""
        return self.add_positions(self.embed_tokens(tokens), positions)

    def forward(
        self,
        tokens: Tensor,
        *,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        mask: Mask | None = None,
        state: DecoderState | None = None,
        before_block: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Hidden states of tokens, to be given to `head`.

        Args:
            tokens: (b q) long.
            attention_mask: (b q) bool, True = a real token; None = all are. Padding may stand on either side.
            document_ids: (b q) long, the number of each token's document in a packed row: tokens see their own document
                only, whose positions begin at 0; not with a state. None = a row is one document.
            mask: (b q k) who may look at whom, in place of the causal mask; not with a state.
            state: tokens decoded so far, from `new_state`; these tokens are appended to it.
            before_block: called as x = before_block(i, x) before block i: the door for bridges.

        Returns:
            (b q d), normed.

        Raises:
            ValueError: if a document has more tokens than `max_len`, or (on a CPU) an id is outside the vocabulary.
        """
        positions, mask = self.position_ids(tokens, attention_mask, document_ids, mask, state)
        x = self.embed(tokens, positions)
        return self.forward_embeds(
            x, positions, attention_mask=attention_mask, mask=mask, state=state, before_block=before_block
        )

    def position_ids(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None,
        document_ids: Tensor | None,
        mask: Mask | None,
        state: DecoderState | None,
    ) -> tuple[Tensor, Mask | None]:
        """Where tokens (b q ...) stand, (q), or (b q) where rows differ; and the mask, of packed rows or as given.

        Padding takes no position.

        Raises:
            ValueError: if there are more tokens than `max_len`, or segments together with a mask or a state.
        """
        if document_ids is not None:
            if mask is not None or state is not None:
                raise ValueError(
                    "segments make the mask of packed rows; give neither a mask nor a state with them"
                )
            return self._packed(document_ids, attention_mask)
        past = 0 if state is None else state.length
        if past + tokens.shape[1] > self.max_len:
            raise ValueError(
                f"{past + tokens.shape[1]} tokens were given, but this decoder has {self.max_len} positions"
            )
        if attention_mask is not None:
            counted = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
            known = None if state is None else state.positions
            return counted if known is None else counted + known[:, None], mask
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        if state is None or state.positions is None:
            return steps, mask
        return state.positions[:, None] + steps, mask

    def _packed(self, document_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        positions = masks.places(document_ids)
        if document_ids.device.type == "cpu" and (longest := int(positions.max()) + 1) > self.max_len:
            raise ValueError(
                f"a packed document has {longest} tokens, but this decoder has {self.max_len} positions"
            )
        allowed = masks.all_of(masks.causal(), masks.documents(document_ids))
        if attention_mask is not None:
            allowed = masks.all_of(allowed, masks.padding(attention_mask))
        rows, count = document_ids.shape
        return positions, masks.dense(allowed, rows, count, count, document_ids.device)


def vocabulary_error(tokens: Tensor, vocab_size: int) -> ValueError:
    """What to say where an id is outside the table."""
    return ValueError(
        f"token ids from {int(tokens.min())} to {int(tokens.max())} were given to a decoder with a "
        f"vocabulary of {vocab_size}: model and tokenizer do not belong together"
    )
