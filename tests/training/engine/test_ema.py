"""The moving average: how far it looks back."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mmtransformer.training.engine.ema import EMA


def test_the_average_forgets_where_it_began_in_short_runs_and_keeps_its_decay_in_long_ones() -> None:
    average, module = EMA(0.999), nn.Linear(2, 1, bias=False).double()
    start, new = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    nn.init.zeros_(module.weight).data += start  # the share of the first weights, that of all later ones
    average.update(module)
    nn.init.zeros_(module.weight).data += new
    for _ in range(1000):
        average.update(module)
    mean = average.weights["weight"][0].clone()
    assert mean.sum().item() == pytest.approx(1.0)
    assert mean[0] < 1e-6  # A fixed decay would have kept 0.37 of them.
    average.count = 10**6
    nn.init.zeros_(module.weight)
    average.update(module)
    assert average.weights["weight"][0].tolist() == pytest.approx((0.999 * mean).tolist(), rel=1e-12)
    average.swap(module)
    assert module.weight[0].tolist() == pytest.approx((0.999 * mean).tolist(), rel=1e-12)
    assert average.weights["weight"][0].tolist() == [0.0, 0.0]


def test_its_decay_grows_with_the_steps() -> None:
    """(1 + n) / (10 + n) of step n, up to the decay: what a few steps leave, to the last digit."""
    average, module = EMA(0.45), nn.Linear(1, 1, bias=False).double()
    mean = 0.0
    for step in range(9):
        nn.init.constant_(module.weight, float(step**2))
        average.update(module)
        decay = min(0.45, (1 + step) / (10 + step)) if step else 0.0  # the first weights are the first average
        mean = decay * mean + (1 - decay) * step**2
    assert average.weights["weight"].item() == pytest.approx(mean, rel=1e-12)


def test_batches_that_only_add_gradients_are_no_steps() -> None:
    average, module = EMA(0.9), nn.Linear(1, 1)
    trainer: Any = SimpleNamespace(global_step=0)
    average.on_train_start(trainer, module)  # pyright: ignore[reportArgumentType]
    for step in (0, 1, 1, 2, 2, 3):
        trainer.global_step = step
        average.on_train_batch_end(trainer, module, None, None, 0)  # pyright: ignore[reportArgumentType]
    assert average.count == 3
