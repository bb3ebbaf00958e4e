import dataclasses
import logging
from types import SimpleNamespace

import lightning
import numpy as np
import pytest
import torch
from torch import nn

from mmtransformer.data import CaptionData
from mmtransformer.data.loading.dataset import CaptionDataset
from mmtransformer.data.loading.module import LoaderConfig, Splits
from mmtransformer.data.loading.rows import CaptionRows, names_a_side
from mmtransformer.data.loading.sampler import SampleIndex
from mmtransformer.data.loading.source import Caption
from mmtransformer.images import Augment, ImageError
from mmtransformer.text.tokenizer import Tokenizer
from support.sources import TRANSFORM, FakePairs, FakeSource, batches_of, make, same, share_of_padding, tokenizer

# ------------------------------------------------------------------------------------------------------ rows


def test_a_row_is_prompt_caption_and_eos():
    data = make(captions_per_image=3)
    batch = batches_of(data)[0]
    tok = data.tokenizer
    assert batch.pixels.shape == (7, 1, 3, 11, 13)
    assert batch.tokens.shape[0] == 21
    for i in range(7):
        truth = {text for text, _ in batch.references[i]}
        assert {tok.decode(row.tolist()) for row in batch.tokens[3 * i : 3 * i + 3]} == truth
        assert batch.references[i] == tuple(
            (c.text, c.language) for c in FakePairs(53).captions(int(batch.names[i][1:-4]))
        )
        expected = TRANSFORM(FakePairs(53).image(int(batch.names[i][1:-4])))
        assert torch.equal(batch.pixels[i, 0], expected)
    for tokens, attention_mask, loss_mask in zip(batch.tokens, batch.attention_mask, batch.loss_mask, strict=True):
        length = int(attention_mask.sum())
        assert attention_mask.tolist() == [True] * length + [False] * (len(attention_mask) - length)
        assert tokens[:2].tolist() == tok.prompt("en")
        assert loss_mask.tolist() == [False, False] + [True] * (length - 2) + [False] * (len(attention_mask) - length)
        assert tokens[length - 1] == tok.eos_id
        assert (tokens[length:] == tok.pad_id).all()
    assert batch.attention_mask.any(0).all(), "no column is all padding"


def test_a_cut_caption_does_not_teach_that_it_ends(caplog):
    with caplog.at_level(logging.WARNING):
        data = make(max_len=9)
    assert data.rows("train").cut > 0
    longest = max(len(tokenizer().encode(c.text)) for i in range(53) for c in FakePairs(53).captions(i)) + 3
    cut = sum(len(tokenizer().encode(c.text)) > 6 for i in range(53) for c in FakePairs(53).captions(i))
    assert f"train: {cut} of 159 captions are longer than max_len (9 tokens; the longest has {longest})" in caplog.text
    rows = data.rows("train")
    for i, caption in enumerate(c for captions in rows.captions for c in captions):
        row = rows.row(i).tokens
        whole = [*tokenizer().prompt("en"), *tokenizer().encode(caption.text), tokenizer().eos_id]
        assert row.tolist() == whole[:9]
        assert (tokenizer().eos_id in row) == (len(whole) <= 9)


def test_captions_take_turns():
    rows = CaptionRows(FakePairs(31, count=lambda i: 5), tokenizer(), 64)
    index = np.arange(31)
    seen = np.concatenate([rows.choose(3, epoch, index, 1) for epoch in range(5)], axis=1)
    assert all(sorted(row) == list(range(5 * i, 5 * i + 5)) for i, row in enumerate(seen))
    assert len({tuple(row - row.min()) for row in seen}) > 10, "pictures do not go in step"
    later = np.concatenate([rows.choose(3, epoch, index, 1) for epoch in range(5, 10)], axis=1)
    assert (later != seen).any(1).sum() > 20, "the next turn is another order"
    again = rows.choose(3, 2, np.array([7, 3]), 1)
    np.testing.assert_array_equal(again[:, 0], seen[[7, 3], 2])
    two = [rows.choose(3, epoch, index, 2) for epoch in range(2)]
    assert all(len({*a, *b}) == 4 for a, b in zip(*two, strict=True))
    assert not np.array_equal(rows.choose(3, 0, index, 2), rows.choose(4, 0, index, 2))


def test_few_captions_are_repeated_evenly():
    rows = CaptionRows(FakePairs(31, count=lambda i: 1 + i % 3), tokenizer(), 64)
    chosen = rows.choose(3, 4, np.arange(31), 5)
    for i, row in enumerate(chosen):
        numbers, counts = np.unique(row, return_counts=True)
        assert len(numbers) == 1 + i % 3
        assert counts.max() - counts.min() <= 1
        assert set(numbers) == set(range(rows.first[i], rows.first[i + 1]))


def test_lengths_are_those_of_the_batch():
    data = make(captions_per_image=2)
    lengths = data.rows("train").lengths(0, 3, 2)
    for batch in batches_of(data, 3):
        places = [int(name[1:-4]) for name in batch.names]
        assert batch.attention_mask.sum(1).view(-1, 2).amax(1).tolist() == lengths[places].tolist()


def test_grouping_halves_the_padding():
    data = make(FakeSource(train=FakePairs(211), val=FakePairs(3)))
    loader = data.train_dataloader()
    lengths = data.rows("train").lengths(0, 0, 1)
    grouped = [[pick.index for pick in batch] for batch in loader.place]
    loader.place.lengths = None
    plain = [[pick.index for pick in batch] for batch in loader.place]
    assert share_of_padding(lengths, grouped) < 0.5 * share_of_padding(lengths, plain)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a star left of a circle", True), ("the RIGHT hand", True), ("a rightmost star", True),
        ("별이 원 왼쪽에 있다", True), ("오른손을 든 사람", True), ("좌측의 나무", True), ("화면 우 상단", True),
        ("a bright, upright bottle", False), ("a birthright", False),
        ("우산을 쓴 여우", False), ("매우 큰 좌석", False), ("강아지", False),
    ],
)  # fmt: skip
def test_names_a_side(text, expected):
    assert names_a_side(text) == expected


def test_impossible_captions_are_refused():
    with pytest.raises(ValueError, match=r"'p2.jpg' has no caption"):
        CaptionRows(FakePairs(5, count=lambda i: int(i != 2)), tokenizer(), 64)
    with pytest.raises(ValueError, match=r"2 languages \(en, ko\)"):
        CaptionRows(FakePairs(5, ("en", "ko")), Tokenizer.train(["a b"], 300), 64)
    with pytest.raises(ValueError, match="'de' is unknown"):
        CaptionRows(FakePairs(5, ("de",)), tokenizer(), 64)
    with pytest.raises(ValueError, match=r"max_len \(3\)"):
        CaptionRows(FakePairs(5), tokenizer(), 3)
    one = CaptionRows(FakePairs(5), Tokenizer.train(["a b"], 300), 64)
    assert one.prompt.tolist() == [1] * 15, "one language needs no tag"


# --------------------------------------------------------------------------------------------------- dataset


def test_augmentation_is_a_function_of_seed_epoch_and_index():
    augment = Augment(scale=(0.5, 0.9), flip=True, jitter=0.3)
    runs = []
    for workers in (0, 1, 2):
        torch.manual_seed(workers)
        runs.append(make(augment=augment, loader=LoaderConfig(workers, 5)).train_dataloader())
    for epoch in (0, 1):
        for loader in runs:
            loader.place.set_epoch(epoch)
        for batches in zip(*runs, strict=True):
            assert same(batches[0], batches[1])
            assert same(batches[0], batches[2])
    first, other = (
        make(augment=augment).dataset("train", training=True),
        make(augment=augment, loader=LoaderConfig(seed=1)),
    )
    a, b = first[SampleIndex(0, 3)].pixels, first[SampleIndex(1, 3)].pixels
    assert not torch.equal(a, b)
    assert not torch.equal(a, other.dataset("train", training=True)[SampleIndex(0, 3)].pixels)
    assert torch.equal(a, first[SampleIndex(0, 3)].pixels)


def test_a_image_with_sides_in_its_captions_is_never_mirrored():
    class Sided(FakePairs):
        def captions(self, i):
            return [Caption("a star left of a dog" if i % 2 else "a star above a dog", "en")]

    pairs = Sided(40)
    data = make(FakeSource(train=pairs, val=pairs), augment=Augment(scale=(1.0, 1.0), flip=True))
    dataset = data.dataset("train", training=True)
    mirrored = [not torch.equal(dataset[SampleIndex(2, i)].pixels[0], TRANSFORM(pairs.image(i))) for i in range(40)]
    assert not any(mirrored[1::2])
    assert 4 < sum(mirrored[::2]) < 16
    i = mirrored.index(True)
    torch.testing.assert_close(
        dataset[SampleIndex(2, i)].pixels[0].flip(-1), TRANSFORM(pairs.image(i)), atol=1e-5, rtol=0
    )


def test_bad_images_are_replaced_counted_and_named(tmp_path):
    source = FakeSource(train=FakePairs(211, bad=[4, 5]), val=FakePairs(11, bad=[3]))
    data = make(source, report_dir=str(tmp_path), loader=LoaderConfig(num_workers=2))
    batches = batches_of(data)
    names = [name for batch in batches for name in batch.names]
    assert len(names) == 211
    assert names.count("p6.jpg") == 3
    assert not {"p4.jpg", "p5.jpg"} & set(names)
    for batch in batches:  # the replacement sample brings its own captions
        for i, name in enumerate(batch.names):
            assert name[1:-4] in data.tokenizer.decode(batch.tokens[i].tolist()).split()
    report = (tmp_path / "bad_images_train.jsonl").read_text()
    assert sorted(line.split('"')[3] for line in report.splitlines()) == ["p4.jpg", "p5.jpg"]
    (val,) = data.val_dataloader()
    batches = list(val)
    assert sum(len(batch.names) for batch in batches) == 11
    is_real = [name for batch in batches for name, t in zip(batch.names, batch.loss_mask, strict=True) if t.any()]
    assert is_real == [f"p{i}.jpg" for i in range(11) if i != 3], "a replacement sample does not count in evaluation"


def test_too_many_bad_images_stop_the_run(tmp_path):
    data = make(FakeSource(train=FakePairs(53, bad=[4, 9]), val=FakePairs(3)), report_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"2 of 53 pictures can't be read"):
        batches_of(data)


# ------------------------------------------------------------------------------------------------ evaluation


def test_evaluation_has_every_language_and_is_always_the_same():
    count = lambda i: 2 if i != 4 else 1  # noqa: E731
    val = FakePairs(11, ("en", "ko"), count=count)
    data = make(
        FakeSource(train=FakePairs(23, ("en", "ko")), val=val, more=FakePairs(3)), splits=Splits(val=["val", "more"])
    )
    first, second = data.val_dataloader()
    assert (len(first), len(second)) == (2, 1)
    for epoch in range(2):
        first.place.set_epoch(epoch)
        names, texts = [], []
        for batch in first:
            assert batch.tokens.shape[0] == 2 * len(batch.names)
            names += batch.names
            texts += [data.tokenizer.decode(row.tolist()) for row in batch.tokens]
            assert batch.loss_mask.any(1).all()
        assert names == [f"p{i}.jpg" for i in range(11)]
        expected = [[c.text for c in val.captions(i)] for i in range(11)]
        assert texts == [text for c in expected for text in (c[0], c[len(c) // 2])]


def test_evaluation_counts_each_caption_once():
    data = make(FakeSource(train=FakePairs(23), val=FakePairs(7, count=lambda i: 1 + i % 3)), captions_per_image=5)
    (batch,) = data.val_dataloader()[0]
    assert batch.loss_mask.any(1).view(7, 5).sum(1).tolist() == [1 + i % 3 for i in range(7)]


def test_prompts():
    data = make(FakeSource(train=FakePairs(23, ("en", "ko")), val=FakePairs(5, ("en", "ko"))))
    (batch,) = data.val_dataloader()[0]
    prompts = data.prompts(batch, "ko")
    assert prompts.tokens.tolist() == [data.tokenizer.prompt("ko")] * 5
    assert prompts.attention_mask.all()
    assert not prompts.loss_mask.any()
    assert prompts.pixels is batch.pixels
    assert prompts.names == batch.names
    assert data.prompts(batch).tokens.tolist() == [[data.tokenizer.bos_id]] * 5
    with pytest.raises(ValueError, match="'fr' is unknown"):
        data.prompts(batch, "fr")


# ----------------------------------------------------------------------------------------------- data module


def test_a_tokenizer_is_trained_on_the_training_captions(tmp_path):
    data = make(tokenizer=None, vocab_size=300)
    assert data.tokenizer.vocab_size <= 300
    assert data.tokenizer.languages == ("en",)
    assert data.tokenizer is data.tokenizer
    data.tokenizer.save_pretrained(tmp_path)
    loaded = make(tokenizer=str(tmp_path))
    assert loaded.tokenizer.encode("a red star") == data.tokenizer.encode("a red star")
    loaded.load_state_dict(data.state_dict())
    with pytest.raises(ValueError, match=r"tokenizer is not that of the run .* vocab_size \(4096\)"):
        make().load_state_dict(data.state_dict())


def test_processes_share_the_batches_and_lightnings_sampler_is_refused():
    def loaders(rank, replaced=False):
        data = make()
        data.trainer = SimpleNamespace(
            global_rank=rank, world_size=2, default_root_dir=".",
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
            _accelerator_connector=SimpleNamespace(use_distributed_sampler=replaced),
        )  # fmt: skip
        return data.train_dataloader(), *data.val_dataloader()

    for zero, one in zip(loaders(0), loaders(1), strict=True):
        assert len(zero) == len(one)
        names = [name for loader in (zero, one) for batch in loader for name in batch.names]
        assert len(names) == len(set(names)) in (53, 11)
    with pytest.raises(ValueError, match=r"set use_distributed_sampler to false: .* 2 processes"):
        loaders(0, replaced=True)


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match=r"batch_size \(0\)"):
        make(batch_size=0)
    with pytest.raises(ValueError, match=r"splits.val must be a list of splits: \[val\]"):
        make(splits=Splits(val="val"))
    with pytest.raises(ValueError, match="no split dev"):
        make(splits=Splits(val=["dev"]))


class Module(lightning.LightningModule):
    """Notes what it is given; its one weight makes it a model."""

    def __init__(self, seen):
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.ones(3)), seen

    def training_step(self, batch, batch_idx):
        self.seen.append(
            (self.current_epoch, batch_idx, batch.names, batch.pixels.sum().item(), batch.tokens.sum().item())
        )
        return self.weight.sum() * batch.pixels.mean()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.seen.append(("val", batch.names))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(folder, workers=0, ckpt=None, save_at=None, epochs=3, **options):
    seen = []

    class Save(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step in (save_at or ()):
                trainer.save_checkpoint(folder / f"{trainer.global_step}.ckpt")

    trainer = lightning.Trainer(
        **{"max_epochs": epochs, "num_sanity_val_steps": 0} | options,
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[Save()], default_root_dir=folder,
    )  # fmt: skip
    data = make(
        FakeSource(train=FakePairs(31), val=FakePairs(5, seed=1)),
        loader=LoaderConfig(workers, 3), augment=Augment(scale=(0.5, 0.9)),
    )  # fmt: skip
    trainer.fit(Module(seen), data, ckpt_path=ckpt)
    return seen


@pytest.fixture
def quiet():
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", ".*treespec.*")
        yield


@pytest.mark.usefixtures("quiet")
def test_lightning_runs_every_epoch_once_and_resumes_with_the_next_batch(tmp_path):
    stops = (1, 4, 5, 7, 10, 14)
    whole = fit(tmp_path, save_at=stops)
    assert len(whole) == 3 * (5 + 1)
    epochs = [[step for step in whole if step[0] == epoch] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(name for step in epoch for name in step[2]) == sorted(f"p{i}.jpg" for i in range(31))
    assert [step[2] for step in epochs[0]] != [step[2] for step in epochs[1]]
    training = [step for step in whole if step[0] != "val"]
    for stop in stops:
        resumed = [
            step for step in fit(tmp_path, ckpt=tmp_path / f"{stop}.ckpt", workers=2 * (stop == 7)) if step[0] != "val"
        ]
        assert resumed == training[stop:], stop


@pytest.mark.usefixtures("quiet")
def test_lightning_validates_on_everything_every_time(tmp_path):
    seen = fit(tmp_path, val_check_interval=2, limit_train_batches=4, epochs=2, limit_val_batches=1)
    assert [step[1] for step in seen if step[0] == "val"] == [tuple(f"p{i}.jpg" for i in range(5))] * 4
    assert [step[:2] for step in seen if step[0] != "val"] == [(e, i) for e in range(2) for i in range(4)]


def test_the_dataset_can_be_used_alone():
    pairs = FakePairs(5)
    dataset = CaptionDataset(pairs, CaptionRows(pairs, tokenizer(), 64), TRANSFORM)
    sample = dataset[SampleIndex(0, 2)]
    assert sample.name == "p2.jpg"
    assert sample.pixels.shape == (1, 3, 11, 13)
    bad = CaptionDataset(FakePairs(5, bad=[2]), dataset.rows, TRANSFORM)
    with pytest.raises(ImageError, match=r"p2\.jpg: cut off"):
        bad[SampleIndex(0, 2)]
    assert dataclasses.is_dataclass(TRANSFORM)


def test_a_recipe_can_name_it(tmp_path):
    from jsonargparse import ArgumentParser

    tokenizer().save_pretrained(tmp_path)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(lightning.LightningDataModule, "data")
    recipe = f"""
      data:
        class_path: mmtransformer.data.CaptionData
        init_args:
          source: {{class_path: mmtransformer.data.Scenes, init_args: {{train_size: 7, val_size: 3}}}}
          transform: {{image_size: [16, 24]}}
          augment: {{scale: [0.7, 1.0]}}
          tokenizer: {tmp_path}
          splits:
            val: [val, compositional]
          batch_size: 5
    """
    data = parser.instantiate(parser.parse_string(recipe)).data
    assert isinstance(data, CaptionData)
    data.setup("fit")
    first, _ = data.train_dataloader()
    assert first.pixels.shape == (5, 1, 3, 16, 24)
    assert len(data.val_dataloader()) == 2
    assert data.augment == Augment(scale=(0.7, 1.0))
    assert data.tokenizer.languages == ("en", "ko")
