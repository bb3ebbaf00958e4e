"""Pictures as part of a source: embeddings in front of what the encoder of an encoder-decoder reads.

A row of text is a begin token, a prompt and a caption. The encoder reads pictures and prompt, the decoder the begin
token and the caption, as BLIP-2 feeds T5 (arXiv:2301.12597, figure 3).

Letters: b samples, i pictures of a sample, k embeddings of them, m rows of embeddings (m divides n), n rows of text (b
divides n), q text tokens, t prompt tokens, d width of a token.
"""

import torch
from torch import Tensor

from mmtransformer.captioner import CaptionBatch
from mmtransformer.seq2seq import Source, Transformer, TransformerState


def prompt_of(batch: CaptionBatch, *, begin: bool = True) -> tuple[Tensor, Tensor]:
    """The tokens before the first that must be predicted, moved to the left: (n t) ids, and which are real.

    Args:
        batch: rows of text, padded on either side.
        begin: whether each row's first token is among them.
    """
    prompt = _prompt(batch)
    if not begin:
        prompt = prompt & (prompt.long().cumsum(1) > 1)
    order = (~prompt).long().argsort(dim=1, stable=True)[:, : int(prompt.sum(1).max())]
    return batch.tokens.gather(1, order), prompt.gather(1, order)


def _prompt(batch: CaptionBatch) -> Tensor:
    return batch.valid & (batch.target.long().cumsum(1) == 0)


def hidden_from(model: Transformer, front: Tensor, batch: CaptionBatch) -> Tensor:
    """The hidden states of text whose pictures and prompt the encoder reads: (n q d).

    Args:
        model: the encoder-decoder.
        front: what stands before the prompt (m k d).
        batch: the text, and which pictures are real.
    """
    prompt = _prompt(batch)
    read_here = batch.valid & ~(prompt & (prompt.long().cumsum(1) > 1))
    return model.decode(batch.tokens, _source(model, front, batch), valid=read_here)


def start_from(
    model: Transformer, front: Tensor, batch: CaptionBatch, *, copies: int, max_new_tokens: int
) -> tuple[Tensor, TransformerState]:
    """Reads pictures and prompts, then repeats every row `copies` times; see `Captioner.start`.

    Returns:
        Logits of the first new token (n * copies, vocab), and the state of decoding.
    """
    source = model.project(_source(model, front, batch))
    state = model.decoder.new_state(1 + max_new_tokens)
    first = batch.valid.long().argmax(1, keepdim=True)
    logits = model.head(model.decode(batch.tokens.gather(1, first), source, state=state)[:, 0])
    if copies > 1:
        rows = torch.arange(len(logits), device=logits.device).repeat_interleave(copies)
        state.reorder(rows)
        logits = logits.index_select(0, rows)
    return logits, TransformerState(state, source)


def _source(model: Transformer, front: Tensor, batch: CaptionBatch) -> Source:
    tokens, valid = prompt_of(batch, begin=False)
    n, real = len(tokens), None
    if batch.pictures is not None:
        real = batch.pictures.repeat_interleave(front.shape[1] // batch.pictures.shape[1], 1)
        real = real.repeat_interleave(n // len(real), 0)
    front = front.repeat_interleave(n // len(front), 0)
    return model.encode(tokens, valid=valid, before=front, before_valid=real)
