"""Masked language modeling: which words are hidden, which texts are paired, baselines by definition, and a run."""

import dataclasses
import json
import math
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.warnings import PossibleUserWarning

from mmtransformer import TextEncoder, Tokenizer
from mmtransformer.data.loading.module import LoaderConfig, Splits
from mmtransformer.data.loading.source import Caption
from mmtransformer.data.text_only.masked import MaskedTextData
from mmtransformer.data.text_only.masked_rows import MaskedBatch, MaskedRows
from mmtransformer.data.text_only.masking import Masking, with_mask
from mmtransformer.metrics.bigram_baseline import BigramBaseline
from mmtransformer.training import MaskedLanguageModeling, OptimConfig, Run
from mmtransformer.training.evaluation.masked_scores import fill_in, fit_bigrams, score_masked

VOCAB = 320
THINGS = ("circle", "square", "star", "빨간 원", "작은 별", "heart", "moon")


def groups(first: int, count: int) -> list[tuple[Caption, ...]]:
    """Texts of one thing each, and a few without fellows."""
    found = []
    for i in range(first, first + count):
        thing = THINGS[i % len(THINGS)]
        texts = [f"a {thing} on a table, {i % 3}", f"there is one {thing} here", f"{thing} {'very ' * (i % 4)}big"]
        found.append(tuple(Caption(text) for text in texts[: 1 + (i % 5 > 0) * 2]))
    return found


class Groups:
    """A source made of lists."""

    languages: tuple[str, ...] = ()

    def splits(self) -> tuple[str, ...]:
        return ("train", "val")

    def groups(self, name: str) -> list[tuple[Caption, ...]]:
        return groups(0, 60) if name == "train" else groups(60, 17)

    def split(self, name: str) -> list[Caption]:
        return [text for group in self.groups(name) for text in group]


@pytest.fixture(autouse=True)
def lightning_is_quiet() -> None:
    """Advice on workers and intervals is not a fault."""
    warnings.filterwarnings("ignore", category=PossibleUserWarning)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")


def data_of(**arguments: Any) -> MaskedTextData:
    return MaskedTextData(Groups(), **({"vocab_size": VOCAB, "max_len": 40, "batch_size": 8} | arguments))


def encoder_of(**arguments: Any) -> TextEncoder:
    torch.manual_seed(3)
    options = {"max_len": 40, "mlm_head": True, "nsp_head": True, "dropout": 0.0}
    return TextEncoder(VOCAB, 24, 1, 3, **(options | arguments))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return data_of().tokenizer


# ------------------------------------------------------------------------------------------------- hidden words


def test_words_end_at_white_space_and_marks(tokenizer: Tokenizer) -> None:
    masking = Masking(tokenizer)
    for text, words in {
        "a big table, here": ["a", "big", "table", ",", "here"],
        "작은 별이 있다.": ["작은", "별이", "있다", "."],
        "well-known ( 3.5 )": ["well", "-", "known", "(", "3", ".", "5", ")"],
    }.items():
        ids = np.array(tokenizer.encode(text))
        numbers = masking.words(ids)
        found = [tokenizer.decode(ids[numbers == i].tolist()).strip() for i in range(numbers.max() + 1)]
        assert found == words, text
    assert len(masking.words(np.zeros(0, np.int64))) == 0


@pytest.mark.parametrize("whole_word_mask", [True, False])
def test_fifteen_percent_are_hidden_eighty_ten_ten(tokenizer: Tokenizer, whole_word_mask: bool) -> None:
    masking = Masking(tokenizer, whole_word_mask=whole_word_mask)
    draw = np.random.default_rng(0)
    tokens = draw.choice(masking.ordinary, (400, 62))
    words = np.tile(np.repeat(np.arange(31), 2), (400, 1))
    words[:, 50:] = -1
    keys = np.stack([np.zeros(400, int), np.zeros(400, int), np.arange(400)], axis=1)
    seen, loss_mask = masking.hide(tokens, words, keys)
    assert not loss_mask[:, 50:].any()
    assert set(loss_mask.sum(1)) == {8}  # round(0.15 * 50)
    np.testing.assert_array_equal(seen[~loss_mask], tokens[~loss_mask])
    share = (seen[loss_mask] == masking.mask_id).mean()
    same = (seen[loss_mask] == tokens[loss_mask]).mean()
    assert share == pytest.approx(0.8, abs=0.03)
    assert same == pytest.approx(0.1 + 0.1 / len(masking.ordinary), abs=0.02)
    assert np.isin(seen[loss_mask], [masking.mask_id, *masking.ordinary]).all()
    if whole_word_mask:
        pairs = loss_mask[:, :50].reshape(400, 25, 2)
        assert (pairs[..., 0] == pairs[..., 1]).all()
    else:
        assert (loss_mask[:, :50:2] != loss_mask[:, 1:50:2]).any()
    again = masking.hide(tokens[7:9], words[7:9], keys[7:9])
    np.testing.assert_array_equal(again[1], loss_mask[7:9])
    np.testing.assert_array_equal(again[0], seen[7:9])
    later = masking.hide(tokens, words, keys + np.array([0, 1, 0]))
    assert (later[1] != loss_mask).any(1).mean() > 0.9
    spread = loss_mask[:, :50].mean(0)
    assert spread.min() > 0.05
    assert spread.max() < 0.30


def test_one_word_is_hidden_even_if_it_is_longer_than_the_share(tokenizer: Tokenizer) -> None:
    masking = Masking(tokenizer)
    words = np.array([[-1, 0, 0, 0, -1], [-1, -1, -1, -1, -1]])
    _, loss_mask = masking.hide(np.full((2, 5), 9), words, np.array([[0, 0, 0], [0, 0, 1]]))
    assert loss_mask.tolist() == [[False, True, True, True, False], [False] * 5]


def test_a_mask_token_is_found_or_added() -> None:
    plain = Tokenizer.train(["a b c"], 270)
    assert with_mask(plain).vocab_size == plain.vocab_size + 1
    assert with_mask(with_mask(plain)).vocab_size == plain.vocab_size + 1
    assert Masking(with_mask(plain)).mask_id == plain.vocab_size
    assert plain.vocab_size not in Masking(with_mask(plain)).ordinary
    with pytest.raises(ValueError, match=rf"none of the tokenizer's {plain.vocab_size} tokens"):
        Masking(plain)
    with pytest.raises(ValueError, match=r"mlm_probability \(1.0\)"):
        Masking(with_mask(plain), mlm_probability=1.0)
    with pytest.raises(ValueError, match=r"mask_replace_prob \(0.8\) and random_replace_prob \(0.3\)"):
        Masking(with_mask(plain), random_replace_prob=0.3)


# -------------------------------------------------------------------------------------------------------- pairs


def test_pairs_are_of_one_group_half_of_the_time(tokenizer: Tokenizer) -> None:
    split = groups(0, 400)
    masking = Masking(tokenizer)
    rows = MaskedRows(split, tokenizer, masking, max_len=40, seed=1)
    group_of = np.repeat(np.arange(len(split)), [len(group) for group in split])
    sizes = np.array([len(group) for group in split])[group_of]
    second, other = rows.seconds(0)
    index = np.arange(len(rows))
    assert ((second < 0) == (sizes == 1)).all()
    assert ((other < 0) == (sizes == 1)).all()
    paired = second >= 0
    same = group_of[second] == group_of
    assert (same[paired] == (other[paired] == 0)).all()
    assert (second[paired] != index[paired]).all()
    assert other[paired].mean() == pytest.approx(0.5, abs=0.05)
    strangers = second[paired & (other == 1)]
    assert len(np.unique(strangers)) > 0.5 * len(strangers)
    np.testing.assert_array_equal(rows.seconds(0)[0], second)
    assert (rows.seconds(1)[0] != second).mean() > 0.4
    none, label = MaskedRows(split, tokenizer, masking, max_len=40, nsp=False).seconds(0)
    assert (none == -1).all()
    assert (label == -1).all()
    assert (MaskedRows(split[1:2], tokenizer, masking, max_len=40).seconds(0)[0] == -1).all()


def test_long_pairs_lose_the_end_of_the_longer_text(tokenizer: Tokenizer) -> None:
    rows = MaskedRows(groups(0, 5), tokenizer, Masking(tokenizer), max_len=13)
    assert rows.keep(4, 6) == (4, 6)
    assert rows.keep(20, 3) == (7, 3)
    assert rows.keep(3, 20) == (3, 7)
    assert rows.keep(9, 8) == (5, 5)
    assert rows.keep(30, None) == (11, 0)
    assert rows.cut == sum(len(ids) > 11 for ids in rows.ids)
    with pytest.raises(ValueError, match=r"max_len \(4\)"):
        MaskedRows(groups(0, 5), tokenizer, Masking(tokenizer), max_len=4)
    with pytest.raises(ValueError, match=r"no texts \(0\)"):
        MaskedRows([], tokenizer, Masking(tokenizer), max_len=9)


@pytest.mark.parametrize("max_len", [14, 40])
def test_batches_are_rows_of_pairs(max_len: int) -> None:
    data = data_of(max_len=max_len)
    rows, tok = data.rows("train"), data.tokenizer
    loader = data.train_dataloader()
    lengths = rows.lengths(0)
    second, other = rows.seconds(0)
    seen: set[int] = set()
    for batch in loader:
        for b, name in enumerate(batch.names):
            i = int(name.split()[1])
            seen.add(i)
            ids = batch.labels[b][batch.attention_mask[b]].tolist()
            assert len(ids) == lengths[i]
            one, two = rows.keep(int(rows.sizes[i]), int(rows.sizes[second[i]]) if second[i] >= 0 else None)
            want = [tok.bos_id, *rows.ids[i][:one], tok.eos_id]
            types = [0] * len(want)
            if second[i] >= 0:
                want += [*rows.ids[second[i]][:two], tok.eos_id]
                types += [1] * (two + 1)
            assert ids == want
            assert batch.types[b][batch.attention_mask[b]].tolist() == types
            assert int(batch.next_sentence_label[b]) == other[i]
            special = torch.isin(batch.labels[b], torch.tensor([tok.bos_id, tok.eos_id, tok.pad_id]))
            assert torch.equal(batch.words[b] < 0, special | ~batch.attention_mask[b])
            assert not batch.loss_mask[b][special].any()
        assert torch.equal(batch.tokens[~batch.loss_mask], batch.labels[~batch.loss_mask])
        assert batch.loss_mask.any(1).all()
    assert seen == set(range(len(rows)))


def test_training_masks_anew_every_epoch_and_validation_never() -> None:
    data = data_of()
    loader = data.train_dataloader()

    def masks(loader: Any) -> dict[str, list[bool]]:
        rows = ((n, t) for batch in loader for n, t in zip(batch.names, batch.loss_mask.tolist(), strict=True))
        return dict(rows)

    first = masks(loader)
    loader.place.set_epoch(1)
    assert masks(loader) != first
    assert masks(data_of(loader=LoaderConfig(num_workers=2)).train_dataloader()) == first
    (val,) = data.val_dataloader()
    once = masks(val)
    val.place.set_epoch(1)
    assert masks(val) == once
    mask_id = data.masking(training=False).mask_id
    for batch in val:
        assert (batch.tokens[batch.loss_mask] == mask_id).all()


def test_a_run_goes_on_where_it_was() -> None:
    whole = [batch.tokens.tolist() for batch in data_of().train_dataloader()]
    loader = data_of().train_dataloader()
    begun = iter(loader)
    head = [next(begun).tokens.tolist(), next(begun).tokens.tolist()]
    fresh = data_of().train_dataloader()
    fresh.load_state_dict(loader.state_dict())
    assert head + [batch.tokens.tolist() for batch in fresh] == whole
    state = data_of().state_dict()
    data_of().load_state_dict(state)
    with pytest.raises(ValueError, match=r"vocab_size \(265\)"):
        data_of(vocab_size=265).load_state_dict(state)


# ----------------------------------------------------------------------------------------------------- baselines


def test_bigrams_guess_by_definition() -> None:
    vocab = 9
    draw = np.random.default_rng(0)
    texts = [[0, *((draw.integers(2, vocab) // 2 * 2) + i % 2 for i in range(5)), 1] for _ in range(40)]
    texts = [[min(int(t), vocab - 1) for t in text] for text in texts]
    tokens, starts = np.array([i for text in texts for i in text]), np.arange(0, 7 * 40 + 1, 7)
    loss_mask = np.tile([False, True, True, True, True, True, False], 40)
    model = BigramBaseline(vocab, strength=0.7).fit(tokens, starts, loss_mask)
    inner = [w for text in texts for w in text[1:-1]]
    share = [inner.count(w) / len(inner) for w in range(vocab)]
    assert model.unigram == int(np.argmax(share))

    def definition(left: int, right: int) -> int:
        scores = []
        for w in range(vocab):
            if not share[w]:
                scores.append(0.0)
                continue
            score = share[w]
            if left >= 0:
                count = sum(t[i] == left and t[i + 1] == w for t in texts for i in range(5))
                score *= 1 + count / (0.7 * share[w])
            if right >= 0:
                count = sum(t[i] == w and t[i + 1] == right for t in texts for i in range(1, 6))
                score *= 1 + count / (0.7 * share[w])
            scores.append(score)
        return int(np.argmax(scores))

    pairs = [(a, b) for a in range(-1, vocab) for b in range(-1, vocab)]
    found = model.predict(np.array([a for a, _ in pairs]), np.array([b for _, b in pairs]))
    assert found.tolist() == [definition(a, b) for a, b in pairs]
    assert len(set(found.tolist())) > 3
    assert model.predict(np.array([-1]), np.array([-1])).tolist() == [model.unigram]


def test_bigrams_refuse_what_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"vocab_size \(0\)"):
        BigramBaseline(0)
    with pytest.raises(ValueError, match=r"strength \(0\)"):
        BigramBaseline(3, 0)
    with pytest.raises(ValueError, match="none of the 2 ids"):
        BigramBaseline(3).fit(np.array([0, 1]), np.array([0, 2]), np.zeros(2, bool))


# --------------------------------------------------------------------------------------------------------- runs


def test_the_loss_is_words_plus_pairs() -> None:
    data, encoder = data_of(), encoder_of().double()
    batch = next(iter(data.train_dataloader()))
    batch.next_sentence_label[2:4] = -1
    module = MaskedLanguageModeling(encoder, nsp_weight=0.3)
    words, pairs = module.losses(batch)
    hidden = encoder(batch.tokens, batch.types, attention_mask=batch.attention_mask)
    logits = encoder.mlm_logits(hidden).log_softmax(-1)
    want = -logits.gather(-1, batch.labels[..., None])[..., 0][batch.loss_mask].sum()
    torch.testing.assert_close(words.sum(), want)
    assert len(words) == int(batch.loss_mask.sum())
    known = batch.next_sentence_label >= 0
    assert 0 < known.sum() < len(known)
    told = encoder.nsp_logits(hidden)[known].log_softmax(-1)
    torch.testing.assert_close(pairs, F.nll_loss(told, batch.next_sentence_label[known], reduction="none"))
    loss = module.loss(batch)
    row = torch.zeros(len(known), dtype=torch.float64)
    row[known] = pairs
    beside = row[:, None].expand(batch.loss_mask.shape)[batch.loss_mask]  # each hidden token's pair
    torch.testing.assert_close(loss.sum / loss.count, (words + 0.3 * beside).mean())
    alone = next(iter(data_of(nsp=False).train_dataloader()))
    only, none = module.losses(alone)
    assert len(none) == 0
    torch.testing.assert_close(module.loss(alone).sum, only.sum())
    headless = MaskedLanguageModeling(encoder_of(nsp_head=False).double(), nsp_weight=0.3)
    torch.testing.assert_close(headless.loss(batch).sum, headless.losses(batch)[0].sum())


def test_without_pairs_every_weight_still_has_a_gradient() -> None:
    """Of several processes one may have no pairs in its batch; the others wait for the head's gradient all the same."""
    module = MaskedLanguageModeling(encoder_of())
    batch = next(iter(data_of().train_dataloader()))
    alone = dataclasses.replace(batch, next_sentence_label=torch.full_like(batch.next_sentence_label, -1))
    loss = module.loss(alone)
    assert torch.equal(loss.sum, module.losses(alone)[0].sum())
    loss.sum.backward()
    assert all(p.grad is not None for p in module.parameters())
    assert module.encoder.nsp_proj is not None
    assert not module.encoder.nsp_proj.weight.grad.any()  # type: ignore[union-attr]


def test_padding_changes_no_loss() -> None:
    data, encoder = data_of(), encoder_of().double()
    module = MaskedLanguageModeling(encoder)
    batch = next(iter(data.val_dataloader()[0]))
    whole, pairs = module.losses(batch)
    parts = []
    for b in range(len(batch.tokens)):
        end = int(batch.attention_mask[b].sum())
        cut = {
            name: getattr(batch, name)[b : b + 1, :end]
            for name in ("tokens", "labels", "loss_mask", "words", "types", "attention_mask")
        }
        parts.append(module.losses(MaskedBatch(**cut, next_sentence_label=batch.next_sentence_label[b : b + 1])))
    torch.testing.assert_close(torch.cat([one for one, _ in parts]), whole)
    torch.testing.assert_close(torch.cat([two for _, two in parts]), pairs)


def trainer(folder: Path, **arguments: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        **arguments,
    )


def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(tmp_path: Path) -> None:
    """Words and pairs: eight steps of one batch of 16 rows, of 4 of 4 and of 16 single rows."""

    def trained(batch_size: int, accumulate: int) -> dict[str, torch.Tensor]:
        module = MaskedLanguageModeling(encoder_of(), optim=OptimConfig(lr=0.01, warmup_steps=0))
        run = trainer(
            tmp_path,
            precision="64-true",
            max_steps=8,
            accumulate_grad_batches=accumulate,
            limit_val_batches=0,
            use_distributed_sampler=False,
        )
        run.fit(module, datamodule=data_of(batch_size=batch_size))
        return {name: p.detach() for name, p in module.named_parameters()}

    one = trained(16, 1)
    for batch_size, accumulate in ((4, 4), (1, 16)):
        other = trained(batch_size, accumulate)
        assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-12
    start = {f"encoder.{name}": p.detach() for name, p in encoder_of().named_parameters()}
    assert max(float((one[name] - start[name]).abs().max()) for name in one) > 1e-2


def test_a_run_learns_and_leaves_model_scores_and_filled_texts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = data_of()
    module = MaskedLanguageModeling(encoder_of(), optim=OptimConfig(lr=1e-2, warmup_steps=20))
    baseline = fit_bigrams(data)
    before = score_masked(module.encoder.eval(), data, "val", baseline)
    module.train()
    fit = trainer(tmp_path, max_steps=250, max_epochs=99, check_val_every_n_epoch=5)
    fit.fit(module, datamodule=data)
    assert "pairs" in module.describe("val", fit.callback_metrics)
    _, other = data.rows("train").seconds(0)
    said = f"pairs of texts: {(other == 0).sum()} of one group, {(other == 1).sum()} not"
    assert f"train: {len(other)} rows of at most 40 tokens, {said}" in capsys.readouterr().out
    lines = module.sample(0)
    assert "[" in lines[0]
    assert module.sample(1) != lines
    module.finish(Run(tmp_path, 1.0, torch.device("cpu")))
    score = json.loads((tmp_path / "metrics.json").read_text("utf-8"))["scores"]["val"]
    assert score["loss"] < before.loss - 1
    assert score["words"] > max(before.words, score["unigram_words"]) + 0.05
    assert (score["bigram_tokens"], score["unigram_tokens"]) == (before.bigram_tokens, before.unigram_tokens)
    assert score["bigram_tokens"] > score["unigram_tokens"]
    assert score["hidden_words"] <= score["hidden_tokens"]
    out = capsys.readouterr().out
    assert f"hidden words right {score['words']:.1%}" in out
    saved, tokenizer = (TextEncoder.from_pretrained(tmp_path / "model"), Tokenizer.from_pretrained(tmp_path / "model"))
    batch = next(iter(data.val_dataloader()[0]))
    torch.testing.assert_close(saved(batch.tokens), module.encoder(batch.tokens), atol=0, rtol=0)
    assert Masking(tokenizer).mask_id == data.masking(training=True).mask_id


def test_scores_are_counted_by_token_and_word() -> None:
    """A model that always says one token, set against counting by hand."""
    data, encoder = data_of(), encoder_of().eval()
    assert encoder.mlm_proj is not None
    with torch.no_grad():
        always = int(data.rows("val").ids[0][0])
        encoder.mlm_proj.bias[always] = 1e4
        assert encoder.nsp_proj is not None
        encoder.nsp_proj.bias[1] = 1e4
    encoder.train()
    score = score_masked(encoder, data, "val", fit_bigrams(data))
    assert score == score_masked(encoder.eval(), data, "val", fit_bigrams(data))
    batches = list(data.val_dataloader()[0])
    labels = torch.cat([batch.labels[batch.loss_mask] for batch in batches])
    assert score.tokens == pytest.approx(float((labels == always).float().mean()))
    hits = []
    for batch in batches:
        for b in range(len(batch.tokens)):
            for word in batch.words[b][batch.loss_mask[b]].unique():
                mine = batch.words[b] == word
                hits.append(bool((batch.labels[b][mine] == always).all()))
    assert score.words == pytest.approx(np.mean(hits))
    assert score.hidden_words == len(hits)
    known = torch.cat([batch.next_sentence_label[batch.next_sentence_label >= 0] for batch in batches])
    assert score.nsp_accuracy == pytest.approx(float(known.float().mean()))
    assert math.isfinite(score.loss)


def test_filled_texts_show_the_truth_behind_a_colon() -> None:
    data, encoder = data_of(), encoder_of(dropout=0.5).train()
    batch = next(iter(data.val_dataloader()[0]))
    lines = fill_in(encoder, data.tokenizer, batch)
    assert all(part.training for part in encoder.modules())
    assert len(lines) == len(batch.tokens)
    for line, row, loss_mask, words in zip(lines, batch.labels, batch.loss_mask, batch.words, strict=True):
        assert line.count("[") == len(words[loss_mask].unique())
        plain = data.tokenizer.decode(row[words >= 0].tolist())
        kept = [word for word in plain.split() if word in line]
        assert kept
    assert any(" / " in line for line in lines)
    assert fill_in(encoder.eval(), data.tokenizer, batch, rows=[2]) == lines[2:3]


def test_a_file_is_the_data_of_a_recipe(tmp_path: Path) -> None:
    rows = [{"image": f"{i}.jpg", "captions": [f"a thing {i}", f"the {i}"]} for i in range(60)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    data = MaskedTextData(str(tmp_path / "t.jsonl"), vocab_size=300, batch_size=4)
    batch = next(iter(data.train_dataloader()))
    assert batch.tokens.shape[0] == 4
    assert (batch.next_sentence_label >= 0).all()
    assert torch.equal(batch.to("cpu").labels, batch.labels)


def test_errors_name_the_numbers(tmp_path: Path) -> None:
    def fit(encoder: TextEncoder, **arguments: Any) -> None:
        trainer(tmp_path, max_steps=1).fit(MaskedLanguageModeling(encoder), datamodule=data_of(**arguments))

    with pytest.raises(ValueError, match="mlm_head: true"):
        fit(encoder_of(mlm_head=False))
    with pytest.raises(ValueError, match="nsp_head: true"):
        fit(encoder_of(nsp_head=False))
    with pytest.raises(ValueError, match="the encoder has 1"):
        fit(encoder_of(num_types=1))
    with pytest.raises(ValueError, match=r"max_len \(40\) is more than the 30"):
        fit(encoder_of(max_len=30))
    with pytest.raises(ValueError, match=r"scores 270; .*data.vocab_size to 270"):
        fit(TextEncoder(270, 24, 1, 3, max_len=40, mlm_head=True, nsp_head=True))
    with pytest.raises(ValueError, match=r"nsp_weight \(-1\)"):
        MaskedLanguageModeling(encoder_of(), nsp_weight=-1)
    with pytest.raises(ValueError, match=r"batch_size \(0\)"):
        data_of(batch_size=0)
    with pytest.raises(ValueError, match=r"list of splits: \[val\]"):
        data_of(splits=Splits(val="val"))
