"""A captioner as a second reader: the distance of clouds by its definition, and drawings against true pictures."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mmtransformer import (
    ImageCaptioner,
    ImageTransform,
    TextDecoder,
    Tokenizer,
    VisionEncoderDecoder,
    ViT,
    ViTBlockConfig,
)
from mmtransformer.data.scenes.scenes import Scenes
from mmtransformer.training.evaluation.second_reader import frechet, read_by_captioner


def clouds(n: int, m: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    chance = np.random.default_rng(0)
    return chance.normal(size=(n, d)) @ chance.normal(size=(d, d)) + 1, chance.normal(size=(m, d)) * 2


@pytest.mark.parametrize(("n", "m", "d"), [(50, 70, 4), (40, 40, 1)])
def test_the_distance_by_its_definition(n: int, m: int, d: int) -> None:
    a, b = clouds(n, m, d)
    one, two = (torch.from_numpy(np.atleast_2d(np.cov(cloud.T))) for cloud in (a, b))
    values, vectors = torch.linalg.eigh(one)
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    crossed = torch.linalg.eigvalsh(root @ two @ root).clamp(min=0).sqrt().sum()
    want = float(((a.mean(0) - b.mean(0)) ** 2).sum()) + float(one.trace() + two.trace() - 2 * crossed)
    assert frechet(a, b) == pytest.approx(want, rel=1e-8)
    assert frechet(a, b) == pytest.approx(frechet(b, a))


def test_the_distance_of_a_cloud_from_itself_and_from_where_it_is_moved() -> None:
    a, _ = clouds(30, 2, 5)
    assert frechet(a, a) == pytest.approx(0, abs=1e-10)
    assert frechet(a, a + 2) == pytest.approx(4 * 5)
    with pytest.raises(ValueError, match="at least two points in each, not 1 and 30"):
        frechet(a[:1], a)


def test_drawings_are_read_as_true_pictures_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A captioner that knows each picture by its pixels: all facts of the truth, few of another's."""
    split = Scenes(image_size=32, val_size=6).split("val")
    true = [split.image(i) for i in range(6)]
    tokenizer = Tokenizer.train(["a red star"], 300, languages=["en", "ko"])
    torch.manual_seed(0)
    vision = ViT(32, 8, 24, 1, 3, class_token=False, pool="mean", block=ViTBlockConfig())
    model = VisionEncoderDecoder(vision, TextDecoder(tokenizer.vocab_size, 24, 1, 2, max_len=60, context_dim=24))
    captioner = ImageCaptioner(model, tokenizer, ImageTransform(32), device="cpu")
    known = {image.tobytes(): i for i, image in enumerate(true)}

    def caption(self: ImageCaptioner, images: list, *, language: str) -> list[list[SimpleNamespace]]:
        rows = [split.captions(known[image.tobytes()]) for image in images]
        return [[SimpleNamespace(text=next(c.text for c in row if c.language == language))] for row in rows]

    monkeypatch.setattr(ImageCaptioner, "__call__", caption)
    for language in ("en", "ko"):
        found = read_by_captioner(captioner, split, language, true)
        assert found["facts"] == found["true_facts"] == 1
        assert found["distance"] == pytest.approx(0, abs=1e-6)
    moved = read_by_captioner(captioner, split, "en", true[1:] + true[:1])
    assert moved["facts"] < 0.6 < moved["true_facts"]
    assert moved["distance"] == pytest.approx(0, abs=1e-6)  # the same pictures, as a cloud
    other = read_by_captioner(captioner, split, "en", [true[0]] * 6)
    assert other["distance"] > 0.01
