"""Pictures of native size from files to batches."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image

from mmtransformer.data.captions import CaptionData
from mmtransformer.data.classes import ClassData
from mmtransformer.data.interleaved_data import InterleavedData
from mmtransformer.data.loading.features import FeatureCacheConfig
from mmtransformer.data.loading.module import LoaderConfig, Splits
from mmtransformer.data.loading.source import size_of
from mmtransformer.data.mixture import Mixture
from mmtransformer.data.pairs import PairFiles
from mmtransformer.images import Augment, ImageError, ImageTransform, NativeSize
from mmtransformer.images.sizes import stored_size
from support import tiny
from support.sources import FakeSource, batches_of, make, tokenizer

NATIVE = ImageTransform(resize="native", native=NativeSize(8, 12))
SMALL = ImageTransform(resize="native", native=NativeSize(8, 12, enlarge=False))
SIZES = [(16, 24), (24, 16), (9, 9), (40, 8), (8, 8), (33, 47), (64, 64)]


def folder(path: Path) -> Path:
    path.mkdir()
    for i, size in enumerate(SIZES * 2):
        image = Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8))
        image.save(path / f"{i}.{('jpg', 'png', 'webp')[i % 3]}")
        (path / f"{i}.txt").write_text(f"picture number {i}", "utf-8")
    return path


def source() -> FakeSource:
    return FakeSource(train=tiny.ManySizes(23), val=tiny.ManySizes(7, seed=1))


@pytest.mark.parametrize("transform", [NATIVE, SMALL])
def test_a_batch_holds_each_pictures_own_patches(transform: ImageTransform) -> None:
    data = make(source(), transform=transform)
    for batch in [*batches_of(data), *data.val_dataloader()[0]]:
        assert batch.patch_grids.shape == (len(batch.names), 1, 2)
        assert batch.pixels.shape == (len(batch.names), 1, int(batch.patch_grids.prod(-1).max()), 192)
    batch = batches_of(data)[0]
    split = data.pairs("train")
    for i, name in enumerate(batch.names):
        pixels = transform(split.image(int(name[1:-4])))
        gh, gw = batch.patch_grids[i, 0].tolist()
        found = rearrange(batch.pixels[i, 0, : gh * gw], "(gh gw) (c y x) -> c (gh y) (gw x)", gh=gh, c=3, y=8)
        assert torch.equal(found, pixels)
        assert not batch.pixels[i, 0, gh * gw :].any()
    assert batch.to("cpu").patch_grids.equal(batch.patch_grids)


@pytest.mark.parametrize("augment", [None, Augment(flip=True), Augment((0.3, 1.0)), Augment((1, 1), flip=True)])
@pytest.mark.parametrize("transform", [NATIVE, SMALL])
def test_batches_hold_no_more_patches_than_they_may(transform: ImageTransform, augment: Augment | None) -> None:
    data = make(source(), transform=transform, augment=augment, loader=LoaderConfig(max_patches_per_batch=40))
    for epoch in range(3):
        batches = batches_of(data, epoch)
        assert len(batches) == len(data.train_dataloader())
        counts = [int(batch.patch_grids.prod(-1).sum()) for batch in batches]
        assert max(counts) <= 40
        assert sorted(name for batch in batches for name in batch.names) == sorted(f"p{i}.jpg" for i in range(23))
    if augment is None:
        assert sum(counts) == data.patches("train").sum()
    assert len({len(batch.names) for batch in batches}) > 1 or transform is NATIVE
    assert [len(batch.names) for batch in data.val_dataloader()[0]] == [7]  # as many as batch_size says


def test_sizes_are_told_without_decoding(tmp_path: Path) -> None:
    pairs = PairFiles(folder(tmp_path / "p")).split("train")
    for i in range(len(pairs)):
        image = pairs.image(i)
        assert size_of(pairs, i) == (image.height, image.width)
    data = CaptionData(
        str(tmp_path / "p"), transform=SMALL, tokenizer=tokenizer(), loader=LoaderConfig(max_bad_fraction=0.5)
    )
    sizes = dict(zip(map(pairs.name, range(len(pairs))), data.patches("train").tolist(), strict=True))
    for name, count in sizes.items():
        assert count == SMALL.native.num_patches(*SIZES[int(Path(name).stem) % 7])
    (tmp_path / "p" / "0.jpg").write_bytes(b"\xff\xd8\xffnothing")
    data = CaptionData(
        str(tmp_path / "p"), transform=SMALL, tokenizer=tokenizer(), loader=LoaderConfig(max_bad_fraction=0.5)
    )
    again = dict(zip(map(data.pairs("train").name, range(len(pairs))), data.patches("train").tolist(), strict=True))
    assert again == sizes | ({"0.jpg": 12} if "0.jpg" in sizes else {})


def test_sizes_of_turned_and_damaged_files() -> None:
    file, tags = io.BytesIO(), Image.Exif()
    tags[274] = 6  # turned by a quarter when it is read: as many patches
    Image.new("RGB", (30, 20)).save(file, "JPEG", exif=tags)
    assert stored_size(file.getvalue(), "a") == (20, 30)
    for data in (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"nothing"):
        with pytest.raises(ImageError, match=r"^a\.png: "):
            stored_size(data, "a.png")


def test_the_towers_own_way_and_another() -> None:
    data = CaptionData(source(), tokenizer=tokenizer())
    line = data.use_vision_transform(NATIVE, 8)
    assert (data.transform, line) == (
        NATIVE,
        "pixels: native size, at most 12 patches of 8 px, bicubic, mean 0.5 0.5 0.5, the vision encoder's own",
    )
    data = CaptionData(source(), tokenizer=tokenizer(), resize="native")
    line = data.use_vision_transform(ImageTransform(48, "crop", crop_fraction=0.8), 8)
    assert data.transform == ImageTransform(resize="native", native=NativeSize(8, 36))
    assert "at most 36 patches of 8 px" in line
    assert "but resize native, as data.resize says" in line
    data = CaptionData(source(), tokenizer=tokenizer(), resize="squash")
    data.use_vision_transform(NATIVE, 8)
    assert (data.transform.resize, data.transform.size) == ("squash", (24, 24))


def test_what_reads_pictures_of_one_size_refuses_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='interleaved documents have pictures of one size: set resize to "squash"'):
        InterleavedData(str(tmp_path), transform=NATIVE)
    with pytest.raises(ValueError, match="classes are learnt from pictures of one size"):
        ClassData(str(tmp_path), transform=NATIVE)
    data = make(source(), transform=NATIVE, cache_features=FeatureCacheConfig(str(tmp_path)))
    with pytest.raises(ValueError, match="cache_features keeps the tokens of pictures of one size"):
        data.use_features(tiny.captioner(freeze_vision=True))
    one = make(source(), transform=ImageTransform(16), loader=LoaderConfig(max_patches_per_batch=99))
    with pytest.raises(ValueError, match=r"max_patches_per_batch \(99\) is for pictures of native size"):
        one.train_dataloader()
    with pytest.raises(ValueError, match=r"loader.max_patches_per_batch \(0\) must be at least 1"):
        LoaderConfig(max_patches_per_batch=0)
    mixed = Mixture({"a": source(), "b": source()}, {"a": 1.0, "b": 1.0}, epoch_size=9)
    data = make(mixed, transform=NATIVE, loader=LoaderConfig(max_patches_per_batch=60), splits=Splits())
    with pytest.raises(ValueError, match="a budget of patches is not for a mixture"):
        data.train_dataloader()
