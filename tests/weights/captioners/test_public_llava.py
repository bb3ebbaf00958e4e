"""LLaVA and its kin, Idefics3 and SmolVLM by their folders: pixels, prompts, logits and ids are transformers'."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SmolVLMImageProcessor,
)

from mmtransformer.images import ImageTransform
from mmtransformer.images.tiles import fitted_tiles, split_tiles
from mmtransformer.text.conversation import Conversation
from support.cli import mmt
from support.public import byte_level, close, first_logits, ids, load, noisy, pictures, until_end

CLIP = {"hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 21,
        "patch_size": 7}  # fmt: skip
SIGLIP = {"hidden_size": 20, "intermediate_size": 43, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": 20, "patch_size": 5}  # fmt: skip
POINTS = [[21, 42], [42, 21], [42, 42], [63, 21]]
SIDES = [[h, w] for h in (20, 40, 60) for w in (20, 40, 60)]
VICUNA = (
    "{% for message in messages %}{{ message['role'] | upper }}: {% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<image>\n{% else %}{{ content['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
MARKED = (  # begins with what the tokenizer would put there too
    "<s>{% for message in messages %}{{ message['role'] | capitalize }}:{% for line in message['content'] %}"
    "{% if line['type'] == 'text' %}{{ line['text'] }}{% else %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def tokenizer() -> Any:
    backend = byte_level(["<s>", "<pad>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    words = ["<image>", "<end_of_utterance>", "<fake_token_around_image>", "<global-img>", "<video>"]
    words += [f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)]
    backend.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in words])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


def text(words: Any, **options: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(words) + 3, "hidden_size": 24, "intermediate_size": 31, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1031, "pad_token_id": 1,
        "bos_token_id": 0, "eos_token_id": 2, **options,
    }  # fmt: skip


def llava(words: Any) -> tuple[Any, Any]:
    image = words.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**CLIP), text_config=LlamaConfig(**text(words)), image_token_index=image
    )
    pixels = CLIPImageProcessor(size={"shortest_edge": 21}, crop_size={"height": 21, "width": 21})
    made = LlavaProcessor(
        pixels, words, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=VICUNA,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config), made


def joycaption(words: Any) -> tuple[Any, Any]:
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(**SIGLIP), text_config=Qwen2Config(**text(words)),
        image_token_index=words.convert_tokens_to_ids("<image>"), vision_feature_select_strategy="full",
    )  # fmt: skip
    pixels = SiglipImageProcessor(size={"height": 20, "width": 20})
    made = LlavaProcessor(pixels, words, patch_size=5, vision_feature_select_strategy="full", chat_template=MARKED)
    return LlavaForConditionalGeneration(config), made


def llava_next(words: Any) -> tuple[Any, Any]:
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**CLIP), text_config=LlamaConfig(**text(words)), image_grid_pinpoints=POINTS,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    pixels = LlavaNextImageProcessor(
        size={"shortest_edge": 21}, crop_size={"height": 21, "width": 21}, image_grid_pinpoints=POINTS
    )
    made = LlavaNextProcessor(
        pixels, words, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=VICUNA,
    )  # fmt: skip
    return LlavaNextForConditionalGeneration(config), made


def onevision(words: Any) -> tuple[Any, Any]:
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**SIGLIP, vision_use_head=False), text_config=Qwen2Config(**text(words)),
        image_grid_pinpoints=SIDES, image_token_index=words.convert_tokens_to_ids("<image>"),
        video_token_index=words.convert_tokens_to_ids("<video>"), vision_aspect_ratio="anyres_max_2",
    )  # fmt: skip
    pixels = LlavaOnevisionImageProcessor(
        size={"height": 20, "width": 20}, image_grid_pinpoints=SIDES, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    made = LlavaOnevisionProcessor(
        pixels, words, LlavaOnevisionVideoProcessor(), num_image_tokens=16, vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2", chat_template=MARKED,
    )  # fmt: skip
    return LlavaOnevisionForConditionalGeneration(config), made


def idefics3(words: Any, *, split: bool = True) -> tuple[Any, Any]:
    config = Idefics3Config(
        vision_config=SIGLIP, text_config=LlamaConfig(**text(words)), tie_word_embeddings=True,
        image_token_id=words.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    pixels = Idefics3ImageProcessor(
        size={"longest_edge": 60}, max_image_size={"longest_edge": 20}, do_image_splitting=split
    )
    return Idefics3ForConditionalGeneration(config), Idefics3Processor(
        pixels, words, image_seq_len=4, chat_template=MARKED
    )


FAMILIES = {
    "llava": llava,
    "llava like JoyCaption": joycaption,
    "next": llava_next,
    "onevision": onevision,
    "idefics3": idefics3,
    "idefics3, whole": lambda words: idefics3(words, split=False),
}
TEXTS = ["what is this?", "describe the image in detail, please.", "a photo of"]


@pytest.fixture(params=FAMILIES, name="case")
def any_case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any, Path]:
    torch.manual_seed(0)
    model, processor = FAMILIES[request.param](tokenizer())
    model = noisy(model, 0.5, seed=3)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return model, processor, tmp_path


def spoken(processor: Any, words: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": words}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def test_it_is_transformers(case: tuple[Any, Any, Path]) -> None:
    theirs, processor, path = case
    ours, images = load(path), pictures()
    prompts = [spoken(processor, words) for words in TEXTS]
    again = prompts[0].startswith("<s>")  # as their own apply_chat_template does with tokenize=True
    nested = [[image] for image in images] if "idefics3" in theirs.config.model_type else images
    given = processor(images=nested, text=prompts, padding=True, return_tensors="pt", add_special_tokens=not again)
    given.pop("batch_num_images", None)
    assert ours.processor is not None
    batch = ours.processor.with_prompts(ours.batch(images), TEXTS)
    assert batch.pixels is not None
    pixels = given["pixel_values"]
    assert torch.equal(batch.pixels, pixels if pixels.ndim == 5 else pixels[:, None])
    assert torch.equal(batch.tokens, given["input_ids"])
    assert torch.equal(batch.attention_mask, given["attention_mask"].bool())
    assert ours.tokenizer.eos_ids == (2,)
    with torch.no_grad():
        close(first_logits(ours, images, TEXTS), theirs(**given).logits[:, -1])
        for changes in ({"num_beams": 1}, {"num_beams": 3}):
            rows = theirs.generate(**given, max_new_tokens=9, do_sample=False, **changes)
            want = until_end(rows[:, given["input_ids"].shape[1] :], ours.tokenizer.eos_ids)
            assert ids(ours, images, TEXTS, max_new_tokens=9, **changes) == want
            assert len({tuple(row) for row in want}) > 1


def test_words_heat_maps_and_whole_prompts(case: tuple[Any, Any, Path]) -> None:
    _, processor, path = case
    ours, image = load(path), pictures()[0]
    assert ours.processor is not None
    silent = ours(image, max_new_tokens=5)[0][0]
    assert silent == ours(image, prompt=ours.processor.prompt, max_new_tokens=5)[0][0]
    said = ours(image, prompt="what is this?", max_new_tokens=5)[0][0]
    assert said == ours(image, prompt=spoken(processor, "what is this?"), max_new_tokens=5)[0][0]
    heat = ours.heatmap(image, said, ours.prompt_builder("what is this?"))
    assert heat.shape == (len(said.words), *ours.model.vision.grid_size)
    assert (heat >= 0).all()
    with pytest.raises(ValueError, match="a prompt has one <image> for its picture, this one has 2"):
        ours(image, prompt="<image> and <image>")


@pytest.mark.parametrize("make", [llava_next, idefics3])
def test_the_command_line_says_what_it_captions_after(
    make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor = make(tokenizer())
    noisy(model, 0.5, seed=3).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    images = [str(tmp_path / f"{i}.png") for i in range(2)]
    for image, path in zip(pictures(), images, strict=False):
        image.save(path)
    ours = load(tmp_path / "model")
    for words in (None, "what is this?"):
        said = ["--prompt", words] if words else []
        code, out, err = mmt(capsys, "caption", *images, "--model", str(tmp_path / "model"), *said, "--device", "cpu")
        assert code == 0, err
        want = [row[0].text for row in ours(images, prompt=words)]
        assert all(text in out for text in want if text.isprintable())
        assert (f'captioned after "{ours.processor.prompt}"' in err) == (words is None)  # type: ignore[union-attr]


def test_without_a_chat_template(tmp_path: Path) -> None:
    for make, said in ((llava, None), (llava_next, "has no chat template, and its models read prompts of several")):
        path = tmp_path / make.__name__
        model, processor = make(tokenizer())
        model.save_pretrained(path)
        processor.save_pretrained(path)
        (path / "chat_template.jinja").unlink()
        ours = load(path)
        assert ours.processor is not None
        if said is None:
            talk = ours.processor.conversation  # type: ignore[attr-defined]
            assert talk("what?") == "USER: <image>\nwhat? ASSISTANT:"
            asked = Conversation(["what?", "a dog", "why?"])
            assert talk(asked) == "USER: <image>\nwhat? ASSISTANT: a dog</s>USER: why? ASSISTANT:"
        else:
            with pytest.raises(ValueError, match=said):
                ours(pictures()[0], max_new_tokens=3)
            ours(pictures()[0], prompt="[INST] <image>\nwhat? [/INST]", max_new_tokens=3)


@pytest.mark.parametrize("name", ["processor_config.json", "config.json"])
def test_what_does_not_fit_is_named(name: str, tmp_path: Path) -> None:
    model, processor = llava_next(tokenizer())
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    values = json.loads((tmp_path / name).read_text())
    if name == "config.json":
        values["image_token_index"] -= 1
        said = "placeholders have the id .*, but the tokenizer makes"
    else:
        values["image_processor"]["image_grid_pinpoints"] = POINTS[:2]
        said = "image_grid_pinpoints of config.json and of preprocessor_config.json differ"
    (tmp_path / name).write_text(json.dumps(values))
    with pytest.raises(ValueError, match=said):
        load(tmp_path)


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
def test_tiles_of_pictures_of_many_shapes(backend: Any) -> None:
    from PIL import Image
    from transformers import Idefics3ImageProcessorPil, LlavaNextImageProcessorPil

    generator = torch.Generator().manual_seed(3)
    near = {"atol": 0.0, "rtol": 0.0} if backend == "torchvision" else {"atol": 5e-7, "rtol": 0.0}
    for i in range(12):
        height, width = torch.randint(8, 150, (2,), generator=generator).tolist()
        data = torch.randint(256, (height // 4 + 1, width // 4 + 1, 3), generator=generator, dtype=torch.uint8)
        image = Image.fromarray(data.numpy()).resize((width, height))
        kinds: Any = (LlavaNextImageProcessor, LlavaNextImageProcessorPil)
        cut = kinds[backend == "pil"](
            size={"height": 21, "width": 21}, crop_size={"height": 21, "width": 21}, image_grid_pinpoints=POINTS
        )
        half = ImageTransform(21, "squash", tuple(cut.image_mean), tuple(cut.image_std), backend=backend)
        want = torch.as_tensor(cut(image, return_tensors="pt")["pixel_values"][0])
        torch.testing.assert_close(fitted_tiles(image, half, [tuple(p) for p in POINTS]), want, **near)
        kinds = (SmolVLMImageProcessor if i % 2 else Idefics3ImageProcessor, Idefics3ImageProcessorPil)
        split = kinds[backend == "pil"](size={"longest_edge": 63}, max_image_size={"longest_edge": 21})
        transform = ImageTransform(21, "squash", interpolation="lanczos", backend=backend)
        given = split([[image]], return_tensors="pt", return_row_col_info=True)
        pixels, grid = split_tiles(image, transform, 63)
        torch.testing.assert_close(pixels, torch.as_tensor(given["pixel_values"][0]), **near)
        assert grid == (given["rows"][0][0], given["cols"][0][0])
