"""Images as part of a source: embeddings in front of what the encoder of an encoder-decoder reads.

A row of text is a begin token, a prompt and a caption. The encoder reads images and prompt, the decoder the begin
token and the caption, as BLIP-2 feeds T5 (arXiv:2301.12597, figure 3).

Shapes: n rows of text, r of each of the b samples, side by side; m rows of embeddings (b, or n where instructions make
them differ), l embeddings of an image, t prompt tokens.
"""

from torch import Tensor

from mmtransformer.backbones.base import repeat_rows
from mmtransformer.backbones.hf.seq2seq import HFSeq2Seq
from mmtransformer.backbones.seq2seq import EncodedSource, Transformer, TransformerState
from mmtransformer.batch import CaptionBatch
from mmtransformer.captioners.decoder_prefix import join_images

SourceReader = Transformer | HFSeq2Seq
"""An encoder-decoder: it reads a source, and writes a target."""


def prompt_of(batch: CaptionBatch, *, begin: bool = True) -> tuple[Tensor, Tensor]:
    """The tokens before the first that must be predicted, moved to the left: (n t) ids, and which are real.

    Args:
        batch: rows of text, padded on either side.
        begin: whether each row's first token is among them.
    """
    prompt = _prompt(batch)
    if not begin:
        prompt = prompt & (prompt.long().cumsum(1) > 1)
    order = _moved_left(prompt)
    return batch.tokens.gather(1, order), prompt.gather(1, order)


def _prompt(batch: CaptionBatch) -> Tensor:
    return batch.attention_mask & (batch.loss_mask.long().cumsum(1) == 0)


def _written(batch: CaptionBatch) -> Tensor:
    """What the decoder reads: begin token and caption (n q) bool."""
    prompt = _prompt(batch)
    return batch.attention_mask & ~(prompt & (prompt.long().cumsum(1) > 1))


def _moved_left(kept: Tensor) -> Tensor:
    """Where the kept tokens (n q) stand, in their order, as far as the longest row of them goes: (n t) long."""
    return (~kept).long().argsort(dim=1, stable=True)[:, : int(kept.sum(1).max())]


def put_back(x: Tensor, batch: CaptionBatch) -> Tensor:
    """What was found for begin token and caption (n t d), at the places of these in their rows (n q d)."""
    place = (_written(batch).long().cumsum(1) - 1).clamp(min=0)
    return x.gather(1, place[..., None].expand(-1, -1, x.shape[2]))


def forward_with_source_prefix(model: SourceReader, prefix_embeds: Tensor, batch: CaptionBatch) -> Tensor:
    """The hidden states of text whose images and prompt the encoder reads: (n q d); a prompt's mean nothing.

    Args:
        model: the encoder-decoder.
        prefix_embeds: what stands before the prompt (m i l d).
        batch: the text, and which images are real.
    """
    tokens = batch.tokens.gather(1, _moved_left(_written(batch)))
    return put_back(model.decode(tokens, _source(model, prefix_embeds, batch)), batch)


def prefill_with_source_prefix(
    model: SourceReader, prefix_embeds: Tensor, batch: CaptionBatch, *, expand_size: int, max_new_tokens: int
) -> tuple[Tensor, TransformerState]:
    """Reads images and prompts, then repeats every row `expand_size` times; see `Captioner.prefill`."""
    source = model.project(_source(model, prefix_embeds, batch))
    state = (model.decoder if isinstance(model, Transformer) else model).new_state(1 + max_new_tokens)
    first = batch.attention_mask.long().argmax(1, keepdim=True)
    logits = model.head(model.decode(batch.tokens.gather(1, first), source, state=state)[:, 0])
    return repeat_rows(logits, TransformerState(state, source), expand_size)


def _source(model: SourceReader, prefix_embeds: Tensor, batch: CaptionBatch) -> EncodedSource:
    tokens, attention_mask = prompt_of(batch, begin=False)
    images, real = join_images(prefix_embeds, batch)
    return model.encode(tokens, attention_mask=attention_mask, prefix_embeds=images, prefix_attention_mask=real)
