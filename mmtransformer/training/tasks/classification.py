"""Classification: a ViT that learns the classes of pictures, from nothing or from a pretrained one."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtransformer.backbones.vit import ViT
from mmtransformer.batch import SumAndCount
from mmtransformer.data.classes import ClassBatch, ClassData
from mmtransformer.images import ImageError
from mmtransformer.layers.linear import Linear
from mmtransformer.pipelines.base import fast_autocast
from mmtransformer.pipelines.classifier import ImageClassifier
from mmtransformer.plots import Card, CardCaption, plot_gallery, plot_rollout, save_image
from mmtransformer.serialization.printable import fenced
from mmtransformer.training.engine.optim import OptimConfig
from mmtransformer.training.engine.run import Run
from mmtransformer.training.engine.task import Task


class Classification(Task[ClassData]):
    """Trains a ViT to classify (Dosovitskiy et al., arXiv:2010.11929).

    A ViT without a head, such as `load_vit` gives, gets one for the classes of the data.

    Args:
        vit: The model.
        optim: The optimizer and its schedule.
        label_smoothing: Share of the target's probability that is spread over the classes, in training only.
        freeze: Train the head alone, and leave the rest as it is (a linear probe).
        num_gallery_images: Pictures in the gallery.
    """

    data_kind = ClassData
    val_metrics = (("accuracy", "{:.1%} right"),)

    def __init__(
        self,
        vit: ViT,
        *,
        optim: OptimConfig = OptimConfig(),  # noqa: B008 (frozen)
        label_smoothing: float = 0.0,
        freeze: bool = False,
        num_gallery_images: int = 24,
    ) -> None:
        super().__init__(optim)
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing ({label_smoothing}) must be at least 0 and below 1")
        self.vit, self.label_smoothing, self.freeze_vit = (vit, label_smoothing, freeze)
        self.num_gallery_images = num_gallery_images

    def setup(self, stage: str) -> None:
        """Gives the model a head for the data's classes, and checks that the pictures fit.

        Raises:
            ValueError: If it has a head for another number of classes, or patches do not divide the pictures.
        """
        data = self.data
        if data is None:
            return
        classes = len(data.classes)
        if not self.vit.num_classes:
            head = Linear(self.vit.dim, classes)
            chance = torch.Generator().manual_seed(data.seed)  # the same head in one process and in many
            nn.init.trunc_normal_(head.weight, std=0.02, generator=chance)
            nn.init.zeros_(head.bias)
            self.vit.head, self.vit.num_classes = head, classes
        if self.vit.num_classes != classes:
            raise ValueError(
                f"the model tells {self.vit.num_classes} classes apart, but the data has {classes}; leave num_classes "
                f"out, and the head is made for the data"
            )
        height, width = data.transform.size
        self.vit.dynamic_feat_size(height, width)
        if self.freeze_vit:
            self.vit.requires_grad_(False)
            self.vit.head.requires_grad_(True)

    def set_modes(self) -> None:
        """A frozen tower has neither dropout nor stochastic depth."""
        super().set_modes()
        if self.freeze_vit:
            self.vit.eval()

    def loss(self, batch: ClassBatch) -> SumAndCount:
        """The losses of the batch's pictures."""
        return self._loss(self.vit(batch.pixels), batch, self.label_smoothing)

    @staticmethod
    def _loss(logits: Tensor, batch: ClassBatch, label_smoothing: float) -> SumAndCount:
        each = F.cross_entropy(logits.float(), batch.labels, reduction="none", label_smoothing=label_smoothing)
        return SumAndCount((each * batch.is_real).sum(), batch.is_real.sum())

    def validation_step(self, batch: ClassBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds up the loss, without smoothing, and how many are right."""
        split, logits = self.split_names[dataloader_idx], self.vit(batch.pixels)
        if batch.is_real.any():
            self.add(split, "loss", self._loss(logits, batch, 0.0))
            right = (logits.argmax(-1) == batch.labels) & batch.is_real
            self.add(split, "accuracy", SumAndCount(right.sum().float(), batch.is_real.sum()))

    def finish(self, run: Run) -> None:
        """Classifies the validation splits; writes scores, a confusion matrix, a gallery, curves and the model."""
        data = self.data
        if data is None:
            return
        self.vit.to(run.device).eval()
        confusions = {split: self._confusion(data, split, run.device, run.limit_batches) for split in data.val_splits}
        scores = {split: class_scores(matrix, data.classes) for split, (matrix, _) in confusions.items()}
        found = table(scores)
        classifier = ImageClassifier(self.vit, data.classes, data.transform, device=run.device)
        classifier.save_pretrained(run.folder / "model", card=f"## Scores\n\n{fenced(found)}")
        files = {}
        wrong = [names for _, names in confusions.values()]
        if cards := make_cards(classifier, data, self.num_gallery_images, set(wrong[0] if wrong else ())):
            gallery = plot_gallery(cards, title=run.title, columns=6, card_width=200)
            save_image(gallery, run.folder / "gallery.png")
            rollout = plot_rollout(self.vit, cards[0].image, data.transform, title=run.title)
            save_image(rollout, run.folder / "attention.png")
            files = {"gallery": "gallery.png"}
        self.conclude(run, {"classification": scores}, found, files=files)

    @torch.inference_mode()
    def _confusion(
        self, data: ClassData, split: str, device: torch.device, limit: int | None
    ) -> tuple[Tensor, list[str]]:
        """How often each class (rows) was taken for each (columns), and the pictures that were taken for another."""
        wrong: list[str] = []
        matrix = torch.zeros(len(data.classes), len(data.classes), dtype=torch.long)
        for batch in islice(data.loader(split), limit):
            with fast_autocast(device):
                said = self.vit(batch.pixels.to(device)).argmax(-1).cpu()
            pairs = batch.labels * len(data.classes) + said
            matrix += torch.bincount(pairs[batch.is_real], minlength=matrix.numel()).view_as(matrix)
            wrong += [batch.names[i] for i in ((said != batch.labels) & batch.is_real).nonzero().flatten().tolist()]
        return matrix, wrong


def class_scores(matrix: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """Scores from a confusion matrix (true classes are rows): accuracy, that of each class, and the mean of those.

    "confusion_by_true_class" says of each class how many of its pictures were taken for which.
    """
    totals, right = matrix.sum(1), matrix.diagonal()
    each = {name: float(r) / float(n) for name, r, n in zip(classes, right.tolist(), totals.tolist(), strict=True) if n}
    return {
        "accuracy": float(right.sum()) / max(float(totals.sum()), 1.0),
        "mean_class_accuracy": sum(each.values()) / max(len(each), 1),
        "images": int(totals.sum()),
        "classes": each,
        "confusion_by_true_class": {
            name: {classes[i]: int(row[i]) for i in row.nonzero().flatten().tolist()}
            for name, row in zip(classes, matrix, strict=True)
            if row.any()
        },
    }


def make_cards(
    classifier: ImageClassifier, data: ClassData, num_gallery_images: int, wrong: Collection[str] = ()
) -> list[Card]:
    """Cards of pictures of the first validation split: the class that was told, and whether it is right.

    Those that are named in `wrong` come first; of these, and of the others, a picture of each class in turn.
    """
    if not data.val_splits:
        return []
    images, turns, order = data.images(data.val_splits[0]), Counter(), []
    for i in range(len(images)):
        kind = (images.name(i) not in wrong, images.label(i))
        order.append((kind[0], turns[kind], i))
        turns[kind] += 1
    cards = []
    for *_, i in sorted(order):
        if len(cards) == num_gallery_images:
            break
        try:
            image = images.image(i)
        except ImageError:
            continue
        ((name, share),) = classifier(image)[0]
        true = data.classes[images.label(i)]
        said = CardCaption(f"{name} {share:.0%}", references=[true], right=name == true)
        cards.append(Card(image, [said], heading=images.name(i)))
    return cards


def table(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """The scores as lines of text: accuracy, the classes that are told worst, and what is mistaken for what."""
    lines = [f"{'split':<14}{'images':>9}  accuracy  mean of classes  worst classes"]
    for split, s in scores.items():
        worst = sorted(s["classes"].items(), key=lambda item: item[1])[:3]
        names = ", ".join(f"{name} {value:.1%}" for name, value in worst)
        lines.append(f"{split:<14}{s['images']:>9}  {s['accuracy']:<8.1%}  {s['mean_class_accuracy']:<15.1%}  {names}")
    for split, s in scores.items():
        taken = [(n, a, b) for a, row in s["confusion_by_true_class"].items() for b, n in row.items() if a != b]
        if most := sorted(taken, key=lambda item: -item[0])[:4]:
            lines.append(f"{split}: mistaken most often: " + ", ".join(f"{a} for {b} ({n:,})" for n, a, b in most))
    return "\n".join(lines)
