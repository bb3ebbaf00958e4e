"""Idefics (the first one) by its folder: pixels, prompts, logits and ids are transformers'."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import IdeficsConfig, IdeficsForVisionText2Text, IdeficsImageProcessor, IdeficsProcessor

from support.cli import mmt
from support.hub_models import words
from support.public import close, first_logits, ids, load, noisy, pictures, until_end

ENDS: Any = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}


def folder(path: Path, resampler: bool) -> tuple[Any, Any]:
    tokenizer = words("<fake_token_around_image>", "<image>", "<end_of_utterance>")
    vision = {
        "embed_dim": 24, "image_size": 28, "patch_size": 7, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 31,
    }  # fmt: skip
    config = IdeficsConfig(
        vocab_size=len(tokenizer) - 3, additional_vocab_size=3, hidden_size=24, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=31, cross_layer_interval=1, use_resampler=resampler,
        vision_config=vision, max_position_embeddings=97, perceiver_config={
            "resampler_n_latents": 3, "resampler_depth": 2, "resampler_n_heads": 2, "resampler_head_dim": 8,
        }, **ENDS,
    )  # fmt: skip
    torch.manual_seed(0)
    model = noisy(IdeficsForVisionText2Text(config), 0.4, seed=3)
    model.generation_config.update(**ENDS)
    model.save_pretrained(path)
    processor: Any = IdeficsProcessor(IdeficsImageProcessor(image_size=28), tokenizer)
    processor.save_pretrained(path)
    return model, processor


@pytest.mark.parametrize("resampler", [False, True])
def test_it_is_transformers(resampler: bool, tmp_path: Path) -> None:
    theirs, processor = folder(tmp_path, resampler)
    ours, images = load(tmp_path), pictures()
    texts = ["a photo of", " what is this?", "a</s> b"]  # Behind an end no picture is seen.
    for i, text in enumerate(texts):  # one by one: padded rows of theirs read the padding's places
        given = processor(images=[images[i]], text=[text], return_tensors="pt")
        assert ours.processor is not None
        batch = ours.processor.with_prompts(ours.batch(images[i : i + 1]), [text])
        assert batch.pixels is not None
        assert torch.equal(batch.pixels, given["pixel_values"])
        assert torch.equal(batch.tokens, given["input_ids"])
        with torch.no_grad():
            close(first_logits(ours, images[i : i + 1], [text]), theirs(**given).logits[:, -1])
        for changes in ({"num_beams": 1}, {"num_beams": 3}):
            rows = theirs.generate(**given, max_new_tokens=7, do_sample=False, **changes)
            want = until_end(rows[:, given["input_ids"].shape[1] :], (2,))
            assert ids(ours, images[i : i + 1], [text], max_new_tokens=7, **changes) == want
    together = ids(ours, images, [*texts], max_new_tokens=7)
    alone = [ids(ours, images[i : i + 1], [text], max_new_tokens=7)[0] for i, text in enumerate(texts)]
    assert together == alone


def test_commands_reach_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder(tmp_path / "model", False)
    image = tmp_path / "x.png"
    pictures()[0].save(image)
    code, out, err = mmt(capsys, "caption", str(image), "--model", str(tmp_path / "model"), "--device", "cpu")
    assert (code, bool(out.strip())) == (0, True), err
    code, out, err = mmt(capsys, "parity", str(tmp_path / "model"), "--max-new-tokens", "5")
    assert code == 0, out + err
    code, _, err = mmt(capsys, "export", str(tmp_path / "model"), str(tmp_path / "out"))
    assert code == 0, err
    IdeficsForVisionText2Text.from_pretrained(tmp_path / "out")
