"""dtype="auto": bfloat16 where there are kernels for it, float32 elsewhere, and what was taken is said."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mmtransformer import ImageCaptioner
from mmtransformer.layers import kernels, weight_prepacking
from mmtransformer.layers.weight_prepacking import Int8Linear
from mmtransformer.pipelines.base import resolve_precision
from support.cli import mmt
from support.hub import folder
from support.public import pictures


@pytest.mark.parametrize(
    ("have", "taken", "said"),
    [
        ({"avx512_bf16": True}, "bf16", "precision: bf16 on cpu, which has avx512_bf16\n"),
        ({"avx512_bf16": True, "amx_bf16": True}, "bf16", "precision: bf16 on cpu, which has amx_bf16, avx512_bf16\n"),
        ({"avx2": True, "avx512_bf16": False}, "fp32", "precision: fp32 on cpu, which has no bfloat16 kernels\n"),
    ],
)
def test_auto_is_what_the_machine_is_fast_at(
    have: dict[str, bool], taken: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: have, raising=False)
    monkeypatch.setattr(kernels, "bfloat16_gain", lambda: 1.9)
    for words in (("auto", None), ("fp32", "auto")):
        assert resolve_precision(*words, "cpu") == taken
        assert capsys.readouterr().err == said


def test_two_names_say_one_thing(capsys: pytest.CaptureFixture[str]) -> None:
    assert resolve_precision("fp32", None, None) == resolve_precision("fp32", "float32", None) == "fp32"
    assert resolve_precision("bf16", "bfloat16", None) == resolve_precision("fp32", str(torch.bfloat16), None) == "bf16"
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match='precision must be one of fp32, bf16, int8, not "bf15"'):
        resolve_precision("bf15", None, None)
    with pytest.raises(ValueError, match='dtype must be one of auto, float32, bfloat16, not "float16"'):
        resolve_precision("fp32", "float16", None)
    with pytest.raises(ValueError, match=r"dtype \(float32\) and precision \(int8\) say two things"):
        resolve_precision("int8", "float32", None)


def test_it_reaches_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, image = folder(tmp_path / "base", "git"), tmp_path / "x.png"
    pictures()[0].save(image)
    have: Any = {"avx512_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: have, raising=False)
    monkeypatch.setattr(kernels, "bfloat16_gain", lambda: 1.9)
    model = ImageCaptioner.from_pretrained(base, device="cpu", dtype="auto")
    model(image, max_new_tokens=3)
    assert {p.dtype for p in model.model.parameters()} == {torch.bfloat16}
    words = ["caption", str(image), "--model", str(base), "--device", "cpu", "--precision", "auto"]
    code, _, err = mmt(capsys, *words, "--max-new-tokens", "3")
    assert (code, "precision: bf16 on cpu, which has avx512_bf16" in err) == (0, True)


def test_auto_is_8_bits_for_a_language_model_larger_than_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, image = folder(tmp_path / "base", "git"), tmp_path / "x.png"
    pictures()[0].save(image)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True}, raising=False)
    monkeypatch.setattr(weight_prepacking, "_last_cache", lambda: 1000)
    model = ImageCaptioner.from_pretrained(base, device="cpu", dtype="auto")
    assert capsys.readouterr().err.endswith("precision: int8 on cpu, whose cache is smaller than the language model\n")
    assert model(image, max_new_tokens=3)
    assert any(isinstance(layer, Int8Linear) for layer in model.model.modules())
    assert {p.dtype for p in model.model.parameters()} == {torch.float32}
