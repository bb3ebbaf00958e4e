"""Texts: where they come from, rows without padding, and the batches of a run."""

import gzip
import json
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtransformer import Tokenizer
from mmtransformer.data.files.read_options import TextReadOptions
from mmtransformer.data.loading.module import LoaderConfig, Splits
from mmtransformer.data.loading.source import Caption
from mmtransformer.data.scenes.scenes import Scenes
from mmtransformer.data.text_only.text_rows import TextRows, fill_rows
from mmtransformer.data.text_only.text_source import CaptionTexts, TextFiles
from mmtransformer.data.text_only.texts import TextBatch, TextData

TEXTS = [
    Caption(text, language)
    for i in range(83)
    for text, language in (
        (f"a red circle and {'very ' * (i % 7)}small {i % 5} squares", "en"),
        (f"작은 {'아주 ' * (i % 4)}빨간 원 {i % 3}개", "ko"),
    )
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train((text.text for text in TEXTS), 340, ("en", "ko"))


def rows_of(tokenizer: Tokenizer, max_len: int = 31, row_len: int = 67, seed: int = 3) -> TextRows:
    return TextRows(TEXTS, tokenizer, max_len=max_len, row_len=row_len, seed=seed)


def ids(tokenizer: Tokenizer, text: Caption) -> list[int]:
    return [*tokenizer.prompt(text.language), *tokenizer.encode(text.text), tokenizer.eos_id]


# --------------------------------------------------------------------------------------------------- full rows


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 23), min_size=1, max_size=300), st.integers(23, 80), st.integers(0, 9))
def test_every_text_is_in_one_row_and_no_row_is_too_long(lengths: list[int], row_len: int, seed: int) -> None:
    rows = fill_rows(np.array(lengths), row_len, seed)
    assert Counter(length for row in rows for length in row) == Counter(lengths)
    assert all(0 < sum(row) <= row_len for row in rows)
    assert rows == fill_rows(np.array(lengths), row_len, seed)


@pytest.mark.parametrize("row_len", [64, 128, 256])
def test_rows_of_captions_are_full_but_for_the_last(row_len: int) -> None:
    """Lengths as captions have them: 14 tokens, give or take 4, and now and then a long one."""
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.normal(14, 4, 9973).round() + 30 * (draw.random(9973) < 0.01), 5, 60)
    rows = fill_rows(lengths.astype(int), row_len)
    assert len(rows) <= -(-int(lengths.sum()) // row_len) + 1
    spare = [i for i, row in enumerate(rows) if sum(row) < row_len]
    assert min(spare) >= 0.99 * len(rows) - 2


def test_texts_that_do_not_fit_together_are_packed_as_well_as_they_can_be() -> None:
    draw = np.random.default_rng(0)
    lengths = np.minimum(draw.lognormal(5, 1, 1009).astype(int) + 2, 512)
    rows = fill_rows(lengths, 512)
    assert lengths.sum() / (len(rows) * 512) > 0.98
    assert len(fill_rows(np.full(7, 40), 64)) == 7


def test_an_epoch_has_every_part_once_in_a_place_of_its_length(tokenizer: Tokenizer) -> None:
    rows = rows_of(tokenizer)
    first, second = rows.parts(0), rows.parts(1)
    assert sorted(first) == sorted(second) == list(range(len(rows.lengths)))
    np.testing.assert_array_equal(rows.lengths[first], rows.lengths[second])
    assert (first != second).mean() > 0.5
    np.testing.assert_array_equal(rows_of(tokenizer).parts(1), second)
    assert (rows_of(tokenizer, seed=4).parts(1) != second).any()
    assert rows.padding == pytest.approx(1 - rows.lengths.sum() / (len(rows) * 67))
    assert rows.padding < 0.01


@pytest.mark.parametrize("max_len", [6, 31])
def test_rows_hold_prompt_text_and_end_and_predict_every_token_once(tokenizer: Tokenizer, max_len: int) -> None:
    rows = rows_of(tokenizer, max_len)
    want = [ids(tokenizer, text) for text in TEXTS]
    assert rows.divided == sum(len(text) > max_len for text in want)
    assert (rows.divided > 0) == (max_len == 6)
    assert rows.longest == max(map(len, want))
    found: dict[int, list[int]] = {i: [] for i in range(len(TEXTS))}
    predicted = 0
    for i in np.argsort([rows.row(2, i).parts.min() for i in range(len(rows))]):
        row = rows.row(2, int(i))
        assert len(row.tokens) == len(row.document_ids) == len(row.loss_mask) <= 67
        predicted += int(row.loss_mask.sum())
        for at, part in enumerate(row.parts):
            tokens, loss_mask = row.tokens[row.document_ids == at], row.loss_mask[row.document_ids == at]
            assert 2 <= len(tokens) <= max_len
            text = int(rows.text_of[part])
            if rows.first[part]:
                assert loss_mask.tolist() == [False, False, *[True] * (len(tokens) - 2)]
                assert tokens.tolist() == want[text][: len(tokens)]
            else:
                assert loss_mask.tolist() == [False, *[True] * (len(tokens) - 1)]
            found[text] += tokens[loss_mask].tolist()
    assert predicted == sum(len(text) - 2 for text in want) == rows.loss_mask.sum()
    for text, tokens in found.items():
        assert Counter(tokens) == Counter(want[text][2:])


def test_the_parts_of_a_long_text_follow_each_other(tokenizer: Tokenizer) -> None:
    text = Caption("a red circle " * 9, "en")
    rows = TextRows([text], tokenizer, max_len=7, row_len=7)
    parts = {}
    for i in range(len(rows)):
        row = rows.row(0, i)
        parts |= {int(part): row.tokens[row.document_ids == at].tolist() for at, part in enumerate(row.parts)}
    whole = parts[0]
    for part in range(1, len(parts)):
        assert parts[part][0] == whole[-1]
        whole = whole + parts[part][1:]
    assert whole == ids(tokenizer, text)
    assert rows.bytes.tolist() == [len(text.text)]
    assert rows.words.tolist() == [27]


def test_rows_refuse_what_cannot_be(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"no texts \(0\)"):
        TextRows([], tokenizer, max_len=8, row_len=8)
    with pytest.raises(ValueError, match=r"max_len \(3\) must be at least 4"):
        TextRows(TEXTS, tokenizer, max_len=3, row_len=8)
    with pytest.raises(ValueError, match=r"row_len \(8\).* max_len \(9\)"):
        TextRows(TEXTS, tokenizer, max_len=9, row_len=8)
    plain = Tokenizer.train((text.text for text in TEXTS), 300)
    with pytest.raises(ValueError, match=r"2 languages \(en, ko\).*no language tags"):
        TextRows(TEXTS, plain, max_len=9, row_len=9)


# -------------------------------------------------------------------------------------------------------- data


class Lists:
    """A source made of lists."""

    languages: tuple[str, ...] = ("en", "ko")

    def splits(self) -> tuple[str, ...]:
        return ("train", "val")

    def split(self, name: str) -> list[Caption]:
        return TEXTS[:120] if name == "train" else TEXTS[120:]


def data_of(batch_size: int = 3, **arguments: object) -> TextData:
    sizes = {"vocab_size": 340, "max_len": 31, "row_len": 67}
    return TextData(Lists(), batch_size=batch_size, **(sizes | arguments))  # type: ignore[arg-type]


def flat(batches: list[TextBatch]) -> list[tuple[list[int], list[int], list[bool]]]:
    return [
        (tokens.tolist(), document_ids.tolist(), loss_mask.tolist())
        for batch in batches
        for tokens, document_ids, loss_mask in zip(batch.tokens, batch.document_ids, batch.loss_mask, strict=True)
    ]


def test_a_batch_is_full_rows_and_padding_sees_nothing() -> None:
    data = data_of()
    rows = data.rows("train")
    batches = list(data.train_dataloader())
    assert sum(batch.tokens.shape[0] for batch in batches) == len(rows)
    places = sum(batch.tokens.numel() for batch in batches)
    assert places - rows.lengths.sum() < 67  # less than one row of padding in the epoch
    for batch in batches:
        padding = batch.document_ids < 0
        assert not batch.loss_mask[padding].any()
        assert (batch.tokens[padding] == data.tokenizer.pad_id).all()
        for row in batch.document_ids:
            alone = row[row < 0]
            assert len(alone.unique()) == len(alone)
    names = [name for batch in batches for name in batch.names]
    assert sorted(names) == sorted(f"train {i}" for i in range(120))
    assert sum(int(batch.loss_mask.sum()) for batch in batches) == rows.loss_mask.sum()


def test_training_is_shuffled_by_seed_and_epoch_and_validation_is_not() -> None:
    data = data_of()
    loader = data.train_dataloader()
    first = flat(list(loader))
    loader.place.set_epoch(1)
    second = flat(list(loader))
    assert first != second
    again = data_of().train_dataloader()
    again.place.set_epoch(1)
    assert flat(list(again)) == second
    assert flat(list(data_of(loader=LoaderConfig(seed=1)).train_dataloader())) != first
    (val,) = data.val_dataloader()
    once = flat(list(val))
    val.place.set_epoch(1)
    assert flat(list(val)) == once


def test_workers_change_nothing() -> None:
    assert flat(list(data_of(loader=LoaderConfig(num_workers=2)).train_dataloader())) == flat(
        list(data_of().train_dataloader())
    )


def test_a_run_goes_on_where_it_was() -> None:
    whole = flat(list(data_of().train_dataloader()))
    loader = data_of().train_dataloader()
    begun = iter(loader)
    head = flat([next(begun), next(begun)])
    fresh = data_of().train_dataloader()
    fresh.load_state_dict(loader.state_dict())
    assert head + flat(list(fresh)) == whole


def test_a_run_does_not_go_on_with_other_rows_or_words() -> None:
    state = data_of().state_dict()
    data_of().load_state_dict(state)
    with pytest.raises(ValueError, match=r"max_len 31 and row_len 67, now they are 31 and 70"):
        data_of(row_len=70).load_state_dict(state)
    with pytest.raises(ValueError, match=r"vocab_size \(270\)"):
        data_of(vocab_size=270).load_state_dict(state)


def test_data_says_what_it_did(caplog: pytest.LogCaptureFixture) -> None:
    said = data_of(max_len=6).describe()
    rows = data_of(max_len=6).rows("train")
    assert f"train: 120 texts of {rows.lengths.sum():,} tokens in {len(rows)} rows of 67" in said
    assert f"divided, as they are longer than 6 tokens: {rows.divided} texts" in said
    assert f"train: {rows.divided} of 120 texts are longer than max_len (6 tokens" in caplog.text
    assert data_of(row_len=None).row_len == 31


def test_data_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"batch_size \(0\)"):
        data_of(0)
    with pytest.raises(ValueError, match=r"list of splits: \[val\]"):
        data_of(splits=Splits(val="val"))


def test_captions_of_any_source_are_texts() -> None:
    source = Scenes(image_size=32, train_size=5, val_size=2, compositional_size=1, phrasings=2)
    texts = CaptionTexts(source)
    assert texts.splits() == ("train", "val", "compositional")
    assert texts.languages == ("en", "ko")
    train = source.split("train")
    assert texts.split("train") == [caption for i in range(5) for caption in train.captions(i)]
    data = TextData(texts, vocab_size=400, splits=Splits(val=["val", "compositional"]))
    assert data.tokenizer.languages == ("en", "ko")
    assert [len(list(loader)) for loader in data.val_dataloader()] == [1, 1]


# ------------------------------------------------------------------------------------------------------- files


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def test_jsonl_with_splits_keeps_them_and_train_never_says_what_val_says(tmp_path: Path) -> None:
    path = write(
        tmp_path / "captions.jsonl",
        [
            {"image": "1.jpg", "captions": ["A dog runs .", "A brown dog ."], "split": "train"},
            {"image": "2.jpg", "captions": ["A cat .", "a DOG runs ."], "split": "val"},
            {"image": "3.jpg", "captions": ["A bird ."], "split": "test"},
            {"image": "4.jpg", "captions": ["A bird .", "A fish ."]},
        ],
    )
    files = TextFiles([str(path)])
    assert files.splits() == ("train", "val", "test")
    assert [t.text for t in files.split("train")] == ["A brown dog .", "A fish ."]
    assert [t.text for t in files.split("val")] == ["A cat .", "a DOG runs ."]
    assert files.repeated == 2
    assert files.languages == ()
    assert (
        files.describe() == "5 texts; splits train 2, val 2, test 1; no language named; "
        "2 left out of train, which val or test has word for word"
    )


def test_without_splits_the_captions_of_a_image_stay_together(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"photo_id": i, "captions": [f"number {i}", f"the {i}"]} for i in range(200)]
    path = write(tmp_path / "texts.jsonl", rows)
    files = TextFiles([str(path)], TextReadOptions(val_fraction=0.2))
    val = {text.text.split()[1] for text in files.split("val")}
    assert 20 < len(val) < 60
    assert len(files.split("val")) == 2 * len(val)
    assert not val & {text.text.split()[1] for text in files.split("train")}
    with zipfile.ZipFile(tmp_path / "texts.zip", "w") as archive:
        archive.write(path, "texts.jsonl")
        archive.writestr("README.md", "# What this is")
    packed = TextFiles([str(tmp_path / "texts.zip")], TextReadOptions(val_fraction=0.2))
    assert [packed.split(name) for name in packed.splits()] == [files.split(s) for s in files.splits()]
    assert TextFiles([str(path)], TextReadOptions(val_fraction=0.0)).splits() == ("train",)


def test_few_texts_fill_both_splits(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n", "utf-8")
    files = TextFiles([str(tmp_path / "a.txt")], TextReadOptions(val_fraction=0.001))
    assert [len(files.split(name)) for name in ("train", "val")] == [2, 1]
    most = TextFiles([str(tmp_path / "a.txt")], TextReadOptions(val_fraction=0.999))
    assert [len(most.split(name)) for name in ("train", "val")] == [1, 2]


@pytest.mark.parametrize(
    ("unit", "texts"),
    [
        ("line", ["Once upon", "a time .", "The end ."]),
        ("paragraph", ["Once upon\na time .", "The end ."]),
        ("file", ["Once upon\na time .\n\n\nThe end ."]),
    ],
)
def test_plain_text_by_line_paragraph_and_file(tmp_path: Path, unit: str, texts: list[str]) -> None:
    (tmp_path / "story.txt").write_text("Once up\0on  \na time .\n \n\nThe end .\n\n", "utf-8")
    (tmp_path / "picture.png").write_bytes(b"no text")
    files = TextFiles([str(tmp_path)], TextReadOptions(unit=unit, val_fraction=0))  # type: ignore[arg-type]
    found = [text.text for text in files.split("train")]
    assert [text.split() for text in found] == [text.split() for text in texts]
    assert ("\n" in found[0]) == (unit != "line")


def test_plain_text_may_be_compressed_and_the_error_names_a_key_that_there_is(tmp_path: Path) -> None:
    (tmp_path / "글.txt.gz").write_bytes(gzip.compress("빨간 별\n파란 원\n".encode()))
    source = TextFiles([str(tmp_path / "글.txt.gz")])
    assert {text.text for name in source.splits() for text in source.split(name)} == {"빨간 별", "파란 원"}
    table = tmp_path / "글.jsonl"
    table.write_text('{"본문": "빨간 별"}\n{"본문": "파란 원"}\n', "utf-8")
    with pytest.raises(ValueError, match=r"columns are: 본문\. Name it: --data\.read\.text_column \.\.\.$"):
        TextFiles([str(table)])
    assert len(TextFiles([str(table)], TextReadOptions(text_column="본문")).split("train")) == 1


def test_tables_and_coco(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('text,split\n"Hello, you",train\nBye,val\n', "utf-8")
    assert [t.text for t in TextFiles([str(tmp_path / "t.csv")]).split("train")] == ["Hello, you"]
    (tmp_path / "u.csv").write_text("said;other\nHello;1\nBye;2\n", "utf-8")
    two = TextFiles([str(tmp_path / "u.csv")], TextReadOptions(text_column="said", val_fraction=0))
    assert [t.text for t in two.split("train")] == ["Hello", "Bye"]
    coco = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(3)],
        "annotations": [{"image_id": i % 3, "caption": f"caption {i}"} for i in range(7)],
    }
    (tmp_path / "captions_val2017.json").write_text(json.dumps(coco), "utf-8")
    both = TextFiles(
        [str(tmp_path / "captions_val2017.json"), str(tmp_path / "t.csv")], TextReadOptions(val_fraction=0)
    )
    assert len(both.split("train")) == 7 + 1
    assert [t.text for t in both.split("val")] == ["Bye"]


def test_parquet_without_images(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["one", "둘"], "lang": ["en", "ko"]}), tmp_path / "t.parquet")
    files = TextFiles([str(tmp_path / "t.parquet")], TextReadOptions(val_fraction=0))
    assert files.split("train") == [Caption("one", "en"), Caption("둘", "ko")]


@pytest.mark.parametrize(
    ("lines", "language", "found"),
    [
        (["A dog", "A cat"], None, [None, None]),
        (["A dog", "개 한 마리"], None, ["en", "ko"]),
        (["A dog", "개 한 마리"], "de", ["de", "ko"]),
        (["개 한 마리", "고양이 KTX"], None, ["ko", "ko"]),
    ],
)
def test_languages_are_told_by_script(
    tmp_path: Path, lines: list[str], language: str | None, found: list[str | None]
) -> None:
    (tmp_path / "a.txt").write_text("\n".join(lines), "utf-8")
    files = TextFiles([str(tmp_path / "a.txt")], TextReadOptions(default_language=language, val_fraction=0))
    assert [text.language for text in files.split("train")] == found
    assert files.languages == tuple(sorted({code for code in found if code}))


def test_korean_typed_as_jamo_is_the_same_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\u1100\u1162\n", "utf-8")
    (tmp_path / "b.txt").write_text("\u1100\u1162\n \nb", "utf-8")
    assert TextFiles([str(tmp_path / "a.txt")], TextReadOptions(val_fraction=0)).split("train") == [Caption("개", "ko")]
    whole = TextFiles([str(tmp_path / "b.txt")], TextReadOptions(unit="paragraph", val_fraction=0))
    assert whole.split("train")[0].text == "개"


def test_files_refuse_what_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\n" * 9 + b"\xff\xfe bad\n" * 4)
    with pytest.raises(ValueError, match=r"4 of 13 rows.*30.8%"):
        TextFiles([str(tmp_path / "a.txt")])
    (tmp_path / "empty.txt").write_text("\n \n", "utf-8")
    with pytest.raises(ValueError, match=r"empty\.txt holds no text"):
        TextFiles([str(tmp_path / "empty.txt")])
    (tmp_path / "t.csv").write_text("a,b\n1,2\n", "utf-8")
    with pytest.raises(ValueError, match="looks like the text; its columns are: a, b"):
        TextFiles([str(tmp_path / "t.csv")])
    with pytest.raises(ValueError, match="does not exist"):
        TextFiles([str(tmp_path / "none.txt")])
    with pytest.raises(ValueError, match=r"\(0\)"):
        TextFiles([])
    with pytest.raises(ValueError, match="must be a list"):
        TextFiles("a.txt")
    with pytest.raises(ValueError, match='not "word"'):
        TextFiles(["a.txt"], TextReadOptions(unit="word"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"val_fraction \(1.0\)"):
        TextFiles(["a.txt"], TextReadOptions(val_fraction=1.0))
    (tmp_path / "b.txt").write_text("one\ntwo\n", "utf-8")
    with pytest.raises(ValueError, match="no split 'test'; they have: train, val"):
        TextFiles([str(tmp_path / "b.txt")]).split("test")


def test_a_file_is_the_data_of_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(f"line {i} of this" for i in range(50)), "utf-8")
    data = TextData(str(tmp_path / "a.txt"), vocab_size=300, max_len=16, row_len=33, batch_size=2)
    batch = next(iter(data.train_dataloader()))
    assert batch.tokens.shape == (2, 33)
    assert data.describe().startswith("50 texts; splits train ")
    assert batch.tokens.dtype == torch.long
    moved = batch.to("cpu")
    assert torch.equal(moved.tokens, batch.tokens)
