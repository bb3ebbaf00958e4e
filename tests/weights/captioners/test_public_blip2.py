"""BLIP-2 and InstructBLIP by their folders: pixels, prompts, logits and ids are transformers'."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, processors
from transformers import (
    AutoProcessor,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
    OPTConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

from mmtransformer.weights.shared.folders import read_tensors
from support.cli import mmt
from support.public import byte_level, close, first_logits, ids, load, noisy, pictures, until_end

L = 3
SHAPES = [
    {"hidden_size": 24, "intermediate_size": 31, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
     "patch_size": 7},
    {"hidden_size": 20, "intermediate_size": 43, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 45,
     "patch_size": 9},
]  # fmt: skip


def folder(path: Path, shape: int, language: str) -> Path:
    backend = byte_level(["<s>", "<pad>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    image = AddedToken("<image>", normalized=False, special=True)
    backend.add_special_tokens([image])
    newline = backend.token_to_id("Ċ")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="</s>"
    )
    size = len(tokenizer)
    vision = SHAPES[shape]
    if language == "opt":
        text: Any = OPTConfig(
            vocab_size=size + 3, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, ffn_dim=37,
            max_position_embeddings=61, word_embed_proj_dim=12, bos_token_id=2, eos_token_id=newline, pad_token_id=1,
        )  # fmt: skip
    else:
        text = T5Config(
            vocab_size=size + 3, d_model=12, d_kv=4, d_ff=37, num_layers=2, num_heads=3, decoder_start_token_id=0,
            feed_forward_proj="gated-gelu", dense_act_fn="gelu", bos_token_id=1, eos_token_id=newline, pad_token_id=0,
        )  # fmt: skip
    config = Blip2Config(
        vision_config=vision,
        qformer_config={
            "hidden_size": 20, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 29,
            "vocab_size": 43, "max_position_embeddings": 17, "encoder_hidden_size": vision["hidden_size"],
        },
        text_config=text, num_query_tokens=L, image_text_hidden_size=11,
        image_token_index=backend.token_to_id("<image>"),
    )  # fmt: skip
    noisy(Blip2ForConditionalGeneration(config), 0.6, seed=shape + 5).save_pretrained(path)
    side = vision["image_size"]
    pixels = BlipImageProcessor(size={"height": side, "width": side})
    Blip2Processor(pixels, tokenizer, num_query_tokens=L).save_pretrained(path)
    return path


@pytest.mark.parametrize("shape", [0, 1])
@pytest.mark.parametrize("language", ["opt", "t5"])
def test_it_is_transformers(shape: int, language: str, tmp_path: Path) -> None:
    path = folder(tmp_path, shape, language)
    theirs = Blip2ForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(path)
    processor.tokenizer.padding_side = "right" if language == "t5" else "left"  # as their own tokenizers do
    ours = load(path)
    images = pictures()
    texts = ["question: what is this? answer:", "a photo of", "a red star and"]
    given = processor(images=images, text=texts, padding=True, return_tensors="pt")
    batch = ours.processor.with_prompts(ours.batch(images), texts)  # pyright: ignore[reportOptionalMemberAccess]
    assert torch.equal(batch.pixels[:, 0], given["pixel_values"])  # pyright: ignore[reportOptionalSubscript]
    begin = language == "t5"
    assert [r[m].tolist()[begin:] for r, m in zip(batch.tokens, batch.attention_mask, strict=True)] == [
        [i for i in r[m.bool()].tolist() if i != theirs.config.image_token_index]
        for r, m in zip(given["input_ids"], given["attention_mask"], strict=True)
    ]
    assert ours.tokenizer.eos_ids == (processor.tokenizer.convert_tokens_to_ids("Ċ"),)
    for changes in ({"num_beams": 1}, {"num_beams": 3}):
        with torch.no_grad():
            rows = theirs.generate(**given, max_new_tokens=9, **changes)
        new = rows[:, 1:] if begin else rows[:, given["input_ids"].shape[1] :]
        want = until_end(new, ours.tokenizer.eos_ids)
        assert ids(ours, images, texts, max_new_tokens=9, **changes) == want
        assert len({tuple(row) for row in want}) > 1
    with torch.no_grad():
        start = {"decoder_input_ids": torch.zeros(3, 1, dtype=torch.long)} if begin else {}
        close(first_logits(ours, images, texts), theirs(**given, **start).logits[:, -1])
        silent = theirs.generate(pixel_values=given["pixel_values"], max_new_tokens=9)
    silent = silent[:, 1:] if begin else silent[:, L + 1 :]
    assert ids(ours, images, [None] * 3, max_new_tokens=9) == until_end(silent, ours.tokenizer.eos_ids)


@pytest.mark.parametrize("half", [False, True])
def test_what_is_written_is_what_came(half: bool, tmp_path: Path) -> None:
    path = folder(tmp_path / "base", 0, "opt")
    if half:
        theirs = Blip2ForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
        theirs.to(torch.float16).save_pretrained(path)
    (path / "README.md").write_text("---\nlicense: mit\n---\n")
    ours = load(path)
    ours.save_pretrained(tmp_path / "out", card="Scores: <b>")
    before, after = read_tensors(path), read_tensors(tmp_path / "out")
    assert before.keys() - after.keys() <= {"language_model.lm_head.weight"}
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name]), name
    with pytest.raises(ValueError, match="is the folder that the model came from"):
        ours.save_pretrained(path)
    again = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    given = processor(images=pictures()[0], text="a photo of", return_tensors="pt")
    rows = again.generate(**given, max_new_tokens=7)[:, given["input_ids"].shape[1] :]
    want = until_end(rows, ours.tokenizer.eos_ids)
    assert ids(ours, pictures()[:1], ["a photo of"], max_new_tokens=7) == want
    assert ids(load(tmp_path / "out"), pictures()[:1], ["a photo of"], max_new_tokens=7) == want
    card = (tmp_path / "out/README.md").read_text()
    assert "license: mit" in card
    assert 'base_model: "base"' in card


def test_commands_reach_it(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Captioned by its folder, fine-tuned on pairs with its own prompt, scored, and read by transformers again."""
    monkeypatch.setenv("PATH", "")  # without Java there is no METEOR, which would take most of the time
    path = folder(tmp_path / "base", 0, "opt")
    for i, image in enumerate(pictures() * 4):
        (tmp_path / "pairs").mkdir(exist_ok=True)
        image.save(tmp_path / f"pairs/{i}.png")
        (tmp_path / f"pairs/{i}.txt").write_text(["a red star", "two dogs", "a man in the picture"][i % 3])
    one = str(tmp_path / "pairs/0.png")
    code, said, err = mmt(capsys, "caption", one, "--model", str(path), "--prompt", "a photo of", "--device", "cpu")
    assert code == 0, err
    said = said.removesuffix("\n")
    ours = load(path)
    assert said == ours(one, prompt="a photo of")[0][0].text
    data = ["--data", str(tmp_path / "pairs"), "--split", "val", "--device", "cpu"]
    code, _, err = mmt(capsys, "evaluate", "--model", str(path), *data)
    assert code == 0, err
    run = tmp_path / "run"
    fit = [
        "--config", "recipes/finetune_pairs.yaml", "--model.init", str(path), "--data.source",
        str(tmp_path / "pairs"), "--trainer.max_epochs", "2", "--trainer.accelerator", "cpu",
        "--trainer.default_root_dir", str(run), "--data.batch_size", "4", "--data.max_len", "20",
        "--model.tuning.method", "lora", "--model.tuning.rank", "2", "--model.tuning.parts", "[connector,decoder]",
        "--model.tuning.save_merged", "true",
    ]  # fmt: skip
    code, _, err = mmt(capsys, "fit", *fit)
    assert code == 0, err
    tuned = Blip2ForConditionalGeneration.from_pretrained(run / "model", dtype=torch.float32).eval()
    before, after = read_tensors(path), read_tensors(run / "model")
    changed = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"qformer", "query_tokens", "language_projection", "language_model"}
    processor = AutoProcessor.from_pretrained(run / "model")
    given = processor(images=pictures()[0], return_tensors="pt")
    silent = tuned.generate(**given, max_new_tokens=7)[:, L + 1 :]
    ours = load(run / "model")
    assert ids(ours, pictures()[:1], [None], max_new_tokens=7) == until_end(silent, ours.tokenizer.eos_ids)


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (lambda path: shutil.rmtree(path), "no such folder"),
    "no config": (lambda path: (path / "config.json").unlink(), "config.json: no such file"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "was it downloaded whole?"),
    "half a file": (lambda path: (path / "model.safetensors").write_bytes(b"123"), "not a whole safetensors file"),
    "a text model": (lambda path: said(path, model_type="gpt2"), "a text model alone (gpt2), which does not caption"),
    "a tower": (lambda path: said(path, model_type="clip_vision_model"), "a vision encoder alone"),
    "an unknown one": (lambda path: said(path, model_type="kosmos-9"), 'model_type "kosmos-9" is of no family'),
    "an adapter": (
        lambda path: [x.unlink() for x in path.glob("model*")] + [(path / "adapter_config.json").touch()],
        "an adapter without the model",
    ),
    "no tokenizer": (lambda path: [x.unlink() for x in path.glob("tokenizer*")], "holds no tokenizer.json"),
    "no pixels": (lambda path: (path / "processor_config.json").unlink(), "has no preprocessor_config.json"),
    "a longer tokenizer": (
        lambda path: longer(path / "tokenizer.json"), "tokens, but the model scores",
    ),
}  # fmt: skip


def said(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def longer(path: Path) -> None:
    backend = Tokenizer.from_file(str(path))
    backend.add_tokens([f"more{i}" for i in range(9)])
    backend.save(str(path))


@pytest.mark.parametrize("kind", BAD)
def test_what_is_bad_is_said_in_a_line(
    kind: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model"
    shutil.copytree(base, path)
    change, message = BAD[kind]
    change(path)
    pictures()[0].save(tmp_path / "x.png")
    code, _, err = mmt(capsys, "caption", str(tmp_path / "x.png"), "--model", str(path), "--device", "cpu")
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


@pytest.fixture(name="base", scope="module")
def a_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("base"), 0, "opt")


def test_export(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = mmt(capsys, "export", str(base), "--to", "transformers", str(tmp_path / "out"))
    assert code == 0, err
    assert out == f"{tmp_path / 'out'}: as transformers reads it\n"
    assert Blip2ForConditionalGeneration.from_pretrained(tmp_path / "out").config.image_token_index is not None
    code, _, err = mmt(capsys, "export", "--model", str(base), str(tmp_path / "out"))
    assert (code, "is there already" in err) == (2, True)
    missing, twice = "the folder to write is missing: mmt export MODEL OUT", "the model is there twice"
    for words in ([], [str(base)], ["--model", str(base)], ["--to", "transformers", str(base)]):
        code, _, err = mmt(capsys, "export", *words)
        assert (code, missing in err) == (2, True)
    code, _, err = mmt(capsys, "export", str(base), "--model", str(base), str(tmp_path / "new"))
    assert (code, twice in err) == (2, True)
