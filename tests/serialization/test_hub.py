"""Names on the hub: what is looked at first, what is fetched, and what a refusal says; a hub that stands in for it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import errors

from mmtransformer.serialization.hub import HubOptions, fetch, files_of
from mmtransformer.weights import load_tokenizer

FILES = {
    "config.json": 100, "model.safetensors": 900_000_000, "pytorch_model.bin": 900_000_000, "onnx/model.onnx": 7,
    "tokenizer.json": 5, "qformer_tokenizer/vocab.txt": 9, "model.fp16.safetensors": 8, "picture.png": 3,
}  # fmt: skip


class Hub:
    """Stands in for the hub: what it is asked for is remembered."""

    def __init__(self, folder: Path, refusal: Exception | None = None) -> None:
        self.folder, self.refusal, self.asked = folder, refusal, []

    def model_info(self, api: Any, name: str, **options: Any) -> Any:
        self.asked.append(("info", options["revision"]))
        if self.refusal is not None:
            raise self.refusal
        files = [SimpleNamespace(rfilename=name, size=size) for name, size in FILES.items()]
        card, weights = {"license": "bsd-3-clause"}, SimpleNamespace(total=225_000_000)
        return SimpleNamespace(siblings=files, sha="a" * 40, card_data=card, safetensors=weights)

    def hf_hub_download(self, name: str, file: str, **options: Any) -> str:
        self.asked.append((file, options["revision"]))
        return str(self.folder / file)

    def snapshot_download(self, name: str, **options: Any) -> str:
        if options.get("local_files_only"):
            raise errors.LocalEntryNotFoundError("no")
        self.asked.append((tuple(options["allow_patterns"]), options["revision"]))
        return str(self.folder)


def stands_in(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> Hub:
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda api, name, **o: hub.model_info(api, name, **o))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def answer(kind: type, code: int) -> Exception:
    return kind("it says no", response=httpx2.Response(code, request=httpx2.Request("GET", "https://x.invalid")))


def test_the_config_is_looked_at_before_weights_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = stands_in(monkeypatch, Hub(tmp_path))
    seen: list[Path] = []
    assert fetch("some/one", HubOptions(revision="v1"), look=seen.append) == tmp_path
    wanted = ("config.json", "tokenizer.json", "qformer_tokenizer/vocab.txt", "model.safetensors")
    assert seen == [tmp_path]
    assert hub.asked == [("info", "v1"), ("config.json", "v1"), (wanted, "v1")]
    said = capsys.readouterr().err
    assert said == "some/one: 0.9 GB to fetch in 4 files; licence: bsd-3-clause; 0.9 GB of memory in float32\n"

    def refuse(folder: Path) -> None:
        raise ValueError("a text model alone")

    hub.asked.clear()
    with pytest.raises(ValueError, match="a text model alone"):
        fetch("some/one", look=refuse)
    assert [what for what, _ in hub.asked] == ["info", "config.json"]


def test_a_tokenizer_is_fetched_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = stands_in(monkeypatch, Hub(tmp_path))
    with pytest.raises(ValueError, match="tokenizer"):  # the folder is empty
        load_tokenizer("some/one")
    assert hub.asked == [("info", None), (("config.json", "tokenizer.json", "qformer_tokenizer/vocab.txt"), None)]


def test_which_files_make_a_model() -> None:
    assert files_of(["a.safetensors", "model-1.safetensors", "model.safetensors.index.json"]) == [
        "model.safetensors.index.json",
        "model-1.safetensors",
    ]
    assert files_of(["pytorch_model.bin", "training_args.bin", "x/pytorch_model.bin"]) == ["pytorch_model.bin"]
    assert files_of(["checkpoint.pt"]) == ["checkpoint.pt"]


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        (answer(errors.RepositoryNotFoundError, 404), "no such model on the hub, or a private one"),
        (answer(errors.GatedRepoError, 403), "gated: accept its conditions on its page"),
        (answer(errors.RevisionNotFoundError, 404), "no such revision"),
        (answer(errors.HfHubHTTPError, 401), r"does not give it to you \(401\)"),
        (errors.OfflineModeIsEnabled("offline"), r"out of reach.*hf download some/one --local-dir FOLDER"),
        (httpx2.ConnectError("refused"), "out of reach, and its cache has not got it"),
        (answer(errors.HfHubHTTPError, 503), "the hub answers with 503, and its cache has not got it"),
    ],
)
def test_what_a_refusal_says(refusal: Exception, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = stands_in(monkeypatch, Hub(tmp_path, refusal))
    with pytest.raises(ValueError, match=message) as error:
        fetch("some/one")
    assert str(error.value).startswith("some/one: ")
    assert "\n" not in str(error.value)
    assert len(hub.asked) == 1  # and no second try


def test_what_does_not_fit_on_the_disk_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = stands_in(monkeypatch, Hub(tmp_path))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=200_000_000))
    with pytest.raises(ValueError, match=r"0\.9 GB to fetch, and .* has 0\.2 GB left"):
        fetch("some/one", HubOptions(cache_dir=tmp_path / "not" / "yet"))
    assert [what for what, _ in hub.asked] == ["info"]
