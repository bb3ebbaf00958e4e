"""Blip2 by the parts it is made of, and by its properties."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmtransformer import (
    AttentionConfig,
    Blip2,
    CaptionBatch,
    MLPConfig,
    NormConfig,
    PositionConfig,
    QFormer,
    TextDecoder,
    Transformer,
    ViT,
    caption_loss,
    generate,
)
from mmtransformer.captioners.blip2 import InstructBatch

VOCAB, L = 53, 3


def blip2(instruct: bool = False, **options: Any) -> Blip2:
    torch.manual_seed(4)
    decoder: dict[str, Any] = {"max_len": 31} | options.pop("decoder", {})
    kind: Any = Transformer if decoder.pop("seq2seq", False) else TextDecoder
    model = Blip2(
        ViT((16, 24), 8, 20, 2, 4, num_registers=1),
        QFormer(L, 12, 3, 3, 20, vocab_size=VOCAB if instruct else None, max_len=17, dropout=0.3),
        kind(VOCAB, 24, 3, 4, **decoder),
        instruct=instruct,
        **options,
    )
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def batch(rows: int = 6, images: int = 3, i: int = 1, q: int = 7) -> CaptionBatch:
    torch.manual_seed(5)
    tokens = torch.randint(VOCAB, (rows, q))
    lengths = torch.tensor([q, q - 2, q - 3])[torch.arange(rows) % 3]
    attention_mask = torch.arange(q) < lengths[:, None]
    loss_mask = attention_mask & (torch.arange(q) >= 2)
    return CaptionBatch(tokens, attention_mask, loss_mask, pixels=torch.randn(images, i, 3, 16, 24))


def pixels(given: CaptionBatch) -> Tensor:
    assert given.pixels is not None
    return given.pixels


SEQ2SEQ = {"seq2seq": True, "mlp_dim": 31, "decoder_depth": 2}
LLAMA = {
    "attention": AttentionConfig(num_kv_heads=2, bias=False),
    "mlp": MLPConfig("swiglu", bias=False),
    "norm": NormConfig("rms"),
    "positions": PositionConfig("rotary"),
    "tied": False,
}


@pytest.mark.parametrize("decoder", [{}, LLAMA])
@pytest.mark.parametrize("i", [1, 2])
def test_queries_stand_in_front_of_the_text(decoder: dict[str, Any], i: int) -> None:
    model, given = blip2(decoder=decoder), batch(i=i)
    logits = model.logits(given)
    assert logits.shape == (6, 7, VOCAB)
    assert (model.vocab_size, model.max_len) == (VOCAB, 31 - L)
    for row in range(6):
        seen = [model.vision.forward_features(p[None]) for p in pixels(given)[row // 2]]
        prefix_embeds = torch.cat([model.proj(model.qformer(x)) for x in seen], 1)
        x = torch.cat((prefix_embeds, model.decoder.tok_embed(given.tokens[row])[None]), 1)
        steps = torch.arange(x.shape[1])
        x = x if model.decoder.pos_embed is None else x + model.decoder.pos_embed.weight[steps]
        want = model.decoder.head(model.decoder.forward_embeds(x, steps))[0, L * i :]
        torch.testing.assert_close(logits[row], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("instruct", [False, True])
@pytest.mark.parametrize("decoder", [{}, SEQ2SEQ])
def test_one_single_pair_is_a_batch(decoder: dict[str, Any], instruct: bool) -> None:
    model, whole = blip2(instruct, decoder=decoder), batch()
    one = CaptionBatch(
        *(x[:1] for x in (whole.tokens, whole.attention_mask, whole.loss_mask)), pixels=pixels(whole)[:1]
    )
    loss = caption_loss(model, one, reduction="sum")
    loss.sum.backward()
    assert loss.sum.shape == ()
    assert loss.count == 5
    torch.testing.assert_close(model.logits(one)[0], model.logits(whole)[0], atol=1e-5, rtol=1e-5)


def test_the_loss_falls_on_caption_tokens_only() -> None:
    model, given = blip2(), batch()
    loss = caption_loss(model, given, reduction="sum")
    assert int(loss.count) == int(given.loss_mask.sum())
    said = model.logits(given).log_softmax(-1)[:, :-1].gather(2, given.tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(loss.sum, -said[given.loss_mask[:, 1:]].sum())


def test_what_learns() -> None:
    def learning(model: Blip2) -> set[str]:
        return {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}

    assert learning(blip2()) == {"qformer", "proj"}
    assert learning(blip2(freeze_decoder=False)) == {"qformer", "proj", "decoder"}
    assert learning(blip2(freeze_vision=False)) == {"qformer", "proj", "vision"}
    normed = blip2(train_vision_norm=True).train()
    learnt = {name for name, p in normed.named_parameters() if p.requires_grad and name.startswith("vision")}
    assert learnt == {"vision.norm.weight", "vision.norm.bias"}
    modes = [m.training for m in (normed.vision, normed.qformer, normed.decoder)]
    assert modes == [False, True, False]
    caption_loss(normed, batch(), reduction="sum").sum.backward()
    grads = {name.split(".")[0]: p.grad for name, p in normed.named_parameters() if p.grad is not None}
    assert set(grads) == {"qformer", "proj", "vision"}
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in normed.qformer.parameters())


def test_a_norm_that_learns_gives_what_one_at_rest_gives() -> None:
    given = batch(i=2)
    resting, learning = blip2(), blip2(train_vision_norm=True)
    torch.testing.assert_close(learning.logits(given), resting.logits(given), atol=1e-5, rtol=1e-5)
    tokens = learning.forward_features(pixels(given))
    assert not torch.allclose(tokens, resting.forward_features(pixels(given)))
    cached = replace(given, pixels=None, visual_tokens=tokens)
    assert torch.equal(learning.logits(cached), learning.logits(given))


def test_the_visual_tokens_of_a_cache_are_those_of_the_pixels() -> None:
    model, given = blip2(), batch(i=2)
    tokens = model.forward_features(pixels(given))
    assert tokens.shape == (3, 2, 8, 20)
    cached = replace(given, pixels=None, visual_tokens=tokens)
    assert torch.equal(model.logits(cached), model.logits(given))


def test_padding_and_later_tokens_change_nothing() -> None:
    model, given = blip2(), batch()
    other = replace(given, tokens=given.tokens.where(given.attention_mask, 1))
    assert torch.equal(model.logits(given)[given.attention_mask], model.logits(other)[given.attention_mask])
    later = replace(given, tokens=torch.cat((given.tokens[:, :4], given.tokens[:, 4:] * 0), 1))
    assert torch.equal(model.logits(given)[:, :4], model.logits(later)[:, :4])


@pytest.mark.parametrize("i", [1, 2])
def test_an_encoder_reads_queries_and_prompt_a_decoder_begin_and_caption(i: int) -> None:
    model, given = blip2(decoder=SEQ2SEQ), batch(i=i)
    assert isinstance(model.decoder, Transformer)
    assert model.max_len == 31
    given.tokens[:, 1] = torch.tensor([3, 4, 5, 6, 7, 8])
    given.loss_mask[3] = given.attention_mask[3] & (torch.arange(7) >= 1)  # A row without a prompt.
    logits = model.logits(given)
    for row in range(6):
        start, end = (1 if row == 3 else 2), int(given.attention_mask[row].sum())
        seen = [model.vision.forward_features(p[None]) for p in pixels(given)[row // 2]]
        prefix_embeds = torch.cat([model.proj(model.qformer(x)) for x in seen], 1)
        tokens = given.tokens[row][None]
        source = model.decoder.encode(tokens[:, 1:start], prefix_embeds=prefix_embeds)
        spoken = torch.cat((tokens[:, :1], tokens[:, start:end]), 1)
        want = model.decoder.head(model.decoder.decode(spoken, source))[0]
        torch.testing.assert_close(logits[row, :1], want[:1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits[row, start:end], want[1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("decoder", [{}, LLAMA, SEQ2SEQ])
def test_a_missing_image_is_as_if_it_were_not_there(decoder: dict[str, Any]) -> None:
    model, given = blip2(decoder=decoder), batch(i=2)
    known = torch.tensor([[True, False], [True, True], [False, True]])
    logits = model.logits(replace(given, image_mask=known))
    torch.testing.assert_close(logits[2:4], model.logits(given)[2:4], atol=1e-5, rtol=1e-5)
    for sample, kept in ((0, 0), (2, 1)):
        rows = slice(2 * sample, 2 * sample + 2)
        alone = CaptionBatch(
            given.tokens[rows], given.attention_mask[rows], given.loss_mask[rows],
            pixels=pixels(given)[[sample], kept][:, None]
        )  # fmt: skip
        torch.testing.assert_close(logits[rows], model.logits(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("instruct", [False, True])
@pytest.mark.parametrize("decoder", [{}, LLAMA, SEQ2SEQ])
@pytest.mark.parametrize("expand_size", [1, 3])
def test_decoding_step_by_step_is_the_whole_pass(instruct: bool, decoder: dict[str, Any], expand_size: int) -> None:
    """Prompts of different lengths, padded on the left; then five forced tokens a row."""
    model = blip2(instruct, decoder=decoder)
    torch.manual_seed(8)
    lengths, new = [4, 1, 3, 2], torch.randint(VOCAB, (4 * expand_size, 5))
    full = torch.randint(VOCAB, (4, 4))
    attention_mask = torch.stack([torch.arange(4) >= 4 - length for length in lengths])
    prompts = CaptionBatch(full, attention_mask, torch.zeros_like(attention_mask), pixels=torch.randn(2, 2, 3, 16, 24))
    known = torch.tensor([[True, True], [True, False]])
    prompts = replace(prompts, image_mask=known)
    logits, state = model.prefill(prompts, expand_size=expand_size, max_new_tokens=6)
    steps = [logits]
    steps += [model.decode_step(new[:, t], state) for t in range(5)]
    found = torch.stack(steps, 1)
    for row in range(4 * expand_size):
        source = row // expand_size
        prompt = full[source, attention_mask[source]]
        tokens = torch.cat((prompt, new[row]))[None]
        yes = torch.ones_like(tokens, dtype=torch.bool)
        loss_mask = yes & (torch.arange(tokens.shape[1]) >= len(prompt))
        alone = CaptionBatch(
            tokens, yes, loss_mask, pixels=pixels(prompts)[source // 2][None], image_mask=known[source // 2][None]
        )  # fmt: skip
        want = model.logits(alone)[0]
        want = torch.cat((want[:1], want[len(prompt) :])) if "seq2seq" in decoder else want[len(prompt) - 1 :]
        torch.testing.assert_close(found[row], want, atol=2e-5, rtol=2e-5)


def test_beams_follow_their_rows() -> None:
    model, given = blip2(), batch(rows=2, images=2)
    logits, state = model.prefill(given, expand_size=2, max_new_tokens=3)
    order = torch.tensor([1, 0, 3, 3])
    state.reorder(order)
    after = model.decode_step(torch.tensor([5, 6, 7, 8]), state)
    _, other = model.prefill(given, expand_size=2, max_new_tokens=3)
    torch.testing.assert_close(after, model.decode_step(torch.tensor([5, 6, 7, 8]), other), atol=1e-5, rtol=1e-5)
    assert logits.shape == (4, VOCAB)


def test_the_queries_are_computed_once_a_caption(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = blip2(), []
    see = model.qformer.encode_queries
    monkeypatch.setattr(model.qformer, "encode_queries", lambda x, mask: calls.append(x.shape[0]) or see(x, mask))
    prompts = CaptionBatch(*(torch.ones(2, 1, dtype=d) for d in (torch.long, torch.bool, torch.bool)),
                           pixels=torch.randn(2, 1, 3, 16, 24))  # fmt: skip
    found = generate(model, prompts, eos_id=0, max_new_tokens=6, num_beams=3)
    assert calls == [2]
    assert len(found) == 2


def test_an_instruction_changes_what_the_queries_gather() -> None:
    model, given = blip2(instruct=True), batch(i=2)
    queries = model.prefix_embeds(given)
    assert queries.shape == (6, 2, L, 24)
    for row in range(6):
        features = model.vision.forward_features(pixels(given)[row // 2])
        want = model.proj(model.qformer(features, given.tokens[[row, row], :2]))
        torch.testing.assert_close(queries[row], want, atol=1e-5, rtol=1e-5)
    captions = replace(given, tokens=torch.cat((given.tokens[:, :2], given.tokens[:, 2:] * 0), 1))
    assert torch.equal(model.prefix_embeds(captions), queries)  # What must be predicted is not read.
    prompts = replace(given, tokens=torch.cat(((given.tokens[:, :2] + 1) % VOCAB, given.tokens[:, 2:]), 1))
    assert not torch.isclose(model.prefix_embeds(prompts), queries).all(-1).any()


def test_an_instruction_in_the_qformers_own_words() -> None:
    model, given = blip2(instruct=True), batch()
    words = torch.randint(VOCAB, (6, 5))
    real = torch.arange(5) < torch.tensor([5, 3, 1, 4, 2, 5])[:, None]
    fields = (given.tokens, given.attention_mask, given.loss_mask, given.pixels)
    instructed = InstructBatch(*fields, instruction=words, instruction_attention_mask=real)
    queries = model.prefix_embeds(instructed)
    other = replace(instructed, instruction=words.where(real, 0))
    assert torch.equal(model.prefix_embeds(other), queries)
    same = replace(instructed, instruction=given.tokens[:, :2], instruction_attention_mask=None)
    torch.testing.assert_close(model.prefix_embeds(same), model.prefix_embeds(given), atol=1e-5, rtol=1e-5)
    assert isinstance(instructed.truncate(3), InstructBatch)
    assert torch.equal(model.prefix_embeds(instructed.truncate(3)), queries)


@pytest.mark.parametrize("decoder", [{}, LLAMA, SEQ2SEQ])
@pytest.mark.parametrize("instruct", [False, True])
def test_look_composes_two_attentions(instruct: bool, decoder: dict[str, Any]) -> None:
    model, given = blip2(instruct, decoder=decoder).train(), batch(i=2)
    heat = model.attention_map(given)
    assert model.training
    assert heat.shape == (6, 7, 2, 2, 3)
    assert (heat >= 0).all()
    assert (heat.sum((2, 3, 4)) <= 1 + 1e-5).all()
    assert heat.std() > 0
    cached = replace(given, pixels=None, visual_tokens=model.forward_features(pixels(given)))
    torch.testing.assert_close(model.attention_map(cached), heat)
    alone = CaptionBatch(
        *(x[2:3] for x in (given.tokens, given.attention_mask, given.loss_mask)), pixels=pixels(given)[1:2]
    )
    torch.testing.assert_close(model.attention_map(alone)[0], heat[2], atol=1e-5, rtol=1e-5)


def test_look_finds_the_patch_that_a_query_reads() -> None:
    """One query, which reads one patch: all of the text's attention to it lies there."""
    torch.manual_seed(0)
    vision, qformer = ViT(16, 4, 8, 1, 2), QFormer(1, 8, 1, 2, 8, dropout=0.0)
    model = Blip2(vision, qformer, TextDecoder(VOCAB, 8, 1, 2)).eval()
    tokens = torch.zeros(1, 1, 17, 8)
    tokens[0, 0, 1 + 6] = 100.0  # Row 1, column 2 of 4 x 4, after the class token.
    layer = qformer.blocks[0].cross_attn
    torch.nn.init.eye_(layer.k_proj.weight)
    torch.nn.init.zeros_(layer.q_proj.weight)
    torch.nn.init.ones_(layer.q_proj.bias)
    one = torch.ones(1, 2, dtype=torch.long)
    heat = model.attention_map(CaptionBatch(one, one > 0, one > 1, visual_tokens=tokens))
    assert heat[0, 0, 0].argmax() == 6
    torch.testing.assert_close(heat[0, 0, 0, 1, 2], heat[0, 0].sum())


FAMILIES: dict[str, dict[str, Any]] = {
    "GPT2": {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 29, "bos_token_id": 0, "eos_token_id": 0},
    "OPT": {"hidden_size": 24, "ffn_dim": 31, "num_hidden_layers": 2, "num_attention_heads": 4},
    "Llama": {"num_key_value_heads": 2},
    "Mistral": {"num_key_value_heads": 2, "sliding_window": 4},
    "Qwen2": {"num_key_value_heads": 2},
    "Qwen3": {"num_key_value_heads": 2, "head_dim": 10},
    "SmolLM3": {"num_key_value_heads": 2, "no_rope_layer_interval": 2, "pad_token_id": 0, "eos_token_id": 1},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_decoder_family_reads_queries(family: str) -> None:
    """As transformers' model of the family reads them as embeddings; and step by step, padded on the left."""
    import transformers

    from mmtransformer.weights import from_transformers

    torch.manual_seed(6)
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 31}
    sizes |= {"max_position_embeddings": 29}
    given = FAMILIES[family] if family in ("GPT2", "OPT") else sizes | FAMILIES[family]
    config = getattr(transformers, f"{family}Config")(vocab_size=VOCAB, **given)
    kind = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    lm = getattr(transformers, kind)(config).eval()
    for parameter in lm.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    own = blip2()
    model = Blip2(own.vision, own.qformer, from_transformers(lm)).eval()
    model.proj.load_state_dict(own.proj.state_dict())
    rows = batch()
    logits = model.logits(rows)
    prefix_embeds = model.prefix_embeds(rows).flatten(1, 2).repeat_interleave(2, 0)
    x = torch.cat((prefix_embeds, lm.get_input_embeddings()(rows.tokens)), 1)
    torch.testing.assert_close(logits, lm(inputs_embeds=x).logits[:, L:], atol=1e-4, rtol=1e-4)
    prompts = CaptionBatch(rows.tokens[:3, :3], torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 1]]).bool(),
                           torch.zeros(3, 3, dtype=torch.bool), pixels=rows.pixels)  # fmt: skip
    first, state = model.prefill(prompts, max_new_tokens=2)
    following = model.decode_step(torch.tensor([5, 6, 7]), state)
    for row in range(3):
        tokens = torch.cat((prompts.tokens[row, row:], torch.tensor([5 + row])))[None]
        yes = torch.ones_like(tokens, dtype=torch.bool)
        alone = model.logits(CaptionBatch(tokens, yes, yes, pixels=pixels(rows)[row : row + 1]))[0]
        torch.testing.assert_close(torch.stack((first[row], following[row])), alone[-2:], atol=1e-4, rtol=1e-4)


def test_any_language_model_of_transformers_can_be_the_decoder() -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from mmtransformer.backbones.hf.decoder import HFDecoder

    torch.manual_seed(6)
    lm = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=VOCAB, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
                                          intermediate_size=31, max_position_embeddings=29)).eval()  # fmt: skip
    own = blip2()
    model = Blip2(own.vision, own.qformer, HFDecoder.from_model(lm)).eval()
    model.proj.load_state_dict(own.proj.state_dict())
    given = batch()
    logits = model.logits(given)
    prefix_embeds = model.prefix_embeds(given).flatten(1, 2).repeat_interleave(2, 0)
    x = torch.cat((prefix_embeds, lm.get_input_embeddings()(given.tokens)), 1)
    torch.testing.assert_close(logits, lm(inputs_embeds=x).logits[:, L:], atol=1e-5, rtol=1e-5)
    first, state = model.prefill(given.truncate(2), expand_size=2, max_new_tokens=4)
    torch.testing.assert_close(first[::2], logits[:, 1], atol=1e-5, rtol=1e-5)
    following = model.decode_step(given.tokens[:, 2].repeat_interleave(2), state)
    torch.testing.assert_close(following[::2], logits[:, 2], atol=1e-5, rtol=1e-5)
    assert own.has_heatmaps
    assert not model.has_heatmaps
    with pytest.raises(ValueError, match=r"HFDecoder has no attention layer whose weights can be recorded"):
        model.attention_map(given)


@pytest.mark.parametrize("decoder", [{}, SEQ2SEQ])
def test_saved_and_loaded(tmp_path: object, decoder: dict[str, Any]) -> None:
    model, given = blip2(instruct=True, decoder=decoder), batch()
    model.save_pretrained(str(tmp_path))
    again = Blip2.from_pretrained(str(tmp_path))
    assert torch.equal(again.logits(given), model.logits(given))
    assert (again.freeze_vision, again.freeze_decoder, again.instruct) == (True, True, True)


def test_published_sizes() -> None:
    with torch.device("meta"):
        vision = ViT(224, 14, 1408, 39, 16, mlp_dim=6144)
        opt = TextDecoder(50_272, 2560, 32, 32, max_len=2048, mlp=MLPConfig("relu"))
        model = Blip2(vision, QFormer(), opt, train_vision_norm=True)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 107_133_696


def test_half_precision_decoder() -> None:
    model, given = blip2(), batch()
    want = model.logits(given)
    model.decoder.bfloat16()
    found = model.logits(given)
    assert found.dtype == torch.bfloat16
    assert (found.float() - want).abs().mean() < 0.05 * want.std()


def test_errors() -> None:
    vision, decoder = ViT(16, 8, 20, 1, 4), TextDecoder(VOCAB, 24, 1, 4, max_len=5)
    with pytest.raises(ValueError, match=r"visual_dim \(21\) must be the vision encoder's dim \(20\)"):
        Blip2(vision, QFormer(L, 12, 1, 3, 21, cross_attention_frequency=1), decoder)
    with pytest.raises(ValueError, match=r"5 positions leave no room for text after 5 queries"):
        Blip2(vision, QFormer(5, 12, 1, 3, 20, cross_attention_frequency=1), decoder)
    spoken = QFormer(L, 12, 1, 3, 20, cross_attention_frequency=1, vocab_size=VOCAB)
    with pytest.raises(ValueError, match=r"give qformer\.without_text\(\)"):
        Blip2(vision, spoken, decoder)
    with pytest.raises(ValueError, match="instruct=True needs a Q-Former with a text stream"):
        Blip2(vision, spoken.without_text(), decoder, instruct=True)
    with pytest.raises(ValueError, match="train_vision_norm is for a frozen vision encoder"):
        Blip2(vision, spoken.without_text(), decoder, freeze_vision=False, train_vision_norm=True)
    model, given = Blip2(vision, spoken.without_text(), decoder), batch()
    given = replace(given, pixels=torch.randn(3, 1, 3, 16, 16))
    with pytest.raises(ValueError, match="9 tokens were given, but this decoder has 5 positions"):
        model.hidden_states(given.truncate(6))
    assert model.max_len == 2
    with pytest.raises(ValueError, match=r"rows of 7 tokens, .* 2 at most: .*CaptionData\(max_len=2\)"):
        caption_loss(model, given)
    with pytest.raises(ValueError, match="Blip2 does not support the batch field image_index"):
        model.hidden_states(replace(given, image_index=given.tokens))
    instructed, long = blip2(instruct=True), torch.zeros(6, 18, dtype=torch.long)
    fields = (given.tokens, given.attention_mask, given.loss_mask, batch().pixels)
    with pytest.raises(ValueError, match="a text of 18 tokens, but this Q-Former has 17 positions"):
        instructed.hidden_states(InstructBatch(*fields, instruction=long))
    with pytest.raises(ValueError, match="needs pixels or visual_tokens"):
        model.hidden_states(replace(given, pixels=None))


def test_without_text_is_the_queries_part() -> None:
    spoken = QFormer(L, 12, 3, 3, 20, vocab_size=VOCAB).eval()
    alone = spoken.without_text()
    visual = torch.randn(2, 5, 20)
    assert torch.equal(alone(visual), spoken(visual))
    assert alone.vocab_size is None
    assert not any("mlp.fc1" in name and "query" not in name for name in alone.state_dict())
    alone.query_tokens.data += 1
    assert not torch.equal(alone(visual), spoken(visual))
