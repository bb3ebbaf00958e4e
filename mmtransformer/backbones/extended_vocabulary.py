"""ExtendedDecoder: new tokens for a language model that stays as it is.

Shapes: e width of an embedding, m new tokens.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from mmtransformer.backbones.base import Decoder, DecoderState
from mmtransformer.layers.masks import Mask
from mmtransformer.serialization.pretrained import Pretrained, from_config, load_strictly, to_config


class ExtendedDecoder(Pretrained, Decoder):
    """A decoder that knows a few more tokens, whose rows alone learn: an image's mark, languages, ends of documents.

    The new rows are parameters of their own, beside the decoder's tables: no row of these changes, no optimizer state
    is kept for them, and the hash of a frozen decoder stays what it was. Where the decoder's head is its embedding, a
    new token's row serves both as well. A new row begins near the mean of all rows, so that at first it is neither
    likelier nor stranger than others.

    Freezing goes to the decoder: `requires_grad_(False)` here leaves the new rows learning, and `train()` leaves a
    frozen decoder in evaluation mode. To freeze the rows too, freeze `new_embed` (and `new_head`).

    Args:
        decoder: the language model.
        new_tokens: number m of new tokens, whose ids follow each other.
        first: their first id; None = the decoder's vocab_size. A smaller one takes rows in place of the decoder's: hub
            models often have more rows than their tokenizer has tokens.

    Raises:
        ValueError: if there is no new token, the ids would leave a gap, or the decoder treats its embeddings in a way
            that is unknown here.
    """

    def __init__(self, decoder: Decoder, new_tokens: int, *, first: int | None = None) -> None:
        super().__init__()
        first = decoder.vocab_size if first is None else first
        if new_tokens < 1 or not 0 <= first <= decoder.vocab_size:
            raise ValueError(
                f"new_tokens ({new_tokens}) must be at least 1, and first ({first}) among the decoder's ids or the "
                f"next one (0 to {decoder.vocab_size}): else tokenizer and model do not belong together"
            )
        self.decoder, self.new_tokens, self.first = decoder, new_tokens, first
        self.dim, self.depth, self.max_len = decoder.dim, decoder.depth, decoder.max_len
        self.vocab_size = max(decoder.vocab_size, first + new_tokens)
        embedding, head = decoder.embedding_weights
        self.new_embed = self._rows(embedding)
        self.new_head = None if head is embedding else self._rows(head)
        with torch.no_grad():
            one = torch.zeros(1, 1, dtype=torch.long, device=embedding.device)
            found, row = decoder.embed_tokens(one)[0, 0], embedding[0] * decoder.embedding_scale
            # While a folder is read this is memory that is yet to be filled, which may hold NaN.
            if not embedding.is_meta and not torch.allclose(found, row, atol=1e-5, equal_nan=True):
                raise ValueError(f"{type(decoder).__name__}'s embeddings are not the rows of its table")

    def _rows(self, table: Tensor) -> nn.Embedding:
        rows = nn.Embedding(self.new_tokens, table.shape[1], device=table.device, dtype=table.dtype)
        with torch.no_grad():
            noise = torch.randn_like(rows.weight) * table.std(0, correction=0)
            rows.weight.copy_(table.mean(0) + 0.1 * noise)
        return rows

    @property
    def embedding_weights(self) -> tuple[Tensor, Tensor]:
        """Copies of both tables with the new rows in their places; the same tensor where they are tied."""
        embedding, head = self.decoder.embedding_weights
        whole = self._put(embedding, self.new_embed.weight, 0)
        return whole, whole if self.new_head is None else self._put(head, self.new_head.weight, 0)

    @property
    def embedding_scale(self) -> float:
        """What the decoder multiplies rows with."""
        return self.decoder.embedding_scale

    def _put(self, old: Tensor, new: Tensor, axis: int) -> Tensor:
        """The new tokens' part among the others', along an axis of ids."""
        before = old.narrow(axis, 0, self.first)
        rest = max(old.shape[axis] - self.first - self.new_tokens, 0)
        return torch.cat((before, new, old.narrow(axis, old.shape[axis] - rest, rest)), dim=axis)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """The embeddings of tokens (b q), new and old: (b q e)."""
        place = tokens - self.first
        is_new = (place >= 0) & (place < self.new_tokens)
        old = self.decoder.embed_tokens(tokens.masked_fill(is_new, 0))
        new = self.new_embed(place.clamp(0, self.new_tokens - 1)) * self.decoder.embedding_scale
        return torch.where(is_new[..., None], new.to(old.dtype), old)

    def add_positions(self, x: Tensor, position_ids: Tensor) -> Tensor:
        """What the first block reads of embeddings (b q e), whose position ids are (q) or (b q): (b q d)."""
        return self.decoder.add_positions(x, position_ids)

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
        """As the decoder's."""
        return self.decoder.forward_embeds(
            x, position_ids, attention_mask=attention_mask, mask=mask, state=state, before_block=before_block
        )

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of the next token, new and old: (... d) -> (... vocab_size)."""
        rows = self.new_embed if self.new_head is None else self.new_head
        return self._put(self.decoder.head(hidden), self.logits(hidden, rows.weight), -1)

    def logits(self, hidden: Tensor, table: Tensor) -> Tensor:
        """As the decoder's; rows in its dtype or another."""
        return self.decoder.logits(hidden, table.to(hidden.dtype))

    def new_state(self, max_len: int | None = None) -> DecoderState:
        """As the decoder's."""
        return self.decoder.new_state(max_len)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Freezes or frees the decoder; the new rows always learn."""
        self.decoder.requires_grad_(requires_grad)
        return self

    def train(self, mode: bool = True) -> Self:
        """Training mode, for the decoder only if it learns."""
        super().train(mode)
        if not any(p.requires_grad for p in self.decoder.parameters()):
            self.decoder.eval()
        return self

    def merged(self) -> Any:
        """A decoder of the inner one's class whose own tables hold the new rows: for export, or to train on as a whole.

        Raises:
            ValueError: if a head has a bias, which a new token would lack.
        """
        config = to_config(self.decoder)
        where = config["args"] if "vocab_size" in config["args"] else config["args"]["config"]
        where["vocab_size"] = self.vocab_size
        found = from_config(config)
        assert isinstance(found, Decoder)
        embedding, head = (table.data_ptr() for table in self.decoder.embedding_weights)
        whole = dict(zip((head, embedding), reversed(self.embedding_weights), strict=True))
        own: dict[str, Tensor] = dict(self.decoder.state_dict())
        state = {name: whole.get(tensor.data_ptr(), tensor) for name, tensor in own.items()}
        load_strictly(found, state, "the decoder with its new tokens")
        return found.train(self.decoder.training)
