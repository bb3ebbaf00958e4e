"""What is said of towers' names that are misspelt, and of a hub that is out of reach; no name is asked for twice."""

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import errors

from mmtransformer.weights import from_timm, load_vit, save_timm

NAME = "vit_tiny_patch16_224"
ADVICE = r"the hub is out of reach.*: where there is a network, `hf download {} --local-dir FOLDER`"


@pytest.fixture(autouse=True)
def out_of_reach(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub that does not answer, and the names that it was asked for."""
    asked: list[str] = []

    def model_info(api: Any, name: str, **options: Any) -> Any:
        asked.append(name)
        raise errors.OfflineModeIsEnabled("offline")

    def patient(*args: Any, **options: Any) -> Any:
        raise AssertionError("this tries six times, 23 seconds long")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", patient)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", patient)
    return asked


def test_the_nearest_name_that_loads_comes_first() -> None:
    with pytest.raises(ValueError, match="no timm model; did you mean deit_tiny_patch16_224, "):
        load_vit("deit_tny_patch16_224")


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        (NAME, f"timm/{NAME}.augreg_in21k_ft_in1k"),
        (f"hf-hub:timm/{NAME}@v1", f"timm/{NAME}"),
        (f"timm/{NAME}", f"timm/{NAME}"),
        ("openai/clip-vit-base-patch32", "openai/clip-vit-base-patch32"),
    ],
)
def test_a_hub_out_of_reach_is_asked_once(name: str, repository: str, out_of_reach: list[str]) -> None:
    with pytest.raises(ValueError, match=ADVICE.format(repository)) as error:
        load_vit(name)
    assert out_of_reach == [repository]
    assert "\n" not in str(error.value)


def test_what_the_cache_has_is_loaded_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(tmp_path / name.partition("/")[2]))
    theirs = timm.create_model("test_vit").eval()
    save_timm(from_timm(theirs), tmp_path / "test_vit.r160_in1k")
    shutil.copytree(tmp_path / "test_vit.r160_in1k", tmp_path / "tower")
    assert timm.get_pretrained_cfg("test_vit").hf_hub_id == "timm/test_vit.r160_in1k"
    pixels = torch.randn(1, 3, 160, 160)
    for name in ("test_vit", "hf-hub:some/tower@v1", "some/tower"):
        vit = load_vit(name, keep_head=True)
        torch.testing.assert_close(vit(pixels), theirs(pixels), atol=1e-5, rtol=1e-5)


def test_names_without_weights_are_told() -> None:
    with pytest.raises(ValueError, match="vit_small_patch16_36x1_224: timm has no weights of that name"):
        load_vit("vit_small_patch16_36x1_224")
