"""How well a language model knows texts: perplexity by token, byte and word, beside that of counting n-grams.

Shapes: m tokens that are predicted, p parts of texts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from mmtransformer.backbones.base import Decoder, PromptBatch
from mmtransformer.data.loading.source import Caption
from mmtransformer.data.text_only.text_rows import TextRows
from mmtransformer.data.text_only.texts import TextBatch, TextData
from mmtransformer.generation.loop import generate
from mmtransformer.layers.modes import evaluation_mode
from mmtransformer.metrics.ngram_baseline import NGram
from mmtransformer.pipelines.base import fast_autocast
from mmtransformer.text.tokenizer import Tokenizer

ALL = "all"
"""The name of all languages together."""


@dataclass(frozen=True)
class TextScore:
    """How surprised a model was.

    Attributes:
        nats: minus the logarithm of the probability of all tokens together.
        tokens: how many were predicted: texts and their ends.
        bytes: of the texts, in UTF-8.
        words: of the texts, as white space cuts them; the end of each text counts as one.
    """

    nats: float
    tokens: int
    bytes: int
    words: int

    @property
    def perplexity(self) -> float:
        """Among how many tokens it wavered, so to speak; depends on the tokenizer."""
        return math.exp(self.nats / max(self.tokens, 1))

    @property
    def word_perplexity(self) -> float:
        """The same by words, which does not depend on the tokenizer."""
        return math.exp(min(self.nats / max(self.words, 1), 700.0))

    @property
    def bits_per_byte(self) -> float:
        """What compressing the texts with this model would leave of 8; does not depend on the tokenizer."""
        return self.nats / math.log(2) / max(self.bytes, 1)

    def __add__(self, other: "TextScore") -> "TextScore":
        return TextScore(*(mine + more for mine, more in zip(astuple(self), astuple(other), strict=True)))

    def to_dict(self) -> dict[str, float | int]:
        """For metrics.json."""
        return {
            "perplexity": round(self.perplexity, 4),
            "bits_per_byte": round(self.bits_per_byte, 4),
            "word_perplexity": round(self.word_perplexity, 3),
            "nats": round(self.nats, 3),
            "tokens": self.tokens,
            "bytes": self.bytes,
            "words": self.words,
        }


Scores = dict[str, TextScore]
"""By language, and `ALL`."""


@torch.inference_mode()
def score_texts(decoder: Decoder, data: TextData, split: str, *, limit_batches: int | None = None) -> Scores:
    """Scores a split, each token once.

    Args:
        decoder: The model; it is in evaluation mode for the call.
        data: The texts.
        split: The split's name.
        limit_batches: Most batches to look at; None = all.
    """
    rows = data.rows(split)
    device = next(decoder.parameters()).device
    nats = np.zeros(len(rows.text_of))
    count = np.zeros(len(rows.text_of), np.int64)
    for batch in islice(data.loader(split), limit_batches):
        with evaluation_mode(decoder):
            part, loss = token_losses(decoder, batch.to(device))
        np.add.at(nats, part, loss)
        np.add.at(count, part, 1)
    return by_language(rows, nats, count)


def token_losses(decoder: Decoder, batch: TextBatch) -> tuple[np.ndarray, np.ndarray]:
    """Of each predicted token of a batch, the part that it belongs to (m,) and its loss in nats (m,)."""
    predicts = batch.loss_mask[:, 1:]
    with fast_autocast(batch.tokens.device):
        hidden = decoder(batch.tokens[:, :-1], document_ids=batch.document_ids[:, :-1])
        logits = decoder.head(hidden[predicts])
    losses = torch.nn.functional.cross_entropy(logits.float(), batch.tokens[:, 1:][predicts], reduction="none")
    return batch.document_ids[:, 1:][predicts].cpu().numpy(), losses.double().cpu().numpy()


def by_language(rows: TextRows, nats: np.ndarray, count: np.ndarray) -> Scores:
    """Sums up what was found for every part of a split, (p,) nats and (p,) tokens, by language."""
    whole = (count > 0) & rows.first  # a text's bytes count with its first part
    found: Scores = {}
    for number, language in enumerate(rows.languages):
        mine = rows.language[rows.text_of] == number
        texts = rows.text_of[mine & whole]
        found[language or ALL] = TextScore(
            float(nats[mine].sum()),
            int(count[mine].sum()),
            int(rows.bytes[texts].sum()),
            int(rows.words[texts].sum()) + len(texts),
        )
    if ALL not in found or len(found) > 1:
        found[ALL] = sum(found.values(), TextScore(0.0, 0, 0, 0))
    return found


def score_ngrams(
    data: TextData, splits: Sequence[str], orders: Sequence[int], *, max_tokens: int = 20_000_000
) -> dict[int, dict[str, Scores]]:
    """Scores splits with n-gram models of the training texts, counted in the same tokens.

    Args:
        data: The texts.
        splits: What to score.
        orders: Which n.
        max_tokens: Most tokens to count; of more training texts, those at the beginning.

    Returns:
        By order, split and language.
    """
    train = data.rows(data.train_split)
    texts = max(1, int(np.searchsorted(train.starts, max_tokens, side="right")) - 1)
    starts = train.starts[: texts + 1]
    tokens, loss_mask = train.tokens[: starts[-1]], train.loss_mask[: starts[-1]]
    found: dict[int, dict[str, Scores]] = {}
    for order in orders:
        model = NGram(order, data.tokenizer.vocab_size).fit(tokens, starts, loss_mask)
        for split in splits:
            rows = data.rows(split)
            text = np.repeat(np.arange(len(rows.prompt)), np.diff(rows.starts))[rows.loss_mask]
            nats = np.zeros(len(rows.text_of))
            first = np.flatnonzero(rows.first)
            np.add.at(nats, first[text], -model.log_probs(rows.tokens, rows.starts, rows.loss_mask))
            count = np.zeros(len(nats), np.int64)
            np.add.at(count, first[text], 1)
            found.setdefault(order, {})[split] = by_language(rows, nats, count)
    return found


def write_texts(
    decoder: Decoder,
    tokenizer: Tokenizer,
    language: str | None,
    count: int,
    *,
    seed: int = 0,
    max_new_tokens: int = 60,
    temperature: float = 1.0,
    top_p: float | None = None,
) -> list[str]:
    """Lets a language model make up texts.

    Args:
        decoder: The model.
        tokenizer: Its tokenizer.
        language: The language to write in; None names none.
        count: How many.
        seed: Of the drawing; a text depends on it, the language and the text's number alone.
        max_new_tokens: Most tokens of a text, if the model has room for so many.
        temperature: Below 1 the likely gets likelier.
        top_p: Draw from the fewest tokens that hold this share of probability; None draws from all.
    """
    device = next(decoder.parameters()).device
    prompt = torch.tensor([tokenizer.prompt(language)], device=device)
    batch = PromptBatch(prompt, torch.ones_like(prompt, dtype=torch.bool))
    (written,) = generate(
        decoder,
        batch,
        eos_id=tokenizer.eos_ids,
        max_new_tokens=min(max_new_tokens, decoder.max_len - prompt.shape[1]),
        num_return_sequences=count,
        do_sample=True,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        num_tokens=tokenizer.vocab_size,
    )
    return [tokenizer.decode(text.tokens) for text in written]


def novelty(written: Sequence[str], known: Sequence[Caption]) -> dict[str, float]:
    """Which share of written texts differ from each other, and which are not in the training texts word for word."""
    said = {text.text for text in known}
    count = max(len(written), 1)
    return {
        "distinct": round(len(set(written)) / count, 4),
        "new": round(sum(text not in said for text in written) / count, 4),
    }


def table(model: Mapping[str, Scores], ngrams: Mapping[int, Mapping[str, Scores]]) -> str:
    """The scores of a model, and of n-grams below it, as lines of text."""
    lines = [f"{'':24}{'perplexity':>12}{'bits a byte':>14}{'by words':>12}{'tokens':>12}"]
    for split, scores in model.items():
        for language, score in scores.items():
            if language == ALL and len(scores) == 2:  # one language: the same line once more
                continue
            name = split if language == ALL else f"{split} {language}"
            rows = [(name, score)]
            rows += [(f"  {n}-grams", by[split][language]) for n, by in ngrams.items()]
            for label, found in rows:
                lines.append(
                    f"{label:24}{found.perplexity:12.2f}{found.bits_per_byte:14.3f}{found.word_perplexity:12.1f}"
                    f"{found.tokens:12,}"
                )
    return "\n".join(lines)


def scores_to_dict(scores: Mapping[str, Scores]) -> dict[str, Any]:
    """For metrics.json: by split and language."""
    return {split: {language: s.to_dict() for language, s in by.items()} for split, by in scores.items()}
