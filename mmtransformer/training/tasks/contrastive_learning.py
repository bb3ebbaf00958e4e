"""ContrastiveLearning: two towers that learn which picture and which text belong together, and recall both ways."""

import sys
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from mmtransformer.batch import CaptionBatch, SumAndCount
from mmtransformer.data.captions import CaptionData
from mmtransformer.dual_encoders.clip import CLIP
from mmtransformer.layers.modes import freeze, is_frozen
from mmtransformer.losses.contrastive import image_ids
from mmtransformer.losses.distributed import all_gather_rows
from mmtransformer.metrics.retrieval import recall_at_k
from mmtransformer.pipelines.image_text_embedder import ImageTextEmbedder
from mmtransformer.serialization.printable import fenced, program
from mmtransformer.training.engine.optim import OptimConfig
from mmtransformer.training.engine.run import Run
from mmtransformer.training.engine.task import Task
from mmtransformer.training.evaluation.report import model_option
from mmtransformer.training.evaluation.retrieval import KS, evaluate_retrieval, plot_retrieval
from mmtransformer.training.evaluation.zero_shot import zero_shot, zero_shot_table
from mmtransformer.training.tasks.data_checks import check_pixels, check_texts, refuse_empty_captions

RECALLS = tuple(f"{way}_recall@{k}" for way in ("text", "image") for k in KS)
"""What a validation measures beside the loss: a picture's texts, and a text's picture, among the first k."""


class ContrastiveLearning(Task[CaptionData]):
    """Trains a vision tower and a text tower to agree (CLIP, arXiv:2103.00020; SigLIP, arXiv:2303.15343).

    All pictures and texts that the processes share in a step are each other's negatives, but for captions of one
    picture, pictures that stand twice in a batch, and pictures with one caption in common. Batches that are
    accumulated are not: a larger batch is another loss.

    Every validation measures recall at 1, 5 and 10 both ways among its first pictures; the run ends with that of whole
    splits within each language, and on drawn scenes with their shapes and colours told by words alone.

    Args:
        model: The model.
        optim: The optimizer and its schedule.
        gather_grad: Whether gradients reach the processes that candidates came from; without, a step is faster and
            its gradient no longer that of the whole batch.
        recall_images: Among how many pictures of each split a validation measures recall; 0 = it does not.
    """

    data_kind = CaptionData
    val_metrics = (("text_recall@1", "text of a picture {:.1%}"), ("image_recall@1", "picture of a text {:.1%}"))

    def __init__(
        self,
        model: CLIP,
        *,
        optim: OptimConfig = OptimConfig(),  # noqa: B008 (frozen)
        gather_grad: bool = True,
        recall_images: int = 1000,
    ) -> None:
        super().__init__(optim)
        if recall_images < 0:
            raise ValueError(f"recall_images ({recall_images}) must be at least 0")
        self.model, self.gather_grad, self.recall_images = model, gather_grad, recall_images
        self.start: ImageTextEmbedder | None = None
        """The saved model that this one goes on from; its tokenizer and transform are then the data's."""
        self._found: dict[str, list[tuple[Tensor, Tensor, Tensor, Tensor]]] = defaultdict(list)

    def setup(self, stage: str) -> None:
        """Checks that model and data fit, before anything is computed.

        Raises:
            ValueError: If the vocabulary or the captions are larger than the model, a caption is empty, or patches do
                not divide the pictures.
        """
        data = self.data
        if data is None:
            return
        check_texts(data, data.max_len, self.model, "text tower")
        check_pixels(data, self.model)
        refuse_empty_captions(data, testing=stage == "test")

    def on_fit_start(self) -> None:
        """Computes the tokens of a frozen vision tower, if the data keeps a cache."""
        super().on_fit_start()
        data = self.data
        if data is not None and data.cache_features:
            half = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None
            data.use_features(self.model, device=self.device, autocast=half, progress=sys.stderr.isatty())

    def loss(self, batch: CaptionBatch) -> SumAndCount:
        """The loss of a batch, a mean over the global batch already: it counts as one."""
        found = self.model(batch, gather_grad=self.gather_grad)
        if self.logs_this_step:
            for name in ("image_accuracy", "text_accuracy"):
                self.log_value(f"train/{name}", found.terms[name])
            self.log_value("logit_scale", self.model.scale)
        return found.sums

    def learned_tokens(self, batch: CaptionBatch, loss: SumAndCount) -> Tensor:
        """Those of the captions; the loss counts as one."""
        return batch.loss_mask.sum()

    # ---------------------------------------------------------------------------------------------- validation

    def validation_step(self, batch: CaptionBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds up the loss and what is right within a batch, and keeps the first vectors for recall."""
        split = self.split_names[dataloader_idx]
        images, texts = self.model.image_features(batch), self.model.text_features(batch)
        ids = image_ids(batch.names, batch.loss_mask)
        output = self.model.compare(batch, images, texts)  # First: all processes have to meet in it.
        counted = batch.loss_mask.any().to(output.loss.dtype)
        self.add(split, "loss", SumAndCount(output.loss * counted, counted))
        if ids is None or sum(len(found[0]) for found in self._found[split]) >= self.recall_images:
            return
        rows = ids.repeat_interleave(len(texts) // len(images)).masked_fill(~batch.loss_mask.any(1), -1)
        self._found[split].append((images.float(), ids, texts.float(), rows))

    def on_validation_epoch_end(self) -> None:
        """Measures recall among the pictures that were kept of all processes, and logs all means."""
        for split, parts in self._found.items():
            if not parts:
                continue
            images, ids, texts, rows = (all_gather_rows(torch.cat(x)) for x in zip(*parts, strict=True))
            for name, value in recalls(images, ids, texts, rows).items():
                self.add(
                    split,
                    name,
                    SumAndCount(torch.tensor(value, device=images.device), torch.ones((), device=ids.device)),
                )
        self._found.clear()
        super().on_validation_epoch_end()

    on_test_epoch_end = on_validation_epoch_end

    # -------------------------------------------------------------------------------------------------- the end

    def finish(self, run: Run) -> None:
        """Searches the validation splits both ways; writes scores, a sheet of searches, curves and the model."""
        data = self.data
        if data is None:
            return
        retrieval = evaluate_retrieval(
            self.model, data, device=run.device, autocast=run.autocast, limit_batches=run.limit_batches
        )
        plot_retrieval(retrieval, data, run.folder / "retrieval.png", title=run.title)
        encoder = ImageTextEmbedder(self.model, data.tokenizer, data.transform, device=run.device)
        metrics: dict[str, Any] = {"retrieval": retrieval.to_dict()}
        table = retrieval.table()
        if shot := zero_shot(encoder, data, limit=None if run.limit_batches is None else 8 * run.limit_batches):
            metrics["zero_shot"] = shot
            table += f"\n\n{zero_shot_table(shot)}"
        encoder.save_pretrained(run.folder / "model", card=f"## Scores\n\n{fenced(table)}")
        shown = [
            "Find pictures by words:",
            f'  {program()} search "WORDS" --images PICTURES/ {model_option(run.folder / "model", self.model)}',
        ]
        self.conclude(run, metrics, table, shown=shown, files={"searches": "retrieval.png"})


def recalls(images: Tensor, ids: Tensor, texts: Tensor, rows: Tensor) -> dict[str, float]:
    """Recall of pictures and texts that were seen, each picture once.

    Args:
        images: (b e).
        ids: (b) long, which picture it is; -1 = none.
        texts: (n e).
        rows: (n) long, the id of its picture; -1 = no text.

    Returns:
        The `RECALLS`; nothing where there is no picture with a text.
    """
    first = {int(id): i for i, id in reversed(list(enumerate(ids.tolist()))) if id >= 0}
    kept, seen = [], set[tuple[int, bytes]]()
    for j, id in enumerate(rows.tolist()):
        key = (id, texts[j].cpu().numpy().tobytes())
        if id in first and key not in seen:
            seen.add(key)
            kept.append((j, id))
    with_text = sorted({id for _, id in kept}, key=lambda id: first[id])
    if not with_text:
        return {}
    place = {id: row for row, id in enumerate(with_text)}
    chosen = images[torch.tensor([first[id] for id in with_text], device=images.device)]
    near = chosen @ texts[torch.tensor([j for j, _ in kept], device=texts.device)].T
    found = recall_at_k(near.cpu().numpy(), [place[id] for _, id in kept], KS)
    return {name: found[name] for name in RECALLS}


def finetune_clip(
    init: str = "runs/clip_scenes/model",
    *,
    freeze_vision: bool = False,
    freeze_text: bool = False,
    optim: OptimConfig = OptimConfig(lr=1e-4, warmup_steps=50),  # noqa: B008 (frozen)
    gather_grad: bool = True,
    recall_images: int = 1000,
) -> ContrastiveLearning:
    """Goes on from a saved or public dual encoder, with its own tokenizer and image transform.

    Args:
        init: The model's folder, or its name on the hub.
        freeze_vision: Leave the vision tower as it is, and train the rest.
        freeze_text: Leave the text tower as it is, and train the rest (LiT's way round: arXiv:2111.07991 freezes the
            vision tower).
        optim: The optimizer and its schedule.
        gather_grad: See `ContrastiveLearning`.
        recall_images: See `ContrastiveLearning`.

    Raises:
        ValueError: If the folder holds no dual encoder.
    """
    saved = ImageTextEmbedder.from_pretrained(init, device="cpu")
    model = saved.model
    if freeze_vision and not is_frozen(model.vision):
        freeze(model.vision)
        model.freeze_vision = True
    if freeze_text:
        freeze(model.text)
    task = ContrastiveLearning(model, optim=optim, gather_grad=gather_grad, recall_images=recall_images)
    task.start = saved
    return task
