"""Pictures at a size of their own: as SigLIP 2's image processor makes them, and rows that hold them."""

from typing import Any

import pytest
import torch
from PIL import Image

from mmtransformer import ImageTransform, NativeTransform, packed_rows

SIZES = [(480, 640), (97, 331), (1000, 31), (8, 8), (333, 500), (17, 3000)]


def test_sizes_are_those_of_siglip_2() -> None:
    from transformers.models.siglip2.image_processing_siglip2 import get_image_size_for_max_num_patches

    for patch, most in ((16, 256), (14, 100), (7, 9)):
        transform = NativeTransform(patch, most)
        for height, width in SIZES:
            found = transform.size_for(height, width)
            assert found == get_image_size_for_max_num_patches(height, width, patch, most)
            assert found[0] // patch * (found[1] // patch) <= most


def test_pixels_are_those_of_siglip_2() -> None:
    from einops import rearrange
    from transformers import Siglip2ImageProcessor

    processor: Any = Siglip2ImageProcessor(patch_size=14, max_num_patches=60)
    ours = NativeTransform(14, 60, ImageTransform(interpolation="bilinear", backend="torchvision"))
    for height, width in SIZES[:3]:
        picture = Image.effect_noise((width, height), 90.0).convert("RGB")
        theirs = processor(images=picture, return_tensors="pt")
        rows, columns = theirs["spatial_shapes"][0].tolist()
        pattern = "(gh gw) (y x c) -> c (gh y) (gw x)"
        wanted = rearrange(theirs["pixel_values"][0, : rows * columns], pattern, gh=rows, gw=columns, y=14, x=14)
        torch.testing.assert_close(ours(picture), wanted)


def test_small_pictures_may_stay_small() -> None:
    transform = NativeTransform(16, 256, enlarge=False)
    assert [transform.size_for(*size) for size in ((40, 50), (16, 16), (4000, 4000))] == [
        (48, 64),
        (16, 16),
        (256, 256),
    ]
    with pytest.raises(ValueError, match=r"max_patches \(0\) must be at least 1"):
        NativeTransform(16, 0)


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
