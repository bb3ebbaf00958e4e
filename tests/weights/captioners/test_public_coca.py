"""open_clip's CoCa by its folder: pixels, prompts and ids are its own; evaluated, fine-tuned and written back."""

import gzip
import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmtransformer import ImageCaptioner, OpenCoCa, ViT, ViTBlockConfig, ViTOutputConfig, ViTPatchConfig
from mmtransformer.serialization.printable import printable
from mmtransformer.text.clip_tokenizer import VOCABULARY, clip_backend, read_clip_vocabulary
from mmtransformer.text.token_bytes import byte_letters
from mmtransformer.text.tokenizer import Tokenizer
from mmtransformer.weights import save_open_coca
from mmtransformer.weights.captioners.open_coca import WEIGHTS, to_open_coca
from mmtransformer.weights.shared.folders import read_tensors
from support.cli import mmt
from support.dual import clip_vocabulary
from support.open_coca import reference
from support.public import close, first_logits, ids, load, noisy, pictures

PIXELS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic", "resize_mode": "shortest"}
SHAPES: dict[str, tuple[int, Any]] = {"as wide as the tower": (24, "gelu"), "narrower": (16, "quick_gelu")}


def folder(path: Path, shape: str = "narrower") -> OpenCoCa:
    """A random CoCa as open_clip has it, with CLIP's kind of tokenizer; "!" is padding there, and never written."""
    width, activation = SHAPES[shape]
    vocab, merges = clip_vocabulary()
    torch.manual_seed(1)
    vision = ViT(
        21, 7, 24, 2, 3, patches=ViTPatchConfig(bias=False, pre_norm=True), block=ViTBlockConfig(activation, 1e-5),
        output=ViTOutputConfig("none"),
    )  # fmt: skip
    model = OpenCoCa(
        vision, len(vocab), width, 2, 2, width // 8, max_len=60, num_queries=5, pool_heads=width // 8,
        activation=activation,
    )  # fmt: skip
    noisy(model, 0.3).lm_head.weight.data[0] = 0
    save_open_coca(model, path, pixels=PIXELS)
    backend = clip_backend(vocab, merges)
    start, end = "<|startoftext|>", "<|endoftext|>"
    Tokenizer(backend, bos_token=start, eos_token=end, pad_token=end).save_pretrained(path)
    return model


def search(model: OpenCoCa, pixels: Tensor, prompt: list[int], end: int, beams: int, most: int, least: int) -> Any:
    """A search over open_clip's forward pass written out, which reads every beam's whole text again."""
    config, state = to_open_coca(model)
    alive, done = [(0.0, prompt)], []
    for step in range(most):
        found = []
        for score, row in alive:
            logits = reference(config, state, pixels, torch.tensor([row]))[0][0, -1].log_softmax(-1)
            logits[end] = logits[end] if step >= least else -torch.inf
            more = logits.topk(2 * beams)
            found += [(score + s, [*row, t]) for s, t in zip(*(x.tolist() for x in more), strict=True)]
        found = sorted(found, reverse=True)[: 2 * beams]
        done += [(s / (len(row) - len(prompt)), row[:-1]) for s, row in found[:beams] if row[-1] == end]
        alive = [one for one in found if one[1][-1] != end][:beams]
    done += [(s / (len(row) - len(prompt)), row) for s, row in alive]
    return max(done)[1][len(prompt) :]


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_it_is_open_clips(shape: str, tmp_path: Path) -> None:
    theirs = folder(tmp_path, shape)
    ours, images, texts = load(tmp_path), pictures(), ["a photo of", None, "a red star and"]
    tokenizer = ours.tokenizer
    assert ours.generation.num_beams == 6
    assert (ours.generation.min_new_tokens, ours.generation.max_new_tokens) == (4, 29)
    assert ours.transform.mean == (0.5, 0.4, 0.3)
    config, state = to_open_coca(theirs)
    pixels = torch.stack([ours.transform(image) for image in images])
    prompts = [[tokenizer.bos_id, *([] if text is None else tokenizer.encode(text))] for text in texts]
    wanted = [reference(config, state, pixels[i : i + 1], torch.tensor([row]))[0] for i, row in enumerate(prompts)]
    close(first_logits(ours, images, texts), torch.stack([logits[0, -1] for logits in wanted]))
    for beams in (1, 3):
        told = {"num_beams": beams, "max_new_tokens": 7, "min_new_tokens": 2}
        want = [search(theirs, pixels[i : i + 1], row, tokenizer.eos_id, beams, 7, 2) for i, row in enumerate(prompts)]
        assert ids(ours, images, texts, **told) == want
    assert ours(images[0], prompt="a photo of")[0][0].text.startswith("a photo of")


@torch.no_grad()
def test_open_clip_itself_agrees(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    folder(tmp_path)
    theirs, pixels = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}")
    theirs.eval()
    ours, images = load(tmp_path), pictures()
    close(torch.stack([ours.transform(image) for image in images]), torch.stack([pixels(image) for image in images]))
    row = [ours.tokenizer.bos_id, *ours.tokenizer.encode("a photo of")]
    _, embs = theirs._encode_image(torch.stack([pixels(image) for image in images]))
    logits = theirs.text_decoder(embs, theirs._encode_text(torch.tensor([row] * len(images)))[1])
    close(first_logits(ours, images, ["a photo of"] * len(images)), logits[:, -1])


def test_what_is_written_is_what_came(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder(tmp_path / "base")
    state = read_tensors(tmp_path / "base")
    state["visual.positional_embedding"][0] = 0.25  # of the class token, which is added up here
    (tmp_path / "base" / WEIGHTS).unlink()
    torch.save({"state_dict": state}, tmp_path / "base" / "open_clip_pytorch_model.bin")  # as older ones are published
    config = tmp_path / "base/open_clip_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"more": "kept"}))
    code, out, err = mmt(capsys, "export", str(tmp_path / "base"), "--to", "open_clip", str(tmp_path / "out"))
    assert (code, out) == (0, f"{tmp_path / 'out'}: as open_clip reads it\n"), err
    after = read_tensors(tmp_path / "out")
    assert after.keys() == state.keys()
    assert [name for name in state if not torch.equal(state[name], after[name])] == []
    said = json.loads((tmp_path / "out/open_clip_config.json").read_text())
    assert said["preprocess_cfg"] == PIXELS
    assert (said["more"], "model_type" in said) == ("kept", False)
    assert not (tmp_path / "out/config.json").exists()
    images, texts = pictures(), ["a photo of"] * 3
    told = {"num_beams": 2, "max_new_tokens": 5}
    both = [ids(load(tmp_path / name), images, texts, **told) for name in ("base", "out")]
    assert both[0] == both[1]
    code, _, err = mmt(capsys, "export", str(tmp_path / "base"), "--to", "transformers", str(tmp_path / "no"))
    assert (code, "is of a family that open_clip reads" in err) == (2, True)


def test_commands_reach_it(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Captioned, scored, fine-tuned to an adapter, and the two merged into a folder that open_clip reads."""
    monkeypatch.setenv("PATH", "")  # without Java there is no METEOR, which would take most of the time
    path = tmp_path / "base"
    folder(path)
    (tmp_path / "pairs").mkdir()
    for i, image in enumerate(pictures() * 4):
        image.save(tmp_path / f"pairs/{i}.png")
        (tmp_path / f"pairs/{i}.txt").write_text(["a red star", "two dogs", "a man in the picture"][i % 3])
    one = str(tmp_path / "pairs/0.png")
    code, said, err = mmt(capsys, "caption", one, "--model", str(path), "--device", "cpu", "--max-new-tokens", "6")
    assert code == 0, err
    assert said.removesuffix("\n") == printable(load(path)(one, max_new_tokens=6)[0][0].text)
    data = ["--data", str(tmp_path / "pairs"), "--split", "val", "--device", "cpu"]
    code, _, err = mmt(capsys, "evaluate", "--model", str(path), "--max-new-tokens", "6", *data)
    assert code == 0, err
    run = tmp_path / "run"
    fit = [
        "--config", "recipes/finetune_hub.yaml", "--model.init", str(path), "--data.source", str(tmp_path / "pairs"),
        "--trainer.max_epochs", "2", "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(run),
        "--data.batch_size", "4", "--data.max_len", "20", "--trainer.precision", "32-true",
    ]  # fmt: skip
    code, _, err = mmt(capsys, "fit", *fit)
    assert code == 0, err
    code, _, err = mmt(capsys, "export", str(run / "model"), str(tmp_path / "merged"))
    assert code == 0, err
    before, after = read_tensors(path), read_tensors(tmp_path / "merged")
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert "text_decoder" in changed
    images, told = pictures(), {"max_new_tokens": 5, "num_beams": 1}
    tuned, merged = (load(folder) for folder in (run / "model", tmp_path / "merged"))
    close(first_logits(tuned, images, [None] * 3), first_logits(merged, images, [None] * 3))
    assert ids(tuned, images, [None] * 3, **told) == ids(merged, images, [None] * 3, **told)


def test_what_is_bad_is_said_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder(tmp_path / "model")
    pictures()[0].save(tmp_path / "x.png")
    asked = ["caption", str(tmp_path / "x.png"), "--model", str(tmp_path / "model"), "--device", "cpu"]
    (tmp_path / "model/tokenizer.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ValueError, match=r"open_clip, which has CLIP's, is not installed"):
            ImageCaptioner.from_pretrained(tmp_path / "model")
    config = tmp_path / "model/open_clip_config.json"
    said = json.loads(config.read_text())
    del said["model_cfg"]["multimodal_cfg"]
    for other in (said, {"model_cfg": None}):
        config.write_text(json.dumps(other))
        code, _, err = mmt(capsys, *asked)
        assert (code, err.count("\n")) == (2, 1)
        assert "open_clip_config.json: a dual encoder (open_clip), which does not caption" in err


def test_parity_is_for_what_transformers_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder(tmp_path)
    code, _, err = mmt(capsys, "parity", str(tmp_path))
    assert (code, err.count("\n")) == (2, 1)
    assert "is a model that open_clip reads, and transformers has none to compare it with" in err


def test_the_published_vocabulary(tmp_path: Path) -> None:
    """A stand-in of the file's shape: its first merges are those of a word, the rest only fill it up."""
    letters = [pair for pair in product(byte_letters(), byte_letters()) if pair != ("t", "h")]
    merges = [("t", "h"), ("th", "e</w>"), *letters[:48_892]]
    path = tmp_path / VOCABULARY
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n")
    compressed, short, odd = b"#version: 0.2\n", b"t h\n", b"qu qu\n"
    for data, message in (
        (gzip.compress(compressed + short), "it has no 48,894 merges of two"),
        (b"no gzip", "not a vocabulary of CLIP"),
        (gzip.compress(compressed + odd * 48_894), "out of vocabulary"),
    ):
        (tmp_path / "bad.gz").write_bytes(data)
        with pytest.raises(ValueError, match=message):
            read_clip_vocabulary(tmp_path / "bad.gz")
    found = read_clip_vocabulary(path)
    assert found.encode("The !").ids == [49406, 513, 256, 49407]
