"""ImageIndex: what is found, what is computed again, what a file that is stopped or damaged does."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmtransformer.images import ImageError
from mmtransformer.pipelines.search import index_file
from mmtransformer.pipelines.search.image_index import ImageIndex
from mmtransformer.pipelines.search.index_file import IndexFile
from mmtransformer.pipelines.search.nearest import groups_alike, nearest
from support.encoders import ColourEncoder

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.filterwarnings("ignore:1 picture cannot be used:UserWarning")  # cut.png, of most tests


def paint(path: Path, colour: str, second: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (16, 16), colour)
    if second:
        image.paste(second, (0, 0, 8, 8))
    image.save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six pictures in folders and an archive, one that is none, one that is cut."""
    folder = tmp_path / "사진 & <b>"
    paint(folder / "a.png", "red")
    paint(folder / "서울" / "b.png", "green")
    paint(folder / "서울" / "c.png", "blue")
    paint(folder / "d.png", "red", "blue")
    with zipfile.ZipFile(folder / "more.zip", "w") as archive:
        for name, colour in (("e[1].png", "lime"), ("빨강.png", "#fe0000")):
            archive.write(paint(tmp_path / "x.png", colour), name)
    whole = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.txt").write_text("no picture")
    return folder


def names(found) -> list[str]:
    return [match.name for match in found]


# ---------------------------------------------------------------------------------------------------- nearest


@pytest.mark.parametrize("k", [1, 7, 40])
def test_nearest_is_the_plain_product_in_float64(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmtransformer.pipelines.search.nearest._ROWS", 5)
    monkeypatch.setattr("mmtransformer.pipelines.search.nearest._PART", 10)
    vectors = F.normalize(torch.randn(37, 11), dim=-1).half()
    queries = F.normalize(torch.randn(3, 11), dim=-1)
    scores, places = nearest(queries, vectors, k)
    told = (queries.double() @ vectors.double().T).sort(descending=True)
    assert places.tolist() == told.indices[:, :k].tolist()
    assert torch.allclose(scores.double(), told.values[:, :k], atol=1e-6)


def test_of_equals_the_first_comes_first() -> None:
    vectors = F.normalize(torch.randn(1, 5), dim=-1).expand(9, 5)
    assert nearest(vectors[:1], vectors, 4)[1].tolist() == [[0, 1, 2, 3]]


def test_groups_are_the_connected_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmtransformer.pipelines.search.nearest._SIDE", 7)
    torch.manual_seed(5)
    vectors = F.normalize(torch.randn(61, 3), dim=-1)
    same = np.arange(61)
    same[[20, 50]] = 3
    seen = []
    for threshold in (0.9, 0.97, 0.995):
        alike = (vectors.double() @ vectors.double().T).numpy() >= threshold
        firsts = same == np.arange(61)
        alike &= firsts[:, None] & firsts[None]
        alike[np.arange(61), same] = True
        reached = (alike | alike.T).astype(float)
        reached = np.linalg.matrix_power(reached + np.eye(61), 61) > 0  # by at most 61 steps
        told = sorted({tuple(np.flatnonzero(row)) for row in reached if row.sum() > 1})
        groups = groups_alike(vectors, threshold, same, step=seen.append)
        assert [tuple(group) for group in groups] == told
        assert len(groups) > 1
    assert sum(seen) == 3 * 59
    assert groups_alike(vectors, None, same) == [[3, 20, 50]]


def test_who_is_near_one_of_a_group_belongs_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmtransformer.pipelines.search.nearest._SIDE", 5)
    star = torch.eye(20)  # all near the first, none near another one
    star[1:] = 0.95 * star[0] + (1 - 0.95**2) ** 0.5 * star[1:]
    assert groups_alike(star, 0.93, np.arange(20)) == [[*range(20)]]
    assert groups_alike(star, 0.96, np.arange(20)) == []


# ----------------------------------------------------------------------------------------------- what is found


def test_texts_and_pictures_find(photos: Path) -> None:
    bad: dict[str, ImageError] = {}
    index = ImageIndex.build(ColourEncoder(), photos, on_error=bad.__setitem__)
    assert sorted(index.contents.names) == sorted(
        ["a.png", "d.png", "more.zip/e[1].png", "more.zip/빨강.png", "서울/b.png", "서울/c.png"]
    )
    assert list(bad) == ["cut.png"]
    assert index.changes.new == 6
    assert "cut.png" in str(bad["cut.png"])
    with pytest.warns(
        UserWarning, match=r"1 picture cannot be used and is left out .changes.bad names all.: .*cut.png"
    ):
        ImageIndex.build(ColourEncoder(), photos)
    assert names(index.search("빨간 별", top_k=2)) == ["a.png", "more.zip/빨강.png"]
    assert names(index.search(["red", "blue"], top_k=1)) == ["d.png"]
    assert "d.png" not in names(index.search("red", without="blue", top_k=2))
    assert names(index.search(["red", "blue"], without=["blue"], top_k=1)) == ["a.png"]
    found = index.search_like(photos / "서울" / "c.png", top_k=20)
    assert len(found) == 5, "the picture itself is not found again"
    assert found[0].name == "d.png"
    again = index.search_like((photos / "서울" / "c.png").read_bytes(), top_k=1)
    assert (again[0].name, round(again[0].score, 3)) == ("서울/c.png", 1.0)
    both = index.search("green", like=[photos / "서울" / "c.png"], top_k=6)
    assert {"서울/b.png", "more.zip/e[1].png"} < set(names(both[:3]))
    shown = index.images(index.search("green", top_k=2))
    assert {shown.image(i).getpixel((0, 0)) for i in range(2)} == {(0, 128, 0), (0, 255, 0)}


def test_no_cosine_is_more_than_one(photos: Path) -> None:
    index = ImageIndex.build(ColourEncoder(), photos, on_error=lambda *_: None)
    index.contents.embeddings *= 1.0002  # what rounding to half precision may leave
    like = index.search_like((photos / "서울" / "c.png").read_bytes(), top_k=6)
    assert like[0].score == 1.0
    assert all(-1 <= match.score <= 1 for match in like)
    assert max(match.score for group in index.duplicates(threshold=0.99) for match in group) == 1.0


def test_a_query_that_says_nothing_is_refused(photos: Path) -> None:
    index = ImageIndex.build(ColourEncoder(), photos)
    for ask, said in (
        (lambda: index.search(), "nothing to look for"),
        (lambda: index.search(" "), "a text is empty"),
        (lambda: index.search("red", without=""), "a text is empty"),
        (lambda: index.search("red", without="red"), "nothing is left"),
        (lambda: index.search("red", top_k=0), "top_k must be a whole number, at least 1, not 0"),
        (lambda: index.duplicates(1.5), "threshold must be above 0 and at most 1, not 1.5"),
        (lambda: index.duplicates(0), "not 0"),
        (lambda: index.search_like(photos / "cut.png"), "cut.png"),
        (lambda: index.save(), "in memory alone"),
    ):
        with pytest.raises(ValueError, match=said):
            ask()


def test_duplicates_are_grouped(photos: Path, tmp_path: Path) -> None:
    shutil.copy(photos / "a.png", photos / "서울" / "copy.png")
    Image.open(photos / "d.png").resize((24, 24)).save(photos / "larger.png")
    index = ImageIndex.build(ColourEncoder(), photos)
    groups = index.duplicates(0.999)
    assert [names(group) for group in groups] == [
        ["a.png", "more.zip/빨강.png", "서울/copy.png"],
        ["d.png", "larger.png"],
        ["more.zip/e[1].png", "서울/b.png"],
    ]
    assert [one.exact for one in groups[0]] == [False, False, True]
    assert all(one.score > 0.999 for group in groups for one in group)
    assert [names(group) for group in index.duplicates(1.0)] == [["a.png", "서울/copy.png"]]


# ------------------------------------------------------------------------------------------- what is computed


def test_only_what_changed_is_computed(photos: Path, tmp_path: Path) -> None:
    path, encoder = tmp_path / "index.safetensors", ColourEncoder()
    first = ImageIndex.build(encoder, photos, path=path)
    assert encoder.computed == 6
    written = path.stat().st_mtime_ns

    assert ImageIndex.build(encoder, photos, path=path).changes.computed == 0
    assert path.stat().st_mtime_ns == written, "nothing changed, nothing is written"
    assert list(ImageIndex.build(encoder, photos, path=path).changes.bad) == ["cut.png"]

    paint(photos / "a.png", "#00f800")
    paint(photos / "new.png", "green", "red")
    (photos / "서울" / "b.png").rename(photos / "moved.png")
    os.utime(photos / "서울" / "c.png", ns=(1, 1))
    (photos / "d.png").unlink()
    paint(photos / "cut.png", "#300")
    index = ImageIndex.build(encoder, photos, path=path)
    changes = index.changes
    assert (changes.new, changes.changed, changes.gone, changes.computed, changes.bad) == (3, 1, 2, 3, {})
    assert encoder.computed == 9
    assert index.contents.names == sorted(index.contents.names)

    fresh = ImageIndex.build(ColourEncoder(), photos)
    assert fresh.contents.names == index.contents.names
    for part in ("embeddings", "hashes", "stamps"):
        assert torch.equal(getattr(fresh.contents, part), getattr(IndexFile.read(path), part)), part
    assert not torch.equal(first.contents.embeddings, fresh.contents.embeddings)
    assert ImageIndex.build(encoder, photos, path=path).changes.computed == 0
    assert encoder.computed == 9


def test_a_zip_that_is_written_anew_is_not_computed_anew(photos: Path, tmp_path: Path) -> None:
    path, encoder = tmp_path / "index.safetensors", ColourEncoder()
    before = ImageIndex.build(encoder, photos, path=path).contents
    with zipfile.ZipFile(photos / "more.zip", "a") as archive:
        archive.write(paint(tmp_path / "x.png", "yellow"), "f.png")
    index = ImageIndex.build(encoder, photos, path=path)
    assert index.changes.computed == 1
    stamps = dict(zip(index.contents.names, index.contents.stamps.tolist(), strict=True))
    assert [stamps[name] for name in before.names] == before.stamps.tolist(), "nothing else is even read"


def test_pictures_may_move_with_their_root(photos: Path, tmp_path: Path) -> None:
    path, encoder = tmp_path / "index.safetensors", ColourEncoder()
    ImageIndex.build(encoder, photos, path=path)
    other = tmp_path / "other"
    paint(other / "z.png", "red")
    with pytest.raises(ValueError, match=r"is an index of .*사진.*name it too, or another file"):
        ImageIndex.build(encoder, other, path=path)
    moved = photos.rename(tmp_path / "moved")
    index = ImageIndex.build(encoder, moved, path=path)
    assert index.changes.computed == 0
    assert index.search("red", top_k=1)[0].path == f"{moved}/a.png"
    assert ImageIndex.load(path, encoder).contents.root == str(moved)


STOPPED = """
import sys, time
from support.encoders import ColourEncoder
from mmtransformer.pipelines.search.image_index import ImageIndex

class Slow(ColourEncoder):
    def encode_images(self, images, *, batch_size=64):
        time.sleep(0.1)
        return super().encode_images(images, batch_size=batch_size)

from mmtransformer.pipelines.search.index_file import IndexFile
from mmtransformer.pipelines.search.image_index import absolute
from mmtransformer.pipelines.search.index_update import fingerprint
encoder = Slow()
index = ImageIndex(encoder, IndexFile(fingerprint(encoder), "", []), sys.argv[2])
index.update(sys.argv[1], batch_size=4, save_every=0.25)
"""


def test_an_index_that_is_written_while_it_is_read_is_read_again(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "index.safetensors"
    ImageIndex.build(ColourEncoder(), photos, path=path)
    first = IndexFile.read(path).names
    whole, real = path.read_bytes(), index_file.checksum
    calls: list[int] = []

    def replaced(tensors: dict[str, torch.Tensor]) -> str:
        calls.append(1)
        if len(calls) == 1:  # another process has put a newer file in its place since its head was read
            other = path.with_suffix(".new")
            other.write_bytes(whole)
            other.replace(path)
            return "of another file"
        return real(tensors)

    monkeypatch.setattr(index_file, "checksum", replaced)
    assert IndexFile.read(path).names == first
    assert len(calls) == 2
    monkeypatch.setattr(index_file, "checksum", lambda _: "of another file")
    with pytest.raises(ValueError, match="its check sum is another"):
        IndexFile.read(path)


def test_what_was_killed_is_gone_on_with(tmp_path: Path) -> None:
    folder, path = tmp_path / "photos", tmp_path / "kept" / "index.safetensors"
    for i in range(120):
        paint(folder / f"{i:03}.png", "red", f"#{i:02x}00{i:02x}")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    running = subprocess.Popen([sys.executable, "-c", STOPPED, str(folder), str(path)], env=environment)
    sizes = []
    try:
        for _ in range(3):  # three savings, each whole
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and running.poll() is None:
                if path.exists() and (found := len(IndexFile.read(path).names)) not in sizes:
                    sizes.append(found)
                    break
                time.sleep(0.02)
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    kept = IndexFile.read(path)
    assert len(sizes) == 3
    assert 0 < sizes[0] < sizes[2] <= len(kept.names) < 120
    encoder = ColourEncoder()
    index = ImageIndex.build(encoder, folder, path=path)
    assert encoder.computed == 120 - len(kept.names)
    assert torch.equal(index.contents.embeddings, ImageIndex.build(ColourEncoder(), folder).contents.embeddings)
    assert [p.name for p in path.parent.iterdir() if not p.name.startswith(".")] == [path.name]


def test_changed_pictures_stay_as_they_were_until_they_are_computed(photos: Path, tmp_path: Path) -> None:
    path, encoder = tmp_path / "index.safetensors", ColourEncoder()
    ImageIndex.build(encoder, photos, path=path)
    before = IndexFile.read(path)
    for colour, name in (("#123", "a.png"), ("#456", "d.png"), ("#789", "new.png"), ("#abc", "서울/b.png")):
        paint(photos / name, colour)

    class Interrupted(ColourEncoder):
        def encode_images(self, images, *, batch_size=64):
            if self.computed >= 2:
                raise KeyboardInterrupt
            return super().encode_images(images, batch_size=batch_size)

    index = ImageIndex.load(path, Interrupted())
    with pytest.raises(KeyboardInterrupt):
        index.update(batch_size=1)
    half = IndexFile.read(path)
    assert set(before.names) <= set(half.names)
    assert ImageIndex.build(encoder, photos, path=path).changes.computed == 2
    told = ImageIndex.build(ColourEncoder(), photos).contents
    assert torch.equal(IndexFile.read(path).embeddings, told.embeddings)


# ------------------------------------------------------------------------------------------- damaged and strange


def test_another_model_is_refused(photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "index.safetensors"
    ImageIndex.build(ColourEncoder(), photos, path=path, model_name="first")
    with pytest.raises(
        ValueError, match=r'index.safetensors: made by another model \("first"\).*delete this one'
    ) as told:
        ImageIndex.load(path, ColourEncoder(2.0))
    assert "\n" not in str(told.value)
    other = ColourEncoder()
    other.transform = type(other.transform)(8)
    with pytest.raises(ValueError, match=r"made by another model"):
        ImageIndex.build(other, photos, path=path)


def rewritten(path: Path, change) -> None:
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def resummed(change):
    """A change by one who knows the check sum."""
    from mmtransformer.serialization.checksums import checksum

    def both(tensors, metadata) -> None:
        change(tensors, metadata)
        metadata["checksum"] = checksum(tensors)

    return both


def text(value) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


DAMAGE = {
    "a bit": (lambda t, m: t["embeddings"].view(torch.uint8)[2, 3].bitwise_xor_(4), "damaged.*check sum"),
    "version": (lambda t, m: m.update(format_version="9"), "format version '9'.*reads 1; delete it"),
    "kind": (lambda t, m: m.update(kind="weights"), "no image index of mmtransformer"),
    "no metadata": (lambda t, m: m.clear(), "no image index of mmtransformer"),
    "a tensor less": (lambda t, m: t.pop("stamps"), "damaged"),
    "names less": (resummed(lambda t, m: t.update(names=text(["a.png"]))), "damaged .1 names"),
    "names climb": (resummed(lambda t, m: t.update(names=text(["../" * i + "a" for i in range(6)]))), "lead out"),
    "names absolute": (resummed(lambda t, m: t.update(names=text([f"/{i}" for i in range(6)]))), "lead out"),
    "names twice": (resummed(lambda t, m: t.update(names=text(["a"] * 6))), "stand twice"),
    "names deep": (resummed(lambda t, m: t.update(names=torch.full((200_000,), 91, dtype=torch.uint8))), "damaged"),
    "names numbers": (resummed(lambda t, m: t.update(names=text([1] * 6))), "names are no list of texts"),
    "bad": (resummed(lambda t, m: t.update(bad=text({"a": 1}))), "bad is no table"),
    "type": (resummed(lambda t, m: t.update(embeddings=t["embeddings"].float())), "embeddings are of type"),
    "places": (resummed(lambda t, m: m.update(places="7")), "places are no list"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_said_in_one_line(what: str, photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "index.safetensors"
    ImageIndex.build(ColourEncoder(), photos, path=path)
    change, said = DAMAGE[what]
    rewritten(path, change)
    with pytest.raises(ValueError, match=said) as told:
        ImageIndex.load(path, ColourEncoder())
    assert str(path) in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("left", [0, 5, 300, -1])
def test_a_file_cut_short_is_refused(left: int, photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "index.safetensors"
    ImageIndex.build(ColourEncoder(), photos, path=path)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match=r"index.safetensors: cut short, or no safetensors file.*delete it") as told:
        ImageIndex.build(ColourEncoder(), photos, path=path)
    assert "\n" not in str(told.value)


def test_numbers_that_are_not_finite_are_refused(photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "index.safetensors"
    ImageIndex.build(ColourEncoder(), photos, path=path)
    rewritten(path, resummed(lambda t, m: t["embeddings"][3, 1].fill_(float("nan"))))
    index = ImageIndex.load(path, ColourEncoder())
    for ask in (lambda: index.search("red"), lambda: index.duplicates(0.9)):
        with pytest.raises(ValueError, match=r"index.safetensors: holds numbers that are not finite; delete it"):
            ask()

    class Broken(ColourEncoder):
        def encode_images(self, images, *, batch_size=64):
            return super().encode_images(images) * float("inf")

    with pytest.raises(ValueError, match=r"a.png a vector that is not finite"):
        ImageIndex.build(Broken(), photos)


def test_places_without_pictures_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    (tmp_path / "worse.jpg").write_bytes(b"")
    for place, said in (
        ("empty", "empty: no pictures there"),
        ("missing", "missing: cannot be read"),
        ("*.gif", "no file fits this pattern"),
        ("bad.jpg", "bad.jpg: not a picture"),
        ("*.jpg", "bad.jpg: not a picture.*; nor can 1 other picture be used"),
    ):
        with pytest.raises(ValueError, match=said) as told:
            ImageIndex.build(ColourEncoder(), tmp_path / place)
        assert "\n" not in str(told.value)
    with pytest.raises(ValueError, match=r"there is no picture to index"):
        ImageIndex.build(ColourEncoder(), [])
    paint(tmp_path / "good.jpg", "red")
    with pytest.raises(ValueError, match=r"is a folder"):
        ImageIndex.build(ColourEncoder(), tmp_path / "good.jpg", path=tmp_path / "empty")
    with pytest.raises(ValueError, match=r"batch_size must be a whole number"):
        ImageIndex.build(ColourEncoder(), tmp_path / "good.jpg", batch_size=0)


def test_bad_pictures_are_tried_again_when_something_else_reads_them(photos: Path, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "index.safetensors"
    assert ImageIndex.build(ColourEncoder(), photos, path=path).changes.tried == ["cut.png"]
    assert ImageIndex.build(ColourEncoder(), photos, path=path).changes.tried == []
    monkeypatch.setattr("mmtransformer.pipelines.search.index_update.readers", lambda: "another Pillow")
    assert ImageIndex.build(ColourEncoder(), photos, path=path).changes.tried == ["cut.png"]
    assert ImageIndex.build(ColourEncoder(), photos, path=path).changes.tried == []
