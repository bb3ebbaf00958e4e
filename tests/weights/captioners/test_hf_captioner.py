"""HFCaptioner: models that transformers alone holds write the same ids as there, are scored, tuned and exported."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from mmtransformer import ImageCaptioner
from mmtransformer.captioners.published.hf_captioner import HFCaptioner
from mmtransformer.layers.lora import add_lora
from mmtransformer.weights.shared.folders import read_tensors
from support.cli import mmt
from support.hub import pairs
from support.hub_models import MODELS, hub_folder
from support.public import close, first_logits, ids, load, pictures, until_end


@pytest.fixture(name="case", params=MODELS, scope="module")
def a_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path, str]:
    path = tmp_path_factory.mktemp(request.param) / "base"
    model, processor = hub_folder(path, request.param)
    return model, processor, path, request.param


def asked(case: tuple[Any, Any, Path, str], ours: ImageCaptioner) -> tuple[list[str | None], Any, int]:
    """Three prompts of several lengths, what transformers makes of them, and how long they are there."""
    _, processor, _, name = case
    talks = getattr(processor, "chat_template", None) is not None
    said = ["what is this?", "a photo of", " a red star and a man"]
    texts: list[str | None] = [*said] if talks else [None] * 3
    assert ours.processor is not None
    if talks:
        turns = [[{"type": "image"}, {"type": "text", "text": text}] for text in said]
        whole = [
            processor.apply_chat_template([{"role": "user", "content": turn}], add_generation_prompt=True)
            for turn in turns
        ]
        images: Any = [[image] for image in pictures()]
        given = processor(images=images, text=whole, padding=True, return_tensors="pt", add_special_tokens=False)
    else:
        given = processor(images=pictures(), text=[ours.processor.prompt] * 3, padding=True, return_tensors="pt")
    return texts, given, 1 if name == "florence2" else given["input_ids"].shape[1]


def test_it_writes_what_transformers_writes(
    case: tuple[Any, Any, Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, _, path, name = case
    ours = load(path)
    assert f"{name} is no family of this library's own, so it runs in transformers" in (capsys.readouterr().err)
    assert isinstance(ours.model, HFCaptioner)
    texts, given, count = asked(case, ours)
    if name != "kosmos-2":
        start = {"decoder_input_ids": torch.full((3, 1), 2)} if name == "florence2" else {}
        with torch.no_grad():
            close(first_logits(ours, pictures(), texts), theirs(**given, **start).logits[:, -1])
    for changes in ({"num_beams": 1}, {"num_beams": 3}):
        rows = theirs.generate(**given, max_new_tokens=8, do_sample=False, **changes)
        want = until_end(rows[:, count:], ours.tokenizer.eos_ids)
        found = ids(ours, pictures(), texts, max_new_tokens=8, **changes)
        assert found == want
        assert len({tuple(row) for row in want}) > 1 or (name, changes) == ("kosmos-2", {"num_beams": 3})
        alone = [
            ids(ours, [image], [text], max_new_tokens=8, **changes)[0]
            for image, text in zip(pictures(), texts, strict=True)
        ]
        assert alone == found


def test_fit_evaluate_export(
    case: tuple[Any, Any, Path, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "")  # without Java there is no METEOR, which would take most of the time
    _, _, base, name = case
    data, run = pairs(tmp_path / "pairs", 6), tmp_path / "run"
    targets = {"qwen2_5_vl": "[q_proj,qkv]"}.get(name, "[q_proj,v_proj]")
    parts = "[decoder]" if name in ("florence2",) else "[vision,decoder]"
    words = [
        "--config", "recipes/finetune_hub.yaml", "--model.init", str(base), "--data.source", str(data),
        "--trainer.max_epochs", "2", "--trainer.accelerator", "cpu", "--data.batch_size", "3", "--data.max_len", "20",
        "--model.optim.warmup_steps", "1", "--model.optim.lr", "0.01", "--trainer.precision", "32-true",
        "--trainer.default_root_dir", str(run), "--model.tuning.target_modules", targets, "--model.tuning.parts", parts,
    ]  # fmt: skip
    code, _, err = mmt(capsys, "fit", *words)
    assert code == 0, err
    adapter = json.loads((run / "model/config.json").read_text())["adapter"]
    assert adapter["base"] == str(base)
    args = ["--data", str(data), "--split", "val", "--device", "cpu"]
    code, _, err = mmt(capsys, "evaluate", "--model", str(run / "model"), *args)
    assert code == 0, err
    code, _, err = mmt(capsys, "export", str(run / "model"), "--to", "transformers", str(tmp_path / "out"))
    assert code == 0, err
    before, after = read_tensors(base), read_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert [key for key in after if not torch.equal(before[key], after[key])]
    tuned, (texts, given, count) = load(run / "model"), asked(case, load(base))
    theirs: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    rows = theirs.generate(**given, max_new_tokens=7, do_sample=False, num_beams=1)
    want = until_end(rows[:, count:], tuned.tokenizer.eos_ids)
    assert ids(tuned, pictures(), texts, max_new_tokens=7, num_beams=1) == want


def test_the_loss_is_theirs(case: tuple[Any, Any, Path, str]) -> None:
    """Of captions alone, behind the prompt: as their own forward pass with labels has it."""
    theirs, _, path, name = case
    ours = load(path)
    processor: Any = ours.processor
    from mmtransformer.data.loading.dataset import Collate, Sample
    from mmtransformer.data.loading.rows import CaptionRow
    from mmtransformer.data.loading.source import Caption

    captions = [[40, 41, 2], [50, 2], [60, 61, 62, 63, 2]]
    rows = [CaptionRow(torch.tensor(row).numpy().astype("int32"), 0, True) for row in captions]
    samples = [
        Sample(None, None, [row], str(i), (Caption("", None),), image)
        for i, (row, image) in enumerate(zip(rows, pictures(), strict=True))
    ]
    batch = Collate(1, complete=processor.complete, tiled=processor)(samples)
    with torch.no_grad():
        loss = ours.model(batch).loss
    total, count = 0.0, 0
    for i, caption in enumerate(captions):  # one by one, without padding
        with torch.no_grad():
            made = processor.with_prompts(processor.batch_of([pictures()[i]]), [None]).given
            labels = torch.tensor([caption])
            if name == "florence2":
                logits = theirs(**made, decoder_input_ids=torch.tensor([[2, *caption[:-1]]])).logits
            else:
                real = {key: x for key, x in made.items() if key not in ("input_ids", "attention_mask")}
                for key, x in real.items():
                    if x.shape == made["input_ids"].shape:
                        real[key] = torch.cat((x, x.new_zeros(1, len(caption))), 1)
                whole = torch.cat((made["input_ids"], labels), 1)
                logits = theirs(input_ids=whole, **real).logits[:, -len(caption) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="sum").item()
        count += len(caption)
    assert loss.item() == pytest.approx(total / count, rel=1e-5)


def test_what_it_cannot_do_is_said(
    case: tuple[Any, Any, Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, base, name = case
    image = tmp_path / "x.png"
    pictures()[0].save(image)
    code, _, err = mmt(
        capsys, "caption", str(image), "--model", str(base), "--heatmap", str(tmp_path / "h.png"), "--device", "cpu"
    )
    assert (code, "there are no heat maps of a" in err) == (2, True)
    code, out, _ = mmt(capsys, "caption", str(image), "--model", str(base), "--device", "cpu", "--max-new-tokens", "4")
    assert (code, bool(out.strip())) == (0, True)
    if name != "gemma3":
        return
    tuned = load(base)
    add_lora(tuned.model, ["q_proj"])
    with pytest.raises(ValueError, match=r"lora_A.*merge_lora\(model\) adds them in"):
        tuned.save_pretrained(tmp_path / "tuned")
    assert not (tmp_path / "tuned").exists()
    strange = tmp_path / "strange"
    shutil.copytree(base, strange)
    config = json.loads((strange / "config.json").read_text())
    config |= {"model_type": "strange_vl", "auto_map": {"AutoModelForImageTextToText": "code.Model"}}
    (strange / "config.json").write_text(json.dumps(config))
    (strange / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    code, _, err = mmt(capsys, "caption", str(image), "--model", str(strange), "--device", "cpu")
    assert (code, 'model_type "strange_vl" is of no family' in err) == (2, True)
    assert not (tmp_path / "ran").exists()
