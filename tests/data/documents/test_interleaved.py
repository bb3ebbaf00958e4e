"""Interleaved documents: files, their faults, rows of ids, packing, batches, and a run that trains on them."""

import functools
import json
import logging
import pickle
import zipfile
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from mmtransformer import Flamingo, GatedBlockConfig, TextDecoder, VisionEncoderDecoder, ViT
from mmtransformer.data.documents.document_dataset import CollateDocuments, lay_out
from mmtransformer.data.documents.documents import (
    Document,
    Documents,
    DocumentsAsPairs,
    DocumentSource,
    ImagePairs,
    PairsAsDocuments,
    join_pieces,
)
from mmtransformer.data.documents.interleaved import InterleavedFiles
from mmtransformer.data.documents.packing import DocumentRows
from mmtransformer.data.interleaved_data import InterleavedData
from mmtransformer.data.loading.errors import TooManyErrors
from mmtransformer.data.loading.module import LoaderConfig, Splits
from mmtransformer.data.loading.sampler import SampleIndex
from mmtransformer.data.loading.source import Pairs, PairSource
from mmtransformer.data.mixture import DocumentMixture
from mmtransformer.data.scenes.scenes import Scenes
from mmtransformer.images import Augment, ImageError, ImageTransform
from mmtransformer.text.tokenizer import Tokenizer
from mmtransformer.training import Captioning

TRANSFORM = ImageTransform(image_size=(11, 13))
WORDS = ["a", "red", "star", "and", "three", "blue", "circles", "빨간", "별과", "파란", "원", "세", "개"]


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train([" ".join(WORDS), *WORDS] * 3, 300, ("en", "ko"))


def colour(number: int) -> tuple[int, int, int]:
    return (37 * number % 251, 53 * number % 241, 97 * number % 239)


def hash_share(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (5, 7), colour(number)).save(path)


def write(path: Path, records: list[object]) -> Path:
    lines = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in records]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def record(number: int, images: int = 2, **more: object) -> dict[str, object]:
    """Document `number`, whose k-th picture has the number 10 * number + k."""
    text = f"document {number} " + "".join(f"<image> text {number} {k} " for k in range(images))
    return {"text": text, "images": [f"p/{10 * number + k}.png" for k in range(images)], **more}


def folder(root: Path, count: int = 23) -> Path:
    for number in range(count):
        for k in range(3):
            hash_share(root / "p" / f"{10 * number + k}.png", 10 * number + k)
    return root


class Fake:
    """Documents in memory: each a list of texts; pictures are plain colours of 100 * i + k; `bad` cannot be read."""

    def __init__(self, documents: list[Document], bad: tuple[tuple[int, int], ...] = ()):
        self.documents, self.bad = documents, bad

    def __len__(self) -> int:
        return len(self.documents)

    def name(self, i: int) -> str:
        return f"d{i}"

    def document(self, i: int) -> Document:
        return self.documents[i]

    def image_name(self, i: int, k: int) -> str:
        return f"d{i}/{k}"

    def image(self, i: int, k: int) -> Image.Image:
        if (i, k) in self.bad:
            raise ImageError(f"d{i}/{k}: cut off")
        return Image.new("RGB", (17, 19), colour(100 * i + k))


class FakeSource:
    def __init__(self, **splits: Fake):
        self.fakes = splits
        self.languages: tuple[str, ...] = ("en", "ko")

    def splits(self) -> tuple[str, ...]:
        return tuple(self.fakes)

    def split(self, name: str) -> Fake:
        return self.fakes[name]


def some_documents(count: int, seed: int = 0, images: int = 3) -> list[Document]:
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        texts = [" ".join(rng.choice(WORDS, rng.integers(1, 7))) for _ in range(rng.integers(2, images + 2))]
        texts[0] = texts[0] if rng.random() < 0.5 else ""
        made.append(Document(tuple(texts), "ko" if rng.random() < 0.5 else "en"))
    return made


# ---------------------------------------------------------------------------------------------------------- files


def test_a_folder_of_documents(tmp_path: Path) -> None:
    write(folder(tmp_path) / "docs.jsonl", [record(n, 1 + n % 3) for n in range(23)])
    source = InterleavedFiles(tmp_path, val_fraction=0.2)
    assert isinstance(source, DocumentSource)
    assert source.splits() == ("train", "val")
    seen = 0
    for name in source.splits():
        split = source.split(name)
        assert isinstance(split, Documents)
        for i in range(len(split)):
            number = int(split.name(i).rpartition(":")[2]) - 1
            document = split.document(i)
            expected = (f"document {number}", *(f"text {number} {k}" for k in range(1 + number % 3)))
            assert document == Document(expected, None)
            assert document.images == 1 + number % 3
            for k in range(document.images):
                assert split.image_name(i, k) == f"p/{10 * number + k}.png"
                assert split.image(i, k).getpixel((0, 0)) == colour(10 * number + k)
            seen += 1
    assert seen == 23
    assert "23 documents, 45 pictures" in source.describe()
    assert not source.report.errors
    assert pickle.loads(pickle.dumps(source.split("val"))).image(0, 0).size == (5, 7)
    with pytest.raises(ValueError, match="has no split 'test'; it has: train, val"):
        source.split("test")


def test_all_three_forms_say_the_same(tmp_path: Path) -> None:
    folder(tmp_path, 1)
    names = ["p/0.png", "p/1.png"]
    ours = {"id": "a", "text": "one <image> two\n <image>three", "images": names}
    obelics = {"id": "b", "texts": ["one", None, "two", None, "three"], "images": [None, names[0], None, names[1], ""]}
    mmc4 = {
        "id": "c",
        "text_list": ["one", "two", "three"],
        "image_info": [
            {"image_name": names[1], "matched_text_index": 2},
            {"image_name": names[0], "matched_text_index": 1},
        ],
    }
    write(tmp_path / "d.jsonl", [ours, obelics, mmc4])
    split = InterleavedFiles(tmp_path, val_fraction=0).split("train")
    for i in range(3):
        assert split.document(i).texts == ("one", "two", "three")
        assert [split.image_name(i, k) for k in range(2)] == names
    assert [split.name(i) for i in range(3)] == ["a", "b", "c"]


def test_images_that_hardly_match_are_left_out(tmp_path: Path) -> None:
    folder(tmp_path, 2)

    def matched(*similar: float) -> dict[str, object]:
        infos = [
            {"image_name": f"p/{k}.png", "matched_text_index": k, "matched_sim": value}
            for k, value in enumerate(similar)
        ]
        return {"text_list": ["one", "two", "three"], "image_info": infos}

    write(tmp_path / "d.jsonl", [matched(0.3, 0.2), matched(0.1, 0.2), matched(0.24, 0.5)])
    source = InterleavedFiles(tmp_path, val_fraction=0, min_similarity=0.24)
    split = source.split("train")
    assert [split.document(i).texts for i in range(len(split))] == [("", "one\ntwo\nthree"), ("", "one", "two\nthree")]
    assert source.report.rows == 2
    assert source.report.notes == {"no picture matches its sentence by 0.24, left out": 1}
    assert len(InterleavedFiles(tmp_path, val_fraction=0).split("train")) == 3


def test_join_pieces() -> None:
    assert join_pieces(["a", "b", None, None, "c"]) == ("a\nb", "", "c")
    assert join_pieces([None]) == ("", "")


def test_images_in_an_archive_and_elsewhere(tmp_path: Path) -> None:
    folder(tmp_path / "store", 2)
    (tmp_path / "docs").mkdir()
    with zipfile.ZipFile(tmp_path / "docs" / "pictures.zip", "w") as archive:
        for path in sorted((tmp_path / "store" / "p").iterdir()):
            archive.write(path, f"p/{path.name}")
    write(tmp_path / "docs" / "d.jsonl", [record(0), record(1, 3)])
    for images in (None, tmp_path / "store"):
        split = InterleavedFiles(tmp_path / "docs", image_folder=images, val_fraction=0).split("train")
        assert split.image(1, 2).getpixel((0, 0)) == colour(12)
    alone = InterleavedFiles(tmp_path / "docs" / "d.jsonl", val_fraction=0)
    assert len(alone.split("train")) == 2
    climbing: list[object] = [
        record(i) | {"images": [f"../store/{name}" for name in (f"p/{10 * i}.png", f"p/{10 * i + 1}.png")]}
        for i in range(2)
    ]
    write(tmp_path / "docs" / "d.jsonl", climbing)
    for images in (tmp_path / "store", tmp_path / "store" / "p"):
        split = InterleavedFiles(tmp_path / "docs", image_folder=images, val_fraction=0).split("train")
        assert split.image(1, 0).getpixel((0, 0)) == colour(10)


def test_splits_and_languages_are_those_of_the_data(tmp_path: Path) -> None:
    folder(tmp_path, 5)
    write(tmp_path / "train.jsonl", [record(0), record(1, language="fr")])
    korean = {"text": "사진 <image> 빨간 별이 있다", "images": ["p/20.png"]}
    write(tmp_path / "val.jsonl", [korean, record(3, split="test"), record(4, lang="Korean")])
    source = InterleavedFiles(tmp_path)
    assert source.splits() == ("train", "val", "test")
    assert [source.split("train").document(i).language for i in range(2)] == ["en", "fr"]
    assert [source.split("val").document(i).language for i in range(2)] == ["ko", "ko"]
    assert source.languages == ("en", "fr", "ko")
    assert InterleavedFiles(tmp_path, default_language="de").split("test").document(0).language == "de"


FAULTS: dict[str, tuple[object, str]] = {
    "more marks": ({"text": "a <image> b <image> c", "images": ["p/0.png"]}, "2 <image> in the text, 1 in images"),
    "fewer marks": ({"text": "a <image>", "images": ["p/0.png", "p/1.png"]}, "1 <image> in the text, 2 in images"),
    "no marks": ({"text": "a b", "images": ["p/0.png"]}, "0 <image> in the text, 1 in images"),
    "missing": ({"text": "a <image> b <image>", "images": ["p/0.png", "p/77.png"]}, "picture 2 of 2: 'p/77.png'"),
    "climbs": ({"text": "a <image>", "images": ["../../etc/passwd"]}, "climbs out of the root"),
    "absolute": ({"text": "a <image>", "images": ["/etc/passwd"]}, "an absolute path"),
    "url": ({"text": "a <image>", "images": ["http://example.org/a.png"]}, "a URL"),
    "link": ({"text": "a <image>", "images": ["out.png"]}, "a link that leads out of the root"),
    "no pictures": ({"text": "a b c", "images": []}, "no picture"),
    "no text": ({"text": "<image>", "images": ["p/0.png"]}, "no text"),
    "text is a number": ({"text": 3, "images": ["p/0.png"]}, "no text: 3"),
    "no list": ({"text": "a <image>"}, "no list of pictures: its keys are text"),
    "picture is a number": ({"text": "a <image>", "images": [3]}, "no picture named: 3"),
    "surrogate": ('{"text": "a \\ud800 <image>", "images": ["p/0.png"]}', "not valid Unicode"),
    "not json": ('{"text": "a <image>", "images": [', "not JSON"),
    "a list": ("[1, 2]", "not a JSON object"),
    "language": ({"text": "a <image>", "images": ["p/0.png"], "language": "12"}, "not a language"),
    "parallel": ({"texts": ["a"], "images": [None, "p/0.png"]}, "1 text, 2 images"),
    "both": ({"texts": ["a", "b"], "images": [None, "p/0.png"]}, "place 1 of the lists must have exactly one"),
    "matched": (
        {"text_list": ["a"], "image_info": [{"image_name": "p/0.png", "matched_text_index": 1}]},
        "matched_text_index 1 of 1 text",
    ),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_faulty_document_is_counted_and_named_by_line(kind: str, tmp_path: Path) -> None:
    root = folder(tmp_path / "a" / "root")
    hash_share(tmp_path / "secret.png", 1)
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    line, fault = FAULTS[kind]
    write(root / "d.jsonl", [*(record(n) for n in range(22)), line])
    source = InterleavedFiles(root, val_fraction=0)
    assert len(source.split("train")) == 22
    assert source.report.bad_rows == 1
    (cause,) = source.report.errors
    named = f"{cause}: " + source.report.first[cause][0]
    assert "d.jsonl:23" in named
    assert fault in named.replace(f"{cause}: d.jsonl:23: ", f"{cause}: ")


def test_too_many_faulty_documents_stop_the_run(tmp_path: Path) -> None:
    records = [*(record(n) for n in range(20)), *({"text": "a", "images": ["p/0.png"]} for _ in range(3))]
    write(folder(tmp_path) / "d.jsonl", records)
    with pytest.raises(TooManyErrors, match=r"3 of 23 rows can't be used \(13\.0%, more than 1\.0% allowed") as error:
        InterleavedFiles(tmp_path)
    assert "marks and pictures differ in number: 3" in str(error.value)
    assert "d.jsonl:21" in str(error.value)
    assert len(InterleavedFiles(tmp_path, max_bad_fraction=0.2, val_fraction=0).split("train")) == 20


def test_no_documents_at_all(tmp_path: Path) -> None:
    write(tmp_path / "pairs.jsonl", [{"image": "a.png", "caption": "b"}])
    with pytest.raises(ValueError, match="holds no documents"):
        InterleavedFiles(tmp_path)
    with pytest.raises(ValueError, match=r"val_fraction \(1\)"):
        InterleavedFiles(tmp_path, val_fraction=1)
    with pytest.raises(ValueError, match=r"mark \(' '\)"):
        InterleavedFiles(tmp_path, mark=" ")


def test_a_image_that_cannot_be_decoded_names_its_document(tmp_path: Path) -> None:
    write(folder(tmp_path, 3) / "d.jsonl", [record(n) for n in range(3)])
    (tmp_path / "p" / "11.png").write_bytes(b"nonsense")
    split = InterleavedFiles(tmp_path, val_fraction=0).split("train")
    with pytest.raises(ImageError, match=r"p/11\.png \(picture 2 of d\.jsonl:2\)"):
        split.image(1, 1)
    (tmp_path / "p" / "10.png").unlink()
    with pytest.raises(ImageError, match=r"p/10\.png \(picture 1 of d\.jsonl:2\): can't be read"):
        split.image(1, 0)


@settings(max_examples=40, deadline=None)
@given(pieces=st.lists(st.one_of(st.none(), st.text("aB7별한글é,.", max_size=5)), min_size=1))
def test_marks_are_found_wherever_they_stand(
    pieces: list[str | None], tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = " ".join("<image>" if piece is None else piece for piece in pieces)
    root = tmp_path_factory.mktemp("d")
    hash_share(root / "p" / "0.png", 0)
    hash_share(root / "p" / "1.png", 0)
    write(root / "d.jsonl", [record(0), {"text": text, "images": ["p/0.png"] * pieces.count(None)}])
    source = InterleavedFiles(root, val_fraction=0)
    expected: list[list[str]] = [[]]
    for piece in pieces:
        expected += [[]] if piece is None else []
        expected[-1] += [piece] if piece else []
    if len(expected) == 1 or not any(expected):
        assert list(source.report.errors.values()) == [1]
    else:
        assert source.split("train").document(1).texts == tuple(map(" ".join, expected))


# ----------------------------------------------------------------------------------------------------------- rows


def text_of(ids: list[int]) -> list[str]:
    tok = tokenizer()
    return [tok.backend.id_to_token(i) or "" for i in ids]


def test_a_row_by_hand() -> None:
    document = Document(("별", "a red star", "", "세 개"), "ko")
    rows = DocumentRows(Fake([document]), tokenizer(), row_len=64)
    ((piece,),) = [rows.row(0)]
    tok = tokenizer()
    expected = [
        *tok.prompt("ko"), *tok.encode("별"),
        tok.image_token_id, *tok.encode("a red star"), tok.eos_id,
        tok.image_token_id,
        tok.image_token_id, *tok.encode("세 개"), tok.eos_id,
    ]  # fmt: skip
    assert piece.tokens.tolist() == expected
    assert (piece.document, piece.first, piece.images) == (0, 0, 3)
    layout = lay_out([piece], rows.image_token_id)
    lead, one = 2 + len(tok.encode("별")), len(tok.encode("a red star")) + 1
    two = len(tok.encode("세 개")) + 1
    assert layout.image_index.tolist() == [0] * lead + [1] * (1 + one) + [2] + [3] * (1 + two)
    assert layout.loss_mask.tolist() == [False] * (lead + 1) + [True] * one + [False] * 2 + [True] * two
    assert set(layout.first_image_index) == {1}
    assert set(layout.document_ids) == {0}


def test_packed_documents_have_numbers_of_their_own() -> None:
    documents = [Document(("a", "red star", "별"), "en"), Document(("", "원"), "ko")]
    rows = DocumentRows(Fake(documents), tokenizer(), row_len=64)
    assert len(rows) == 1
    pieces = rows.row(0)
    layout = lay_out(pieces, rows.image_token_id)
    for number, piece in enumerate(pieces):
        mine = layout.document_ids == number
        before = sum(p.images for p in pieces[:number])
        alone = lay_out([piece], rows.image_token_id)
        assert (layout.tokens[mine] == alone.tokens).all()
        assert (layout.loss_mask[mine] == alone.loss_mask).all()
        assert (layout.image_index[mine] == np.where(alone.image_index > 0, alone.image_index + before, 0)).all()
        assert (layout.first_image_index[mine] == before + 1).all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 999),
    count=st.integers(1, 31),
    row_len=st.integers(13, 71),
    max_images=st.integers(1, 5),
    pack=st.booleans(),
)
def test_rows_hold_every_document_once(seed: int, count: int, row_len: int, max_images: int, pack: bool) -> None:
    documents = some_documents(count, seed)
    rows = DocumentRows(Fake(documents), tokenizer(), row_len=row_len, max_images=max_images, pack=pack, seed=seed)
    tok = tokenizer()
    found: dict[int, list[tuple[int, int, list[int]]]] = {}
    for i in range(len(rows)):
        pieces = rows.row(i)
        assert pack or len(pieces) == 1
        tokens = sum(len(piece.tokens) for piece in pieces)
        assert tokens == rows.lengths[i] <= row_len
        assert sum(piece.images for piece in pieces) == rows.images[i] <= max_images
        for piece in pieces:
            ids = piece.tokens.tolist()
            assert ids.count(tok.image_token_id) == piece.images >= 1
            assert ids[:2] == tok.prompt(documents[piece.document].language)
            found.setdefault(piece.document, []).append((piece.first, piece.images, ids))
        assert lay_out(pieces, rows.image_token_id).loss_mask.any()
    for number, document in enumerate(documents):
        parts = sorted(found[number])
        firsts = [first for first, _, _ in parts]
        assert firsts == list(np.cumsum([0] + [images for _, images, _ in parts])[:-1])
        assert sum(images for _, images, _ in parts) == document.images
        # what was not cut reads as it was written
        said = " ".join(tok.decode([i for i in ids if i not in (tok.eos_id,)]) for _, _, ids in parts).split()
        if not rows.cut:
            assert said == " ".join(document.texts).split()
    assert rows.divided == sum(len(parts) > 1 for parts in found.values())


def test_a_long_text_is_cut_after_a_whole_word_and_does_not_end() -> None:
    text = "빨간 별과 파란 원 세 개 " * 9
    rows = DocumentRows(Fake([Document(("", text.strip()), "ko")]), tokenizer(), row_len=23)
    assert (rows.cut, rows.divided) == (1, 0)
    ids = rows.row(0)[0].tokens.tolist()
    assert len(ids) <= 23
    assert tokenizer().eos_id not in ids
    words = tokenizer().decode(ids).split()
    assert words == text.split()[: len(words)]
    assert len(words) >= 3


def test_of_a_long_beginning_the_end_is_kept() -> None:
    lead = "빨간 별과 파란 원 세 개 " * 9
    rows = DocumentRows(Fake([Document((lead.strip(), "red star"), "en")]), tokenizer(), row_len=29)
    ids = rows.row(0)[0].tokens.tolist()
    assert rows.cut == 1
    before = tokenizer().decode(ids[2 : ids.index(tokenizer().image_token_id)]).split()
    assert before == lead.split()[-len(before) :]
    assert len(before) >= 3
    assert ids[-1] == tokenizer().eos_id


def test_what_teaches_nothing_is_left_out_and_counted() -> None:
    documents = [Document(("a red star", "", ""), "en"), Document(("a", "red", "", ""), "en")]
    rows = DocumentRows(Fake(documents), tokenizer(), row_len=64)
    assert (rows.silent, rows.unread) == (1, 4)
    assert [piece.images for piece in rows.row(0)] == [1]
    with pytest.raises(ValueError, match="none of the 1 document has a text after a picture"):
        DocumentRows(Fake(documents[:1]), tokenizer())


def test_packing_fills_rows_and_follows_the_seed() -> None:
    documents = Fake(some_documents(307))
    options = {"row_len": 101, "max_images": 9}
    rows = DocumentRows(documents, tokenizer(), **options)  # type: ignore[arg-type]
    plain = DocumentRows(documents, tokenizer(), pack=False, **options)  # type: ignore[arg-type]
    assert rows.fill() > 0.9 > 0.5 > plain.fill()
    again = DocumentRows(documents, tokenizer(), **options)  # type: ignore[arg-type]
    other = DocumentRows(documents, tokenizer(), seed=1, **options)  # type: ignore[arg-type]

    def shared(some: DocumentRows) -> list[list[int]]:
        return [[piece.document for piece in some.row(i)] for i in range(len(some))]

    assert shared(rows) == shared(again) != shared(other)


def test_impossible_rows_are_refused() -> None:
    documents = Fake(some_documents(3))
    with pytest.raises(ValueError, match=r"row_len \(4\) must be at least 5"):
        DocumentRows(documents, tokenizer(), row_len=4)
    with pytest.raises(ValueError, match=r"max_images \(0\)"):
        DocumentRows(documents, tokenizer(), max_images=0)
    bare = Tokenizer(tokenizer().backend, languages=("en", "ko"))
    with pytest.raises(ValueError, match=rf"the tokenizer \({bare.vocab_size} tokens\) has no image token"):
        DocumentRows(documents, bare)
    with pytest.raises(ValueError, match="'de' is unknown"):
        DocumentRows(Fake([Document(("", "a"), "de")]), tokenizer())


# -------------------------------------------------------------------------------------------------------- batches


def make(train: Fake | None = None, report_dir: str | None = None, **options: object) -> InterleavedData:
    source = FakeSource(train=train or Fake(some_documents(53)), val=Fake(some_documents(11, 1)))
    settings = {"transform": TRANSFORM, "tokenizer": tokenizer(), "batch_size": 3, "row_len": 61, "max_images": 4}
    data = InterleavedData(source, **(settings | options))  # type: ignore[arg-type]
    data.report_dir = report_dir
    data.setup("fit")
    return data


def test_a_batch() -> None:
    data = make()
    loader = data.train_dataloader()
    rows = data.rows("train")
    seen: list[int] = []
    for picks, batch in zip(list(loader.place), loader, strict=True):
        assert batch.pixels is not None
        assert batch.image_mask is not None
        assert batch.image_index is not None
        assert batch.first_image_index is not None
        assert batch.document_ids is not None
        assert batch.pixels.shape == (len(picks), int(rows.images[[p.index for p in picks]].max()), 3, 11, 13)
        for r, pick in enumerate(picks):
            pieces = rows.row(pick.index)
            seen += [piece.document for piece in pieces for _ in range(piece.first == 0)]
            layout = lay_out(pieces, rows.image_token_id)
            q = len(layout.tokens)
            for name in ("tokens", "loss_mask", "image_index", "first_image_index", "document_ids"):
                assert getattr(batch, name)[r, :q].tolist() == getattr(layout, name).tolist(), name
            assert batch.attention_mask[r].tolist() == [True] * q + [False] * (batch.attention_mask.shape[1] - q)
            assert not batch.loss_mask[r, q:].any()
            assert not batch.image_index[r, q:].any()
            assert (batch.document_ids[r, q:] == len(pieces)).all(), "padding belongs to no document"
            assert (batch.tokens[r, q:] == tokenizer().pad_id).all()
            places = [(piece.document, piece.first + k) for piece in pieces for k in range(piece.images)]
            assert batch.image_mask[r].sum() == len(places)
            assert not batch.pixels[r, len(places) :].any()
            for i, (document, k) in enumerate(places):
                shown = TRANSFORM(data.documents("train").image(document, k))
                assert torch.equal(batch.pixels[r, i], shown)
    assert sorted(seen) == list(range(53))


def test_batches_do_not_depend_on_workers_or_processes() -> None:
    augment = Augment(scale=(0.5, 0.9), jitter=0.3)
    one, two = make(augment=augment), make(augment=augment, loader=LoaderConfig(num_workers=2))
    for epoch in (0, 1):
        for data, loader in ((one, one.train_dataloader()), (two, two.train_dataloader())):
            loader.place.set_epoch(epoch)
            data.found = list(loader)  # type: ignore[attr-defined]
        for a, b in zip(one.found, two.found, strict=True):  # type: ignore[attr-defined]
            assert a.names == b.names
            for name in (
                "tokens",
                "attention_mask",
                "loss_mask",
                "pixels",
                "image_mask",
                "image_index",
                "first_image_index",
                "document_ids",
            ):
                assert torch.equal(getattr(a, name), getattr(b, name)), name
    dataset = one.dataset("train", training=True)
    a, b = dataset[SampleIndex(0, 3)].pixels, dataset[SampleIndex(1, 3)].pixels
    assert not torch.equal(a, b), "another epoch is augmented otherwise"
    assert torch.equal(a, one.dataset("train", training=True)[SampleIndex(0, 3)].pixels)


def test_a_failing_image_is_hidden_and_its_text_is_no_target(tmp_path: Path) -> None:
    documents = [Document(("", "a red star", "three circles", "별과 원"), "en"), *some_documents(60)]
    bad = make(
        Fake(documents, bad=((0, 1),)), report_dir=str(tmp_path), pack=False, loader=LoaderConfig(max_bad_fraction=0.05)
    )
    good = make(Fake(documents), report_dir=str(tmp_path / "good"), pack=False)
    sample, whole = (data.dataset("train", training=True)[SampleIndex(0, 0)] for data in (bad, good))
    assert sample.image_mask.tolist() == [True, False, True]
    assert not sample.pixels[1].any()
    assert torch.equal(sample.pixels[[0, 2]], whole.pixels[[0, 2]])
    assert sample.layout.tokens.tolist() == whole.layout.tokens.tolist()
    hers = whole.layout.image_index == 2
    assert not sample.layout.loss_mask[hers].any()
    assert not sample.layout.image_index[hers].any()
    assert (sample.layout.loss_mask[~hers] == whole.layout.loss_mask[~hers]).all()
    assert (sample.layout.image_index[~hers] == whole.layout.image_index[~hers]).all()
    (line,) = (tmp_path / "bad_images_documents_train.jsonl").read_text("utf-8").splitlines()
    assert json.loads(line) == {"image": "d0/1", "error": "ImageError: d0/1: cut off"}
    assert not (tmp_path / "good").exists()


def test_a_row_without_a_target_is_replaced_and_too_many_bad_images_stop_the_run(tmp_path: Path) -> None:
    documents = [Document(("", f"star {i}"), "en") for i in range(211)]
    data = make(Fake(documents, bad=((4, 0), (5, 0))), report_dir=str(tmp_path), pack=False)
    dataset = data.dataset("train", training=True)
    order = [dataset.rows.row(i)[0].document for i in range(len(dataset))]
    at = order.index(4)
    sample = dataset[SampleIndex(0, at)]
    assert sample.name == "d6"
    assert sample.layout.loss_mask.any()
    assert not dataset[SampleIndex(0, at, is_real=False)].layout.loss_mask.any()
    still = data.dataset("train")[SampleIndex(0, at)]
    assert not still.layout.loss_mask.any(), "a replacement sample does not count in evaluation"
    many = make(Fake(documents, bad=tuple((i, 0) for i in range(9))), report_dir=str(tmp_path / "many"), pack=False)
    with pytest.raises(TooManyErrors, match=r"3 of 211 pictures can't be read"):
        [many.dataset("train")[SampleIndex(0, i)] for i in range(211)]


def test_a_document_that_names_a_side_is_not_mirrored() -> None:
    documents = [Document(("", "a star", "left of a circle" if i % 2 else "a circle"), "en") for i in range(23)]

    class Sided(Fake):
        def image(self, i: int, k: int) -> Image.Image:
            image = Image.new("RGB", (16, 16), (255, 0, 0))
            image.paste((0, 0, 255), (0, 0, 8, 16))
            return image

    data = make(Sided(documents), augment=Augment(scale=(1.0, 1.0), flip=True), pack=False)
    dataset = data.dataset("train", training=True)
    rotated = {0: 0, 1: 0}
    for i in range(len(dataset)):
        for pixels in dataset[SampleIndex(0, i)].pixels:
            rotated[dataset.rows.row(i)[0].document % 2] += bool(pixels[0, 0, 0] > 0)
    assert rotated[1] == 0
    assert 4 < rotated[0] < 20


@pytest.mark.parametrize("visible_images", ["last", "all_previous"])
@torch.no_grad()
def test_a_packed_document_is_read_as_if_it_were_alone(visible_images: str) -> None:
    documents = Fake(some_documents(9, 5, images=2))
    image = ImageTransform(16)
    packed = make(documents, row_len=97, max_images=9, transform=image)
    alone = make(documents, pack=False, transform=image)
    torch.manual_seed(0)
    vision = ViT(16, 8, 12, 1, 2, class_token=False, pool="mean")
    decoder = TextDecoder(300, 20, 2, 2, max_len=97)
    model = Flamingo(vision, decoder, gated=GatedBlockConfig(2, 5), visible_images=visible_images).eval()  # type: ignore[arg-type]
    for block in model.gated_blocks:
        block.attn_gate.data.fill_(2.0)  # type: ignore[union-attr]
    singles = alone.dataset("train")
    where = {singles.rows.row(i)[0].document: i for i in range(len(singles))}
    collate = CollateDocuments(tokenizer().pad_id)
    whole = collate([packed.dataset("train")[SampleIndex(0, i)] for i in range(len(packed.rows("train")))])
    logits = model.logits(whole)
    checked = 0
    for r in range(len(whole.tokens)):
        for number, piece in enumerate(packed.rows("train").row(r)):
            assert whole.document_ids is not None
            mine = whole.document_ids[r] == number
            own = model.logits(collate([singles[SampleIndex(0, where[piece.document])]]))[0]
            torch.testing.assert_close(logits[r, mine], own, atol=1e-5, rtol=0)
            checked += 1
    assert checked == 9 > len(whole.tokens)


def test_what_was_divided_and_cut_is_said(caplog: pytest.LogCaptureFixture) -> None:
    documents = [Document(("a " * 99, "red " * 99, "star", "원"), "en"), *some_documents(9), Document(("a", ""), "en")]
    with caplog.at_level(logging.WARNING):
        make(Fake(documents), row_len=41)
    assert "train: 1 of 11 documents are longer than a row (41 tokens, 4 pictures): divided" in caplog.text
    assert "train: 2 texts are longer than a row: cut" in caplog.text
    assert "train: 1 of 11 documents have no text after a picture: left out" in caplog.text


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size \(0\)"):
        make(batch_size=0)
    with pytest.raises(ValueError, match=r"splits.val must be a list of splits: \[val\]"):
        make(splits=Splits(val="val"))


# ---------------------------------------------------------------------------------------------- pairs and documents


def test_pairs_as_documents_and_documents_as_pairs() -> None:
    scenes = Scenes(image_size=32, train_size=5, phrasings=2)
    source = PairsAsDocuments(scenes)
    assert isinstance(source, DocumentSource)
    split, pairs = source.split("train"), scenes.split("train")
    assert len(split) == 20
    texts = [caption for i in range(5) for caption in pairs.captions(i)]
    assert [split.document(i) for i in range(20)] == [Document(("", c.text), c.language) for c in texts]
    assert split.image(7, 0).tobytes() == pairs.image(1).tobytes()
    assert len(PairsAsDocuments(scenes, max_captions=1).split("train")) == 5
    back = DocumentsAsPairs(source)
    assert isinstance(back, PairSource)
    again = back.split("train")
    assert isinstance(again, Pairs)
    assert [again.captions(i)[0] for i in range(20)] == texts
    assert again.name(7) == f"{split.name(7)}[1]"
    assert again.image(7).tobytes() == pairs.image(1).tobytes()
    with pytest.raises(ValueError, match="captions must be at least 1, got 0"):
        PairsAsDocuments(scenes, max_captions=0)


def test_a_image_without_a_text_is_no_pair() -> None:
    pairs = ImagePairs(Fake([Document(("a", "", "b", "c"), "en"), Document(("a", ""), None)]))
    assert [pairs.name(i) for i in range(len(pairs))] == ["d0[2]", "d0[3]"]
    assert pairs.image(1).getpixel((0, 0)) == colour(2)


# ----------------------------------------------------------------------------------------------------------- a run


class Module(lightning.LightningModule):
    """Notes what it is given; its one weight makes it a model."""

    def __init__(self, seen: list[object]):
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.ones(3)), seen

    def training_step(self, batch, batch_idx):  # type: ignore[no-untyped-def]
        self.seen.append(
            (self.current_epoch, batch_idx, batch.names, batch.pixels.sum().item(), batch.tokens.sum().item())
        )
        return self.weight.sum() * batch.pixels.mean()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):  # type: ignore[no-untyped-def]
        self.seen.append((f"val {dataloader_idx}", batch.names))

    def configure_optimizers(self):  # type: ignore[no-untyped-def]
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(folder: Path, workers: int = 0, ckpt: Path | None = None, save_at: int = -1, **options: object) -> list[object]:
    seen: list[object] = []

    class Save(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):  # type: ignore[no-untyped-def]
            if trainer.global_step == save_at:
                trainer.save_checkpoint(folder / f"{save_at}.ckpt")

    trainer = lightning.Trainer(
        max_epochs=3, num_sanity_val_steps=0, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Save()], default_root_dir=folder,
    )  # fmt: skip
    scenes = Scenes(image_size=32, train_size=7, val_size=3)
    documents = DocumentMixture(
        {
            "documents": FakeSource(train=Fake(some_documents(19)), val=Fake(some_documents(5, 1))),
            "pairs": PairsAsDocuments(scenes),
        },
        {"documents": 2.0, "pairs": 1.0},
        epoch_size=17,
    )
    settings = {"transform": TRANSFORM, "tokenizer": tokenizer(), "batch_size": 3, "row_len": 97}
    settings |= {"augment": Augment(scale=(0.5, 0.9)), "captions": scenes, "loader": LoaderConfig(workers, 3)}
    data = InterleavedData(documents, **(settings | options))  # type: ignore[arg-type]
    trainer.fit(Module(seen), data, ckpt_path=ckpt)
    return seen


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*LeafSpec.*")
def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    whole = fit(tmp_path, save_at=8)
    steps = [i for i, one in enumerate(whole) if isinstance(one, tuple) and isinstance(one[0], int)]
    assert len(steps) == 18
    rest = fit(tmp_path, ckpt=tmp_path / "8.ckpt", workers=1)
    assert rest == whole[steps[8] :]
    assert {one[0] for one in whole if isinstance(one[0], str)} == {"val 0", "val 1"}  # type: ignore[index]
    with pytest.raises(ValueError, match=r"cannot resume: the number of rows of the run was \d+ and is now \d+"):
        fit(tmp_path, ckpt=tmp_path / "8.ckpt", row_len=64)


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*LeafSpec.*")
def test_a_model_that_does_not_read_where_images_stand_is_refused(tmp_path: Path) -> None:
    vision = ViT(16, 8, 12, 1, 2, class_token=False, pool="mean")
    captioner = VisionEncoderDecoder(vision, TextDecoder(300, 12, 1, 2, max_len=64, context_dim=12))
    trainer = lightning.Trainer(
        max_steps=1, num_sanity_val_steps=0, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(
        ValueError, match=r'VisionEncoderDecoder reads the pictures of a text as a whole.*visible_images="last"'
    ):
        trainer.fit(Captioning(captioner), make(transform=ImageTransform(16)))
    flamingo = Flamingo(vision, TextDecoder(tokenizer().vocab_size, 12, 1, 2, max_len=64), gated=GatedBlockConfig(2, 5))
    with pytest.raises(ValueError, match=r"data\.row_len \(65\) is more than the 64 tokens"):
        trainer.fit(Captioning(flamingo), make(transform=ImageTransform(16), row_len=65))
