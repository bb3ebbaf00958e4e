"""The index of large data sets of pairs: with it every answer is what it is without, and it is never of other data."""

import gc
import json
import os
import pickle
import shutil
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmtransformer.data.files import archives
from mmtransformer.data.files.members import Entry
from mmtransformer.data.files.read_options import ReadOptions
from mmtransformer.data.loading.errors import TooManyErrors
from mmtransformer.data.open_sources import InterleavedPairs, open_pairs
from mmtransformer.data.pair_files import index
from mmtransformer.data.pairs import PairFiles, PairSplit
from mmtransformer.images import ImageError
from support.pair_files import NAMES, caption, draw, jsonl, pack, png, rows_jsonl
from support.pair_formats import MAKERS


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Lets any data set have an index; the folder that it lies in."""
    monkeypatch.setattr(index, "LARGE", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mmtransformer" / "pairs"


def split_answers(split: PairSplit, *, images: bool = True) -> list[Any]:
    found: list[Any] = [len(split), repr(split)]
    for i in range(len(split)):
        rows = [split.name(i), split.captions(i), split.fingerprint(i)]
        rows.append([getattr(caption.question, "turns", None) for caption in split.captions(i)])
        for ask in (split.image, split.stored_size) if images else ():
            try:
                rows.append(np.asarray(ask(i)).tolist())
            except ImageError as error:
                rows.append(str(error))
        found.append(rows)
    for i in (len(split), -len(split) - 1):
        with pytest.raises(IndexError):
            split.name(i)
    return [*found, split.name(-1)]


def answers(source: Any) -> dict[str, Any]:
    splits = {name: source.split(name) for name in source.splits()}
    first = {name: split.without_follow_ups() for name, split in splits.items()}
    copies = {name: pickle.loads(pickle.dumps(split)) for name, split in splits.items()}
    with pytest.raises(ValueError, match="has no split 'none'") as refused:
        source.split("none")
    return {
        "of all": (source.describe(), repr(source), source.languages, source.report.to_dict(), str(source.report)),
        "splits": {name: split_answers(split) for name, split in splits.items()},
        "first turns": {name: split_answers(split, images=False) for name, split in first.items()},
        "pickled": {name: split_answers(split, images=False) for name, split in copies.items()},
        "no such split": str(refused.value),
    }


def both_ways(root: Any, read: ReadOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read, what is read while the index is made, and what the index says."""
    with monkeypatch.context() as patch:
        patch.setattr(index, "LARGE", 10**9)
        plain = answers(PairFiles(root, read, max_bad_fraction=1))
    assert answers(PairFiles(root, read, max_bad_fraction=1)) == plain
    with monkeypatch.context() as patch:
        patch.setattr(index, "read_pairs", None)  # nothing is read any more
        assert answers(PairFiles(root, read, max_bad_fraction=1)) == plain


# The same answers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("packed", ["folder", "zip", "tar"])
def test_every_answer_is_the_same(
    kind: str, packed: str, tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "made"
    root.mkdir()
    MAKERS[kind][0](root)
    if packed != "folder":
        files = {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
        root = pack(tmp_path / f"made.{packed}", files, zipfile.ZIP_DEFLATED)
    both_ways(root, ReadOptions(), monkeypatch)
    if packed == "folder":
        both_ways(root, ReadOptions(default_language="de", normalize="detokenize", val_fraction=0.5), monkeypatch)


def parquet(root: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for part in range(2):  # the same names in both
        rows = [{"image": {"bytes": png(n), "path": n}, "caption": caption(n, part)} for n in NAMES[:7]]
        pq.write_table(pa.Table.from_pylist(rows), root / f"{part}.parquet", row_group_size=3)


def questions(root: Path) -> None:  # one picture, several questions, one of them half of a letter
    draw(root)
    rows = [{"image": n, "question": f"{k} \ud83d?", "answer": f"yes {k}"} for n in NAMES for k in range(2)]
    (root / "vqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def conversations(root: Path) -> None:
    draw(root)
    turns = [("human", "<image>\nwhat?"), ("gpt", "a star"), ("human", "where?"), ("gpt", "left")]
    rows = [{"image": n, "conversations": [{"from": who, "value": said} for who, said in turns]} for n in NAMES]
    (root / "chat.json").write_text(json.dumps(rows))


def faults(root: Path) -> None:  # missing, broken and cut pictures, bad rows, stray quotes, a link that leads out
    draw(root, NAMES[:-2])
    (root / NAMES[-2]).write_bytes(b"no picture")
    pack(root / "cut.zip", {"z.png": png("z1.png")})
    data = (root / "cut.zip").read_bytes()
    (root / "cut.zip").write_bytes(data.replace(png("z1.png")[20:40], bytes(20)))
    (root / "out.png").symlink_to("/etc/hostname")
    rows = ["image,caption", *(f'{n},"{caption(n)}"' for n in NAMES), "cut.zip/z.png,z", "p01.png,", 'p02.png,"a" b']
    rows += ["../p03.png,climbs", "P04.PNG,other case", "a", "out.png,out"]
    (root / "captions.csv").write_text("\n".join(rows))


def splits(root: Path) -> None:
    for split, some in (("train", NAMES[:9]), ("val", NAMES[9:15]), ("test", NAMES[15:])):
        draw(root / split, some)
        (root / split / "captions.csv").write_text("\n".join(["image,caption", *(f"{n},{caption(n)}" for n in some)]))


def korean(root: Path) -> None:
    names = {name: unicodedata.normalize("NFD", f"사진{name}") for name in NAMES}
    for name, spelled in names.items():
        (root / spelled).write_bytes(png(name))
    rows = [
        {"image": unicodedata.normalize("NFC", new), "caption_ko": f"{old} 그림", "caption": old}
        for old, new in names.items()
    ]
    (root / "c.jsonl").write_text(jsonl(rows))


@pytest.mark.parametrize("make", [parquet, questions, conversations, faults, splits, korean])
def test_every_answer_is_the_same_of_odd_data(
    make: Callable[[Path], None], tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "made"
    root.mkdir()
    make(root)
    both_ways(root, ReadOptions(), monkeypatch)
    monkeypatch.chdir(tmp_path)
    both_ways("made", ReadOptions(val_fraction=0.0), monkeypatch)


def test_images_elsewhere(tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path / "photos")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "c.jsonl").write_text(rows_jsonl())
    read = ReadOptions(image_folder=str(tmp_path / "photos"))
    both_ways(tmp_path / "texts", read, monkeypatch)
    (tmp_path / "photos" / NAMES[0]).unlink()
    assert PairFiles(tmp_path / "texts", read, max_bad_fraction=1).report.errors == {"missing picture": 1}


def test_too_many_bad_rows_are_refused_with_an_index(tmp_path: Path, small: Path) -> None:
    draw(tmp_path / "a", NAMES[:-3])
    (tmp_path / "a" / "c.jsonl").write_text(rows_jsonl())
    said = []
    for max_bad_fraction in (0.01, 1.0, 0.01):
        try:
            PairFiles(tmp_path / "a", max_bad_fraction=max_bad_fraction)
        except TooManyErrors as error:
            said.append(str(error))
    assert len(said) == 2
    assert said[0] == said[1]


# Not of other data ----------------------------------------------------------------------------------------


def touch(path: Path) -> None:
    info = path.stat()
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns + 10**9))


def rewrite(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))
    touch(path)


def grow(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(line)


CHANGES: dict[str, Callable[[Path], object]] = {
    "a caption": lambda root: rewrite(root / "c.jsonl", "words 1", "wards 1"),
    "a line": lambda root: grow(root / "c.jsonl", '{"image": "p00.png", "captions": ["new"]}\n'),
    "a picture gone": lambda root: (root / NAMES[1]).unlink(),
    "a picture added": lambda root: (root / "more" / "p00.png").write_bytes(png("p00.png")),
    "another manifest": lambda root: (root / "more.csv").write_text("image,caption\np00.png,a\n"),
    "an archive": lambda root: pack(root / "b.zip", {"p09.png": png("p09.png")}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_data_that_changed_are_read_again(
    what: str, tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "made"
    draw(root)
    (root / "more").mkdir()
    (root / "c.jsonl").write_text(rows_jsonl())
    both_ways(root, ReadOptions(), monkeypatch)
    CHANGES[what](root)
    assert index.find_kept(root, ReadOptions()) is None
    if what != "another manifest":  # which do not belong together
        both_ways(root, ReadOptions(), monkeypatch)


def test_texts_and_archives_that_changed_are_read_again(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "made"
    root.mkdir()
    MAKERS["folder"][0](root)
    both_ways(root, ReadOptions(), monkeypatch)
    rewrite(root / "p03.txt", "words 2", "wards 2")
    assert index.find_kept(root, ReadOptions()) is None
    both_ways(root, ReadOptions(), monkeypatch)

    files = {p.name: p.read_bytes() for p in sorted(root.iterdir())}
    both_ways(pack(tmp_path / "a.zip", files), ReadOptions(), monkeypatch)
    files["p03.txt"] = files["p03.txt"].replace(b"picture", b"drawing")
    touch(pack(tmp_path / "a.zip", files))
    assert index.find_kept(tmp_path / "a.zip", ReadOptions()) is None
    both_ways(tmp_path / "a.zip", ReadOptions(), monkeypatch)


def test_loose_pictures_may_change_and_their_fingerprints_tell(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "made"
    root.mkdir()
    MAKERS["csv"][0](root)
    before = PairFiles(root).split("train")
    assert index.find_kept(root, ReadOptions()) is not None
    changed = root / before.name(0)
    changed.write_bytes(png("p22.png"))
    touch(changed)
    after = PairFiles(root, found=index.find_kept(root, ReadOptions())).split("train")
    assert after.fingerprint(0).endswith(f" 0 {changed.stat().st_size}")
    both_ways(root, ReadOptions(), monkeypatch)


# The file itself ------------------------------------------------------------------------------------------


def newer(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data.replace(b'\\"format\\": 1', b'\\"format\\": 2'))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit": lambda path: path.write_bytes(path.read_bytes()[:-900] + b"~" + path.read_bytes()[-899:]),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-77]),
    "empty": lambda path: path.write_bytes(b""),
    "foreign": lambda path: path.write_text("a diary\n" * 99),
    "changed format": newer,
}


@pytest.mark.parametrize("what", DAMAGES)
def test_an_index_that_cannot_be_used_is_made_anew(
    what: str, tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "made"
    root.mkdir()
    MAKERS["jsonl"][0](root)
    both_ways(root, ReadOptions(), monkeypatch)
    (path,) = small.glob("made-*.safetensors")
    DAMAGES[what](path)
    capsys.readouterr()
    PairFiles(root)
    said = [line for line in capsys.readouterr().err.splitlines() if "made anew" in line]
    assert len(said) == 1
    assert said[0].startswith(f"{path}: not used, and made anew: ")
    both_ways(root, ReadOptions(), monkeypatch)


def test_an_index_of_another_version_is_made_anew(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "made"
    root.mkdir()
    MAKERS["jsonl"][0](root)
    with monkeypatch.context() as patch:
        patch.setattr(index, "_FORMAT", 2)
        PairFiles(root)
    assert index.find_kept(root, ReadOptions()) is None
    assert "not used, and made anew: of format 2" in capsys.readouterr().err
    both_ways(root, ReadOptions(), monkeypatch)
    assert len(list(small.glob("*.safetensors"))) == 1


def test_a_cache_that_cannot_be_written_does_no_harm(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "made"
    root.mkdir()
    MAKERS["jsonl"][0](root)
    (tmp_path / "cache").write_text("a file where a folder should be")
    plain = answers(PairFiles(root))
    assert "cannot be kept" in capsys.readouterr().err
    assert answers(PairFiles(root)) == plain


def test_an_index_that_is_replaced_is_not_mixed_with_the_other(tmp_path: Path, small: Path) -> None:
    root = tmp_path / "made"
    root.mkdir()
    MAKERS["jsonl"][0](root)
    PairFiles(root)
    split = PairFiles(root).split("train")
    travels, was = pickle.dumps(split), split.captions(0)
    rewrite(root / "captions.jsonl", "words", "wards")
    PairFiles(root)
    assert split.captions(0) == was
    with pytest.raises(ValueError, match="was made anew while it was used: start the run again"):
        pickle.loads(travels)


def test_small_data_sets_leave_nothing_behind(tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "LARGE", 24)  # pairs, of which there are 23 in many more bytes
    root = tmp_path / "made"
    root.mkdir()
    MAKERS["jsonl"][0](root)
    PairFiles(root)
    assert not list(small.glob("*.safetensors"))


# Opening by a path ----------------------------------------------------------------------------------------


def test_nothing_is_listed_where_there_is_an_index(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "made"
    root.mkdir()
    pack(root / "a.zip", {name: png(name) for name in NAMES})
    (root / "c.jsonl").write_text(rows_jsonl(folder="a.zip/"))
    plain = answers(open_pairs(root))
    monkeypatch.setattr("mmtransformer.data.pair_files.reading.Files", None)
    assert answers(open_pairs(root)) == plain


def test_documents_stay_documents(tmp_path: Path, small: Path) -> None:
    root = tmp_path / "made"
    draw(root)
    rows = [{"images": [name], "text": f"<image> {caption(name)}"} for name in NAMES]
    (root / "d.jsonl").write_text(jsonl(rows))
    PairFiles(root)  # reads them as pairs, and keeps that
    assert list(small.glob("*.safetensors"))
    assert isinstance(open_pairs(root), InterleavedPairs)


def test_a_folder_that_is_gone_is_said_to_be_gone(tmp_path: Path, small: Path) -> None:
    root = tmp_path / "made"
    root.mkdir()
    MAKERS["jsonl"][0](root)
    PairFiles(root)
    shutil.rmtree(root)
    with pytest.raises(ValueError, match="made does not exist"):
        PairFiles(root)


# The first opening ----------------------------------------------------------------------------------------


def test_the_first_opening_lists_archives_once_and_shows_where_it_is(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(tmp_path / "made" / "a.zip", {"1.png": png("1"), "2.png": png("2")}, zipfile.ZIP_DEFLATED)
    (tmp_path / "made" / "captions.jsonl").write_text(
        "".join(f'{{"image": "a.zip/{name}.png", "caption": "picture {name}"}}\n' for name in "12"), "utf-8"
    )
    listed: list[Path] = []
    lister = archives.list_zip

    def watched(path: Path) -> Iterator[tuple[str, Entry | str]]:
        listed.append(path)
        assert not gc.isenabled(), "the collector of cycles goes through all rows again and again"
        return lister(path)

    monkeypatch.setattr(archives, "list_zip", watched)
    opened = open_pairs(tmp_path / "made")
    assert sum(len(opened.split(split)) for split in opened.splits()) == 2
    assert [path.name for path in listed] == ["a.zip"]
    assert gc.isenabled()
    shown = capsys.readouterr().err
    for step in ("listing made", "reading captions.jsonl", "finding pictures", "writing the index"):
        assert step in shown, step


def test_the_collector_works_again_after_data_that_are_refused(tmp_path: Path, small: Path) -> None:
    (tmp_path / "captions.jsonl").write_text('{"image": "none.png", "caption": "x"}\n' * 3, "utf-8")
    with pytest.raises(TooManyErrors):
        open_pairs(tmp_path / "captions.jsonl")
    assert gc.isenabled()
