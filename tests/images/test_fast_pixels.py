"""Torch's resizing beside Pillow's, and JPEGs that are decoded smaller than they are."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmtransformer.data.classes import ClassDataset
from mmtransformer.data.documents.documents import DocumentsAsPairs, PairsAsDocuments
from mmtransformer.data.loading.dataset import CaptionDataset
from mmtransformer.data.loading.rows import CaptionRows
from mmtransformer.data.loading.sampler import SampleIndex
from mmtransformer.data.loading.source import scaled_image
from mmtransformer.data.mixture import Mixture
from mmtransformer.data.pairs import PairFiles
from mmtransformer.images import Augment, ImageError, ImageTransform, load
from mmtransformer.pipelines.base import read_transform
from mmtransformer.text.tokenizer import Tokenizer


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """Shapes of all sizes: what falls off with the frequency as in photographs (1 / f)."""
    chance = np.random.default_rng(seed)
    values = np.zeros((height, width, 3))
    for cells in (3, 6, 12, 24, 48, 96):
        noise = Image.fromarray(chance.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        values += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), float) * 3 / cells
    return Image.fromarray((255 * (values - values.min()) / np.ptp(values)).astype(np.uint8))


def jpeg(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90, **options)
    return file.getvalue()


def levels(transform: ImageTransform, image: Image.Image) -> torch.Tensor:
    """Pixels in levels from 0 to 255."""
    std, mean = torch.tensor(transform.std).view(3, 1, 1), torch.tensor(transform.mean).view(3, 1, 1)
    return (transform(image) * std + mean) * 255


@pytest.mark.parametrize("resize", ["squash", "crop", "letterbox"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
@pytest.mark.parametrize("shape", [(480, 640), (333, 201), (60, 50), (1000, 131)])
def test_torchs_pixels_are_pillows_to_a_level_or_two(resize: Any, interpolation: Any, shape: tuple[int, int]) -> None:
    image = photo(*shape)
    fast = levels(ImageTransform(112, resize, interpolation=interpolation), image)
    pillow = levels(ImageTransform(112, resize, interpolation=interpolation, backend="timm"), image)
    away = (fast - pillow).abs()
    assert away.max() < (0.01 if interpolation == "lanczos" else 2.01)
    assert away.mean() < 0.12  # 0.1 where it is enlarged, 0.002 to 0.01 where it is made smaller
    assert fast.std() > 10


def test_hard_edges_stay_within_three_levels() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 2, (480, 640, 3), dtype=np.uint8) * 255)
    for resize in ("squash", "crop"):
        fast, pillow = (levels(ImageTransform(224, resize, backend=kind), image) for kind in ("fast", "timm"))
        assert (fast - pillow).abs().max() < 3.01
        assert (fast - pillow).abs().mean() < 0.02


def test_torchvisions_pixels_do_not_hang_on_the_order_in_memory() -> None:
    from torchvision.transforms.v2 import InterpolationMode, functional

    for shape, side in (((480, 640), 224), ((97, 89), 112), ((31, 400), 64)):
        image = photo(*shape)
        planes = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        for interpolation in ("bicubic", "bilinear", "lanczos"):
            theirs = functional.resize(planes, [side, side], InterpolationMode(interpolation), antialias=True)
            ours = ImageTransform(side, interpolation=interpolation, backend="torchvision").resized(image, (side, side))
            assert torch.equal(ours, theirs)


def test_a_saved_transform_keeps_its_resampling(tmp_path: Path) -> None:
    assert ImageTransform().backend == "fast"
    assert ImageTransform.from_dict(ImageTransform().to_dict()).backend == "fast"
    old = {key: value for key, value in ImageTransform(56).to_dict().items() if key != "backend"}
    assert ImageTransform.from_dict(old).backend == "timm"
    file = tmp_path / "image.json"
    file.write_text('{"image_size": 56}')
    assert read_transform(file) == ImageTransform(56, backend="timm")
    file.write_text('{"image_size": 56, "backend": "fast"}')
    assert read_transform(file) == ImageTransform(56)


# ------------------------------------------------------------------------------------------ scaled decoding


def test_a_jpeg_is_decoded_no_smaller_than_it_is_wanted() -> None:
    data = jpeg(photo(301, 397))
    for wanted, size in ((302, (397, 301)), (160, (397, 301)), (150, (199, 151)), (75, (100, 76)), (1, (50, 38))):
        assert load(data, at_least=(wanted, wanted)).size == size
    assert load(data, at_least=(30, 250)).size == (397, 301)
    assert load(data, at_least=(100.5, 90.2)).size == (199, 151)
    assert load(jpeg(photo(301, 397).convert("L")), at_least=(70, 70)).size == (100, 76)
    png = io.BytesIO()
    photo(301, 397).save(png, "PNG")
    assert load(png.getvalue(), at_least=(9, 9)).size == (397, 301)


@pytest.mark.parametrize("turn", [1, 2, 3, 4, 5, 6, 7, 8])
def test_the_size_that_is_wanted_is_that_of_the_upright_image(turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    data = jpeg(photo(300, 800), exif=exif.tobytes())
    whole = load(data)
    scaled = load(data, at_least=(whole.height / 4, whole.width / 8))
    assert scaled.size == (whole.width // 4, whole.height // 4)
    away = np.asarray(scaled, float) - np.asarray(whole.resize(scaled.size, Image.Resampling.BOX), float)
    assert np.abs(away).mean() < 2


def test_guards_stand_before_a_scaled_decoding() -> None:
    data = jpeg(photo(300, 400))
    with pytest.raises(ImageError, match=r"400 x 300 = 120,000 pixels are more than 119,996"):
        load(data, max_pixels=29_999, at_least=(20, 20))
    for kept in (len(data) * 9 // 10, len(data) // 2):
        with pytest.raises(ImageError, match="damaged JPEG"):
            load(data[:kept], at_least=(40, 40))
        with pytest.raises(ImageError, match="its pixels end early"):
            load(data[:kept] + b"\xff\xd9", at_least=(40, 40))
    grey = load(jpeg(Image.new("RGB", (400, 300), (128, 128, 128))), at_least=(40, 40))
    assert grey.getextrema() == ((128, 128),) * 3
    assert grey.size == (100, 75)


def test_a_scaled_decoding_differs_little() -> None:
    """Twice of what is seen is kept: less than a level on the mean for these, whose detail is a photograph's."""
    transform, away = ImageTransform(48), []
    for seed in range(4):
        data = jpeg(photo(900, 1200, seed))
        scaled = load(data, at_least=transform.decode_size())
        assert scaled.size == (150, 113)
        away.append(levels(transform, scaled) - levels(transform, load(data)))
    assert 0 < torch.stack(away).abs().mean() < 1
    assert torch.stack(away).mean().abs() < 0.05


@pytest.mark.parametrize("augment", [None, Augment(), Augment((0.1, 0.4), flip=True), Augment((1, 1), jitter=0.2)])
@pytest.mark.parametrize("resize", ["squash", "crop", "letterbox"])
def test_what_is_enough_leaves_twice_what_is_seen_after_the_crop(augment: Augment | None, resize: Any) -> None:
    transform = ImageTransform((20, 30), resize, crop_fraction=1.0 if resize == "letterbox" else 0.8)
    data = jpeg(photo(700, 1100))
    scales = set()
    for seed in range(12):
        at_least = transform.decode_size(augment, torch.Generator().manual_seed(seed))
        assert at_least is not None
        image, whole = load(data, at_least=at_least), load(data)
        scales.add(round(whole.width / image.width))
        if augment is not None:
            image = augment(image, torch.Generator().manual_seed(seed))
            whole = augment(whole, torch.Generator().manual_seed(seed))
        assert image.height >= 2 * 20 / transform.crop_fraction - 1
        assert image.width >= 2 * 30 / transform.crop_fraction - 1
        if resize == "squash":  # of other sizes, shapes are rounded to another whole number
            assert (levels(transform, image) - levels(transform, whole)).abs().mean() < 4
    assert max(scales) >= 4
    assert ImageTransform(backend="timm").decode_size(augment, torch.Generator()) is None


class Photos:
    """Classified pictures that note what they were asked for."""

    def __init__(self) -> None:
        self.data, self.asked = jpeg(photo(300, 400)), []

    def __len__(self) -> int:
        return 2

    def name(self, i: int) -> str:
        return f"{i}.jpg"

    def label(self, i: int) -> int:
        return i

    def image(self, i: int) -> Image.Image:
        return self.scaled_image(i)

    def scaled_image(self, i: int, *, at_least: tuple[float, float] | None = None) -> Image.Image:
        self.asked.append(at_least)
        return load(self.data, at_least=at_least)


def test_only_training_decodes_smaller() -> None:
    photos = Photos()
    pick = SampleIndex(3, 1, True)
    fast, exact = ImageTransform(24), ImageTransform(24, backend="timm")
    ClassDataset(photos, fast, training=True)[pick]
    ClassDataset(photos, fast, training=True, augment=Augment((0.5, 0.5)))[pick]
    ClassDataset(photos, fast, training=False)[pick]
    ClassDataset(photos, exact, training=True)[pick]
    plain, cropped, *others = photos.asked
    assert plain == (48, 48)
    assert cropped[0] * cropped[1] == pytest.approx(48 * 48 / 0.5)
    assert others == [None, None]


def test_captioned_images_are_decoded_smaller_in_training_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(6):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(photo(200, 300, i)))
        (tmp_path / f"{i}.txt").write_text(f"a photo of number {i}\n")
    pairs = PairFiles(str(tmp_path)).split("train")
    sizes: list[tuple[int, int]] = []
    seen = ImageTransform.__call__
    monkeypatch.setattr(ImageTransform, "__call__", lambda self, image: sizes.append(image.size) or seen(self, image))
    tokenizer = Tokenizer.train(["a photo of number 1"], 300)
    for training in (True, False):
        CaptionDataset(pairs, CaptionRows(pairs, tokenizer, 16), ImageTransform(24), training=training)[
            SampleIndex(0, 0, True)
        ]
    assert sizes == [(75, 50), (300, 200)]


def test_every_wrapper_of_a_source_passes_the_size_on(tmp_path: Path) -> None:
    for i in range(6):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(photo(200, 300, i)))
        (tmp_path / f"{i}.txt").write_text(f"a photo of number {i}\n")
    source = PairFiles(str(tmp_path))
    mixed = Mixture({"a": source, "b": source})
    as_documents = PairsAsDocuments(source)
    for split in (source, mixed, DocumentsAsPairs(as_documents), DocumentsAsPairs(as_documents)):
        assert scaled_image(split.split("train"), 0, at_least=(48, 48)).size == (75, 50)
        assert scaled_image(split.split("train"), 0, at_least=None).size == (300, 200)
    assert scaled_image(as_documents.split("train"), 0, 0, at_least=(48, 48)).size == (75, 50)

    class Old:
        def image(self, i: int) -> Image.Image:
            return photo(40 + i, 50)

    assert scaled_image(Old(), 1, at_least=(4, 4)).size == (50, 41)
