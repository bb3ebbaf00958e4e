"""Pixels, chat templates and searches out of public folders."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoImageProcessor, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from mmtransformer.weights.processors.generation_config import read_ends, read_search, read_start
from mmtransformer.weights.processors.pixels import read_pixels
from mmtransformer.weights.processors.templates import ChatTemplate
from support.public import byte_level, pictures

PROCESSORS: list[dict[str, Any]] = [
    {"image_processor_type": "BlipImageProcessor", "size": {"height": 29, "width": 29}},
    {"image_processor_type": "BlipImageProcessorFast", "size": {"height": 31, "width": 43}, "resample": 2},
    {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 30}, "crop_size": 30},
    {"feature_extractor_type": "CLIPFeatureExtractor", "size": 31, "crop_size": 24, "do_center_crop": True},
    {"feature_extractor_type": "ViTFeatureExtractor", "size": 40},
    {"image_processor_type": "DeiTImageProcessor", "size": {"height": 41, "width": 41}, "crop_size": 30},
    {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 41}, "crop_size": 36},
    {"image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32}, "image_mean": [0, 0.5, 0.4]},
    {"image_processor_type": "SiglipImageProcessor", "size": {"height": 23, "width": 23}, "resample": 1},
]  # fmt: skip


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
@pytest.mark.parametrize("values", PROCESSORS)
def test_pixels_are_those_of_transformers(values: dict[str, Any], backend: Any, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    theirs = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
    ours = read_pixels(tmp_path, "Blip", backend=backend)
    for image in pictures():
        want = theirs(image, return_tensors="pt")["pixel_values"][0]
        found = ours(image)
        if backend == "torchvision":
            assert torch.equal(found, want)
        else:  # equal bytes; they are scaled in another order
            torch.testing.assert_close(found, want, atol=3e-6, rtol=0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_processor_type": "FlavaImageProcessor"}, "the image processor 'Flava' is not known here: Blip, CLIP"),
        ({"do_resize": False}, "do_resize is False; only True is known here"),
        ({"do_pad": True}, "do_pad is True"),
        ({"rescale_factor": 0.5}, "rescale_factor is 0.5, not 1/255"),
        ({"resample": 0}, "resample is 0; 1 (lanczos), 2"),
        ({"size": {"longest_edge": 9}}, "size {'longest_edge': 9} is neither"),
        ({"size": {"shortest_edge": 9}}, "the size is a shortest_edge without do_center_crop"),
        ({"size": {"shortest_edge": 9}, "crop_size": 11, "do_center_crop": True}, "a crop of 11 x 11 from"),
        ({"size": 13}, "gives pixels of 13 x 13, and the model reads 14 x 14"),
    ],
)
def test_pixels_that_are_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=re.escape(message)):
        read_pixels(tmp_path, "Blip", size=14)


TEMPLATE = """{% for m in messages %}{% if m.role == 'user' %}
USER: {% for c in m.content %}{% if c.type == 'image' %}<image>
{% else %}{{ c.text | trim }}{% endif %}{% endfor %}

{%- elif m.role == 'assistant' %}{% generation %}{{ m.content | tojson }}{{ eos_token }}{% endgeneration %}{% endif %}
{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"""
CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " what <is> this? "}]},
    {"role": "assistant", "content": "a 'dog' & <b>"},
    {"role": "user", "content": [{"type": "text", "text": "sure?"}]},
]


@pytest.mark.parametrize("file", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
def test_chat_templates(file: str, tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(["<s>"]), eos_token="<s>")
    tokenizer.chat_template = TEMPLATE
    want = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    tokenizer.save_pretrained(tmp_path)
    if file != "chat_template.jinja":
        (tmp_path / "chat_template.jinja").unlink()
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        if file == "tokenizer_config.json":
            config["chat_template"] = [{"name": "other", "template": "no"}, {"name": "default", "template": TEMPLATE}]
            (tmp_path / file).write_text(json.dumps(config))
        else:
            (tmp_path / file).write_text(json.dumps({"chat_template": TEMPLATE}))
    found = ChatTemplate.of(tmp_path)
    assert found is not None
    assert found.render(CHAT) == want
    if file == "tokenizer_config.json":
        assert AutoTokenizer.from_pretrained(tmp_path).chat_template["default"] == TEMPLATE
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ ''.__class__.__mro__ }}{{ ''.__class__.__subclasses__() }}", "SecurityError"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ raise_exception('Only one image') }}", "Only one image"),
        ("{{ messages[7].role.x }}", "UndefinedError"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError"),
    ],
)
def test_templates_that_are_refused(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"the\.jinja: the chat template does not take this prompt") as error:
        ChatTemplate(template, "the.jinja").render(CHAT)
    assert message in str(error.value)


def test_searches_and_ends(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"text_config": {"eos_token_id": 7}}')
    assert read_search(tmp_path).max_new_tokens == 20
    assert read_ends(tmp_path, "text_config") == (7,)
    with pytest.raises(ValueError, match="neither generation_config.json nor config.json says".replace(".", r"\.")):
        read_ends(tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text('{"eos_token_id": "3"}')
    with pytest.raises(ValueError, match="eos_token_id is '3', not an id or a list of ids"):
        read_ends(tmp_path)
    path.write_text(
        '{"num_beams": 5, "eos_token_id": [3, 4], "length_penalty": -1.0, "max_new_tokens": 9, "top_k": 50}'
    )
    found = read_search(tmp_path)
    assert (found.num_beams, found.length_penalty, found.max_new_tokens, found.top_k) == (5, -1.0, 9, None)
    assert read_ends(tmp_path, "text_config") == (3, 4)
    path.write_text('{"num_beams": 4, "num_beam_groups": 2, "bad_words_ids": [[3]], "early_stopping": false}')
    with pytest.warns(UserWarning, match=r"num_beam_groups, bad_words_ids: not supported here"):
        assert read_search(tmp_path).num_beams == 4
    path.write_text('{"max_length": 16, "min_length": 4, "decoder_start_token_id": 5, "bos_token_id": 6}')
    found = read_search(tmp_path, prompt_len=1)  # which these lengths count
    assert (found.max_new_tokens, found.min_new_tokens) == (15, 3)
    assert read_start(tmp_path) == 5
    path.write_text('{"bos_token_id": 6}')
    assert read_start(tmp_path) == 6
    path.write_text("{}")
    with pytest.raises(ValueError, match="decoder_start_token_id, the id that a text begins with"):
        read_start(tmp_path, "text_config")
    path.write_text('{"num_beams": 0}')
    with pytest.raises(ValueError, match=r"generation_config\.json: num_beams must be at least 1"):
        read_search(tmp_path)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"num_beams": 3, "do_sample": True}, "do_sample among beams"),
        ({"stop_strings": ["."], "a_setting_of_tomorrow": 3}, "stop_strings, a_setting_of_tomorrow"),
        ({"renormalize_logits": True, "max_time": 2.0}, "renormalize_logits, max_time"),
    ],
)
def test_settings_without_a_counterpart_are_named(values: dict[str, Any], named: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    with pytest.warns(UserWarning, match=f"generation_config.json: {named}: not supported here".replace(".", r"\.")):
        read_search(tmp_path)


def test_settings_that_change_no_text_are_passed_over(tmp_path: Path) -> None:
    values = vars(GenerationConfig()) | GenerationConfig._get_default_generation_params()
    values |= {"cache_implementation": "static", "output_attentions": True, "prompt_lookup_num_tokens": 3}
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    assert read_search(tmp_path).num_beams == 1  # and no warning


@pytest.mark.parametrize(("said", "top_k"), [({}, 50), ({"top_k": 0}, None), ({"top_k": 7}, 7)])
def test_drawing_is_from_as_many_as_in_transformers(said: dict[str, int], top_k: int | None, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": True, **said}))
    assert read_search(tmp_path).top_k == top_k


@pytest.mark.parametrize("values", [{"num_beams": "4"}, {"max_length": [9]}, {"top_p": "x", "do_sample": True}])
def test_settings_that_make_no_sense_are_named(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"generation_config.json: {next(iter(values))} must be".replace(".", r"\.")):
        read_search(tmp_path)
