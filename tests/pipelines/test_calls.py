"""What all pipelines' calls have in common: settings without effect, things of another kind, and how each is shown."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmtransformer import (
    CLIP,
    GenerationConfig,
    ImageCaptioner,
    ImageClassifier,
    ImageGenerator,
    ImageTextEmbedder,
    ImageTransform,
    TextDecoder,
    TextTower,
    Tokenizer,
    Transformer,
    Translator,
    VisionEncoderDecoder,
    ViT,
)

RED = Image.new("RGB", (16, 16), "red")


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return Tokenizer.train(["a red star", "빨간 별 하나"], 280, ("en", "ko"))


def captioner(words: Tokenizer) -> ImageCaptioner:
    decoder = TextDecoder(words.vocab_size, 20, 2, 4, max_len=40, context_dim=20)
    return ImageCaptioner(VisionEncoderDecoder(ViT(16, 8, 20, 1, 4), decoder), words, ImageTransform(16), device="cpu")


def translator(words: Tokenizer) -> Translator:
    return Translator(Transformer(words.vocab_size, 16, 1, 2, mlp_dim=8), words, device="cpu")


def embedder(words: Tokenizer) -> ImageTextEmbedder:
    model = CLIP(ViT(16, 8, 24, 1, 4), TextTower(words.vocab_size, 20, 1, 2, max_len=24), embed_dim=13)
    return ImageTextEmbedder(model, words, ImageTransform(16), device="cpu")


def test_each_says_what_it_is(words: Tokenizer) -> None:
    size, said = words.vocab_size, f"{words.vocab_size} tokens, languages en, ko, fp32 on cpu)"
    assert repr(captioner(words)).startswith("ImageCaptioner(VisionEncoderDecoder, 0.0 million parameters, ")
    for pipeline in (captioner(words), translator(words), embedder(words)):
        assert repr(pipeline).endswith(said)
    half = embedder(words)
    half.model.bfloat16()
    assert (
        repr(half) == f"ImageTextEmbedder(CLIP, 0.0 million parameters, {size} tokens, languages en, ko, bf16 on cpu)"
    )
    classes = [f"class {i}" for i in range(5)]
    classifier = ImageClassifier(ViT(16, 8, 20, 1, 4, num_classes=5), classes, ImageTransform(16), device="cpu")
    shown = "5 classes: class 0, class 1, class 2, class 3, ..."
    assert repr(classifier) == f"ImageClassifier(ViT, 0.0 million parameters, {shown}, fp32 on cpu)"


@pytest.mark.parametrize("name", ["length_penalty", "length_offset"])
def test_weights_of_lengths_need_beams(words: Tokenizer, name: str) -> None:
    model = captioner(words)
    for call in (model, model.stream_text, lambda image, **changes: model.stream([image], **changes)):
        with pytest.raises(ValueError, match=f"{name} weighs beams of different lengths, and there are none"):
            call(RED, num_beams=1, **{name: 2.0})
    assert GenerationConfig().updated(num_beams=2, **{name: 2.0}).num_beams == 2
    assert GenerationConfig(num_beams=2).updated(**{name: 2.0}).num_beams == 2


def test_settings_are_no_dictionary(words: Tokenizer) -> None:
    model, given = captioner(words), {"num_beams": 2}
    calls: tuple[Any, ...] = (model, model.stream_text, lambda image, **some: model.stream([image], **some))
    for call in calls:
        with pytest.raises(TypeError, match=r"generation must be of GenerationConfig\(max_new_tokens, .*, not \{'num"):
            call(RED, generation=given)


@pytest.mark.parametrize("texts", [3, ["a", 3]])
def test_texts_are_texts(words: Tokenizer, texts: Any) -> None:
    for call in (lambda: translator(words)(texts, "ko"), lambda: embedder(words).encode_texts(texts)):
        with pytest.raises(ValueError, match="texts must be a text, or a list of them, not 3"):
            call()
    assert embedder(words).encode_texts(iter(["a", "b"])).shape == torch.Size([2, 13])  # pyright: ignore


@pytest.mark.parametrize(
    ("config", "reader"),
    [
        ({"model_type": "clip"}, "ImageTextEmbedder (`mmt search`), whose classify(images, labels) takes classes by"),
        ({"model_type": "siglip2"}, "ImageTextEmbedder (`mmt search`), whose classify"),
        ({"model_type": "blip-2"}, "by ImageCaptioner (`mmt caption`)"),
        ({"model_type": "clip_vision_model"}, "by load_vit of mmtransformer.weights"),
        ({"model_type": "gpt2"}, "by load_lm of mmtransformer.weights"),
        ({"model_type": "bert"}, "by load_bert of mmtransformer.weights"),
    ],
)
def test_a_public_model_names_what_reads_it(config: dict[str, str], reader: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    for pipeline in (ImageClassifier, ImageGenerator, Translator):
        with pytest.raises(ValueError, match="holds a public model, which is read by") as error:
            pipeline.from_pretrained(tmp_path)
        assert reader in str(error.value)
        assert ("ImageCaptioner" in str(error.value)) == ("ImageCaptioner" in reader)
