"""ImageGenerator: pictures of texts and seeds, words' heat, folders, the strip, the command line, refusals."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

from mmtransformer import (
    DiffusionTransformer,
    ImageGenerationConfig,
    ImageGenerator,
    ImageTransform,
    TextEncoder,
    Tokenizer,
)
from mmtransformer.cli import main
from mmtransformer.diffusion.solvers import Solver
from mmtransformer.diffusion.text_to_image import TextToImageModel
from mmtransformer.plots.strips import save_strip

TEXTS = ["a large red star", "작은 파란 원 두 개", "a red heart"]


@pytest.fixture(scope="module")
def painter() -> ImageGenerator:
    torch.manual_seed(0)
    tokenizer = Tokenizer.train([*TEXTS, "left of a"], 300, languages=["en", "ko"])
    text = TextEncoder(tokenizer.vocab_size, dim=12, depth=1, num_heads=2, max_len=40, pooler=False, dropout=0.0)
    model = TextToImageModel(text, DiffusionTransformer(8, 3, 16, 2, 2, context_dim=12))
    for parameter in model.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return ImageGenerator(model, tokenizer, ImageTransform((16, 24)), generation=ImageGenerationConfig(3), device="cpu")


def same(a: Image.Image, b: Image.Image) -> bool:
    """But for rounding of what is computed in batches of another size."""
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max()) <= 1


def test_a_text_and_a_seed_make_one_picture(painter: ImageGenerator) -> None:
    drawn = painter(TEXTS, num_images=2, seed=5)
    assert [len(images) for images in drawn] == [2, 2, 2]
    assert drawn[0][0].size == (24, 16)
    again = painter(TEXTS, num_images=2, seed=5, batch_size=4)
    assert all(same(a, b) for one, other in zip(drawn, again, strict=True) for a, b in zip(one, other, strict=True))
    assert same(painter(TEXTS[1], seed=6)[0][0], drawn[1][1])
    assert not same(drawn[1][0], drawn[1][1])
    several = painter(TEXTS, seed=[5, 6, 7])
    assert same(several[2][0], painter(TEXTS[2], seed=7)[0][0])


def test_a_call_takes_single_settings(painter: ImageGenerator) -> None:
    seen: list[int] = []
    drawn = painter(TEXTS[0], num_inference_steps=2, guidance_scale=1.0, on_step=lambda k, _: seen.append(k))[0][0]
    assert seen == [1, 2]
    whole = replace(painter.generation, num_inference_steps=2, guidance_scale=1.0)
    assert same(drawn, painter(TEXTS[0], generation=whole)[0][0])
    assert len(painter.heatmap(TEXTS[0], num_inference_steps=2)[2]) == 2
    for word, meant in (("steps", "num_inference_steps"), ("cfg", "guidance_scale"), ("generator", "seed")):
        with pytest.raises(TypeError, match=f'ImageGenerationConfig has no "{word}"; did you mean "{meant}"'):
            painter(TEXTS[0], **{word: 1})
    with pytest.raises(TypeError, match=r"generation must be of ImageGenerationConfig\(num_inference_steps, "):
        painter(TEXTS[0], generation={"num_inference_steps": 2})  # pyright: ignore[reportArgumentType]


def test_the_language_is_found_by_the_letters(painter: ImageGenerator) -> None:
    korean = painter(TEXTS[1], seed=1)[0][0]
    assert same(korean, painter(TEXTS[1], language="ko", seed=1)[0][0])
    assert not same(korean, painter(TEXTS[1], language="en", seed=1)[0][0])


def test_pixels_are_the_transforms_colours(painter: ImageGenerator) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8))
    (back,) = painter._images(painter.transform(image)[None])
    assert same(image, back)


def test_each_word_has_its_heat(painter: ImageGenerator) -> None:
    image, words, heat = painter.heatmap(TEXTS[0], seed=3)
    assert words == ["a", "large", "red", "star"]
    assert heat.shape == (3, 4, 2, 3)  # of each step
    assert (heat >= 0).all()
    assert not torch.equal(heat[0], heat[1])
    assert (heat.sum(1) < 1).all()  # the rest looked at the prompt and the end
    assert same(image, painter(TEXTS[0], seed=3)[0][0])


def test_the_heat_is_of_the_picture_that_is_drawn(
    painter: ImageGenerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, mask = tmp_path / "start.png", tmp_path / "mask.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)).save(start)
    Image.new("L", (24, 16), 255).save(mask)
    how = {"negative_prompt": f"{TEXTS[0]} {TEXTS[0]}", "image": start, "strength": 0.5, "mask_image": mask}
    plain = painter.heatmap(TEXTS[0], seed=3)
    for some in (how, {"negative_prompt": TEXTS[2]}, {"image": start}):
        image, words, heat = painter.heatmap(TEXTS[0], seed=3, **some)  # pyright: ignore[reportArgumentType]
        assert same(image, painter(TEXTS[0], seed=3, **some)[0][0])  # pyright: ignore[reportArgumentType]
        assert (words, heat.shape) == (plain[1], plain[2].shape)
        assert not torch.equal(heat, plain[2])
    seen: list[Image.Image] = []
    painter.save_pretrained(tmp_path / "model")
    heatmap = ImageGenerator.heatmap
    monkeypatch.setattr(
        ImageGenerator, "heatmap", lambda *args, **some: seen.append(heatmap(*args, **some)[0]) or plain
    )
    options = ["--negative-prompt", how["negative_prompt"], "--image", str(start), "--strength", "0.5"]
    options += ["--mask-image", str(mask), "--seed", "3", "--device", "cpu", "--model", str(tmp_path / "model")]
    places = ["--out", str(tmp_path / "a.png"), "--heatmap", str(tmp_path / "heat.png")]
    assert main(["draw", TEXTS[0], *map(str, options), *places]) == 0
    assert same(seen[0], Image.open(tmp_path / "a.png"))


def test_what_stays_outside_the_mask(painter: ImageGenerator) -> None:
    start = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8))
    mask = Image.new("L", (24, 16))
    mask.paste(255, (0, 0, 12, 16))
    drawn = np.asarray(painter(TEXTS[0], image=start, strength=1.0, mask_image=mask)[0][0], int)
    assert np.abs(drawn[:, 12:] - np.asarray(start, int)[:, 12:]).max() <= 1
    assert np.abs(drawn[:, :12] - np.asarray(start, int)[:, :12]).mean() > 10


def test_it_is_the_same_from_its_folder(painter: ImageGenerator, tmp_path: Path) -> None:
    painter.save_pretrained(tmp_path / "model", card="scores")
    loaded = ImageGenerator.from_pretrained(tmp_path / "model", device="cpu")
    assert loaded.generation == painter.generation
    assert np.array_equal(np.asarray(loaded(TEXTS[0])[0][0]), np.asarray(painter(TEXTS[0])[0][0]))
    assert "text-to-image" in (tmp_path / "model" / "README.md").read_text("utf-8")
    settings = tmp_path / "model" / "generation_config.json"
    settings.write_text(json.dumps({"solver": "rk4"}), "utf-8")
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        ImageGenerator.from_pretrained(tmp_path / "model")


def test_the_command(painter: ImageGenerator, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    painter.save_pretrained(tmp_path / "model")
    out, strip, heat = (tmp_path / name for name in ("out/p.png", "strip.gif", "heat.png"))
    words = [
        TEXTS[1],
        "--model",
        str(tmp_path / "model"),
        "--out",
        str(out),
        "--num-images",
        "2",
        "--num-inference-steps",
        "4",
    ]
    assert main(["draw", *words, "--strip", str(strip), "--heatmap", str(heat), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.split() == [str(out), str(out.with_name("p-2.png"))]
    with Image.open(strip) as film:
        assert getattr(film, "n_frames", 1) == 4
    assert heat.stat().st_size > 1000
    assert main(["draw", TEXTS[0], "--model", str(tmp_path / "model"), "--num-inference-steps", "0"]) == 2
    assert "num_inference_steps must be a whole number from 1, not 0" in capsys.readouterr().err


def test_the_help_names_every_solver(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["draw", "--help"])
    assert f"--solver {{{','.join(get_args(Solver))}}}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-inference-steps", "-3"], "num_inference_steps must be a whole number from 1, not -3"),
        (["--guidance-scale", "1e9"], "guidance_scale must be between 0 and 1000, not 1000000000.0"),
        (["--guidance-scale", "nan"], "guidance_scale must be between 0 and 1000, not nan"),
        (["--guidance-scale", "-1"], "guidance_scale must be between 0 and 1000, not -1.0"),
        (["--solver", "rk4"], "invalid choice: 'rk4'"),
        (["--strength", "0.5"], "need a picture to begin with: --image IMAGE"),
        (["--negative-prompt", "a heart", "--guidance-scale", "1"], "has no effect at guidance_scale 1"),
        (["--num-images", "0"], "num_images must be a whole number, at least 1, not 0"),
        (["a large red star " * 20], "the model reads 40: shorten it"),
    ],
)
def test_the_command_refuses(
    painter: ImageGenerator, words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    painter.save_pretrained(tmp_path / "model")
    out = tmp_path / "p.png"
    with contextlib.suppress(SystemExit):
        assert main(["draw", TEXTS[0], *words, "--model", str(tmp_path / "model"), "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_no_guidance_at_all_draws_without_the_text(painter: ImageGenerator) -> None:
    plain = replace(painter.generation, guidance_scale=0.0)
    assert same(painter(TEXTS[0], seed=2, generation=plain)[0][0], painter(TEXTS[2], seed=2, generation=plain)[0][0])


def test_a_strip_of_many_steps_shows_twelve(tmp_path: Path) -> None:
    images = [Image.new("RGB", (6, 4), (k, 0, 0)) for k in range(30)]
    with Image.open(save_strip(images, tmp_path / "a.png", side=8)) as sheet:
        assert sheet.size == (12 * 16 - 4, 8)
        assert sheet.getpixel((sheet.width - 1, 0)) == (29, 0, 0)
    with pytest.raises(ValueError, match=r"a strip of 0 steps"):
        save_strip([], tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"\.png or \.gif"):
        save_strip(images, tmp_path / "a.jpg")


def test_what_cannot_be_drawn_is_refused(painter: ImageGenerator) -> None:
    with pytest.raises(ValueError, match="the model reads 40: shorten it"):
        painter("a large red star " * 20)
    for argument in ({"mask_image": Image.new("L", (4, 4))}, {"strength": 0.1}):
        with pytest.raises(ValueError, match=f"{next(iter(argument))} is of a picture to begin with: give image too"):
            painter(TEXTS[0], **argument)
    for seed in ("a", None, True, [1, 2.5, 3]):
        with pytest.raises(ValueError, match="seed must be a whole number, or a list of one a text"):
            painter(TEXTS, seed=seed)  # pyright: ignore[reportArgumentType]
    for texts in (3, ["a red star", 3]):
        with pytest.raises(ValueError, match="texts must be a text, or a list of them, not 3"):
            painter(texts)  # pyright: ignore[reportArgumentType]
    for call in (lambda: painter.heatmap(["a"]), lambda: painter("a", negative_prompt=3)):  # pyright: ignore
        with pytest.raises(ValueError, match=r"is one text here, not (\['a'\]|3)"):
            call()
    with pytest.raises(ValueError, match="2 seeds for 3 texts"):
        painter(TEXTS, seed=[1, 2])
    with pytest.raises(ValueError, match="16 x 20 px are not divided"):
        ImageGenerator(painter.model, painter.tokenizer, ImageTransform((16, 20)))
