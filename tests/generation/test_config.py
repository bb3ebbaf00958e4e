"""GenerationConfig: what it refuses, what follows what, and that the command line has all of it."""

import argparse
import dataclasses
import math
import pickle
import re
from typing import Any

import pytest

from mmtransformer import AttentionConfig, Augment, GenerationConfig, ImageGenerationConfig, ImageTransform
from mmtransformer.cli.options import add_generation_options, generation_changes
from mmtransformer.data.files.read_options import ReadOptions
from mmtransformer.data.loading.module import LoaderConfig
from mmtransformer.training import OptimConfig

NUMBERS = [
    ("repetition_penalty", (0.0, -1.0, 1e-50, 1e300)),
    ("temperature", (0.0, -1.0, 1e-42, 1e300)),
    ("no_repeat_ngram_size", (-1,)),
    ("min_new_tokens", (-1,)),
    ("max_new_tokens", (0,)),
    ("num_beams", (0, 5000)),
    ("num_beam_groups", (0,)),
    ("num_return_sequences", (0,)),
    ("length_penalty", (500.0, -500.0)),
    ("length_offset", (-0.5,)),
    ("diversity_penalty", (-0.5, 1e300)),
    ("guidance_scale", (-0.5, 1e300)),
    ("top_k", (0,)),
    ("top_p", (0.0, 1.5, 1e-50)),
    ("seed", (-1,)),
]


@pytest.mark.parametrize(("name", "wrong"), NUMBERS)
def test_numbers_that_make_no_sense_are_named(name: str, wrong: tuple[float, ...]) -> None:
    odd = (math.nan, math.inf, -math.inf) if isinstance(getattr(GenerationConfig(), name), float) else ()
    for value in (*wrong, *odd, *((math.nan,) if name == "top_p" else ())):
        with pytest.raises(ValueError, match=rf"^{name}\b"):
            GenerationConfig(**{name: value})


@pytest.mark.parametrize("field", dataclasses.fields(GenerationConfig), ids=lambda field: field.name)
def test_values_of_another_kind_are_named(field: Any) -> None:
    default, whole = getattr(GenerationConfig(), field.name), "int" in str(field.type)
    wrong: list[Any] = ["3", [1], {"a": 1}] + [None] * (field.name not in ("top_k", "top_p"))
    wrong += [math.nan, math.inf, 2.5] if whole else []
    wrong += [1, 0.5] if isinstance(default, bool) else [True, False]
    if field.name == "force_words":
        wrong = ["dog", [3], 3, None, True, ["dog", " "]]
    for value in wrong:
        for make in (GenerationConfig, GenerationConfig().updated):
            with pytest.raises(ValueError, match=rf"^{field.name}\b"):
                make(**{field.name: value})


def test_settings_of_beams_follow_those_that_are_named() -> None:
    three = GenerationConfig(num_beams=3)
    assert three.updated() == three
    assert three.updated(num_return_sequences=5).num_beams == 5
    assert three.updated(num_return_sequences=2).num_beams == 3
    assert three.updated(num_beam_groups=2).num_beams == 4
    two = GenerationConfig(num_beams=4, num_beam_groups=2, diversity_penalty=0.5)
    assert two.updated(num_return_sequences=5).num_beams == 6
    assert two.updated(do_sample=True, num_return_sequences=5) == GenerationConfig(
        do_sample=True, num_return_sequences=5
    )
    assert two.updated(do_sample=True).updated(num_return_sequences=5).num_beams == 1
    assert three.updated(force_words=["a"]).num_beams == 5
    assert three.updated(force_words=["a"], num_beams=2).num_beams == 2
    with pytest.raises(ValueError, match=r"num_return_sequences \(5\) cannot exceed num_beams \(2\)"):
        three.updated(num_return_sequences=5, num_beams=2)
    assert two.one_at_a_time() == GenerationConfig()


def test_every_setting_is_an_option_of_the_command_line() -> None:
    parser = argparse.ArgumentParser()
    add_generation_options(parser)
    assert generation_changes(parser.parse_args([])) == {}
    words = ["--num-beams", "4", "--length-penalty", "0.5", "--do-sample", "--force-words", "a", "--force-words", "b c"]
    assert generation_changes(parser.parse_args([*words, "--no-add-image-tokens", "--top-k", "7"])) == {
        "num_beams": 4, "length_penalty": 0.5, "do_sample": True, "force_words": ["a", "b c"],
        "add_image_tokens": False, "top_k": 7,
    }  # fmt: skip
    text = " ".join(parser.format_help().split())
    for field in dataclasses.fields(GenerationConfig):
        assert f"--{field.name.replace('_', '-')}" in text
    assert "Draw from the fewest tokens that hold this share of probability" in text


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        (GenerationConfig, "num_beam", 'GenerationConfig has no "num_beam"; did you mean "num_beams"?'),
        (GenerationConfig, "early_stopping", 'GenerationConfig has no "early_stopping": it has max_new_tokens, '),
        (
            ImageGenerationConfig,
            "num_steps",
            'ImageGenerationConfig has no "num_steps"; did you mean "num_inference_steps"?',
        ),
        (GenerationConfig, "stop_words", 'GenerationConfig has no "stop_words": it has max_new_tokens'),
        (GenerationConfig, "bad_words", 'GenerationConfig has no "bad_words": it has max_new_tokens'),
        (OptimConfig, "warmup", 'OptimConfig has no "warmup"; did you mean "warmup_steps"?'),
        (LoaderConfig, "num_worker", 'LoaderConfig has no "num_worker"; did you mean "num_workers"?'),
        (ReadOptions, "image_colum", 'ReadOptions has no "image_colum"; did you mean "image_column"?'),
        (ImageTransform, "img_size", 'ImageTransform has no "img_size"; did you mean "image_size"?'),
        (Augment, "crops", "Augment has no "),
        (AttentionConfig, "kv_heads", 'AttentionConfig has no "kv_heads"; did you mean "num_kv_heads"?'),
    ],
)
def test_an_unknown_setting_is_answered_with_the_nearest(kind: Any, name: str, said: str) -> None:
    with pytest.raises(TypeError, match=re.escape(said)):
        kind(**{name: 1})
    made = kind()
    assert dataclasses.replace(made) == made == pickle.loads(pickle.dumps(made))
    with pytest.raises(TypeError, match=re.escape(said)):
        dataclasses.replace(made, **{name: 1})
