"""Mixtures: what an epoch holds, in which order, and that all of it follows from (seed, epoch)."""

from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtransformer.data.documents.documents import Documents, PairsAsDocuments
from mmtransformer.data.documents.packing import DocumentRows
from mmtransformer.data.interleaved_data import InterleavedData
from mmtransformer.data.loading.epoch_mixture import EpochMixture
from mmtransformer.data.loading.features import cache_key
from mmtransformer.data.loading.module import LoaderConfig, Splits
from mmtransformer.data.loading.sampler import IndexSampler
from mmtransformer.data.loading.source import Pairs, PairSource
from mmtransformer.data.mixture import DocumentMixture, MixedDocuments, MixedPairs, Mixture
from support.sources import TRANSFORM, FakePairs, FakeSource, batches_of, make, same, tokenizer


def two_sources(**options: object) -> Mixture:
    sources = {
        "big": FakeSource(train=FakePairs(41), val=FakePairs(5, seed=1)),
        "small": FakeSource(train=FakePairs(7, ("ko",), seed=2), test=FakePairs(3, ("ko",), seed=3)),
    }
    return Mixture(sources, **options)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------- mixing


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 23), min_size=1, max_size=4),
    weights=st.data(),
    epoch_size=st.integers(79, 151),
    seed=st.integers(0, 2**31),
)
def test_every_part_goes_through_all_its_members_before_any_comes_again(
    sizes: list[int], weights: st.DataObject, epoch_size: int, seed: int
) -> None:
    shares = weights.draw(st.lists(st.floats(0.2, 5), min_size=len(sizes), max_size=len(sizes)))
    mixture = EpochMixture(sizes, shares, epoch_size=epoch_size, seed=seed)
    assert mixture.size == epoch_size == sum(mixture.quotas)
    for quota, share in zip(mixture.quotas, shares, strict=True):
        assert abs(quota - epoch_size * share / sum(shares)) < 1
    offsets = np.cumsum([0, *sizes])
    seen: list[list[tuple[int, int]]] = [[] for _ in sizes]
    for epoch in range(5):
        index, turns = mixture.samples(epoch)
        assert index.shape == turns.shape == (epoch_size,)
        part = np.searchsorted(offsets, index, side="right") - 1
        assert tuple(np.bincount(part, minlength=len(sizes))) == mixture.quotas
        for k in range(len(sizes)):
            seen[k] += zip(turns[part == k].tolist(), index[part == k].tolist(), strict=True)
    for k, size in enumerate(sizes):
        assert len(seen[k]) == len(set(seen[k])), "never twice in the same turn"
        full, _ = divmod(len(seen[k]), size)
        for turn in range(full):
            mine = sorted(i - offsets[k] for t, i in seen[k] if t == turn)
            assert mine == list(range(size))


def test_a_mixture_is_a_pure_function_of_seed_and_epoch() -> None:
    make_one = lambda seed: EpochMixture([31, 5], [1, 1], epoch_size=20, seed=seed)  # noqa: E731
    a, b = make_one(3), make_one(3)
    b.samples(7)
    for epoch in (4, 0, 2):
        np.testing.assert_array_equal(a.samples(epoch), b.samples(epoch))
    assert not np.array_equal(a.samples(0), a.samples(1))
    assert not np.array_equal(a.samples(0), make_one(4).samples(0))
    # these numbers are part of every run that was ever started with a mixture
    assert EpochMixture([3, 5], epoch_size=6, seed=1).samples(2)[0].tolist() == [2, 0, 3, 4, 6, 5]


def test_shares_are_rounded_to_the_epoch() -> None:
    assert EpochMixture([10, 10, 10], [1, 1, 1], epoch_size=10).quotas == (4, 3, 3)
    assert EpochMixture([10, 30]).quotas == (10, 30)
    assert EpochMixture([10, 30], [1, 1]).quotas == (20, 20)


def test_impossible_mixtures_are_refused() -> None:
    with pytest.raises(ValueError, match=r"every part of a mixture needs a member, the sizes are \[3, 0\]"):
        EpochMixture([3, 0])
    with pytest.raises(ValueError, match=r"2 parts needs as many weights above 0, not \[1.0, -1.0\]"):
        EpochMixture([3, 4], [1, -1])
    with pytest.raises(ValueError, match=r"an epoch of 10 gives the parts \[10, 0\]"):
        EpochMixture([3, 4], [100, 1], epoch_size=10)
    with pytest.raises(ValueError, match="at least 1 source"):
        Mixture({})
    with pytest.raises(ValueError, match=r"weights are given for big, tiny; the sources are big, small"):
        two_sources(weights={"big": 1, "tiny": 2})
    with pytest.raises(ValueError, match=r"the weight of small \(0\) must be above 0"):
        two_sources(weights={"big": 1, "small": 0})
    with pytest.raises(ValueError, match=r"epoch_size \(0\)"):
        two_sources(epoch_size=0)
    with pytest.raises(ValueError, match="cannot be named 'a/b'"):
        Mixture({"a/b": FakeSource(train=FakePairs(3))})
    with pytest.raises(ValueError, match="has no split 'dev'; it has: train, val, test, big/train, big/val, small/"):
        two_sources().split("dev")
    with pytest.raises(ValueError, match=r"a mixture of 20 samples needs num_samples=20 \(not 19\)"):
        IndexSampler(19, 3, mixture=EpochMixture([3, 4], epoch_size=20))
    with pytest.raises(ValueError, match="and shuffle"):
        IndexSampler(20, 3, shuffle=False, mixture=EpochMixture([3, 4], epoch_size=20))


# --------------------------------------------------------------------------------------------------------- sampler


@pytest.mark.parametrize(("world", "size"), [(1, 6), (2, 3), (3, 2)])
def test_processes_share_the_steps_of_a_mixture(world: int, size: int) -> None:
    mixture = EpochMixture([31, 5], [1, 1], epoch_size=25, seed=3)
    shares = [list(IndexSampler(25, size, mixture=mixture, rank=rank, world=world)) for rank in range(world)]
    one = list(IndexSampler(25, 6, mixture=mixture))
    for together, step in zip(zip(*shares, strict=True), one, strict=True):
        assert sorted(pick for pick in chain(*together) if pick.is_real) == sorted(step)
    picks = [pick for batch in one for pick in batch]
    assert sorted((pick.index, pick.epoch) for pick in picks) == sorted(zip(*mixture.samples(0), strict=True))
    assert [pick.index for pick in picks] != mixture.samples(0)[0].tolist(), "the parts are mixed"


def test_a_resumed_epoch_of_a_mixture_goes_on() -> None:
    mixture = EpochMixture([31, 5], [1, 1], epoch_size=25, seed=3)
    whole = IndexSampler(25, 4, mixture=mixture, seed=9)
    whole.set_epoch(2)
    batches = list(whole)
    later = IndexSampler(25, 4, mixture=mixture, seed=9)
    later.load_state_dict({"epoch": 2, "position": 12, "seed": 9, "num_samples": 25})
    assert list(later) == batches[3:]


# ----------------------------------------------------------------------------------------------------------- pairs


def test_a_mixture_is_a_source_of_pairs() -> None:
    source = two_sources()
    assert isinstance(source, PairSource)
    assert source.languages == ("en", "ko")
    assert source.splits() == ("train", "val", "test", "big/train", "big/val", "small/train", "small/test")
    split = source.split("train")
    assert isinstance(split, Pairs)
    assert len(split) == 48
    assert (split.name(40), split.name(41)) == ("big/p40.jpg", "small/p0.jpg")
    assert split.captions(41) == FakePairs(7, ("ko",), seed=2).captions(0)
    assert split.image(47).tobytes() == FakePairs(7, seed=2).image(6).tobytes()
    assert len(source.split("val")) == 5
    assert source.split("small/test").name(2) == "p2.jpg"
    with pytest.raises(IndexError, match="member 48 of a mixture that has 48"):
        split.name(48)
    assert isinstance(split, MixedPairs)
    assert split.fingerprint(41) == "small/p0.jpg"
    key = cache_key(torch.nn.Linear(2, 3), split, TRANSFORM, flip=False, dtype="float16")
    assert len(key) == 16


def test_training_follows_the_weights_and_evaluation_sees_all_once() -> None:
    source = two_sources(weights={"big": 1.0, "small": 3.0}, epoch_size=40)
    data = make(source, batch_size=6, splits=Splits(val=["val", "small/test"]))
    counts: Counter[str] = Counter()
    for epoch in range(4):
        batches = batches_of(data, epoch)
        names = [name for batch in batches for name in batch.names]
        assert Counter(name.split("/")[0] for name in names) == {"big": 10, "small": 30}
        counts.update(names)
        for batch in batches:
            for name, row in zip(batch.names, batch.tokens, strict=True):
                assert data.tokenizer.decode(row.tolist()).split()[-2] == name.split("/p")[1][:-4]
    small = [count for name, count in counts.items() if name.startswith("small")]
    assert len(small) == 7
    assert max(small) - min(small) <= 1, "120 of 7, as evenly as it goes"
    first, second = data.val_dataloader()
    assert [n for b in first for n in b.names] == [f"big/p{i}.jpg" for i in range(5)]
    assert [n for b in second for n in b.names] == [f"p{i}.jpg" for i in range(3)]


def test_a_image_that_comes_again_has_another_caption() -> None:
    data = make(two_sources(weights={"big": 1.0, "small": 3.0}, epoch_size=28), batch_size=4)
    said: dict[str, list[str]] = {}
    for batch in batches_of(data):
        for name, row in zip(batch.names, batch.tokens, strict=True):
            said.setdefault(name, []).append(data.tokenizer.decode(row.tolist()))
    small = [texts for name, texts in said.items() if name.startswith("small")]
    assert [len(texts) for texts in small] == [3] * 7
    assert all(len(set(texts)) == 3 for texts in small), "three captions in three turns"


def test_a_run_with_other_weights_is_not_resumed() -> None:
    state = make(two_sources(weights={"big": 1.0, "small": 3.0}, epoch_size=40)).state_dict()
    make(two_sources(weights={"big": 2.0, "small": 6.0}, epoch_size=40)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"took \[10, 30\] pictures of its sources, and now takes \[20, 20\]"):
        make(two_sources(weights={"big": 1.0, "small": 1.0}, epoch_size=40)).load_state_dict(state)


def test_batches_of_a_mixture_do_not_depend_on_workers_and_are_grouped_by_length() -> None:
    one, two = (
        make(two_sources(weights={"big": 2.0, "small": 1.0}), loader=LoaderConfig(num_workers=workers), batch_size=4)
        for workers in (0, 2)
    )
    for epoch in (0, 1):
        for a, b in zip(batches_of(one, epoch), batches_of(two, epoch), strict=True):
            assert same(a, b)
    padding = [1 - float(batch.attention_mask.float().mean()) for batch in batches_of(one)]
    assert sum(padding) / len(padding) < 0.2


# ------------------------------------------------------------------------------------------------------- documents


def document_mixture(**options: object) -> DocumentMixture:
    sources = {
        "big": PairsAsDocuments(FakeSource(train=FakePairs(41), val=FakePairs(5, seed=1))),
        "small": PairsAsDocuments(FakeSource(train=FakePairs(7, ("ko",), seed=2))),
    }
    return DocumentMixture(sources, **options)  # type: ignore[arg-type]


def test_documents_of_one_source_share_rows_with_each_other_only() -> None:
    split = document_mixture().split("train")
    assert isinstance(split, MixedDocuments)
    assert isinstance(split, Documents)
    assert len(split) == 3 * 48
    assert split.name(123) == "small/p0.jpg#0"
    assert split.image_name(123, 0) == "small/p0.jpg"
    assert split.image(123, 0).tobytes() == FakePairs(7, seed=2).image(0).tobytes()
    rows = DocumentRows(split, tokenizer(), row_len=71, parts=split.parts)
    part = [{split.find(piece.document)[0] for piece in rows.row(i)} for i in range(len(rows))]
    assert part == [{"big"}] * rows.parts[0] + [{"small"}] * rows.parts[1]
    assert max(len(rows.row(i)) for i in range(len(rows))) > 1


def test_weights_are_of_rows() -> None:
    data = InterleavedData(
        document_mixture(weights={"big": 1.0, "small": 1.0}, epoch_size=24),
        transform=TRANSFORM,
        tokenizer=tokenizer(),
        batch_size=4,
        row_len=71,
    )
    for epoch in range(2):
        loader = data.train_dataloader()
        loader.place.set_epoch(epoch)
        names = [name for batch in loader for name in batch.names]
        assert Counter(name.split("/")[0] for name in names) == {"big": 12, "small": 12}
    assert list(data.val_splits) == ["documents_val", "val"]
    assert {n.split("/")[0] for b in data.val_dataloader()[0] for n in b.names} == {"big"}
