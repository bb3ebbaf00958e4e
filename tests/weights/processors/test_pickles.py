"""torch's own files: tensors alone, sizes checked first."""

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from mmtransformer.weights.shared.folders import read_tensors
from mmtransformer.weights.shared.pickles import read_pickle


class Harm:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("inside", [(), ("model",), ("state_dict",)])
def test_tensors_as_they_were(inside: tuple[str, ...], tmp_path: Path) -> None:
    whole = torch.randn(3, 5)
    state: Any = {"a": whole, "b": whole, "half": torch.randn(2).half(), "part": torch.randn(4, 4)[:2]}
    kept = dict(state)
    for name in inside:
        state = {name: state, "epoch": 3}
    torch.save(state, tmp_path / "pytorch_model.bin")
    found = read_tensors(tmp_path)
    assert found.keys() == kept.keys()
    assert all(torch.equal(found[name], kept[name]) for name in kept)
    assert found["a"].data_ptr() == found["b"].data_ptr()  # tied stays tied


def test_what_is_refused(tmp_path: Path) -> None:
    path, harm = tmp_path / "x.bin", tmp_path / "harm"
    torch.save({"a": torch.ones(2), "b": Harm(harm)}, path)
    with pytest.raises(ValueError, match=r"x\.bin: holds more than tensors"):
        read_pickle(path)
    assert not harm.exists()
    with pytest.raises(ValueError, match=r"Unsupported global: GLOBAL .*allowed global by default\)") as error:
        read_pickle(path)
    assert "weights_only" not in str(error.value)
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"not a file of torch 1\.6 or later"):
        read_pickle(path)
    torch.save({"a": torch.ones(1).expand(1 << 20, 1 << 20)}, path)
    with pytest.raises(ValueError, match=r"a claims a shape of \(1048576, 1048576\) beyond its bytes"):
        read_pickle(path)
    torch.save({"step": 3}, path)
    with pytest.raises(ValueError, match="holds no tensors by name"):
        read_pickle(path)
    torch.save({"a": torch.zeros(1 << 16)}, tmp_path / "y.bin")
    with zipfile.ZipFile(tmp_path / "y.bin") as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            target.writestr(member.filename, source.read(member))
    with pytest.raises(ValueError, match="holds compressed parts"):
        read_pickle(path)
    path.write_bytes((tmp_path / "y.bin").read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"x\.bin: cut short, .*: download it again"):
        read_pickle(path)
    torch.save({"a": torch.tensor([1.0, torch.nan])}, path)
    with pytest.raises(ValueError, match=r"x\.bin: a has 1 numbers that are NaN, of 2"):
        read_pickle(path)


def test_shards_and_adapters(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-1.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text('{"weight_map": {"a": "pytorch_model-1.bin"}}')
    assert read_tensors(tmp_path).keys() == {"a"}
    index.write_text('{"weight_map": {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}}')
    with pytest.raises(ValueError, match=r"lacks 1 of 2 files .* pytorch_model-2\.bin the first: it was not down"):
        read_tensors(tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter without the model that it was trained on"):
        read_tensors(tmp_path)
