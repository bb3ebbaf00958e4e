"""Sums and counts that become means: of an optimizer step's batches, of a validation's splits."""

import math

import pytest
import torch

from mmtransformer.batch import SumAndCount
from mmtransformer.training.engine.accumulators import Means, StepAccumulator


def loss(total: float, count: int) -> SumAndCount:
    return SumAndCount(torch.tensor(total), torch.tensor(count))


def test_a_validations_means_are_over_all_tokens_and_perplexity_is_of_the_mean() -> None:
    means = Means()
    for split, total, count in (("val", 3.0, 4), ("val", 6.0, 2), ("other", 0.7, 1)):
        means.add(split, "loss", loss(total, count))
    means.add("val", "accuracy", loss(3.0, 4))
    found = {name: float(value) for name, value in means.take(1).items()}
    assert found == pytest.approx(
        {
            "val/loss": 9 / 6,
            "val/perplexity": math.exp(9 / 6),
            "val/accuracy": 3 / 4,
            "other/loss": 0.7,
            "other/perplexity": math.exp(0.7),
        }
    )
    assert means.take(1) == {}


def test_a_step_counts_samples_that_are_learned_and_names_the_first_bad_part() -> None:
    step = StepAccumulator()
    step.add("first", ["a", "b"], loss(2.0, 3), torch.tensor(5))
    step.add("padding", ["c"], loss(0.0, 0), torch.tensor(0))  # keeps processes in step
    step.add("bad", ["d", "e", "f"], loss(math.nan, 4), torch.tensor(7))
    step.add("worse", ["g"], loss(math.inf, 1), torch.tensor(2))
    step.watched["temperature"] = torch.tensor(0.5)
    sums = step.read(torch.tensor(1.5), 1)
    assert (sums.count, sums.norm, sums.samples, sums.tokens) == (8, 1.5, 6, 14)
    assert math.isnan(sums.loss)
    assert (sums.bad, sums.suspect, sums.suspects, sums.watched) == (True, "bad", ["d", "e", "f"], {"temperature": 0.5})


def test_a_good_step_suspects_its_last_batch_and_all_its_samples() -> None:
    step = StepAccumulator()
    step.add("first", ["a", "b"], loss(2.0, 3), torch.tensor(5))
    step.add("last", ["c"], loss(1.0, 1), torch.tensor(1))
    sums = step.read(torch.tensor(2.0), 1)
    assert (sums.loss, sums.bad, sums.suspect, sums.suspects) == (3.0, False, "last", ["a", "b", "c"])
