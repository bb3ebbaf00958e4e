"""TextToImageModel and draw: what is hidden and seen, seeds, guidance, editing, and what is refused."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from mmtransformer.backbones.diffusion_transformer import DiffusionTransformer
from mmtransformer.backbones.encoder import TextEncoder
from mmtransformer.batch import CaptionBatch
from mmtransformer.diffusion.image_generation import Edit, ImageGenerationConfig, generate_images, seeded_noise
from mmtransformer.diffusion.paths import DiffusionConfig
from mmtransformer.diffusion.text_to_image import TextToImageModel
from mmtransformer.dual_encoders.text_tower import TextTower

VOCAB, TEXT, SIDE = 23, 12, 8


def make(clip: bool = False, **changes) -> TextToImageModel:
    torch.manual_seed(0)
    if clip:
        text = TextTower(VOCAB, dim=TEXT, depth=1, num_heads=2, max_len=11, causal=False)
    else:
        text = TextEncoder(VOCAB, dim=TEXT, depth=1, num_heads=2, max_len=11, pooler=False, dropout=0.0)
    model = TextToImageModel(text, DiffusionTransformer(4, 3, 16, 2, 2, context_dim=TEXT), **changes)
    for parameter in model.transformer.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def texts() -> tuple[Tensor, Tensor]:
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] * 4 + [False]])
    return torch.randint(3, VOCAB, (3, 5), generator=torch.Generator().manual_seed(1)) * mask, mask


def batch() -> CaptionBatch:
    tokens, mask = texts()
    pixels = torch.randn(3, 1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    return CaptionBatch(tokens, mask, mask, pixels=pixels)


def loss(model: TextToImageModel, given: CaptionBatch, seed: int = 0) -> Tensor:
    return model(given, generator=torch.Generator().manual_seed(seed)).sum


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("prediction_type", ["image", "velocity", "noise"])
def test_the_loss_by_its_parts(prediction_type: str, clip: bool) -> None:
    model, given = make(clip, diffusion=DiffusionConfig(prediction_type=prediction_type)), batch()  # type: ignore[arg-type]
    found = model(given, generator=torch.Generator().manual_seed(5))
    chance, total = torch.Generator().manual_seed(5), 0.0
    times = model.diffusion.times(3, chance)
    noise = torch.randn(3, 3, SIDE, SIDE, generator=chance)
    for n in range(3):
        image, words = given.pixels[n], given.tokens[n : n + 1, given.attention_mask[n]]
        if isinstance(model.text, TextTower):
            read = model.text.forward_features(words, torch.ones_like(words, dtype=torch.bool))
        else:
            read = model.text(words)
        x = model.diffusion.noised(image, noise[n : n + 1], times[n : n + 1])
        said = model.transformer(x, times[n : n + 1], read)
        total += model.diffusion.loss(said, image, noise[n : n + 1], times[n : n + 1]).item()
    assert found.sum.item() == pytest.approx(total, rel=1e-5)
    assert int(found.count) == 3


def test_texts_that_share_an_image_are_drawn_each_by_itself() -> None:
    model, given = make(), batch()
    shared = replace(given, pixels=given.pixels[:1])
    spread = replace(given, pixels=given.pixels[:1].expand(3, -1, -1, -1, -1))
    assert torch.equal(loss(model, shared), loss(model, spread))


def test_texts_are_hidden_in_training_only() -> None:
    model, given = make(text_dropout_prob=0.999), batch()
    other = replace(given, tokens=given.tokens.roll(1, 0), attention_mask=given.attention_mask)
    assert loss(model, given) != loss(model, other)
    model.train()
    assert torch.equal(loss(model, given), loss(model, other))


def test_a_frozen_text_encoder_stays_as_it_is() -> None:
    model = make(freeze_text=True).train()
    assert not model.text.training
    loss(model, batch()).backward()
    assert all(p.grad is None for p in model.text.parameters())
    assert all(p.grad is not None for p in model.transformer.parameters())


@pytest.mark.parametrize("solver", ["euler", "heun", "dpm"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_an_image_is_the_same_alone_and_among_others(solver: str, scale: float) -> None:
    model, (tokens, mask) = make(), texts()
    config = ImageGenerationConfig(5, scale, solver)  # type: ignore[arg-type]
    whole = generate_images(model, tokens, mask, seeded_noise([4, 5, 6], (3, SIDE, SIDE)), config)
    alone = generate_images(model, tokens[1:2, :3], mask[1:2, :3], seeded_noise([5], (3, SIDE, SIDE)), config)
    torch.testing.assert_close(whole[1:2], alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(whole[0], whole[1], atol=0.1)


def test_guidance_by_definition() -> None:
    """One Euler step from pure noise gives the clean image: unconditional + scale (conditional - unconditional)."""
    model, (tokens, mask) = make(), texts()
    noise, ones = seeded_noise([1, 2, 3], (3, SIDE, SIDE)), torch.ones(3)
    context = model.text(tokens, attention_mask=mask)
    said = model.transformer(noise, ones, context, context_mask=mask)
    silent = model.transformer(noise, ones, context, context_mask=torch.zeros_like(mask))
    for scale in (0.0, 1.0, 2.5):
        found = generate_images(model, tokens, mask, noise, ImageGenerationConfig(1, scale, "euler"))
        torch.testing.assert_close(found, silent + scale * (said - silent), atol=1e-4, rtol=1e-4)
    away = torch.tensor([[4, 5]]), torch.ones(1, 2, dtype=torch.bool)
    found = generate_images(model, tokens, mask, noise, ImageGenerationConfig(1, 2.5, "euler"), negative=away)
    other = model.transformer(noise, ones, model.text(away[0]).expand(3, -1, -1))
    torch.testing.assert_close(found, other + 2.5 * (said - other), atol=1e-4, rtol=1e-4)


def test_looking_changes_nothing_and_modes_come_back() -> None:
    model, (tokens, mask) = make().train(), texts()
    model.text.eval()
    noise, looks = seeded_noise([1, 2, 3], (3, SIDE, SIDE)), []
    found = generate_images(
        model, tokens, mask, noise, ImageGenerationConfig(4), on_step=lambda k, image: looks.append((k, image.clone()))
    )
    assert torch.equal(found, generate_images(model, tokens, mask, noise, ImageGenerationConfig(4)))
    assert [k for k, _ in looks] == [1, 2, 3, 4]
    assert torch.equal(looks[-1][1], found)
    assert model.training
    assert not model.text.training


def test_what_is_outside_the_mask_stays() -> None:
    model, (tokens, mask) = make(), texts()
    images, noise = batch().pixels[:, 0], seeded_noise([1, 2, 3], (3, SIDE, SIDE))
    where = torch.zeros(3, 1, SIDE, SIDE, dtype=torch.bool)
    where[..., :4] = True
    found = generate_images(model, tokens, mask, noise, ImageGenerationConfig(4), edit=Edit(images, 1.0, where))
    assert torch.equal(found[..., 4:], images[..., 4:])
    assert (found[..., :4] - images[..., :4]).abs().mean() > 0.1


def test_little_strength_changes_little() -> None:
    """With a network that knows the image, what SDEdit begins with is what it ends with."""
    model, (tokens, mask) = make(), texts()
    images, noise = batch().pixels[:, 0], seeded_noise([1, 2, 3], (3, SIDE, SIDE))
    model.transformer.forward = lambda x, *_, **__: images.repeat(len(x) // 3, 1, 1, 1)  # type: ignore[method-assign]
    for strength in (0.1, 0.7, 1.0):
        found = generate_images(model, tokens, mask, noise, ImageGenerationConfig(6), edit=Edit(images, strength))
        torch.testing.assert_close(found, images, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: ImageGenerationConfig(0), "num_inference_steps must be a whole number from 1, not 0"),
        (lambda: ImageGenerationConfig(-3), "num_inference_steps"),
        (
            lambda: ImageGenerationConfig(guidance_scale=float("nan")),
            "guidance_scale must be between 0 and 1000, not nan",
        ),
        (lambda: ImageGenerationConfig(guidance_scale=1e9), "guidance_scale"),
        (lambda: ImageGenerationConfig(solver="rk4"), 'solver must be one of euler, heun, dpm, not "rk4"'),  # type: ignore[arg-type]
        (lambda: ImageGenerationConfig(time_shift=0.0), "time_shift"),
        (lambda: Edit(torch.zeros(1, 3, 8, 8), 0.0), "strength must be above 0 and at most 1, not 0"),
        (lambda: make(text_dropout_prob=1.0), r"text_dropout_prob \(1.0\)"),
        (
            lambda: TextToImageModel(
                TextEncoder(9, dim=12, depth=1, num_heads=2), DiffusionTransformer(dim=12, depth=1, num_heads=2)
            ),
            r"reads texts of width None \(context_dim\), but the text encoder writes 12",
        ),
        (
            lambda: generate_images(
                make(), *texts(), torch.zeros(3, 3, 8, 8), ImageGenerationConfig(2, 1.0), negative=texts()
            ),
            "a negative text has no effect at guidance_scale 1",
        ),
        (
            lambda: generate_images(make(), *texts(), torch.zeros(3, 3, 9, 8)),
            "images of 9 x 8 are not divided by the patch of 4",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(make_it, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_it()
