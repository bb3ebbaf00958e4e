"""BLIP-2's weights: transformers' models and LAVIS's names, there and back, on small random models."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Model,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    Blip2VisionConfig,
    Blip2VisionModel,
    GPTNeoXConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    LlamaConfig,
    OPTConfig,
    T5Config,
)
from transformers.models.bert.modeling_bert import BertOnlyMLMHead

from mmtransformer import Blip2, CaptionBatch, MLPConfig, QFormer, TextDecoder, ViT, ViTBlockConfig, generate
from mmtransformer.captioners.blip2 import InstructBatch
from mmtransformer.captioners.blip2_qformer import Blip2QFormer
from mmtransformer.weights import from_transformers
from mmtransformer.weights.captioners.blip2 import load_blip2, save_blip2, to_blip2
from mmtransformer.weights.captioners.lavis import blip2_from_lavis, blip2_qformer_from_lavis, to_lavis
from mmtransformer.weights.captioners.parts.qformer import init_from_bert
from mmtransformer.weights.vision.eva import vision_from_blip2

L, VOCAB, WORDS, IMAGE = 3, 53, 43, 52
VISION = {"hidden_size": 24, "intermediate_size": 31, "num_hidden_layers": 2, "num_attention_heads": 4,
          "image_size": 28, "patch_size": 7}  # fmt: skip
QFORMER = {"hidden_size": 20, "num_hidden_layers": 5, "num_attention_heads": 4, "intermediate_size": 29,
           "vocab_size": WORDS, "max_position_embeddings": 17, "encoder_hidden_size": 24}  # fmt: skip
OPT = OPTConfig(vocab_size=VOCAB, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, ffn_dim=37,
                max_position_embeddings=41, word_embed_proj_dim=12)  # fmt: skip
LLAMA = LlamaConfig(vocab_size=VOCAB, hidden_size=12, num_hidden_layers=2, num_attention_heads=3,
                    num_key_value_heads=1, intermediate_size=37, max_position_embeddings=41)  # fmt: skip


def noisy(model: nn.Module) -> Any:
    """Random in every tensor: transformers' queries are zeros, its vision tower as good as."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def config(kind: type = Blip2Config, *, text: bool = False, language: Any = OPT) -> Any:
    qformer = QFORMER | ({"use_qformer_text_input": True} if text else {})
    return kind(vision_config=VISION, qformer_config=qformer, text_config=language, num_query_tokens=L,
                image_text_hidden_size=11, image_token_index=IMAGE)  # fmt: skip


def texts(rows: int = 3, vocab: int = IMAGE, q: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(2)
    attention_mask = torch.arange(q) < torch.tensor([q, 2, 3])[:rows, None]
    return torch.randn(rows, 3, 28, 28), torch.randint(vocab, (rows, q)), attention_mask


def batch(pixels: Tensor, tokens: Tensor, attention_mask: Tensor) -> CaptionBatch:
    return CaptionBatch(tokens, attention_mask, attention_mask, pixels=pixels[:, None])


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def placed(tokens: Tensor) -> Tensor:
    """Transformers wants an id in place of every query."""
    return torch.cat((torch.full((len(tokens), L), IMAGE), tokens), 1)


def same_tensors(found: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert {k: tuple(v.shape) for k, v in found.items()} == {k: tuple(v.shape) for k, v in want.items()}


# ------------------------------------------------------------------------------------------------- transformers


def test_the_vision_tower() -> None:
    theirs = noisy(Blip2VisionModel(Blip2VisionConfig(**VISION)))
    state = {f"vision_model.{name}": tensor for name, tensor in theirs.state_dict().items()}
    ours = vision_from_blip2(theirs.config.to_dict(), state, "it")
    pixels, _, _ = texts()
    close(ours.forward_features(pixels), theirs(pixels).last_hidden_state)
    assert ours.block.norm_eps == 1e-6
    with pytest.raises(ValueError, match="hidden_act quick_gelu, qkv_bias True"):
        vision_from_blip2(theirs.config.to_dict() | {"hidden_act": "quick_gelu"}, state, "it")
    with pytest.raises(ValueError, match=r"it has no tensor vision_model\.embeddings\.class_embedding"):
        vision_from_blip2(theirs.config.to_dict(), {k: v for k, v in state.items() if "class_emb" not in k}, "it")


@pytest.mark.parametrize("language", [OPT, LLAMA])
@pytest.mark.parametrize("kind", [Blip2Model, Blip2ForConditionalGeneration])
def test_conditional_generation(kind: type, language: Any) -> None:
    theirs = noisy(kind(config(language=language)))
    ours = from_transformers(theirs)
    assert isinstance(ours, Blip2)
    pixels, tokens, attention_mask = texts()
    with torch.no_grad():
        want = theirs(pixel_values=pixels, input_ids=placed(tokens)).logits[:, L:]
        close(ours.logits(batch(pixels, tokens, attention_mask))[attention_mask], want[attention_mask])
        assert want.std() > 0.1
    found, tensors = to_blip2(ours)
    again = noisy(kind(Blip2Config.from_dict(found | {"image_token_index": IMAGE})))
    again.load_state_dict(tensors, strict=True)
    with torch.no_grad():
        close(again(pixel_values=pixels, input_ids=placed(tokens)).logits[:, L:], want)


@pytest.mark.parametrize("tied", [True, False])
def test_an_encoder_decoder_as_language_model(tied: bool, tmp_path: Any) -> None:
    """Prompts go to the encoder; those of T5 begin a target with id 0."""
    t5 = T5Config(vocab_size=VOCAB, d_model=12, d_kv=4, d_ff=37, num_layers=2, num_heads=3, dropout_rate=0.0,
                  tie_word_embeddings=tied, decoder_start_token_id=0, feed_forward_proj="gated-gelu")  # fmt: skip
    theirs = noisy(Blip2ForConditionalGeneration(config(language=t5)))
    ours = from_transformers(theirs)
    assert isinstance(ours, Blip2)
    pixels, tokens, _ = texts(q=6)
    tokens[:, 0] = 0
    lengths, prompts = torch.tensor([6, 5, 6]), torch.tensor([3, 2, 4])  # The begin token is one of them.
    places = torch.arange(6)
    given = CaptionBatch(
        tokens, places < lengths[:, None], (places >= prompts[:, None]) & (places < lengths[:, None]),
        pixels=pixels[:, None],
    )  # fmt: skip
    logits = ours.logits(given)
    for row in range(3):
        start, end = int(prompts[row]), int(lengths[row])
        source = torch.cat((torch.full((1, L), IMAGE), tokens[row : row + 1, 1:start]), 1)
        loss_mask = torch.cat((tokens[row : row + 1, :1], tokens[row : row + 1, start:end]), 1)
        want = theirs(pixel_values=pixels[row : row + 1], input_ids=source, decoder_input_ids=loss_mask).logits[0]
        close(logits[row, 0], want[0])
        close(logits[row, start:end], want[1:])
    begun = batch(
        pixels, tokens[:, :3].clone(), torch.tensor([[False, True, True], [False, False, True], [True, True, True]])
    )
    begun.tokens[0, 1] = begun.tokens[1, 2] = 0
    begun = replace(begun, loss_mask=torch.zeros_like(begun.attention_mask))
    found = generate(ours, begun, eos_id=1, max_new_tokens=6, num_beams=3)
    for row, left in enumerate((2, 3, 1)):
        source = torch.cat((torch.full((1, L), IMAGE), begun.tokens[row : row + 1, left:]), 1)
        want = theirs.generate(
            pixels[row : row + 1], source, num_beams=3, max_new_tokens=6, decoder_start_token_id=0
        )  # fmt: skip
        assert found[row][0].tokens == [token for token in want[0, 1:].tolist() if token > 1]
    save_blip2(ours, tmp_path, image_token_id=IMAGE)
    again = load_blip2(tmp_path)
    assert torch.equal(again.logits(given), logits)
    ours.save_pretrained(tmp_path / "own")
    assert torch.equal(Blip2.from_pretrained(tmp_path / "own").logits(given), logits)
    back = Blip2ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    close(back(pixel_values=pixels[:1], input_ids=placed(tokens[:1, 1:3]), decoder_input_ids=tokens[:1, [0, 3, 4, 5]])
          .logits[0, 1:], logits[0, 3:])  # fmt: skip


def test_generation_with_beams_and_prompts_of_different_lengths() -> None:
    theirs = noisy(Blip2ForConditionalGeneration(config()))
    ours = from_transformers(theirs)
    pixels, tokens, attention_mask = texts()
    tokens, attention_mask = tokens.flip(1), attention_mask.flip(1)  # Padded on the left.
    padded = torch.cat((torch.full((3, L), IMAGE), tokens), 1)
    # Transformers wants padding before the queries, ours stands between queries and prompt.
    for row in range(3):
        pads = int((~attention_mask[row]).sum())
        padded[row] = torch.cat((torch.full((pads,), 1), torch.full((L,), IMAGE), tokens[row, pads:]))
    known = torch.cat((attention_mask, torch.ones(3, L, dtype=torch.bool)), 1)
    with torch.no_grad():
        want = theirs.generate(
            pixels, padded, known.long(), max_new_tokens=7, min_new_tokens=7, num_beams=3, eos_token_id=2
        )  # fmt: skip
    found = generate(
        ours, batch(pixels, tokens, attention_mask), eos_id=2, max_new_tokens=7, min_new_tokens=7, num_beams=3
    )
    assert [texts[0].tokens for texts in found] == want[:, -7:].tolist()


def test_retrieval() -> None:
    theirs = noisy(Blip2ForImageTextRetrieval(config(text=True)))
    ours = from_transformers(theirs)
    assert isinstance(ours, Blip2QFormer)
    pixels, tokens, attention_mask = texts(vocab=WORDS)
    mask = torch.cat((torch.ones(3, L, dtype=torch.long), attention_mask.long()), 1)
    with torch.no_grad():
        visual = ours.vision.forward_features(pixels)
        itc = theirs(pixels, placed(tokens), mask)
        images = ours.project_queries(ours.qformer(visual))
        close(images, itc.image_embeds)
        words = ours.encode_text(tokens, attention_mask)
        close(words, itc.text_embeds)
        close((images @ words.T).amax(1), itc.logits_per_image)
        itm = theirs(pixels, placed(tokens), mask, use_image_text_matching_head=True)
        close(ours.match(visual, tokens, attention_mask), itm.logits_per_image)
    found, tensors = to_blip2(ours)
    again = noisy(Blip2ForImageTextRetrieval(Blip2Config.from_dict(found | {"image_token_index": IMAGE})))
    again.load_state_dict(tensors, strict=True)
    with torch.no_grad():
        close(again(pixels, placed(tokens), mask).logits_per_image, itc.logits_per_image)


def test_instructions() -> None:
    theirs = noisy(InstructBlipForConditionalGeneration(config(InstructBlipConfig, language=LLAMA)))
    ours = from_transformers(theirs)
    assert ours.instruct
    pixels, tokens, attention_mask = texts()
    words, real = torch.randint(WORDS, (3, 4)), torch.arange(4) < torch.tensor([[4], [1], [3]])
    with torch.no_grad():
        want = theirs(pixels, words, real.long(), placed(tokens)).logits[:, L:]
        given = InstructBatch(
            tokens,
            attention_mask,
            attention_mask,
            pixels=pixels[:, None],
            instruction=words,
            instruction_attention_mask=real,
        )
        close(ours.logits(given)[attention_mask], want[attention_mask])
    found, tensors = to_blip2(ours)
    again = InstructBlipForConditionalGeneration(InstructBlipConfig.from_dict(found | {"image_token_index": IMAGE}))
    again.load_state_dict(tensors, strict=True)
    with torch.no_grad():
        close(again.eval()(pixels, words, real.long(), placed(tokens)).logits[:, L:], want)


def test_the_qformer_alone() -> None:
    theirs = noisy(Blip2QFormerModel(Blip2QFormerConfig(**QFORMER)))
    ours = QFormer(L, 20, 5, 4, 24, mlp_dim=29).eval()
    whole = noisy(Blip2ForConditionalGeneration(config()))
    whole.qformer.load_state_dict(theirs.state_dict())
    ours.load_state_dict(from_transformers(whole).qformer.state_dict())
    visual = torch.randn(2, 7, 24)
    want = theirs(whole.query_tokens.expand(2, -1, -1), encoder_hidden_states=visual).last_hidden_state
    close(ours(visual), want)


def test_folders_there_and_back(tmp_path: Any) -> None:
    ours = from_transformers(noisy(Blip2ForConditionalGeneration(config())))
    assert isinstance(ours, Blip2)
    pixels, tokens, attention_mask = texts()
    with pytest.raises(ValueError, match=r"image_token_id \(None\) must be one of the decoder's 53 ids"):
        save_blip2(ours, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    save_blip2(ours, tmp_path / "hub", image_token_id=IMAGE)
    theirs = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "hub", dtype=torch.float32).eval()
    want = ours.logits(batch(pixels, tokens, attention_mask))
    close(theirs(pixel_values=pixels, input_ids=placed(tokens)).logits[:, L:][attention_mask], want[attention_mask])
    assert torch.equal(load_blip2(tmp_path / "hub").logits(batch(pixels, tokens, attention_mask)), want)
    ours.save_pretrained(tmp_path / "own")
    assert torch.equal(Blip2.from_pretrained(tmp_path / "own").logits(batch(pixels, tokens, attention_mask)), want)
    with pytest.raises(ValueError, match='model_type is "None", not "blip-2"'):
        load_blip2(tmp_path / "own")


def test_a_published_config_leaves_out_what_is_usual(tmp_path: Any) -> None:
    ours = from_transformers(noisy(Blip2ForConditionalGeneration(config())))
    save_blip2(ours, tmp_path, image_token_id=IMAGE)
    found = json.loads((tmp_path / "config.json").read_text())
    defaults = Blip2Config().to_dict()
    assert found["vision_config"].pop("layer_norm_eps") == defaults["vision_config"]["layer_norm_eps"]
    for name in ("layer_norm_eps", "hidden_act", "cross_attention_frequency", "hidden_dropout_prob"):
        assert found["qformer_config"].pop(name) == defaults["qformer_config"][name]
    del found["vision_config"]["hidden_act"], found["text_config"]["activation_function"]
    (tmp_path / "config.json").write_text(json.dumps(found))
    given = batch(*texts())
    assert torch.equal(load_blip2(tmp_path).logits(given), ours.logits(given))


def test_towers_that_blip2_does_not_know_are_refused() -> None:
    opt = TextDecoder(VOCAB, 12, 1, 3, mlp=MLPConfig("relu"))
    for vision, what in (
        (ViT(28, 7, 24, 1, 4, num_registers=2), r"no registers \(this: 2\)"),
        (ViT((28, 35), 7, 24, 1, 4), r"square pictures \(this: 28 x 35 px\)"),
        (ViT(28, 7, 24, 1, 4, block=ViTBlockConfig(layer_scale=0.1)), r"blocks\.0\.branch1\.0\.gamma"),
    ):
        with pytest.raises(ValueError, match=what):
            to_blip2(Blip2(vision, QFormer(L, 20, 1, 4, 24), opt))


# -------------------------------------------------------------------------------------------------------- LAVIS


def lavis_names(theirs: nn.Module) -> dict[str, Tensor]:
    """The tensors of a transformers model as LAVIS names them, rewritten one by one."""
    rules = [
        (r"^vision_model\.embeddings\.class_embedding$", "visual_encoder.cls_token"),
        (r"^vision_model\.embeddings\.position_embedding$", "visual_encoder.pos_embed"),
        (r"^vision_model\.embeddings\.patch_embedding", "visual_encoder.patch_embed.proj"),
        (r"^vision_model\.post_layernorm", "ln_vision"),
        (r"^vision_model\.encoder\.layers", "visual_encoder.blocks"),
        (r"layer_norm([12])", r"norm\1"),
        (r"self_attn\.projection", "attn.proj"),
        (r"self_attn\.qkv", "attn.qkv"),
        (r"^qformer\.layernorm", "Qformer.bert.embeddings.LayerNorm"),
        (r"^qformer\.embeddings\.layernorm", "Qformer.bert.embeddings.LayerNorm"),
        (r"^(qformer\.)?embeddings\.", "Qformer.bert.embeddings."),
        (r"^qformer\.encoder", "Qformer.bert.encoder"),
        (r"attention\.attention", "attention.self"),
        (r"^vision_projection", "vision_proj"),
        (r"^text_projection", "text_proj"),
        (r"^language_projection", "opt_proj"),
    ]
    found = {}
    for old, tensor in theirs.state_dict().items():
        name = old
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        if name.startswith("language_model"):
            continue
        if name.endswith("attn.qkv.bias"):
            stem = name.removesuffix("qkv.bias")
            found[f"{stem}q_bias"], _, found[f"{stem}v_bias"] = tensor.chunk(3)
        else:
            found[name] = tensor.clone()
    return found


def keyless(theirs: Any) -> Any:
    for block in theirs.vision_model.encoder.layers:
        block.self_attn.qkv.bias.data.chunk(3)[1].zero_()
    return theirs


def head_of(hidden: int, words: Tensor) -> tuple[nn.Module, dict[str, Tensor]]:
    head = noisy(BertOnlyMLMHead(BertConfig(hidden_size=hidden, vocab_size=len(words), layer_norm_eps=1e-12)))
    head.predictions.decoder.weight.data = words
    head.predictions.decoder.bias.data = head.predictions.bias.data
    return head, {f"Qformer.cls.{name}": tensor for name, tensor in head.state_dict().items()}


def test_stage_1_of_lavis() -> None:
    theirs = keyless(noisy(Blip2ForImageTextRetrieval(config(text=True))))
    head, tensors = head_of(20, theirs.embeddings.word_embeddings.weight.data)
    state = lavis_names(theirs) | tensors | {"temp": torch.tensor(0.05)}
    state["Qformer.bert.embeddings.position_ids"] = torch.arange(17)[None]
    vision = from_transformers(theirs).vision
    bare = {name: t for name, t in state.items() if not name.startswith("visual_encoder")}
    ours = blip2_qformer_from_lavis(bare, vision=vision, num_heads=4, cls_token_id=7)
    pixels, tokens, attention_mask = texts(vocab=WORDS)
    with_cls_token = torch.cat((torch.full_like(tokens[:, :1], 7), tokens[:, 1:]), 1)
    mask = torch.cat((torch.ones(3, L, dtype=torch.long), attention_mask.long()), 1)
    with torch.no_grad():
        itc = theirs(pixels, placed(with_cls_token), mask)
        close(ours.encode_text(tokens, attention_mask), itc.text_embeds)
        itm = theirs(pixels, placed(with_cls_token), mask, use_image_text_matching_head=True)
        close(ours.match(ours.vision.forward_features(pixels), tokens, attention_mask), itm.logits_per_image)
        hidden = torch.randn(2, 5, 20)
        close(ours.head(hidden), head(hidden))
    assert ours.temperature.item() == pytest.approx(0.05)
    back = to_lavis(ours)
    want = {name: t for name, t in state.items() if "position_ids" not in name}
    same_tensors(back, want)
    for name, tensor in want.items():
        if name not in ("visual_encoder.cls_token", "visual_encoder.pos_embed"):
            close(back[name], tensor)
    at_class = back["visual_encoder.cls_token"] + back["visual_encoder.pos_embed"][:, :1]
    close(at_class, want["visual_encoder.cls_token"] + want["visual_encoder.pos_embed"][:, :1])


def test_stage_2_of_lavis_with_its_vision_tower() -> None:
    wide = VISION | {"hidden_size": 176, "num_attention_heads": 2}
    theirs = Blip2ForConditionalGeneration(
        Blip2Config(vision_config=wide, qformer_config=QFORMER | {"num_attention_heads": 4}, text_config=OPT,
                    num_query_tokens=L, image_token_index=IMAGE)
    )  # fmt: skip
    theirs = keyless(noisy(theirs))
    state, decoder = lavis_names(theirs), from_transformers(theirs).decoder
    ours = blip2_from_lavis(state, decoder, num_heads=4)
    assert (ours.vision.num_heads, ours.train_vision_norm, ours.instruct) == (2, True, False)
    pixels, tokens, attention_mask = texts()
    with torch.no_grad():
        want = theirs(pixel_values=pixels, input_ids=placed(tokens)).logits[:, L:]
        close(ours.logits(batch(pixels, tokens, attention_mask))[attention_mask], want[attention_mask])
    back = to_lavis(ours)
    same_tensors(back, state)
    again = blip2_from_lavis(back, decoder, num_heads=4)
    assert torch.equal(
        again.logits(batch(pixels, tokens, attention_mask)), ours.logits(batch(pixels, tokens, attention_mask))
    )


def test_instructions_of_lavis() -> None:
    theirs = keyless(noisy(InstructBlipForConditionalGeneration(config(InstructBlipConfig))))
    known = from_transformers(theirs)
    state = {name: t for name, t in lavis_names(theirs).items() if not name.startswith("visual_encoder")}
    state = {name.replace("opt_proj", "llm_proj"): t for name, t in state.items()}
    ours = blip2_from_lavis(state, known.decoder, vision=known.vision, num_heads=4)
    assert ours.instruct
    pixels, tokens, attention_mask = texts()
    given = InstructBatch(
        tokens, attention_mask, attention_mask, pixels=pixels[:, None], instruction=tokens[:, :2] % WORDS
    )
    close(ours.logits(given), known.logits(given))
    assert "llm_proj.weight" in to_lavis(ours)


def test_names_and_shapes_of_lavis() -> None:
    """What the published files hold, spelled out for one block."""
    model = Blip2QFormer(
        ViT(28, 14, 88, 1, 1, mlp_dim=13), QFormer(2, 64, 1, 1, 88, mlp_dim=5, vocab_size=7, max_len=3), embed_dim=11
    )  # fmt: skip
    self_attention = {f"{part}.{kind}.{what}": (64, 64) for part, kind, what in (
        ("attention", "self.query", "weight"), ("attention", "self.key", "weight"),
        ("attention", "self.value", "weight"), ("attention", "output.dense", "weight"),
        ("crossattention", "self.query", "weight"), ("crossattention", "output.dense", "weight"))}  # fmt: skip
    block = self_attention | {f"crossattention.self.{name}.weight": (64, 88) for name in ("key", "value")}
    for which in ("", "_query"):
        block |= {f"intermediate{which}.dense.weight": (5, 64), f"intermediate{which}.dense.bias": (5,)}
        block |= {f"output{which}.dense.weight": (64, 5), f"output{which}.dense.bias": (64,)}
        block |= {f"output{which}.LayerNorm.weight": (64,), f"output{which}.LayerNorm.bias": (64,)}
    for part in ("attention", "crossattention"):
        names = ("self.query", "self.key", "self.value", "output.dense", "output.LayerNorm")
        block |= {f"{part}.{name}.bias": (64,) for name in names} | {f"{part}.output.LayerNorm.weight": (64,)}
    want = {f"Qformer.bert.encoder.layer.0.{name}": shape for name, shape in block.items()}
    want |= {
        "query_tokens": (1, 2, 64), "temp": (), "Qformer.bert.embeddings.word_embeddings.weight": (7, 64),
        "Qformer.bert.embeddings.position_embeddings.weight": (3, 64),
        "Qformer.bert.embeddings.LayerNorm.weight": (64,), "Qformer.bert.embeddings.LayerNorm.bias": (64,),
        "Qformer.cls.predictions.bias": (7,), "Qformer.cls.predictions.decoder.weight": (7, 64),
        "Qformer.cls.predictions.decoder.bias": (7,), "Qformer.cls.predictions.transform.dense.weight": (64, 64),
        "Qformer.cls.predictions.transform.dense.bias": (64,),
        "Qformer.cls.predictions.transform.LayerNorm.weight": (64,),
        "Qformer.cls.predictions.transform.LayerNorm.bias": (64,),
        "vision_proj.weight": (11, 64), "vision_proj.bias": (11,), "text_proj.weight": (11, 64),
        "text_proj.bias": (11,), "itm_head.weight": (2, 64), "itm_head.bias": (2,),
        "ln_vision.weight": (88,), "ln_vision.bias": (88,), "visual_encoder.cls_token": (1, 1, 88),
        "visual_encoder.pos_embed": (1, 5, 88), "visual_encoder.patch_embed.proj.weight": (88, 3, 14, 14),
        "visual_encoder.patch_embed.proj.bias": (88,), "visual_encoder.blocks.0.norm1.weight": (88,),
        "visual_encoder.blocks.0.norm1.bias": (88,), "visual_encoder.blocks.0.attn.q_bias": (88,),
        "visual_encoder.blocks.0.attn.v_bias": (88,), "visual_encoder.blocks.0.attn.qkv.weight": (264, 88),
        "visual_encoder.blocks.0.attn.proj.weight": (88, 88), "visual_encoder.blocks.0.attn.proj.bias": (88,),
        "visual_encoder.blocks.0.norm2.weight": (88,), "visual_encoder.blocks.0.norm2.bias": (88,),
        "visual_encoder.blocks.0.mlp.fc1.weight": (13, 88), "visual_encoder.blocks.0.mlp.fc1.bias": (13,),
        "visual_encoder.blocks.0.mlp.fc2.weight": (88, 13), "visual_encoder.blocks.0.mlp.fc2.bias": (88,),
    }  # fmt: skip
    theirs = to_lavis(model)
    assert {name: tuple(t.shape) for name, t in theirs.items()} == want
    again = blip2_qformer_from_lavis(theirs, cls_token_id=None)
    tokens = torch.tensor([[1, 2, 3]])
    close(
        again.match(torch.ones(1, 5, 88), tokens, tokens > 0),
        model.eval().match(torch.ones(1, 5, 88), tokens, tokens > 0),
    )


def test_a_key_bias_changes_nothing() -> None:
    """Why LAVIS may keep none: our tower with one, without one, and through LAVIS's names."""
    opt = TextDecoder(VOCAB, 12, 1, 3)
    model = noisy(Blip2(ViT(28, 14, 88, 2, 1, mlp_dim=13), QFormer(L, 64, 2, 1, 88), opt))
    pixels, tokens, attention_mask = texts()
    again = blip2_from_lavis(to_lavis(model), opt)
    assert not again.vision.blocks[0].attn.k_proj.bias.any()
    assert model.vision.blocks[0].attn.k_proj.bias.all()
    close(again.logits(batch(pixels, tokens, attention_mask)), model.logits(batch(pixels, tokens, attention_mask)))


def test_what_lavis_files_cannot_be() -> None:
    opt = TextDecoder(VOCAB, 12, 1, 3)
    model = Blip2QFormer(ViT(28, 14, 88, 1, 1), QFormer(L, 64, 1, 1, 88, vocab_size=WORDS))
    good = to_lavis(model)

    def without(*names: str) -> dict[str, Tensor]:
        return {name: t for name, t in good.items() if not name.startswith(names)}

    with pytest.raises(ValueError, match=r"no tensor visual_encoder\.patch_embed.* give the vision tower"):
        blip2_qformer_from_lavis(without("visual_encoder"))
    with pytest.raises(ValueError, match=r"has a vision tower .* and another one was given"):
        blip2_qformer_from_lavis(good, vision=model.vision)
    with pytest.raises(ValueError, match="no tensor temp, so it is not a stage-1 model"):
        blip2_qformer_from_lavis(without("temp"))
    with pytest.raises(ValueError, match="no tensor query_tokens, so it is not a BLIP-2"):
        blip2_qformer_from_lavis(without("query_tokens"))
    with pytest.raises(ValueError, match=r"missing: itm_head\.weight, itm_head\.bias"):
        blip2_qformer_from_lavis(without("itm_head"), cls_token_id=None)
    with pytest.raises(ValueError, match="unknown: extra"):
        blip2_qformer_from_lavis(good | {"extra": torch.ones(1)}, cls_token_id=None)
    torn = good | {"Qformer.cls.predictions.decoder.weight": torch.zeros(WORDS, 64)}
    with pytest.raises(ValueError, match=r"decoder\.weight differs from"):
        blip2_qformer_from_lavis(torn, cls_token_id=None)
    with pytest.raises(ValueError, match="has 0 of opt_proj, llm_proj, t5_proj"):
        blip2_from_lavis(good, opt)
    wide = ViT(28, 14, 96, 1, 1)
    with pytest.raises(ValueError, match=r"weight is \(88,\), the model wants \(96,\)"):
        blip2_qformer_from_lavis(without("visual_encoder"), vision=wide, cls_token_id=None)
    with pytest.raises(ValueError, match="this tower has 3 prefix tokens"):
        to_lavis(Blip2(ViT(28, 14, 88, 1, 1, num_registers=2), QFormer(L, 64, 1, 1, 88), opt))


# --------------------------------------------------------------------------------------------------------- BERT


def bert(layers: int = 3) -> Any:
    config = BertConfig(hidden_size=20, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=29,
                        vocab_size=WORDS - 1, max_position_embeddings=17)  # fmt: skip
    return noisy(BertModel(config))


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_a_qformer_starts_as_bert(prefix: str) -> None:
    theirs = bert()
    theirs.embeddings.token_type_embeddings.weight.data.zero_()  # A Q-Former has none.
    qformer = noisy(QFormer(L, 20, 3, 4, 24, mlp_dim=29, vocab_size=WORDS, max_len=17))
    before = {name: t.clone() for name, t in qformer.state_dict().items()}
    state = {prefix + name: t for name, t in theirs.state_dict().items()}
    assert init_from_bert(qformer, state) is qformer
    _, tokens, attention_mask = texts(vocab=WORDS - 1)
    want = theirs(tokens, attention_mask=attention_mask.long()).last_hidden_state
    close(qformer.encode_text(tokens, attention_mask)[attention_mask], want[attention_mask])
    for block in qformer.blocks:
        for ours, copied in ((block.mlp.fc1, block.query_mlp.fc1), (block.norm2, block.query_norm)):
            assert torch.equal(ours.weight, copied.weight)
            assert torch.equal(ours.bias, copied.bias)
    after = qformer.state_dict()
    kept = [name for name in before if "cross" in name or name == "query_tokens"]
    assert kept
    assert all(torch.equal(after[name], before[name]) for name in kept)
    assert torch.equal(after["tok_embed.weight"][WORDS - 1], before["tok_embed.weight"][WORDS - 1])  # [DEC]


def test_queries_alone_start_as_bert() -> None:
    theirs = bert()
    qformer = init_from_bert(QFormer(L, 20, 2, 4, 24, mlp_dim=29), theirs)  # Shallower: the first layers.
    assert torch.equal(qformer.blocks[1].query_mlp.fc2.weight, theirs.encoder.layer[1].output.dense.weight)
    assert torch.equal(qformer.norm.bias, theirs.embeddings.LayerNorm.bias)


def test_a_bert_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"encoder\.layer\.1\..* depth 2"):
        init_from_bert(QFormer(L, 20, 2, 4, 24, mlp_dim=29), bert(1))
    with pytest.raises(ValueError, match=r"is \(20,\), but this Q-Former's .* is \(24,\)"):
        init_from_bert(QFormer(L, 24, 1, 4, 24, mlp_dim=29), bert(1))


@pytest.mark.parametrize("source", ["transformers", "ours"])
def test_a_language_model_whose_names_on_disk_are_others(source: str, tmp_path: Any) -> None:
    """transformers keeps GPT-NeoX's head as `embed_out` in files, as `lm_head` in memory."""
    neox = GPTNeoXConfig(vocab_size=VOCAB, hidden_size=12, num_hidden_layers=2, num_attention_heads=3,
                         intermediate_size=37, max_position_embeddings=41)  # fmt: skip
    theirs = noisy(Blip2ForConditionalGeneration(config(language=neox)))
    if source == "ours":
        save_blip2(from_transformers(theirs), tmp_path, image_token_id=IMAGE)
    else:
        theirs.save_pretrained(tmp_path)
    found = load_blip2(tmp_path)
    pixels, tokens, attention_mask = texts()
    again = Blip2ForConditionalGeneration.from_pretrained(tmp_path).eval()
    for model in (theirs, again):
        want = model(pixel_values=pixels, input_ids=placed(tokens)).logits[:, L:]
        close(found.logits(batch(pixels, tokens, attention_mask))[attention_mask], want[attention_mask])
    state = {f"language_model.gpt_neox.{name}": torch.zeros(2) for name in ("layers.7.bias", "more")}
    state |= safetensors.torch.load_file(tmp_path / "model.safetensors")
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"does not fit transformers' GPTNeoXForCausalLM; unexpected_keys: gpt_neox"):
        load_blip2(tmp_path)
