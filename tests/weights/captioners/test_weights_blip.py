"""BLIP's weights: transformers' models, there and back, on small random ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BlipConfig, BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipForQuestionAnswering

from mmtransformer import (
    BlipITM,
    BlipVQA,
    CaptionBatch,
    GenerationConfig,
    InstructBatch,
    VisionEncoderDecoder,
    caption_loss,
    generate,
)
from mmtransformer.weights import from_transformers, load_blip, save_blip
from mmtransformer.weights.captioners.blip import blip_from_state

BOS, SEP, PAD, VOCAB = 51, 7, 0, 53
IDS = {"bos_token_id": BOS, "sep_token_id": SEP, "pad_token_id": PAD, "eos_token_id": SEP}
SHAPES = [
    {
        "vision_config": {"hidden_size": 24, "intermediate_size": 31, "num_hidden_layers": 2, "num_attention_heads": 4,
                          "image_size": 28, "patch_size": 7},
        "text_config": {"vocab_size": VOCAB, "hidden_size": 20, "intermediate_size": 29, "num_hidden_layers": 3,
                        "num_attention_heads": 5, "max_position_embeddings": 37, **IDS},
    },
    {
        "vision_config": {"hidden_size": 22, "intermediate_size": 41, "num_hidden_layers": 1, "num_attention_heads": 2,
                          "image_size": 15, "patch_size": 5, "layer_norm_eps": 1e-3},
        "text_config": {"vocab_size": VOCAB, "hidden_size": 33, "intermediate_size": 43, "num_hidden_layers": 2,
                        "num_attention_heads": 3, "max_position_embeddings": 31, "hidden_act": "gelu_new",
                        "layer_norm_eps": 1e-2, **IDS},
    },
]  # fmt: skip


def noisy(model: nn.Module, wide: float = 0.35) -> Any:
    """Random in every tensor: transformers' vision tower is as good as zeros. Wide, so that texts are not all alike."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        scale = 1.0 if "word_embeddings" in name or "itm_head" in name else wide if parameter.ndim > 1 else 0.2
        parameter.data += scale * torch.randn_like(parameter)
    return model.eval()


def theirs_of(shape: dict[str, Any], kind: Any = BlipForConditionalGeneration, wide: float = 0.35) -> Any:
    return noisy(kind(BlipConfig(**shape)), wide)


def pixels_of(shape: dict[str, Any], rows: int = 3) -> Tensor:
    size = shape["vision_config"]["image_size"]
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(2))


def close(found: Tensor, want: Tensor) -> None:
    """Equal to 1e-5, relative to the largest."""
    assert found.shape == want.shape
    assert (found - want).abs().max() <= 1e-5 * want.abs().max()


def batch_of(pixels: Tensor, rows: list[list[int]], *, left: bool = False) -> CaptionBatch:
    """Rows of ids, padded."""
    q = max(map(len, rows))
    tokens, real = torch.full((len(rows), q), PAD), torch.zeros(len(rows), q, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(q - len(row), q) if left else slice(len(row))
        tokens[i, place], real[i, place] = torch.tensor(row), True
    return CaptionBatch(tokens, real, real, pixels=pixels)


def new_ids(model: Any, batch: Any, **settings: Any) -> list[list[int]]:
    config = GenerationConfig(**{"max_new_tokens": 11, **settings})
    return [best.tokens for best, *_ in generate(model, batch, config, eos_id=SEP)]


def until_end(row: list[int]) -> list[int]:
    return row[: row.index(SEP)] if SEP in row else row


def their_ids(theirs: Any, pixels: Tensor, prompt: list[int], **settings: Any) -> list[list[int]]:
    """transformers' new ids for one prompt; it overwrites the first of what it gets, and cuts off the last."""
    given = torch.tensor([[0, *prompt[1:], SEP]] * len(pixels))
    found = theirs.generate(pixels, input_ids=given, **{"max_new_tokens": 11, **settings})
    return [until_end(row) for row in found[:, len(prompt) :].tolist()]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_captioner_of_transformers(shape: dict[str, Any]) -> None:
    theirs, pixels = theirs_of(shape), pixels_of(shape)
    ours = from_transformers(theirs)
    rows = [[BOS, 5, 9, 4, 11], [BOS, 8], [BOS, 3, 12]]
    batch = batch_of(pixels, rows)
    real = batch.attention_mask
    with torch.no_grad():
        want = theirs(pixels, input_ids=batch.tokens, attention_mask=real.long()).logits
        found = ours.logits(batch)
        tower = theirs.vision_model(pixels).last_hidden_state
    close(found[real], want[real])
    close(ours.forward_features(pixels)[:, 0], tower)
    assert want[real].std() > 0.5
    assert want[real].argmax(-1).unique().numel() > 2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"num_beams": 4, "length_penalty": 0.3}])
def test_the_same_ids(shape: dict[str, Any], settings: dict[str, Any]) -> None:
    theirs, pixels = theirs_of(shape), pixels_of(shape, 5)
    ours = from_transformers(theirs)
    assert new_ids(ours, batch_of(pixels, [[BOS]] * 5), **settings) == [
        until_end(row[1:]) for row in theirs.generate(pixels, max_new_tokens=11, **settings).tolist()
    ]
    prompts = [[BOS, 5, 9, 4], [BOS], [BOS, 3], [BOS, 3, 12, 4], [BOS, 9, 9]]
    together = new_ids(ours, batch_of(pixels, prompts, left=True), **settings)
    alone = [their_ids(theirs, pixels[i : i + 1], prompt, **settings)[0] for i, prompt in enumerate(prompts)]
    assert together == alone
    assert len({tuple(row) for row in together}) > 1


def test_the_loss_is_theirs_without_padding() -> None:
    theirs, pixels = theirs_of(SHAPES[0]), pixels_of(SHAPES[0])
    batch = batch_of(pixels, [[BOS, 5, 9, 4, SEP], [BOS, 8, SEP], [BOS, 3, 12, SEP]])
    labels = batch.tokens.masked_fill(~batch.attention_mask, -100)
    want = theirs(pixels, input_ids=batch.tokens, attention_mask=batch.attention_mask.long(), labels=labels).loss
    ours = from_transformers(theirs)
    found = caption_loss(ours, batch)
    close(found, want)
    grads = torch.autograd.grad(found, [ours.vision.blocks[0].mlp.fc1.weight, ours.decoder.tok_embed.weight])
    theirs_too = [theirs.vision_model.encoder.layers[0].mlp.fc1.weight,
                  theirs.text_decoder.bert.embeddings.word_embeddings.weight]  # fmt: skip
    for ours_is, theirs_is in zip(grads, torch.autograd.grad(want, theirs_too), strict=True):
        assert (ours_is - theirs_is).abs().max() <= 1e-4 * theirs_is.abs().max()


def test_what_was_fine_tuned_goes_back(tmp_path: Path) -> None:
    ours, pixels = from_transformers(theirs_of(SHAPES[0], wide=0.1)), pixels_of(SHAPES[0])
    batch = batch_of(pixels, [[BOS, 5, 9, 4, SEP], [BOS, 8, SEP], [BOS, 3, 12, SEP]])
    optimizer = torch.optim.AdamW(ours.train().parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = caption_loss(ours, batch)
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in ours.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert new_ids(ours.eval(), batch_of(pixels, [[BOS]] * 3)) == [[5, 9, 4], [8], [3, 12]]
    save_blip(ours, tmp_path, bos_token_id=BOS, sep_token_id=SEP)
    theirs = BlipForConditionalGeneration.from_pretrained(tmp_path)
    rows = theirs.generate(pixels, max_new_tokens=11)[:, 1:].tolist()
    assert [until_end(row) for row in rows] == [[5, 9, 4], [8], [3, 12]]


@pytest.mark.parametrize("shape", SHAPES)
def test_there_and_back(shape: dict[str, Any], tmp_path: Path) -> None:
    theirs, pixels = theirs_of(shape), pixels_of(shape)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_blip(tmp_path / "theirs")
    save_blip(ours, tmp_path / "ours", bos_token_id=BOS, sep_token_id=SEP)
    again, info = BlipForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in theirs.state_dict().items():
        if name not in ("vision_model.embeddings.class_embedding", "vision_model.embeddings.position_embedding"):
            assert torch.equal(again.state_dict()[name], tensor)
    assert torch.equal(again.vision_model(pixels)[0], theirs.vision_model(pixels)[0])
    assert torch.equal(*(model.generate(pixels, num_beams=3, max_new_tokens=11) for model in (again, theirs)))
    back = load_blip(tmp_path / "ours")
    assert back.decoder.lm_head.weight is back.decoder.tok_embed.weight
    for (name, tensor), other in zip(back.state_dict().items(), ours.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys()


def test_the_image_is_projected_once() -> None:
    """Not once a token."""
    ours, pixels = from_transformers(theirs_of(SHAPES[0])), pixels_of(SHAPES[0])
    seen: list[int] = []
    ours.decoder.blocks[0].cross_attn.k_proj.register_forward_hook(lambda *_: seen.append(1))
    new_ids(ours, batch_of(pixels, [[BOS]] * 3), num_beams=3)
    assert len(seen) == 1


def test_heat_maps_are_shares_of_the_patches() -> None:
    ours, pixels = from_transformers(theirs_of(SHAPES[0])), pixels_of(SHAPES[0])
    heat = ours.attention_map(batch_of(pixels, [[BOS, 5, 9], [BOS, 4], [BOS]]))
    assert heat.shape == (3, 3, 1, 4, 4)
    assert bool((heat >= 0).all())
    assert bool((heat.flatten(2).sum(-1) <= 1 + 1e-6).all())


def test_refusals(tmp_path: Path) -> None:
    theirs = theirs_of(SHAPES[0])
    theirs.save_pretrained(tmp_path)
    config, state = theirs.config.to_dict(), load_file(tmp_path / "model.safetensors")

    def refused(match: str, changes: dict[str, Any] | None = None, *, tensors: dict[str, Tensor] | None = None) -> None:
        with pytest.raises(ValueError, match=match):
            blip_from_state(config | (changes or {}), state if tensors is None else tensors, "it")

    text, vision = config["text_config"], config["vision_config"]
    refused("no activation like mish here", {"text_config": text | {"hidden_act": "mish"}})
    refused("hidden_act relu", {"vision_config": vision | {"hidden_act": "relu"}})
    refused("tie_word_embeddings is false", {"tie_word_embeddings": False})
    refused("unknown: cls.extra.weight", tensors=state | {"text_decoder.cls.extra.weight": torch.ones(1)})
    refused("unknown: itm_head.weight", tensors=state | {"itm_head.weight": torch.ones(1)})
    name = "text_decoder.bert.encoder.layer.0.crossattention.self.key.weight"
    refused("unknown: visual_projection.weight", tensors=state | {"visual_projection.weight": torch.ones(1)})
    refused("missing: bert.encoder.layer.0.crossattention", tensors={k: v for k, v in state.items() if k != name})
    copy = {"text_decoder.cls.predictions.decoder.weight": torch.ones(VOCAB, 20)}
    refused("are tied, but the two are different", tensors=state | copy)
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "git"}')
    with pytest.raises(ValueError, match='model_type is "git", not "blip"'):
        load_blip(tmp_path)
    ours = from_transformers(theirs)
    with pytest.raises(ValueError, match=r"bos_token_id \(30522\) must be one of the model's 53 ids"):
        save_blip(ours, tmp_path / "out")
    other = VisionEncoderDecoder(ours.vision, type(ours.decoder)(VOCAB, 20, 1, 5, context_dim=24))
    with pytest.raises(ValueError, match="mlm_head=False"):
        save_blip(other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------- questions, matching


def vqa_shape(shape: dict[str, Any]) -> dict[str, Any]:
    """Of one width, as transformers' question answering needs."""
    text, heads = shape["text_config"], shape["vision_config"]["num_attention_heads"]
    width = shape["vision_config"]["hidden_size"]
    return shape | {"text_config": text | {"hidden_size": width, "num_attention_heads": heads}}


QUESTIONS = [[3, 5, 9, 4, SEP], [3, 8, SEP], [3, 12, 11, SEP]]


def asked(pixels: Tensor, questions: list[list[int]], answers: list[list[int]], **options: Any) -> InstructBatch:
    batch, question = batch_of(pixels, answers, **options), batch_of(pixels, questions)
    return InstructBatch(**vars(batch), instruction=question.tokens, instruction_attention_mask=question.attention_mask)


@pytest.mark.parametrize("shape", SHAPES)
def test_answers_are_theirs(shape: dict[str, Any]) -> None:
    theirs, pixels = theirs_of(vqa_shape(shape), BlipForQuestionAnswering), pixels_of(shape)
    ours = from_transformers(theirs)
    assert isinstance(ours, BlipVQA)
    batch = asked(pixels, QUESTIONS, [[BOS, 5, 9, SEP], [BOS, 8, SEP], [BOS, SEP]])
    with torch.no_grad():
        found = ours.logits(batch)
        # One by one: of several questions, transformers' answers look at padding too.
        for i, question in enumerate(QUESTIONS):
            tokens = batch.tokens[i : i + 1, : int(batch.attention_mask[i].sum())]
            image = theirs.vision_model(pixels[i : i + 1])[0]
            states = theirs.text_encoder(torch.tensor([question]), encoder_hidden_states=image)[0]
            want = theirs.text_decoder(tokens, encoder_hidden_states=states).logits
            close(found[i : i + 1, : tokens.shape[1]], want)
    assert (found[0, 0] - found[1, 0]).abs().max() > 0.1
    for settings in ({}, {"num_beams": 3}):
        found = new_ids(ours, asked(pixels, QUESTIONS, [[BOS]] * 3), **settings)
        for i, question in enumerate(QUESTIONS):
            alone = theirs.generate(torch.tensor([question]), pixels[i : i + 1], max_new_tokens=11, **settings)
            assert found[i] == until_end(alone[0, 1:].tolist())
    one = asked(pixels, [QUESTIONS[2]] * 3, [[BOS, 5, 9, SEP]] * 3)
    labels = one.tokens
    close(caption_loss(ours, one), theirs(one.instruction, pixels, labels=labels).loss)


def test_an_answer_needs_a_question_and_looks_at_the_image_through_it() -> None:
    ours = from_transformers(theirs_of(vqa_shape(SHAPES[0]), BlipForQuestionAnswering))
    pixels = pixels_of(SHAPES[0])
    with pytest.raises(ValueError, match="the batch needs an instruction a row"):
        ours.logits(batch_of(pixels, [[BOS]] * 3))
    heat = ours.attention_map(asked(pixels, QUESTIONS, [[BOS, 5, 9], [BOS, 4], [BOS]]))
    assert heat.shape == (3, 3, 1, 4, 4)
    assert bool((heat >= 0).all())
    assert bool((heat.flatten(2).sum(-1) <= 1 + 1e-6).all())


@pytest.mark.parametrize("shape", SHAPES)
def test_matching_and_contrast_are_theirs(shape: dict[str, Any]) -> None:
    theirs = theirs_of(shape | {"image_text_hidden_size": 11}, BlipForImageTextRetrieval, 0.15)
    ours, pixels = from_transformers(theirs), pixels_of(shape)
    assert isinstance(ours, BlipITM)
    batch = batch_of(pixels, QUESTIONS)
    real = batch.attention_mask
    with torch.no_grad():
        visual = ours.forward_features(pixels)
        given = {"input_ids": batch.tokens, "pixel_values": pixels, "attention_mask": real.long()}
        close(ours.match(visual, batch.tokens, real), theirs(**given).itm_score)
        want = theirs(**given, use_itm_head=False).itm_score
        close(ours.image_features(visual) @ ours.encode_text(batch.tokens, real).T, want)
        # All texts beside the first image, whose keys are computed once.
        first = {**given, "pixel_values": pixels[:1].expand(3, -1, -1, -1)}
        close(ours.match(ours.text.project_context(visual[:1]), batch.tokens, real), theirs(**first).itm_score)


@pytest.mark.parametrize("kind", [BlipForQuestionAnswering, BlipForImageTextRetrieval])
def test_the_others_there_and_back(kind: Any, tmp_path: Path) -> None:
    theirs = theirs_of(vqa_shape(SHAPES[0]) | {"image_text_hidden_size": 11}, kind)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_blip(tmp_path / "theirs")
    save_blip(ours, tmp_path / "ours", bos_token_id=BOS, sep_token_id=SEP)
    again, info = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in theirs.state_dict().items():
        if name not in ("vision_model.embeddings.class_embedding", "vision_model.embeddings.position_embedding"):
            assert torch.equal(again.state_dict()[name], tensor)
    back = load_blip(tmp_path / "ours")
    for (name, tensor), other in zip(back.state_dict().items(), ours.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
    ours.save_pretrained(tmp_path / "own")
    own = type(ours).from_pretrained(tmp_path / "own").state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in ours.state_dict().items())


def test_old_files_buffers_are_left_aside(tmp_path: Path) -> None:
    theirs = theirs_of(SHAPES[0])
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["text_decoder.bert.embeddings.position_ids"] = torch.arange(37)[None]
    save_file(state, tmp_path / "model.safetensors")
    pixels = pixels_of(SHAPES[0])
    assert torch.equal(load_blip(tmp_path).forward_features(pixels), from_transformers(theirs).forward_features(pixels))
