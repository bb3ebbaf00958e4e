"""CLIPScore beside torchmetrics on one small random CLIP, and RefCLIPScore beside its definition."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from mmtransformer import ImageTextEmbedder
from mmtransformer.data.loading.source import Caption
from mmtransformer.generation.captions import CaptionResult
from mmtransformer.metrics.clipscore import clip_score, ref_clip_score
from mmtransformer.training.evaluation.clipscore import clip_scores, clip_table
from mmtransformer.training.evaluation.evaluation import Prediction
from support import dual
from support.public import pictures

TEXTS = ["a photo of two dogs", "A Red star, and a small blue circle!", "question: what is this?"]


def torchmetrics_scores(model: Any, folder: Path) -> list[float]:
    """What torchmetrics gives for each pair by itself."""
    from torchmetrics.functional.multimodal import clip_score as theirs

    class Old:
        """What torchmetrics 1.9 expects of transformers, whose 5 gives whole outputs in place of tensors."""

        config = model.config

        @staticmethod
        def to(*_: Any) -> "Old":
            return Old()

        @staticmethod
        def get_image_features(pixels: torch.Tensor) -> torch.Tensor:
            return model.get_image_features(pixels).pooler_output

        @staticmethod
        def get_text_features(*inputs: torch.Tensor) -> torch.Tensor:
            return model.get_text_features(*inputs).pooler_output

    processor = AutoProcessor.from_pretrained(folder)
    found = []
    for image, text in zip(pictures(), TEXTS, strict=True):
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        with torch.no_grad():
            score = theirs(pixels, text, model_name_or_path=lambda: (Old(), processor))  # type: ignore[arg-type]
        found.append(float(score))
    return found


def test_equal_to_torchmetrics(tmp_path: Path) -> None:
    model = dual.write(tmp_path, "clip")
    expected = torchmetrics_scores(model, tmp_path)
    encoder = ImageTextEmbedder.from_pretrained(tmp_path, device="cpu")
    images, texts = encoder.encode_images(pictures()).numpy(), encoder.encode_texts(TEXTS).numpy()
    found = clip_score(images, texts, weight=100.0)
    assert found == pytest.approx(expected, abs=1e-5 * 100)
    assert len({round(x, 3) for x in expected}) > 1


def test_both_are_their_definitions() -> None:
    chance = np.random.default_rng(2)
    images, captions = chance.normal(size=(5, 7)), chance.normal(size=(5, 7))
    captions[0] = -images[0]  # as wrong as can be
    captions[1] = 3 * images[1]
    references = [chance.normal(size=(r, 7)) for r in (1, 3, 2, 4, 1)]
    references[2] = -captions[2:3]

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    seen = [2.5 * max(cosine(c, v), 0) for v, c in zip(images, captions, strict=True)]
    assert clip_score(images, captions) == pytest.approx(seen, abs=1e-14)
    assert seen[0] == 0
    assert seen[1] == pytest.approx(2.5)
    both = ref_clip_score(images, captions, references)
    for i, some in enumerate(references):
        said = max(max(cosine(captions[i], r) for r in some), 0)
        expected = 2 * seen[i] * said / (seen[i] + said) if seen[i] + said else 0
        assert both[i] == pytest.approx(expected, abs=1e-14)
    assert both[2] == 0


def test_what_cannot_be_scored() -> None:
    x = np.ones((2, 3))
    for arguments, message in (
        ((x, np.ones((3, 3))), r"image_features are \(2, 3\) and text_features \(3, 3\)"),
        ((x, np.zeros((2, 3))), "text_features: vector 0 is 0 or not finite"),
        ((np.ones(3), x), r"image_features are vectors \(n d\), not an array of shape \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            clip_score(*arguments)
    with pytest.raises(ValueError, match="picture 1 has no reference"):
        ref_clip_score(x, x, [x, np.zeros((0, 3))])
    with pytest.raises(ValueError, match="references of 1 picture, and 2 captions"):
        ref_clip_score(x, x, [x])


class Three:
    """Three pictures."""

    def __len__(self) -> int:
        return 3

    def image(self, i: int) -> Any:
        return pictures()[i]

    def name(self, i: int) -> str:
        return str(i)

    def captions(self, i: int) -> list[Caption]:
        return [Caption(TEXTS[i], None)]


def test_predictions_are_scored_by_language(tmp_path: Path) -> None:
    dual.write(tmp_path, "siglip")
    encoder = ImageTextEmbedder.from_pretrained(tmp_path, device="cpu")

    def said(i: int, text: str, *references: str) -> Prediction:
        return Prediction(i, str(i), CaptionResult(text, None, [], 0.0, [], [], True), references)

    by = {
        "en": [said(2, "two dogs", "a dog", "dogs"), said(0, "", "grass")],
        "ko": [said(1, "red star", "blue star")],
        "de": [],
    }
    found = clip_scores(encoder, by, Three(), prefix="a photo of", batch_size=1)
    assert set(found) == {"en", "ko"}
    images = encoder.encode_images(pictures()).numpy()
    caption = encoder.encode_texts(["a photo of two dogs"]).numpy()
    references = encoder.encode_texts(["a photo of a dog", "a photo of dogs"]).numpy()
    assert found["en"]["clip_score"] == pytest.approx(clip_score(images[2:], caption)[0] / 2, abs=1e-6)
    assert found["en"]["ref_clip_score"] == pytest.approx(
        ref_clip_score(images[2:], caption, [references])[0] / 2, abs=1e-6
    )
    assert found["en"]["images"] == 2
    assert "val en: CLIPScore" in clip_table("MODEL", "val", found)
