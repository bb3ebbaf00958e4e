"""Models and weights from outside that claim what is not so: an error that names the file, before memory is taken."""

import json
import math
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmtransformer import (
    GenerationConfig,
    ImageCaptioner,
    ImageTransform,
    TextDecoder,
    Tokenizer,
    VisionEncoderDecoder,
    ViT,
)
from mmtransformer.backbones.hf.decoder import HFDecoder
from mmtransformer.serialization.untrusted import built_from, check_plain, fits, settings_of
from mmtransformer.weights import (
    ViTSettings,
    load_bert,
    load_blip2,
    load_lm,
    load_qformer_from_bert,
    load_vit,
    save_lm,
    to_timm,
)

HUGE = 10**9
NUMBERS = ("dim", "depth", "num_heads", "vocab_size", "max_len", "image_size", "patch_size", "mlp_dim", "context_dim")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    decoder = TextDecoder(300, 16, 1, 2, max_len=24, context_dim=16)
    captioner = VisionEncoderDecoder(ViT(16, 8, 16, 1, 2, class_token=False, pool="mean"), decoder)
    tokenizer = Tokenizer.train(["a red star", "a blue dog"], 300, languages=["en"])
    folder = tmp_path_factory.mktemp("model")
    ImageCaptioner(captioner, tokenizer, ImageTransform(16), device="cpu").save_pretrained(folder)
    save_lm(TextDecoder(300, 16, 2, 2, max_len=24), folder / "lm")
    tensors = {name: tensor.contiguous() for name, tensor in to_timm(ViT(16, 8, 64, 2, 1)).items()}
    save_file(tensors, folder / "vit.safetensors")
    return folder


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """A model's folder that may be spoiled."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in saved.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def changed(path: Path, *keys: str, value: Any) -> None:
    """Writes a JSON file anew with another value at one place."""
    whole = inner = json.loads(path.read_text())
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(whole))


def refused(job: Callable[[], object], where: Path, most: int = 1 << 28) -> str:
    """What the error says; it names the file, and hardly any memory was taken."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError) as caught:
        job()
    assert str(where) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < most
    return str(caught.value)


@pytest.mark.parametrize("value", [HUGE, 10**12, 10**30, -1, 0, 1.5, "x", None, [], True], ids=repr)
@pytest.mark.parametrize("part", ["vision", "decoder"])
def test_sizes_that_are_none(part: str, value: Any, model: Path) -> None:
    path = model / "config.json"
    text = path.read_text()
    for name in NUMBERS:
        path.write_text(text)
        if name in json.loads(text)["args"][part]["args"] and not (name == "mlp_dim" and value is None):
            changed(path, "args", part, "args", name, value=value)
            refused(lambda: ImageCaptioner.from_pretrained(model, device="cpu"), model)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", "args", {"vision": None, "decoder": None}),
        ("preprocessor.json", "image_size", HUGE),
        ("preprocessor.json", "image_size", None),
        ("preprocessor.json", "mean", [None, 0.5, 0.5]),
        ("preprocessor.json", "mean", "x"),
        ("preprocessor.json", "interpolation", []),
        ("preprocessor.json", "class_path", "os.system"),
        ("generation_config.json", "num_beams", HUGE),
        ("generation_config.json", "num_beams", None),
        ("generation_config.json", "top_p", "x"),
        ("generation_config.json", "force_words", [1]),
        ("tokenizer_config.json", "languages", None),
        ("tokenizer_config.json", "languages", [["en"]]),
        ("tokenizer_config.json", "languages", 5),
    ],
)  # fmt: skip
def test_settings_that_are_none(file: str, key: str, value: Any, model: Path) -> None:
    changed(model / file, key, value=value)
    assert file in refused(lambda: ImageCaptioner.from_pretrained(model, device="cpu"), model)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("preprocessor.json", "image_size", 10_000),
        ("preprocessor.json", "mean", [0.5, math.nan, 0.5]),
        ("preprocessor.json", "std", [0.5, 1e-300, 0.5]),
        ("preprocessor.json", "std", [0.5, 0.5, math.inf]),
        ("generation_config.json", "temperature", math.nan),
        ("generation_config.json", "repetition_penalty", -1.0),
        ("generation_config.json", "no_repeat_ngram_size", -1),
        ("generation_config.json", "num_beams", 5000),
        ("tokenizer_config.json", "eos_token_id", [2, [3]]),
    ],
)  # fmt: skip
def test_numbers_that_make_no_sense_are_named(file: str, key: str, value: Any, model: Path) -> None:
    changed(model / file, key, value=value)
    said = refused(lambda: ImageCaptioner.from_pretrained(model, device="cpu"), model)
    assert file in said
    assert key in said


@pytest.mark.parametrize("name", ["config.json", "preprocessor.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "link out", "digits", "deep"])
def test_files_that_are_none(kind: str, name: str, model: Path, tmp_path: Path) -> None:
    path = model / name
    text = path.read_text()
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link out":
        (tmp_path / "secret").write_text(text)
        path.symlink_to(tmp_path / "secret")
    else:
        path.write_text('{"a": ' + ("9" * 5000 if kind == "digits" else "[" * 100_000))
    assert name in refused(lambda: ImageCaptioner.from_pretrained(model, device="cpu"), model)


def test_links_of_the_hubs_cache_are_followed(saved: Path, tmp_path: Path) -> None:
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    folder.mkdir(parents=True)
    for i, path in enumerate(path for path in saved.iterdir() if path.is_file()):
        (blobs / str(i)).write_bytes(path.read_bytes())
        (folder / path.name).symlink_to(f"../../blobs/{i}")
    assert ImageCaptioner.from_pretrained(folder, device="cpu").tokenizer.languages == ("en",)


# ------------------------------------------------------------------------------------------------ weights of others


def rewritten(path: Path, **more: Any) -> Path:
    save_file(load_file(path) | more, path)
    return path


VIT: dict[str, Any] = {
    "blocks.99999999.x": torch.zeros(1),
    "blocks.x.y": torch.zeros(1),
    "pos_embed": torch.zeros(1),
    "cls_token": torch.zeros(1),
    "patch_embed.proj.weight": torch.zeros(2),
    "blocks.0.mlp.fc1.weight": torch.tensor(1.0),
    "blocks.0.attn.qkv.weight": torch.tensor(1.0),
    "head.weight": torch.tensor(1.0),
}


@pytest.mark.parametrize("name", VIT)
def test_tensors_of_no_vit(name: str, model: Path) -> None:
    path = rewritten(model / "vit.safetensors", **{name: VIT[name]})
    settings = ViTSettings(1, (2, 2), "gelu", 1e-6, "class")
    refused(lambda: load_vit(path, settings=settings), path)


@pytest.mark.parametrize("key", ["vocab_size", "n_embd", "n_layer", "n_positions", "n_inner"])
@pytest.mark.parametrize("value", [HUGE, -1, "x"], ids=repr)
def test_language_models_that_claim_more(key: str, value: Any, saved: Path, tmp_path: Path) -> None:
    for path in (saved / "lm").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    changed(tmp_path / "config.json", key, value=value)
    refused(lambda: load_lm(tmp_path), tmp_path)


SIZES = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 16, "max_position_embeddings": 8}  # fmt: skip


@pytest.mark.parametrize("key", ["", *SIZES])
def test_berts_that_claim_more(key: str, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    for value in (HUGE, "x", -1, None):
        config = {"model_type": "bert"} | (SIZES | {key: value} if key else {})
        (tmp_path / "config.json").write_text(json.dumps(config))
        refused(lambda: load_bert(str(tmp_path)), tmp_path)
        refused(lambda: load_qformer_from_bert(str(tmp_path)), tmp_path)


@pytest.mark.parametrize("vision", [None, 5, {"hidden_size": HUGE}, {"num_hidden_layers": HUGE, "hidden_size": 8}])
def test_a_blip2_that_claims_more(vision: Any, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "blip-2", "vision_config": vision}))
    refused(lambda: load_blip2(str(tmp_path)), tmp_path)


@pytest.mark.parametrize(
    "args",
    [
        {"checkpoint_path": "evil.pth"},
        {"pretrained": True, "pretrained_cfg": {"file": "evil.pth", "num_classes": 3}},
        {"pretrained": True, "pretrained_cfg": {"url": "file:///evil.pth"}},
        {"cache_dir": "/tmp"},
        {"scriptable": True},
        {"embed_dim": HUGE},
        {"depth": HUGE},
        {"depth": -1},
        {"img_size": 10**8},
        {"norm_layer": "os.system"},
        5,
    ],
    ids=str,
)
def test_timms_folder_gives_sizes_only(args: Any, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    save_file({"head.bias": torch.zeros(3)}, tmp_path / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {}, "model_args": args}
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = refused(lambda: load_vit(str(tmp_path)), tmp_path)
    own = isinstance(args, dict) and not {"checkpoint_path", "pretrained", "cache_dir", "scriptable"}.isdisjoint(args)
    assert ("are no sizes" in said) == own


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_kernels_from_a_hub_are_not_fetched(key: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    config = {"model_type": "gpt_neo", "text_config": {key: "somebody/kernel"}}
    with pytest.raises(ValueError, match="somebody/kernel', code from outside"):
        HFDecoder(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "code from outside" in refused(lambda: HFDecoder.from_folder(tmp_path), tmp_path)


def test_an_adapter_does_not_lead_to_another_folder(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_neo"}))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "elsewhere"}))
    assert "an adapter of a model that is elsewhere" in refused(lambda: load_lm(tmp_path), tmp_path)


# ---------------------------------------------------------------------------------------------------- the pieces


def test_nothing_larger_is_built() -> None:
    state = {"weight": torch.zeros(10)}
    with built_from(state, "here"):
        torch.empty(1 << 26)
    for job in (lambda: torch.empty((1 << 26) + 100), lambda: torch.arange(10**15), lambda: torch.zeros(HUGE, HUGE)):
        with pytest.raises(ValueError, match="here: the config asks for a far larger model"), built_from(state, "here"):
            job()
    with pytest.raises(ValueError, match="far larger"), built_from(state, "here"):
        [torch.empty(0) for _ in range(10_000)]
    assert torch.empty((1 << 26) + 100).numel() > 1 << 26


@pytest.mark.parametrize(
    ("value", "hint", "good"),
    [
        (1, int, True), (True, int, False), (1.0, int, False), (1, float, True), ("1", float, False),
        (None, int | None, True), ("x", int | None, False), (None, None, True), (1, None, False),
        ([1, 2], tuple[int, int] | int, True), ([1], tuple[int, int], False), (["a"], tuple[str, ...], True),
        ([1], tuple[str, ...], False), ("ab", tuple[str, ...], False), (None, torch.nn.Module, False),
        (torch.nn.ReLU(), torch.nn.Module, True), ({}, dict[str, Any], True), ({}, Any, True),
    ],
)  # fmt: skip
def test_kinds_of_values(value: Any, hint: Any, good: bool) -> None:
    assert fits(value, hint) == good


def test_settings_are_read_as_they_were_written() -> None:
    generation = settings_of(GenerationConfig, {"num_beams": 2, "force_words": ["a"], "temperature": 1}, "x.json")
    assert generation == GenerationConfig(num_beams=2, force_words=("a",))
    with pytest.raises(ValueError, match=r"x\.json: unknown keys \['beams'\]"):
        settings_of(GenerationConfig, {"beams": 2}, "x.json")
    with pytest.raises(ValueError, match=r"x\.json: resize is 'stretch', not"):
        settings_of(ImageTransform, {"resize": "stretch"}, "x.json")


def test_links_of_the_hubs_cache_lead_nowhere_else(tmp_path: Path) -> None:
    """Files of a snapshot and of a folder in it, shards too, with the blobs on another disk; and what is outside."""
    from mmtransformer.data.files.shards import find_shards

    disk, cache = tmp_path / "disk", tmp_path / "datasets--a--b"
    inside = cache / "snapshots" / "rev" / "part"
    inside.mkdir(parents=True)
    disk.mkdir()
    (cache / "blobs").symlink_to(disk)
    (disk / "abc").write_text("{}")
    (tmp_path / "secret").write_text("{}")
    for folder in (inside, inside.parent):
        up = "../" * (2 + (folder == inside)) + "blobs/abc"
        for name in ("config.json", "00.tar"):
            (folder / name).symlink_to(up)
        check_plain(folder / "config.json")
    assert len(find_shards(str(cache / "snapshots" / "rev"))) == 2
    (inside / "bad.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="leads out of its folder"):
        check_plain(inside / "bad.json")
