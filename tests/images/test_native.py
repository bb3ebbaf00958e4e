"""Pictures at a size of their own: as SigLIP 2's image processor makes them, and rows that hold them."""

from typing import Any

import pytest
import torch
from PIL import Image

from mmtransformer import ImageTransform, NativeSize, packed_rows

SIZES = [(480, 640), (97, 331), (1000, 31), (8, 8), (333, 500), (17, 3000)]


def test_sizes_are_those_of_siglip_2() -> None:
    from transformers.models.siglip2.image_processing_siglip2 import get_image_size_for_max_num_patches

    for patch, most in ((16, 256), (14, 100), (7, 9)):
        native = NativeSize(patch, most)
        for height, width in SIZES:
            found = native.size_for(height, width)
            assert found == get_image_size_for_max_num_patches(height, width, patch, most)
            assert found[0] // patch * (found[1] // patch) == native.num_patches(height, width) <= most


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
def test_pixels_are_those_of_siglip_2(backend: Any) -> None:
    from einops import rearrange
    from transformers import Siglip2ImageProcessor, Siglip2ImageProcessorPil

    kind: Any = Siglip2ImageProcessor if backend == "torchvision" else Siglip2ImageProcessorPil
    processor = kind(patch_size=14, max_num_patches=60)
    ours = ImageTransform(resize="native", interpolation="bilinear", backend=backend, native=NativeSize(14, 60))
    assert (ours.size, ours.patch_size) == ((98, 98), 14)
    for height, width in SIZES[:3]:
        picture = Image.effect_noise((width, height), 90.0).convert("RGB")
        theirs = processor(images=picture, return_tensors="pt")
        rows, columns = theirs["spatial_shapes"][0].tolist()
        pattern = "(gh gw) (y x c) -> c (gh y) (gw x)"
        wanted = rearrange(theirs["pixel_values"][0, : rows * columns], pattern, gh=rows, gw=columns, y=14, x=14)
        torch.testing.assert_close(ours(picture), wanted)


def test_small_pictures_may_stay_small() -> None:
    native = NativeSize(16, 256, enlarge=False)
    assert [native.size_for(*size) for size in ((40, 50), (16, 16), (4000, 4000))] == [(48, 64), (16, 16), (256, 256)]
    with pytest.raises(ValueError, match=r"native.max_num_patches \(0\) must be a whole number, at least 1"):
        NativeSize(16, 0)


def test_settings_come_back_and_others_say_nothing_of_native_sizes() -> None:
    native = ImageTransform(resize="native", native=NativeSize(14, 50, enlarge=False))
    assert native.to_dict()["native"] == {"patch_size": 14, "max_num_patches": 50, "enlarge": False}
    assert ImageTransform.from_dict(native.to_dict()) == native
    assert "native" not in ImageTransform(native=NativeSize(14)).to_dict()
    assert (native.size, ImageTransform(96).patch_size) == ((98, 98), None)
    with pytest.raises(ValueError, match=r'crop_fraction is 0\.9, but resize is "native"'):
        ImageTransform(resize="native", crop_fraction=0.9)


def test_rows_hold_every_picture_once_and_no_more_than_they_may() -> None:
    torch.manual_seed(0)
    lengths = torch.randint(1, 60, (200,)).tolist()
    rows = packed_rows(lengths, 100)
    assert sorted(i for row in rows for i in row) == list(range(200))
    assert all(sum(lengths[i] for i in row) <= 100 for row in rows)
    assert len(rows) <= 1.1 * sum(lengths) / 100 + 1  # hardly any room is left
    assert packed_rows([3, 3, 4], 7) == [[0, 2], [1]]
    with pytest.raises(ValueError, match="picture 1 has 9 tokens, and a row 7"):
        packed_rows([3, 9], 7)
