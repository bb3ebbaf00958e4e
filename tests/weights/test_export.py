"""Captioners of this library, written as transformers has them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig

from mmtransformer import (
    ImageCaptioner,
    ImageTransform,
    TextDecoder,
    Tokenizer,
    VisionEncoderDecoder,
    ViT,
    ViTPatchConfig,
)
from mmtransformer.weights import captioner_folders, from_transformers, load_vit
from mmtransformer.weights.captioner_folders import export_captioner
from support.cli import mmt


def captioner() -> VisionEncoderDecoder:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_embd=20, n_layer=1, n_head=2, n_positions=31)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        ViTConfig(hidden_size=20, num_hidden_layers=1, num_attention_heads=4, image_size=28, patch_size=7), config
    )
    return from_transformers(VisionEncoderDecoderModel(config))


def test_an_own_captioner_is_written_with_its_tokenizers_ids(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["a red star"], 300)
    model = captioner()
    assert export_captioner(model, tokenizer, ImageTransform(28), tmp_path / "out") == "vision-encoder-decoder"
    said = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    names = ("decoder_start_token_id", "eos_token_id", "pad_token_id")
    assert [said[name] for name in names] == [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
    tower = ViT(16, 8, 24, 1, 4, patches=ViTPatchConfig(stem="conv"), class_token=False, pool="mean")
    other = VisionEncoderDecoder(tower, TextDecoder(300, 24, 1, 4, context_dim=24, max_len=32))
    with pytest.raises(ValueError, match=r"BLIP's vision tower has a class token \(this: none\), patches .*conv"):
        export_captioner(other, tokenizer, ImageTransform(16), tmp_path / "other")
    with pytest.raises(ValueError, match=r"a public model can, .* can be shared as it is: .*, patches\.stem='conv'$"):
        export_captioner(other, tokenizer, ImageTransform(16), tmp_path / "other")
    with pytest.raises(ValueError, match=r"^gpt2 is no family of a VisionEncoderDecoder, which fits .*vision-encoder"):
        export_captioner(other, tokenizer, ImageTransform(16), tmp_path / "other", "gpt2")
    assert not (tmp_path / "other").exists()


def test_weights_in_torchs_own_file_are_told_of_safetensors(tmp_path: Path) -> None:
    torch.save(ViT(32, 8, 16, 1, 2).state_dict(), tmp_path / "tower.pth")
    with pytest.raises(ValueError, match=r"tower.pth: not a whole safetensors.*; torch.load\(.*save_file make one"):
        load_vit(tmp_path / "tower.pth")


@pytest.mark.parametrize("where", ["out", "a/b/out", "empty"])
def test_an_export_that_fails_leaves_nothing(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = Tokenizer.train(["a red star"], 300)
    ImageCaptioner(captioner(), tokenizer, ImageTransform(28), device="cpu").save_pretrained("own")
    assert mmt(capsys, "export", "own", "public")[0] == 0
    Path("empty").mkdir()
    for model, last in (("own", (Tokenizer, "save_pretrained")), ("public", (captioner_folders, "_write_card"))):
        for fault in (OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("odd")):

            def full(*given: Any, fault: BaseException = fault, **_: Any) -> None:
                folder = next(path for path in reversed(given) if isinstance(path, Path))
                assert (folder / "model.safetensors").exists()
                if isinstance(fault, OSError):
                    fault.filename = str(folder / "tokenizer.json")
                raise fault

            before = sorted(tmp_path.rglob("*"))
            with monkeypatch.context() as patch:
                patch.setattr(*last, full)
                if isinstance(fault, RuntimeError):
                    with pytest.raises(RuntimeError, match="odd"):
                        mmt(capsys, "export", model, where)
                else:
                    code, _, err = mmt(capsys, "export", model, where)
                    full_disk = f"mmt export: error: {tmp_path / where}/tokenizer.json: No space left on device\n"
                    wanted = (2, full_disk) if isinstance(fault, OSError) else (130, "mmt: interrupted\n")
                    assert (code, err) == wanted
            left = [path for path in sorted(tmp_path.rglob("*")) if path not in before]
            assert [str(path.relative_to(tmp_path)) for path in left] in ([], ["a", "a/b"])
        assert mmt(capsys, "export", model, f"{where}/")[0] == 0
        assert {"config.json", "model.safetensors", "tokenizer.json"} < {path.name for path in Path(where).iterdir()}
        assert mmt(capsys, "export", model, where)[0] == 2  # it is there
        for path in Path(where).iterdir():
            path.unlink()
