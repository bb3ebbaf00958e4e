"""A recipe takes a public vision encoder by one key: widths, sizes and pixels follow, and are said."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from jsonargparse import Namespace
from PIL import Image

from mmtransformer import (
    ConcatViT,
    ImageCaptioner,
    ImageIndex,
    ImageTextEmbedder,
    ImageTransform,
    NativeSize,
    TextDecoder,
    VisionEncoderDecoder,
    ViT,
    ViTBlockConfig,
    ViTPatchConfig,
)
from mmtransformer.cli import main
from mmtransformer.cli.recipes import with_tower
from mmtransformer.data.captions import CaptionData
from mmtransformer.data.scenes.scenes import Scenes
from mmtransformer.images import load
from mmtransformer.training.tasks.data_checks import check_pixels
from mmtransformer.training.tasks.towers import fit_widths, use_transform
from mmtransformer.weights import from_timm, load_vit, save_timm
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
    save_timm(vit, tmp_path / "timm")
    VisionEncoderDecoder(vit, TextDecoder(31, 24, 1, 4, context_dim=20)).save_pretrained(tmp_path / "captioner")
    sizes: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3}
    transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes)).save_pretrained(tmp_path / "siglip")
    found = [tower_width(tmp_path / name) for name in ("ours", "timm", "captioner", "siglip")]
    assert found == [load_vit(tmp_path / name).dim for name in ("ours", "timm", "captioner", "siglip")]


def test_parts_that_read_a_tower_get_its_width(tmp_path: Path) -> None:
    ViT(16, 8, 20, 1, 4).save_pretrained(tmp_path)
    vision = part("weights.load_vit", source=str(tmp_path))
    inner = Namespace(
        vision=vision,
        connector=part("TransformerConnector", visual_dim=192, dim=32),
        decoder=part("TextDecoder", context_dim=32),
    )
    said = fit_widths(Namespace(init_args=Namespace(captioner=Namespace(init_args=inner))))
    assert said == [f"connector.visual_dim: 20, the width of {tmp_path}'s tokens, in place of 192"]
    assert (inner.connector.init_args.visual_dim, inner.decoder.init_args.context_dim) == (20, 32)
    flamingo = Namespace(vision=vision, connector=part("PerceiverResampler", dim=192), decoder=part("HFDecoder"))
    assert fit_widths(flamingo) == [f"connector.dim: 20, the width of {tmp_path}'s tokens, in place of 192"]
    llava = Namespace(vision=vision, projector=part("MLPProjector", visual_dim=192), decoder=part("HFDecoder"))
    assert fit_widths(llava) == [f"projector.visual_dim: 20, the width of {tmp_path}'s tokens, in place of 192"]
    bare = Namespace(vision=vision, decoder=part("TextDecoder", context_dim=192))
    assert len(fit_widths(bare)) == 1
    assert bare.decoder.init_args.context_dim == 20
    assert fit_widths(bare) == []
    own = Namespace(vision=part("ViT", dim=8), decoder=part("TextDecoder", context_dim=192))
    assert fit_widths(own) == []  # A wrong one of ours is an error, as before.


def test_pixels_are_the_towers_own_unless_told() -> None:
    vision = ViT(32, 8, 20, 1, 4)
    model = SimpleNamespace(captioner=SimpleNamespace(vision=vision))
    used = data()
    default = "the default; the vision encoder (the folder that it is loaded from) does not say"
    assert use_transform(model, used) == f"pixels: 32 x 32 px, squash, bicubic, mean 0.5 0.5 0.5, {default}"
    assert used.transform == ImageTransform(32)
    vision.transform = ImageTransform(32, "crop", (0.1, 0.2, 0.3), crop_fraction=0.9, interpolation="bilinear")
    line = use_transform(model, used)
    assert line == "pixels: 32 x 32 px, crop 0.9, bilinear, mean 0.1 0.2 0.3, the vision encoder's own"
    assert used.transform == vision.transform
    squashed = data(resize="squash")
    line = use_transform(model, squashed)
    assert squashed.transform == ImageTransform(32, "squash", (0.1, 0.2, 0.3), interpolation="bilinear")
    assert str(line).endswith("the vision encoder's own, but resize squash, as data.resize says")
    told = data(transform=ImageTransform(24))
    line = use_transform(model, told)
    assert told.transform == ImageTransform(24)
    assert "as data.transform says; the vision encoder's own (32 x 32 px, crop 0.9, bilinear" in str(line)
    with pytest.raises(ValueError, match=r"resize .* would have no effect beside data.transform"):
        data(transform=ImageTransform(24), resize="crop")


def test_recipes_of_public_towers_leave_the_pixels_to_them() -> None:
    """What their figures were measured with is what comes of their towers."""
    for name in ("caption_flickr8k", "flamingo_flickr8k", "flamingo_coco", "qformer_stage1_flickr8k", "clip_flickr8k"):
        text = (RECIPES / f"{name}.yaml").read_text("utf-8")
        assert "\n    image:\n" not in text
        assert "resize: squash" in text


def test_a_recipe_with_another_tower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By one key: the width, the size and the pixels of another tower than the recipe's."""
    torch.manual_seed(0)
    small: dict[str, Any] = {"img_size": 28, "depth": 1, "embed_dim": 24, "num_heads": 2, "mlp_ratio": 1.0}
    vit = timm.create_model("vit_small_patch14_dinov2", **small)
    save_timm(from_timm(vit), tmp_path / "tower")
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
    assert f"connector.visual_dim: 24, the width of {tmp_path / 'tower'}'s tokens, in place of 192" in out
    assert "pixels: 28 x 28 px, squash, bicubic, mean 0.485 0.456 0.406, the vision encoder's own" in out
    saved = json.loads((run / "model" / "preprocessor.json").read_text())
    assert (saved["image_size"], saved["std"]) == (28, [0.229, 0.224, 0.225])


def mixed_folder(path: Path) -> Path:
    """Pictures of several shapes, each with a caption in a file of its name."""
    path.mkdir()
    for i, size in enumerate([(60, 40), (40, 60), (33, 90), (20, 20), (90, 33), (48, 48), (24, 56), (56, 24)]):
        Image.effect_noise(size, 80.0).convert("RGB").save(path / f"{i}.png")
        (path / f"{i}.txt").write_text(f"a grey picture number {i} of some noise", "utf-8")
    return path


def fitted(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = main(words)
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def test_a_clip_with_another_tower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By one key, in a recipe that has a ViT of its own and in one that loads one: pixels are the tower's, and said."""
    torch.manual_seed(0)
    small: dict[str, Any] = {"img_size": 28, "depth": 1, "embed_dim": 24, "num_heads": 2, "mlp_ratio": 1.0}
    save_timm(from_timm(timm.create_model("vit_small_patch14_dinov2", **small)), tmp_path / "tower")
    words = ["fit", "--config", str(RECIPES / "clip_flickr8k.yaml"), "--config", str(RECIPES / "tiny.yaml")]
    words += [f"--model.model.vision.source={tmp_path / 'tower'}", f"--trainer.default_root_dir={tmp_path / 'run'}"]
    words += [f"--data.source={flickr_folder(tmp_path / 'flickr')}"]
    out = fitted([*words, f"--data.cache_features.folder={tmp_path / 'features'}"], capsys)
    line = "pixels: 28 x 28 px, squash, bicubic, mean 0.485 0.456 0.406, the vision encoder's own, but resize squash"
    assert line in out
    saved = json.loads((tmp_path / "run" / "model" / "preprocessor.json").read_text())
    assert (saved["image_size"], saved["resize"], saved["std"]) == (28, "squash", [0.229, 0.224, 0.225])
    told = [word.replace(str(tmp_path / "run"), str(tmp_path / "told")) for word in words]
    told += ["--data.resize=null", "--data.transform.image_size=14", "--data.cache_features=null"]
    out = fitted(told, capsys)
    assert (
        "pixels: 14 x 14 px, squash, bicubic, mean 0.5 0.5 0.5, as data.transform says; the vision encoder's own" in out
    )
    again = ["fit", "--config", str(RECIPES / "finetune_clip.yaml"), "--config", str(RECIPES / "tiny.yaml")]
    again += [f"--model.init={tmp_path / 'run' / 'model'}", words[-1], f"--trainer.default_root_dir={tmp_path / 'ft'}"]
    fitted(again, capsys)
    assert json.loads((tmp_path / "ft" / "model" / "preprocessor.json").read_text()) == saved
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main([*again, "--data.transform.image_size=14", f"--trainer.default_root_dir={tmp_path / 'no'}"]) != 0
    assert (
        "data.transform would have no effect: the model that is trained on reads pictures as" in capsys.readouterr()[1]
    )


def test_a_contrast_on_native_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By one key of the data, in batches of so many patches; found again, searched, fine-tuned."""
    pictures, run = mixed_folder(tmp_path / "pictures"), tmp_path / "run"
    tower = ["--model.model.vision=mmtransformer.ViT", "--model.model.vision.dim=24", "--model.model.vision.depth=1"]
    tower += [f"--model.model.vision.{name}" for name in ("num_heads=3", "image_size=32", "patch_size=8")]
    base = ["fit", "--config", str(RECIPES / "clip_flickr8k.yaml"), "--config", str(RECIPES / "tiny.yaml")]
    words = [*base, *tower, f"--data.source={pictures}", f"--trainer.default_root_dir={run}"]
    words += ["--data.cache_features=null", "--data.resize=native", "--data.loader.max_patches_per_batch=50"]
    out = fitted(words, capsys)
    assert "pixels: native size, at most 16 patches of 8 px, bicubic, mean 0.5 0.5 0.5, the default; the vision" in out
    saved = json.loads((run / "model" / "preprocessor.json").read_text())
    assert saved["native"] == {"patch_size": 8, "max_num_patches": 16, "enlarge": True}
    encoder = ImageTextEmbedder.from_pretrained(run / "model", device="cpu")
    files = sorted(pictures.glob("*.png"))
    vectors = encoder.encode_images(files)
    for file, vector in zip(files, vectors, strict=True):
        torch.testing.assert_close(encoder.encode_images(file)[0], vector, atol=1e-6, rtol=1e-5)
        pixels = encoder.transform(load(file))
        assert pixels.shape[1] // 8 * (pixels.shape[2] // 8) <= 16
        torch.testing.assert_close(F.normalize(encoder.model.encode_image(pixels[None]))[0], vector)
    index = ImageIndex.build(encoder, [pictures], path=tmp_path / "index.safetensors")
    torch.testing.assert_close(index.contents.embeddings.float(), vectors, atol=1e-3, rtol=1e-3)
    assert encoder.classify(files[:2], ["grey", "red"])
    again = ["fit", "--config", str(RECIPES / "finetune_clip.yaml"), "--config", str(RECIPES / "tiny.yaml")]
    again += [f"--model.init={run / 'model'}", f"--data.source={pictures}"]
    fitted([*again, f"--trainer.default_root_dir={tmp_path / 'again'}"], capsys)
    assert ImageTextEmbedder.from_pretrained(tmp_path / "again" / "model", device="cpu").transform == encoder.transform


def test_a_captioner_on_native_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A NaFlex tower of SigLIP 2 by one key; its pictures keep their shapes in training, validation and use."""
    pictures, run = mixed_folder(tmp_path / "pictures"), tmp_path / "run"
    sizes: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "patch_size": 8}
    config = transformers.Siglip2VisionConfig(**sizes, intermediate_size=29, num_patches=16)
    transformers.Siglip2VisionModel(config).save_pretrained(tmp_path / "tower")
    processor: Any = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=20)
    processor.save_pretrained(tmp_path / "tower")
    base = ["fit", "--config", str(RECIPES / "caption_flickr8k.yaml"), "--config", str(RECIPES / "tiny.yaml")]
    words = [*base, f"--model.captioner.vision.source={tmp_path / 'tower'}", "--model.captioner.decoder.depth=1"]
    words += [f"--data.source={pictures}", f"--trainer.default_root_dir={run}", "--data.resize=null"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(words) != 0
    assert "cache_features keeps the tokens of pictures of one size" in capsys.readouterr()[1]
    out = fitted([*words, "--data.cache_features=null", "--model.captioner.connector.token_dropout=0"], capsys)
    assert (
        "pixels: native size, at most 20 patches of 8 px, bilinear, mean 0.5 0.5 0.5, the vision encoder's own" in out
    )
    captioner = ImageCaptioner.from_pretrained(run / "model", device="cpu")
    files = sorted(pictures.glob("*.png"))
    together = captioner(files, max_new_tokens=5)
    assert [rows[0].tokens for rows in together] == [captioner(file, max_new_tokens=5)[0][0].tokens for file in files]
    heat = captioner.heatmap(files[2], together[2][0])
    assert heat.shape[1:] == (4, 4)
    assert (run / "gallery.png").exists()


@pytest.mark.parametrize(
    ("options", "image", "message"),
    [
        ({}, {"native": NativeSize(16)}, "patches of 16 px, and the vision encoder reads patches of 8 px"),
        ({"patches": ViTPatchConfig(stem="conv")}, {"native": NativeSize(8)}, "a ViT that cuts patches and does not"),
        ({"block": ViTBlockConfig(drop_path=0.1)}, {"native": NativeSize(8)}, r"drop_path \(0.1\) are drawn for a row"),
    ],
)
def test_pictures_of_native_size_that_a_tower_cannot_read(options: Any, image: Any, message: str) -> None:
    pictures = data(transform=ImageTransform(resize="native", **image))
    model = SimpleNamespace(vision=ViT(32, 8, 20, 1, 4, **options))
    with pytest.raises(ValueError, match=message):
        check_pixels(pictures, model)
    joined = SimpleNamespace(vision=ConcatViT(ViT(32, 8, 20, 1, 4)))
    with pytest.raises(ValueError, match="a ViT that cuts patches"):
        check_pixels(pictures, joined)
    model = SimpleNamespace(vision=ViT(32, 8, 20, 1, 4), unsupported_fields=("patch_grids",))
    with pytest.raises(ValueError, match="a SimpleNamespace does not read pictures of native size"):
        check_pixels(pictures, model)


@pytest.mark.parametrize("part", ["captioner", "model"])
def test_a_source_alone_says_that_the_tower_is_loaded(part: str) -> None:
    key, file = f"--model.{part}.vision", ["--config", "a.yaml"]
    for word in (f"{key}.source=x", f"{key}.init_args.source=x", f"--model.init_args.{part}.init_args.vision.source=x"):
        assert with_tower([*file, word]) == [*file, f"{key}=mmtransformer.weights.load_vit", word]
    for words in (
        [*file, f"{key}=mmtransformer.weights.load_vit", f"{key}.source=x"],
        [*file, f"{key}.class_path=mine", f"{key}.source=x"],
        [*file, "--model.captioner.decoder.source=x"],
        file,
    ):
        assert with_tower(words) == words
