"""Data sets on the hub: what there is, what is fetched of it, what a refusal says; a hub that stands in for it."""

import random
from fnmatch import fnmatch
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import errors

from mmtransformer.serialization.hub import HubOptions
from mmtransformer.serialization.hub_dataset import HubDataset, card_configs, patterns_of
from support.stand_in_hub import DatasetHub

NAMES = ["train/a [1].png", "train/metadata.csv", "test/b.png", "test/deep/c.png", "load.py", ".gitattributes"]
CARD = "---\nlicense: mit\nconfigs:\n- config_name: ai2d\n  data_files: train/*\n- no mapping\n---\n# Words\n"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DatasetHub:
    repo = tmp_path / "repo"
    for name in NAMES:
        (repo / name).parent.mkdir(parents=True, exist_ok=True)
        (repo / name).write_text(name)
    (repo / "README.md").write_text(CARD)
    return DatasetHub(repo, tmp_path / "cache").put(monkeypatch)


def test_what_is_asked_for_is_fetched_without_programs(hub: DatasetHub) -> None:
    options = HubOptions(revision="v1", token="secret", cache_dir=hub.cache)
    data = HubDataset.on_hub("some/pairs", options)
    assert set(data.files) == {*NAMES[:4], "README.md"}
    assert data.programs
    assert [config["config_name"] for config in data.configs] == ["ai2d"]
    assert hub.asked[0]["revision"] == "v1"
    assert hub.fetched == []
    folder = data.fetch(["train/a [1].png", "train/metadata.csv"])
    assert hub.fetched == ["README.md", "train/a [1].png", "train/metadata.csv"]
    assert (folder / "train/a [1].png").read_text() == "train/a [1].png"
    wanted = {"revision": "v1", "cache_dir": hub.cache, "token": "secret"}
    assert hub.asked[1] == wanted | {"allow_patterns": ["README.md", "train/*"]}
    data.fetch(data.files)
    assert sorted(hub.fetched) == sorted(data.files)


def test_what_the_cache_has_is_taken_where_the_hub_is_out_of_reach(
    hub: DatasetHub, capsys: pytest.CaptureFixture[str]
) -> None:
    HubDataset.on_hub("some/pairs").fetch(["test/b.png"])
    assert capsys.readouterr().err == ""
    hub.refusal = errors.OfflineModeIsEnabled("offline")
    asked = len(hub.asked)
    for options in (HubOptions(), HubOptions(local_files_only=True)):
        data = HubDataset.on_hub("some/pairs", options)
        assert data.partial
        assert set(data.files) == {"README.md", "test/b.png"}
        assert [config["config_name"] for config in data.configs] == ["ai2d"]
        assert (data.fetch(["test/b.png"]) / "test/b.png").exists()
        assert capsys.readouterr().err == "some/pairs: the hub was not asked; its cache has 2 files of it\n"
    assert len(hub.asked) == asked + 1  # local_files_only asks nobody


def test_shards_that_are_not_all_here_are_refused() -> None:
    files = [f"data/train-0000{i}-of-00003.parquet" for i in range(3)]
    data = HubDataset("some/pairs", dict.fromkeys(files, 1), None)
    data.refuse_parts(files)
    with pytest.raises(ValueError, match=r"2 of the 3 files data/train-\*-of-00003\.parquet are here"):
        data.refuse_parts(files[1:])


@pytest.mark.parametrize(
    "card",
    [
        "",
        "# no front matter\n---\nconfigs: [a]\n---\n",
        "---\nconfigs: {a: 1\n---\n",
        "---\n- a\n---\n",
        f"---\n{'[' * 5000}\n---\n",
        "---\n&a [*a]\n---\n",
    ],
)
def test_a_card_that_says_nothing_of_subsets(card: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card)
    assert card_configs(tmp_path) is None
    (tmp_path / "README.md").write_bytes(b"\xef\xbb\xbf---\r\nconfigs:\r\n- config_name: \xff\r\n---\r\n")
    assert len(card_configs(tmp_path)) == 1
    (tmp_path / "README.md").unlink()
    assert card_configs(tmp_path) is None


def test_patterns_fit_what_is_wanted_and_nothing_else() -> None:
    chance = random.Random(0)
    for _ in range(50):
        parts = ["a", "b[1]", "*", "ab", "?"]
        files = {"/".join(chance.choices(parts, k=chance.randint(0, 3)) + [f"{i}.png"]) for i in range(40)}
        folder = chance.choice(parts)
        wanted = [file for file in files if file.startswith(f"{folder}/") or chance.random() < 0.2]
        patterns = patterns_of(wanted, files)
        assert {file for file in files if any(fnmatch(file, pattern) for pattern in patterns)} == set(wanted)
    many = [f"train/{i}.png" for i in range(9999)]
    assert patterns_of(many, [*many, "test/0.png"]) == ["train/*"]


def test_what_is_large_is_said_before_and_what_does_not_fit_is_not_begun(
    hub: DatasetHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.sizes["test/b.png"] = 3_000_000_000
    data = HubDataset.on_hub("some/pairs", HubOptions(cache_dir=hub.cache))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("", (), {"free": 2_000_000_000}))
    with pytest.raises(ValueError, match=r"3\.0 GB to fetch, and .* has 2\.0 GB left"):
        data.fetch(["test/b.png"])
    assert hub.fetched == []
    data.fetch(["test/deep/c.png"])
    monkeypatch.undo()
    assert capsys.readouterr().err == ""
    hub.put(monkeypatch)
    data.fetch(["test/b.png"])
    assert capsys.readouterr().err == "some/pairs: 3.0 GB to fetch in 1 file; licence: mit\n"


def answer(kind: type, code: int) -> Exception:
    return kind("it says no", response=httpx2.Response(code, request=httpx2.Request("GET", "https://x.invalid")))


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        (answer(errors.RepositoryNotFoundError, 404), "no such folder here, and no such data set on the hub"),
        (answer(errors.GatedRepoError, 403), "gated"),
        (httpx2.ConnectError("refused"), "out of reach.*hf download some/pairs --repo-type dataset --local-dir FOLDER"),
    ],
)
def test_what_is_said_of_a_data_set_that_cannot_be_had(refusal: Exception, message: str, hub: DatasetHub) -> None:
    hub.refusal = refusal
    with pytest.raises(ValueError, match=message) as error:
        HubDataset.on_hub("some/pairs")
    assert "\n" not in str(error.value)
