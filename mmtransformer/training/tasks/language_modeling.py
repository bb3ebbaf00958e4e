"""LanguageModeling: a decoder that learns to go on with texts, from nothing or from a saved one."""

from collections.abc import Sequence
from typing import Any

from mmtransformer.backbones.base import Decoder
from mmtransformer.batch import SumAndCount
from mmtransformer.data.text_only.texts import TextBatch, TextData
from mmtransformer.layers.lora import merge_lora
from mmtransformer.losses.next_token import next_token_loss
from mmtransformer.serialization.pretrained import Pretrained
from mmtransformer.serialization.printable import fenced
from mmtransformer.training.engine.optim import OptimConfig
from mmtransformer.training.engine.run import Run
from mmtransformer.training.engine.task import Task
from mmtransformer.training.evaluation.report import save_text_model
from mmtransformer.training.evaluation.text_scores import (
    ALL,
    novelty,
    score_ngrams,
    score_texts,
    scores_to_dict,
    table,
    write_texts,
)
from mmtransformer.training.tasks.data_checks import check_texts


class LanguageModeling(Task[TextData]):
    """Trains a decoder on texts in packed rows: GPT (Radford et al. 2018), whatever the decoder's family.

    When the run ends, the model is set beside n-gram models of the same training texts, and model and tokenizer are
    saved in one folder: the frozen language model of a captioner (`mmtransformer.weights.load_lm`).

    Args:
        decoder: The model.
        optim: The optimizer and its schedule.
        baseline_orders: The n of the n-gram models that it is compared with; none for no comparison.
        baseline_tokens: Most training tokens that they count.
        num_texts: Texts that the trained model makes up in each language, for `texts.txt`.
    """

    unit = "texts"
    data_kind = TextData
    val_metrics = (("perplexity", "perplexity {:.2f}"),)

    def __init__(
        self,
        decoder: Decoder,
        *,
        optim: OptimConfig = OptimConfig(),  # noqa: B008 (frozen)
        baseline_orders: Sequence[int] = (2, 3, 4, 5),
        baseline_tokens: int = 20_000_000,
        num_texts: int = 100,
    ) -> None:
        super().__init__(optim)
        if any(order < 1 for order in baseline_orders):
            raise ValueError(f"baseline_orders {list(baseline_orders)} must be at least 1 each")
        self.decoder = decoder
        self.baseline_orders, self.baseline_tokens = tuple(baseline_orders), baseline_tokens
        self.num_texts = num_texts

    def setup(self, stage: str) -> None:
        """Checks that model and data fit, before anything is computed.

        Raises:
            ValueError: If the vocabulary or the texts are larger than the model, or it could not be saved.
        """
        if not isinstance(self.decoder, Pretrained):
            raise ValueError(f"a {type(self.decoder).__name__} cannot be saved; train a TextDecoder")
        if getattr(self.decoder, "context_dim", None) is not None:
            raise ValueError("a language model has no pictures to look at: leave the decoder's context_dim out")
        data = self.data
        if data is None:
            return
        check_texts(data, data.max_len, self.decoder, "decoder")

    # ------------------------------------------------------------------------------------------------ training

    def loss(self, batch: TextBatch) -> SumAndCount:
        """The losses of the batch's target tokens."""
        hidden = self.decoder(batch.tokens[:, :-1], document_ids=batch.document_ids[:, :-1])
        return next_token_loss(hidden, batch.tokens, batch.loss_mask, self.decoder.head)

    def validation_step(self, batch: TextBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds up the loss, and as bits a byte, which do not depend on the tokenizer."""
        split, loss = self.split_names[dataloader_idx], self.loss(batch)
        self.add(split, "loss", loss)
        if self.data is not None:
            bits = self.data.rows(split).bits_per_byte
            self.add(split, "bits_per_byte", SumAndCount(loss.sum * bits, loss.count))

    def sample(self, turn: int) -> list[str]:
        """A text that the model makes up, in each language."""
        data = self.data
        if data is None:
            return []
        lines = []
        for language in self._languages(data):
            (text,) = write_texts(self.decoder, data.tokenizer, language, 1, seed=turn + 1)
            lines.append(f"{language or 'it writes'}: {text}")
        return lines

    @staticmethod
    def _languages(data: TextData) -> tuple[str | None, ...]:
        return data.rows(data.train_split).languages if data.tokenizer.languages else (None,)

    # -------------------------------------------------------------------------------------------------- the end

    def finish(self, run: Run) -> None:
        """Scores the validation splits, beside n-grams; writes texts, curves and the model."""
        data = self.data
        if data is None:
            return
        decoder = merge_lora(self.decoder).to(run.device).eval()
        scores = {
            split: score_texts(decoder, data, split, limit_batches=run.limit_batches) for split in data.val_splits
        }
        ngrams = score_ngrams(data, data.val_splits, self.baseline_orders, max_tokens=self.baseline_tokens)
        languages = self._languages(data)
        written = {code: write_texts(decoder, data.tokenizer, code, self.num_texts) for code in languages}
        known = data.texts(data.train_split)
        metrics = {
            "scores": scores_to_dict(scores),
            "ngrams": {str(n): scores_to_dict(by) for n, by in ngrams.items()},
            "texts": {language or ALL: novelty(texts, known) for language, texts in written.items()},
        }
        lines = table(scores, ngrams)
        tagged = {
            language: [f"{language}: {text}" if language else text for text in texts]
            for language, texts in written.items()
        }
        made_up = [text for texts in tagged.values() for text in texts]
        (run.folder / "texts.txt").write_text("\n".join(made_up) + "\n", encoding="utf-8")
        save_text_model(decoder, data.tokenizer, run.folder / "model", note=fenced(lines))
        shown = ["It writes, for example:", *(f"  {text}" for texts in tagged.values() for text in texts[:3])]
        self.conclude(run, metrics, lines, shown=shown, files={"texts": "texts.txt"})

    def training_facts(self, run: Run) -> dict[str, Any]:
        """As of every task, and how many tokens were learned in a second."""
        speed = round(self.tokens_seen / max(run.seconds, 1e-9))
        return super().training_facts(run) | {"tokens_per_second": speed}
