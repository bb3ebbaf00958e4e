"""transformers' vision-encoder-decoders, there and back, on small random ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BertConfig,
    DeiTConfig,
    GPT2Config,
    SwinConfig,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)

from mmtransformer import CaptionBatch, GenerationConfig, LinearConnector, VisionEncoderDecoder, caption_loss, generate
from mmtransformer.weights import from_transformers, load_vision_encoder_decoder, save_vision_encoder_decoder
from mmtransformer.weights.captioners.vision_encoder_decoder import vision_encoder_decoder_from_state

START, END, PAD, VOCAB, NEW = 50, 7, 0, 53, 11
VIT = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 31, "image_size": 28, "patch_size": 7}
ENCODERS: dict[str, Any] = {
    "vit": lambda: ViTConfig(hidden_size=20, **VIT),
    "deit": lambda: DeiTConfig(hidden_size=24, hidden_act="gelu_new", layer_norm_eps=1e-3, **VIT),
    "no bias": lambda: ViTConfig(hidden_size=24, qkv_bias=False, **VIT),
}
DECODERS: dict[str, Any] = {
    "gpt2": lambda: GPT2Config(vocab_size=VOCAB, n_embd=20, n_layer=2, n_head=4, n_positions=37),
    "narrow": lambda: GPT2Config(vocab_size=VOCAB, n_embd=15, n_layer=1, n_head=3, n_positions=31, n_inner=29,
                                 activation_function="relu", layer_norm_epsilon=1e-3),
    "bert": lambda: BertConfig(vocab_size=VOCAB, hidden_size=20, num_hidden_layers=2, num_attention_heads=5,
                               intermediate_size=29, max_position_embeddings=37),
}  # fmt: skip
PAIRS = [("vit", "gpt2"), ("deit", "narrow"), ("no bias", "gpt2"), ("vit", "bert")]


def theirs_of(encoder: str = "vit", decoder: str = "gpt2") -> Any:
    """Random in every tensor; wide, so that texts are not all alike."""
    torch.manual_seed(1)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        ENCODERS[encoder](), DECODERS[decoder](), decoder_start_token_id=START, eos_token_id=END, pad_token_id=PAD
    )
    model = VisionEncoderDecoderModel(config)
    for name, parameter in model.named_parameters():
        scale = 1.0 if "wte" in name or "word_embeddings" in name else 0.4 if parameter.ndim > 1 else 0.2
        scale = 1.0 if "crossattention" in name or "enc_to_dec" in name else scale
        parameter.data += scale * torch.randn_like(parameter)
    return model.eval()


def pixels_of(rows: int = 3) -> Tensor:
    return torch.randn(rows, 3, 28, 28, generator=torch.Generator().manual_seed(2))


def close(found: Tensor, want: Tensor) -> None:
    """Equal to 1e-5, relative to the largest."""
    assert found.shape == want.shape
    assert (found - want).abs().max() <= 1e-5 * want.abs().max()


def batch_of(pixels: Tensor, rows: list[list[int]], *, left: bool = False) -> CaptionBatch:
    q = max(map(len, rows))
    tokens, real = torch.full((len(rows), q), PAD), torch.zeros(len(rows), q, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(q - len(row), q) if left else slice(len(row))
        tokens[i, place], real[i, place] = torch.tensor(row), True
    return CaptionBatch(tokens, real, real, pixels=pixels)


def until_end(row: list[int]) -> list[int]:
    return row[: row.index(END)] if END in row else row


def new_ids(model: Any, batch: Any, **settings: Any) -> list[list[int]]:
    config = GenerationConfig(**{"max_new_tokens": NEW, **settings})
    return [best.tokens for best, *_ in generate(model, batch, config, eos_id=END)]


@pytest.mark.parametrize(("encoder", "decoder"), PAIRS)
def test_the_logits(encoder: str, decoder: str) -> None:
    theirs, pixels = theirs_of(encoder, decoder), pixels_of().double()
    ours = from_transformers(theirs).double()
    theirs = theirs.double()  # In float32 transformers' own "narrow" is 5e-5 off on Zen 3.
    assert isinstance(ours.connector, LinearConnector) == (decoder == "narrow" or encoder == "no bias")
    batch = batch_of(pixels, [[START, 5, 9, 4, 11], [START, 8], [START, 3, 12]])
    real = batch.attention_mask
    with torch.no_grad():
        close(ours.forward_features(pixels)[:, 0], theirs.encoder(pixels).last_hidden_state)
        want = theirs(pixels, decoder_input_ids=batch.tokens, decoder_attention_mask=real.long()).logits
        close(ours.logits(batch)[real], want[real])
    assert want[real].std() > 0.5
    assert want[real].argmax(-1).unique().numel() > 1


@pytest.mark.parametrize(("encoder", "decoder"), PAIRS)
@pytest.mark.parametrize("settings", [{}, {"num_beams": 4}, {"num_beams": 3, "length_penalty": 2.0}])
def test_the_same_ids(encoder: str, decoder: str, settings: dict[str, Any]) -> None:
    theirs, pixels = theirs_of(encoder, decoder), pixels_of(5)
    ours = from_transformers(theirs)
    found = new_ids(ours, batch_of(pixels, [[START]] * 5), **settings)
    assert found == [until_end(row[1:]) for row in theirs.generate(pixels, max_new_tokens=NEW, **settings).tolist()]
    assert len({tuple(row) for row in found}) > 1
    prompts = [[START, 5, 9, 4], [START], [START, 3], [START, 3, 12, 4], [START, 9, 9]]
    together = new_ids(ours, batch_of(pixels, prompts, left=True), **settings)
    for i, prompt in enumerate(prompts):
        alone = theirs.generate(
            pixels[i : i + 1], decoder_input_ids=torch.tensor([prompt]), max_new_tokens=NEW, **settings
        )
        assert together[i] == until_end(alone[0, len(prompt) :].tolist())


@pytest.mark.parametrize("decoder", ["gpt2", "bert"])
def test_the_loss_is_theirs_without_padding(decoder: str) -> None:
    """transformers puts the start in front of the labels; here it is a row's first token."""
    theirs, pixels = theirs_of("vit", decoder), pixels_of()
    batch = batch_of(pixels, [[START, 5, 9, 4, END], [START, 8, END], [START, 3, 12, END]])
    labels = batch.tokens.masked_fill(~batch.attention_mask, -100)[:, 1:]
    found = caption_loss(from_transformers(theirs), batch)
    close(found, theirs(pixels, labels=labels).loss)


@pytest.mark.parametrize(("encoder", "decoder"), PAIRS)
def test_there_and_back(encoder: str, decoder: str, tmp_path: Path) -> None:
    theirs, pixels = theirs_of(encoder, decoder), pixels_of()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_vision_encoder_decoder(tmp_path / "theirs")
    ids = {"decoder_start_token_id": START, "eos_token_id": END, "pad_token_id": PAD}
    save_vision_encoder_decoder(ours, tmp_path / "ours", **ids)
    again, info = VisionEncoderDecoderModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    # Positions of what comes first are added into it, and token types into positions; nothing reads the pooling.
    apart = ("cls_token", "distillation_token", "position_embeddings", "token_type_embeddings", "pooler")
    for name, tensor in theirs.state_dict().items():
        if not any(word in name for word in apart):
            assert torch.equal(again.state_dict()[name], tensor), name
    assert torch.equal(again.encoder(pixels)[0], theirs.encoder(pixels)[0])
    texts = [model.generate(pixels, num_beams=3, max_new_tokens=NEW) for model in (again, theirs)]
    assert torch.equal(*texts)
    back = load_vision_encoder_decoder(tmp_path / "ours")
    assert back.decoder.lm_head.weight is back.decoder.tok_embed.weight
    for (name, tensor), other in zip(back.state_dict().items(), ours.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
    assert back.state_dict().keys() == ours.state_dict().keys()


def test_a_head_that_differs_stays_untied_and_old_buffers_are_left_aside(tmp_path: Path) -> None:
    theirs, pixels = theirs_of(), pixels_of()
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["decoder.transformer.h.0.attn.bias"] = torch.ones(1, 1, 37, 37)
    state["decoder.transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    state["decoder.transformer.h.1.crossattention.bias"] = torch.ones(1, 1, 37, 37)
    state["decoder.lm_head.weight"] = state["decoder.transformer.wte.weight"].clone()
    save_file(state, tmp_path / "model.safetensors")
    assert load_vision_encoder_decoder(tmp_path).decoder.tied
    state["decoder.lm_head.weight"] = torch.randn(VOCAB, 20)
    save_file(state, tmp_path / "model.safetensors")
    ours, theirs = load_vision_encoder_decoder(tmp_path), VisionEncoderDecoderModel.from_pretrained(tmp_path)
    batch = batch_of(pixels, [[START, 5]] * 3)
    with torch.no_grad():
        close(ours.logits(batch), theirs(pixels, decoder_input_ids=batch.tokens).logits)
    ids = {"decoder_start_token_id": START, "eos_token_id": END, "pad_token_id": PAD}
    save_vision_encoder_decoder(ours, tmp_path / "out", **ids)
    again = VisionEncoderDecoderModel.from_pretrained(tmp_path / "out")
    assert torch.equal(again.decoder.lm_head.weight, state["decoder.lm_head.weight"])


def test_heat_maps_are_shares_of_the_patches() -> None:
    ours, pixels = from_transformers(theirs_of("deit", "narrow")), pixels_of()
    heat = ours.attention_map(batch_of(pixels, [[START, 5, 9], [START, 4], [START]]))
    assert heat.shape == (3, 3, 1, 4, 4)
    sums = heat.flatten(2).sum(-1)
    assert bool((sums > 0).all())
    assert bool((sums <= 1 + 1e-6).all())  # Class and distillation token have the rest.


def test_refusals(tmp_path: Path) -> None:
    theirs = theirs_of()
    theirs.save_pretrained(tmp_path)
    config, state = theirs.config.to_dict(), load_file(tmp_path / "model.safetensors")
    encoder, decoder = config["encoder"], config["decoder"]

    def refused(match: str, changes: dict[str, Any] | None = None, tensors: dict[str, Tensor] | None = None) -> None:
        with pytest.raises(ValueError, match=match):
            vision_encoder_decoder_from_state(config | (changes or {}), state | (tensors or {}), "it")

    refused('the vision encoder is a "swin"', {"encoder": SwinConfig().to_dict()})
    refused("encoder: there is no activation like mish", {"encoder": encoder | {"hidden_act": "mish"}})
    refused('the decoder is a "xglm"', {"decoder": decoder | {"model_type": "xglm"}})
    refused("decoder: there is no activation like mish", {"decoder": decoder | {"activation_function": "mish"}})
    refused("scales attention by layer", {"decoder": decoder | {"scale_attn_by_inverse_layer_idx": True}})
    refused("add_cross_attention is False", {"decoder": decoder | {"add_cross_attention": False}})
    refused("unknown: embeddings.mask_token", tensors={"encoder.embeddings.mask_token": torch.ones(1, 1, 20)})
    refused("unknown: enc_to_dec_proj.bias", tensors={"enc_to_dec_proj.bias": torch.ones(20)})
    refused("unknown: transformer.h.0.extra", tensors={"decoder.transformer.h.0.extra": torch.ones(20)})
    (tmp_path / "config.json").write_text('{"model_type": "blip"}')
    with pytest.raises(ValueError, match='model_type is "blip", not "vision-encoder-decoder"'):
        load_vision_encoder_decoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vision-encoder-decoder", "encoder": {}}))
    with pytest.raises(ValueError, match="has no decoder"):
        load_vision_encoder_decoder(tmp_path)

    ours, ids = from_transformers(theirs), {"decoder_start_token_id": START, "eos_token_id": END}
    with pytest.raises(ValueError, match=r"pad_token_id \(53\) must be one of the model's 53 ids"):
        save_vision_encoder_decoder(ours, tmp_path / "out", **ids, pad_token_id=VOCAB)
    other = VisionEncoderDecoder(ours.vision, ours.decoder, connector=LinearConnector(20, 20))
    with pytest.raises(ValueError, match="LinearConnector where widths differ"):
        save_vision_encoder_decoder(other, tmp_path / "out", **ids, pad_token_id=PAD)
    assert not (tmp_path / "out").exists()
