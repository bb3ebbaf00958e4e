"""The transform that comes with a public tower: pixels as timm and transformers make them."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from PIL import Image
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform

from mmtransformer import (
    ConcatViT,
    ImageTransform,
    NativeSize,
    PackedImages,
    TextDecoder,
    VisionEncoderDecoder,
    ViT,
    packed_forward,
)
from mmtransformer.weights import from_timm, load_vit, save_clip, save_dino, save_siglip2, save_timm, save_vit

SIZES: dict[str, Any] = {"depth": 1, "embed_dim": 20, "num_heads": 5, "mlp_ratio": 1.0}
VISION: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 1, "num_attention_heads": 3, "image_size": 56,
    "patch_size": 14,
}  # fmt: skip


def picture() -> Image.Image:
    torch.manual_seed(0)
    noise = torch.randint(0, 256, (97, 131, 3), dtype=torch.uint8)
    return Image.fromarray(noise.numpy()).resize((262, 194), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("deit_tiny_patch16_224", ImageTransform(224, "crop", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225),
                                                 crop_fraction=0.9, backend="timm")),
        ("vit_base_patch16_siglip_384", None),  # squashes
        ("flexivit_small", None),
        ("eva02_tiny_patch14_336", None),
        ("vit_small_patch16_dinov3", None),
        ("naflexvit_base_patch16_siglip", None),
    ],
    ids=str,
)  # fmt: skip
@torch.no_grad()
def test_a_timm_towers_pixels_are_timms(name: str, says: ImageTransform | None) -> None:
    model = timm.create_model(name, **SIZES)
    transform = from_timm(model).transform
    assert transform is not None
    assert says in (None, transform)
    theirs: Any = create_transform(**resolve_data_config({}, model=model))
    torch.testing.assert_close(transform(picture()), theirs(picture()), atol=2e-6, rtol=2e-6)


class Inverted(ImageTransform):
    """With code of its own."""

    def __call__(self, image: Any) -> torch.Tensor:
        return -super().__call__(image)


def test_a_saved_tower_keeps_it_alone_and_in_a_captioner(tmp_path: Path) -> None:
    vit = ViT(32, 8, 20, 1, 4)
    decoder = TextDecoder(13, 12, 1, 3, max_len=8, context_dim=20)
    for transform in (ImageTransform(32, "crop", (0.1, 0.2, 0.3), crop_fraction=0.9, backend="timm"),
                      ImageTransform(resize="native", native=NativeSize(8, 12)), None):  # fmt: skip
        vit.transform = transform
        vit.save_pretrained(tmp_path / "vit")
        ConcatViT(vit).save_pretrained(tmp_path / "joined")
        VisionEncoderDecoder(vit, decoder).save_pretrained(tmp_path / "captioner")
        found = [ViT.from_pretrained(tmp_path / "vit").transform, load_vit(tmp_path / "vit").transform]
        found += [ConcatViT.from_pretrained(tmp_path / "joined").transform, load_vit(tmp_path / "captioner").transform]
        assert found == [transform] * 4
    vit.transform = Inverted(32)
    with pytest.raises(
        ValueError, match=r"ViT\) cannot be saved: its transform is no plain ImageTransform, and its own code"
    ):
        vit.save_pretrained(tmp_path / "own")
    assert not (tmp_path / "own").exists()
    with pytest.raises(TypeError, match="transform must be of ImageTransform"):
        ViT(32, 8, 20, 1, 4, transform=str)  # pyright: ignore[reportArgumentType]


def test_a_timm_folder_says_and_keeps_it(tmp_path: Path) -> None:
    vit = from_timm(timm.create_model("vit_base_patch16_siglip_224", img_size=64, **SIZES))
    assert vit.transform == ImageTransform(64, "crop", crop_fraction=0.9, backend="timm")
    save_timm(vit, tmp_path)
    assert load_vit(tmp_path).transform == vit.transform
    assert load_vit(tmp_path, image_size=(32, 48)).transform == ImageTransform(
        (32, 48), "crop", crop_fraction=0.9, backend="timm"
    )
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"] |= {"crop_mode": "squash", "mean": [0.1, 0.2, 0.3], "interpolation": "bilinear"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    own = ImageTransform(64, "squash", (0.1, 0.2, 0.3), interpolation="bilinear", crop_fraction=0.9, backend="timm")
    assert load_vit(tmp_path).transform == own
    timms = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    theirs: Any = create_transform(**resolve_data_config({}, model=timms))
    torch.testing.assert_close(own(picture()), theirs(picture()), atol=2e-6, rtol=2e-6)


CASES: dict[str, tuple[Any, Any, dict[str, Any], Any]] = {
    "vit": (transformers.ViTConfig, transformers.ViTModel, {"size": {"height": 56, "width": 56}},
            save_vit),
    "clip": (
        transformers.CLIPVisionConfig, transformers.CLIPVisionModel,
        {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}, save_clip,
    ),
    "siglip": (transformers.SiglipVisionConfig, transformers.SiglipVisionModel, {"size": {"height": 56, "width": 56}},
               save_clip),
    "dinov2": (
        transformers.Dinov2Config, transformers.Dinov2Model,
        {"size": {"shortest_edge": 48}, "crop_size": {"height": 42, "width": 42}, "image_mean": [0.485, 0.456, 0.406]},
        save_dino,
    ),
}  # fmt: skip
PROCESSORS = {"vit": "ViT", "clip": "CLIP", "siglip": "Siglip", "dinov2": "Bit"}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_folder_of_transformers_brings_its_processor(name: str, tmp_path: Path) -> None:
    config, kind, says, save = CASES[name]
    torch.manual_seed(1)
    model = kind(config(**{k: v for k, v in VISION.items() if name != "dinov2" or k != "intermediate_size"})).eval()
    model.save_pretrained(tmp_path / "theirs")
    getattr(transformers, f"{PROCESSORS[name]}ImageProcessor")(**says).save_pretrained(tmp_path / "theirs")
    processor: Any = transformers.AutoImageProcessor.from_pretrained(tmp_path / "theirs")
    ours = load_vit(tmp_path / "theirs")
    assert ours.transform is not None
    assert ours.image_size == ours.transform.size
    pixels = processor(images=picture(), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours.transform(picture())[None], pixels, atol=1e-6, rtol=1e-6)
    theirs = model(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(ours.forward_features(pixels), theirs, atol=1e-5, rtol=1e-5)
    save(ours, tmp_path / "ours")
    again: Any = transformers.AutoImageProcessor.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(again(images=picture(), return_tensors="pt")["pixel_values"], pixels)
    assert load_vit(tmp_path / "ours").transform == ours.transform
    if name == "dinov2":  # Its positions are those of the file, whatever was read.
        kept = kind.from_pretrained(tmp_path / "ours").embeddings.position_embeddings[:, 1:]
        assert torch.equal(kept, model.embeddings.position_embeddings[:, 1:])


def test_naflex_and_what_cannot_be_imitated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sizes = {key: value for key, value in VISION.items() if key != "image_size"}
    theirs: Any = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**sizes, num_patches=9)).eval()
    processor: Any = transformers.Siglip2ImageProcessor(patch_size=14, max_num_patches=30)
    theirs.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    ours = load_vit(tmp_path)
    native = ImageTransform(resize="native", interpolation="bilinear", backend="torchvision", native=NativeSize(14, 30))
    assert ours.transform == native
    with torch.no_grad():
        found = theirs(**processor(images=picture(), return_tensors="pt"))
        packed = PackedImages.of([native(picture())], 14)
        torch.testing.assert_close(packed_forward(ours, packed), found.pooler_output, atol=1e-5, rtol=1e-5)
    save_siglip2(ours, tmp_path / "ours")
    again: Any = transformers.AutoImageProcessor.from_pretrained(tmp_path / "ours")
    for name, tensor in again(images=picture(), return_tensors="pt").items():
        assert torch.equal(tensor, processor(images=picture(), return_tensors="pt")[name])
    assert load_vit(tmp_path / "ours").transform == native
    plain = ViT(28, 14, 20, 1, 4)
    plain.transform = native  # timm has no word for it, and takes its own.
    save_timm(plain, tmp_path / "timm")
    assert getattr(load_vit(tmp_path / "timm").transform, "resize", None) == "crop"
    transformers.Siglip2ImageProcessor(patch_size=16).save_pretrained(tmp_path)
    assert load_vit(tmp_path).transform is None
    assert "patches of 16 px, and the model reads those of 14" in caplog.text
    other = tmp_path / "other"
    transformers.ViTModel(transformers.ViTConfig(**VISION)).save_pretrained(other)
    assert load_vit(other).transform is None
    (other / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "PerceiverImageProcessor"}))
    assert load_vit(other).transform is None
    assert "how its pictures become pixels is not known" in caplog.text
    assert "'Perceiver' is not known here" in caplog.text


def test_a_folder_of_a_pipeline_brings_its_own(tmp_path: Path) -> None:
    ViT(16, 8, 20, 1, 4).save_pretrained(tmp_path)
    assert load_vit(tmp_path).transform is None
    own = ImageTransform(16, "letterbox")
    (tmp_path / "preprocessor.json").write_text(json.dumps(own.to_dict()))
    assert load_vit(tmp_path).transform == own
