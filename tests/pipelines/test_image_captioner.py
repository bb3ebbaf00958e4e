"""ImageCaptioner: what a caption depends on, settings of a call, the card, and how far a reader follows a caption."""

import re
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from PIL import Image
from tokenizers import decoders, models, normalizers, pre_tokenizers

import mmtransformer
from mmtransformer import (
    GenerationConfig,
    ImageCaptioner,
    ImageClassifier,
    ImageTransform,
    TextDecoder,
    Tokenizer,
    Transformer,
    Translator,
    VisionEncoderDecoder,
    ViT,
    stream,
)
from mmtransformer.data import CaptionData, ClassData, Scenes
from mmtransformer.generation.captions import with_prompts
from mmtransformer.layers import weight_prepacking

PACKAGE = str(Path(mmtransformer.__file__).parent)


def tokenizer() -> Tokenizer:
    return Tokenizer.train(["a red star", "a blue dot", "빨간 별 하나"], 290, ("en", "ko"))


def captioner() -> ImageCaptioner:
    torch.manual_seed(2)
    words = tokenizer()
    decoder = TextDecoder(words.vocab_size, 20, 2, 4, max_len=40, context_dim=20)
    model = VisionEncoderDecoder(ViT(16, 8, 20, 1, 4), decoder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return ImageCaptioner(model, words, ImageTransform(16), device="cpu")


def images() -> list[Image.Image]:
    return [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "white", "green", "black")]


def test_a_drawn_caption_depends_on_the_picture_the_seed_and_its_number_alone() -> None:
    model, pictures = captioner(), images()
    options: dict[str, Any] = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 8, "seed": 5}
    together = [[c.tokens for c in row] for row in model(pictures, **options)]
    assert len({str(row) for row in together}) > 1
    for size in (1, 2):
        assert [[c.tokens for c in row] for row in model(pictures, batch_size=size, **options)] == together
    backwards = model(pictures[::-1], batch_size=3, **options)
    assert [[c.tokens for c in row] for row in backwards[::-1]] == together
    for picture, two in zip(pictures, together, strict=True):
        assert model(picture, **options | {"num_return_sequences": 1})[0][0].tokens in two
    for row in model(pictures, **options | {"num_return_sequences": 7}):
        scores = [c.log_prob for c in row]
        assert scores == sorted(scores, reverse=True)
    assert [[c.tokens for c in row] for row in model(pictures, **options | {"seed": 6})] != together


def test_a_drawn_caption_is_streamed_as_it_is_written() -> None:
    model = captioner()
    drawn = GenerationConfig(do_sample=True, max_new_tokens=12, seed=3)
    for picture in images():
        assert "".join(model.stream_text(picture, generation=drawn)) == model(picture, generation=drawn)[0][0].text


def test_syllables_that_a_tokenizer_takes_apart_are_streamed_whole() -> None:
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer, backend.decoder = normalizers.BertNormalizer(lowercase=True), decoders.WordPiece()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    letters = unicodedata.normalize("NFD", "빨간 큰 별").replace(" ", "")
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters)]
    backend.model = models.WordPiece({name: i for i, name in enumerate(dict.fromkeys(names))}, unk_token="[UNK]")
    words = Tokenizer(backend, bos_token="[CLS]", eos_token="[SEP]", pad_token="[PAD]")
    torch.manual_seed(1)
    decoder = TextDecoder(words.vocab_size, 20, 2, 4, max_len=40, context_dim=20)
    model = ImageCaptioner(VisionEncoderDecoder(ViT(16, 8, 20, 1, 4), decoder), words, ImageTransform(16), device="cpu")
    drawn = GenerationConfig(do_sample=True, max_new_tokens=30, min_new_tokens=30, seed=5)
    (caption,) = model(images()[0], generation=drawn)[0]
    streamed = [*model.stream_text(images()[0], generation=drawn)]
    assert "".join(streamed) == caption.text == unicodedata.normalize("NFC", caption.text)
    assert len(streamed) > 5
    assert any("가" <= letter <= "힣" for letter in caption.text), "no syllable was made of its letters"


def test_a_heat_map_is_of_a_caption_not_of_its_text() -> None:
    with pytest.raises(TypeError, match=r"one of those in captioner\(image\)\[0\], not of 'a red star'"):
        captioner().heatmap(images()[0], "a red star")  # pyright: ignore[reportArgumentType]


def test_words_that_must_come_cannot_be_streamed() -> None:
    with pytest.raises(ValueError, match="force_words need beams"):
        next(captioner().stream_text(images()[0], generation=GenerationConfig(num_beams=2, force_words=("star",))))


def test_a_streamed_caption_takes_single_settings_too() -> None:
    model, image = captioner(), images()[0]
    (said,) = model(image, num_beams=1, max_new_tokens=3, min_new_tokens=2)[0]
    assert "".join(model.stream_text(image, max_new_tokens=3, min_new_tokens=2)) == said.text
    assert said.tokens
    for changes, message in (
        ({"num_beams": 2}, "a caption that is streamed is one, without beams"),
        ({"num_return_sequences": 2}, "a caption that is streamed is one, without beams"),
        ({"force_words": ["star"]}, "force_words need beams"),
        ({"max_new_tokens": 0}, r"max_new_tokens must be at least 1, not 0"),
    ):
        with pytest.raises(ValueError, match=message):
            model.stream_text(image, **changes)
    for call in (model, model.stream_text, lambda image, **changes: model.stream([image], **changes)):
        with pytest.raises(TypeError, match=r'no "generation_config"; did you mean "generation"\?'):
            call(image, generation_config=GenerationConfig())


def test_ids_that_the_tokenizer_lacks_are_never_written() -> None:
    torch.manual_seed(3)
    words = tokenizer()
    decoder = TextDecoder(words.vocab_size + 22, 20, 2, 4, max_len=40, context_dim=20)
    with torch.no_grad():
        decoder.lm_head.weight[words.vocab_size :] *= 9  # the likeliest
    padded = ImageCaptioner(
        VisionEncoderDecoder(ViT(16, 8, 20, 1, 4), decoder), words, ImageTransform(16), device="cpu"
    )
    for options in ({"num_beams": 1}, {"num_beams": 3}, {"do_sample": True}):
        (said,) = padded(images()[0], max_new_tokens=8, min_new_tokens=8, **options)[0]
        assert len(said.tokens) == len(said.token_log_probs) == 8
        assert said.log_prob == pytest.approx(sum(said.token_log_probs), abs=1e-4)
    drawn: dict[str, Any] = {"do_sample": True, "max_new_tokens": 8, "min_new_tokens": 8}
    assert "".join(padded.stream_text(images()[0], **drawn)) == padded(images()[0], **drawn)[0][0].text != ""


def test_more_tokens_than_the_model_reads_are_refused_where_they_are_asked_for() -> None:
    model, image = captioner(), images()[0]
    model.generation = GenerationConfig(max_new_tokens=60, min_new_tokens=50)
    (said,) = model(image)[0]  # the model's own settings are cut
    most = len(said.tokens)
    assert 30 < most < 40
    assert "".join(model.stream_text(image)) == said.text
    least = GenerationConfig(max_new_tokens=60, min_new_tokens=50)
    asked: list[tuple[dict[str, Any], str]] = [
        ({"min_new_tokens": 50}, rf"min_new_tokens \(50\) does not fit: .* reads {most} new tokens at most"),
        ({"generation": least}, rf"min_new_tokens \(50\) does not fit: .* reads {most} new tokens at most"),
        ({"max_new_tokens": 50, "min_new_tokens": 0}, rf"max_new_tokens \(50\) are more .* at most {most} new tokens"),
    ]
    for options, message in asked:
        for call in (model, lambda *x, **y: [*model.stream_text(*x, **y)], lambda x, **y: [*model.stream([x], **y)]):
            with pytest.raises(ValueError, match=message):
                call(image, **options)
    assert len(model(image, max_new_tokens=most)[0][0].tokens) == most


@pytest.mark.parametrize("size", [0, -1, 1.5, None, "3"])
def test_a_batch_of_none_is_refused(size: Any) -> None:
    words = tokenizer()
    classifier = ImageClassifier(ViT(16, 8, 20, 1, 4, num_classes=2), ["a", "b"], ImageTransform(16), device="cpu")
    translator = Translator(Transformer(words.vocab_size, 16, 1, 2, mlp_dim=8), words, device="cpu")
    for call in (
        lambda: captioner()(images(), batch_size=size),
        lambda: classifier(images(), batch_size=size),
        lambda: translator(["a"], "ko", batch_size=size),
    ):
        with pytest.raises(ValueError, match=f"batch_size must be a whole number, at least 1, not {size!r}"):
            call()
    with pytest.raises(ValueError, match="top_k must be a whole number, at least 1"):
        classifier(images(), top_k=size)


def test_a_drawn_translation_depends_on_the_text_alone() -> None:
    torch.manual_seed(0)
    words = tokenizer()
    translator = Translator(Transformer(words.vocab_size, 16, 1, 2, mlp_dim=8), words, device="cpu")
    texts = ["a red star", "a dot", "a blue dot and a star"]
    together = translator(texts, "ko", do_sample=True, max_new_tokens=9)
    assert len({*together}) == 3
    assert [translator(text, "ko", do_sample=True, max_new_tokens=9)[0] for text in texts] == together


def test_a_pipeline_moves_as_a_module_does_until_its_weights_are_packed() -> None:
    model = captioner()
    want = model(images()[1])
    assert model.to("cpu") is model
    assert model(images()[1]) == want
    with pytest.raises(ValueError, match="prepacked for cpu, so they cannot go to meta; load the model there"):
        model.to("meta")
    eight = captioner()
    eight.precision = "int8"
    with pytest.raises(ValueError, match="prepacked for cpu"):
        eight.to("meta")
    moved = captioner().to("meta")
    assert moved.device.type == "meta"
    assert all(p.is_meta for p in moved.model.parameters())
    with pytest.raises(ValueError, match="device cdua is unknown"):
        moved.to("cdua")


def test_the_card_runs(tmp_path: Path) -> None:
    folder = tmp_path / "star & <b>"
    captioner().save_pretrained(folder / "model", card="Its scores.")
    card = (folder / "model" / "README.md").read_text("utf-8")
    assert "\n# star &amp; &lt;b&gt;\n" in card
    assert card.endswith("\n\nIts scores.\n")
    assert "language: [en, ko]" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    images()[0].save(tmp_path / "picture.jpg")
    exec(code.replace('"model"', repr(str(folder / "model"))).replace("picture.jpg", str(tmp_path / "picture.jpg")))


# --- how many functions a reader goes through


def followed(call: Callable[[], Any]) -> tuple[set[str], set[str]]:
    """The library's functions that a call crosses, and their files; comprehensions are part of their function."""
    functions: set[str] = set()

    def look(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE) and not code.co_name.startswith("<"):
            functions.add(f"{code.co_filename.removeprefix(PACKAGE)[1:]} {code.co_qualname}")

    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
    return functions, {name.split()[0] for name in functions}


# What it is now; a change may only lower these. The aim is 60 functions in 12 files, and 20 for a step.
CAPTION, FILES, STEP = 96, 25, 26
if weight_prepacking._rows() is not weight_prepacking._ANY:  # Without AVX-512 some products are torch's own.
    CAPTION, FILES, STEP = 101, 26, 29


def test_a_caption_is_followed_through_few_functions() -> None:
    model = captioner()
    model(images()[0])  # warm: the first one prepacks weights
    functions, files = followed(lambda: model(images()[0]))
    assert len(functions) <= CAPTION, sorted(functions)
    assert len(files) <= FILES, sorted(files)


def test_a_decoding_step_is_followed_through_few_functions() -> None:
    model = captioner()
    prompt = with_prompts(model.batch([images()[0]]), model.tokenizer, ["ko"])
    steps = stream(model.inference_model(), prompt, eos_id=model.tokenizer.eos_ids, max_new_tokens=9, min_new_tokens=9)
    next(steps)
    next(steps)
    functions, _ = followed(lambda: next(steps))
    assert len(functions) <= STEP, sorted(functions)


def test_an_iterator_is_pointed_to_what_takes_one() -> None:
    model = captioner()
    with pytest.raises(ValueError, match=r"by a generator: give a list of them, .*, or captioner\.stream\(images\)"):
        model(image for image in images())  # pyright: ignore
    with pytest.raises(ValueError, match=r"by a map: give a list of them"):
        model(map(str, ["a.jpg"]))  # pyright: ignore
    assert len(model(dict(enumerate(images())).values())) == len(images())  # pyright: ignore
    with pytest.raises(ValueError, match=r"fromarray makes a picture"):
        model(np.zeros((4, 4, 3), np.uint8))  # pyright: ignore
    with pytest.raises(ValueError, match=r"to_pil_image makes a picture of \(3, height, width\)"):
        model(torch.zeros(3, 8, 8))  # pyright: ignore


def test_paths_come_in_any_collection(tmp_path: Path) -> None:
    images()[0].save(tmp_path / "a.png")
    model = captioner()
    (wanted,) = model(tmp_path / "a.png")
    assert model(np.array([str(tmp_path / "a.png")])) == [wanted]  # pyright: ignore
    with (tmp_path / "a.png").open("rb") as file:
        assert model(file) == [wanted]


class Inverted(ImageTransform):
    """With code of its own."""

    def __call__(self, image: Any) -> torch.Tensor:
        return -super().__call__(image)


def test_a_transform_of_a_users_own_class_is_saved_by_its_import_path(tmp_path: Path) -> None:
    plain = captioner()
    own = ImageCaptioner(plain.model, plain.tokenizer, Inverted(plain.transform.image_size), device="cpu")
    own.save_pretrained(tmp_path / "own")
    again = ImageCaptioner.from_pretrained(tmp_path / "own", device="cpu")
    assert (type(again.transform), again.transform) == (Inverted, own.transform)
    settings = tmp_path / "own" / "preprocessor.json"
    settings.write_text(settings.read_text().replace("Inverted", "Gone"))
    with pytest.raises(ValueError, match=r"preprocessor.json: .*Gone is a class of your own"):
        ImageCaptioner.from_pretrained(tmp_path / "own", device="cpu")

    class Local(ImageTransform):
        pass

    local = ImageCaptioner(plain.model, plain.tokenizer, Local(plain.transform.image_size), device="cpu")
    with pytest.raises(ValueError, match=r"the transform \(.*Local\) cannot be saved: .*at the top of a module"):
        local.save_pretrained(tmp_path / "local")
    assert not (tmp_path / "local").exists()


def test_a_transform_of_another_kind_is_refused_at_once() -> None:
    plain, other = captioner(), lambda image: image
    for make in (
        lambda: ImageCaptioner(plain.model, plain.tokenizer, other, device="cpu"),  # pyright: ignore[reportArgumentType]
        lambda: CaptionData(Scenes(32, train_size=2, val_size=2), transform=other),  # pyright: ignore[reportArgumentType]
        lambda: ClassData("pictures", transform=other),  # pyright: ignore[reportArgumentType]
    ):
        with pytest.raises(TypeError, match=r"must be an ImageTransform, not function: derive .* class Mine\(ImageTr"):
            make()
