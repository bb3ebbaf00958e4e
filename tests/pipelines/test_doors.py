"""What pipelines say at their doors: of names that name nothing, files in the place of folders, pictures in lists."""

import io
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmtransformer import (
    CLIP,
    ImageCaptioner,
    ImageClassifier,
    ImageGenerator,
    ImageTextEmbedder,
    ImageTransform,
    TextDecoder,
    TextTower,
    Tokenizer,
    Translator,
    VisionEncoderDecoder,
    ViT,
)
from mmtransformer.images import ImageError

KINDS: list[Any] = [
    ImageCaptioner, ImageClassifier, ImageGenerator, ImageTextEmbedder, Translator, Tokenizer, ViT, TextDecoder,
]  # fmt: skip


def captioner() -> ImageCaptioner:
    decoder = TextDecoder(300, 16, 1, 2, max_len=64, context_dim=16)
    model = VisionEncoderDecoder(ViT(32, 8, 16, 1, 2, class_token=False, pool="mean"), decoder)
    return ImageCaptioner(model, Tokenizer.train(["a red dog"], 300), ImageTransform(32), device="cpu")


def pipelines() -> list[Any]:
    clip = CLIP(ViT(32, 8, 16, 1, 2), TextTower(300, 16, 1, 2), embed_dim=12)
    return [
        captioner(),
        ImageClassifier(ViT(32, 8, 16, 1, 2, num_classes=2), ["cat", "dog"], ImageTransform(32), device="cpu"),
        ImageTextEmbedder(clip, Tokenizer.train(["a red dog"], 300), ImageTransform(32), device="cpu"),
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [None, "", 5])
def test_what_names_no_model_is_told_so(kind: Any, name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    captioner().save_pretrained(".")  # "" is not the current folder
    with pytest.raises(ValueError, match=f"^{name!r} names no model: give its folder, or its name on the hub$"):
        kind.from_pretrained(name)


def test_a_model_is_not_saved_over_a_file(tmp_path: Path) -> None:
    file = tmp_path / "captions.csv"
    file.write_text("image,caption\n")
    for model in [*pipelines(), Tokenizer.train(["a red dog"], 300), ViT(32, 8, 16, 1, 2)]:
        for folder in (file, file / "model"):
            with pytest.raises(
                ValueError, match=r"a model is saved in a folder, and .*captions\.csv is a file; name ano"
            ):
                model.save_pretrained(folder)
    assert file.read_text() == "image,caption\n"


def test_a_bad_picture_of_a_list_is_told_by_its_place(tmp_path: Path) -> None:
    good = Image.new("RGB", (20, 30))
    named = tmp_path / "named.png"
    named.write_bytes(b"abc")
    for model in pipelines():
        call = getattr(model, "encode_images", model)
        for bad in (b"abc", io.BytesIO(b"abc")):
            with pytest.raises(ImageError, match=r"^images\[2\]: "):
                call([good, good, bad, good], batch_size=2)
        with pytest.raises(ImageError, match=r"^<bytes>: "):
            call(b"abc")
        with named.open("rb") as file:
            for bad in (named, str(named), file):
                with pytest.raises(ImageError, match=f"^{os.fspath(named)}: "):
                    call([good, bad])


def test_a_caption_that_is_cut_has_no_space_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model = captioner()
    monkeypatch.setattr(Tokenizer, "decode", lambda *_: " a red ")
    assert model(Image.new("RGB", (20, 30)), max_new_tokens=2)[0][0].text == "a red"
