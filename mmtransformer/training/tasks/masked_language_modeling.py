"""MaskedLanguageModeling: a text encoder that fills in hidden words and tells which texts belong together."""

from dataclasses import asdict
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtransformer.backbones.encoder import TextEncoder
from mmtransformer.batch import SumAndCount
from mmtransformer.data.text_only.masked import MaskedTextData
from mmtransformer.data.text_only.masked_rows import MaskedBatch
from mmtransformer.serialization.printable import fenced
from mmtransformer.training.engine.optim import OptimConfig
from mmtransformer.training.engine.run import Run
from mmtransformer.training.engine.task import Task
from mmtransformer.training.evaluation.masked_scores import fill_in, fit_bigrams, read_masked, score_masked
from mmtransformer.training.evaluation.report import save_text_model
from mmtransformer.training.tasks.data_checks import check_texts


class MaskedLanguageModeling(Task[MaskedTextData]):
    """Trains a text encoder as BERT was (Devlin et al., arXiv:1810.04805): hidden words, and pairs of texts.

    The loss is the mean over hidden tokens, plus the mean over pairs where there are any. Whether two texts belong
    together stands in the place of BERT's next sentence: texts of one group are captions of one picture. A pair weighs
    as much as its row has hidden tokens, so that one count, theirs, makes means of both sums, and the gradient does not
    depend on how a global batch is cut up.

    Args:
        encoder: The model, with its `mlm_head`, and its `nsp_head` if rows are pairs.
        optim: The optimizer and its schedule.
        nsp_weight: Weight of the loss of pairs (next sentence prediction).
    """

    unit = "texts"
    data_kind = MaskedTextData
    val_metrics = (("nsp_loss", "pairs {:.3f}"),)

    def __init__(
        self,
        encoder: TextEncoder,
        *,
        optim: OptimConfig = OptimConfig(),  # noqa: B008 (frozen)
        nsp_weight: float = 1.0,
    ) -> None:
        super().__init__(optim)
        if nsp_weight < 0:
            raise ValueError(f"nsp_weight ({nsp_weight}) must not be below 0")
        self.encoder, self.nsp_weight = encoder, nsp_weight

    def setup(self, stage: str) -> None:
        """Checks that model and data fit, before anything is computed.

        Raises:
            ValueError: If the encoder lacks a head, or its vocabulary or rows are too small.
        """
        if not self.encoder.mlm_head:
            raise ValueError("hidden words need the encoder's mlm_head: true")
        data = self.data
        if data is None:
            return
        if data.nsp and not self.encoder.nsp_head:
            raise ValueError("pairs of texts need the encoder's nsp_head: true; or set data.nsp: false")
        if data.nsp and self.encoder.num_types < 2:
            raise ValueError(
                f"pairs of texts need 2 token types, the encoder has {self.encoder.num_types}; set data.nsp: false"
            )
        check_texts(data, data.max_len, self.encoder, "encoder")

    # ------------------------------------------------------------------------------------------------ training

    def loss(self, batch: MaskedBatch) -> SumAndCount:
        """The losses of the hidden tokens, each with the loss of its row's pair beside it."""
        words, pairs = self.losses(batch)
        total = words.sum()
        if self.encoder.nsp_head:  # without pairs too: DDP waits for the head's gradient
            hidden = batch.loss_mask.sum(1)[batch.next_sentence_label >= 0]
            total = total + self.nsp_weight * (pairs * hidden).sum()
        return SumAndCount(total, torch.tensor(words.numel(), device=total.device))

    def losses(self, batch: MaskedBatch) -> tuple[Tensor, Tensor]:
        """The losses of all hidden tokens and of all pairs, in the order of the rows."""
        logits, told = read_masked(self.encoder, batch)
        words = F.cross_entropy(logits, batch.labels[batch.loss_mask], reduction="none")
        if told is None:
            return words, words.new_zeros(0)
        return words, F.cross_entropy(told, batch.next_sentence_label[batch.next_sentence_label >= 0], reduction="none")

    def validation_step(self, batch: MaskedBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds up the losses."""
        split = self.split_names[dataloader_idx]
        words, pairs = self.losses(batch)
        for name, each in (("loss", words), ("nsp_loss", pairs)):
            if each.numel():
                self.add(split, name, SumAndCount(each.sum(), torch.tensor(each.numel(), device=each.device)))

    def sample(self, turn: int) -> list[str]:
        """A held-out text with hidden words, and what the model puts there."""
        data = self.data
        if data is None or not data.val_splits:
            return []
        batch = next(iter(data.loader(data.val_splits[0]))).to(self.device)
        return fill_in(self.encoder, data.tokenizer, batch, rows=[turn % len(batch.tokens)])

    # -------------------------------------------------------------------------------------------------- the end

    def finish(self, run: Run) -> None:
        """Counts how many hidden words are filled in rightly, beside what counting can do; saves the model."""
        data = self.data
        if data is None:
            return
        encoder = self.encoder.to(run.device).eval()
        baseline = fit_bigrams(data)
        scores = {
            split: score_masked(encoder, data, split, baseline, limit_batches=run.limit_batches)
            for split in data.val_splits
        }
        lines = "\n".join(f"{split}: {score}" for split, score in scores.items())
        filled = [
            line
            for split in data.val_splits
            for batch in islice(data.loader(split), 1)
            for line in fill_in(encoder, data.tokenizer, batch.to(run.device))
        ]
        (run.folder / "filled.txt").write_text("\n".join(filled) + "\n", encoding="utf-8")
        save_text_model(encoder, data.tokenizer, run.folder / "model", note=fenced(lines))
        metrics = {"scores": {split: asdict(score) for split, score in scores.items()}}
        shown = ["It fills in [word: what stood there], for example:", *(f"  {line}" for line in filled[:6])]
        self.conclude(run, metrics, lines, shown=shown, files={"texts": "filled.txt"})
