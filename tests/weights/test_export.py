"""Captioners of this library, written as transformers has them."""

import json
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig

from mmtransformer import ImageTransform, TextDecoder, Tokenizer, VisionEncoderDecoder, ViT, ViTPatchConfig
from mmtransformer.weights import from_vision_encoder_decoder, load_vit
from mmtransformer.weights.public import export_captioner


def test_an_own_captioner_is_written_with_its_tokenizers_ids(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["a red star"], 300)
    config = GPT2Config(vocab_size=300, n_embd=20, n_layer=1, n_head=2, n_positions=31)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        ViTConfig(hidden_size=20, num_hidden_layers=1, num_attention_heads=4, image_size=28, patch_size=7), config
    )
    model = from_vision_encoder_decoder(VisionEncoderDecoderModel(config))
    assert export_captioner(model, tokenizer, ImageTransform(28), tmp_path / "out") == "vision-encoder-decoder"
    said = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    names = ("decoder_start_token_id", "eos_token_id", "pad_token_id")
    assert [said[name] for name in names] == [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
    tower = ViT(16, 8, 24, 1, 4, patches=ViTPatchConfig(stem="conv"), class_token=False, pool="mean")
    other = VisionEncoderDecoder(tower, TextDecoder(300, 24, 1, 4, context_dim=24, max_len=32))
    with pytest.raises(ValueError, match=r"BLIP's vision tower has a class token \(this: none\), patches .*conv"):
        export_captioner(other, tokenizer, ImageTransform(16), tmp_path / "other")
    with pytest.raises(ValueError, match=r"^gpt2 is no family of a VisionEncoderDecoder, which fits .*vision-encoder"):
        export_captioner(other, tokenizer, ImageTransform(16), tmp_path / "other", "gpt2")
    assert not (tmp_path / "other").exists()


def test_weights_in_torchs_own_file_are_told_of_safetensors(tmp_path: Path) -> None:
    torch.save(ViT(32, 8, 16, 1, 2).state_dict(), tmp_path / "tower.pth")
    with pytest.raises(ValueError, match=r"tower.pth: not a whole safetensors.*; torch.load\(.*save_file make one"):
        load_vit(tmp_path / "tower.pth")
