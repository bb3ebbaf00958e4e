"""A recipe takes a public vision encoder by one key: widths, sizes and pixels follow, and are said."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import transformers
from jsonargparse import Namespace

from mmtransformer import ImageTransform, TextDecoder, VisionEncoderDecoder, ViT
from mmtransformer.cli import main
from mmtransformer.cli.recipes import with_tower
from mmtransformer.data.captions import CaptionData
from mmtransformer.data.scenes.scenes import Scenes
from mmtransformer.training.tasks.towers import fit_widths, use_transform
from mmtransformer.weights import from_timm, load_vit, save_vit
from mmtransformer.weights.vision.load import tower_width
from support.recipes import RECIPES, flickr_folder


def part(kind: str, **init_args: Any) -> Namespace:
    return Namespace(class_path=f"mmtransformer.{kind}", init_args=Namespace(**init_args))


def data(**options: Any) -> CaptionData:
    return CaptionData(Scenes(image_size=32, train_size=2), **options)


def test_the_width_of_a_tower_before_it_is_loaded(tmp_path: Path) -> None:
    assert tower_width("vit_small_patch14_dinov2.lvd142m") == 384
    assert tower_width("naflexvit_base_patch16_siglip") == 768
    assert tower_width("no_such_name") is None
    assert tower_width(tmp_path) is None
    vit = ViT(16, 8, 20, 1, 4)
    vit.save_pretrained(tmp_path / "ours")
    save_vit(vit, tmp_path / "timm")
    VisionEncoderDecoder(vit, TextDecoder(31, 24, 1, 4, cross_dim=20)).save_pretrained(tmp_path / "captioner")
    sizes: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3}
    transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes)).save_pretrained(tmp_path / "siglip")
    found = [tower_width(tmp_path / name) for name in ("ours", "timm", "captioner", "siglip")]
    assert found == [load_vit(tmp_path / name).dim for name in ("ours", "timm", "captioner", "siglip")]


def test_parts_that_read_a_tower_get_its_width(tmp_path: Path) -> None:
    ViT(16, 8, 20, 1, 4).save_pretrained(tmp_path)
    vision = part("weights.load_vit", source=str(tmp_path))
    inner = Namespace(
        vision=vision, adapter=part("VisualAdapter", visual_dim=192, dim=32), decoder=part("TextDecoder", cross_dim=32)
    )
    said = fit_widths(Namespace(init_args=Namespace(captioner=Namespace(init_args=inner))))
    assert said == [f"adapter.visual_dim: 20, the width of {tmp_path}'s tokens, in place of 192"]
    assert (inner.adapter.init_args.visual_dim, inner.decoder.init_args.cross_dim) == (20, 32)
    bare = Namespace(vision=vision, decoder=part("TextDecoder", cross_dim=192))
    assert len(fit_widths(bare)) == 1
    assert bare.decoder.init_args.cross_dim == 20
    assert fit_widths(bare) == []
    own = Namespace(vision=part("ViT", dim=8), decoder=part("TextDecoder", cross_dim=192))
    assert fit_widths(own) == []  # A wrong one of ours is an error, as before.


def test_pixels_are_the_towers_own_unless_told() -> None:
    vision = ViT(32, 8, 20, 1, 4)
    model = SimpleNamespace(captioner=SimpleNamespace(vision=vision))
    used = data()
    assert use_transform(model, used) == (
        "pixels: 32 x 32 px, squash, bicubic, mean 0.5 0.5 0.5, the vision encoder's own"
    )
    assert used.transform == ImageTransform(32)
    vision.transform = ImageTransform(32, "crop", (0.1, 0.2, 0.3), crop_fraction=0.9, interpolation="bilinear")
    line = use_transform(model, used)
    assert line == "pixels: 32 x 32 px, crop 0.9, bilinear, mean 0.1 0.2 0.3, the vision encoder's own"
    assert used.transform == vision.transform
    squashed = data(resize="squash")
    line = use_transform(model, squashed)
    assert squashed.transform == ImageTransform(32, "squash", (0.1, 0.2, 0.3), interpolation="bilinear")
    assert str(line).endswith("the vision encoder's own, but resize squash, as data.resize says")
    told = data(image=ImageTransform(24))
    line = use_transform(model, told)
    assert told.transform == ImageTransform(24)
    assert "as data.image says; the vision encoder's own (32 x 32 px, crop 0.9, bilinear" in str(line)
    with pytest.raises(ValueError, match=r"resize .* would have no effect beside data.image"):
        data(image=ImageTransform(24), resize="crop")


def test_recipes_of_public_towers_leave_the_pixels_to_them() -> None:
    """What their figures were measured with is what comes of their towers."""
    for name in ("caption_flickr8k", "flamingo_flickr8k", "flamingo_coco", "qformer_stage1_flickr8k"):
        text = (RECIPES / f"{name}.yaml").read_text("utf-8")
        assert "\n    image:\n" not in text
        assert "resize: squash" in text


def test_a_recipe_with_another_tower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By one key: the width, the size and the pixels of another tower than the recipe's."""
    torch.manual_seed(0)
    small: dict[str, Any] = {"img_size": 28, "depth": 1, "embed_dim": 24, "num_heads": 2, "mlp_ratio": 1.0}
    vit = timm.create_model("vit_small_patch14_dinov2", **small)
    save_vit(from_timm(vit), tmp_path / "tower")
    run = tmp_path / "run"
    words = ["--config", str(RECIPES / "caption_flickr8k.yaml"), "--config", str(RECIPES / "tiny.yaml")]
    words += [f"--model.captioner.vision.source={tmp_path / 'tower'}"]
    words += [f"--data.source={flickr_folder(tmp_path / 'flickr')}", f"--trainer.default_root_dir={run}"]
    words += [f"--data.cache_features.folder={tmp_path / 'features'}", "--model.captioner.decoder.depth=1"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = main(["fit", *words])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert f"adapter.visual_dim: 24, the width of {tmp_path / 'tower'}'s tokens, in place of 192" in out
    assert "pixels: 28 x 28 px, squash, bicubic, mean 0.485 0.456 0.406, the vision encoder's own" in out
    saved = json.loads((run / "model" / "preprocessor.json").read_text())
    assert (saved["image_size"], saved["std"]) == (28, [0.229, 0.224, 0.225])


def test_a_source_alone_says_that_the_tower_is_loaded() -> None:
    key, file = "--model.captioner.vision", ["--config", "a.yaml"]
    for word in (
        f"{key}.source=x",
        f"{key}.init_args.source=x",
        "--model.init_args.captioner.init_args.vision.source=x",
    ):
        assert with_tower([*file, word]) == [*file, f"{key}=mmtransformer.weights.load_vit", word]
    for words in (
        [*file, f"{key}=mmtransformer.weights.load_vit", f"{key}.source=x"],
        [*file, f"{key}.class_path=mine", f"{key}.source=x"],
        [*file, "--model.captioner.decoder.source=x"],
        file,
    ):
        assert with_tower(words) == words
