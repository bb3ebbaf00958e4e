"""What every captioner keeps: one forward for training by hand, fields read or refused, what can learn learns."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmtransformer import (
    AttentionConfig,
    Blip2,
    Blip2QFormer,
    CaptionBatch,
    CoCa,
    ConcatViT,
    Flamingo,
    GatedBlockConfig,
    Git,
    InstructBatch,
    OpenCoCa,
    PaliGemma,
    PerceiverResampler,
    PositionConfig,
    PrefixCaptioner,
    QFormer,
    TextDecoder,
    VisionEncoderDecoder,
    ViT,
    ViTPatchConfig,
    caption_loss,
)
from mmtransformer.captioners.base import Captioner

VOCAB = 53


def vit(**options: Any) -> ViT:
    return ViT((16, 24), 8, 20, 1, 4, **options)


def lm(**options: Any) -> TextDecoder:
    return TextDecoder(VOCAB, 24, 2, 4, **{"max_len": 61} | options)


def qformer(**options: Any) -> QFormer:
    return QFormer(3, 24, 2, 4, 20, dropout=0.0, **options)


def flamingo(**options: Any) -> Flamingo:
    resampler = PerceiverResampler(20, 1, 2, 8, 3)
    return Flamingo(vit(), lm(), connector=resampler, freeze_vision=False, freeze_decoder=False, **options)


def coca(**options: Any) -> CoCa:
    upper = lm(context_dim=20, positions=PositionConfig("rotary"))
    return CoCa(vit(), lm(), upper, num_queries=5, num_heads=5, embed_dim=11, **options)


def blip2(**options: Any) -> Blip2:
    decoder = options.pop("decoder", None) or lm()
    text = {"vocab_size": VOCAB, "max_len": 30} if options.get("instruct") else {}
    return Blip2(vit(), qformer(**text), decoder, freeze_vision=False, freeze_decoder=False, **options)


def prefix(vision: ViT | None = None, decoder: TextDecoder | None = None) -> PrefixCaptioner:
    return PrefixCaptioner(vision or vit(), decoder or lm(), freeze_vision=False, freeze_decoder=False)


BUILD: dict[str, Callable[[], Captioner]] = {
    "cross": lambda: VisionEncoderDecoder(vit(), lm(context_dim=20)),
    "prefix": prefix,
    "open coca": lambda: OpenCoCa(vit(), VOCAB, 24, 2, 2, 4, max_len=30, num_queries=5, pool_heads=3),
    "paligemma": lambda: PaliGemma(vit(), lm(), freeze_vision=False),
    "git": lambda: Git(vit(), lm()),
    "blip2": blip2,
    "flamingo": flamingo,
    "coca": coca,
    "stage 1": lambda: Blip2QFormer(vit(), qformer(vocab_size=VOCAB, max_len=30), embed_dim=7),
}
FROZEN: dict[str, Callable[[], Captioner]] = {
    "coca without a contrast": lambda: coca(contrastive_weight=0.0),
    "coca, its upper half untied": lambda: CoCa(
        vit(), lm(), lm(context_dim=20, positions=PositionConfig("rotary"), tied=False), num_queries=5, num_heads=5
    ),
    "a vision encoder that pools": lambda: prefix(vit(pool="attention", num_classes=7)),
    "instructions": lambda: blip2(instruct=True),
    "flamingo that sees nothing": lambda: flamingo(visible_images="none"),
    "flamingo that sees nothing, with MLPs": lambda: flamingo(
        visible_images="none", gated=GatedBlockConfig(mlp_without_image=True)
    ),
}


def shaken(model: Captioner) -> Any:
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def batch(i: int = 1, q: int = 7) -> CaptionBatch:
    torch.manual_seed(5)
    attention_mask = torch.arange(q) < torch.tensor([7, 4, 6, 3])[:, None]
    loss_mask = attention_mask & (torch.arange(q) > 1)
    tokens = torch.randint(1, VOCAB, (4, q))
    return CaptionBatch(tokens, attention_mask, loss_mask, torch.randn(2, i, 3, 16, 24), names=("a", "b"))


@pytest.mark.parametrize("kind", BUILD)
def test_forward_gives_a_mean_its_sums_and_logits_where_asked(kind: str) -> None:
    model, given = shaken(BUILD[kind]()), batch()
    plain, whole = model(given), model(given, return_logits=True)
    assert plain.logits is None
    assert whole.logits.shape == (4, 7, VOCAB)
    real = given.attention_mask
    torch.testing.assert_close(whole.logits[real], model.logits(given)[real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(plain.loss, plain.sums.sum / plain.sums.count)
    torch.testing.assert_close(whole.loss, plain.loss, atol=1e-5, rtol=1e-5)
    sums = caption_loss(model, given, reduction="sum")
    torch.testing.assert_close(caption_loss(model, given), sums.sum / sums.count)
    with pytest.raises(ValueError, match='"mean" or "sum", not "none"'):
        caption_loss(model, given, reduction="none")  # type: ignore[call-overload]


@pytest.mark.parametrize("kind", BUILD | FROZEN)
def test_whatever_learns_gets_a_gradient(kind: str) -> None:
    model = shaken((BUILD | FROZEN)[kind]()).train()
    model(batch()).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert any(p.requires_grad for p in model.parameters())


def test_images_that_nobody_sees_take_no_gradient_away() -> None:
    """One process may have a batch without a single real image, and must keep step with the others."""
    model = shaken(flamingo()).train()
    given = batch()
    none = torch.zeros(2, 1, dtype=torch.bool)
    without = replace(given, image_mask=none, image_index=torch.zeros_like(given.tokens))
    model(without).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert torch.equal(model.eval().logits(without), model.decoder.head(model.decoder(given.tokens)))


@pytest.mark.parametrize("kind", BUILD)
def test_one_image_each_needs_no_dimension_of_images(kind: str) -> None:
    model, given = shaken(BUILD[kind]()), batch()
    assert given.pixels is not None
    assert torch.equal(model.logits(replace(given, pixels=given.pixels[:, 0])), model.logits(given))
    assert torch.equal(model.forward_features(given.pixels[:, 0]), model.forward_features(given.pixels))
    with pytest.raises(ValueError, match=r"\(samples, images of a sample, 3, height, width\).*not \(3, 16, 24\)"):
        replace(given, pixels=given.pixels[0, 0])


@pytest.mark.parametrize("kind", BUILD)
@pytest.mark.parametrize("field", ["image_index", "first_image_index", "document_ids", "instruction"])
def test_fields_are_read_or_refused(kind: str, field: str) -> None:
    model, given = shaken(BUILD[kind]()), batch()
    if kind == "flamingo" and field != "instruction":
        return  # tests/captioners/test_flamingo.py has what it makes of them
    bad = InstructBatch(**vars(given)) if field == "instruction" else given
    with pytest.raises(ValueError, match=f"does not support the batch field {field}"):
        model(replace(bad, **{field: torch.ones_like(given.tokens)}))


@pytest.mark.parametrize("kind", BUILD)
def test_padding_before_the_text_is_refused_in_training(kind: str) -> None:
    given = batch()
    with pytest.raises(ValueError, match="row 1 has real tokens behind padding"):
        BUILD[kind]()(replace(given, attention_mask=given.attention_mask.flip(1)))


def alone(given: CaptionBatch, image: int, row: int) -> CaptionBatch:
    assert given.pixels is not None
    texts = {k: getattr(given, k)[row : row + 1] for k in ("tokens", "attention_mask", "loss_mask")}
    return CaptionBatch(**texts, pixels=given.pixels[row // 2, image][None])


PADDED: dict[str, Callable[[], Captioner]] = {name: BUILD[name] for name in ("cross", "prefix", "blip2", "coca")}
PADDED |= {
    f"{name}, window": (lambda make=make: make(decoder=lm(attention=AttentionConfig(window=5))))
    for name, make in (("prefix", prefix), ("blip2", blip2))
}


TOWERS: dict[str, Callable[[], ViT]] = {
    "registers": lambda: ViT((16, 24), 8, 20, 1, 4, num_registers=2),
    "patches alone": lambda: ViT((16, 24), 8, 20, 1, 4, class_token=False, pool="mean"),
    "patches left out in training": lambda: ViT((16, 24), 8, 20, 1, 4, patches=ViTPatchConfig(patch_dropout=0.5)),
    "two": lambda: ConcatViT(ViT((16, 24), 8, 12, 2, 4), ViT((16, 24), 8, 8, 1, 4), layers=(-2,)),
}


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("kind", BUILD)
def test_maps_are_of_patches_whatever_else_a_tower_gives(
    kind: str, tower: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "vit", TOWERS[tower])
    model, given = shaken(BUILD[kind]()), batch()
    found = model.attention_map(given)
    assert found.shape == (4, 7, 1, 2, 3)
    assert (found.sum((2, 3, 4)) <= 1 + 1e-5).all()
    assert torch.equal(model.train().attention_map(given), found)


@torch.no_grad()
@pytest.mark.parametrize("kind", PADDED)
@pytest.mark.parametrize("real", [0, 1, 2])
def test_images_that_are_padding_change_nothing(kind: str, real: int) -> None:
    """Where a decoder has a window, too: it counts places, and padding must not stand between image and text."""
    model, given = shaken(PADDED[kind]()), batch(i=3)
    mask = (torch.arange(3) == real).expand(2, 3)
    padded = replace(given, image_mask=mask)
    logits, heat = model.logits(padded), model.attention_map(padded)
    for row in range(4):
        one = alone(given, real, row)
        torch.testing.assert_close(logits[row], model.logits(one)[0], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(heat[row, :, real], model.attention_map(one)[0, :, 0], atol=1e-5, rtol=1e-4)
    prompts = replace(padded, attention_mask=torch.ones_like(given.attention_mask))
    first, state = model.prefill(prompts, expand_size=2, max_new_tokens=4)
    then = model.decode_step(first.argmax(1), state)
    for row in range(4):
        one = alone(prompts, real, row)
        want, own = model.prefill(one, max_new_tokens=4)
        torch.testing.assert_close(first[2 * row + 1], want[0], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(
            then[2 * row], model.decode_step(first[2 * row : 2 * row + 1].argmax(1), own)[0], atol=2e-5, rtol=1e-5
        )


def test_stage_1_refuses_images_that_are_padding() -> None:
    with pytest.raises(ValueError, match="does not support the batch field image_mask"):
        BUILD["stage 1"]()(replace(batch(i=2), image_mask=torch.ones(2, 2, dtype=torch.bool)))


@torch.no_grad()
def test_cocas_text_is_gathered_within_a_window_whatever_its_padding() -> None:
    text = lm(attention=AttentionConfig(window=3))
    model = shaken(CoCa(vit(), text, lm(context_dim=20, positions=PositionConfig("rotary")), num_heads=5))
    given = batch()
    vectors = model.text_features(given)
    for row, length in enumerate(given.attention_mask.sum(1).tolist()):
        one = CaptionBatch(*(x[row : row + 1, :length] for x in (given.tokens, given.attention_mask, given.loss_mask)))
        torch.testing.assert_close(vectors[row], model.text_features(one)[0], atol=1e-5, rtol=1e-5)


def test_decay_spares_what_the_parts_name() -> None:
    assert {"vision.pos_embed", "vision.prefix_tokens", "connector.latents"} <= flamingo().no_weight_decay()
    assert {"caption_pool.queries", "contrast_pool.queries"} <= coca().no_weight_decay()
    for name in flamingo().no_weight_decay() & dict(flamingo().named_parameters()).keys():
        assert isinstance(flamingo().get_parameter(name), Tensor | nn.Parameter)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own
def test_torch_compile_takes_the_plain_call() -> None:
    model, given = shaken(prefix()), batch()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(given).loss, model(given).loss, atol=1e-5, rtol=1e-5)
