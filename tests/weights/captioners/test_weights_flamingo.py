"""Weights of OpenFlamingo and Idefics, both directions: against transformers, and against OpenFlamingo's definition."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import IdeficsConfig, IdeficsForVisionText2Text
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

from mmtransformer import (
    CaptionBatch,
    ExtendedDecoder,
    Flamingo,
    GatedBlockConfig,
    PerceiverResampler,
    TextDecoder,
    ViT,
    generate,
)
from mmtransformer.layers.attention import Attention
from mmtransformer.layers.blocks import GatedCrossAttentionBlock, SwiGLU, make_norm
from mmtransformer.weights import from_transformers
from mmtransformer.weights.captioners.idefics import (
    GATED,
    RESAMPLER,
    idefics_from_state,
    load_idefics,
    save_idefics,
    to_idefics,
)
from mmtransformer.weights.captioners.openflamingo import from_openflamingo, to_openflamingo
from mmtransformer.weights.shared.keys import fill
from support.openflamingo import DIM, VISUAL, checkpoint, gated, perceiver

VOCAB = 53


def noisy(module: Any) -> Any:
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return module.eval()


# --- Idefics


def config(**options: Any) -> IdeficsConfig:
    norms = options.pop("perceiver_norms", False)
    perceiver = {"use_resampler": True, "resampler_n_latents": 5, "resampler_depth": 2, "resampler_n_heads": 3,
                 "resampler_head_dim": 7, "qk_layer_norms_perceiver": norms}  # fmt: skip
    vision = {"embed_dim": VISUAL, "image_size": 16, "intermediate_size": 31, "patch_size": 8, "num_hidden_layers": 2,
              "num_attention_heads": 4}  # fmt: skip
    options = {"use_resampler": True} | options
    return IdeficsConfig(
        vocab_size=VOCAB, hidden_size=DIM, intermediate_size=37, num_hidden_layers=4, num_attention_heads=4,
        vision_config=vision, perceiver_config=perceiver, max_position_embeddings=29,
        rms_norm_eps=1e-4, **options,
    )  # fmt: skip


def media_batch(i: int = 2) -> CaptionBatch:
    """Two rows: text before, between and after pictures; the second has no picture at all."""
    tokens = torch.randint(VOCAB, (2, 7))
    seen = torch.tensor([[0, 1, 1, 1, 2, 2, 2], [0] * 7])
    return CaptionBatch(tokens, tokens >= 0, tokens >= 0, pixels=torch.randn(2, i, 3, 16, 16), image_index=seen)


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("alpha", ["float", "vector"])
def test_a_gated_layer_of_idefics(norms: bool, alpha: str) -> None:
    settings = config(qk_layer_norms=norms, alpha_type=alpha)
    theirs = noisy(IdeficsGatedCrossAttentionLayer(settings, layer_idx=0))
    attn = Attention(
        DIM, 4, context_dim=VISUAL, bias=False, qk_norm="rms" if norms else None, norm_eps=settings.rms_norm_eps
    )
    ours = GatedCrossAttentionBlock(
        DIM, attn, SwiGLU(DIM, 37), lambda: make_norm("rms", DIM, settings.rms_norm_eps), mlp_without_image=True,
        per_channel=alpha == "vector",
    )  # fmt: skip
    state = {name: t.flatten() if "alpha" in name else t for name, t in theirs.state_dict().items()}
    fill(ours, GATED, state, "the layer")
    x, latents = torch.randn(2, 7, DIM), torch.randn(2, 11, VISUAL)
    mask = torch.rand(2, 7, 11) < 0.4
    mask[0, :3] = mask[1, 6] = False
    hidden = torch.zeros(2, 1, 7, 11).masked_fill(~mask[:, None], torch.finfo(torch.float32).min)
    want = theirs(
        x, image_hidden_states=latents, image_attention_mask=hidden, cross_attention_gate=mask.any(-1).float()
    )
    found = ours(x, latents, mask=mask, sees=mask.any(-1))
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)
    found = ours(x, ours.attn.project_kv(latents), mask=mask, sees=mask.any(-1))
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norms", [False, True])
def test_the_resampler_of_idefics(norms: bool) -> None:
    theirs = noisy(IdeficsPerceiverResampler(config(perceiver_norms=norms), VISUAL, 2, 3, 7, 5))
    ours = PerceiverResampler(VISUAL, 2, 3, 7, 5, activation="relu", qk_norm="layer" if norms else None)
    fill(ours, RESAMPLER, theirs.state_dict(), "it")
    x = torch.randn(2, 3, 11, VISUAL)
    torch.testing.assert_close(ours(x).flatten(0, 1), theirs(x.flatten(0, 1)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cross_layer_interval": 2, "qk_layer_norms": True, "perceiver_norms": True, "alpha_type": "vector"},
        {"additional_vocab_size": 3, "tie_word_embeddings": True},
        {"additional_vocab_size": 2},
        {"use_resampler": False},
    ],
    ids=["plain", "norms, every 2, vector", "more words, tied", "more words", "no resampler"],
)
def test_the_whole_of_idefics_and_back(options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    theirs = noisy(IdeficsForVisionText2Text(config(**options)))
    last_norm = theirs.model.vision_model.post_layernorm  # Read by nobody, so not kept.
    last_norm.weight.data.fill_(1.0), last_norm.bias.data.fill_(0.0)
    given = media_batch()
    assert given.pixels is not None
    assert given.image_index is not None
    given.tokens[0, 2] += (VOCAB - given.tokens[0, 2]) * bool(options.get("additional_vocab_size"))
    last = given.image_index[..., None] == torch.arange(1, 3)
    want = theirs(given.tokens, pixel_values=given.pixels, image_attention_mask=last.long()).logits
    ours = from_transformers(theirs)
    torch.testing.assert_close(ours.logits(given), want, atol=1e-4, rtol=1e-4)
    every = (given.image_index[..., None] >= torch.arange(1, 3)).long()
    want = theirs(given.tokens, pixel_values=given.pixels, image_attention_mask=every).logits
    seeing = idefics_from_state(theirs.config.to_dict(), theirs.state_dict(), "it", "all_previous")
    torch.testing.assert_close(seeing.logits(given), want, atol=1e-4, rtol=1e-4)
    assert isinstance(ours.decoder, ExtendedDecoder) == bool(options.get("additional_vocab_size"))
    _, back = to_idefics(ours)
    state = theirs.state_dict()
    assert set(back) == set(state)
    moved = ("class_embedding", "position_embedding")  # The class token's position is part of the token here.
    assert [name for name in state if not name.split(".")[-1].startswith(moved) and "position_emb" not in name
            and not torch.equal(state[name], back[name])] == []  # fmt: skip
    again = IdeficsForVisionText2Text(config(**options)).eval()
    again.load_state_dict(back)
    found = again(given.tokens, pixel_values=given.pixels, image_attention_mask=every).logits
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)


def test_idefics_generates_the_same_words() -> None:
    torch.manual_seed(3)
    theirs = noisy(IdeficsForVisionText2Text(config()))
    ours, given = from_transformers(theirs), media_batch(i=1)
    assert given.pixels is not None
    given.image_index = (torch.arange(7) > 2).long().expand(2, 7)
    found = generate(ours, given, eos_id=2, max_new_tokens=6, min_new_tokens=6)
    want = theirs.generate(
        given.tokens, attention_mask=given.attention_mask.long(), pixel_values=given.pixels,
        image_attention_mask=given.image_index[..., None], max_new_tokens=6, min_new_tokens=6, do_sample=False,
    )[:, 7:]  # fmt: skip
    assert [texts[0].tokens for texts in found] == want.tolist()


def test_small_visual_tokens_of_idefics_are_normed_once() -> None:
    """Where tokens are no larger than a norm's eps, a norm of a norm is not the norm."""
    theirs = noisy(IdeficsForVisionText2Text(config()))
    tower = theirs.model.vision_model
    for layer in tower.encoder.layers:
        for last in (layer.self_attn.out_proj, layer.mlp.fc2):
            last.weight.data *= 1e-3
            last.bias.data *= 1e-3
    tower.pre_layrnorm.weight.data *= 1e-2
    tower.pre_layrnorm.bias.data *= 1e-2
    given = media_batch()
    assert given.pixels is not None
    hidden = tower(given.pixels.flatten(0, 1)).last_hidden_state
    assert 0.005 < hidden.std() < 0.02
    ours = from_transformers(theirs)
    torch.testing.assert_close(ours.forward_features(given.pixels).flatten(0, 1), hidden, atol=1e-6, rtol=1e-5)
    assert ours.connector is not None
    found = ours.latents(given).flatten(0, 1)
    torch.testing.assert_close(found, theirs.model.perceiver_resampler(hidden), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"use_resampler": False, "additional_vocab_size": 2}], ids=str)
def test_folders_of_idefics(options: dict[str, Any], tmp_path: Path) -> None:
    theirs, given = noisy(IdeficsForVisionText2Text(config(**options))), media_batch()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_idefics(tmp_path / "theirs")
    assert torch.equal(ours.logits(given), from_transformers(theirs).logits(given))
    save_idefics(ours, tmp_path / "ours")
    again, report = IdeficsForVisionText2Text.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    last = given.image_index[..., None] == torch.arange(1, 3)  # type: ignore[index]
    for model in (theirs, again.eval()):
        want = model(given.tokens, pixel_values=given.pixels, image_attention_mask=last.long()).logits
        torch.testing.assert_close(ours.logits(given), want, atol=1e-4, rtol=1e-4)
    assert torch.equal(load_idefics(tmp_path / "ours").logits(given), ours.logits(given))
    ours.save_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match='model_type is "None", not "idefics"'):
        load_idefics(tmp_path / "own")


def test_a_flamingo_that_idefics_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"activation='gelu', .*norm='layer', .*vision\.output\.norm='tokens'"):
        save_idefics(Flamingo(ViT(16, 8, 20, 1, 4), TextDecoder(VOCAB, DIM, 1, 4)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    ours = from_transformers(IdeficsForVisionText2Text(config(additional_vocab_size=2)))
    assert isinstance(ours.decoder, ExtendedDecoder)
    ours.decoder.first = 50
    with pytest.raises(ValueError, match="first new token=50"):
        to_idefics(ours)


def test_openflamingo_by_its_definition_and_back() -> None:
    state = checkpoint((1, 3))
    vision, decoder = noisy(ViT(16, 8, VISUAL, 1, 4)), noisy(TextDecoder(VOCAB, DIM, 4, 4, max_len=29))
    full = state | {
        "vision_encoder.conv1.weight": torch.zeros(1),
        "lang_encoder.transformer.wte.weight": torch.zeros(1),
        "lang_encoder.old_decoder_blocks.1.gated_cross_attn_layer.attn_gate": torch.zeros(1),
    }
    model = from_openflamingo(full, vision, decoder).double()
    assert model.cross_layers == [1, 3]
    given = media_batch()
    assert given.pixels is not None
    assert given.image_index is not None
    given.pixels = given.pixels.double()
    found = model.hidden_states(given)
    for row in range(2):
        features = vision.forward_features(given.pixels[row])[:, None, 1:]  # Patches alone, one frame.
        latents = perceiver(state, features, depth=2)
        x = decoder.embed(given.tokens[row][None], torch.arange(7))[0]
        for n, block in enumerate(decoder.blocks):
            if n in (1, 3):
                name = f"lang_encoder.transformer.h.{n}.gated_cross_attn_layer"
                x = gated(state, name, x, latents, given.image_index[row])
            x = block(x[None], mask="causal")[0]
        torch.testing.assert_close(found[row], decoder.last_norm(x), atol=1e-9, rtol=1e-9)
    back = to_openflamingo(model, layers="transformer.h")
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_openflamingos_time_embeddings() -> None:
    state = checkpoint((0,), times=True)
    model = from_openflamingo(state, ViT(16, 8, VISUAL, 1, 4), TextDecoder(VOCAB, DIM, 1, 4))
    assert model.connector is not None
    assert (model.connector.max_frames, model.connector.max_images) == (4, 3)
    x = torch.randn(1, 2, 3, 11, VISUAL, dtype=torch.float64)
    found = model.connector.double()(x)[0]
    torch.testing.assert_close(found, perceiver(state, x[0], depth=2), atol=1e-9, rtol=1e-9)
    back = to_openflamingo(model, layers="transformer.h")
    assert back["perceiver.media_time_embs"].shape == (3, 1, VISUAL)


def test_what_is_not_openflamingos_is_refused() -> None:
    vision, decoder, state = ViT(16, 8, VISUAL, 1, 4), TextDecoder(VOCAB, DIM, 4, 4), checkpoint((1,))
    with pytest.raises(ValueError, match=r'the file has no tensor "perceiver\.latents"'):
        from_openflamingo({}, vision, decoder, context="the file")
    with pytest.raises(ValueError, match="no gated_cross_attn_layer"):
        from_openflamingo({n: t for n, t in state.items() if "gated" not in n}, vision, decoder)
    with pytest.raises(ValueError, match=r"missing: 1\.ff\.3\.weight \(1 in all\)"):
        from_openflamingo({n: t for n, t in state.items() if "ff.3" not in n}, vision, decoder)
    with pytest.raises(ValueError, match=rf"is \(128, {DIM}\), the model wants \(128, 28\)"):
        from_openflamingo(state, vision, TextDecoder(VOCAB, 28, 4, 4))
    with pytest.raises(
        ValueError, match=r"nothing like gated\.head_dim=7, gated\.activation='relu', gated\.norm='rms'"
    ):
        to_openflamingo(Flamingo(vision, decoder, connector=PerceiverResampler(VISUAL), gated=GatedBlockConfig(
            head_dim=7, activation="relu", norm="rms", per_channel=True)))  # fmt: skip
    with pytest.raises(ValueError, match="always has a resampler"):
        to_openflamingo(Flamingo(vision, decoder))
