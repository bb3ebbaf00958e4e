import dataclasses
import json
import multiprocessing
import pickle
import shutil
import threading
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mmtransformer import ViTBlockConfig
from mmtransformer.backbones.vit import ViT
from mmtransformer.data.loading import features
from mmtransformer.data.loading.features import FeatureCache, FeatureCacheConfig, cache_key
from mmtransformer.data.loading.module import LoaderConfig
from mmtransformer.data.loading.sampler import SampleIndex
from mmtransformer.data.loading.source import Caption
from mmtransformer.images import ImageError, ImageTransform
from mmtransformer.layers.modes import freeze
from support.sources import FakePairs, FakeSource, make

TRANSFORM = ImageTransform(image_size=(12, 20))


def tower(seed=0, **options):
    torch.manual_seed(seed)
    return freeze(ViT(**({"image_size": (12, 20), "patch_size": 4, "dim": 6, "depth": 2, "num_heads": 2} | options)))


def pixels(pairs):
    return torch.stack([TRANSFORM(pairs.image(i)) for i in range(len(pairs)) if i not in pairs.bad])


class Counting(nn.Module):
    """A tower that counts how often it is asked, and is asked in evaluation mode."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.weight, self._calls = (
            nn.Parameter(torch.tensor(scale), requires_grad=False),
            [],
        )  # a name with _ is no setting

    def forward_features(self, x):
        assert not self.training
        assert torch.is_inference_mode_enabled()
        self._calls.append(len(x))
        return (x * self.weight).flatten(2).transpose(1, 2)  # (b p 3): the pixels themselves


def build(folder, vision=None, pairs=None, flip=False, dtype="float16", **options):
    return FeatureCache.build(
        vision or Counting(), pairs or FakePairs(7), TRANSFORM, FeatureCacheConfig(str(folder), flip, dtype),
        **({"batch_size": 3, "progress": False} | options),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_cache_holds_what_the_tower_says(tmp_path, dtype):
    pairs, vision = FakePairs(7), tower()
    cache = build(tmp_path, vision, pairs, dtype=dtype, flip=True)
    for mirrored in (False, True):
        x = pixels(pairs)
        expected = vision.forward_features(x.flip(-1) if mirrored else x)
        assert expected.shape == (7, 16, 6)
        for i in range(7):
            assert cache[i, mirrored].dtype == getattr(torch, dtype)
            tolerance = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
            torch.testing.assert_close(cache[i, mirrored].float(), expected[i], atol=tolerance, rtol=tolerance)
    assert not torch.equal(cache[2, False], cache[2, True])


def test_it_is_computed_once_and_read_in_place(tmp_path):
    vision = Counting()
    vision.train()
    cache = build(tmp_path, vision)
    assert vision._calls == [3, 3, 1]
    assert vision.training
    again = build(tmp_path, vision)
    assert vision._calls == [3, 3, 1]
    assert len(again) == 7
    view = again[5, False]
    assert view.untyped_storage().data_ptr() == again.tokens.untyped_storage().data_ptr(), "a view, not a copy"
    torch.testing.assert_close(view.float(), cache[5, False].float())
    (file,) = tmp_path.glob("*.safetensors")
    assert load_file(file)["visual_tokens"].shape == (7, 1, 240, 3), "any safetensors reader opens it"
    assert file.stat().st_size < 7 * 240 * 3 * 2 + 8192
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix not in (".safetensors", ".lock")) == []
    copy = pickle.loads(pickle.dumps(cache))
    assert len(pickle.dumps(cache)) < 1000
    assert torch.equal(copy[3, False], cache[3, False])


def test_the_key_knows_everything_that_matters():
    def key(vision=None, pairs=None, transform=TRANSFORM, **options):
        return cache_key(
            vision or tower(), pairs or FakePairs(7), transform, **({"flip": False, "dtype": "float16"} | options)
        )

    class Printed(FakePairs):
        def __init__(self, *marks):
            super().__init__(7)
            self.marks = marks

        def fingerprint(self, i):
            return self.marks[i % len(self.marks)]

    changed = tower()
    with torch.no_grad():
        changed.blocks[1].mlp.fc1.weight[2, 3] += 1e-6
    renamed = FakePairs(7)
    renamed.name = lambda i: f"q{i}.jpg"
    keys = [
        key(),
        key(changed),
        key(tower(1)),
        key(tower(num_heads=3)),
        key(tower(block=ViTBlockConfig(norm_eps=1e-5))),
        key(tower(block=ViTBlockConfig(activation="gelu_tanh"))),
        key(pairs=FakePairs(8)),
        key(pairs=FakePairs(7, seed=1)),  # other pictures of the same names
        key(pairs=renamed),
        key(pairs=Printed("a")),
        key(pairs=Printed("a", "b")),
        key(transform=dataclasses.replace(TRANSFORM, mean=(0.4, 0.5, 0.5))),
        key(transform=dataclasses.replace(TRANSFORM, resize="crop")),
        key(flip=True),
        key(dtype="bfloat16"),
        key(autocast=torch.bfloat16),
    ]
    assert len(set(keys)) == len(keys)
    trained = tower().train()
    assert key(trained) == key() == keys[0]
    assert key(pairs=FakePairs(7, count=lambda i: 1)) == keys[0], "captions do not matter"


def test_bad_images_are_known_to_the_cache(tmp_path):
    pairs = FakePairs(211, bad=[0, 100])
    cache = build(tmp_path, pairs=pairs, batch_size=16, dtype="float32")
    x = pixels(pairs)
    torch.testing.assert_close(cache[1, False], x[0].flatten(1).T)
    torch.testing.assert_close(cache[210, False], x[-1].flatten(1).T)
    assert cache.errors == {0: "p0.jpg: cut off", 100: "p100.jpg: cut off"}
    with pytest.raises(ImageError, match=r"p100\.jpg: cut off"):
        cache[100, False]


def test_the_first_batch_may_be_all_bad(tmp_path):
    cache = build(tmp_path, pairs=FakePairs(11, bad=[0, 1, 2, 3]), dtype="float32")
    torch.testing.assert_close(cache[4, False], TRANSFORM(FakePairs(11).image(4)).flatten(1).T)


def test_long_faults_are_shortened(tmp_path):
    pairs = FakePairs(11, bad=range(8))
    cache = build(tmp_path, pairs=pairs)
    assert len(cache.errors) == 8
    pairs.image = lambda i: (_ for _ in ()).throw(ImageError("속" * 5000)) if i < 8 else FakePairs(11).image(i)
    cache = build(tmp_path / "long", pairs=pairs)
    assert all(fault and set(fault) == {"속"} for fault in cache.errors.values())
    assert sorted(cache.errors) == list(range(8))


def test_no_readable_image_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"none of the 7 pictures can be read; the first: p0\.jpg: cut off"):
        build(tmp_path, pairs=FakePairs(7, bad=range(7)))
    assert not list(tmp_path.glob("*.safetensors"))


def test_no_room_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"features of 7 pictures take 20,160 bytes and the disk has 1,000 free"):
        build(tmp_path, flip=True)
    assert [p.suffix for p in tmp_path.iterdir()] == [".lock"]


def test_numbers_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r"visual tokens of picture 0 \(p0\.jpg\) are not finite in float16"):
        build(tmp_path, Counting(1e6))
    assert build(tmp_path, Counting(1e6), dtype="bfloat16")[0, False].isfinite().all()
    with pytest.raises(ValueError, match="'int8', must be one of float16, bfloat16, float32"):
        build(tmp_path, dtype="int8")


def test_a_build_that_breaks_leaves_nothing(tmp_path):
    class Breaking(Counting):
        def forward_features(self, x):
            if self._calls:
                raise KeyboardInterrupt
            return super().forward_features(x)

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, Breaking())
    assert [p.suffix for p in tmp_path.iterdir()] == [".lock"]
    assert len(build(tmp_path)) == 7


def test_a_damaged_file_is_said(tmp_path):
    path = build(tmp_path).path
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"features-.*safetensors: not a feature cache, or damaged"):
        build(tmp_path)
    path.unlink()
    assert build(tmp_path)[0, False].shape == (240, 3)


def test_damage_is_found_where_it_is_read(tmp_path):
    """A flipped bit, a page of zeros, in any picture; of the others nothing is said."""
    cache = build(tmp_path, flip=True)
    whole, size = cache.path.read_bytes(), cache.tokens[0].nbytes
    start = whole.index(bytes(cache.tokens[0].reshape(-1).view(torch.uint8).numpy()))
    for i in range(7):
        for change in (lambda piece: bytes([piece[0] ^ 1, *piece[1:]]), lambda piece: bytes(len(piece))):
            at = start + i * size + size // 2
            cache.path.write_bytes(whole[:at] + change(whole[at : at + 64]) + whole[at + 64 :])
            damaged = FeatureCache(cache.path)
            for other in set(range(7)) - {i}:
                assert torch.equal(damaged[other, False], damaged.tokens[other, 0])
            for mirrored in (False, True):
                with pytest.raises(ValueError, match=rf"safetensors: damaged at picture {i}; delete it"):
                    damaged[i, mirrored]


def test_a_cache_of_other_pictures_or_one_that_was_cut_is_said(tmp_path):
    cache = build(tmp_path)
    with pytest.raises(ValueError, match="holds 7 pictures, and the split has 9; delete it"):
        FeatureCache(cache.path, 9)
    cache[0, False]
    with cache.path.open("r+b") as file:
        file.truncate(4096)
    with pytest.raises(ValueError, match="has another size now; delete it"):
        cache[6, False]


def test_a_cache_of_before_is_read(tmp_path):
    """One without check sums."""
    cache = build(tmp_path)
    tokens = load_file(cache.path)["visual_tokens"]
    save_file({"visual_tokens": tokens}, tmp_path / "old", metadata={"errors": "{}"})
    assert torch.equal(FeatureCache(tmp_path / "old", 7)[3, False], cache[3, False])


def test_without_mirrored_copies(tmp_path):
    with pytest.raises(ValueError, match="no mirrored copies"):
        build(tmp_path)[0, True]


def _build_in_process(folder, barrier, results):
    vision = Counting()
    barrier.wait()
    cache = build(folder, vision)
    results.put((len(vision._calls), cache[6, False].float().sum().item()))


def test_processes_may_build_at_once(tmp_path):
    fork = multiprocessing.get_context("fork")
    barrier, results = fork.Barrier(3), fork.SimpleQueue()
    workers = [fork.Process(target=_build_in_process, args=(tmp_path, barrier, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    got = [results.get() for _ in workers]
    for worker in workers:
        worker.join()
    assert sorted(calls for calls, _ in got) == [0, 0, 3], "one computes, the others wait"
    assert len({value for _, value in got}) == 1


def test_threads_may_build_at_once(tmp_path):
    towers = [Counting() for _ in range(3)]
    threads = [threading.Thread(target=build, args=(tmp_path, each)) for each in towers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(len(each._calls) for each in towers) == [0, 0, 3]


def test_the_header_is_what_others_read(tmp_path):
    raw = build(tmp_path).path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    assert (8 + size) % 64 == 0, "the numbers are aligned"
    header = json.loads(raw[8 : 8 + size])
    assert header["visual_tokens"] == {"dtype": "F16", "shape": [7, 1, 240, 3], "data_offsets": [0, 7 * 240 * 3 * 2]}
    assert features._FORMAT == 2


# ------------------------------------------------------------------------------------------ in CaptionData


class FakeCaptioner(nn.Module):
    def __init__(self, vision):
        super().__init__()
        self.vision = vision
        self.head = nn.Linear(2, 2)

    def forward_features(self, x):
        b, i = x.shape[:2]
        return self.vision.forward_features(x.flatten(0, 1))[:, 1:].unflatten(0, (b, i))


def with_features(tmp_path, source=None, flip=False, **options):
    kept = FeatureCacheConfig(str(tmp_path), flip)
    data = make(source, transform=TRANSFORM, cache_features=kept, **options)
    captioner = FakeCaptioner(tower())
    data.use_features(captioner, progress=False)
    return data, captioner


def test_batches_hold_visual_tokens_in_place_of_pixels(tmp_path):
    data, captioner = with_features(tmp_path, captions_per_image=3)
    plain = make(transform=TRANSFORM, captions_per_image=3)
    for mine, other in (
        (data.train_dataloader(), plain.train_dataloader()),
        (data.val_dataloader()[0], plain.val_dataloader()[0]),
    ):
        for a, b in zip(mine, other, strict=True):
            assert a.pixels is None
            assert a.names == b.names
            assert torch.equal(a.tokens, b.tokens)
            assert a.visual_tokens.dtype == torch.float16, "as the cache has them; the model casts"
            assert a.visual_tokens.shape == (len(a.names), 1, 15, 6)
            torch.testing.assert_close(
                a.visual_tokens.float(), captioner.forward_features(b.pixels), atol=2e-3, rtol=2e-3
            )


def test_a_vision_encoder_alone_gives_its_own_tokens(tmp_path):
    vision = tower()
    data = make(transform=TRANSFORM, cache_features=FeatureCacheConfig(str(tmp_path)))
    data.use_features(vision, progress=False)
    (a,), (b,) = ([next(iter(x.val_dataloader()[0]))] for x in (data, make(transform=TRANSFORM)))
    expected = vision.forward_features(b.pixels[:, 0])
    torch.testing.assert_close(a.visual_tokens[:, 0].float(), expected, atol=2e-3, rtol=2e-3)


def test_mirrored_features_follow_seed_epoch_and_index(tmp_path):
    class Sided(FakePairs):
        def captions(self, i):
            return [Caption("왼쪽에 별이 있다" if i % 2 else "위에 별이 있다", "ko")]

    pairs = Sided(40, ("ko",))
    source = FakeSource(train=pairs, val=pairs)
    data, _ = with_features(tmp_path, source, flip=True)
    cache, dataset = data._features["train"], data.dataset("train", training=True)
    drawn = []
    for epoch in range(3):
        got = [dataset[SampleIndex(epoch, i)].visual_tokens[0] for i in range(40)]
        mirrored = [torch.equal(got[i], cache[i, True]) for i in range(40)]
        assert all(torch.equal(got[i], cache[i, mirrored[i]]) for i in range(40))
        assert not any(mirrored[1::2]), "captions speak of sides"
        assert 4 < sum(mirrored[::2]) < 16
        drawn.append(mirrored)
    assert drawn[0] != drawn[1] != drawn[2]
    again, _ = with_features(tmp_path, source, flip=True, loader=LoaderConfig(num_workers=2))
    for loader in (data.train_dataloader(), again.train_dataloader()):
        loader.place.set_epoch(1)
        batches = list(loader)
        for batch in batches:
            for name, tokens in zip(batch.names, batch.visual_tokens, strict=True):
                i = int(name[1:-4])
                assert torch.equal(tokens[0], cache[i, drawn[1][i]])
    assert data._features["val"].tokens.shape[1] == 1, "evaluation needs no mirrored copies"


def test_bad_images_with_features(tmp_path):
    source = FakeSource(train=FakePairs(211, bad=[4]), val=FakePairs(5))
    data, _ = with_features(tmp_path, source, report_dir=str(tmp_path))
    names = [name for batch in data.train_dataloader() for name in batch.names]
    assert names.count("p5.jpg") == 2
    assert "p4.jpg: cut off" in (tmp_path / "bad_images_train.jsonl").read_text()


def test_only_frozen_towers_are_cached(tmp_path):
    data = make(transform=TRANSFORM, cache_features=FeatureCacheConfig(str(tmp_path)))
    captioner = FakeCaptioner(tower())
    captioner.vision.blocks[0].attn.out_proj.bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"1 of its parameters are trainable \(blocks\.0\.attn\.out_proj\.bias"):
        data.use_features(captioner)


def test_loaders_that_were_made_before_use_the_features_too(tmp_path):
    data = make(transform=TRANSFORM, cache_features=FeatureCacheConfig(str(tmp_path)))
    loaders = [
        data.train_dataloader(),
        *data.val_dataloader(),
    ]  # Lightning does so for a schedule that needs the length
    data.use_features(FakeCaptioner(tower()), progress=False)
    for loader in loaders:
        batch = next(iter(loader))
        assert batch.pixels is None
        assert batch.visual_tokens.shape[1:] == (1, 15, 6)
