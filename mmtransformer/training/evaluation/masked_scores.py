"""How many hidden words a text encoder fills in rightly, beside what counts of bigrams can do.

Shapes: m hidden tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmtransformer.backbones.encoder import TextEncoder
from mmtransformer.data.text_only.masked import MaskedTextData
from mmtransformer.data.text_only.masked_rows import MaskedBatch, MaskedRows
from mmtransformer.layers.modes import evaluation_mode
from mmtransformer.metrics.bigram_baseline import BigramBaseline
from mmtransformer.pipelines.base import fast_autocast
from mmtransformer.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class MaskedScore:
    """How many hidden words were filled in rightly.

    Attributes:
        loss: nats a hidden token.
        words: share of the hidden words of which every token is right.
        tokens: share of the hidden tokens that are right.
        unigram_words: the same, of the most frequent token everywhere.
        unigram_tokens: the same by tokens.
        bigram_words: the same, of the likeliest token between its neighbours.
        bigram_tokens: the same by tokens.
        nsp_accuracy: share of the pairs of texts of which it was told rightly whether they belong together; None
            without any.
        hidden_words: how many words were hidden.
        hidden_tokens: how many tokens.
    """

    loss: float
    words: float
    tokens: float
    unigram_words: float
    unigram_tokens: float
    bigram_words: float
    bigram_tokens: float
    nsp_accuracy: float | None
    hidden_words: int
    hidden_tokens: int

    def __str__(self) -> str:
        text = (
            f"hidden words right {self.words:.1%} (bigrams {self.bigram_words:.1%}, unigrams "
            f"{self.unigram_words:.1%}), hidden tokens {self.tokens:.1%} (bigrams {self.bigram_tokens:.1%}, "
            f"unigrams {self.unigram_tokens:.1%})"
        )
        return text + ("" if self.nsp_accuracy is None else f"; pairs right {self.nsp_accuracy:.1%} (chance 50.0%)")


@torch.inference_mode()
def score_masked(
    encoder: TextEncoder,
    data: MaskedTextData,
    split: str,
    baseline: BigramBaseline,
    *,
    limit_batches: int | None = None,
) -> MaskedScore:
    """Scores a split, whose hidden words are always the same ones and all behind the mask token.

    Args:
        encoder: The model; it is in evaluation mode for the call.
        data: The texts.
        split: The split's name.
        baseline: What counted the training texts.
        limit_batches: Most batches to look at; None = all.
    """
    device = next(encoder.parameters()).device
    mask_id = data.masking(training=False).mask_id
    right: dict[str, list[np.ndarray]] = {name: [] for name in ("model", "unigram", "bigram")}
    words: list[np.ndarray] = []
    nats, pairs, known, rows = 0.0, 0, 0, 0
    for batch in islice(data.loader(split), limit_batches):
        there = batch.to(device)
        with evaluation_mode(encoder), fast_autocast(device):
            logits, told = read_masked(encoder, there)
        losses = F.cross_entropy(logits, there.labels[there.loss_mask], reduction="none")
        nats += float(losses.double().cpu().numpy().sum())
        labels, guesses = batch.labels[batch.loss_mask].numpy(), logits.argmax(-1).cpu().numpy()
        seen = np.where(batch.tokens == mask_id, -1, batch.tokens)
        edge = np.full((len(seen), 1), -1)
        loss_mask = batch.loss_mask.numpy()
        left = np.concatenate([edge, seen[:, :-1]], axis=1)[loss_mask]
        following = np.concatenate([seen[:, 1:], edge], axis=1)[loss_mask]
        right["model"].append(guesses == labels)
        right["unigram"].append(labels == baseline.unigram)
        right["bigram"].append(baseline.predict(left, following) == labels)
        row = np.broadcast_to(np.arange(len(loss_mask))[:, None] + rows, loss_mask.shape)[loss_mask]
        words.append(row * 10_000 + batch.words.numpy()[loss_mask])
        rows += len(loss_mask)
        if told is not None:
            asked = batch.next_sentence_label >= 0
            known += int(asked.sum())
            pairs += int((told.argmax(-1).cpu() == batch.next_sentence_label[asked]).sum())
    _, word = np.unique(np.concatenate(words), return_inverse=True)
    found = {name: np.concatenate(parts) for name, parts in right.items()}
    whole = {name: _all_of(word, hits) for name, hits in found.items()}
    return MaskedScore(
        loss=nats / max(len(word), 1),
        words=float(whole["model"].mean()),
        tokens=float(found["model"].mean()),
        unigram_words=float(whole["unigram"].mean()),
        unigram_tokens=float(found["unigram"].mean()),
        bigram_words=float(whole["bigram"].mean()),
        bigram_tokens=float(found["bigram"].mean()),
        nsp_accuracy=pairs / known if known else None,
        hidden_words=len(whole["model"]),
        hidden_tokens=len(word),
    )


def _all_of(word: np.ndarray, hits: np.ndarray) -> np.ndarray:
    """Of each word (numbers from 0), whether all of its tokens are hits."""
    return np.bincount(word, weights=~hits) == 0


def read_masked(encoder: TextEncoder, batch: MaskedBatch) -> tuple[Tensor, Tensor | None]:
    """What an encoder says of a batch, at least in float32: logits of its m hidden tokens (m v), and of its pairs.

    Returns:
        The logits; of the pairs in the order of their rows, None without an NSP head.
    """
    types = batch.types if encoder.num_types > 1 else None
    hidden = encoder(batch.tokens, types, attention_mask=batch.attention_mask)
    words = _at_least_float(encoder.mlm_logits(hidden[batch.loss_mask]))
    return words, _at_least_float(
        encoder.nsp_logits(hidden[batch.next_sentence_label >= 0])
    ) if encoder.nsp_head else None


def _at_least_float(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def fit_bigrams(data: MaskedTextData) -> BigramBaseline:
    """The n-gram baseline, counted over the training texts, each between bos and eos as in a row."""
    rows: MaskedRows = data.rows(data.train_split)
    bos, eos = data.tokenizer.bos_id, data.tokenizer.eos_id
    tokens = np.concatenate([np.concatenate([[bos], ids, [eos]]) for ids in rows.ids])
    starts = np.concatenate([[0], np.cumsum(rows.sizes + 2)])
    loss_mask = np.ones(len(tokens), bool)
    loss_mask[starts[:-1]] = loss_mask[starts[1:] - 1] = False
    return BigramBaseline(data.tokenizer.vocab_size).fit(tokens, starts, loss_mask)


@torch.inference_mode()
def fill_in(
    encoder: TextEncoder, tokenizer: Tokenizer, batch: MaskedBatch, *, rows: list[int] | None = None
) -> list[str]:
    """What a model puts in the place of hidden words: "a [man: dog] runs on the [grass]", the truth behind a colon.

    Args:
        encoder: The model; it is in evaluation mode for the call.
        tokenizer: Its tokenizer.
        batch: Rows with hidden words.
        rows: Which rows; None = all.
    """
    with evaluation_mode(encoder), fast_autocast(batch.tokens.device):
        logits, _ = read_masked(encoder, batch)
    filled = batch.labels.clone()
    filled[batch.loss_mask] = logits.argmax(-1).to(filled)
    chosen = range(len(filled)) if rows is None else rows
    return [" ".join(_words(tokenizer, batch, filled, row)).strip() for row in chosen]


def _words(tokenizer: Tokenizer, batch: MaskedBatch, filled: Tensor, row: int) -> Iterator[str]:
    words, loss_mask = batch.words[row].tolist(), batch.loss_mask[row].tolist()
    at = 0
    while at < len(words):
        end = at + 1
        while end < len(words) and words[end] == words[at] and words[at] >= 0:
            end += 1
        if words[at] < 0:
            second = batch.attention_mask[row, at] and at and end < len(words) and batch.attention_mask[row, end]
            yield from ["/"] if second else []
        else:
            truth = _text(tokenizer, batch.labels[row, at:end])
            said = _text(tokenizer, filled[row, at:end])
            if any(loss_mask[at:end]):
                yield f"[{said}]" if said == truth else f"[{said}: {truth}]"
            else:
                yield truth
        at = end


def _text(tokenizer: Tokenizer, ids: Tensor) -> str:
    return tokenizer.decode([i for i in ids.tolist() if i < tokenizer.vocab_size and i != tokenizer.eos_id]).strip()
