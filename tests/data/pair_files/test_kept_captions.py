"""Captions as ids of data with an index: kept too, and a run is the same to the last bit."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmtransformer.data.captions import CaptionData
from mmtransformer.data.loading import rows
from mmtransformer.data.loading.hashing import hash64, hash64_range
from mmtransformer.data.loading.module import LoaderConfig
from mmtransformer.data.pair_files import index
from mmtransformer.images import ImageTransform
from mmtransformer.text.tokenizer import Tokenizer
from support.pair_files import NAMES, caption, draw, jsonl

TEXTS = [caption(name, k) for name in NAMES for k in range(3)]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    draw(tmp_path / "made")
    said = [[caption(n, k) for k in range(i % 3)] + [f"왼쪽 {n} 그림"] for i, n in enumerate(NAMES)]
    some = [{"image": name, "captions": captions} for name, captions in zip(NAMES, said, strict=True)]
    (tmp_path / "made" / "c.jsonl").write_text(jsonl(some))
    return tmp_path / "made"


def data_of(root: Path, **more: Any) -> CaptionData:
    tokenizer = Tokenizer.train(TEXTS, 320, ("en", "ko"))
    options = {"batch_size": 4, "captions_per_image": 2, "loader": LoaderConfig(seed=5), "max_len": 24} | more
    return CaptionData(str(root), transform=ImageTransform(8), tokenizer=tokenizer, **options)


def run(data: CaptionData) -> list[Any]:
    """All that a run sees of its data: three epochs, validation, what a checkpoint keeps."""
    found: list[Any] = []
    loader = data.loader("train", training=True)
    for epoch in range(3):
        loader.place.set_epoch(epoch)
        found += list(loader)
    found += list(data.loader("val"))
    seen = [[b.tokens, b.loss_mask, b.pixels, b.names, b.references, b.questions] for b in found]
    return [*seen, data.fingerprints("train"), data.identity(), data.rows("train").asked, data.rows("train").languages]


def refuse(*_: object) -> None:
    raise AssertionError("tokenised again")


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_a_run_is_the_same(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run(data_of(root))
    monkeypatch.setattr(index, "LARGE", 1)
    assert same(run(data_of(root)), plain)
    assert len(list((tmp_path / "cache" / "mmtransformer" / "captions").glob("made-*.safetensors"))) == 2
    monkeypatch.setattr(rows, "_tokenized", refuse)
    assert same(run(data_of(root)), plain)
    travelled = pickle.loads(pickle.dumps(data_of(root).dataset("train", training=True)))
    assert travelled.rows.captions[3] == data_of(root).rows("train").captions[3]
    assert same(*(list(d.rows.tokens) for d in (travelled, data_of(root).dataset("train"))))


@pytest.mark.parametrize("what", ["max_len", "tokenizer", "captions", "damage"])
def test_ids_of_something_else_are_not_used(
    what: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "LARGE", 1)
    data_of(root).rows("train")
    more: dict[str, Any] = {}
    if what == "max_len":
        more["max_len"] = 7
    elif what == "captions":
        (root / "c.jsonl").write_text((root / "c.jsonl").read_text().replace("words", "wards wards"))
    elif what == "damage":
        for path in (tmp_path / "cache" / "mmtransformer" / "captions").glob("*.safetensors"):
            path.write_bytes(path.read_bytes()[:-8] + bytes(8))
    found = data_of(root, **more)
    plain = data_of(root, **more)
    if what == "tokenizer":
        found.tokenizer = plain.tokenizer = Tokenizer.train(["picture", "words"], 300, ("ko", "en"))
    monkeypatch.setattr(index, "LARGE", 10**9)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    expected = data_of(root, **more)
    expected.tokenizer = plain.tokenizer
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ours, theirs = found.rows("train"), expected.rows("train")
    for name in ("tokens", "starts", "prompt", "count", "first", "mirrors", "sizes"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name
    assert (ours.cut, ours.longest) == (theirs.cut, theirs.longest)


def test_a_range_is_hashed_as_its_numbers_are() -> None:
    for count in (0, 1, 1 << 15, (1 << 15) + 7):
        assert np.array_equal(hash64_range(count, 3, 5), hash64(3, 5, np.arange(count)))
