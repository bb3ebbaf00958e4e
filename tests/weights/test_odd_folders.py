"""Captioners' folders as they come: of old versions, in half precision, with half a config, or half downloaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmtransformer import ImageCaptioner
from mmtransformer.pipelines.parity import compare
from mmtransformer.serialization.weight_files import write_weights
from mmtransformer.weights.shared.folders import read_tensors
from support import hub_parts
from support.cli import mmt
from support.hub import folder
from support.hub_models import hub_folder
from support.public import pictures

WEIGHTS = "model.safetensors"
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # of transformers' processor of PaliGemma


def rewritten(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """The folder with other tensors."""
    write_weights(path / WEIGHTS, change({name: tensor.clone() for name, tensor in read_tensors(path).items()}))


def said(path: Path, file: str, **values: Any) -> None:
    (path / file).write_text(json.dumps(json.loads((path / file).read_text()) | values))


def without(path: Path, part: str, key: str) -> None:
    config = json.loads((path / "config.json").read_text())
    del config[part][key]
    (path / "config.json").write_text(json.dumps(config))


def equal(path: Path) -> None:
    report = compare(path, pictures()[:1], max_new_tokens=5)
    assert report.equal, report.table()


BUFFERS = {
    "vit-gpt2": ["decoder.transformer.h.1.crossattention.masked_bias", "decoder.transformer.h.0.attn.masked_bias"],
    "instructblip": ["qformer.embeddings.position_ids", "vision_model.embeddings.position_ids"],
    "blip": ["text_decoder.bert.embeddings.position_ids", "vision_model.embeddings.position_ids"],
    "git": ["git.embeddings.position_ids", "git.image_encoder.vision_model.embeddings.position_ids"],
    "llava": ["vision_tower.vision_model.embeddings.position_ids"],
    "paligemma": ["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"],
    "idefics": ["model.vision_model.embeddings.position_ids", "model.layers.1.self_attn.rotary_emb.inv_freq"],
    "idefics3": ["model.text_model.layers.0.self_attn.rotary_emb.inv_freq"],
}


@pytest.mark.parametrize("family", BUFFERS)
def test_buffers_of_old_versions_are_passed_over(family: str, tmp_path: Path) -> None:
    path = folder(tmp_path, family)
    rewritten(path, lambda state: state | {name: torch.arange(3.0) for name in BUFFERS[family]})
    equal(path)
    rewritten(path, lambda state: state | {f"{BUFFERS[family][0]}s": torch.arange(3.0)})
    with pytest.raises(ValueError, match=r"unknown|belong nowhere"):
        ImageCaptioner.from_pretrained(path)


@pytest.mark.parametrize("family", ["git", "blip2", "blip"])
def test_norms_of_old_versions_are_understood(family: str, tmp_path: Path) -> None:
    path = folder(tmp_path, family)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
        for new, name in old.items():
            state = {key.replace(new, name): tensor for key, tensor in state.items()}
        return state

    rewritten(path, renamed)
    assert any(name.endswith("LayerNorm.gamma") for name in read_tensors(path))
    equal(path)


@pytest.mark.parametrize("family", ["vit-bert", "vit-gpt2", "blip", "git"])
def test_sums_of_half_precision_lose_no_digit(family: str, tmp_path: Path) -> None:
    path = folder(tmp_path, family)
    rewritten(path, lambda state: {name: tensor.bfloat16() for name, tensor in state.items()})
    said(path, "config.json", torch_dtype="bfloat16")
    equal(path)


@pytest.mark.parametrize("family", ["llava", "llava-onevision", "paligemma"])
def test_a_tower_without_its_heads_has_those_of_its_kind(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tower of CLIP-B or SigLIP-B: what is usual of its kind is not written, and is not that of the family's own."""
    monkeypatch.setitem(hub_parts.VISION, "hidden_size", 48)
    monkeypatch.setitem(hub_parts.VISION, "num_attention_heads", 12)
    path = folder(tmp_path, family)
    without(path, "vision_config", "num_attention_heads")
    equal(path)


def test_a_max_length_counts_the_start_of_gits_texts(tmp_path: Path) -> None:
    path = folder(tmp_path, "git")
    said(path, "generation_config.json", max_length=9)
    assert ImageCaptioner.from_pretrained(path).generation.max_new_tokens == 8


def test_the_start_of_paligemmas_prompts_is_the_tokenizers(tmp_path: Path) -> None:
    path = folder(tmp_path, "paligemma")
    without(path, "text_config", "bos_token_id")
    equal(path)


def test_an_opt_needs_no_name(tmp_path: Path) -> None:
    path = folder(tmp_path, "blip2")
    without(path, "text_config", "model_type")
    equal(path)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
DAMAGE: dict[str, tuple[str, str | bytes, str]] = {
    "a pointer for weights": (WEIGHTS, POINTER, "a pointer of Git LFS .*git lfs pull"),
    "a pointer for a tokenizer": ("tokenizer.json", POINTER, "a pointer of Git LFS .*git lfs pull"),
    "empty weights": (WEIGHTS, b"", "an empty file; copy or download it again"),
    "an empty config": ("config.json", b"", "an empty file; copy or download it again"),
    "weights cut short": (WEIGHTS, b"\x10\0\0\0\0\0\0\0{}", "not a whole safetensors file: .* download it again"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_half_a_download_is_named(case: str, tmp_path: Path) -> None:
    path = folder(tmp_path, "blip")
    name, content, message = DAMAGE[case]
    (path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        ImageCaptioner.from_pretrained(path)


NONSENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "blip": ("config.json", {"text_config": None}),
    "git": ("config.json", {"vision_config": "large"}),
    "llava": ("config.json", {"vision_config": {"patch_size": None}}),
    "idefics": ("config.json", {"vision_config": ["x"]}),
    "idefics3": ("processor_config.json", {"image_processor": {"size": 28, "max_image_size": {"longest_edge": 28}}}),
    "vit-gpt2": ("preprocessor_config.json", {"image_mean": "gray"}),
}


@pytest.mark.parametrize("family", NONSENSE)
def test_what_makes_no_sense_is_one_line(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, image = folder(tmp_path / "model", family), tmp_path / "x.png"
    pictures()[0].save(image)
    name, values = NONSENSE[family]
    said(path, name, **values)
    code, _, err = mmt(capsys, "caption", str(image), "--model", str(path))
    assert (code, err.count("\n")) == (2, 1), err
    assert str(path) in err


def test_scores_that_are_no_numbers_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, image = folder(tmp_path / "model", "blip"), tmp_path / "x.png"
    pictures()[0].save(image)

    def overflowing(state: dict[str, Tensor]) -> dict[str, Tensor]:
        state["text_decoder.cls.predictions.bias"][3] = torch.inf
        return state

    rewritten(path, overflowing)
    for beams in ("1", "3"):
        code, out, err = mmt(capsys, "caption", str(image), "--model", str(path), "--num-beams", beams)
        assert (code, out) == (2, "")
        assert "its weights are damaged, or its numbers too large for this precision" in err


def test_what_transformers_cannot_run_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder(tmp_path, "blip")
    said(path, "config.json", return_dict=False)  # so that its outputs have no names
    code, _, err = mmt(capsys, "parity", str(path), "--max-new-tokens", "3")
    assert code == 2
    assert "transformers' model cannot compute, so there is nothing to compare: " in err.splitlines()[-1]


PIXELS: dict[str, tuple[str, dict[str, Any]]] = {
    "one mean for all colours": ("blip", {"image_mean": 0.4, "image_std": 0.25}),
    "SigLIP's shortest edge": ("paligemma", {"size": 32, "do_center_crop": True, "crop_size": 28}),
}


@pytest.mark.parametrize("case", PIXELS)
def test_pixels_of_short_settings(case: str, tmp_path: Path) -> None:
    family, values = PIXELS[case]
    path = folder(tmp_path, family)
    own = json.loads((path / "processor_config.json").read_text())
    own["image_processor"] |= values
    (path / "processor_config.json").write_text(json.dumps(own))
    equal(path)


MISSING: dict[str, tuple[list[str], str]] = {
    "weights": (["model.safetensors"], r"has neither model.safetensors nor .*downloaded whole\?"),
    "pixels": (["processor_config.json"], "has no preprocessor_config.json"),
    "a tokenizer": (["tokenizer.json", "tokenizer_config.json"], "holds no tokenizer.json"),
}


@pytest.mark.parametrize("what", [*MISSING, "a shard", "safetensors"])
def test_what_a_model_of_transformers_lacks_is_named(what: str, tmp_path: Path) -> None:
    hub_folder(tmp_path, "kosmos-2")
    names, message = MISSING.get(what, ([WEIGHTS], ""))
    for name in names:
        (tmp_path / name).unlink()
    if what == "a shard":
        weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
        (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
        write_weights(tmp_path / weight_map["a"], {"a": torch.zeros(2)})
        message = "lacks 1 of 2 files that model.safetensors.index.json names, model-00002-of-00002.safetensors"
    if what == "safetensors":
        torch.save({}, tmp_path / "pytorch_model.bin")
        message = r"of pytorch_model.bin this family is not read: convert it to safetensors"
    with pytest.raises(ValueError, match=message):
        ImageCaptioner.from_pretrained(tmp_path)
