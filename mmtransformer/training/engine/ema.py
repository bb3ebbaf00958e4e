"""A moving average of the weights: what is validated, and what is kept when the training ends."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from mmtransformer.training.engine.resume import unwrapped
from mmtransformer.training.engine.sharded import like, local, reshard, share_of


class EMA(pl.Callback):
    """An exponential moving average that looks back over a tenth of the run at most.

    With a fixed decay of 0.999 a run of 1000 steps would keep a third of the random weights that it began with; so the
    decay of step n is (1 + n) / (10 + n), until that reaches `decay`. Frozen weights are neither copied nor averaged.
    Lightning's `EMAWeightAveraging` copies frozen towers, into the checkpoint too, and knows no weights that are shared
    out; a run stopped in a validation would go on from the average in the weights' place.

    Args:
        decay: The decay that is reached, above 0 and below 1.
    """

    def __init__(self, decay: float) -> None:
        if not 0.0 < decay < 1.0:
            raise ValueError(f"decay ({decay}) must be above 0 and below 1; 0.999 is usual")
        self.decay = decay
        self.count = 0  # optimizer steps that are in the average
        self.weights: dict[str, Tensor] = {}
        self.swapped = False
        """Whether the average stands in the model's place, as it does during a validation."""
        self._step = -1
        self._kept = False
        self._like: dict[str, Tensor] = {}  # the weights themselves, which may be shared out among processes

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """A new run begins with a new average."""
        if stage == "fit":
            self.count, self.weights, self.swapped, self._kept = 0, {}, False, False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes where the run stands."""
        self._step = trainer.global_step
        self._like = {unwrapped(name): p for name, p in pl_module.named_parameters() if p.requires_grad}
        self.weights = {name: share_of(weight, self._like[name]) for name, weight in self.weights.items()}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Averages, after every optimizer step."""
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self.update(pl_module)

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Takes the module's weights into the average."""
        new = trained_weights(module)
        if not self.weights:
            self.weights = {name: weight.clone() for name, weight in new.items()}
        else:
            decay = min(self.decay, (1 + self.count) / (10 + self.count))
            mean, last = list(self.weights.values()), [new[name] for name in self.weights]
            torch._foreach_lerp_(mean, last, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
        self.count += 1

    @torch.no_grad()
    def swap(self, module: nn.Module) -> None:
        """Exchanges the module's weights and the average."""
        for name, weight in trained_weights(module).items():
            if name in self.weights:
                last = weight.clone()
                weight.copy_(self.weights[name])
                self.weights[name].copy_(last)
        self.swapped = not self.swapped

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts the average in the model's place."""
        if not self._kept:
            self.swap(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts the model back."""
        if self.swapped:
            self.swap(pl_module)

    on_test_start, on_test_end = on_validation_start, on_validation_end

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keeps the average as the model; also of a run that was at its end already when it was resumed."""
        if not self._kept:
            self.swap(pl_module)
            self.weights, self.swapped, self._kept = {}, False, True

    def state_dict(self) -> dict[str, Any]:
        """The average and its number of steps."""
        weights = {name: like(weight, self._like.get(name, weight)) for name, weight in self.weights.items()}
        return {"count": self.count, "weights": weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with an average."""
        self.count = state_dict["count"]
        self.weights = {name: weight.clone() for name, weight in state_dict["weights"].items()}


def trained_weights(module: nn.Module) -> dict[str, Tensor]:
    """The weights that are learned, by name, without their gradients; this process's share of them."""
    reshard(module)
    return {unwrapped(name): local(p.detach()) for name, p in module.named_parameters() if p.requires_grad}
