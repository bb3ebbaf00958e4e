"""Pictures of native size in a batch: every captioner and a CLIP give each what it gets alone, gradients too."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmtransformer import (
    CLIP,
    Blip2,
    Blip2QFormer,
    CaptionBatch,
    CoCa,
    Connector,
    Flamingo,
    LinearConnector,
    PerceiverResampler,
    PositionConfig,
    PrefixCaptioner,
    QFormer,
    TextDecoder,
    TextTower,
    Transformer,
    TransformerConnector,
    VisionEncoderDecoder,
    ViT,
    generate,
)
from mmtransformer.backbones.vit_variants.padded import padded_features
from mmtransformer.batch.images import pad_images, token_mask
from mmtransformer.captioners.base import Captioner
from mmtransformer.generation.sampling import checksums

VOCAB, PATCH = 53, 8
SIZES = [(16, 40), (24, 24), (8, 8)]


def vit(**options: Any) -> ViT:
    return ViT((16, 24), PATCH, 20, 2, 4, **{"num_registers": 1} | options)


def lm(**options: Any) -> TextDecoder:
    return TextDecoder(VOCAB, 24, 2, 4, **{"max_len": 61} | options)


def flamingo(connector: Connector | None = None, **options: Any) -> Flamingo:
    return Flamingo(vit(), lm(), connector=connector, freeze_vision=False, freeze_decoder=False, **options)


def qformer(**options: Any) -> QFormer:
    return QFormer(3, 24, 2, 4, 20, dropout=0.0, **options)


def blip2(decoder: Any = None, **options: Any) -> Blip2:
    text = {"vocab_size": VOCAB, "max_len": 30} if options.get("instruct") else {}
    parts = (vit(), qformer(**text), lm() if decoder is None else decoder)
    return Blip2(*parts, **{"freeze_vision": False, "freeze_decoder": False} | options)


def coca(**options: Any) -> CoCa:
    upper = lm(context_dim=20, positions=PositionConfig("rotary"))
    return CoCa(vit(), lm(), upper, num_queries=5, num_heads=5, embed_dim=11, **options)


BUILD: dict[str, Callable[[], Captioner]] = {
    "cross": lambda: VisionEncoderDecoder(vit(), lm(context_dim=20)),
    "cross, blocks": lambda: VisionEncoderDecoder(
        vit(), lm(context_dim=12), connector=TransformerConnector(20, 12, 2, 3)
    ),
    "cross, latents": lambda: VisionEncoderDecoder(
        vit(), lm(context_dim=20), connector=PerceiverResampler(20, 2, 2, 8, 3)
    ),
    "cross, linear": lambda: VisionEncoderDecoder(vit(), lm(context_dim=12), connector=LinearConnector(20, 12)),
    "prefix": lambda: PrefixCaptioner(vit(), lm(), freeze_vision=False, freeze_decoder=False),
    "prefix, rotary": lambda: PrefixCaptioner(
        vit(class_token=False, num_registers=0, pool="mean"), lm(positions=PositionConfig("rotary")),
        freeze_vision=False, freeze_decoder=False,
    ),
    "blip2": blip2,
    "blip2, instructed": lambda: blip2(instruct=True),
    "blip2, its norm learns": lambda: blip2(freeze_vision=True, train_vision_norm=True),
    "blip2, an encoder reads": lambda: blip2(Transformer(VOCAB, 24, 1, 4, max_len=61)),
    "flamingo": lambda: flamingo(PerceiverResampler(20, 2, 2, 8, 3)),
    "flamingo, patches alone": lambda: flamingo(PerceiverResampler(20, 2, 2, 8, 3), keep_prefix_tokens=False),
    "flamingo, all tokens": lambda: flamingo(None, keep_prefix_tokens=False, visible_images="all_previous"),
    "flamingo, linear": lambda: flamingo(LinearConnector(20, 12)),
    "coca, captions": lambda: coca(contrastive_weight=0.0),
}  # fmt: skip


def shaken(model: nn.Module) -> Any:
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def pictures() -> list[Tensor]:
    torch.manual_seed(5)
    return [torch.randn(3, *size) for size in SIZES]


def batch(q: int = 7) -> CaptionBatch:
    """Three pictures, two texts of each."""
    torch.manual_seed(6)
    attention_mask = torch.arange(q) < torch.tensor([7, 4, 6, 3, 5, 7])[:, None]
    loss_mask = attention_mask & (torch.arange(q) > 1)
    tokens = torch.randint(1, VOCAB, (6, q))
    made = CaptionBatch.from_pixels(pictures(), PATCH)
    return replace(made, tokens=tokens, attention_mask=attention_mask, loss_mask=loss_mask, names=("a", "b", "c"))


def alone(whole: CaptionBatch, i: int) -> CaptionBatch:
    """Picture i as pixels of one size, with its texts."""
    rows = slice(2 * i, 2 * i + 2)
    texts = {name: getattr(whole, name)[rows] for name in ("tokens", "attention_mask", "loss_mask")}
    return CaptionBatch(**texts, pixels=pictures()[i][None], names=whole.names[i : i + 1])


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", BUILD)
def test_each_picture_gets_what_it_gets_alone(kind: str) -> None:
    model, given = shaken(BUILD[kind]()), batch()
    whole, each = model(given, return_logits=True), [model(alone(given, i), return_logits=True) for i in range(3)]
    for i, one in enumerate(each):
        # Where an encoder reads prompts, their logits mean nothing.
        real = given.loss_mask[2 * i : 2 * i + 2].roll(-1, 1)
        close(whole.logits[2 * i : 2 * i + 2][real], one.logits[real])
    close(whole.sums.sum, torch.stack([one.sums.sum for one in each]).sum())
    whole.sums.sum.backward()
    mine = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.stack([one.sums.sum for one in each]).sum().backward()
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert mine.keys() == theirs.keys()
    for name, grad in mine.items():
        scale = max(1.0, float(theirs[name].abs().max()))
        close(grad / scale, theirs[name] / scale)


@pytest.mark.parametrize("kind", BUILD)
@torch.no_grad()
def test_captions_and_maps_are_those_of_each_alone(kind: str) -> None:
    model, given = shaken(BUILD[kind]()), batch()
    prompts = replace(given, tokens=given.tokens[::2, :2], attention_mask=given.attention_mask[::2, :2],
                      loss_mask=~given.attention_mask[::2, :2])  # fmt: skip
    found = generate(model, prompts, eos_id=0, max_new_tokens=5, num_beams=2)
    drawn = model.has_heatmaps
    assert drawn == (kind != "cross, latents")  # whose tokens are no patches
    maps = model.attention_map(given) if drawn else torch.empty(6, 7, 1, 2, 3)
    assert maps.shape == (6, 7, 1, 2, 3)
    for i in range(3):
        texts = {name: getattr(prompts, name)[i : i + 1] for name in ("tokens", "attention_mask", "loss_mask")}
        one = CaptionBatch(**texts, pixels=pictures()[i][None])
        again = generate(model, one, eos_id=0, max_new_tokens=5, num_beams=2)[0]
        assert [x.tokens for x in again] == [x.tokens for x in found[i]]
        if not drawn:
            continue
        own = model.attention_map(alone(given, i))  # On its own grid; ours is stretched over the model's.
        real = given.loss_mask[2 * i : 2 * i + 2]
        sums = (x.sum((-1, -2))[real] for x in (maps[2 * i : 2 * i + 2], own))
        close(*sums)


@pytest.mark.parametrize("options", [{}, {"pool_heads": 5}, {"freeze_vision": True}])
def test_a_clip_compares_them_as_each_alone(options: dict[str, Any]) -> None:
    def text() -> TextTower:
        return TextTower(VOCAB, 24, 1, 4, max_len=9)

    model, given = shaken(CLIP(vit(pool="attention"), text(), embed_dim=11, **options)), batch()
    vectors = model.image_features(given)
    close(vectors, torch.cat([model.encode_image(image[None]) for image in pictures()]))
    assert given.pixels is not None
    assert given.patch_grids is not None
    close(vectors, model.encode_image(given.pixels[:, 0], given.patch_grids[:, 0]))
    texts = model.text_features(given)
    model.compare(given, vectors, texts).loss.backward()
    mine = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    each = torch.cat([model.image_features(alone(given, i)) for i in range(3)])
    model.compare(given, each, model.text_features(given)).loss.backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == (name not in mine), name
        if p.grad is not None:
            close(mine[name], p.grad)


def test_two_pictures_of_a_sample_and_one_that_is_none() -> None:
    model = shaken(flamingo(PerceiverResampler(20, 2, 2, 8, 3), visible_images="all_previous"))
    images = pictures()
    patches, grids = pad_images([[images[0], images[1]], [images[2], images[2]]], PATCH)
    grids[1, 1] = 0
    real = torch.tensor([[True, True], [True, False]])
    given = batch()
    texts = {name: getattr(given, name)[::3] for name in ("tokens", "attention_mask", "loss_mask")}
    both = CaptionBatch(**texts, pixels=patches, patch_grids=grids, image_mask=real)
    found = model.logits(both)
    for i, own in enumerate(([0, 1], [2])):
        alone, sizes = pad_images([[images[j] for j in own]], PATCH)
        row = {name: x[i : i + 1] for name, x in texts.items()}
        one = model.logits(CaptionBatch(**row, pixels=alone, patch_grids=sizes))
        mask = row["attention_mask"]
        close(found[i : i + 1][mask], one[mask])


def test_patches_are_filled_up_and_told() -> None:
    images = pictures()
    patches, grids = pad_images([[image] for image in images], PATCH)
    assert (patches.shape, grids.tolist()) == ((3, 1, 10, 192), [[[2, 5]], [[3, 3]], [[1, 1]]])
    assert token_mask(grids, 12, 2).sum(-1).tolist() == [[12], [11], [3]]
    grids[1] = 0
    assert token_mask(grids, 12, 2).sum(-1).tolist() == [[12], [0], [3]]
    assert padded_features(vit(), patches, grids).shape == (3, 1, 12, 20)
    with pytest.raises(ValueError, match=r"samples have \[1, 2\] pictures"):
        pad_images([images[:1], images[1:]], PATCH)
    with pytest.raises(ValueError, match="needs at least one picture"):
        padded_features(vit(), patches, torch.zeros_like(grids))


def test_what_is_drawn_at_random_does_not_depend_on_what_fills_up() -> None:
    given = batch()
    prompts = replace(given, tokens=given.tokens[::2], attention_mask=given.attention_mask[::2])
    many = checksums(prompts)
    for i in range(3):
        one = CaptionBatch.from_pixels(pictures()[i : i + 1], PATCH)
        one = replace(one, tokens=prompts.tokens[i : i + 1], attention_mask=prompts.attention_mask[i : i + 1])
        assert checksums(one) == [many[i]]


class Every(Connector):
    """A connector that knows of no mask."""

    visual_dim = dim = 20

    def forward(self, visual_tokens: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return visual_tokens


def test_refused() -> None:
    given = batch()
    stage1 = Blip2QFormer(vit(), qformer(vocab_size=VOCAB, max_len=30), embed_dim=7)
    with pytest.raises(ValueError, match="Blip2QFormer does not support the batch field patch_grids"):
        stage1(given)
    with pytest.raises(ValueError, match="a Every cannot read images of native size: its forward takes no mask"):
        VisionEncoderDecoder(vit(), lm(context_dim=20), connector=Every())(given)
    with pytest.raises(ValueError, match=r"not tiled by squares of pixel_shuffle \(2\)"):
        PrefixCaptioner(ViT(32, PATCH, 20, 1, 4), lm(), pixel_shuffle=2)(given)
    connector = TransformerConnector(20, 12, 1, 3, token_dropout=0.5)
    with pytest.raises(ValueError, match=r"token_dropout \(0.5\) is a share of one number of tokens"):
        VisionEncoderDecoder(vit(), lm(context_dim=12), connector=connector)(given)
