"""BLIP and vision-encoder-decoders by their folders: pixels, prompts, logits, ids and captions are transformers'."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipImageProcessor,
    DeiTConfig,
    DeiTImageProcessor,
    GPT2Config,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
)
from transformers import BlipProcessor as TheirBlipProcessor

from mmtransformer.cli.__main__ import main
from support.public import byte_level, close, first_logits, ids, load, noisy, pictures, until_end, word_pieces

WIDTH = {"hidden_size": 24, "intermediate_size": 31, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPES = [WIDTH | {"image_size": 28, "patch_size": 7}, WIDTH | {"image_size": 45, "patch_size": 9}]


def bert() -> Any:
    return BertTokenizer(vocab=word_pieces().get_vocab())


def blip_folder(path: Path, kind: Any = BlipForConditionalGeneration, shape: int = 0) -> Path:
    tokenizer = bert()
    # [DEC] is none of the tokenizer's ids, as in the published folders.
    ids = {"bos_token_id": len(tokenizer), "sep_token_id": 3, "pad_token_id": 0, "eos_token_id": 2}
    text = {**WIDTH, "vocab_size": len(tokenizer) + 3, "max_position_embeddings": 61, **ids}
    config = BlipConfig(vision_config=SHAPES[shape], text_config=text, image_text_hidden_size=11)
    model = noisy(kind(config), 0.35, seed=shape + 5)
    for name, parameter in model.named_parameters():
        if "word_embeddings" in name:
            parameter.data *= 3
    model.save_pretrained(path)
    side = SHAPES[shape]["image_size"]
    TheirBlipProcessor(BlipImageProcessor(size={"height": side, "width": side}), tokenizer).save_pretrained(path)
    return path


def ved_folder(path: Path, shape: int = 0) -> Path:
    backend: Tokenizer = byte_level(["<|endoftext|>"])
    backend.post_processor = processors.ByteLevel(trim_offsets=False)  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>"
    ).save_pretrained(path)
    vision: Any = (ViTConfig, DeiTConfig)[shape](**SHAPES[shape])
    text = GPT2Config(vocab_size=backend.get_vocab_size(), n_embd=(24, 15)[shape], n_layer=2, n_head=3, n_positions=61)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        vision, text, decoder_start_token_id=0, eos_token_id=0, pad_token_id=0
    )
    model = noisy(VisionEncoderDecoderModel(config), 0.5, seed=shape + 5)
    model.decoder.transformer.wte.weight.data *= 2
    model.generation_config.update(num_beams=4, max_length=16)
    model.save_pretrained(path)
    side = SHAPES[shape]["image_size"]
    size = {"height": side, "width": side}
    pixels: Any = (
        ViTImageProcessor(size=size)
        if shape == 0
        else DeiTImageProcessor(size={"height": side + 6, "width": side + 6}, crop_size=size)
    )
    pixels.save_pretrained(path)
    return path


@pytest.mark.parametrize("shape", [0, 1])
def test_blip_is_transformers(shape: int, tmp_path: Path) -> None:
    path = blip_folder(tmp_path, shape=shape)
    theirs = BlipForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    processor, ours, images = AutoProcessor.from_pretrained(path), load(path), pictures()
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    batch = ours.batch(images)
    assert batch.pixels is not None
    assert torch.equal(batch.pixels[:, 0], pixels)
    assert ours.tokenizer.eos_ids == (3,)  # Not 2, which the files call eos.
    texts = ["a photo of two dogs", "the red star", "a"]
    for changes in ({}, {"num_beams": 3}):
        silent = theirs.generate(pixels, max_new_tokens=9, **changes)
        assert ids(ours, images, [None] * 3, max_new_tokens=9, **changes) == until_end(silent[:, 1:], [3])
        found = ids(ours, images, texts, max_new_tokens=9, **changes)
        for i, text in enumerate(texts):  # Of several, transformers leaves [SEP] and padding in the middle.
            given = processor(images=images[i], text=text, return_tensors="pt")
            row = theirs.generate(**given, max_new_tokens=9, **changes)
            count = given["input_ids"].shape[1] - 1
            assert found[i] == until_end(row[:, count:], [3])[0]
            with torch.no_grad():
                prompt = row[:, :count]
                want = theirs(given["pixel_values"], input_ids=prompt).logits[:, -1]
            close(first_logits(ours, images[i : i + 1], [text]), want)
    row = theirs.generate(**processor(images=images[0], text=texts[0], return_tensors="pt"), max_new_tokens=9)
    said = processor.decode(row[0], skip_special_tokens=True)
    assert ours(images[0], prompt=texts[0], max_new_tokens=9)[0][0].text == said
    assert said.startswith("a photo of two dogs")


def test_blip_answers_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = blip_folder(tmp_path, BlipForQuestionAnswering)
    theirs = BlipForQuestionAnswering.from_pretrained(path, dtype=torch.float32).eval()
    processor, ours, images = AutoProcessor.from_pretrained(path), load(path), pictures()
    questions = ["what is this?", "a man in the picture", "what star?"]
    found = ids(ours, images, questions, max_new_tokens=9)
    for i, question in enumerate(questions):
        given = processor(images=images[i], text=question, return_tensors="pt")
        assert found[i] == until_end(theirs.generate(**given, max_new_tokens=9)[:, 1:], [3])[0]
    with pytest.raises(ValueError, match="answers questions: give one as the prompt"):
        ours(images)
    heat = ours.model.attention_map(ours.processor.with_prompts(ours.batch(images), questions))  # pyright: ignore
    assert heat.shape[3:] == (4, 4)
    images[0].save(tmp_path / "one.png")
    assert main(["caption", str(tmp_path / "one.png"), "--model", str(path), "--prompt", questions[0]]) == 0
    assert capsys.readouterr().out.strip()
    assert main(["caption", str(tmp_path / "one.png"), "--model", str(path)]) == 2
    assert "give one as the prompt" in capsys.readouterr().err


def test_a_blip_that_matches_does_not_caption(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"matches images and texts .* does not caption"):
        load(blip_folder(tmp_path, BlipForImageTextRetrieval))


@pytest.mark.parametrize("shape", [0, 1])
def test_a_vision_encoder_decoder_is_transformers(shape: int, tmp_path: Path) -> None:
    path = ved_folder(tmp_path, shape)
    theirs = VisionEncoderDecoderModel.from_pretrained(path, dtype=torch.float32).eval()
    ours, images = load(path), pictures()
    pixels = AutoImageProcessor.from_pretrained(path)(images, return_tensors="pt")["pixel_values"]
    batch = ours.batch(images)
    assert batch.pixels is not None
    assert torch.equal(batch.pixels[:, 0], pixels)
    assert ours.generation.num_beams == 4
    assert ours.tokenizer.eos_ids == (0,)
    want = theirs.generate(pixels)
    found = ours(images)
    assert [best.tokens for best, *_ in found] == until_end(want[:, 1:], [0])
    assert all(best.text for best, *_ in found)
    tokenizer = AutoTokenizer.from_pretrained(path)
    for changes in ({"num_beams": 1}, {"num_beams": 3}):
        want = theirs.generate(pixels, max_new_tokens=9, **changes)
        found = ids(ours, images, [None] * 3, max_new_tokens=9, **changes)
        assert found == until_end(want[:, 1:], [0])
    prompt = torch.tensor([[0, *tokenizer("a photo of", add_special_tokens=False).input_ids]])
    with torch.no_grad():
        want = theirs(pixels[:1], decoder_input_ids=prompt).logits[:, -1]
    close(first_logits(ours, images[:1], ["a photo of"]), want)


def test_a_caption_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = blip_folder(tmp_path / "model")
    picture, out = tmp_path / "one.png", tmp_path / "captions.jsonl"
    pictures()[0].save(picture)
    words = ["caption", str(picture), "--model", str(path), "--prompt", "a photo of", "--json"]
    assert main([*words, "--max-new-tokens", "5"]) == 0
    said = json.loads(capsys.readouterr().out)
    text = said["captions"][0]["text"] if "captions" in said else json.dumps(said)
    assert "a photo of" in text
    assert not out.exists()
