import itertools
import multiprocessing
import os
import signal
import subprocess
import time

import numpy as np
import pytest
import torch

from mmtransformer.data.loading.hashing import generator, hash64
from mmtransformer.data.loading.module import LoaderConfig
from mmtransformer.data.loading.sampler import IndexSampler, LoadingError, ResumableLoader, SampleIndex
from mmtransformer.data.loading.workers import ignore_signals
from support.sources import share_of_padding

N = 101


def lengths(epoch):
    return 5 + (hash64(17, epoch, np.arange(N)) % np.uint64(23)).astype(np.int64)


def indices(batches):
    return [[pick.index for pick in batch] for batch in batches]


def pixels(pick):
    return torch.tensor(
        [pick.epoch, pick.index, torch.randint(997, (), generator=generator(3, pick.epoch, pick.index))]
    )


class Dataset(torch.utils.data.Dataset):
    def __getitem__(self, pick):
        return pixels(pick)


def loader(workers=0, **options):
    return ResumableLoader(Dataset(), IndexSampler(N, 7, **options), torch.stack, num_workers=workers)


def test_windows_take_every_sample_once_and_whole_steps_are_those_of_all_processes():
    sampler = IndexSampler(N, 7, seed=3, lengths=lengths, window=2)
    assert sorted(sampler.order(1).tolist()) == list(range(N))
    assert [len(IndexSampler(16, 3, rank=rank, world=2, drop_last=True)) for rank in range(2)] == [2, 2]


def test_the_place_is_that_of_all_processes():
    for rank in range(2):
        found = loader(seed=3, rank=rank, world=2)
        batches = iter(found)
        next(batches)
        next(batches)
        assert found.state_dict()["position"] == 2 * 2 * 7


def test_hash64_is_the_published_splitmix64():
    # The first three outputs of SplitMix64 from state 1234567 (Vigna's reference program).
    state = 1234567
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [int(hash64(state + i * 0x9E3779B97F4A7C15)) for i in range(3)] == expected


def test_hash64_is_uniform_and_order_matters():
    words = hash64(5, np.arange(20011))
    assert len(np.unique(words)) == 20011
    bits = (words[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert abs(bits.mean(0) - 0.5).max() < 0.02
    assert int(hash64(2, 3)) != int(hash64(3, 2)) != int(hash64(2, 3, 0))
    assert int(hash64(-1)) == int(hash64(2**64 - 1))


def test_order_is_a_permutation_and_a_pure_function():
    sampler = IndexSampler(N, 7, seed=3, lengths=lengths)
    orders = [sampler.order(epoch) for epoch in (0, 1, 2)]
    for order in orders:
        assert sorted(order) == list(range(N))
    assert not np.array_equal(orders[0], orders[1])
    np.testing.assert_array_equal(IndexSampler(N, 7, seed=3, lengths=lengths).order(1), orders[1])
    assert not np.array_equal(IndexSampler(N, 7, seed=4, lengths=lengths).order(1), orders[1])
    assert indices(IndexSampler(N, 7, shuffle=False)) == [list(range(i, min(i + 7, N))) for i in range(0, N, 7)]


@pytest.mark.parametrize("grouped", [False, True])
def test_neighbours_stay_in_one_batch(grouped: bool):
    n, together, batch = 4 * 31 + 3, 4, 8
    by = (lambda _: np.arange(n) * 7 % 11) if grouped else None
    sampler = IndexSampler(n, batch, seed=3, lengths=by, group_size=together)
    order = sampler.order(0)
    assert sorted(order) == list(range(n))
    assert list(order[-3:]) == [n - 3, n - 2, n - 1]
    runs = order[:-3].reshape(-1, together)
    assert (runs == runs[:, :1] + np.arange(together)).all()
    assert (runs[:, 0] % together == 0).all()
    assert not np.array_equal(order, sampler.order(1))
    assert not np.array_equal(runs[:, 0], np.sort(runs[:, 0]))
    two = [IndexSampler(n, 4, seed=3, lengths=by, group_size=together, rank=r, world=2) for r in range(2)]
    steps = zip(*(indices(one) for one in two), strict=True)
    assert [sorted(a + b) for a, b in steps][:15] == [sorted(x) for x in indices(sampler)][:15]


def test_neighbours_cannot_be_kept_together_by_none():
    with pytest.raises(ValueError, match=r"group_size \(0\) must be at least 1"):
        IndexSampler(9, 3, group_size=0)


def test_every_epoch_has_another_order():
    plain = IndexSampler(N, 7, seed=3)
    assert not np.array_equal(plain.order(0), plain.order(1))
    # Equal lengths keep the shuffled order within a block, so other samples must meet in it ...
    same = IndexSampler(98, 7, seed=3, lengths=lambda _: np.ones(98, int))
    blocks = [{frozenset(block) for block in same.order(epoch).reshape(-1, 7)} for epoch in (0, 1)]
    assert not blocks[0] & blocks[1]
    # ... and where lengths fix what is in a block, the blocks must come in another order.
    fixed = IndexSampler(98, 7, seed=3, lengths=lambda _: np.arange(98))
    first, second = (fixed.order(epoch).reshape(-1, 7).tolist() for epoch in (0, 1))
    assert sorted(first) == sorted(second)
    assert first != second
    for sampler in (plain, same, fixed):
        for epoch in (0, 1, 2):
            sampler.set_epoch(epoch)
            assert [index for batch in indices(sampler) for index in batch] == sampler.order(epoch).tolist()


def test_a_repeated_epoch_is_the_first_one_again():
    first = list(IndexSampler(N, 7, seed=3, lengths=lengths))
    sampler = IndexSampler(N, 7, seed=3, lengths=lengths, repeat=True)
    for epoch in (0, 1, 5):
        sampler.set_epoch(epoch)
        assert list(sampler) == first
    sampler.load_state_dict({"epoch": 5, "position": 14, "seed": 3, "num_samples": N})
    assert list(sampler) == first[2:]


def test_the_order_of_a_seed_never_changes():
    assert IndexSampler(13, 2, seed=1).order(0).tolist() == [2, 5, 8, 9, 10, 1, 4, 6, 12, 0, 11, 3, 7]


def test_grouping_by_length_cuts_padding_and_mixes_batches():
    grouped, plain = IndexSampler(N, 7, lengths=lengths), IndexSampler(N, 7)
    before, after = (share_of_padding(lengths(0), indices(sampler)) for sampler in (plain, grouped))
    assert after < 0.08 < 0.3 < before
    longest = [lengths(0)[batch].max() for batch in indices(grouped)]
    assert longest != sorted(longest)


@pytest.mark.parametrize(("world", "size"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_processes_share_the_same_steps(world, size):
    shares = [list(IndexSampler(N, size, seed=5, lengths=lengths, rank=rank, world=world)) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    one = list(IndexSampler(N, 8, seed=5, lengths=lengths))
    for together, step in zip(zip(*shares, strict=True), one, strict=True):
        is_real = [pick for pick in itertools.chain(*together) if pick.is_real]
        assert sorted(is_real) == sorted(step)
        sizes = [sum(pick.is_real for pick in share) for share in together]
        assert max(sizes) - min(sizes) <= 1


def test_accumulation_sees_the_groups_of_one_large_batch():
    large = indices(IndexSampler(96, 8, seed=5))
    small = indices(IndexSampler(96, 4, seed=5, block=8))
    assert [a + b for a, b in zip(small[::2], small[1::2], strict=True)] == large


def test_a_process_without_images_gets_a_padding_sample_that_does_not_count():
    shares = [list(IndexSampler(7, 2, rank=rank, world=3)) for rank in range(3)]
    assert [len(share) for share in shares] == [2, 2, 2]
    last = [share[-1] for share in shares]
    assert [[pick.is_real for pick in share] for share in last] == [[True], [False], [False]]
    assert len({pick.index for share in last for pick in share}) == 1


def test_drop_last():
    sampler = IndexSampler(N, 7, drop_last=True)
    assert len(sampler) == len(list(sampler)) == 14
    assert {len(batch) for batch in sampler} == {7}
    assert len(IndexSampler(N, 7)) == len(list(IndexSampler(N, 7))) == 15


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_batches_do_not_depend_on_workers_and_leave_the_global_generator_alone(workers):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    mine, reference = loader(workers), loader()
    for epoch in range(3):
        for each in (mine, reference):
            each.batch_sampler.sampler.set_epoch(epoch)  # what Lightning calls
        got = list(mine)
        assert all(torch.equal(a, b) for a, b in zip(got, reference, strict=True))
        assert {int(batch[0, 0]) for batch in got} == {epoch}
    assert torch.equal(torch.get_rng_state(), before)


def test_a_plain_loop_has_a_new_order_every_epoch_and_a_validation_the_same():
    found, told = loader(lengths=lengths), loader(lengths=lengths)
    for epoch in range(3):
        told.place.set_epoch(epoch)
        assert torch.equal(torch.cat([*found])[:, :2], torch.cat([*told])[:, :2])
        assert found.place.epoch == epoch
    next(iter(found))  # one that is not gone through
    assert found.place.epoch == 3
    assert torch.equal(next(iter(found)), next(iter(found)))
    still = loader(shuffle=False)
    assert torch.equal(torch.cat([*still]), torch.cat([*still]))
    again = loader()  # two runs of one epoch, each told where it begins
    first = torch.cat([*again])
    again.place.set_epoch(0)
    assert torch.equal(torch.cat([*again]), first)


@pytest.mark.parametrize(("stop", "before", "after"), [(0, 0, 0), (1, 0, 2), (6, 2, 0), (14, 2, 2), (15, 0, 0)])
def test_resume_goes_on_with_the_next_batch(stop, before, after):
    whole = []
    straight = loader(lengths=lengths)
    for epoch in (4, 5):
        straight.place.set_epoch(epoch)
        whole += list(straight)
    broken = loader(before, lengths=lengths)
    broken.place.set_epoch(4)
    batches = iter(broken)
    got = [next(batches) for _ in range(stop)]
    state = broken.state_dict()
    assert all(type(value) is int for value in state.values())
    resumed = loader(after, lengths=lengths)
    early = iter(resumed)  # Lightning asks for an iterator before anything is known
    resumed.load_state_dict(state)
    resumed.place.set_epoch(4)
    got += list(early)
    resumed.place.set_epoch(5)
    got += list(resumed)
    assert len(got) == len(whole)
    assert all(torch.equal(a, b) for a, b in zip(got, whole, strict=True))
    assert len(resumed) == 15


def test_resume_with_another_number_of_processes():
    one = IndexSampler(N, 8, seed=5)
    one.load_state_dict({"epoch": 2, "position": 40, "seed": 5, "num_samples": N})
    shares = []
    for rank in range(2):
        sampler = IndexSampler(N, 4, seed=5, rank=rank, world=2)
        sampler.load_state_dict({"epoch": 2, "position": 40, "seed": 5, "num_samples": N})
        shares.append(list(sampler))
    for step, together in zip(one, zip(*shares, strict=True), strict=True):
        assert sorted(step) == sorted(itertools.chain(*together))


def test_an_epoch_that_was_begun_with_another_batch_is_seen_to_its_end():
    old, new = IndexSampler(N, 8, seed=5, lengths=lengths), IndexSampler(N, 3, seed=5, lengths=lengths)
    old.set_epoch(2)
    begun = indices(old)[:5]
    old.position = 40
    new.load_state_dict(old.state_dict())
    assert sorted(itertools.chain(*begun, *indices(new))) == list(range(N))
    assert new.state_dict() == old.state_dict()
    new.set_epoch(3)
    np.testing.assert_array_equal(new.order(3), IndexSampler(N, 3, seed=5, lengths=lengths).order(3))


def test_a_pass_that_was_left_early_starts_again():
    each = loader()
    first = next(iter(each))
    assert torch.equal(next(iter(each)), first)
    assert len(list(each)) == len(list(each)) == 15
    sampler = IndexSampler(N, 7)
    sampler.load_state_dict({**sampler.state_dict(), "position": 28})
    assert [len(list(sampler)) for _ in range(2)] == [len(sampler) - 4, len(sampler)], "a place is gone on from once"


def test_a_state_of_another_order_is_refused():
    state = IndexSampler(N, 7, seed=3).state_dict()
    with pytest.raises(ValueError, match="the data's seed was 3 and is now 4"):
        IndexSampler(N, 7, seed=4).load_state_dict(state)
    with pytest.raises(ValueError, match="number of samples in an epoch was 101 and is now 103"):
        IndexSampler(103, 7, seed=3).load_state_dict(state)
    with pytest.raises(ValueError, match="group_size was 1 and is now 2"):
        IndexSampler(N, 7, group_size=2).load_state_dict(IndexSampler(N, 7).state_dict())


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match=r"rank \(2\) must be from 0 to world - 1 \(1\)"):
        IndexSampler(N, 7, rank=2, world=2)
    with pytest.raises(ValueError, match=r"no samples to take \(0\)"):
        IndexSampler(0, 7)
    with pytest.raises(ValueError, match="5 samples cannot fill one step of 7 x 1"):
        IndexSampler(5, 7, drop_last=True)
    with pytest.raises(ValueError, match=r"batch_size \(0\)"):
        IndexSampler(5, 0)


def test_a_pick_counts_unless_told():
    assert SampleIndex(1, 2).is_real


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="the sender of a signal is not known here")
def test_workers_outlive_the_signals_of_others_and_obey_their_parent():
    """A scheduler signals every process of a job; a worker that died of it would take the run along."""
    mine = loader(workers=2)
    batches = iter(mine)
    got = [next(batches), next(batches)]  # one of each worker: both have begun
    workers = mine._iterator._workers
    for name in ("TERM", "INT"):
        subprocess.run(["kill", f"-{name}", *(str(worker.pid) for worker in workers)], check=True)
    time.sleep(0.1)
    got += list(batches)
    assert all(torch.equal(a, b) for a, b in zip(got, loader(), strict=True))
    assert all(worker.is_alive() for worker in workers)
    workers[0].terminate()
    workers[0].join(10)
    assert workers[0].exitcode == 0


def waiting_without_signals(ready):
    ignore_signals(0)
    ready.set()
    time.sleep(60)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="the sender of a signal is not known here")
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_the_parent_is_who_started_a_worker_however_it_was_started(method):
    context = multiprocessing.get_context(method)
    ready = context.Event()
    worker = context.Process(target=waiting_without_signals, args=(ready,), daemon=True)
    worker.start()
    assert ready.wait(30)
    worker.terminate()
    worker.join(10)
    if worker.is_alive():
        worker.kill()
    assert worker.exitcode == 0


class Stuck(torch.utils.data.Dataset):
    """Samples of which one never comes, or takes its worker with it."""

    def __init__(self, *, killed: bool) -> None:
        self.killed = killed

    def name(self, index: int) -> str:
        return f"{index}.jpg"

    def __getitem__(self, pick: SampleIndex) -> int:
        if pick.index == 5:
            time.sleep(0.5 if self.killed else 1000)  # what was made before is handed over by then
            os.kill(os.getpid(), signal.SIGKILL)
        return pick.index


@pytest.mark.parametrize("killed", [False, True])
def test_workers_that_give_nothing_any_more_are_told(killed: bool) -> None:
    sampler = IndexSampler(8, 2, shuffle=False)
    loader = ResumableLoader(Stuck(killed=killed), sampler, list, num_workers=1, timeout=2.0)
    batches, began = iter(loader), time.monotonic()
    assert [next(batches), next(batches)] == [[0, 1], [2, 3]]
    why = r"a loading worker \(process \d+\) was killed" if killed else r"no batch came in 2 s \(data.loader.timeout\)"
    with pytest.raises(LoadingError, match=rf"^{why}.*; awaited: 4\.jpg, 5\.jpg\. The run goes on with --resume$"):
        next(batches)
    assert time.monotonic() - began < 30
    assert not loader.waiting
    with pytest.raises(ValueError, match="timeout"):
        LoaderConfig(timeout=-1.0)
