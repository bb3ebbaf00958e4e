"""restrict_vocabulary: captions of the allowed tokens alone are written as before."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from mmtransformer import ImageCaptioner, ImageTransform, Tokenizer
from mmtransformer.pipelines.vocabulary import restrict_vocabulary
from support import tiny
from support.cli import mmt


def captioner() -> ImageCaptioner:
    texts = ["a large red star", "two small blue circles", "빨간 별 하나", "a green square above a star"] * 4
    tokenizer = Tokenizer.train(texts, vocab_size=330)
    return ImageCaptioner(tiny.captioner(tokenizer.vocab_size), tokenizer, ImageTransform(32), device="cpu")


def picture(path: Path) -> Path:
    Image.new("RGB", (40, 40), (200, 30, 30)).save(path)
    return path


@pytest.mark.parametrize("beams", [1, 4])
def test_a_caption_of_allowed_tokens_stays(beams: int, tmp_path: Path) -> None:
    whole, less, image = captioner(), captioner(), picture(tmp_path / "x.png")
    (said,) = whole(image, num_beams=beams, max_new_tokens=8, num_return_sequences=beams)
    left = restrict_vocabulary(less, [caption.text for caption in said])
    assert 2 <= left < whole.tokenizer.vocab_size / 2
    (again,) = less(image, num_beams=beams, max_new_tokens=8, num_return_sequences=beams)
    assert again[0].text == said[0].text
    for caption in again:
        assert set(less.tokenizer.encode(caption.text)) <= set(less.model.decoder.lm_head.allowed_token_ids.tolist())  # type: ignore[union-attr]


def test_no_other_word_is_written(tmp_path: Path) -> None:
    model, image = captioner(), picture(tmp_path / "x.png")
    before = {name: x.clone() for name, x in model.model.state_dict().items()}
    restrict_vocabulary(model, ["빨간 별"])
    (said,) = model(image, max_new_tokens=12, min_new_tokens=4, do_sample=True, seed=1)
    assert said[0].text
    assert set(said[0].text) <= set(" 빨간별") | {"\ufffd"}
    model.save_pretrained(tmp_path / "model")
    after = ImageCaptioner.from_pretrained(tmp_path / "model", device="cpu").model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_cannot_be() -> None:
    model = captioner()
    with pytest.raises(ValueError, match="no text to take tokens from"):
        restrict_vocabulary(model, [])
    model.model.decoder = torch.nn.Identity()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="VisionEncoderDecoder over a Identity cannot be restricted"):
        restrict_vocabulary(model, ["a"])


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captioner().save_pretrained(tmp_path / "model")
    image, words = picture(tmp_path / "x.png"), tmp_path / "words.txt"
    words.write_text("빨간 별\n\n", "utf-8")
    model = ["--model", str(tmp_path / "model"), "--device", "cpu"]
    call = ["caption", str(image), *model, "--restrict-vocabulary", str(words)]
    code, out, err = mmt(capsys, *call, "--max-new-tokens", "6")
    assert code == 0
    assert "tokens are left to write" in err
    assert set(out.strip()) <= set(" 빨간별") | {"\ufffd"}
    words.write_bytes(b"\xff\xfe\x00")
    code, _, err = mmt(capsys, *call)
    assert (code, "is no text in UTF-8" in err) == (2, True)
    words.unlink()
    code, _, err = mmt(capsys, *call)
    assert (code, str(words) in err) == (2, True)
