"""What one tries by hand first works, or says in the caller's words what is wanted."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from mmtransformer import ImageTransform, TextDecoder, VisionEncoderDecoder, ViT
from mmtransformer.data.captions import CaptionData
from mmtransformer.data.scenes.scenes import Scenes


def test_a_transform_takes_a_path(tmp_path: Path) -> None:
    image = Image.new("RGB", (50, 40), (200, 30, 30))
    image.save(tmp_path / "사진.png")
    transform = ImageTransform(32)
    for source in (tmp_path / "사진.png", str(tmp_path / "사진.png"), (tmp_path / "사진.png").read_bytes()):
        assert torch.equal(transform(source), transform(image))


def test_a_captioner_of_pixels_alone_says_what_it_reads() -> None:
    vision = ViT(32, 8, 16, 1, 2, class_token=False, pool="mean")
    model = VisionEncoderDecoder(vision, TextDecoder(60, 16, 1, 2, max_len=8, context_dim=16))
    with pytest.raises(TypeError, match=r"VisionEncoderDecoder reads a CaptionBatch, .* ImageCaptioner"):
        model(torch.rand(2, 3, 32, 32))  # pyright: ignore[reportArgumentType]


def test_samples_can_be_looked_at_by_their_numbers() -> None:
    scenes = Scenes(image_size=32, train_size=4, val_size=2)
    dataset = CaptionData(scenes, transform=ImageTransform(32), vocab_size=300, batch_size=2).dataset("train")
    assert dataset[0].pixels.shape == (1, 3, 32, 32)
    assert len(list(dataset)) == len(dataset) == 4
    with pytest.raises(IndexError, match="picture 4 of 4"):
        dataset[4]


def test_whole_numbers_are_no_pixels() -> None:
    vision = ViT(32, 8, 16, 1, 2)
    for kind in (torch.uint8, torch.int64):
        with pytest.raises(ValueError, match="pixels are floats, as ImageTransform makes them, not whole numbers"):
            vision(torch.full((1, 3, 32, 32), 9, dtype=kind))
