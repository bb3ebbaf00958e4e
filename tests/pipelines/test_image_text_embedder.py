"""`ImageTextEmbedder`: vectors of pictures and texts, zero-shot classes, and the folder that all of it is kept in."""

import io
from pathlib import Path

import pytest
import torch

from mmtransformer import CLIP, ImageCaptioner, ImageError, ImageTextEmbedder, ImageTransform, TextTower, Tokenizer, ViT
from support.public import noisy, pictures

TEXTS = ["a red star", "빨간 별", "a blue circle below a green square"]


def encoder(loss: str = "softmax") -> ImageTextEmbedder:
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(TEXTS * 3, 300, ["en", "ko"])
    text = TextTower(300, 20, 2, 2, max_len=24)
    model = noisy(CLIP(ViT(16, 8, 24, 2, 4), text, embed_dim=13, loss=loss))  # type: ignore[arg-type]
    return ImageTextEmbedder(model, tokenizer, ImageTransform(16), device="cpu")


def test_vectors_are_the_models_whatever_the_batches() -> None:
    found, images = encoder(), pictures()
    vectors = found.encode_images(images, batch_size=2)
    assert vectors.shape == (3, 13)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    pixels = torch.stack([found.transform(image) for image in images])
    with torch.no_grad():
        torch.testing.assert_close(vectors, found.model.encode_image(pixels))
    torch.testing.assert_close(found.encode_images(list(pixels)), vectors)
    torch.testing.assert_close(found.encode_images(images[1])[0], vectors[1])
    texts = found.encode_texts(TEXTS)
    one_by_one = torch.cat([found.encode_texts(text) for text in TEXTS])
    torch.testing.assert_close(texts, one_by_one, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.encode_texts(TEXTS, batch_size=2), texts, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.similarity(images, TEXTS), vectors @ texts.T, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.similarity(vectors, TEXTS), vectors @ texts.T, atol=1e-6, rtol=1e-5)
    assert found.encode_images([]).shape == found.encode_texts([]).shape == (0, 13)


def test_pictures_of_every_kind(tmp_path: Path) -> None:
    found, image = encoder(), pictures()[0]
    image.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    vectors = found.encode_images([tmp_path / "a.png", str(tmp_path / "a.png"), data, io.BytesIO(data), image])
    assert float((vectors - vectors[0]).abs().max()) < 1e-6
    (tmp_path / "b.png").write_bytes(data[:80])
    with pytest.raises(ImageError, match=r"b\.png"):
        found.encode_images([image, tmp_path / "b.png"])
    with pytest.raises(ValueError, match="batch_size must be a whole number"):
        found.encode_images(image, batch_size=0)


def test_texts_that_are_too_long_keep_their_end() -> None:
    found = encoder()
    ids = found.ids("a red star " * 40)
    assert len(ids) == 24
    assert ids[0] == found.tokenizer.bos_id
    assert ids[-1] == found.tokenizer.eos_id
    assert found.ids("a red star") == [found.tokenizer.bos_id, *found.tokenizer.encode("a red star"), ids[-1]]
    with pytest.warns(UserWarning, match="1 of 2 texts are longer than the 24 tokens that the model reads"):
        found.encode_texts(["a star", "a red star " * 40])
    found.encode_texts(["a red star " * 40])  # once is enough
    with pytest.raises(ValueError, match="text 1 of 2 is empty, and would fit every picture"):
        found.encode_texts(["a star", " "])


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_zero_shot_classes_are_the_mean_of_their_sentences(loss: str) -> None:
    found, labels = encoder(loss), ["red star", "blue circle"]
    templates = ["a {}", "a photo of a {}.", "{}, a drawing of a {}"]
    named = found.encode_labels(labels, templates)
    for label, vector in zip(labels, named, strict=True):
        mean = torch.stack([found.encode_texts(text.replace("{}", label))[0] for text in templates]).mean(0)
        torch.testing.assert_close(vector, mean / mean.norm(), atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        logits = found.model.logits(found.encode_images(pictures()), named)
        shares = logits.softmax(1) if loss == "softmax" else logits.sigmoid()
    told = found.classify(pictures(), labels, templates=templates, top_k=2)
    for row, said in zip(shares.tolist(), told, strict=True):
        best = sorted(zip(labels, row, strict=True), key=lambda item: -item[1])
        assert [name for name, _ in said] == [name for name, _ in best]
        assert [share for _, share in said] == pytest.approx([share for _, share in best], rel=1e-5)
    assert len(found.classify(pictures()[0], labels)[0]) == 1
    for arguments, message in (
        ({"labels": []}, "labels must be a list of names, one at least"),
        ({"labels": "star"}, "labels must be a list of names, one at least, not 'star'"),
        ({"labels": labels, "templates": ["a photo"]}, "the template 'a photo' has no {} where"),
        ({"labels": labels, "templates": []}, "templates must be a list of sentences"),
        ({"labels": labels, "top_k": 0}, "top_k must be a whole number, at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            found.classify(pictures(), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_a_folder_holds_all_of_it(loss: str, tmp_path: Path) -> None:
    found = encoder(loss)
    found.save_pretrained(tmp_path, card="trained on stars")
    again = ImageTextEmbedder.from_pretrained(tmp_path, device="cpu")
    torch.testing.assert_close(again.encode_images(pictures()), found.encode_images(pictures()), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(again.encode_texts(TEXTS), found.encode_texts(TEXTS), atol=1e-6, rtol=1e-5)
    assert again.transform == found.transform
    card = (tmp_path / "README.md").read_text("utf-8")
    assert "trained on stars" in card
    assert "ImageTextEmbedder.from_pretrained" in card
    with pytest.raises(ValueError, match="CLIP"):
        ImageCaptioner.from_pretrained(tmp_path)
    (tmp_path / "preprocessor.json").unlink()
    with pytest.raises(ValueError, match=r"preprocessor"):
        ImageTextEmbedder.from_pretrained(tmp_path)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    small = CLIP(ViT(16, 8, 24, 1, 4), TextTower(280, 20, 1, 2), embed_dim=13)
    with pytest.raises(ValueError, match="the tokenizer has 300 tokens, but the model scores 280"):
        ImageTextEmbedder(small, encoder().tokenizer, ImageTransform(16))
