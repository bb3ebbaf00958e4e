"""What is asked of pictures, put to public models that are trained and scored: prompts, targets, answers."""

import csv
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import BlipConfig, BlipForQuestionAnswering, BlipImageProcessor, BlipProcessor

from mmtransformer.data.captions import CaptionData
from mmtransformer.data.loading.sampler import SampleIndex
from mmtransformer.text.conversation import Conversation
from support.cli import mmt
from support.hub import VISION, WIDTH, bert, folder
from support.public import load, noisy, pictures

QUESTIONS = ("what is in the picture?", "how many?")
QUICK = ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--data.batch_size", "4", "--data.max_len", "20",
         "--trainer.precision", "32-true", "--data.captions_per_image", "2"]  # fmt: skip


def answers(root: Path, count: int = 10) -> Path:
    """Pictures, of each of which two things are asked, one of them answered twice."""
    root.mkdir()
    with (root / "vqa.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "question", "answer"])
        for i in range(count):
            pictures()[i % 3].save(root / f"{i}.png")
            rows.writerows([(f"{i}.png", QUESTIONS[0], "a star"), (f"{i}.png", QUESTIONS[0], "a man")])
            rows.writerow((f"{i}.png", QUESTIONS[1], "two"))
    return root


def blip_vqa(path: Path) -> Path:
    path.mkdir()
    tokenizer = bert()
    special = {"bos_token_id": len(tokenizer), "sep_token_id": 3, "pad_token_id": 0, "eos_token_id": 2}
    text = {**WIDTH, "vocab_size": len(tokenizer) + 3, "max_position_embeddings": 61, **special}
    model = BlipForQuestionAnswering(BlipConfig(vision_config=VISION, text_config=text, image_text_hidden_size=11))
    noisy(model, 0.35, seed=5).save_pretrained(path)
    BlipProcessor(BlipImageProcessor(size={"height": 28, "width": 28}), tokenizer).save_pretrained(path)
    (path / "README.md").write_text("---\nlicense: mit\n---\n")
    return path


def batch_of(model: Any, root: Path, count: int = 6) -> tuple[CaptionData, Any]:
    data = CaptionData(root, captions_per_image=2, batch_size=4, max_len=20)
    data.continue_from(model.tokenizer, model.transform, model.processor)
    dataset = data.dataset("train", training=True)
    return data, data.collate("train")([dataset[SampleIndex(0, i, True)] for i in range(count)])


@pytest.mark.parametrize("family", ["git", "llava", "idefics3"])
def test_an_answer_stands_behind_its_question(family: str, tmp_path: Path) -> None:
    model = load(folder(tmp_path / "base", family))
    assert model.processor is not None
    data, batch = batch_of(model, answers(tmp_path / "pairs"))
    assert set(batch.questions) == set(QUESTIONS)
    assert all(name.endswith(f"?{asked}") for name, asked in zip(batch.names, batch.questions, strict=True))
    for i, (row, real, target) in enumerate(zip(batch.tokens, batch.attention_mask, batch.loss_mask, strict=True)):
        asked = batch.questions[i // 2]
        image = data.pairs("train").image(i // 2)
        alone = model.processor.batch_of([model.processor.prepare(image)])
        prompt = model.processor.prompt_ids(asked, alone, 0)
        assert row[real & ~target].tolist() == prompt
        said = model.tokenizer.decode(row[target].tolist())
        assert said.strip() in {text for text, _ in batch.references[i // 2]}
        assert int(row[target][-1]) == model.tokenizer.eos_id
    assert data.prompt_builder is not None
    starts = data.prompt_builder(batch, [None])
    assert [r[m].tolist() for r, m in zip(starts.tokens, starts.attention_mask, strict=True)] == [
        r[m & ~t].tolist() for r, m, t in zip(batch.tokens, batch.attention_mask, batch.loss_mask, strict=True)
    ][::2]


@pytest.mark.parametrize("family", ["llava", "idefics3"])
def test_turns_before_a_question_are_turns_of_the_prompt(family: str, tmp_path: Path) -> None:
    processor = load(folder(tmp_path / "base", family)).processor
    asked = Conversation(["what is it?", "a star", "why?"])
    batch = processor.batch_of([processor.prepare(pictures()[0])])
    parts = [{"type": "image"}, {"type": "text", "text": "what is it?"}]
    talk = [{"role": "user", "content": parts}]
    talk += [{"role": who, "content": [{"type": "text", "text": text}]} for who, text in
             (("assistant", "a star"), ("user", "why?"))]  # fmt: skip
    theirs = transformers.AutoProcessor.from_pretrained(tmp_path / "base")
    text = theirs.apply_chat_template(talk, add_generation_prompt=True)
    wanted = theirs(text=[text], images=[[pictures()[0]]])["input_ids"][0]
    assert processor.prompt_ids(asked, batch, 0) == list(wanted)
    assert processor.prompt_ids(str(asked), batch, 0) != list(wanted)


def test_a_model_that_answers_reads_the_questions_and_is_refused_captions(tmp_path: Path) -> None:
    model = load(blip_vqa(tmp_path / "base"))
    _, batch = batch_of(model, answers(tmp_path / "pairs"))
    encode = model.processor.encode  # type: ignore[union-attr]
    rows = zip(batch.instruction, batch.instruction_attention_mask, strict=True)
    assert [r[m].tolist() for r, m in rows] == [encode(asked) for asked in batch.questions for _ in range(2)]
    loss = model.model(batch).loss
    other = model.model(batch.__class__(**vars(batch) | {"instruction": batch.instruction.flip(1)})).loss
    assert torch.isfinite(loss)
    assert loss != other
    plain = tmp_path / "plain"
    plain.mkdir()
    for i in range(4):
        pictures()[i % 3].save(plain / f"{i}.png")
        (plain / f"{i}.txt").write_text("a star")
    with pytest.raises(ValueError, match="answers questions: give one as the prompt, or data that hold them"):
        batch_of(model, plain, 2)


@pytest.mark.parametrize("family", ["llava", "blip-vqa"])
def test_it_is_trained_and_scored_by_its_answers(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # without Java there is no METEOR, which would take most of the time
    base = blip_vqa(tmp_path / "base") if family == "blip-vqa" else folder(tmp_path / "base", family)
    root, run, out = answers(tmp_path / "pairs"), tmp_path / "run", tmp_path / "said.jsonl"
    words = ["--config", "recipes/finetune_hub.yaml", "--model.init", str(base), "--data.source", str(root)]
    code, told, err = mmt(capsys, "fit", *words, *QUICK, "--trainer.default_root_dir", str(run))
    assert code == 0, err
    assert told.splitlines()[-2:-1] == ["Caption a picture of your own:"]
    hint = shlex.split(told.splitlines()[-1].replace("YOUR_PICTURE.jpg", str(root / "0.png")))[1:]
    assert hint[hint.index("--prompt") + 1] == "QUESTION"
    monkeypatch.chdir(tmp_path)
    code, _, err = mmt(capsys, *hint)
    assert code == 0, err
    args = ["--data", str(root), "--split", "val", "--device", "cpu", "--captions-out", str(out), "--batch-size", "3"]
    code, told, err = mmt(capsys, "evaluate", "--model", str(run / "model"), *args, "--num-beams", "2")
    assert code == 0, err
    assert re.search(r"^val: \d+ questions?, .*\nVQA accuracy +\d", told, re.MULTILINE)
    model = load(run / "model")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    said = [line for line in lines if "name" in line or "image" in line]
    assert said
    for line in said:
        name = str(line.get("name") or line.get("image"))
        picture, _, asked = name.partition("?")
        (alone,) = model([str(root / picture)], prompt=asked or None, num_beams=2)
        assert line["caption"] == alone[0].text


def test_a_model_without_prompts_leaves_them_out_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = CaptionData(answers(tmp_path / "pairs"), batch_size=4, max_len=20, vocab_size=300)
    rows = data.rows("train")
    said = f"left out, as the model is trained without prompts: {len(rows)} questions"
    assert said in caplog.text


def test_a_model_without_prompts_learns_the_first_answers_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    turns = [("human", "What?"), ("gpt", "a star"), ("human", "Why?"), ("gpt", "so")]
    said = [{"from": who, "value": text} for who, text in turns]
    for i in range(8):
        pictures()[i % 3].save(tmp_path / f"{i}.png")
    (tmp_path / "c.json").write_text(json.dumps([{"image": f"{i}.png", "conversations": said} for i in range(8)]))
    data = CaptionData(tmp_path, batch_size=4, max_len=20, vocab_size=300)
    rows = data.rows("train")
    assert [caption.text for group in rows.captions for caption in group] == ["a star"] * len(rows)
    assert f"left out, as the model reads no prompts: {len(rows)} answers to later turns" in caplog.text
    assert len(data.source.split("train")) == 2 * len(rows)


def test_what_is_wrong_is_counted_in_pictures_by_check_and_in_questions_where_they_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    base, root = blip_vqa(tmp_path / "base"), answers(tmp_path / "pairs", 12)
    split = {i: "val" if i > 8 else "train" for i in range(12)}
    lines = (root / "vqa.csv").read_text().splitlines()
    told = [f"{line},{split[int(line.split('.')[0])]}" for line in lines[1:]]
    (root / "vqa.csv").write_text("\n".join([f"{lines[0]},split", *told]) + "\n")
    for i in (2, 10):
        (root / f"{i}.png").write_bytes((root / f"{i}.png").read_bytes()[:70])
    code, out, _ = mmt(capsys, "check", str(root))
    assert (code, "corrupt pictures in train: 1 of 9 " in out, "corrupt pictures in val: 1 of 3 " in out) == (
        1,
        True,
        True,
    )
    assert out.count(" 2.png: ") == 1
    words = ["--config", "recipes/finetune_hub.yaml", "--model.init", str(base), "--data.source", str(root)]
    words += ["--trainer.default_root_dir", str(tmp_path / "run"), *QUICK]
    code, _, err = mmt(capsys, "fit", *words)
    assert (code, "the pictures of 2 of 18 questions can't be read so far" in err) == (2, True), err
    code, out, err = mmt(capsys, "fit", *words, "--data.loader.max_bad_fraction=0.5")
    assert (code, "the pictures of 2 questions could not be read; they are named in" in out) == (0, True), err
    args = ["--data", str(root), "--split", "val", "--device", "cpu"]
    code, _, err = mmt(capsys, "evaluate", "--model", str(tmp_path / "run/model"), *args)
    assert (code, "2 of 6 questions could not be used" in err) == (1, True), err
