"""HFAutoencoder: diffusers' AutoencoderKL as it is, frozen, and a model that draws its latents."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmtransformer import (
    CaptionBatch,
    DiffusionTransformer,
    HFAutoencoder,
    ImageGenerationConfig,
    ImageGenerator,
    ImageTransform,
    TextEncoder,
    TextToImageModel,
    Tokenizer,
)
from mmtransformer.weights import load_autoencoder
from support.latents import SMALL, autoencoder


def test_latents_are_those_of_diffusers_shifted_and_scaled() -> None:
    found = autoencoder()
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        mean = found.model.encode(images).latent_dist.mean
        again = found.model.decode(mean).sample
    latents = found.encode(images)
    assert latents.shape == (2, 4, 4, 6)
    torch.testing.assert_close(latents, (mean - 0.2) * 0.3)
    torch.testing.assert_close(found.decode(latents), again, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="images of 16 x 18 are not divided by the autoencoder's 4"):
        found.encode(images[..., :18])


def test_a_folder_of_diffusers_and_what_is_wrong_with_one(tmp_path: Path) -> None:
    found = autoencoder()
    found.model.save_pretrained(tmp_path / "pipeline" / "vae")
    for source in (tmp_path / "pipeline", tmp_path / "pipeline" / "vae"):
        again = load_autoencoder(source)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), found.parameters(), strict=True))
        assert (again.factor, again.scale, again.shift) == (4, 0.3, 0.2)
    with pytest.raises(ValueError, match='the config is of a "AutoencoderDC", and HFAutoencoder holds AutoencoderKL'):
        HFAutoencoder({"_class_name": "AutoencoderDC"})
    with pytest.raises(ValueError, match="cannot build this AutoencoderKL"):
        HFAutoencoder(SMALL | {"norm_num_groups": 5})
    config = tmp_path / "pipeline" / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | {"latent_channels": 3}), "utf-8")
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors does not fit AutoencoderKL"):
        load_autoencoder(tmp_path / "pipeline")


def test_without_diffusers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"HFAutoencoder needs diffusers, .* \(the extra \"draw\"; docs/install.md\)"):
        HFAutoencoder(SMALL)


def model(channels: int = 4) -> TextToImageModel:
    frozen = autoencoder()
    torch.manual_seed(1)
    text = TextEncoder(300, dim=12, depth=1, num_heads=2, max_len=20, pooler=False, dropout=0.0)
    transformer = DiffusionTransformer(2, channels, 16, 1, 2, context_dim=12)
    assert transformer.head is not None
    torch.nn.init.normal_(transformer.head.weight, std=0.3)
    return TextToImageModel(text, transformer, autoencoder=frozen)


def test_a_model_trains_on_latents_and_leaves_the_autoencoder_alone() -> None:
    trained = model().train()
    assert trained.autoencoder is not None
    assert not trained.autoencoder.model.training
    tokens = torch.randint(3, 300, (2, 5))
    pixels = torch.rand(2, 1, 3, 16, 24) * 2 - 1
    batch = CaptionBatch(tokens, tokens > 0, tokens > 0, pixels=pixels)
    chance = torch.Generator().manual_seed(3)
    found = trained(batch, generator=chance)
    bare = TextToImageModel(trained.text, trained.transformer).train()
    latents = CaptionBatch(tokens, tokens > 0, tokens > 0, pixels=trained.encode(pixels[:, 0])[:, None])
    assert torch.equal(found.sum, bare(latents, generator=torch.Generator().manual_seed(3)).sum)
    found.sum.backward()
    assert all(p.grad is None for p in trained.autoencoder.parameters())
    assert trained.transformer.head is not None
    assert trained.transformer.head.weight.grad is not None
    with pytest.raises(ValueError, match=r"draws 3 channels \(in_channels\), but the autoencoder's latents have 4"):
        model(3)


def test_pictures_are_drawn_edited_and_saved(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["a large red star", "큰 빨간 별"], 300, languages=["en", "ko"])
    painter = ImageGenerator(model(), tokenizer, ImageTransform(32), generation=ImageGenerationConfig(2), device="cpu")
    ((image,),) = painter("a large red star")
    assert image.size == (32, 32)
    _, words, heat = painter.heatmap("a large red star")
    assert heat.shape == (2, len(words), 4, 4)
    white, half = Image.new("RGB", (32, 32), "#ffffff"), Image.new("RGB", (32, 32))
    half.paste("#ffffff", (0, 0, 16, 32))
    ((changed,),) = painter("a large red star", image=white, strength=0.5, mask_image=half)
    assert changed.size == (32, 32)
    painter.save_pretrained(tmp_path)
    again = ImageGenerator.from_pretrained(tmp_path, device="cpu")
    assert again("a large red star")[0][0].tobytes() == image.tobytes()
    with pytest.raises(ValueError, match="pictures of 36 x 36 px are not divided by the model's patches of 8 px"):
        ImageGenerator(model(), tokenizer, ImageTransform(36), device="cpu")
    with pytest.raises(ValueError, match=r"the autoencoder takes pixels in \[-1, 1\]"):
        ImageGenerator(model(), tokenizer, ImageTransform(32, mean=(0.4, 0.5, 0.5)), device="cpu")
