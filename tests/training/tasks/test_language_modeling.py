"""Language modeling: packed rows against documents one by one, scores, n-grams beside them, and whole runs."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from mmtransformer import PositionConfig, TextDecoder, Tokenizer, generate
from mmtransformer.backbones.base import PromptBatch
from mmtransformer.data.loading.source import Caption
from mmtransformer.data.text_only.texts import TextBatch, TextData
from mmtransformer.losses.next_token import next_token_loss
from mmtransformer.training import LanguageModeling, OptimConfig, Run
from mmtransformer.training.evaluation.text_scores import (
    TextScore,
    novelty,
    score_ngrams,
    score_texts,
    table,
    write_texts,
)
from mmtransformer.weights import from_transformers, load_lm

VOCAB = 340
TRAIN = [
    Caption(text, language)
    for i in range(97)
    for text, language in (
        (f"a {'very ' * (i % 5)}small circle and {i % 7} squares", "en"),
        (f"작은 {'아주 ' * (i % 3)}빨간 원 {i % 5}개", "ko"),
    )
]
VAL = [Caption(f"a {'very ' * (i % 4)}small circle and {i % 6} red squares", "en") for i in range(11)] + [
    Caption(f"작은 빨간 원 {i}개와 별", "ko") for i in range(7)
]


class Lists:
    """A source made of lists."""

    languages: tuple[str, ...] = ("en", "ko")

    def splits(self) -> tuple[str, ...]:
        return ("train", "val")

    def split(self, name: str) -> list[Caption]:
        return TRAIN if name == "train" else VAL


@pytest.fixture(autouse=True)
def lightning_is_quiet() -> None:
    """Advice on workers and intervals is not a fault."""
    warnings.filterwarnings("ignore", category=PossibleUserWarning)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")


def data_of(**arguments: Any) -> TextData:
    return TextData(Lists(), **({"vocab_size": VOCAB, "max_len": 40, "row_len": 97, "batch_size": 5} | arguments))


def decoder_of(positions: Any = "learned", **arguments: Any) -> TextDecoder:
    torch.manual_seed(3)
    decoder = TextDecoder(VOCAB, 24, 2, 3, max_len=40, positions=PositionConfig(positions), **arguments)
    for parameter in decoder.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return decoder


def documents(tokenizer: Tokenizer, texts: list[Caption]) -> list[Tensor]:
    ids = [[*tokenizer.prompt(t.language), *tokenizer.encode(t.text), tokenizer.eos_id] for t in texts]
    return [torch.tensor([row]) for row in ids]


def alone(decoder: TextDecoder, document: Tensor) -> Tensor:
    """The sum of one document's losses behind its prompt of 2, by the definition."""
    logits = decoder.head(decoder(document[:, :-1])).log_softmax(-1)
    return -logits[0, 1:].gather(1, document[0, 2:, None]).sum()


# ------------------------------------------------------------------------------------------------- packed rows


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_the_loss_and_gradient_of_packed_rows_are_those_of_the_documents_one_by_one(positions: str) -> None:
    data, decoder = data_of(), decoder_of(positions).double()
    module = LanguageModeling(decoder)
    packed = [module.loss(batch) for batch in data.train_dataloader()]
    total = torch.stack([loss.sum for loss in packed]).sum()
    grads = torch.autograd.grad(total, list(decoder.parameters()))
    singles = documents(data.tokenizer, TRAIN)
    want = torch.stack([alone(decoder, document) for document in singles]).sum()
    want_grads = torch.autograd.grad(want, list(decoder.parameters()))
    assert sum(int(loss.count) for loss in packed) == sum(d.shape[1] - 2 for d in singles)
    torch.testing.assert_close(total, want, rtol=1e-12, atol=0)
    for found, expected in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_document_changes_no_bit_of_its_neighbours() -> None:
    data, decoder = data_of(), decoder_of().eval()
    batch = next(iter(data.train_dataloader()))
    one = batch.document_ids[0, 0]
    mine = batch.document_ids == one
    other = TextBatch(torch.where(mine, (batch.tokens + 1) % VOCAB, batch.tokens), batch.document_ids, batch.loss_mask)
    before = decoder(batch.tokens, document_ids=batch.document_ids)
    after = decoder(other.tokens, document_ids=other.document_ids)
    assert torch.equal(before[~mine], after[~mine])
    assert (before[mine] != after[mine]).any(-1).all()


def test_prompts_teach_nothing_and_no_document_predicts_the_next_ones_start() -> None:
    data = data_of()
    tokenizer = data.tokenizer
    for batch in data.train_dataloader():
        first = torch.ones_like(batch.loss_mask)
        first[:, 1:] = batch.document_ids[:, 1:] != batch.document_ids[:, :-1]
        assert not batch.loss_mask[first].any()
        assert not torch.isin(batch.tokens[batch.loss_mask], torch.tensor(tokenizer.prompt("ko"))).any()
        assert (batch.tokens[first & (batch.document_ids >= 0)] == tokenizer.bos_id).all()


# ------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("max_len", [9, 40])
def test_scores_are_those_of_the_documents_one_by_one(max_len: int) -> None:
    data, decoder = data_of(max_len=max_len), decoder_of(dropout=0.5).train()
    found = score_texts(decoder, data, "val")
    assert all(part.training for part in decoder.modules())
    decoder.eval()
    nats = {"en": 0.0, "ko": 0.0}
    tokens = {"en": 0, "ko": 0}
    for text, document in zip(VAL, documents(data.tokenizer, VAL), strict=True):
        assert text.language is not None
        for start in range(0, document.shape[1] - 1, max_len - 1):
            part = document[:, start : start + max_len]
            loss_mask = torch.arange(part.shape[1])[None] >= (1 if start else 2)
            loss = next_token_loss(decoder(part), part, loss_mask, decoder.head)
            nats[text.language] += float(loss.sum.detach())
            tokens[text.language] += int(loss.count)
    for language in ("en", "ko"):
        texts = [t.text for t in VAL if t.language == language]
        score = found[language]
        assert score.nats == pytest.approx(nats[language], rel=1e-5)
        assert score.tokens == tokens[language]
        assert score.bytes == sum(len(text.encode()) for text in texts)
        assert score.words == sum(len(text.split()) + 1 for text in texts)
    assert found["all"] == found["en"] + found["ko"]


def test_perplexities_are_their_definition() -> None:
    score = TextScore(nats=30 * math.log(2), tokens=10, bytes=12, words=5)
    assert score.perplexity == pytest.approx(8)
    assert score.bits_per_byte == pytest.approx(2.5)
    assert score.word_perplexity == pytest.approx(64)
    assert score.to_dict() | {"nats": 0} == {
        "perplexity": 8.0, "bits_per_byte": 2.5, "word_perplexity": 64.0, "nats": 0,
        "tokens": 10, "bytes": 12, "words": 5,
    }  # fmt: skip


def test_ngrams_are_scored_on_the_same_tokens_and_bytes() -> None:
    data = data_of()
    model = score_texts(decoder_of().eval(), data, "val")
    ngrams = score_ngrams(data, ("val",), (1, 3))
    for by in ngrams.values():
        for language, score in by["val"].items():
            assert (score.tokens, score.bytes, score.words) == (
                model[language].tokens,
                model[language].bytes,
                model[language].words,
            )
    assert ngrams[3]["val"]["all"].perplexity < ngrams[1]["val"]["all"].perplexity
    few = score_ngrams(data, ("val",), (3,), max_tokens=60)
    assert few[3]["val"]["all"].perplexity > ngrams[3]["val"]["all"].perplexity
    text = table({"val": model}, ngrams)
    assert f"{model['ko'].perplexity:.2f}" in text
    assert f"{ngrams[3]['val']['ko'].perplexity:.2f}" in text
    assert len(text.splitlines()) == 1 + 3 * 3


# --------------------------------------------------------------------------------------------------- generation


def test_a_decoder_alone_writes_what_transformers_does() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(7)
    config = GPT2Config(
        vocab_size=53, n_embd=24, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )  # fmt: skip
    theirs = GPT2LMHeadModel(config).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.25 * torch.randn_like(parameter)
    ours = from_transformers(theirs)
    tokens, attention_mask = torch.randint(3, 53, (5, 7)), torch.ones(5, 7, dtype=torch.bool)
    attention_mask[1, :3] = attention_mask[4, :6] = False
    tokens = tokens.masked_fill(~attention_mask, 0)
    for options in ({}, {"num_beams": 3}):
        out = theirs.generate(
            tokens, attention_mask=attention_mask.long(), max_new_tokens=11, do_sample=False, early_stopping=False,
            **options
        )  # fmt: skip
        rows = out[:, 7:].tolist()
        want = [row[: row.index(2)] if 2 in row else row for row in rows]
        found = generate(ours, PromptBatch(tokens, attention_mask), eos_id=2, max_new_tokens=11, **options)
        assert [texts[0].tokens for texts in found] == want


def test_texts_are_written_by_seed_and_language() -> None:
    data, decoder = data_of(), decoder_of()

    def write(language: str, seed: int, **options: Any) -> list[str]:
        return write_texts(decoder, data.tokenizer, language, 3, seed=seed, **options)

    assert write("ko", 0) == write("ko", 0)
    assert write("ko", 0) != write("ko", 1)
    assert write("ko", 0) != write("en", 0)
    assert all(len(text) < 9 * 30 for text in write("en", 0, max_new_tokens=9))
    assert novelty(["a", "b", "b", "c"], [Caption("a", None), Caption("b", "en")]) == {"distinct": 0.75, "new": 0.25}


def test_ids_without_a_token_say_nothing() -> None:
    """The vocabulary of a model may be larger than its tokenizer's."""
    data = data_of(vocab_size=270)
    decoder = TextDecoder(5000, 16, 1, 2, max_len=40)
    with torch.no_grad():
        decoder.tok_embed.weight[:500] = 0
    texts = write_texts(decoder, data.tokenizer, "en", 5)
    assert len(texts) == 5


# --------------------------------------------------------------------------------------------------------- runs


def trainer(folder: Path, **arguments: Any) -> pl.Trainer:
    arguments = {"max_steps": 4, "max_epochs": 9, "logger": False, "enable_checkpointing": False} | arguments
    return pl.Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        **arguments,
    )


def test_a_run_learns_and_leaves_model_tokenizer_scores_and_texts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, module = (
        data_of(),
        LanguageModeling(decoder_of(), optim=OptimConfig(lr=1e-2, warmup_steps=5), baseline_orders=(1, 2), num_texts=4),
    )
    before = score_texts(module.decoder.eval(), data, "val")["all"].perplexity
    module.train()
    fit = trainer(tmp_path, max_steps=60, max_epochs=99, val_check_interval=1.0)
    fit.fit(module, datamodule=data)
    assert fit.callback_metrics["val/loss"] < math.log(before) - 1
    bits = float(fit.callback_metrics["val/bits_per_byte"])
    assert module.describe("val", fit.callback_metrics).startswith("val: loss ")
    assert "perplexity" in module.describe("val", fit.callback_metrics)
    lines = module.sample(0)
    assert [line.split(":")[0] for line in lines] == ["en", "ko"]
    assert module.sample(1) != lines
    module.finish(Run(tmp_path, 1.0, torch.device("cpu")))
    metrics = json.loads((tmp_path / "metrics.json").read_text("utf-8"))
    score = metrics["scores"]["val"]["all"]
    assert score["perplexity"] < before / 3
    assert score["bits_per_byte"] == pytest.approx(bits, rel=0.3)
    assert set(metrics["ngrams"]) == {"1", "2"}
    assert set(metrics["texts"]) == {"en", "ko"}
    assert metrics["training"]["steps"] == 60
    assert metrics["training"]["tokens_per_second"] == metrics["training"]["tokens"]
    texts = (tmp_path / "texts.txt").read_text("utf-8").splitlines()
    assert sum(line.startswith("ko: ") for line in texts) == 4
    out = capsys.readouterr().out
    assert "0.3" in out or "padding" in out
    assert f"{score['perplexity']:.2f}" in out
    saved, tokenizer = load_lm(tmp_path / "model"), Tokenizer.from_pretrained(tmp_path / "model")
    assert isinstance(TextDecoder.from_pretrained(tmp_path / "model"), TextDecoder)
    assert isinstance(saved, TextDecoder)
    batch = next(iter(data.train_dataloader()))
    torch.testing.assert_close(
        saved(batch.tokens, document_ids=batch.document_ids),
        module.decoder(batch.tokens, document_ids=batch.document_ids),
        atol=0,
        rtol=0,
    )
    assert tokenizer.encode(VAL[0].text) == data.tokenizer.encode(VAL[0].text)
    assert tokenizer.prompt("ko") == data.tokenizer.prompt("ko")


def test_a_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def module() -> LanguageModeling:
        return LanguageModeling(decoder_of(dropout=0.1), optim=OptimConfig(lr=1e-2, warmup_steps=2))

    def saves(name: str) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / name, every_n_train_steps=3, save_top_k=-1, filename="{step}")

    warnings.filterwarnings("ignore", message=".*dirpath has changed.*")
    whole, second = module(), module()
    arguments: Any = {"max_steps": -1, "max_epochs": 2, "enable_checkpointing": True}
    pl.seed_everything(5, verbose=False)
    trainer(tmp_path, callbacks=[saves("one")], **arguments).fit(whole, datamodule=data_of())
    pl.seed_everything(6, verbose=False)
    again = trainer(tmp_path, callbacks=[saves("two")], **arguments)
    again.fit(second, datamodule=data_of(), ckpt_path=str(tmp_path / "one" / "step=3.ckpt"), weights_only=True)
    assert again.global_step == whole.trainer.global_step > 6
    assert second.samples_seen == whole.samples_seen == 2 * len(TRAIN)
    for found, want in zip(second.decoder.parameters(), whole.decoder.parameters(), strict=True):
        torch.testing.assert_close(found, want, atol=0, rtol=0)


def test_errors_name_the_numbers(tmp_path: Path) -> None:
    def fit(module: LanguageModeling, data: TextData) -> None:
        trainer(tmp_path).fit(module, datamodule=data)

    with pytest.raises(ValueError, match=r"\d+ tokens, .*scores 280; .*data.vocab_size to 280"):
        fit(LanguageModeling(TextDecoder(280, 16, 1, 2, max_len=40)), data_of())
    with pytest.raises(ValueError, match=r"data.max_len \(40\) is more than the 30"):
        fit(LanguageModeling(TextDecoder(VOCAB, 16, 1, 2, max_len=30)), data_of())
    with pytest.raises(ValueError, match="leave the decoder's context_dim out"):
        fit(LanguageModeling(TextDecoder(VOCAB, 16, 1, 2, max_len=40, context_dim=8)), data_of())
    with pytest.raises(ValueError, match=r"baseline_orders \[2, 0\]"):
        LanguageModeling(decoder_of(), baseline_orders=(2, 0))
