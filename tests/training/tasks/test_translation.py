"""Translations: the pairs, their batches, the Translator, the task and its scores; the schedule of the paper."""

import io
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmtransformer import Seq2SeqBatch, Tokenizer, Transformer, Translator
from mmtransformer.cli import main
from mmtransformer.data.loading.sampler import SampleIndex
from mmtransformer.data.parallel_texts import Parallel, ParallelTable, SceneTranslations, plain_caption
from mmtransformer.data.scenes.grammar import parse
from mmtransformer.data.scenes.meaning import Facts
from mmtransformer.data.scenes.scenes import Scenes
from mmtransformer.data.translation import TranslationCollate, TranslationData, TranslationRows
from mmtransformer.generation.config import GenerationConfig
from mmtransformer.training import OptimConfig, Translation
from mmtransformer.training.engine.optim import noam_peak
from mmtransformer.training.tasks.translation import by_direction, score_translations, table

SCENES = Scenes(train_size=40, val_size=11, compositional_size=5, phrasings=2)


def tokenizer() -> Tokenizer:
    texts = [text for pair in SceneTranslations(SCENES).split("train") for text in (pair.source, pair.text)]
    return Tokenizer.train(texts, 400, ("en", "ko"))


def data(**options: Any) -> TranslationData:
    arguments: dict[str, Any] = {"vocab_size": 400, "max_len": 60, "batch_size": 7} | options
    return TranslationData(SceneTranslations(SCENES), **arguments)


def small(vocab_size: int = 400) -> Transformer:
    return Transformer(vocab_size, 16, 1, 2, mlp_dim=20, max_len=64)


# --- the pairs


def test_a_scenes_translation_is_one_sentence_that_says_everything() -> None:
    split = SCENES.split("train")
    rows = SceneTranslations(SCENES).split("train")
    assert len(rows) == 40 * 2 * 2
    assert {row.direction for row in rows} == {"en-ko", "ko-en"}
    for row in rows:
        number = int(row.name.rsplit("-", 1)[1])
        scene = split.scene(number)
        assert row.text == plain_caption(scene, row.language)
        for text, language in ((row.text, row.language), (row.source, row.source_language)):
            said, true = parse(text, language), Facts.of(scene)
            assert set(said.groups) == set(true.groups), text
            assert len(said.relations) == len(true.relations), text
    assert len({row.source for row in rows}) > 1.8 * len({row.text for row in rows})


def test_the_plain_caption_is_plain() -> None:
    row = next(row for row in SceneTranslations(SCENES).split("train") if " is " not in row.source)
    assert row == SceneTranslations(SCENES).split("train")[0]
    assert (row.source_language, row.language) == ("en", "ko")
    assert any("가" <= char <= "힣" for char in row.text)
    assert not row.text.endswith("다")  # one group is named, not stated


def test_held_out_splits_know_their_scenes_and_say_each_source_once() -> None:
    source = SceneTranslations(SCENES, directions=["ko-en"])
    assert source.splits() == ("train", "val", "compositional")
    rows = source.split("val")
    assert len(rows) == 11
    assert all(row.scene is not None and row.direction == "ko-en" for row in rows)
    assert all(row.scene is None for row in source.split("train"))


@pytest.mark.parametrize("directions", [["en-de"], ["en-en"], ["en"], ["en-ko-en"]])
def test_directions_that_scenes_do_not_have(directions: list[str]) -> None:
    with pytest.raises(ValueError, match=rf'direction "{directions[0]}" is not two.*en, ko'):
        SceneTranslations(SCENES, directions=directions)
    with pytest.raises(ValueError, match="must be a list"):
        SceneTranslations(SCENES, directions="en-ko")


ROWS = [("a cat", "고양이"), ("two dogs", "개 두 마리"), ("a red bus", "빨간 버스"), ("nothing", "NA"), ("rain", "비")]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_a_table_of_ones_own(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"pairs.{kind}"
    splits = ["train", "train", "val", "train", "train"]
    if kind == "jsonl":
        lines = [json.dumps({"en": en, "ko": ko, "split": s}) for (en, ko), s in zip(ROWS, splits, strict=True)]
    else:
        mark = "," if kind == "csv" else "\t"
        lines = [mark.join(("en", "ko", "split"))]
        lines += [mark.join((en, ko, s)) for (en, ko), s in zip(ROWS, splits, strict=True)]
    path.write_text("\ufeff" * (kind == "csv") + "\n".join(lines) + "\n", "utf-8")
    source = ParallelTable(str(path))
    assert (source.languages, source.splits(), source.incomplete) == (("en", "ko"), ("train", "val"), 1)
    assert [(row.source, row.text) for row in source.split("val")] == [
        ("a red bus", "빨간 버스"),
        ("빨간 버스", "a red bus"),
    ]
    assert len(source.split("train")) == 6
    assert len(ParallelTable(str(path), directions=["ko-en"]).split("train")) == 3
    with pytest.raises(ValueError, match=r"no split 'test'.*train, val"):
        source.split("test")
    with pytest.raises(ValueError, match=r"no column 'de' among en, ko, split"):
        ParallelTable(str(path), directions=["en-de"])


def test_a_table_without_splits_is_divided_by_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text("en\tko\n" + "".join(f"word {i}\t낱말 {i}\n" for i in range(200)), "utf-8")
    source = ParallelTable(str(path), val_fraction=0.2)
    train, val = ({row.source for row in source.split(name)} for name in ("train", "val"))
    assert not train & val
    assert 50 <= len(val) <= 110  # both directions
    with pytest.raises(ValueError, match=r"both need rows, there are: train 400"):
        ParallelTable(str(path), val_fraction=0.0)
    with pytest.raises(ValueError, match=r"pairs\.xlsx: no such file"):
        ParallelTable(str(tmp_path / "pairs.xlsx"))
    (tmp_path / "bad.csv").write_bytes("en,ko\ncat,고양이\n".encode("cp949"))
    with pytest.raises(ValueError, match=r"bad\.csv: not UTF-8"):
        ParallelTable(str(tmp_path / "bad.csv"))


def test_columns_are_named_by_their_languages_and_few_rows_fill_both_splits(tmp_path: Path) -> None:
    path = tmp_path / "번역.tsv"
    path.write_text("\ufeff한국어\tEnglish \r\n개\ta dog\r\n소\ta cow\r\n", "utf-8")
    source = ParallelTable(str(path))
    assert source.splits() == ("train", "val")
    rows = [row for name in source.splits() for row in source.split(name)]
    assert {(row.source, row.text) for row in rows if row.language == "en"} == {("개", "a dog"), ("소", "a cow")}
    path.write_text("ko\tde\n개\tein Hund\n소\teine Kuh\n", "utf-8")
    with pytest.raises(ValueError, match=r"among ko, de; name each column .* --data\.source\.directions=\[") as refused:
        ParallelTable(str(path))
    assert "\n" not in str(refused.value)
    assert len(ParallelTable(str(path), directions=["ko-de"]).split("train")) == 1


def test_a_column_of_the_very_name_comes_first_and_splits_have_their_usual_names(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("kr,en,Korean,split\n개,a dog,멍멍이,train\n소,a cow,음매,Validation\n", "utf-8")
    source = ParallelTable(str(path), directions=["kr-en"])
    assert {name: [row.source for row in source.split(name)] for name in source.splits()} == {
        "train": ["개"],
        "val": ["소"],
    }


# --- batches


def test_batches_hold_what_the_pairs_say() -> None:
    module = data()
    module.setup("fit")
    batch = next(iter(module.val_dataloader()[0]))
    assert isinstance(batch, Seq2SeqBatch)
    t = module.tokenizer
    for i, pair in enumerate(module.rows("val").pairs[:7]):
        source, tokens = (batch.source[i, batch.source_attention_mask[i]], batch.tokens[i, batch.attention_mask[i]])
        assert source.tolist() == [*t.encode(pair.source), t.eos_id]
        assert tokens.tolist() == [*t.prompt(pair.language), *t.encode(pair.text), t.eos_id]
        assert batch.tokens[i, batch.loss_mask[i]].tolist() == [*t.encode(pair.text), t.eos_id]
        assert batch.names[i] == f"{pair.name} {pair.direction}"


def test_an_epoch_has_every_pair_once_and_fillers_do_not_count() -> None:
    module = data()
    module.setup("fit")
    loader = module.train_dataloader()
    names = [name for batch in loader for name in batch.names]
    assert sorted(names) == sorted(f"{pair.name} {pair.direction}" for pair in module.rows("train").pairs)
    rows = module.rows("val")
    batch = TranslationCollate(module.tokenizer)([rows[SampleIndex(0, 3)], rows[SampleIndex(0, 4, False)]])
    assert batch.loss_mask[0].any()
    assert not batch.loss_mask[1].any()


def test_long_pairs_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    module = data(max_len=24)
    rows = module.rows("train")
    assert rows.too_long > 0
    assert len(rows) + rows.too_long == 160
    assert f"{rows.too_long} of 160 pairs are longer than max_len (24 tokens" in caplog.text
    with pytest.raises(ValueError, match=r"none of 1 pair fits max_len \(3 tokens\): the longest has \d+"):
        TranslationRows(module.pairs("train")[:1], module.tokenizer, 3)


def test_only_the_same_tokenizer_resumes() -> None:
    module = data()
    module.load_state_dict(module.state_dict())
    with pytest.raises(ValueError, match=r"cannot resume.*vocab_size \(300\)"):
        data(vocab_size=300).load_state_dict(module.state_dict())


# --- the Translator


def test_translator_is_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(3)
    generation = GenerationConfig(num_beams=3, max_new_tokens=9, length_penalty=0.6, length_offset=5.0)
    translator = Translator(small(), tokenizer(), generation=generation, device="cpu")
    texts = ["a small red star", "two dogs", "별 세 개", "three large yellow striped crosses"]
    said = translator(texts, "ko", batch_size=3)
    assert len(said) == 4
    assert said == [translator(text, "ko")[0] for text in texts]  # batched = one by one
    translator.save_pretrained(tmp_path / "model", card="all of it")
    again = Translator.from_pretrained(tmp_path / "model", device="cpu")
    assert again(texts, "ko") == said
    assert again.generation == generation
    card = (tmp_path / "model" / "README.md").read_text("utf-8")
    assert "all of it" in card
    assert 'translator("a text", "ko")' in card
    with pytest.raises(ValueError, match=r"language 'de' is unknown.*en, ko"):
        translator(texts, "de")
    with pytest.raises(ValueError, match=r"tokenizer has 400 tokens, but the model scores 300"):
        Translator(small(300), tokenizer())
    (tmp_path / "model" / "generation_config.json").write_text('{"beams": 3}', "utf-8")
    with pytest.raises(ValueError, match=r"generation_config\.json: unknown keys \['beams'\]"):
        Translator.from_pretrained(tmp_path / "model")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    translator = Translator(
        small(), tokenizer(), generation=GenerationConfig(num_beams=1, max_new_tokens=5), device="cpu"
    )
    translator.save_pretrained(tmp_path / "model")
    words = ["translate", "--model", str(tmp_path / "model"), "--language", "ko", "--device", "cpu"]
    texts = ["a small red star", "별 세 개"]
    said = translator(texts, "ko")
    image = tmp_path / "look.png"
    assert main([*words, *texts, "--attention", str(image)]) == 0
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in said)
    assert image.is_file()
    monkeypatch.setattr("sys.stdin", io.StringIO("\n" + texts[1] + "\n"))
    assert main([*words, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row == {"text": texts[1], "language": "ko", "translation": said[1]}
    (tmp_path / "texts.txt").write_text(texts[0])
    assert main([*words, str(tmp_path / "texts.txt")]) == 2
    assert f"< {tmp_path / 'texts.txt'} translates its lines" in capsys.readouterr().err
    assert main([*words, "별" * 300]) == 2  # too long for the name of a file
    assert "601 tokens" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(words) == 2
    assert "nothing to translate" in capsys.readouterr().err


def test_where_it_looked() -> None:
    translator = Translator(Transformer(400, 16, 2, 2, mlp_dim=20, max_len=64), tokenizer(), device="cpu")
    said, source, weights = translator.attention_map("a small red star", "작은 빨간 별", "ko")
    assert "".join(said[:-1]).split() == ["작은", "빨간", "별"]
    assert "".join(source[:-1]).split() == ["a", "small", "red", "star"]
    assert weights.shape == (2, 2, len(said), len(source))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, len(said)))


# --- the task


@torch.no_grad()
def test_loss_is_the_mean_surprise_of_the_targets() -> None:
    task, module = Translation(small().eval(), label_smoothing=0.1), data()
    module.setup("fit")
    batch = next(iter(module.val_dataloader()[0]))
    logs = task.model.logits(batch).log_softmax(-1)
    plain = smoothed = count = 0.0
    for row in range(len(batch.tokens)):
        for place in range(1, batch.tokens.shape[1]):
            if batch.loss_mask[row, place]:
                p = logs[row, place - 1]
                plain -= float(p[batch.tokens[row, place]])
                smoothed -= 0.9 * float(p[batch.tokens[row, place]]) + 0.1 * float(p.mean())
                count += 1
    loss = task.loss(batch)
    assert int(loss.count) == count
    assert math.isclose(float(loss.sum), smoothed, rel_tol=1e-5)
    assert math.isclose(float(task._loss(batch, 0.0).sum), plain, rel_tol=1e-5)


def test_scores() -> None:
    pairs = by_direction(SceneTranslations(SCENES).split("val"))["en-ko"]
    perfect = score_translations([pair.text for pair in pairs], pairs)
    assert (perfect.bleu_4, perfect.exact, perfect.facts, perfect.pairs) == (pytest.approx(1.0), 1.0, 1.0, 11)
    said = [pair.text for pair in pairs]
    said[0] = said[0] + " 있다"  # the same facts in other words
    said[1] = pairs[2].text  # another scene's
    found = score_translations(said, pairs)
    assert found.exact == pytest.approx(9 / 11)
    assert found.facts == pytest.approx(10 / 11)
    assert found.bleu_low <= found.bleu_4 < 1.0
    assert found.bleu_low < found.bleu_high <= 1.0
    plain = [pair._replace(scene=None) for pair in pairs]
    assert score_translations(said, plain).facts is None
    shown = table({"val": {"en-ko": found}})
    assert "81.8%" in shown
    assert "90.9%" in shown
    with pytest.raises(ValueError, match="10 translations for 11 pairs"):
        score_translations(said[:10], pairs)


def test_model_and_data_must_fit() -> None:
    def check(task: Translation, module: TranslationData) -> None:
        trainer: Any = SimpleNamespace(datamodule=module)
        task._trainer = trainer
        task.setup("fit")

    check(Translation(small()), data())
    with pytest.raises(ValueError, match=r"tokenizer has 400 tokens, but the model scores 300"):
        check(Translation(small(300)), data())
    with pytest.raises(ValueError, match=r"data\.max_len \(65\) is more than the 64"):
        check(Translation(small()), data(max_len=65))
    with pytest.raises(ValueError, match=r"label_smoothing \(1\.0\)"):
        Translation(small(), label_smoothing=1.0)
    with pytest.raises(ValueError, match=r"batch_size \(0\)"):
        data(batch_size=0)


# --- the paper's schedule


def test_noam_is_the_papers_formula() -> None:
    dim, warmup = 512, 40
    optim = OptimConfig(lr=noam_peak(dim, warmup), warmup_steps=warmup, lr_schedule="inverse_sqrt", weight_decay=0.0)
    optimizer = optim.build(small())
    schedule = optim.schedule(optimizer, 100_000)
    for step in range(1, 200):
        want = dim**-0.5 * min(step**-0.5, step * warmup**-1.5)
        assert math.isclose(optimizer.param_groups[0]["lr"], want, rel_tol=1e-9)
        optimizer.step()
        schedule.step()
    assert round(noam_peak(512), 6) == 0.000699
    with pytest.raises(ValueError, match="at least 1, not 0"):
        OptimConfig(warmup_steps=0, lr_schedule="inverse_sqrt").schedule(optimizer, 10)
    with pytest.raises(ValueError, match='not "linear"'):
        OptimConfig(lr_schedule="linear")  # pyright: ignore[reportArgumentType]


def test_parallel_says_its_direction() -> None:
    assert Parallel("x", "a", "en", "하나", "ko").direction == "en-ko"
