"""HFCaptioner: the other families write, are scored and tuned as in transformers; what they cannot do is said."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmtransformer import ImageCaptioner
from mmtransformer.captioners.published.hf_captioner import HFCaptioner
from mmtransformer.data.loading.dataset import Collate, Sample
from mmtransformer.data.loading.rows import CaptionRow
from mmtransformer.data.loading.source import Caption
from mmtransformer.training.tasks.tuning import TuningConfig
from mmtransformer.weights.adapters import part_of
from support.cli import mmt
from support.hub_odd import FAMILIES, family_folder
from support.public import ids, load, pictures, until_end

SAID = ["what is this?", "a photo of", " a red star and a man"]
ALONE = ("emu3", "perception_lm")
CODEBOOKS = ("chameleon", "emu3")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # glm4v's processor


@pytest.fixture(name="case", params=FAMILIES, scope="module")
def a_family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path, str]:
    path = tmp_path_factory.mktemp(request.param) / "base"
    return *family_folder(path, request.param), path, request.param


def some_pictures() -> list[Image.Image]:
    """A grey one, one with transparency, a tall one."""
    grey, clear, tall = pictures()
    clear = clear.convert("RGBA")
    clear.putalpha(Image.fromarray(np.random.default_rng(0).integers(100, 255, clear.size[::-1], dtype=np.uint8)))
    return [grey.convert("L"), clear, tall.resize((32, 90))]


def read(processor: Any, image: Image.Image, said: str | None) -> dict[str, Any]:
    """What transformers' processor makes of a picture and a text, in float32."""
    if getattr(processor, "chat_template", None) is not None:
        turn = [{"type": "image"}, {"type": "text", "text": said or "Describe the image concisely."}]
        asked = [{"role": "user", "content": turn}]
        whole = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        found = processor(images=[[image]], text=[whole], return_tensors="pt", add_special_tokens=False)
    elif hasattr(processor, "image_token") and (said is not None or not hasattr(processor, "system_query")):
        found = processor(images=[image], text=[f"{processor.image_token}{said or ''}"], return_tensors="pt")
    else:
        found = processor(images=[image], text=None if said is None else [said], return_tensors="pt")
    return {name: x.float() if x.is_floating_point() else x for name, x in found.items()}


def test_it_writes_what_transformers_writes(case: tuple[Any, Any, Path, str]) -> None:
    """Prompts and pictures of several lengths and sizes in one batch, each as theirs alone."""
    theirs, processor, path, name = case
    ours = load(path)
    assert isinstance(ours.model, HFCaptioner)
    seen: Any = ours.batch(some_pictures())
    for texts, beams in ((SAID, 1), (SAID, 3), ([None] * 3, 1)):
        if (name, beams) != ("llama4", 3):  # whose own beam search does not run
            want = []
            for image, text in zip(seen.images, texts, strict=True):
                given = read(processor, image, text)
                if theirs.config.is_encoder_decoder:
                    start = 1 + given.get("decoder_input_ids", torch.zeros(1, 0)).shape[1]
                else:
                    start = given["input_ids"].shape[1]
                rows = theirs.generate(**given, max_new_tokens=6, do_sample=False, num_beams=beams)
                want += until_end(rows[:, start:], ours.tokenizer.eos_ids)
            each = [([image], [text]) for image, text in zip(some_pictures(), texts, strict=True)]
            if beams == 1 or name in ALONE:
                assert [ids(ours, *one, max_new_tokens=6, num_beams=beams)[0] for one in each] == want
            if name not in ALONE:
                assert ids(ours, some_pictures(), texts, max_new_tokens=6, num_beams=beams) == want
            assert len({*map(tuple, want)}) > 1 or texts != SAID
    if name in ALONE:
        with pytest.raises(ValueError, match=r"give it one picture at a time \(a batch size of 1\)"):
            ids(ours, some_pictures(), SAID)


def test_the_loss_is_theirs_and_reaches_what_learns(case: tuple[Any, Any, Path, str]) -> None:
    theirs, processor, path, name = case
    ours, captions = load(path), [[40, 41, 2], [50, 2], [60, 61, 62, 63, 2]]
    images: Any = ours.batch(some_pictures()).images  # pyright: ignore[reportAttributeAccessIssue]
    rows = [(np.array(row, np.int32), image) for row, image in zip(captions, images, strict=True)]
    samples = [
        Sample(None, None, [CaptionRow(row, 0, True)], str(i), (Caption("", None),), image)
        for i, (row, image) in enumerate(rows[: 1 if name in ALONE else 3])
    ]
    own: Any = ours.processor
    batch = Collate(1, complete=own.complete, tiled=own)(samples)
    total, count = 0.0, 0
    for caption, image in zip(captions, images[: len(samples)], strict=False):
        given, labels = read(processor, image, None), torch.tensor([caption])
        if not theirs.config.is_encoder_decoder:
            real = given["attention_mask"]
            for key, x in given.items():
                if key != "input_ids" and x.shape[:2] == real.shape and not x.is_floating_point():
                    after = x[:, -1:] if x.ndim > 2 or key == "attention_mask" else x.new_zeros(1, 1)
                    given[key] = torch.cat((x, after.expand(1, len(caption), *x.shape[2:])), 1)
            before = torch.full_like(given["input_ids"], -100)
            given["input_ids"], labels = (torch.cat((x, labels), 1) for x in (given["input_ids"], before))
        with torch.no_grad():
            total += theirs(**given, labels=labels).loss.item() * len(caption)
        count += len(caption)
    parts: Any = ["decoder"] if name in CODEBOOKS else ["vision", "decoder"]
    targets = {
        "qwen": "qkv",
        "glm4v": "qkv",
        "perception_lm": "qkv",
        "fast_vlm": "qkv",
        "pix2struct": "query",
        "got_ocr2": "qkv",
    }
    also = next((layer for kind, layer in targets.items() if name.startswith(kind)), "q_proj")
    mine = ["query"] if name == "pix2struct" else ["q_proj", also]
    TuningConfig(parts, method="lora", rank=2, target_modules=mine).apply(ours.model)
    loss = ours.model(batch).loss
    assert loss.item() == pytest.approx(total / count, rel=2e-5)
    loss.backward()
    learns = {key: p for key, p in ours.model.named_parameters() if p.requires_grad and "lora_B" in key}
    reached = {part_of(ours.model, key) for key, p in learns.items() if p.grad is not None and p.grad.any()}
    assert reached == {*parts}
    assert name != "t5gemma2" or any(".decoder.layers." in key for key in learns)  # the encoder has a text model too


def test_what_cannot_be_captioned_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    family_folder(tmp_path / "base", "deepseek_vl")
    shown = "{% for m in messages %}<s>{% for c in m['content'] %}{{ c['text'] or 'IMAGE' }}{% endfor %}{% endfor %}"
    templates = {
        "{% for m in messages %}{{ m['content'] }}{% endfor %}": "a chat template without a place for pictures",
        "{% for m in messages %}{{ 'user: ' + m['content'] }}{% endfor %}": "its chat template: can only concatenate",
        "{% for m in messages %}{{ m['content'][-1]['text'] }}{% endfor %}": "a chat template without a place for",
        "{% for m in messages %}": "its chat template: TemplateSyntaxError: Unexpected end",
        shown: "Found total 0 <image_placeholder> tokens and 1 images",
    }
    folder = tmp_path / "other"
    for template, told in templates.items():
        shutil.copytree(tmp_path / "base", folder, dirs_exist_ok=True)
        (folder / "chat_template.jinja").write_text(template)
        assert_told(tmp_path, capsys, folder, told)
    (folder / "chat_template.jinja").unlink()
    _ = load(folder)
    assert 'has no chat_template.jinja, so prompts are "<image_placeholder>" and words' in capsys.readouterr().err
    config = tmp_path / "base/config.json"
    config.write_text(config.read_text().replace('"image_token_id": 3', '"image_token_id": 7'))
    assert_told(
        tmp_path, capsys, config.parent, "cannot read what its processor makes of picture and prompt: Image feat"
    )
    config.write_text(config.read_text().replace('"deepseek_vl"', '"udop"'))
    assert_told(
        tmp_path, capsys, config.parent, "a model of the type udop reads the boxes of a page's words, so it does"
    )


def assert_told(path: Path, capsys: pytest.CaptureFixture[str], folder: Path, told: str) -> None:
    """`mmt caption` stops with a line that says it."""
    pictures()[0].save(path / "x.png")
    code, out, err = mmt(capsys, "caption", str(path / "x.png"), "--model", str(folder), "--device", "cpu")
    assert (code, out, told in err.splitlines()[-1]) == (2, "", True), err


def test_a_processor_without_pixels_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family_folder(tmp_path, "deepseek_vl")
    ours: ImageCaptioner = load(tmp_path)
    own: Any = ours.processor
    monkeypatch.setattr(own, "_called", lambda **given: own.hub.tokenizer(given["text"], return_tensors="pt"))
    with pytest.raises(ValueError, match="makes no pixels of a picture: input_ids, attention_mask alone"):
        ids(ours, pictures()[:1], [None])
