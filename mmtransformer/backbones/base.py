"""`Decoder`: what every causal language model is to connectors and captioners; `DecoderState`: what it remembers.

Shapes: e width of an embedding, n rows of its table.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, overload

import torch
from torch import Tensor, nn

from mmtransformer.batch.base import as_mask, check_shape
from mmtransformer.layers import masks
from mmtransformer.layers.cache import KeyValue, KVCache
from mmtransformer.layers.masks import Mask
from mmtransformer.layers.positions import document_positions


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

    def __post_init__(self) -> None:
        self.attention_mask = check_tokens(self.tokens, self.attention_mask)


@overload
def check_tokens(tokens: Tensor, attention_mask: Tensor) -> Tensor: ...
@overload
def check_tokens(tokens: Tensor, attention_mask: Tensor | None) -> Tensor | None: ...
def check_tokens(tokens: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """Refuses what are no tokens (b q) with their mask; gives the mask as bool.

    Raises:
        ValueError: for another kind or number of dimensions, or a mask of another shape or with other numbers.
    """
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
        given = (
            f"{tuple(tokens.shape)} of {tokens.dtype}" if isinstance(tokens, Tensor) else f"a {type(tokens).__name__}"
        )
        raise ValueError(f"tokens are a tensor (b q) of ids, torch.int64, not {given}")
    check_shape(attention_mask, "attention_mask", tokens.shape, "tokens")
    return None if attention_mask is None else as_mask(attention_mask, "attention_mask")


class DecoderState:
    """What decoding remembers of the tokens so far: a cache a block, the padding, and each row's next position.

    Where the decoder reads a context, its keys and values too, which are never reordered: a sample's rows share them.

    Args:
        depth: number of blocks.
        max_len: most tokens, prompt included.
        caches: other caches than those of our own blocks; None = a `KVCache` a block.

    Attributes:
        length: tokens so far, padding included; of a static state, when it was made static.
        next_positions: (b) long, the position that a row's next token gets; None before the first token.
        attention_mask: (b length) bool, True = a real token; None = all are. Of a static state (b max_len).
        cache_position: (1) long, the last token's place in the caches, once the state is static.
        context: keys and values for each block that reads a context, set by the first tokens; None = there is none.
        context_mask: (n k) bool, which of the context's tokens are real; None = all.
    """

    def __init__(self, depth: int, max_len: int, *, caches: Sequence[Cache] | None = None) -> None:
        self.caches = [KVCache(max_len) for _ in range(depth)] if caches is None else list(caches)
        self.max_len, self.length = max_len, 0
        self.next_positions: Tensor | None = None
        self.attention_mask: Tensor | None = None
        self.cache_position: Tensor | None = None
        self.context: list[KeyValue] | None = None
        self.context_mask: Tensor | None = None

    def advance(self, rows: int, position_ids: Tensor, attention_mask: Tensor | None) -> None:
        """Notes new tokens, before the blocks append their keys and values to the caches.

        Args:
            rows: b.
            position_ids: of the new tokens, (q) or (b q).
            attention_mask: which of them are real (b q); None = all.
        """
        if self.cache_position is not None:
            assert self.attention_mask is not None
            assert self.next_positions is not None
            self.cache_position += 1
            self.next_positions += 1
            self.attention_mask.index_fill_(1, self.cache_position, True)
            return
        count = position_ids.shape[-1]
        if attention_mask is not None or self.attention_mask is not None:
            every = torch.ones(1, 1, dtype=torch.bool, device=position_ids.device)
            old = every.expand(rows, self.length) if self.attention_mask is None else self.attention_mask
            new = every.expand(rows, count) if attention_mask is None else attention_mask
            self.attention_mask = torch.cat((old, new), dim=1)
        self.length += count
        if attention_mask is None:
            self.next_positions = (position_ids[..., -1] + 1).expand(rows)
        else:  # Padding takes no position, also where all of a row's new tokens are padding.
            following = (position_ids + 1).expand(rows, count).masked_fill(~attention_mask, 0).amax(-1)
            known = self.next_positions
            self.next_positions = following if known is None else following.maximum(known)

    def make_static(self) -> None:
        """From now on tokens come one by one, and a step does the same operations on the same tensors every time.

        So a step can be recorded and played again (`CudaGraphRunner`).

        Raises:
            ValueError: if nothing was read yet, or the caches are not the library's own.
        """
        for cache in self.caches:
            if not isinstance(cache, KVCache):
                raise ValueError(
                    f"a {type(cache).__name__} grows with every token, so no step is like another: only decoders of "
                    "the library's own blocks can be recorded"
                )
        if self.next_positions is None:
            raise ValueError("a state is made static after its prompt was read, and this one has read nothing")
        rows, device = self.next_positions.shape[0], self.next_positions.device
        every = torch.arange(self.max_len, device=device).expand(rows, -1) < self.length
        if self.attention_mask is not None:
            every[:, : self.length] = self.attention_mask
        self.attention_mask, self.next_positions = every, self.next_positions.clone()
        self.cache_position = torch.full((1,), self.length - 1, device=device)
        for cache in self.caches:
            cache.make_static(self.cache_position)  # pyright: ignore[reportAttributeAccessIssue]  # All are KVCaches.

    def reorder(self, rows: Tensor) -> None:
        """Keeps the given rows (b) long, in their order; a row may be named more than once."""
        for cache in self.caches:
            cache.reorder(rows)
        if self.attention_mask is not None:
            self.attention_mask = select_rows(self.attention_mask, rows)
        if self.next_positions is not None:
            self.next_positions = select_rows(self.next_positions, rows)


def select_rows(x: Tensor, rows: Tensor) -> Tensor:
    """The given rows of a tensor, in their order: in the same memory if they are as many."""
    kept = x.index_select(0, rows)
    return x.copy_(kept) if kept.shape == x.shape and x.is_contiguous() else kept


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
    """The contract of a causal language model: tokens -> logits, with caches, and a hook before each block.

    `TextDecoder` (our own blocks), `HFDecoder` (any language model of transformers) and `ExtendedDecoder` (either,
    with new tokens) keep it, and captioners need no more than it.

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
    def add_positions(self, x: Tensor, position_ids: Tensor) -> Tensor:
        """What the first block reads of embeddings (b q e), whose position ids are (q) or (b q): (b q d)."""

    @abstractmethod
    def forward_embeds(
        self,
        x: Tensor,
        position_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        mask: Mask | None = None,
        state: DecoderState | None = None,
        before_block: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """As `forward`, from what `add_positions` gave: for connectors with other tokens in front."""

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
    def embedding_scale(self) -> float:
        """What `embed_tokens` multiplies the table's rows by (Gemma 3)."""
        return 1.0

    def new_state(self, max_len: int | None = None) -> DecoderState:
        """An empty state for decoding up to `max_len` tokens.

        Raises:
            ValueError: if the decoder has fewer positions.
        """
        max_len = self.max_len if max_len is None else max_len
        if max_len > self.max_len:
            raise ValueError(f"{max_len} tokens were asked for, but this decoder has {self.max_len} positions")
        return DecoderState(self.depth, max_len)

    def prefill(
        self, batch: PromptBatch, *, expand_size: int = 1, max_new_tokens: int = 40
    ) -> tuple[Tensor, DecoderState]:
        """Reads left-padded prompts, so that `generate` writes what follows; then every row stands `expand_size` times.

        Returns:
            Logits of the first new token (b * expand_size, vocab_size), and the state to give to `decode_step`.
        """
        state = self.new_state(batch.tokens.shape[1] + max_new_tokens)
        attention_mask = None if bool(batch.attention_mask.all()) else batch.attention_mask
        logits = self.head(self(batch.tokens, attention_mask=attention_mask, state=state)[:, -1])
        return repeat_rows(logits, state, expand_size)

    def decode_step(self, tokens: Tensor, state: DecoderState) -> Tensor:
        """Adds a token to each row: (b) -> logits of the next (b vocab_size)."""
        return self.head(self(tokens[:, None], state=state)[:, 0])

    def embed(self, tokens: Tensor, position_ids: Tensor) -> Tensor:
        """What the first block reads of tokens (b q), whose position ids are (q) or (b q): (b q d)."""
        return self.add_positions(self.embed_tokens(tokens), position_ids)

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
            before_block: called as x = before_block(i, x) before block i: where connectors enter.

        Returns:
            (b q d), normed.

        Raises:
            ValueError: if a row, or (on a CPU) a packed document, has more tokens than `max_len`, or (on a CPU) an id
                is outside the vocabulary.
        """
        position_ids = self.position_ids(tokens, attention_mask, document_ids=document_ids, state=state)
        if document_ids is not None:
            mask = self.document_mask(document_ids, attention_mask, mask)
        x = self.add_positions(self.embed_tokens(tokens), position_ids)
        return self.forward_embeds(
            x, position_ids, attention_mask=attention_mask, mask=mask, state=state, before_block=before_block
        )

    def position_ids(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        *,
        document_ids: Tensor | None = None,
        state: DecoderState | None = None,
    ) -> Tensor:
        """Where tokens stand in their rows, or documents; padding takes no position.

        Args:
            x: tokens or embeddings (b q ...).
            attention_mask: (b q) bool, True = a real token; None = all are.
            document_ids: (b q) long, the number of each token's document in a packed row; None = one document a row.
            state: tokens before these.

        Returns:
            (q) long, or (b q) where rows differ.

        Raises:
            ValueError: if there are more tokens than `max_len` (in documents on a CPU only), or documents and a state.
        """
        if document_ids is not None:
            if state is not None:
                raise ValueError("document_ids are of whole packed rows; give no state with them")
            position_ids = document_positions(document_ids)
            on_cpu = position_ids.device.type == "cpu"
            if on_cpu and (longest := int(position_ids.max()) + 1) > self.max_len:
                raise ValueError(
                    f"a packed document has {longest} tokens, but this decoder has {self.max_len} positions"
                )
            return position_ids
        total = x.shape[1] + (0 if state is None else state.length)
        if total > self.max_len:
            raise ValueError(f"{total} tokens were given, but this decoder has {self.max_len} positions")
        if attention_mask is None:
            steps = torch.arange(x.shape[1], device=x.device)
        else:
            steps = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        known = None if state is None else state.next_positions
        return steps if known is None else steps + known[:, None]

    @staticmethod
    def document_mask(document_ids: Tensor, attention_mask: Tensor | None, mask: Mask | None = None) -> Tensor:
        """The mask (b q q) of packed rows: causal, within each token's own document, and without padding.

        Raises:
            ValueError: if there is another mask beside it.
        """
        if mask is not None:
            raise ValueError("document_ids make the mask of packed rows; give no mask with them")
        allowed = [masks.causal(), masks.documents(document_ids)]
        if attention_mask is not None:
            allowed.append(masks.padding(attention_mask))
        rows, count = document_ids.shape
        return masks.dense(masks.all_of(*allowed), rows, count, count, document_ids.device)
