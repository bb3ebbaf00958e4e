"""QFormerStage1: BLIP-2's first stage as a training task: contrast, matching and generation, and recall at the end."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmtransformer.batch import CaptionBatch, ModelOutput, SumAndCount
from mmtransformer.captioners.blip2_qformer import TERMS, Blip2QFormer
from mmtransformer.data.loading.hashing import hash64
from mmtransformer.generation.captions import CAPTIONING
from mmtransformer.generation.config import GenerationConfig
from mmtransformer.pipelines.base import write_json
from mmtransformer.serialization.printable import say
from mmtransformer.training.engine.optim import OptimConfig
from mmtransformer.training.engine.run import Run
from mmtransformer.training.evaluation.evaluation import pick_metrics
from mmtransformer.training.evaluation.retrieval import Retrieval, evaluate_retrieval, plot_retrieval
from mmtransformer.training.tasks.captioning import Captioning
from mmtransformer.training.tasks.data_checks import refuse_empty_captions


class QFormerStage1(Captioning):
    """Trains a Q-Former, and the vision tower if it is not frozen, to find, match and describe (BLIP-2, stage 1).

    The sum of the three losses is learned. Captions of one picture, and pictures that stand twice in a batch, are
    positives of each other; negatives are drawn by (seed, step, picture), so a run is the same in any number of
    processes. Validation also does what it does for a captioner, with the generation loss: SPLIT/loss is that loss, and
    it is compared with that of other and blank pictures.

    Args:
        captioner: The model.
        optim: The optimizer and its schedule.
        itc_smoothing: Label smoothing of the contrastive loss, in training only.
        label_smoothing: That of the generation loss.
        num_match_texts: How many of a picture's captions of a batch are matched; None = all. It is most of a step's
            work.
        gather_grad: Whether contrastive gradients reach the processes that candidates came from.
        num_rerank: How many of the nearest are matched again when retrieval is evaluated; 0 = none.
        seed: Of the negatives.
        image_ablation_batches: Batches of each validation that are looked at with wrong and blank pictures too.
        generation: How captions are searched for when the run is evaluated; saved with the model.
    """

    captioner: Blip2QFormer  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        captioner: Blip2QFormer,
        *,
        optim: OptimConfig = OptimConfig(),  # noqa: B008 (frozen)
        itc_smoothing: float = 0.1,
        label_smoothing: float = 0.1,
        num_match_texts: int | None = None,
        gather_grad: bool = True,
        num_rerank: int = 16,
        seed: int = 0,
        image_ablation_batches: int = 4,
        generation: GenerationConfig = CAPTIONING,
    ) -> None:
        super().__init__(
            captioner,
            optim=optim,
            label_smoothing=label_smoothing,
            image_ablation_batches=image_ablation_batches,
            generation=generation,
        )
        if not 0.0 <= itc_smoothing < 1.0:
            raise ValueError(f"itc_smoothing ({itc_smoothing}) must be at least 0 and below 1")
        if num_rerank < 0:
            raise ValueError(f"num_rerank ({num_rerank}) must be at least 0")
        self.itc_smoothing, self.num_match_texts, self.gather_grad = itc_smoothing, num_match_texts, gather_grad
        self.num_rerank, self.seed = num_rerank, seed
        self._micro = 0  # batches since the last optimizer step

    def setup(self, stage: str) -> None:
        """As for any captioner; and no caption may be empty, for it would fit every picture.

        Raises:
            ValueError: If one is, or the model and the data do not fit.
        """
        super().setup(stage)
        if self.data is not None:
            refuse_empty_captions(self.data, testing=stage == "test")

    def output(self, batch: CaptionBatch, *, training: bool) -> ModelOutput:
        """The three losses of a batch; smoothed, and with new negatives each step, in training."""
        step = (self.trainer.global_step, self._micro) if training else (0, -1)
        return self.captioner(
            batch,
            label_smoothing=self.label_smoothing if training else 0.0,
            itc_smoothing=self.itc_smoothing if training else 0.0,
            seed=int(hash64(self.seed, *step)) >> 2,
            num_match_texts=self.num_match_texts if training else None,
            gather_grad=self.gather_grad,
        )

    def loss(self, batch: CaptionBatch) -> SumAndCount:
        """The sum of the three, each a mean over the global batch already: it counts as one."""
        found = self.output(batch, training=True)
        if self._micro == 0 and self.logs_this_step:
            for name, value in found.terms.items():
                self.log_value(f"train/{name}", value)
            self.log_value("temperature", self.captioner.temperature)
        self._micro += 1
        return found.sums

    def learned_tokens(self, batch: CaptionBatch, loss: SumAndCount) -> Tensor:
        """Those of the captions; the loss counts as one."""
        return batch.loss_mask.sum()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """As every task's; the next batch is the first of its step again."""
        super().on_before_optimizer_step(optimizer)
        self._micro = 0

    def validation_step(self, batch: CaptionBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds up the three losses, and generation's with other and blank pictures."""
        found = self.output(batch, training=False)  # First: all processes have to meet in it.
        split, one = self.split_names[dataloader_idx], torch.ones((), device=found.loss.device)
        for name, value in found.terms.items():
            self.add(split, name, SumAndCount(value, one))
        super().validation_step(batch, batch_idx, dataloader_idx)

    def describe(self, split: str, metrics: Mapping[str, Tensor]) -> str:
        """A validation's losses, with generation's of other and blank pictures beside them."""
        values = {name: float(metrics[f"{split}/{name}"]) for name in TERMS}
        return (
            f"{super().describe(split, metrics)}, contrast {values['itc']:.3f}, matching {values['itm']:.3f} "
            f"({values['itm_accuracy']:.1%} right)"
        )

    def finish(self, run: Run) -> None:
        """What every captioner leaves, and between the stages: recall both ways, matching, perplexity."""
        super().finish(run)
        if (data := self.data) is None:
            return
        retrieval = evaluate_retrieval(
            self.captioner,
            data,
            num_rerank=self.num_rerank,
            device=run.device,
            autocast=run.autocast,
            limit_batches=run.limit_batches,
        )
        stage1 = stage1_scores(self.validation_means, data.val_splits)
        path = run.folder / "metrics.json"
        write_json(path, json.loads(path.read_text("utf-8")) | {"retrieval": retrieval.to_dict(), "stage1": stage1})
        plot_retrieval(retrieval, data, run.folder / "retrieval.png", title=run.title)
        say(f"\n{stage1_table(retrieval, stage1)}\n\nsearches  {run.folder / 'retrieval.png'}")


def stage1_scores(metrics: Mapping[str, Any], splits: Sequence[str]) -> dict[str, dict[str, float]]:
    """The losses of a validation, by split; "itg_perplexity" is that of a caption's token."""
    found = pick_metrics(metrics, splits, (*TERMS, "perplexity"))
    return {
        split: {"itg_perplexity" if n == "perplexity" else n: x for n, x in by.items()} for split, by in found.items()
    }


def stage1_table(retrieval: Retrieval, scores: Mapping[str, Mapping[str, float]]) -> str:
    """The evaluation between the stages as lines of text."""
    lines = [retrieval.table(), ""]
    for split, values in scores.items():
        lines.append(
            f"{split}: matching {values['itm_accuracy']:.1%} right (of one true pair and two hard false ones), "
            f"perplexity of a caption's token {values['itg_perplexity']:.2f}"
        )
    return "\n".join(lines)
