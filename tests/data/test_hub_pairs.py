"""Pairs of a data set on the hub: which files are fetched for which split, subsets, and folders laid out so."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmtransformer.data.captions import CaptionData
from mmtransformer.data.files.archives import Files
from mmtransformer.data.files.read_options import ReadOptions
from mmtransformer.data.hub_pairs import HubPairs
from mmtransformer.data.hub_splits import choose_files, splits_of_names
from mmtransformer.data.open_sources import hub_name, open_pairs
from mmtransformer.serialization.hub import HubOptions
from support.stand_in_hub import DatasetHub

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def png(name: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (7, 5), (len(name), 7, 200)).save(out, "PNG")
    return out.getvalue()


def shard(path: Path, names: Iterable[str], kind: str = "struct", **more: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(names)
    image = [{"bytes": png(name), "path": name} for name in names] if kind == "struct" else names
    rows = {"image": image, "caption": [f"this is {name}" for name in names]}
    pq.write_table(pa.table(rows | {key: [value] * len(names) for key, value in more.items()}), path)


def card(repo: Path, *configs: str) -> None:
    repo.mkdir(parents=True, exist_ok=True)
    (repo / "README.md").write_text("---\nconfigs:\n" + "".join(configs) + "---\n")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DatasetHub:
    monkeypatch.chdir(tmp_path)
    return DatasetHub(tmp_path / "repo", tmp_path / "cache").put(monkeypatch)


def sharded(repo: Path) -> None:
    for i in range(2):
        shard(repo / f"data/train-0000{i}-of-00002.parquet", [f"{i}{k}" for k in range(10)])
    shard(repo / "data/validation-00000-of-00001.parquet", ["v0", "v1"])
    shard(repo / "data/test-00000-of-00001.parquet", ["t0"])
    (repo / "README.md").write_text("words")
    (repo / "assets").mkdir()
    (repo / "assets/teaser.png").write_bytes(png("teaser"))


def names(source: Any, split: str) -> list[str]:
    found = source.split(split)
    assert all(found.image(i).size == (7, 5) for i in range(len(found)))
    return [found.captions(i)[0].text.removeprefix("this is ") for i in range(len(found))]


def test_the_files_of_a_split_are_fetched_when_it_is_asked_for(hub: DatasetHub) -> None:
    sharded(hub.repo)
    source = open_pairs("some/pairs", splits=["val"])
    assert hub.fetched == ["README.md", "data/validation-00000-of-00001.parquet"]
    assert isinstance(source, HubPairs)
    assert source.splits() == ("train", "val", "test")
    assert names(source, "val") == ["v0", "v1"]
    assert "val 2" in source.describe()
    hub.fetched.clear()
    assert names(source, "train") == [f"{i}{k}" for i in range(2) for k in range(10)]  # none of them is held out
    assert names(source, "train")
    assert hub.fetched == [f"data/train-0000{i}-of-00002.parquet" for i in range(2)]
    assert names(source, "test") == ["t0"]
    assert "assets/teaser.png" not in hub.fetched
    assert names(source, "validation") == ["v0", "v1"]
    with pytest.raises(ValueError, match=r"some/pairs has no split 'held'; it has: train, val, test"):
        source.split("held")
    hub.fetched.clear()
    with pytest.raises(ValueError, match=r"some/pairs has no split 'held'; it has: train, val, test"):
        open_pairs("some/pairs", splits=["held"])
    assert hub.fetched == []
    assert names(open_pairs("some/pairs", splits=["dev"]), "dev") == ["v0", "v1"]
    assert hub.fetched == []  # it is in the cache


def test_a_run_fetches_what_it_trains_and_validates_on(hub: DatasetHub) -> None:
    sharded(hub.repo)
    data = CaptionData("some/pairs", vocab_size=300)
    assert not any("test" in name for name in hub.fetched)
    assert len(data.pairs("train")) == 20
    assert len(data.pairs("val")) == 2
    assert data.source.languages == ()
    assert data.test_dataloader()
    assert any("test" in name for name in hub.fetched)


def test_without_val_a_part_of_train_is_held_out(hub: DatasetHub) -> None:
    shard(hub.repo / "data/train-00000-of-00001.parquet", [str(i) for i in range(40)])
    shard(hub.repo / "data/test-00000-of-00001.parquet", ["t0", "t1"])
    source = open_pairs("some/pairs", splits=["test"])
    assert source.splits() == ("train", "val", "test")
    assert not any("train" in name for name in hub.fetched)
    assert names(source, "test") == ["t0", "t1"]
    train, val = names(source, "train"), names(source, "val")
    assert sorted(train + val) == sorted(str(i) for i in range(40))
    assert 0 < len(val) < 12
    assert open_pairs("some/pairs", ReadOptions(val_fraction=0)).splits() == ("train", "test")
    assert names(open_pairs("some/pairs", splits=["val"]), "val") == val


def test_a_column_of_splits_does_not_overrule_the_files(hub: DatasetHub) -> None:
    shard(hub.repo / "train-00000-of-00001.parquet", [str(i) for i in range(9)], split="test")
    shard(hub.repo / "val-00000-of-00001.parquet", ["v"], split="restval")
    source = open_pairs("some/pairs")
    assert (len(source.split("train")), len(source.split("val"))) == (9, 1)
    assert "splits by its files" in source.describe()


def test_captions_of_a_later_split_have_the_language_of_the_first(hub: DatasetHub) -> None:
    shard(hub.repo / "train-0.parquet", ["빨간 개가 달려간다 하나", "a dog that runs"])
    shard(hub.repo / "test-0.parquet", ["a cat that sits"])
    source = open_pairs("some/pairs", ReadOptions(val_fraction=0), splits=["train"])
    assert {source.split("train").captions(i)[0].language for i in range(2)} == {"en", "ko"}
    assert source.split("test").captions(0)[0].language == "en"


def test_pictures_beside_tables_are_fetched_where_these_hold_paths(hub: DatasetHub) -> None:
    for kind in ("struct", "path"):
        hub.repo, hub.cache = hub.repo.with_name(f"repo-{kind}"), hub.cache.with_name(f"cache-{kind}")
        shard(hub.repo / "data/train-0.parquet", ["a.png", "b.png"], kind)
        shard(hub.repo / "data/test-0.parquet", ["c.png"], kind)
        for name in ("a.png", "b.png", "c.png"):
            (hub.repo / "images").mkdir(exist_ok=True)
            (hub.repo / "images" / name).write_bytes(png(name))
        hub.fetched.clear()
        source = open_pairs("some/pairs", ReadOptions(val_fraction=0), splits=["train"])
        assert names(source, "train") == ["a.png", "b.png"]
        assert ("images/a.png" in hub.fetched) == (kind == "path")
        assert "data/test-0.parquet" not in hub.fetched


def test_pictures_in_folders_of_splits_are_fetched_split_by_split(hub: DatasetHub) -> None:
    for split in ("train", "test"):
        (hub.repo / split).mkdir(parents=True)
        rows = ["file_name,text"]
        for i in range(3):
            (hub.repo / split / f"{split}{i}.png").write_bytes(png(f"{split}{i}"))
            rows.append(f"{split}{i}.png,this is {split}{i}")
        (hub.repo / split / "metadata.csv").write_text("\n".join(rows))
    source = open_pairs("some/pairs", splits=["test"])
    assert hub.fetched == [*(["README.md"] if (hub.repo / "README.md").exists() else []), "test/metadata.csv", *(
        f"test/test{i}.png" for i in range(3)
    )]  # fmt: skip
    assert names(source, "test") == ["test0", "test1", "test2"]


def test_pictures_with_texts_beside_them(hub: DatasetHub) -> None:
    for split in ("train", "test"):
        (hub.repo / split).mkdir(parents=True)
        for i in range(3):
            (hub.repo / split / f"{split}{i}.png").write_bytes(png(f"{split}{i}"))
            (hub.repo / split / f"{split}{i}.txt").write_text(f"this is {split}{i}")
    source = open_pairs("some/pairs", ReadOptions(val_fraction=0), splits=["test"])
    assert source.splits() == ("train", "test")
    assert names(source, "test") == ["test0", "test1", "test2"]
    assert not any("train" in name for name in hub.fetched)


def test_tars_of_samples_are_shards(hub: DatasetHub) -> None:
    for split in ("train", "val"):
        (hub.repo / split).mkdir(parents=True)
        with tarfile.open(hub.repo / split / "00000.tar", "w") as archive:
            for i in range(4):
                for ending, data in ((".png", png(f"{split}{i}")), (".txt", f"this is {split}{i}".encode())):
                    info = tarfile.TarInfo(f"{split}{i}{ending}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    source = open_pairs("some/pairs", splits=["val"])
    assert hub.fetched == ["val/00000.tar"]
    assert names(source, "val") == [f"val{i}" for i in range(4)]
    assert len(source.split("train")) == 4


def test_a_subset_is_named_as_the_card_does(hub: DatasetHub, capsys: pytest.CaptureFixture[str]) -> None:
    shard(hub.repo / "one/part-0.parquet", ["a", "b"])
    shard(hub.repo / "one/part-1.parquet", ["c"])
    shard(hub.repo / "two/part-0.parquet", ["d"])
    one = "- config_name: one\n  data_files:\n  - {split: train, path: one/part-0*}\n  - {split: held, path: [one/*]}\n"
    two = "- config_name: two\n  data_files: two/**\n"
    card(hub.repo, one, two)
    with pytest.raises(
        ValueError, match=r"has 2 subsets \(one, two\), which .*: name one with --subset .*--subset one"
    ):
        open_pairs("some/pairs")
    with pytest.raises(ValueError, match="some/pairs has no subset 'three'; it has: one, two"):
        open_pairs("some/pairs", ReadOptions(subset="three"))
    assert hub.fetched == []
    source = open_pairs("some/pairs", ReadOptions(subset="one", val_fraction=0), splits=["train"])
    assert source.splits() == ("train", "held")
    assert hub.fetched == ["README.md", "one/part-0.parquet"]
    assert names(source, "train") == ["a", "b"]
    assert names(source, "held") == ["c"]
    assert names(open_pairs("some/pairs", ReadOptions(subset="two", val_fraction=0)), "train") == ["d"]
    assert capsys.readouterr().err == ""
    card(hub.repo, one, two + "  default: true\n")
    (hub.cache / "datasets--some--pairs/snapshots" / ("a" * 40) / "README.md").unlink()
    assert names(open_pairs("some/pairs", ReadOptions(val_fraction=0)), "train") == ["d"]
    assert capsys.readouterr().err == "some/pairs: its subset two is taken, of one, two\n"


def test_a_folder_that_is_laid_out_so_is_read_by_its_card_too(tmp_path: Path) -> None:
    shard(tmp_path / "one/part-0.parquet", ["a", "b"])
    shard(tmp_path / "two/part-0.parquet", ["d"])
    read = ReadOptions(subset="one", val_fraction=0)
    with pytest.raises(
        ValueError, match=r"subset \(one\) would have no effect on .*, which is no data set with a card"
    ):
        open_pairs(tmp_path, read)
    configs = [f"- config_name: {name}\n  data_files: {name}/*\n" for name in ("one", "two")]
    card(tmp_path, *configs)
    assert names(open_pairs(tmp_path, read), "train") == ["a", "b"]
    with pytest.raises(ValueError, match="2 subsets"):
        open_pairs(tmp_path)


def test_parts_of_a_data_set_by_folder_file_and_pattern(hub: DatasetHub) -> None:
    sharded(hub.repo)
    places = {
        "data/validation-00000-of-00001.parquet": ["val"],
        "data/train-0000[0-9]*": ["train", "val"],
        "data/*-00000-*": ["train", "val", "test"],
        "**/test*": ["test"],
    }
    for below, splits in places.items():
        assert list(open_pairs(f"hf://datasets/some/pairs/{below}").splits()) == splits, below
    with pytest.raises(ValueError, match="some/pairs: the data set has nothing called dota"):
        open_pairs("hf://datasets/some/pairs/dota")
    hub.asked.clear()
    open_pairs("hf://datasets/some/pairs@refs/convert/parquet/data/", hub=HubOptions(token="secret"))
    assert {asked["revision"] for asked in hub.asked} == {"refs/convert/parquet"}
    assert {asked.get("token") for asked in hub.asked} == {None, "secret"}
    open_pairs("some/pairs@pr%2F1")
    assert hub.asked[-1]["revision"] == "pr/1"
    with pytest.raises(ValueError, match=r"names a revision, and hub\.revision is another one"):
        open_pairs("some/pairs@v1", hub=HubOptions(revision="v2"))


def test_offline_only_whole_sets_of_shards_are_taken(hub: DatasetHub) -> None:
    sharded(hub.repo)
    open_pairs("hf://datasets/some/pairs/data/train-00000*")
    offline = HubOptions(local_files_only=True)
    with pytest.raises(ValueError, match=r"1 of the 2 files data/train-\*-of-00002\.parquet are here"):
        open_pairs("some/pairs", hub=offline)
    assert len(open_pairs("hf://datasets/some/pairs/data/train-00000*", hub=offline).split("train"))
    open_pairs("some/pairs", splits=["train", "val"])
    assert open_pairs("some/pairs", hub=offline).splits() == ("train", "val")


def test_a_data_set_that_a_program_makes_is_not_run(hub: DatasetHub) -> None:
    hub.repo.mkdir()
    (hub.repo / "dataset_infos.json").write_text("{}")
    with pytest.raises(ValueError, match=r"some/pairs: no files with pictures or captions$"):
        open_pairs("some/pairs")
    (hub.repo / "pairs.py").write_text("raise SystemExit")
    with pytest.raises(ValueError, match=r"a program makes them, and it is not run: .*pairs@refs/convert/parquet"):
        open_pairs("some/pairs")


def test_what_is_no_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="names no data set on the hub"):
        hub_name("hf://models/some")
    with pytest.raises(ValueError, match=r"is an address.*: name the data set as hf://datasets/some/pairs$"):
        hub_name("https://hub.invalid/datasets/some/pairs/tree/main")
    with pytest.raises(ValueError, match=r"is an address.*: fetch the files first$"):
        hub_name("http://x.invalid/a.zip")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    places = ["photos/train", "some", "a/b/c", "./some/x", "/some/pairs", "some/pairs.csv", "some/photos.zip"]
    for here in [*places, "some/*", str(tmp_path / "no" / "such")]:
        assert hub_name(here) is None  # nobody is asked for what can only be a place here


def test_links_of_the_cache_lead_no_further_than_its_repository(hub: DatasetHub, tmp_path: Path) -> None:
    sharded(hub.repo)
    source = open_pairs("some/pairs", splits=["val"])
    root = hub.cache / "datasets--some--pairs/snapshots" / ("a" * 40)
    assert names(source, "val")
    (tmp_path / "outside.png").write_bytes(png("a"))
    (root / "z.png").symlink_to(tmp_path / "outside.png")
    assert "leads out of the root" in Files(root).refused["z.png"]


FILES = ["train/a.jsonl", "train/x/1.jpg", "test/a.jsonl", "test/2.jpg", "extra/3.jpg", "images.zip", "README.md"]


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (FILES, {"train/x/1.jpg": "train", "test/2.jpg": "test", "extra/3.jpg": None, "images.zip": None}),
        (["a.csv", "train/1.jpg"], {"a.csv": None, "train/1.jpg": None}),
        (["train.json", "val.json", "train2017/1.jpg"], {"train.json": "train", "train2017/1.jpg": None}),
        (["default/partial-train/0000.parquet", "default/test/0000.parquet"],
         {"default/partial-train/0000.parquet": "train", "default/test/0000.parquet": "test"}),
        (["data/train-0.parquet", "data/rest-0.parquet"], {"data/train-0.parquet": None}),
        (["train.parquet", "statistics.csv"], {"train.parquet": "train", "statistics.csv": "absent"}),
        (["train/1.jpg", "train/1.txt", "test/2.jpg"], {"train/1.txt": "train", "test/2.jpg": "test"}),
        (["test/1.jpg", "dev/2.jpg"], {"test/1.jpg": None, "dev/2.jpg": None}),
        (["train.zip", "val.zip", "notes.txt"], {"train.zip": "train", "val.zip": "val", "notes.txt": None}),
        (["train-station.jpg", "a.jpg"], {"train-station.jpg": None}),
        (["학습/0.parquet", "검증/0.parquet"], {"학습/0.parquet": "train", "검증/0.parquet": "val"}),
    ],
)  # fmt: skip
def test_what_names_tell_of_splits(files: list[str], told: dict[str, str | None]) -> None:
    found = splits_of_names(files)
    assert {file: found.get(file, "absent") for file in told} == told


CHOICES = ["a/train-0.parquet", "a/deep/1.parquet", "b.csv", "b/1.jpg", "pictures/2.jpg", "c.csv"]


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"data_files": "a/*.parquet"}, {"a/train-0.parquet": "train"}),
        ({"data_files": "a/**/*.parquet"}, {"a/train-0.parquet": "train", "a/deep/1.parquet": "train"}),
        ({"data_files": {"validation": "a/t*", "odd": ["a/d*/?.parquet"]}},
         {"a/train-0.parquet": "val", "a/deep/1.parquet": "odd"}),
        ({"data_files": [{"split": "test", "path": ["./a/[!x]*", "a/deep"]}]},
         {"a/train-0.parquet": "test", "a/deep/1.parquet": "test"}),
        ({"data_dir": "a", "data_files": "deep/*"}, {"a/deep/1.parquet": "train"}),
        ({"data_dir": "a/"}, {"a/train-0.parquet": None, "a/deep/1.parquet": None}),
        ({"data_files": ["b.csv", {"split": 3, "path": {}}, 7]}, {"b.csv": "train"}),
    ],
)  # fmt: skip
def test_what_a_card_gives_a_subset(config: dict[str, Any], wanted: dict[str, str | None]) -> None:
    configs = [{"config_name": "x", **config}, {"config_name": "y", "data_files": "c.csv"}]
    found, said = choose_files("n", CHOICES, configs, subset="x")
    pictures = {"b/1.jpg": None, "pictures/2.jpg": None}  # which tables may name, and no subset has
    assert found == wanted | pictures
    assert said == ""


def test_a_hostile_card_costs_no_time() -> None:
    files = [f"{'a/' * 40}{'a' * 200}{i}.jpg" for i in range(20)]
    patterns = ["/".join(["**", "a"] * 40) + "/b", "*a" * 90 + "b", "a/" * 40 + "*a" * 90 + "b", "[a" * 50, "[z-a]"]
    found, _ = choose_files("n", files, [{"data_files": patterns}])
    assert found == dict.fromkeys(files)


def test_a_name_that_holds_pictures_of_a_bad_size_is_checked_as_others_are(hub: DatasetHub) -> None:
    from mmtransformer.data.check import check

    sharded(hub.repo)
    Image.new("RGB", (9, 9)).save(hub.repo / "data/x.png")
    report = check(open_pairs("some/pairs", max_bad_fraction=1.0), progress=False)
    assert report.images == {"train": 20, "val": 2, "test": 1}
