"""How large the pixels of a saved model may be."""

import json
from pathlib import Path

import pytest

from mmtransformer import CLIP, ImageGenerator, ImageTextEmbedder, ImageTransform, TextEncoder, Tokenizer, ViT
from mmtransformer.backbones.diffusion_transformer import DiffusionTransformer
from mmtransformer.diffusion.text_to_image import TextToImageModel
from mmtransformer.dual_encoders.text_tower import TextTower
from mmtransformer.pipelines.base import read_transform


@pytest.mark.parametrize("size", [32, 128, [128, 96]])
def test_pixels_of_up_to_four_times_the_models_sides_are_taken(tmp_path: Path, size: int | list[int]) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(ImageTransform(32).to_dict() | {"image_size": size}), "utf-8")
    assert read_transform(path, (32, 32)).size[0] == (size if isinstance(size, int) else size[0])


@pytest.mark.parametrize("size", [132, [32, 160], 4096, 10_000])
def test_pixels_far_above_the_models_positions_are_refused(tmp_path: Path, size: int | list[int]) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(ImageTransform(32).to_dict() | {"image_size": size}), "utf-8")
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: image_size is .* more than"):
        read_transform(path, (32, 32))


def folder_of(kind: str, folder: Path) -> type[ImageTextEmbedder] | type[ImageGenerator]:
    tokenizer = Tokenizer.train(["a red star"] * 3, 300)
    if kind == "dual encoder":
        model = CLIP(ViT(32, 8, 24, 1, 4), TextTower(300, 20, 1, 2, max_len=24), embed_dim=13)
        ImageTextEmbedder(model, tokenizer, ImageTransform(32), device="cpu").save_pretrained(folder)
        return ImageTextEmbedder
    text = TextEncoder(300, dim=12, depth=1, num_heads=2, max_len=40, pooler=False)
    grid = 4 if kind == "text to image" else None  # of 8 px
    drawn = TextToImageModel(text, DiffusionTransformer(8, 3, 16, 1, 2, context_dim=12, base_grid=grid))
    ImageGenerator(drawn, tokenizer, ImageTransform(32), device="cpu").save_pretrained(folder)
    return ImageGenerator


@pytest.mark.parametrize(
    ("kind", "most"), [("dual encoder", 128), ("text to image", 128), ("text to image, any grid", 1024)]
)
def test_saved_models_compare_their_pixels_with_themselves(tmp_path: Path, kind: str, most: int) -> None:
    kept = folder_of(kind, tmp_path)
    path = tmp_path / "preprocessor.json"
    saved = json.loads(path.read_text("utf-8"))
    for size in (32, most):
        path.write_text(json.dumps(saved | {"image_size": size}), "utf-8")
        assert kept.from_pretrained(tmp_path, device="cpu").transform.size == (size, size)
    path.write_text(json.dumps(saved | {"image_size": most + 8}), "utf-8")
    with pytest.raises(ValueError, match=rf"preprocessor\.json: image_size is {most + 8}, more than four times"):
        kept.from_pretrained(tmp_path, device="cpu")
