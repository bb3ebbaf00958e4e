"""Captioning: any captioner as a LightningModule. The loss is per token, whatever the batches and processes.

Letters: b pictures, r captions of a picture, n = b * r rows.
"""

import dataclasses
import math
import sys
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from mmtransformer.captioner import CaptionBatch, Captioner, caption_loss, freeze, is_frozen
from mmtransformer.data.captions import CaptionData
from mmtransformer.pipeline import Decoding, ImageCaptioner
from mmtransformer.training.guard import not_finite
from mmtransformer.training.optim import adamw, muon, warming_average, warmup_cosine


class Captioning(pl.LightningModule):
    """Trains a captioner to say what people say of a picture.

    A training step returns the SUM of the tokens' losses; before the optimizer step the gradient is divided by the
    number of tokens that all micro-batches and processes had together. So the gradient is the mean over the tokens of
    the global batch, however it was cut up.

    Every validation also asks whether the pictures are used at all: the loss with the right pictures is set beside
    that with other pictures of the batch and that with blank ones. A captioner that only knows what captions sound
    like has three equal losses.

    Args:
        captioner: The model.
        optimizer: "adamw", or "muon" for matrices with AdamW for the rest: small models learn from fewer pictures.
        lr: The peak learning rate.
        weight_decay: Decay of matrices; vectors (norms, biases) have none.
        betas: AdamW's decay rates.
        warmup_steps: Steps until the peak.
        min_lr_ratio: What is left of the peak at the end of the cosine.
        label_smoothing: Share of the target's probability that is spread over the vocabulary, in training only.
        ema: Decay of an exponential moving average of the weights, which then is what is validated and saved; 0 = none.
        image_use_batches: Batches of each validation that are looked at with wrong and blank pictures too.
        decoding: How captions are searched for when the run is evaluated; saved with the model.
    """

    def __init__(
        self,
        captioner: Captioner,
        *,
        optimizer: Literal["adamw", "muon"] = "adamw",
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.98),
        warmup_steps: int = 100,
        min_lr_ratio: float = 0.01,
        label_smoothing: float = 0.0,
        ema: float = 0.0,
        image_use_batches: int = 4,
        decoding: Decoding | None = None,
    ) -> None:
        super().__init__()
        if optimizer not in ("adamw", "muon"):
            raise ValueError(f'optimizer must be "adamw" or "muon", not "{optimizer}"')
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing ({label_smoothing}) must be at least 0 and below 1")
        if not 0.0 <= ema < 1.0:
            raise ValueError(f"ema ({ema}) must be at least 0 and below 1; 0.999 is usual, 0 takes none")
        self.optimizer: Literal["adamw", "muon"] = optimizer
        self.captioner, self.lr, self.weight_decay, self.betas = captioner, lr, weight_decay, betas
        self.warmup_steps, self.min_lr_ratio, self.label_smoothing = (
            warmup_steps,
            min_lr_ratio,
            label_smoothing,
        )
        self.ema, self.image_use_batches = ema, image_use_batches
        self.decoding = decoding or Decoding()
        self.start: ImageCaptioner | None = None
        """The saved model that this one goes on from; its tokenizer and transform are then the data's."""
        self.pictures_seen = self.tokens_seen = 0
        self._sums: list[Tensor] = []  # of the micro-batches since the last optimizer step
        self._counts: list[Tensor] = []
        self._names: list[str] = []
        self._totals: dict[tuple[str, str], Tensor] = {}

    # ------------------------------------------------------------------------------------------------ training

    def configure_callbacks(self) -> list[pl.Callback]:
        """The moving average, if there is one."""
        from lightning.pytorch.callbacks import WeightAveraging

        return [WeightAveraging(device=None, avg_fn=warming_average(self.ema))] if self.ema else []

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer, with warm-up and cosine over the whole run."""
        settings = {"lr": self.lr, "weight_decay": self.weight_decay, "betas": self.betas}
        if self.optimizer == "muon":
            optimizer = muon(self.captioner, **settings)
        else:
            # With float16 a fused optimizer would unscale the gradients itself, after they were clipped.
            optimizer = adamw(self.captioner, **settings, fused=self.trainer.precision != "16-mixed")
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError("the schedule needs an end: set trainer.max_epochs or trainer.max_steps")
        scheduler = warmup_cosine(
            optimizer,
            warmup_steps=self.warmup_steps,
            total_steps=max(int(steps), 1),
            min_lr_ratio=self.min_lr_ratio,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def setup(self, stage: str) -> None:
        """Checks that model and data fit, before anything is computed.

        Raises:
            ValueError: If the vocabulary or the captions are larger than the model, or the pictures of another size.
        """
        data = self.data
        if data is None:
            return
        if data.tokenizer.vocab_size > self.captioner.vocab_size:
            raise ValueError(
                f"wrong vocabulary: the tokenizer has {data.tokenizer.vocab_size} tokens, but the model scores "
                f"{self.captioner.vocab_size}; set the decoder's vocab_size to at least {data.tokenizer.vocab_size}, "
                f"or data.vocab_size to {self.captioner.vocab_size}"
            )
        if data.max_len > self.captioner.max_len:
            raise ValueError(
                f"data.max_len ({data.max_len}) is more than the {self.captioner.max_len} tokens that the model reads; "
                f"lower it, or raise the decoder's max_len"
            )
        patch = getattr(self.captioner.vision, "patch_size", None)
        if isinstance(patch, int) and any(side % patch for side in data.transform.size):
            raise ValueError(
                f"data.image gives pictures of {data.transform.size[0]} x {data.transform.size[1]} px, which the "
                f"backbone's patches of {patch} px do not divide; change image_size or patch_size"
            )

    @property
    def data(self) -> CaptionData | None:
        """The run's data, if it is a CaptionData."""
        data = getattr(self.trainer, "datamodule", None)
        return data if isinstance(data, CaptionData) else None

    def on_fit_start(self) -> None:
        """Computes the features of a frozen vision tower, if the data keeps a cache."""
        data = self.data
        if data is not None and data.cache_features:
            half = self.trainer.precision == "bf16-mixed"
            data.use_features(
                self.captioner,
                device=self.device,
                autocast=torch.bfloat16 if half else None,
                progress=sys.stderr.isatty(),
            )
            self.captioner.train()

    def training_step(self, batch: CaptionBatch, batch_idx: int) -> Tensor:
        """The sum of the losses of a batch's target tokens."""
        loss = caption_loss(self.captioner, batch, label_smoothing=self.label_smoothing)
        self._sums.append(loss.sum.detach())
        self._counts.append(loss.count)
        self._names += batch.names
        self.pictures_seen += len(batch.names)
        self.tokens_seen += int(loss.count)
        return loss.sum

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """From the sum of gradients to the mean over the tokens of all micro-batches and processes."""
        count = torch.stack(self._counts).sum()
        world = self.trainer.world_size
        if world > 1:
            count = torch.as_tensor(self.all_gather(count)).sum()
        # Lightning has divided by the micro-batches, DDP by the processes.
        scale = self.trainer.accumulate_grad_batches * world / max(int(count), 1)
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if scale != 1.0:
            torch._foreach_mul_(grads, scale)  # pyright: ignore[reportPrivateImportUsage]

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips, logs, and stops a run whose gradient is not finite."""
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        loss = torch.stack(self._sums).sum() / torch.stack(self._counts).sum().clamp(min=1)
        value = float(norm)
        if not math.isfinite(value):
            raise not_finite(
                self,
                loss=float(loss),
                grad_norm=value,
                step=self.trainer.global_step,
                lr=optimizer.param_groups[0]["lr"],
                names=self._names,
            )
        # Lightning's own clipping refuses fused optimizers, and would measure the norm once more.
        if gradient_clip_val and gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(params, gradient_clip_val)
        elif gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(params, gradient_clip_val, norm)
        self.last_loss = loss
        if self.trainer.global_step % getattr(self.trainer, "log_every_n_steps", 1) == 0:
            self.log_dict(
                {"train/loss": loss, "train/grad_norm": norm, "lr": optimizer.param_groups[0]["lr"]},
                batch_size=len(self._names),
            )
        self._sums, self._counts, self._names = [], [], []

    # ---------------------------------------------------------------------------------------------- validation

    def validation_step(self, batch: CaptionBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds up the losses with right, other and blank pictures."""
        split = self.split_names[dataloader_idx]
        if not batch.target[:, 1:].any():
            return
        self._add(split, "loss", batch)
        if batch_idx < self.image_use_batches and len(batch.names) > 1:
            self._add(split, "loss_right", batch)
            self._add(split, "loss_other_picture", other_pictures(batch))
            self._add(split, "loss_blank_picture", self.blank_pictures(batch))

    def test_step(self, batch: CaptionBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """As `validation_step`."""
        self.validation_step(batch, batch_idx, dataloader_idx)

    @property
    def split_names(self) -> tuple[str, ...]:
        """The names of the validation (or test) splits, as they stand in the log."""
        data = self.data
        if data is None:
            count = self.trainer.num_test_batches if self.trainer.testing else self.trainer.num_val_batches
            return ("val",) if len(count) == 1 else tuple(f"val{i}" for i in range(len(count)))
        return data.test_splits if self.trainer.testing else data.val_splits

    def _add(self, split: str, name: str, batch: CaptionBatch) -> None:
        loss = caption_loss(self.captioner, batch)
        pair = torch.stack([loss.sum.double(), loss.count.double()])
        self._totals[split, name] = self._totals.get((split, name), torch.zeros_like(pair)) + pair

    def blank_pictures(self, batch: CaptionBatch) -> CaptionBatch:
        """The batch with grey pictures (the mean colour of the transform) in place of its own."""
        if batch.pixels is not None:
            return dataclasses.replace(batch, pixels=torch.zeros_like(batch.pixels))
        assert batch.visual_tokens is not None
        assert self.data is not None
        tokens = batch.visual_tokens
        pixels = torch.zeros(1, tokens.shape[1], 3, *self.data.transform.size, device=tokens.device)
        blank = self.captioner.encode(pixels).to(tokens.dtype)
        return dataclasses.replace(batch, visual_tokens=blank.expand_as(tokens))

    def on_validation_epoch_end(self) -> None:
        """Logs the losses of every split."""
        logs: dict[str, Tensor] = {}
        for (split, name), pair in self._totals.items():
            if self.trainer.world_size > 1:
                pair = torch.as_tensor(self.all_gather(pair)).sum(0)
            mean = (pair[0] / pair[1]).float()
            logs[f"{split}/{name}"] = mean
            if name == "loss":
                logs[f"{split}/perplexity"] = mean.exp()
        self._totals = {}
        self.log_dict(logs, rank_zero_only=True)

    def on_test_epoch_end(self) -> None:
        """As `on_validation_epoch_end`."""
        self.on_validation_epoch_end()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the throughput's counters."""
        checkpoint["seen"] = {"pictures": self.pictures_seen, "tokens": self.tokens_seen}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the throughput's counters."""
        seen = checkpoint.get("seen", {})
        self.pictures_seen, self.tokens_seen = seen.get("pictures", 0), seen.get("tokens", 0)


def finetune(
    init: str = "runs/caption_scenes/model",
    *,
    freeze_vision: bool = False,
    lr: float = 3e-4,
    weight_decay: float = 0.05,
    betas: tuple[float, float] = (0.9, 0.98),
    warmup_steps: int = 50,
    min_lr_ratio: float = 0.01,
    label_smoothing: float = 0.0,
    ema: float = 0.0,
    image_use_batches: int = 4,
    decoding: Decoding | None = None,
) -> Captioning:
    """Goes on from a saved model, with its own tokenizer and image transform.

    Args:
        init: The model's folder, or its name on the hub.
        freeze_vision: Leave the vision tower as it is, and train the rest.
        lr: The peak learning rate.
        weight_decay: Decay of matrices; vectors (norms, biases) have none.
        betas: AdamW's decay rates.
        warmup_steps: Steps until the peak.
        min_lr_ratio: What is left of the peak at the end of the cosine.
        label_smoothing: Share of the target's probability that is spread over the vocabulary, in training only.
        ema: Decay of an exponential moving average of the weights; 0 = none.
        image_use_batches: Batches of each validation that are looked at with wrong and blank pictures too.
        decoding: How captions are searched for; that of the saved model unless told.
    """
    saved = ImageCaptioner.from_pretrained(init, device="cpu")
    captioner = saved.captioner.train()
    if freeze_vision and not is_frozen(captioner.vision):
        freeze(captioner.vision)
    module = Captioning(
        captioner,
        lr=lr,
        weight_decay=weight_decay,
        betas=betas,
        warmup_steps=warmup_steps,
        min_lr_ratio=min_lr_ratio,
        label_smoothing=label_smoothing,
        ema=ema,
        image_use_batches=image_use_batches,
        decoding=decoding or saved.decoding,
    )
    module.start = saved
    return module


def other_pictures(batch: CaptionBatch) -> CaptionBatch:
    """The batch with every picture moved on by one place, so that each text gets another's picture."""
    visual = batch.pixels if batch.visual_tokens is None else batch.visual_tokens
    assert visual is not None
    others = torch.arange(
        -1, len(visual) - 1, device=visual.device
    )  # autocast cannot `roll` float16 on a CPU
    return dataclasses.replace(
        batch,
        pixels=None if batch.pixels is None else batch.pixels[others],
        visual_tokens=None if batch.visual_tokens is None else batch.visual_tokens[others],
    )


def trainable_parameters(module: nn.Module) -> int:
    """How many numbers are learned."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
