"""Pictures as a soft prompt: embeddings in front of the text of a causal language model.

Letters: b samples, i pictures of a sample, l embeddings of a picture, k = i * l, m rows of embeddings (m divides n),
n rows of text (b divides n), q text tokens, d width of a hidden state, e width of the decoder's embeddings.
"""

import torch
from torch import Tensor

from mmtransformer.backbones.base import Decoder, DecoderState
from mmtransformer.captioners.base import CaptionBatch


def forward_with_prefix(decoder: Decoder, prefix_embeds: Tensor, batch: CaptionBatch) -> Tensor:
    """The hidden states of right-padded text behind its pictures: (n q d).

    Args:
        decoder: the language model.
        prefix_embeds: what stands before the text (m k e), k = i * l.
        batch: the text, and which pictures are real.
    """
    x, real = _joined(decoder, prefix_embeds, batch)
    attention_mask = None if real is None else torch.cat((real, torch.ones_like(batch.attention_mask)), dim=1)
    positions, _ = decoder.position_ids(x, attention_mask, None, None, None)
    hidden = decoder.forward_embeds(
        decoder.add_positions(x, positions), positions, attention_mask=attention_mask
    )
    return hidden[:, x.shape[1] - batch.tokens.shape[1] :]


def prefill_with_prefix(
    decoder: Decoder, prefix_embeds: Tensor, batch: CaptionBatch, *, expand_size: int, max_new_tokens: int
) -> tuple[Tensor, DecoderState]:
    """Reads pictures and left-padded prompts, then repeats every row `expand_size` times; see `Captioner.prefill`.

    Returns:
        Logits of the first new token (n * copies, vocab), and the decoder's state.
    """
    x, real = _joined(decoder, prefix_embeds, batch)
    attention_mask = None
    if real is not None or not bool(batch.attention_mask.all()):
        before = batch.attention_mask.new_ones(x.shape[0], x.shape[1] - batch.tokens.shape[1])
        # Padding goes to the front: a window counts places, and the queries are as near to each prompt.
        order = torch.cat((before, batch.attention_mask), dim=1).long().argsort(dim=1, stable=True)
        x = x.gather(1, order[..., None].expand_as(x))
        attention_mask = torch.cat((before if real is None else real, batch.attention_mask), dim=1).gather(
            1, order
        )
    state = decoder.new_state(x.shape[1] + max_new_tokens)
    positions, _ = decoder.position_ids(x, attention_mask, None, None, state)
    hidden = decoder.forward_embeds(
        decoder.add_positions(x, positions), positions, attention_mask=attention_mask, state=state
    )
    logits = decoder.head(hidden[:, -1])
    if expand_size > 1:
        rows = torch.arange(x.shape[0], device=x.device).repeat_interleave(expand_size)
        state.reorder(rows)
        logits = logits.index_select(0, rows)
    return logits, state


def refuse_documents(batch: CaptionBatch, who: str) -> None:
    """Refuses pictures that stand inside the text.

    Raises:
        ValueError: if the batch has some.
    """
    if batch.image_index is not None or batch.document_ids is not None:
        raise ValueError(
            f"{who} reads pictures before the text: batches with image_index or document_ids are Flamingo's"
        )


def _joined(decoder: Decoder, prefix_embeds: Tensor, batch: CaptionBatch) -> tuple[Tensor, Tensor | None]:
    """Embeddings of pictures and text (n k+q e); which of the former are those of real pictures (n k)."""
    text = decoder.embed_tokens(batch.tokens)
    x = torch.cat(
        (prefix_embeds.to(text.dtype).repeat_interleave(text.shape[0] // prefix_embeds.shape[0], 0), text),
        dim=1,
    )
    if batch.image_mask is None:
        return x, None
    real = batch.image_mask.repeat_interleave(prefix_embeds.shape[1] // batch.image_mask.shape[1], 1)
    return x, real.repeat_interleave(text.shape[0] // real.shape[0], 0)
