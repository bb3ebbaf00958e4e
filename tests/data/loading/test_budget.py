"""Batches filled up to a number of patches: every picture once, none too large, gone on with anywhere."""

import numpy as np
import pytest
import torch

from mmtransformer.data.loading.budget import PatchBudget
from mmtransformer.data.loading.hashing import hash64
from mmtransformer.data.loading.sampler import IndexSampler, ResumableLoader

N = 101
SIZES = (1 + hash64(5, np.arange(N)) % np.uint64(37)).astype(np.int64)


def sampler(per_batch=120, **options):
    return IndexSampler(
        N, 4, seed=3, budget=PatchBudget(SIZES, per_batch, options.get("world", 1)), group_size=1, **options
    )


def batches(found, epoch=0):
    found.set_epoch(epoch)
    return [[pick.index for pick in batch if pick.is_real] for batch in found]


def test_every_picture_comes_once_and_no_batch_is_too_large():
    for epoch in range(5):
        found = batches(made := sampler(), epoch)
        assert sorted(i for batch in found for i in batch) == list(range(N))
        assert len(found) == len(made) == made.budget.steps
        loads = [int(SIZES[batch].sum()) for batch in found]
        assert max(loads) <= 120
        assert np.mean(loads) > 120 - 37 - 12  # What is left free is a picture.
    assert batches(sampler(), 0) != batches(sampler(), 1)


@pytest.mark.parametrize("total", [37, 74, 111, 112, 113, 150, 1000, 1003])
def test_no_step_is_empty(total):
    draw = np.random.default_rng(total)
    sizes = []
    while sum(sizes) < total:
        sizes.append(min(int(draw.integers(1, 38)), total - sum(sizes)))
    sizes = np.array([*sizes, 37])
    budget = PatchBudget(sizes, 111)
    for _ in range(20):
        order = draw.permutation(len(sizes))
        ends = budget.ends(order)
        assert ends[-1] == len(sizes)
        parts = np.split(sizes[order], ends[:-1])
        assert len(parts) == budget.steps
        assert all(0 < part.sum() <= 111 for part in parts)


def test_two_processes_share_the_steps_of_one_with_twice_the_budget():
    whole = batches(sampler(240))
    halves = [batches(sampler(120, rank=rank, world=2)) for rank in range(2)]
    for step, *mine in zip(whole, *halves, strict=True):
        assert sorted(mine[0] + mine[1]) == sorted(step)
        loads = [int(SIZES[part].sum()) for part in mine]
        assert abs(loads[0] - loads[1]) <= 37
        assert max(loads) <= 120 + 37
        assert [i for i in step if i in mine[1]] == mine[1]  # in their order


def test_a_process_without_a_picture_gets_one_that_does_not_count():
    budget = PatchBudget(np.array([5]), 15, 2)
    found = [list(IndexSampler(1, 4, budget=budget, rank=rank, world=2)) for rank in range(2)]
    assert [[pick.is_real for pick in batch] for (batch,) in found] == [[True], [False]]


class Places(torch.utils.data.Dataset):
    def __getitem__(self, pick):
        return torch.tensor(pick.index)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("seen", [1, 7])
def test_it_goes_on_where_it_stopped(seen, workers):
    def loader(per_batch=120):
        return ResumableLoader(Places(), sampler(per_batch), torch.stack, num_workers=workers)

    whole = [batch.tolist() for batch in loader()]
    first = loader()
    begun = iter(first)
    some = [next(begun).tolist() for _ in range(seen)]
    state = first.state_dict()
    assert state["position"] == sum(map(len, some))
    rest = loader()
    rest.load_state_dict(state)
    assert rest.place.steps_before(state["position"]) == seen
    assert some + [batch.tolist() for batch in rest] == whole
    other = loader(300)  # With other batches every picture still comes once.
    other.load_state_dict(state)
    after = [batch.tolist() for batch in other]
    assert sorted(i for batch in some + after for i in batch) == list(range(N))
    assert other.place.steps_before(state["position"]) + len(after) == len(other)


def test_refused():
    with pytest.raises(ValueError, match=r"batches of 100 patches .* pictures of up to 37: allow 111 at least"):
        PatchBudget(SIZES, 100)
    with pytest.raises(ValueError, match="a budget of patches for 101 samples is not for 100"):
        IndexSampler(100, 4, budget=PatchBudget(SIZES, 120))
