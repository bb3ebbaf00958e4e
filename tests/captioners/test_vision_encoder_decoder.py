"""VisionEncoderDecoder against transformers' VisionEncoderDecoder, by its definition, and by its properties."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mmtransformer import (
    AttentionConfig,
    CaptionBatch,
    MLPConfig,
    NormConfig,
    PositionConfig,
    TextDecoder,
    TransformerConnector,
    VisionEncoderDecoder,
    ViT,
    ViTBlockConfig,
    record_attention,
)
from mmtransformer.backbones.base import DecoderState
from mmtransformer.captioners.base import Captioner
from mmtransformer.captioners.vision_encoder_decoder import add_cross_attention
from mmtransformer.weights import from_transformers

VOCAB = 53


def captioner(connector: bool = False, **options: Any) -> VisionEncoderDecoder:
    torch.manual_seed(4)
    decoder: dict[str, Any] = {"max_len": 29, "context_dim": 12 if connector else 20} | options
    model = VisionEncoderDecoder(
        ViT((16, 24), 8, 20, 1, 4, num_registers=1),
        TextDecoder(VOCAB, 24, 3, 4, **decoder),
        connector=TransformerConnector(20, 12, 2, 3, dropout=0.3, token_dropout=0.4) if connector else None,
    )
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def batch(rows: int = 6, images: int = 3, i: int = 1, q: int = 7, size: tuple[int, int] = (16, 24)) -> CaptionBatch:
    torch.manual_seed(5)
    tokens = torch.randint(VOCAB, (rows, q))
    return CaptionBatch(tokens, tokens >= 0, tokens >= 0, pixels=torch.randn(images, i, 3, *size))


def spread(given: CaptionBatch) -> CaptionBatch:
    """Every row gets its own copy of its pictures."""
    assert given.pixels is not None
    expand_size = given.tokens.shape[0] // given.pixels.shape[0]
    return CaptionBatch(
        given.tokens, given.attention_mask, given.loss_mask, pixels=given.pixels.repeat_interleave(expand_size, 0)
    )


@pytest.mark.parametrize("connector", [False, True])
def test_logits_are_the_towers_one_after_the_other(connector: bool) -> None:
    model, given = captioner(connector), batch(i=2)
    assert given.pixels is not None
    logits = model.logits(given)
    assert logits.shape == (6, 7, VOCAB)
    assert model.vocab_size == VOCAB
    assert model.max_len == 29
    for row in range(6):
        seen = torch.cat([model.vision.forward_features(p[None]) for p in given.pixels[row // 2]], 1)
        if model.connector is not None:
            parts = [model.connector(part) for part in seen.chunk(2, 1)]  # Each picture by itself.
            seen = torch.cat(parts, 1)
        want = model.decoder.head(model.decoder(given.tokens[row][None], seen))
        torch.testing.assert_close(logits[row], want[0], atol=1e-5, rtol=1e-5)


def test_equals_transformers_with_the_same_weights() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTModel

    torch.manual_seed(6)
    tower = ViTModel(
        ViTConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=31, image_size=16,
                  patch_size=8, layer_norm_eps=1e-5), add_pooling_layer=False,
    ).eval()  # fmt: skip
    hub = GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=4, n_positions=29, add_cross_attention=True,
                   bos_token_id=1, eos_token_id=2)
    ).eval()  # fmt: skip
    for parameter in (*tower.parameters(), *hub.parameters()):
        parameter.data += 0.2 * torch.randn_like(parameter)
    vision = ViT(16, 8, 24, 1, 4, mlp_dim=31, block=ViTBlockConfig(norm_eps=1e-5)).eval()
    state, ours = tower.state_dict(), vision.state_dict()
    find = lambda *parts: next(v for k, v in state.items() if all(p in k for p in parts))  # noqa: E731
    positions = find("position_embeddings")
    ours["prefix_tokens"], ours["pos_embed"] = find("cls_token") + positions[:, :1], positions[:, 1:]
    pairs = {
        "patch_embed.proj": "patch_embeddings.projection", "blocks.0.norm1": "layernorm_before",
        "blocks.0.norm2": "layernorm_after",
    }  # fmt: skip
    for here, there in pairs.items():
        ours[f"{here}.weight"] = find(there, "weight").reshape(ours[f"{here}.weight"].shape)
        ours[f"{here}.bias"] = find(there, "bias")
    modules = dict(tower.named_modules())
    linears = [m for m in modules.values() if isinstance(m, torch.nn.Linear)]
    names = ["attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj", "mlp.fc1", "mlp.fc2"]
    for name, module in zip(names, linears, strict=True):
        ours[f"blocks.0.{name}.weight"], ours[f"blocks.0.{name}.bias"] = module.weight, module.bias
    last = [m for name, m in modules.items() if name.endswith("layernorm")]
    ours["norm.weight"], ours["norm.bias"] = last[0].weight, last[0].bias
    vision.load_state_dict(ours)
    model, given = VisionEncoderDecoder(vision, from_transformers(hub)).eval(), batch(size=(16, 16), images=6)
    assert given.pixels is not None
    seen = tower(pixel_values=given.pixels[:, 0]).last_hidden_state
    torch.testing.assert_close(model.forward_features(given.pixels)[:, 0], seen, atol=1e-5, rtol=1e-5)
    want = hub(given.tokens, encoder_hidden_states=seen).logits
    torch.testing.assert_close(model.logits(given), want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("connector", [False, True])
def test_texts_share_their_image_as_if_each_had_a_copy(connector: bool) -> None:
    model, given = captioner(connector), batch()
    torch.testing.assert_close(model.logits(given), model.logits(spread(given)), atol=1e-5, rtol=1e-5)


def test_the_visual_tokens_of_a_cache_are_those_of_the_pixels() -> None:
    model, given = captioner(connector=True), batch(i=2)
    assert given.pixels is not None
    tokens = model.forward_features(given.pixels)
    assert tokens.shape == (3, 2, 8, 20)
    cached = CaptionBatch(given.tokens, given.attention_mask, given.loss_mask, visual_tokens=tokens)
    assert torch.equal(model.logits(cached), model.logits(given))
    halved = CaptionBatch(given.tokens, given.attention_mask, given.loss_mask, visual_tokens=tokens.bfloat16())
    torch.testing.assert_close(model.logits(halved), model.logits(given), atol=0.1, rtol=0.1)


def test_every_image_and_patch_matters_to_its_own_rows_only() -> None:
    model, given = captioner(), batch(i=2)
    assert given.pixels is not None
    before = model.logits(given)
    for image in range(2):
        pixels = given.pixels.clone()
        pixels[1, image, :, 8:, 16:] += torch.randn(3, 8, 8)
        after = model.logits(CaptionBatch(given.tokens, given.attention_mask, given.loss_mask, pixels=pixels))
        changed = (before != after).any(-1).all(-1)
        assert changed.tolist() == [False, False, True, True, False, False]


def test_order_of_images_does_not_matter() -> None:
    model, given = captioner(), batch(i=3)
    assert given.pixels is not None
    other = CaptionBatch(given.tokens, given.attention_mask, given.loss_mask, pixels=given.pixels[:, [2, 0, 1]])
    torch.testing.assert_close(model.logits(other), model.logits(given), atol=1e-5, rtol=1e-5)


# --- decoding


def padded(given: CaptionBatch, counts: tuple[int, ...]) -> CaptionBatch:
    """The same rows, of different length, padded on the left."""
    attention_mask = torch.arange(given.tokens.shape[1]) >= torch.tensor(counts)[:, None]
    tokens = given.tokens.masked_fill(~attention_mask, 0)
    return CaptionBatch(tokens, attention_mask, attention_mask, given.pixels, given.visual_tokens)


KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "cross attention every 2 layers": {"cross_attn_every_n_layers": 2},
    "llama": {
        "attention": AttentionConfig(num_kv_heads=2, bias=False),
        "mlp": MLPConfig("swiglu", bias=False),
        "norm": NormConfig("rms"),
        "positions": PositionConfig("rotary"),
    },
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("connector", [False, True])
@pytest.mark.parametrize("counts", [(0,) * 6, (0, 3, 1, 2, 3, 0)], ids=["equal", "padded"])
def test_cached_steps_equal_the_full_pass(kind: str, connector: bool, counts: tuple[int, ...]) -> None:
    model, given = captioner(connector, **KINDS[kind]), batch(i=2)
    assert given.pixels is not None
    whole = padded(given, counts)
    prompt = CaptionBatch(whole.tokens[:, :4], whole.attention_mask[:, :4], whole.loss_mask[:, :4], whole.pixels)
    logits, state = model.prefill(prompt, max_new_tokens=3)
    steps = [logits] + [model.decode_step(whole.tokens[:, t], state) for t in (4, 5, 6)]
    for row in range(6):
        real = whole.tokens[row][whole.attention_mask[row]][None]
        one = CaptionBatch(real, real >= 0, real >= 0, given.pixels[row // 2][None])
        want = model.logits(one)[0, -4:]
        got = torch.stack([step[row] for step in steps])
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="holds 7 tokens, but 8"):
        model.decode_step(whole.tokens[:, 0], state)


@pytest.mark.parametrize("counts", [(0,) * 6, (0, 3, 1, 2, 3, 0)], ids=["equal", "padded"])
def test_copies_and_reordered_rows_go_on_like_the_rows_they_came_from(counts: tuple[int, ...]) -> None:
    model, given = captioner(), padded(batch(), counts)
    logits, alone = model.prefill(given, max_new_tokens=2)
    copied, state = model.prefill(given, expand_size=3, max_new_tokens=2)
    assert torch.equal(copied, logits.repeat_interleave(3, 0))
    new = torch.randint(VOCAB, (18,))
    first = model.decode_step(new, state)
    order = torch.arange(18).view(6, 3)[:, [2, 0, 0]].flatten()  # Beams change places inside their row.
    state.reorder(order)
    second = model.decode_step(new, state)
    for copy in range(3):
        _, alone = model.prefill(given, max_new_tokens=2)
        torch.testing.assert_close(model.decode_step(new[copy::3], alone), first[copy::3], atol=1e-5, rtol=1e-5)
        _, alone = model.prefill(given, max_new_tokens=2)
        model.decode_step(new[order][copy::3], alone)
        torch.testing.assert_close(model.decode_step(new[copy::3], alone), second[copy::3], atol=1e-5, rtol=1e-5)


def test_images_are_read_once_and_never_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given, calls = captioner(), batch(), []
    blocks: Any = model.decoder.blocks
    for block in blocks:
        projected = block.cross_attn.project_kv
        monkeypatch.setattr(block.cross_attn, "project_kv", lambda x, f=projected: (calls.append("kv"), f(x))[1])
    seen = model.vision.forward_features
    monkeypatch.setattr(model.vision, "forward_features", lambda x: (calls.append("vision"), seen(x))[1])
    _, state = model.prefill(given, expand_size=5, max_new_tokens=3)
    assert calls == ["vision", "kv", "kv", "kv"]
    assert isinstance(state, DecoderState)
    assert state.context is not None
    before = [(kv.k.data_ptr(), kv.v.data_ptr()) for kv in state.context]
    assert all(kv.k.shape[0] == kv.v.shape[0] == 3 for kv in state.context)  # Not 6 rows, not 30 beams.
    state.reorder(torch.arange(30).view(6, 5).flip(1).flatten())
    model.decode_step(torch.zeros(30, dtype=torch.long), state)
    assert [(kv.k.data_ptr(), kv.v.data_ptr()) for kv in state.context] == before
    assert len(calls) == 4


def test_errors_of_decoding_name_the_numbers() -> None:
    model = captioner()
    with pytest.raises(ValueError, match=r"30 tokens.*29 positions"):
        model.prefill(batch(), max_new_tokens=23)


# --- where the words look


@pytest.mark.parametrize("connector", [False, True])
def test_look_is_the_mean_of_the_recorded_weights(connector: bool) -> None:
    model, given = captioner(connector), batch(i=2)
    with record_attention(model.decoder, keep="cross_attn") as record:
        model.logits(given)
    assert len(record) == 3
    mean = sum(weights.mean(1) for weights in record.values()) / 3
    assert isinstance(mean, Tensor)
    found = model.attention_map(given)
    assert found.shape == (6, 7, 2, 2, 3)
    patches = mean.view(6, 7, 2, 8)[..., 2:]  # After a class token and a register.
    torch.testing.assert_close(found, patches.view(6, 7, 2, 2, 3))
    sums = found.sum((2, 3, 4))
    assert (sums < 1).all()
    assert (sums > 0.1).all()
    assert (found >= 0).all()
    assert not found.requires_grad


def test_look_follows_the_size_of_the_image() -> None:
    model = captioner()
    assert model.attention_map(batch(size=(40, 16))).shape == (6, 7, 1, 5, 2)
    given = batch(i=2)
    assert given.pixels is not None
    cached = CaptionBatch(
        given.tokens, given.attention_mask, given.loss_mask, visual_tokens=model.forward_features(given.pixels)
    )
    assert torch.equal(model.attention_map(cached), model.attention_map(given))


def test_look_finds_the_patch_that_a_word_looks_at() -> None:
    """Keys made from one channel: the query is drawn to the patch where that channel is large."""
    model = VisionEncoderDecoder(
        ViT((16, 24), 8, 20, 1, 4, num_registers=1), TextDecoder(VOCAB, 24, 1, 1, context_dim=20)
    )
    blocks: Any = model.decoder.blocks
    cross = blocks[0].cross_attn
    for projection in (cross.q_proj, cross.k_proj):
        projection.weight.data.zero_()
    cross.q_proj.bias.data[0], cross.k_proj.weight.data[0, 7] = 9.0, 9.0
    tokens = torch.zeros(1, 1, 8, 20)
    tokens[0, 0, 2 + 4, 7] = 5.0  # The second row's second patch.
    ids = torch.zeros(1, 3, dtype=torch.long)
    found = model.attention_map(CaptionBatch(ids, ids == 0, ids == 0, visual_tokens=tokens))
    assert (found[0, :, 0, 1, 1] > 0.99).all()


def test_look_is_the_same_in_training() -> None:
    model, given = captioner(connector=True), batch()
    want = model.attention_map(given)
    assert torch.equal(model.train().attention_map(given), want)
    assert model.training
    assert model.decoder.training


# --- construction


def test_widths_that_do_not_fit_are_refused() -> None:
    vision, decoder = ViT(16, 8, 20, 1, 4), TextDecoder(VOCAB, 24, 1, 4, context_dim=24)
    with pytest.raises(ValueError, match=r"context_dim \(24\).*vision encoder's dim \(20\)"):
        VisionEncoderDecoder(vision, decoder)
    with pytest.raises(ValueError, match=r"context_dim \(None\).*vision encoder's dim \(20\)"):
        VisionEncoderDecoder(vision, TextDecoder(VOCAB, 24, 1, 4))
    with pytest.raises(ValueError, match=r"context_dim \(24\).*connector's dim \(12\)"):
        VisionEncoderDecoder(vision, decoder, connector=TransformerConnector(20, 12, 1, 3))
    with pytest.raises(ValueError, match=r"visual_dim \(19\).*vision encoder's dim \(20\)"):
        VisionEncoderDecoder(vision, decoder, connector=TransformerConnector(19, 24, 1, 3))


def test_the_contract_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Captioner()  # pyright: ignore[reportAbstractUsage]


def test_cross_attention_added_to_a_frozen_language_model() -> None:
    torch.manual_seed(8)
    language = TextDecoder(
        VOCAB,
        24,
        3,
        4,
        max_len=29,
        positions=PositionConfig("rotary"),
        mlp=MLPConfig("swiglu", bias=False),
        attention=AttentionConfig(bias=False),
    ).eval()
    reads = add_cross_attention(language, 20, cross_attn_every_n_layers=2)
    given, model = batch(), VisionEncoderDecoder(ViT((16, 24), 8, 20, 1, 4), reads, freeze_decoder=True).train()
    torch.testing.assert_close(model.eval().logits(given), language.head(language(given.tokens)))
    trained = {n for n, p in model.decoder.named_parameters() if p.requires_grad}
    assert {n.split(".")[1] for n in trained} == {"1"}
    assert {n.split(".")[2] for n in trained} == {"cross_attn", "norm_cross"}
    assert sum(p.numel() for p in model.decoder.parameters() if not p.requires_grad) == sum(
        p.numel() for p in language.parameters()
    )
    model.logits(given).square().sum().backward()
    moved = {n for n, p in model.decoder.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"blocks.1.cross_attn.out_proj.weight", "blocks.1.cross_attn.out_proj.bias"}
    with pytest.raises(ValueError, match="cross-attention already, to tokens of width 20"):
        add_cross_attention(reads, 20)
