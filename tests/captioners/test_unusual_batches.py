"""Batches that a loop of one's own may make: none of the rows, too many pictures, masks and prompts of other shapes."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from mmtransformer import (
    CLIP,
    Blip2,
    Blip2QFormer,
    CaptionBatch,
    Flamingo,
    GenerationConfig,
    Git,
    PaliGemma,
    PerceiverResampler,
    PrefixCaptioner,
    QFormer,
    TextDecoder,
    TextTower,
    TransformerConnector,
    VisionEncoderDecoder,
    ViT,
    caption_loss,
    generate,
)
from mmtransformer.backbones.base import PromptBatch


def vit() -> ViT:
    return ViT(16, 8, 24, 1, 2)


def lm(**more: Any) -> TextDecoder:
    return TextDecoder(60, 24, 1, 2, max_len=40, **more)


CAPTIONERS: dict[str, Callable[[], Any]] = {
    "cross-attention": lambda: VisionEncoderDecoder(vit(), lm(context_dim=24)),
    "blip2": lambda: Blip2(vit(), QFormer(3, 24, 1, 2, 24), lm()),
    "flamingo": lambda: Flamingo(vit(), lm(), connector=PerceiverResampler(24, 1, 2, 12, 3)),
    "prefix": lambda: PrefixCaptioner(vit(), lm()),
    "git": lambda: Git(vit(), lm()),
    "paligemma": lambda: PaliGemma(vit(), lm()),
}


def batch(
    rows: int, *, length: int = 5, samples: int | None = None, masks: dict[str, torch.Tensor] | None = None
) -> CaptionBatch:
    tokens = torch.randint(3, 60, (rows, length))
    real = torch.ones_like(tokens, dtype=torch.bool)
    fields: dict[str, Any] = {"tokens": tokens, "attention_mask": real, "loss_mask": real} | (masks or {})
    return CaptionBatch(**fields, pixels=torch.rand(rows if samples is None else samples, 1, 3, 16, 16))


@pytest.mark.parametrize("name", CAPTIONERS)
def test_a_batch_of_no_rows_is_one(name: str) -> None:
    model = CAPTIONERS[name]()
    loss = caption_loss(model, batch(0))
    loss.backward()
    assert loss.item() == 0
    for beams in (1, 2):
        assert generate(model, batch(0), eos_id=2, max_new_tokens=3, num_beams=beams) == []


@pytest.mark.parametrize("name", CAPTIONERS)
def test_an_empty_prompt_is_answered_or_refused_in_words(name: str) -> None:
    model = CAPTIONERS[name]()
    if name in ("blip2", "prefix"):  # pictures stand before the text
        assert len(generate(model, batch(2, length=0), eos_id=2, max_new_tokens=2)) == 2
        return
    with pytest.raises(ValueError, match=f"a {type(model).__name__} goes on from one token at least"):
        generate(model, batch(2, length=0), eos_id=2, max_new_tokens=2)


def test_rows_and_masks_that_do_not_fit_are_refused() -> None:
    for make in CAPTIONERS.values():
        model = make()
        for samples in (3, 4):
            for call in (caption_loss, partial(generate, eos_id=2, max_new_tokens=2)):
                with pytest.raises(
                    ValueError, match=rf"^2 texts cannot be shared out among {samples} images \(rows of pixels"
                ):
                    call(model, batch(2, samples=samples))
        for call in (caption_loss, partial(generate, eos_id=2, max_new_tokens=2)):
            for kind in (torch.int32, torch.float32):
                short = batch(2)
                with pytest.raises(
                    ValueError, match=rf"^tokens are ids in torch.int64, not in {kind}: give tokens.long"
                ):
                    call(model, replace(short, tokens=short.tokens.to(kind)))
        for shape in ((2, 4), (5,)):
            mask = torch.ones(shape, dtype=torch.bool)
            for field in ("attention_mask", "loss_mask"):
                with pytest.raises(ValueError, match=r"and loss_mask are \(n q\), all alike, not \[2, 5\]"):
                    caption_loss(model, batch(2, masks={field: mask}))
            with pytest.raises(ValueError, match=r"attention_mask .* is not of the tokens \(2, 5\)"):
                generate(model, batch(2, masks={"attention_mask": mask}), eos_id=2, max_new_tokens=2)
    tokens = torch.ones(2, 5, dtype=torch.long)
    for wrong, mask in ((tokens[0], tokens[0]), (tokens.float(), tokens), (tokens.bool(), tokens), ([[1]], tokens)):
        with pytest.raises(ValueError, match=r"tokens are a tensor \(b q\) of ids, torch.int64, not "):
            PromptBatch(wrong, mask)  # pyright: ignore[reportArgumentType]
        if isinstance(wrong, torch.Tensor):
            with pytest.raises(ValueError, match=r"tokens are a tensor \(b q\) of ids, torch.int64, not "):
                lm()(wrong)
    for mask in (tokens[:, :4], tokens[:1], tokens[0]):
        with pytest.raises(ValueError, match=r"attention_mask .* is not of the tokens \(2, 5\)"):
            PromptBatch(tokens, mask)
        with pytest.raises(ValueError, match=r"attention_mask .* is not of the tokens \(2, 5\)"):
            lm()(tokens, attention_mask=mask)
    with pytest.raises(ValueError, match="attention_mask must be bool"):
        lm()(tokens, attention_mask=tokens.float())
    decoder = lm(context_dim=8)
    for context in (torch.rand(2, 3, 9), torch.rand(3, 8)):
        with pytest.raises(ValueError, match=r"a context is \(n k 8\), not "):
            decoder(tokens, context)


def test_masks_of_one_row_or_column_are_not_stretched_over_all() -> None:
    """torch would broadcast them without a word."""

    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=torch.bool)

    visual, text, context = torch.rand(2, 7, 24), torch.ones(2, 3, dtype=torch.long), torch.rand(2, 4, 8)
    decoder, qformer = lm(context_dim=8), QFormer(3, 24, 1, 2, 24, vocab_size=9)
    wrong = ((2, 1), (1, 7), (7,), (2, 6), (2, 2, 7))
    for shape in wrong:
        with pytest.raises(ValueError, match=r"visual_mask .* is not of the visual tokens \(2, 7\)"):
            qformer(visual, visual_mask=ones(*shape))
        with pytest.raises(ValueError, match=r"visual_mask .* is not of the visual tokens \(2, 7\)"):
            qformer(visual, text, visual_mask=ones(*shape))
        for read in (qformer.encode_text, partial(qformer.encode_pair, visual), partial(qformer, visual)):
            with pytest.raises(ValueError, match=r"attention_mask .* is not of the text \(2, 3\)"):
                read(text, ones(*shape))
        with pytest.raises(ValueError, match=r"context_mask .* is not of the context \(2, 4\)"):
            decoder(text, context, context_mask=ones(*shape))
        for connector in (PerceiverResampler(24, 1, 2, 12, 3), TransformerConnector(24, 24, 1, 2)):
            with pytest.raises(ValueError, match=r"mask .* is not of the visual tokens \(2, 1, 7\)"):
                connector(visual[:, None], ones(*shape))
    flamingo = CAPTIONERS["flamingo"]()
    for shape in ((2, 4), (2, 6), (1, 5), (2, 1)):
        with pytest.raises(ValueError, match=r"image_index .* is not of the tokens \(2, 5\)"):
            caption_loss(flamingo, replace(batch(2), image_index=ones(*shape).long()))
        with pytest.raises(ValueError, match=r"image_mask .* is not of the images \(2, 1\)"):
            caption_loss(flamingo, replace(batch(2), image_mask=ones(*shape)[:, 0]))
        with pytest.raises(ValueError, match=r"and loss_mask are \(n q\), all alike, not \[2, 5\]"):
            caption_loss(flamingo, batch(2, masks={"loss_mask": ones(*shape)}))


def test_a_loss_of_padding_is_refused() -> None:
    real = torch.ones(2, 5, dtype=torch.bool)
    real[1, 3:] = False
    model = CAPTIONERS["cross-attention"]()
    given = batch(2, masks={"attention_mask": real})
    for call in (model, model.logits, partial(caption_loss, model)):
        with pytest.raises(ValueError, match="loss_mask asks for padding in row 1, where attention_mask is False"):
            call(given)
    assert model(replace(given, loss_mask=given.loss_mask & real)).loss.isfinite()


def test_parts_of_another_kind_are_named() -> None:
    qformer = QFormer(3, 24, 1, 2, 24)
    for other in (
        lm(),
        PerceiverResampler(24, 1, 2, 12, 3),
        Blip2QFormer(vit(), QFormer(3, 24, 1, 2, 24, vocab_size=60)),
    ):
        with pytest.raises(ValueError, match=f"qformer must be a QFormer, not a {type(other).__name__}"):
            Blip2(vit(), other, lm())  # pyright: ignore[reportArgumentType]
    for other in (lm(), qformer, vit()):
        with pytest.raises(ValueError, match=f"text must be a TextTower, .* not a {type(other).__name__}"):
            CLIP(vit(), other)  # pyright: ignore[reportArgumentType]
    tower = TextTower(60, dim=24, depth=1, num_heads=2)
    with pytest.raises(ValueError, match="vision must be a vision encoder, such as a ViT, not a TextTower"):
        CLIP(tower, tower)  # pyright: ignore[reportArgumentType]


def test_what_is_no_batch_or_no_model_is_said() -> None:
    model = CAPTIONERS["cross-attention"]()
    with pytest.raises(TypeError, match=r"reads a CaptionBatch, .*, not a dict"):
        model({"tokens": torch.ones(1, 2)})
    with pytest.raises(TypeError, match=r"backbones.base.PromptBatch\(tokens, attention_mask\), not a list"):
        generate(lm(), [[1, 2]], eos_id=2)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="a ViT is neither"):
        generate(vit(), batch(1), eos_id=2)  # pyright: ignore[reportArgumentType]
    long = torch.ones(1, 41, dtype=torch.long)
    with pytest.raises(ValueError, match="shorten the prompt"):
        generate(lm(), PromptBatch(long, long), eos_id=2, max_new_tokens=1)
    with pytest.raises(ValueError, match="pixels are a tensor, as ImageTransform makes it, not ndarray"):
        vit()(np.zeros((1, 3, 16, 16)))
    assert vit().to("meta")(torch.empty(1, 3, 16, 16, device="meta")).shape == (1, 24)


def test_the_loss_of_what_is_around_a_captioner_is_its_own_call() -> None:
    model = CAPTIONERS["prefix"]()
    for wrapped in (AveragedModel(model), torch.nn.Sequential(model)):
        with pytest.raises(TypeError, match=rf"a {type(wrapped).__name__}: call that, wrapper\(batch\)\.loss"):
            caption_loss(wrapped, batch(2))  # pyright: ignore[reportArgumentType]
    assert AveragedModel(model)(batch(2)).loss.isfinite()


def test_more_tokens_at_least_than_at_most_are_refused() -> None:
    with pytest.raises(ValueError, match=r"min_new_tokens \(6\) cannot exceed max_new_tokens \(5\)"):
        GenerationConfig(min_new_tokens=6, max_new_tokens=5)
    saved = GenerationConfig(min_new_tokens=6, max_new_tokens=9)
    assert saved.updated(max_new_tokens=5).min_new_tokens == 5  # a model's own, not asked for
    assert saved.limited(4).min_new_tokens == 4
    with pytest.raises(ValueError, match=r"min_new_tokens \(7\) cannot exceed"):
        saved.updated(min_new_tokens=7, max_new_tokens=5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ViT(16, 0), "patch_size must be at least 1, not 0"),
        (lambda: ViT(-16, 8), "image_size must be at least 1, not -16"),
        (lambda: ViT("16", 8), "image_size must be a whole number, not '16'"),  # pyright: ignore[reportArgumentType]
        (lambda: ViT(16, 8, 24, -1, 2), "depth must be at least 0, not -1"),
        (lambda: ViT(16, 8, 24, 1, 0), "num_heads must be at least 1, not 0"),
        (lambda: ViT(16, 8, 0, 1, 2), "dim must be at least 1, not 0"),
        (lambda: ViT(16, 8, 24, 1, 2, num_classes=-1), "num_classes must be at least 0, not -1"),
        (lambda: lm(mlp_dim=0), "mlp_dim must be at least 1, not 0"),
        (lambda: TextDecoder(0, 24, 1, 2), "vocab_size must be at least 1, not 0"),
        (lambda: TextDecoder(60, 24, 1.5, 2), "depth must be a whole number, not 1.5"),  # pyright: ignore
        (lambda: QFormer(3, 24, 1, 2, 0), "visual_dim must be at least 1, not 0"),
        (lambda: PerceiverResampler(24, 0), "depth must be at least 1, not 0"),
        (lambda: PerceiverResampler(24, 1, 2, 0), "head_dim must be at least 1, not 0"),
    ],
)
def test_sizes_that_are_none_are_named(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}$"):
        make()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: lm(positions="rotary"), r"positions must be of PositionConfig\(kind, .*\), not 'rotary'"),
        (lambda: lm(norm="rms"), r"norm must be of NormConfig\(kind, .*\), not 'rms'"),
        (lambda: lm(attention={"qk_norm": "rms"}), r"attention must be of AttentionConfig\(.*qk_norm.*\), not \{"),
        (lambda: ViT(16, 8, 24, 1, 2, patches="conv"), r"patches must be of ViTPatchConfig\(.*stem.*\), not 'conv'"),  # pyright: ignore
        (lambda: VisionEncoderDecoder(lm(), ViT(16, 8, 24, 1, 2)), "vision must be .*, not TextDecoder"),  # pyright: ignore
    ],
)  # fmt: skip
def test_arguments_of_another_kind_are_named(make: Callable[[], object], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        make()
