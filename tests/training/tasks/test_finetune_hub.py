"""Public captioners fine-tuned: what learns, adapters on their bases; transformers says what we say after export."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GitForCausalLM,
    InstructBlipForConditionalGeneration,
    VisionEncoderDecoderModel,
)

from mmtransformer import ImageCaptioner
from mmtransformer.training import finetune
from mmtransformer.training.tasks.tuning import TuningConfig, _matching
from mmtransformer.weights.adapters import Adapter, hash_of, part_of
from mmtransformer.weights.shared.folders import read_tensors
from support.cli import mmt
from support.hub import FAMILIES, folder, pairs
from support.public import first_logits, ids, load, pictures, until_end

QUICK = ["--trainer.max_epochs", "2", "--trainer.accelerator", "cpu", "--data.batch_size", "4", "--data.max_len", "20",
         "--model.optim.warmup_steps", "1", "--model.optim.lr", "0.01", "--trainer.precision", "32-true"]  # fmt: skip
OPTIONS = {
    "blip": [],
    "vit-gpt2": ["--model.tuning.method", "last_blocks", "--model.tuning.num_blocks", "1"],
    "git": ["--model.tuning.method", "full", "--model.optim.layer_decay", "0.8"],
    "blip2": ["--model.tuning.method", "full", "--model.tuning.parts", "[connector]", "--model.tuning.frozen_dtype",
              "bfloat16"],
    "llava": ["--model.tuning.target_modules", "[q_proj,fc1]", "--model.optim.lr_scales", "{vision: 0.1}"],
    "llava-next": [],
    "llava-onevision": [],
    "idefics": ["--model.tuning.method", "full", "--model.tuning.parts", "[connector]"],
    "idefics3": ["--model.tuning.parts", "[connector,decoder]"],
    "paligemma": ["--model.tuning.target_modules", "[k_proj,out_proj]"],
}  # fmt: skip


def fit(capsys: Any, base: Path, data: Path, run: Path, *more: str) -> tuple[int, str, str]:
    words = ["--config", "recipes/finetune_hub.yaml", "--model.init", str(base), "--data.source", str(data)]
    return mmt(capsys, "fit", *words, *QUICK, "--trainer.default_root_dir", str(run), *more)


def theirs_say(path: Path, family: str, image: Any, ours: ImageCaptioner) -> list[int]:
    """What transformers writes of a picture, without a prompt of a user's."""
    kinds: dict[str, Any] = {
        "vit-gpt2": VisionEncoderDecoderModel, "vit-bert": VisionEncoderDecoderModel, "git": GitForCausalLM,
        "instructblip": InstructBlipForConditionalGeneration,
    }  # fmt: skip
    model = kinds.get(family, AutoModelForImageTextToText).from_pretrained(path, dtype=torch.float32).eval()
    assert ours.processor is not None
    if family in ("idefics", "instructblip", "paligemma"):
        processor = AutoProcessor.from_pretrained(path)
        said = ("<image>" if family == "paligemma" else "") + (ours.processor.prompt or "")
        given = processor(images=[image], text=[said], return_tensors="pt")
        rows = model.generate(**given, max_new_tokens=7, num_beams=2)
        return until_end(rows[:, given["input_ids"].shape[1] :], ours.tokenizer.eos_ids)[0]
    if family in ("blip", "vit-gpt2", "vit-bert", "git"):
        pixels = ours.batch([image]).pixels
        assert pixels is not None
        more = {"input_ids": torch.tensor([[2]])} if family == "git" else {}
        rows, count = model.generate(pixel_values=pixels[:, 0], max_new_tokens=7, num_beams=2, **more), 1
    else:
        processor = AutoProcessor.from_pretrained(path)
        talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ours.processor.prompt or ""}]}]
        said = (
            {}
            if family.startswith("blip2")
            else {"text": processor.apply_chat_template(talk, add_generation_prompt=True)}
        )
        given = processor(images=[[image]] if family in ("idefics3", "smolvlm") else image, return_tensors="pt", **said)
        rows = model.generate(**given, max_new_tokens=7, num_beams=2)
        count = {"blip2": 4, "blip2-t5": 1}.get(family) or given["input_ids"].shape[1]
    return until_end(rows[:, count:], ours.tokenizer.eos_ids)[0]


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of transformers' processor of PaliGemma
@pytest.mark.parametrize("family", FAMILIES)
def test_fit_evaluate_export(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # without Java there is no METEOR, which would take most of the time
    base, data, run = folder(tmp_path / "base", family), pairs(tmp_path / "pairs"), tmp_path / "run"
    before = read_tensors(base)
    code, out, err = fit(capsys, base, data, run, *OPTIONS.get(family, []))
    assert code == 0, err
    assert "learn" in out
    whole = family == "git" and "[connector]" not in OPTIONS.get(family, [])
    metrics = json.loads((run / "metrics.json").read_text())
    assert 0 < metrics["training"]["parameters"] < sum(x.numel() for x in before.values()) or whole
    adapter = json.loads((run / "model/config.json").read_text())["adapter"]
    assert adapter["base"] == str(base)
    assert adapter["base_hash"] == hash_of(base)
    assert sorted(p.name for p in (run / "model").iterdir()) == ["README.md", "adapter.safetensors", "config.json"]
    assert "license: mit" in (run / "model/README.md").read_text()
    args = ["--data", str(data), "--split", "val", "--device", "cpu", "--limit", "3"]
    code, _, err = mmt(capsys, "evaluate", "--model", str(run / "model"), *args)
    assert code == 0, err
    code, _, err = mmt(capsys, "export", str(run / "model"), "--to", "transformers", str(tmp_path / "out"))
    assert code == 0, err
    before, after = (
        {name.replace("vision_tower.vision_model.", "vision_tower."): x for name, x in state.items()}
        for state in (before, read_tensors(tmp_path / "out"))
    )
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed
    parts = {part_of(load(base).model, name.removesuffix(".lora_A")) for name in Adapter.read(run / "model").tensors}
    wanted = {
        "idefics": {"connector"},
        "blip": {"vision", "decoder", "connector"},
        "blip2": {"connector"},
        "vit-bert": {"vision", "decoder", "connector"},
        "idefics3": {"connector", "decoder"},
    }
    assert parts == wanted.get(family, {"vision", "decoder"})
    tuned, exported, image = load(run / "model"), load(tmp_path / "out"), pictures()[1]
    found = ids(tuned, [image], [None], max_new_tokens=7, num_beams=2)
    assert found == ids(exported, [image], [None], max_new_tokens=7, num_beams=2)
    assert found[0] == theirs_say(tmp_path / "out", family, image, tuned)
    assert not torch.equal(first_logits(tuned, [image], [None]), first_logits(load(base), [image], [None]))


@pytest.fixture(name="tuned", scope="module")
def a_tuned_one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base, and an adapter of it."""
    path = tmp_path_factory.mktemp("tuned")
    base = folder(path / "base", "git")
    model = load(base)
    before = {name: x.clone() for name, x in model.model.named_parameters()}
    adapter = Adapter(str(base), hash_of(base), {"proj.bias": before["proj.bias"] + 1.0}, 1.0)
    assert model.processor is not None
    model.adapter = adapter
    model.save_pretrained(path / "adapter")
    return base, path / "adapter"


def test_an_adapter_stands_on_its_base_alone(
    tuned: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = tuned
    before, after = load(base).model, load(adapter).model
    bias, weight = "proj.bias", "proj.weight"
    assert torch.equal(after.get_parameter(bias), before.get_parameter(bias) + 1.0)
    assert torch.equal(after.get_parameter(weight), before.get_parameter(weight))

    def said(path: Path) -> str:
        code, _, err = mmt(capsys, "caption", str(image), "--model", str(path), "--device", "cpu")
        assert code == 2
        assert err.count("\n") == 1
        return err

    image = tmp_path / "x.png"
    pictures()[0].save(image)
    lost, other, broken, newer = (tmp_path / name for name in ("lost", "other", "broken", "newer"))
    for path in (lost, other, broken, newer):
        shutil.copytree(adapter, path)

    def point(path: Path, **changes: Any) -> None:
        config = json.loads((path / "config.json").read_text())
        config["adapter"] |= changes
        (path / "config.json").write_text(json.dumps(config))

    point(lost, base="/no/such/folder")
    message = said(lost)
    assert f"{lost}: an adapter without its base, /no/such/folder: no such folder" in message
    assert f'"base" in {lost / "config.json"} may name the folder' in message
    point(other, base=str(folder(tmp_path / "another", "git", scale=0.2)))
    assert "an adapter of another base: the weights in" in said(other)
    with (broken / "adapter.safetensors").open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"\0")
    assert "damaged, or written anew" in said(broken)
    point(newer, format_version=9)
    assert "no adapter of format_version 4" in said(newer)
    peft = tmp_path / "peft"
    peft.mkdir()
    (peft / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/base"}')
    assert f"{peft}: an adapter of peft's without its base, someone/base: load both with peft" in said(peft)
    shutil.copytree(base, tmp_path / "moved")
    for name in (str(tmp_path / "moved"), "../moved"):  # from the adapter's folder, wherever the command runs
        point(lost, base=name)
        assert torch.equal(load(lost).model.get_parameter(bias), after.get_parameter(bias))


def test_a_model_with_an_adapter_is_trained_on_whole(
    tuned: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    data = pairs(tmp_path / "pairs", 6)
    code, _, err = fit(capsys, tuned[1], data, tmp_path / "run", "--trainer.max_epochs", "1")
    assert code == 0, err
    assert (tmp_path / "run/model/model.safetensors").is_file()
    half = ["--model.tuning.parts", "[decoder]", "--model.tuning.frozen_dtype", "bfloat16"]
    code, _, err = fit(capsys, tuned[1], data, tmp_path / "half", *half)
    assert (code, "for public models as they came" in err) == (2, True)


def test_the_whole_of_it_is_written_where_all_learns_or_it_is_wished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    base, data = folder(tmp_path / "base", "blip"), pairs(tmp_path / "pairs", 6)
    all_parts = ["--model.tuning.method", "full", "--model.tuning.parts", "[vision,connector,decoder]"]
    for name, more in (("all", all_parts), ("wished", ["--model.tuning.save_merged", "true"])):
        code, _, err = fit(capsys, base, data, tmp_path / name, "--trainer.max_epochs", "1", *more)
        assert code == 0, err
        AutoModelForImageTextToText.from_pretrained(tmp_path / name / "model")
        assert (tmp_path / name / "model/preprocessor_config.json").is_file() or (
            tmp_path / name / "model/processor_config.json"
        ).is_file()


def test_bfloat16_is_of_what_is_frozen_and_never_saved(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", "llava")
    module = finetune(str(base), tuning=TuningConfig(["connector"], frozen_dtype="bfloat16"))
    kinds = {p.dtype for p in module.captioner.parameters() if not p.requires_grad}
    assert kinds == {torch.bfloat16}
    assert {p.dtype for p in module.captioner.parameters() if p.requires_grad} == {torch.float32}
    adapter = module._adapter()
    assert adapter is not None
    module._merge(adapter)
    for name, parameter in load(base).model.named_parameters():
        assert torch.equal(parameter, module.captioner.get_parameter(name))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": ["vision", "tail"]}, 'tuning.parts: unknown value "tail"; choose one of vision, connector, decoder'),
        ({"parts": []}, "name at least one of the parts"),
        ({"method": "half"}, 'tuning.method: unknown value "half"; choose one of full, last_blocks, lora'),
        ({"rank": 4}, "tuning.rank has an effect only with method=lora"),
        ({"method": "lora", "num_blocks": 3}, "tuning.num_blocks has an effect only with method=last_blocks"),
        ({"method": "lora", "parts": ["connector"]}, "is for vision encoder or decoder"),
        ({"method": "lora", "rank": 0}, r"tuning.rank \(0\) must be at least 1"),
        ({"method": "last_blocks", "num_blocks": 3}, r"tuning.num_blocks \(3\): the vision has 1"),
        ({"method": "lora", "target_modules": ["q_prj"]}, 'no linear layer is called "q_prj"; there are .*q_proj'),
        (
            {"method": "lora", "target_modules": ["gate_proj"], "parts": ["vision", "decoder"]},
            "none is in the vision, which has",
        ),
        ({"frozen_dtype": "bfloat16"}, "for towers of which nothing learns, and there is none"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        finetune(str(folder(tmp_path, "llava")), tuning=TuningConfig(**options))


def test_what_learns_is_what_was_named(tmp_path: Path) -> None:
    """Of a LLaVA, whose tower is read before its last block, which no loss reaches."""
    base = folder(tmp_path, "llava")

    def learn(**options: Any) -> set[str]:
        captioner = finetune(str(base), tuning=TuningConfig(**options)).captioner
        return {name for name, p in captioner.named_parameters() if p.requires_grad}

    every = learn()
    assert not [name for name in every if name.startswith(("vision.blocks.1.", "vision.norm."))]
    assert {name.partition(".")[0] for name in every} == {"vision", "projector", "decoder"}
    last = learn(method="last_blocks", num_blocks=1, parts=["vision", "decoder"])
    assert {".".join(name.split(".")[:3]) for name in last} == {
        "vision.blocks.0",
        "decoder.blocks.1",
        "decoder.last_norm.weight",
    }
    products = learn(method="lora", rank=3, alpha=6.0, target_modules=["k_proj"], parts=["decoder", "connector"])
    assert {name.partition(".")[0] for name in products} == {"projector", "decoder"}
    assert all("lora" in name for name in products if name.startswith("decoder"))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_adapter_is_what_was_trained(method: Any, tmp_path: Path) -> None:
    """The base with an adapter says what the model said that it was taken from, low-rank products unmerged."""
    base = folder(tmp_path / "base", "blip")
    options: dict[str, Any] = (
        {"rank": 3, "alpha": 12.0, "target_modules": ["q_proj", "fc2"]} if method == "lora" else {}
    )
    parts: Any = ["vision", "decoder"] if method == "full" else ["vision", "connector", "decoder"]
    module = finetune(str(base), tuning=TuningConfig(parts, method=method, **options))
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in module.captioner.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    adapter = module._adapter()
    assert adapter is not None
    adapter.save(tmp_path / "adapter")
    trained, again, before = module.captioner.eval(), load(tmp_path / "adapter"), load(base)
    assert before.processor is not None
    batch = before.processor.with_prompts(before.batch(pictures()), ["a photo of"] * 3)
    with torch.no_grad():
        want, found, was = (model.prefill(batch)[0] for model in (trained, again.model, before.model))
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    assert (was - want).abs().max() > 0.1


@pytest.mark.parametrize("family", ["llava-next", "idefics3"])
def test_rows_of_tiled_pictures_stand_behind_their_prompts(family: str, tmp_path: Path) -> None:
    from mmtransformer.data.captions import CaptionData
    from mmtransformer.data.loading.sampler import SampleIndex

    model, processor = load(folder(tmp_path / "base", family)), load(tmp_path / "base").processor
    assert processor is not None
    data = CaptionData(str(pairs(tmp_path / "pairs", 6)), batch_size=3, max_len=20)
    data.continue_from(model.tokenizer, model.transform, processor)
    data.setup("fit")
    dataset = data.dataset(data.train_split)
    samples = [dataset[SampleIndex(0, i)] for i in range(3)]
    batch = data.collate(data.train_split)(samples)
    with torch.no_grad():
        whole = model.model.eval()(batch).sums
        parts = [model.model(data.collate(data.train_split)([sample])).sums for sample in samples]
    assert int(whole.count) == sum(int(part.count) for part in parts)
    torch.testing.assert_close(whole.sum, torch.stack([part.sum for part in parts]).sum(), rtol=1e-5, atol=1e-4)
    lengths = set()
    for i, sample in enumerate(samples):
        row, learned = batch.tokens[i], batch.loss_mask[i]
        prompt = processor.prompt_ids(processor.prompt, processor.batch_of([sample.prepared]), 0)
        count = int(learned.nonzero()[0])
        assert row[:count].tolist() == prompt
        assert model.tokenizer.decode(row[learned].tolist()).strip() == sample.references[0].text
        assert row[learned][-1] in model.tokenizer.eos_ids
        lengths.add(count)
    assert len(lengths) > (family == "llava-next")  # pictures of several shapes


def test_targets_are_found_by_what_a_tower_calls_them() -> None:
    usual = ["q_proj", "v_proj"]
    assert _matching(usual, ["blocks.0.attn.q_proj", "blocks.0.attn.v_proj", "blocks.0.attn.qkv"]) == usual
    assert _matching(usual, ["block.0.layer.0.SelfAttention.q", "block.0.layer.0.SelfAttention.v", "wq"]) == ["q", "v"]
    assert _matching(usual, ["layers.0.self_attn.qkv", "layers.0.mlp.fc1"]) == ["qkv"]  # once, for both
    assert _matching(["out_proj"], ["layer.0.attention.output.dense", "layer.0.output.dense"]) == []  # an MLP's too
