"""Tar shards: read by byte offset, kept indices, splits and captions, and shards that are hostile or damaged."""

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmtransformer.data.captions import CaptionData
from mmtransformer.data.files import archives
from mmtransformer.data.files.read_options import ReadOptions
from mmtransformer.data.files.shards import TarShards, find_shards
from mmtransformer.data.files.tar_index import ShardError, read_index
from mmtransformer.data.loading.errors import TooManyErrors
from mmtransformer.data.loading.module import LoaderConfig
from mmtransformer.data.loading.source import Caption, Pairs, PairSource
from mmtransformer.data.mixture import Mixture
from mmtransformer.data.open_sources import are_documents, are_shards, open_pairs
from mmtransformer.data.pairs import PairFiles
from mmtransformer.images import ImageError
from support.sources import TRANSFORM, batches_of, make, same, tokenizer

Members = list[tuple[str, bytes]]


def colour(number: int) -> tuple[int, int, int]:
    return (37 * number % 251, 53 * number % 241, 97 * number % 239)


def image(number: int, format: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (5, 7), colour(number)).save(data, format)
    return data.getvalue()


def sample(number: int, text: str | None = None) -> Members:
    key = f"{number:05d}"
    return [(f"{key}.png", image(number)), (f"{key}.txt", (text or f"caption {number}").encode())]


def member(name: str, data: bytes = b"", **more: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in more.items():
        setattr(info, key, value)
    return info


def pack(path: Path, members: Members, format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in members:
            archive.addfile(member(name, data), io.BytesIO(data))
    return path


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def shards(root: Path, count: int = 3, size: int = 7) -> Path:
    for k in range(count):
        members = [m for number in range(k * size, (k + 1) * size) for m in sample(number)]
        pack(root / f"part-{k:03d}.tar", members)
    return root


def everything(source: TarShards) -> dict[str, tuple[tuple[int, ...], list[Caption]]]:
    found = {}
    for name in source.splits():
        split = source.split(name)
        for i in range(len(split)):
            found[split.name(i)] = (split.image(i).getpixel((0, 0)), split.captions(i))
    return found


# ------------------------------------------------------------------------------------------------------- reading


def test_samples_of_several_shards(tmp_path: Path) -> None:
    source = TarShards(str(shards(tmp_path)), val_fraction=0.3)
    assert isinstance(source, PairSource)
    assert source.splits() == ("train", "val")
    assert isinstance(source.split("val"), Pairs)
    expected = {f"part-{n // 7:03d}/{n:05d}": (colour(n), [Caption(f"caption {n}")]) for n in range(21)}
    assert everything(source) == expected
    assert "3 tar shards" in source.describe()
    assert "21 pictures, 21 captions" in source.describe()
    split = pickle.loads(pickle.dumps(source.split("train")))
    assert split.image(0).size == (5, 7)
    with pytest.raises(ValueError, match="no split 'other'; it has: train, val"):
        source.split("other")
    assert len(source.split("dev")) == len(source.split("val"))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_all_ways_to_write_a_tar(format: int, tmp_path: Path) -> None:
    long = "folder/" * 13 + "a" * 60  # too long for one field of a header
    korean = "사진/고양이"
    members = [
        (f"{long}.jpg", image(1, "JPEG")), (f"{long}.txt", b"a long way"),
        (f"./{korean}.webp", image(2, "WEBP")), (f"./{korean}.ko.txt", "고양이 한 마리\n두 번째".encode()),
    ]  # fmt: skip
    pack(tmp_path / "a.tar", members, format)
    source = TarShards(str(tmp_path / "a.tar"), val_fraction=0)
    split = source.split("train")
    assert [split.name(i) for i in range(2)] == [long, korean]
    assert split.captions(1) == [Caption("고양이 한 마리", "ko"), Caption("두 번째", "ko")]
    assert split.captions(0) == [Caption("a long way", "en")]
    assert split.image(1).size == (5, 7)
    with tarfile.open(tmp_path / "a.tar") as archive:
        (offset,) = [info.offset_data for info in archive if info.name.endswith("jpg")]
    assert split.fingerprint(0).split()[1] == str(offset)


def test_the_first_ending_that_a_sample_has_holds_its_captions(tmp_path: Path) -> None:
    meta = {"caption": "from json", "url": "http://example.org", "status": "success"}
    members = [
        ("0.jpg", image(0)), ("0.txt", b"from text"), ("0.json", json.dumps(meta).encode()),
        ("1.jpg", image(1)), ("1.json", json.dumps(meta).encode()),
        ("2.jpg", image(2)), ("2.json", json.dumps({"captions": ["one", {"ko": "둘"}]}).encode()),
        ("3.jpg", image(3)), ("3.caption", b"from caption"), ("3.seg.png", image(9)), ("3.cls", b"4"),
        ("4.jpg", image(4)), ("4.txt", b"english"), ("4.ko.txt", "한글".encode()),
    ]  # fmt: skip
    split = TarShards(str(pack(tmp_path / "a.tar", members)), val_fraction=0).split("train")
    assert [[c.text for c in split.captions(i)] for i in range(5)] == [
        ["from text"], ["from json"], ["one", "둘"], ["from caption"], ["english", "한글"],
    ]  # fmt: skip
    assert split.captions(4)[1].language == "ko"
    assert split.image(3).getpixel((0, 0)) == colour(3), "a mask beside the picture is no picture"
    other = TarShards(str(tmp_path / "a.tar"), val_fraction=0, texts=("json", "txt", "caption"))
    assert other.split("train").captions(0) == [Caption("from json", "en")]


def test_splits_by_the_names_of_shards_and_folders(tmp_path: Path) -> None:
    for folder, name, number in (("", "train-0", 0), ("", "val-0", 1), ("test", "part-0", 2), ("test", "part-1", 3)):
        pack(tmp_path / folder / f"{name}.tar", sample(number))
    source = TarShards(str(tmp_path))
    assert {name: len(source.split(name)) for name in source.splits()} == {"train": 1, "val": 1, "test": 2}
    assert source.split("test").name(1) == "part-1/00003"


def test_a_sample_is_always_in_the_same_split(tmp_path: Path) -> None:
    few = TarShards(str(shards(tmp_path / "few", 2)), val_fraction=0.3)
    more = TarShards(str(shards(tmp_path / "more", 5)), val_fraction=0.3)
    where = {split.name(i): name for name in more.splits() for split in [more.split(name)] for i in range(len(split))}
    for name in few.splits():
        split = few.split(name)
        assert {where[split.name(i)] for i in range(len(split))} == {name}


def test_patterns(tmp_path: Path) -> None:
    shards(tmp_path, 12, 1)
    names = [f"part-{k:03d}" for k in range(12)]
    for pattern, count in (
        ("part-{003..011}.tar", range(3, 12)),
        ("part-{000,002}.tar", (0, 2)),
        ("part-00*.tar", range(10)),
        ("part-0{00..01}.tar", range(2)),
        ("{part,part}-001.tar", (1, 1)),
    ):
        assert [path.stem for path in find_shards(str(tmp_path / pattern))] == [names[k] for k in count], pattern
    both = TarShards([str(tmp_path / "part-000.tar"), str(tmp_path / "part-01*.tar")], val_fraction=0)
    assert [path.stem for path in both.paths] == ["part-000", "part-010", "part-011"]
    with pytest.raises(ValueError, match=r"2 of 13 shards do not exist; the first: .*part-012\.tar"):
        find_shards(str(tmp_path / "part-{001..013}.tar"))
    with pytest.raises(ValueError, match=r"no \.tar file there"):
        find_shards(str(tmp_path / "x*.tar"))
    with pytest.raises(ValueError, match=r"\{5\.\.2\} must go up"):
        find_shards("a-{5..2}.tar")
    with pytest.raises(ValueError, match="must go up, by fewer than 100,000"):
        find_shards("a-{0..99999999}.tar")


# ------------------------------------------------------------------------------------------------------- the index


def test_an_index_is_kept_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(shards(tmp_path))
    first = everything(TarShards(root))
    kept = sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("."))
    assert kept == [f".part-{k:03d}.tar.index.jsonl" for k in range(3)]
    monkeypatch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("read again"))
    assert everything(TarShards(root)) == first


def test_an_index_of_a_changed_shard_is_not_used(tmp_path: Path) -> None:
    root = shards(tmp_path, 1)
    TarShards(str(root))
    path = pack(root / "part-000.tar", sample(77) + sample(78))
    os.utime(path, ns=(1, 1))
    assert sorted(everything(TarShards(str(root)))) == ["00077", "00078"]


@pytest.mark.parametrize("damage", ["cut", "bytes", "count", "place", "kind", "empty"])
def test_a_damaged_index_is_made_again(damage: str, tmp_path: Path) -> None:
    root = shards(tmp_path, 1)
    first = everything(TarShards(str(root)))
    path = root / ".part-000.tar.index.jsonl"
    lines = path.read_text("utf-8").splitlines()
    whole = path.read_bytes()
    damaged = {
        "cut": whole[: len(whole) // 2],
        "bytes": whole[:-9] + b"\xff\xfe",
        "count": "\n".join(lines[:-1]).encode(),
        "place": whole.replace(b'"png", ', b'"png", 99999999', 1),
        "kind": whole.replace(b'["png"', b'[{"a": 1}', 1),
        "empty": b"",
    }[damage]
    assert damaged != whole
    path.write_bytes(damaged)
    assert everything(TarShards(str(root))) == first
    assert path.read_bytes() == whole, "and kept again"


def test_where_nothing_can_be_written_a_cache_folder_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = shards(tmp_path / "a")
    cached = TarShards(str(root), cache_dir=str(tmp_path / "cache"))
    assert len(list((tmp_path / "cache").iterdir())) == 3
    assert not list(root.glob(".*"))
    assert not cached.report.notes
    (tmp_path / "file").write_text("no folder")
    source = TarShards(str(root), cache_dir=str(tmp_path / "file" / "x"))
    assert everything(source) == everything(cached)
    (note,) = source.report.notes
    assert "name a cache_dir" in note
    assert source.report.notes[note] == 3


def test_more_shards_than_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "_OPEN", 2)
    before = open_files()
    source = TarShards(str(shards(tmp_path, 5, 2)), val_fraction=0)
    split = source.split("train")
    assert [split.image(i).getpixel((0, 0)) for i in range(10)] == [colour(i) for i in range(10)]
    assert open_files() == before


@settings(max_examples=40, deadline=None)
@given(
    names=st.lists(st.text("ab1_-한글 é", min_size=1, max_size=40), min_size=1, max_size=9, unique=True),
    sizes=st.lists(st.integers(0, 1500), min_size=9, max_size=9),
    format=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_offsets_are_those_of_tarfile(
    names: list[str], sizes: list[int], format: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng = np.random.default_rng(0)
    data = {f"{name}.jpg": rng.bytes(size) for name, size in zip(names, sizes, strict=False)}
    path = pack(tmp_path_factory.mktemp("s") / "a.tar", list(data.items()), format)
    samples, unkept = read_index(path)
    assert not unkept
    again, _ = read_index(path)
    assert again == samples
    raw = path.read_bytes()
    found = {s.key: raw[offset : offset + size] for s in samples for _, offset, size in s.images}
    assert found == {archives.join("", name)[:-4]: content for name, content in data.items()}  # type: ignore[index]


# ------------------------------------------------------------------------------------------------- faults and foes


def test_samples_that_cannot_be_used_are_counted_and_named(tmp_path: Path) -> None:
    bad: Members = [
        ("a.txt", b"no picture"), ("b.png", image(1)), ("c.png", image(2)), ("c.jpg", image(2)), ("c.txt", b"x"),
        ("d.png", image(3)), ("d.txt", b"\xff\xfa"), ("e.png", image(4)), ("e.json", b"{"),
        ("f.png", image(4)), ("f.txt", b"nan"),
    ]  # fmt: skip
    pack(tmp_path / "a.tar", [m for n in range(21) for m in sample(n)] + bad)
    source = TarShards(str(tmp_path), max_bad_fraction=0.25)
    assert len(everything(source)) == 21
    assert source.report.errors == {
        "no picture": 1, "no caption": 1, "several pictures": 1, "not UTF-8": 1, "not JSON": 1, "empty caption": 1,
    }  # fmt: skip
    assert source.report.first["no picture"] == ["a.tar:a"]
    assert source.report.first["several pictures"] == ["a.tar:c: png, jpg"]
    with pytest.raises(TooManyErrors, match=r"6 of 27 rows can't be used \(22\.2%"):
        TarShards(str(tmp_path))
    with pytest.raises(ValueError, match=r"max_bad_fraction \(2\)"):
        TarShards(str(tmp_path), max_bad_fraction=2)
    with pytest.raises(ValueError, match="no samples"):
        TarShards(str(pack(tmp_path / "b" / "empty.tar", [])))
    with pytest.raises(TooManyErrors, match="not one of 1 sample can"):
        TarShards(str(pack(tmp_path / "c" / "one.tar", bad[:1])))


HOSTILE: dict[str, tuple[tarfile.TarInfo, str]] = {
    "climbs": (member("../../etc/x.png"), "a path that climbs out of its shard"),
    "climbs in the middle": (member("a/../b.png"), "a path that climbs out of its shard"),
    "absolute": (member("/etc/x.png"), "an absolute path"),
    "drive": (member("C:\\x.png"), "an absolute path"),
    "url": (member("http://x/y.png"), "a URL"),
    "link": (member("x.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "is a link"),
    "hard link": (member("x.png", type=tarfile.LNKTYPE, linkname="00000.png"), "is a link"),
    "device": (member("x.png", type=tarfile.CHRTYPE), "no regular file"),
    "block device": (member("x.png", type=tarfile.BLKTYPE), "no regular file"),
    "pipe": (member("x.png", type=tarfile.FIFOTYPE), "no regular file"),
    "sparse": (member("x.png", type=tarfile.GNUTYPE_SPARSE), ""),
    "again": (member("00001.png"), "was there before, at byte 2048: a key must name one sample only"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_members_are_refused_by_name_and_byte(kind: str, tmp_path: Path) -> None:
    info, fault = HOSTILE[kind]
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, data in sample(0) + sample(1):
            archive.addfile(member(name, data), io.BytesIO(data))
        archive.addfile(info)
    with pytest.raises(ShardError, match=r"a\.tar: ") as error:
        TarShards(str(path))
    assert fault in str(error.value)
    assert "byte 4096" in str(error.value) or kind == "sparse"
    assert not list(tmp_path.glob(".*")), "no index of a shard that is not trusted"


def test_commands_and_addresses_are_refused() -> None:
    with pytest.raises(ValueError, match="would run a command"):
        TarShards("pipe:curl -s http://example.org/a.tar")
    with pytest.raises(ValueError, match="nothing is downloaded"):
        TarShards(["s3://bucket/a-{0..3}.tar"])


def test_a_pickle_in_a_shard_is_left_alone(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    members = [*sample(0), *((f"00000.{kind}", pickle.dumps(Bomb())) for kind in ("pyd", "pickle", "pth", "npy"))]
    assert list(everything(TarShards(str(pack(tmp_path / "a.tar", members))))) == ["00000"]
    assert not (tmp_path / "ran").exists()


def whole_tar(tmp_path: Path) -> tuple[Path, bytes]:
    path = pack(tmp_path / "a.tar", [m for n in range(3) for m in sample(n)])
    return path, path.read_bytes()


@pytest.mark.parametrize("where", [100, 512, 700, 1024, 1300, 2048, 2100, 6143, 6144, 6400])
def test_a_shard_that_is_cut_short_anywhere_is_refused(where: int, tmp_path: Path) -> None:
    path, data = whole_tar(tmp_path)
    path.write_bytes(data[:where])
    with pytest.raises(ShardError, match=r"a\.tar: .*(cut short|damaged tar)"):
        TarShards(str(path))


def test_damage_behind_the_first_member_is_found(tmp_path: Path) -> None:
    path, data = whole_tar(tmp_path)
    path.write_bytes(data[:2048] + b"\x07" * 512 + data[2560:])
    with pytest.raises(ShardError, match="what stands at byte 2,048 is neither a header nor the end"):
        TarShards(str(path))
    path.write_bytes(data + data)
    with pytest.raises(ShardError, match="there is more behind its end mark at byte 6,144: tars cannot be joined"):
        TarShards(str(path))
    path.write_bytes(b"no tar at all" * 99)
    with pytest.raises(ShardError, match="damaged tar"):
        TarShards(str(path))


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_a_compressed_shard_is_refused_with_the_remedy(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, f"w:{mode}") as archive:  # type: ignore[call-overload]
        for name, data in sample(0):
            archive.addfile(member(name, data), io.BytesIO(data))
    for name in (path, path.rename(tmp_path / f"a.tar.{mode}")):
        path.write_bytes((tmp_path / f"a.tar.{mode}").read_bytes()) if name == path else None
        with pytest.raises(ShardError, match="compressed as a whole"):
            TarShards(str(name))


def test_a_header_that_leads_backwards_ends(tmp_path: Path) -> None:
    path, data = whole_tar(tmp_path)
    header = bytearray(data[2048:2560])
    header[124:136] = (-1024 & ((1 << 96) - 1)).to_bytes(12, "big")  # a size below 0, in base 256
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(data[:2048] + bytes(header) + data[2560:])
    with pytest.raises(ShardError, match=r"leads backwards|damaged"):
        TarShards(str(path))


def test_a_shard_that_changes_under_a_run_is_said(tmp_path: Path) -> None:
    path, data = whole_tar(tmp_path)
    split = TarShards(str(path), val_fraction=0).split("train")
    path.write_bytes(data[:1000])
    with pytest.raises(ImageError, match=r"00002 \(byte 4608 of .*a\.tar\): can't be read .*has the shard changed"):
        split.image(2)


@settings(max_examples=150, deadline=None)
@given(
    places=st.lists(st.tuples(st.integers(0, 10239), st.integers(0, 255)), min_size=1, max_size=5), cut=st.booleans()
)
def test_no_damage_gives_anything_but_an_error_or_images(
    places: list[tuple[int, int]], cut: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path, whole = whole_tar(tmp_path_factory.mktemp("d"))
    data = bytearray(whole)
    for place, value in places:
        data[place % len(data)] = value
    path.write_bytes(bytes(data[: places[0][0]] if cut else data))
    try:
        split = TarShards(str(path), val_fraction=0, max_bad_fraction=1).split("train")
    except ValueError:
        return
    for i in range(len(split)):
        try:
            assert split.image(i).mode == "RGB"
        except ImageError:
            continue


# -------------------------------------------------------------------------------------------------------- in a run


def test_batches_and_resume_are_those_of_single_files(tmp_path: Path) -> None:
    source = TarShards(str(shards(tmp_path, 4, 6)), val_fraction=0.2, default_language="en")
    runs = [make(source, loader=LoaderConfig(num_workers=workers), batch_size=4) for workers in (0, 2)]
    whole = [batches_of(run, 1) for run in runs]
    for a, b in zip(*whole, strict=True):
        assert same(a, b)
    loader = runs[0].train_dataloader()
    loader.load_state_dict({"epoch": 1, "position": 8, "seed": 0, "num_samples": len(source.split("train"))})
    assert all(same(a, b) for a, b in zip(loader, whole[0][2:], strict=True))
    names = [name for batch in whole[0] for name in batch.names]
    assert sorted(names) == sorted(source.split("train").name(i) for i in range(len(source.split("train"))))


def test_shards_in_a_mixture(tmp_path: Path) -> None:
    parts = {name: TarShards(str(shards(tmp_path / name, 1, 9)), default_language="en") for name in ("a", "b")}
    mixture = Mixture(parts, {"a": 1.0, "b": 2.0}, epoch_size=12)  # type: ignore[arg-type]
    data = CaptionData(mixture, transform=TRANSFORM, tokenizer=tokenizer(), batch_size=4)
    names = [name for batch in batches_of(data) for name in batch.names]
    assert sum(name.startswith("a/") for name in names) == 4
    assert len(names) == 12


def test_a_path_is_told_what_it_holds(tmp_path: Path) -> None:
    root = shards(tmp_path / "shards")
    assert are_shards(root)
    assert are_shards(root / "part-000.tar")
    assert are_shards(str(root / "part-{000..002}.tar"))
    assert isinstance(open_pairs(root), TarShards)
    plain = tmp_path / "plain"
    plain.mkdir()
    for n in range(3):
        (plain / f"{n}.png").write_bytes(image(n))
        (plain / f"{n}.txt").write_text(f"caption {n}")
    assert not are_shards(plain)
    assert not are_documents(plain)
    assert isinstance(open_pairs(plain), PairFiles)
    packed = pack(tmp_path / "c.tar", [("a.png", image(1)), ("captions.csv", b"image,caption\na.png,x")])
    assert not are_shards(packed)
    pairs = plain / "pairs.jsonl"
    pairs.write_text('{"image": "0.png", "text": "a caption", "split": "train"}\n')
    assert not are_documents(pairs)
    assert isinstance(open_pairs(pairs), PairFiles)
    pairs.unlink()
    line = json.dumps({"text": "a <image> b", "images": ["0.png"]})
    (plain / "documents.jsonl").write_text(line + "\n")
    assert are_documents(plain)
    opened = open_pairs(plain, ReadOptions(val_fraction=0))
    assert opened.split("train").captions(0) == [Caption("b")]
    assert "1 document, 1 picture" in opened.describe()
    assert opened.report.rows == 1
