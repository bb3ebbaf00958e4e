"""Llava: by definition, cached as uncached, rows of a sample, tiles, and what learns."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmtransformer import (
    CaptionBatch,
    LinearProjector,
    Llava,
    MLPProjector,
    TextDecoder,
    TileConfig,
    TiledBatch,
    ViT,
    caption_loss,
)
from mmtransformer.images.pinpoints import best_pinpoint

VOCAB, IMAGE = 53, 50


def llava(**options: Any) -> Llava:
    torch.manual_seed(3)
    vision = ViT((16, 24), 4, 20, 3, 4, num_registers=1)
    projector = options.pop("projector", None) or MLPProjector(20, 24, input_norm=False)
    model = Llava(vision, projector, TextDecoder(VOCAB, 24, 2, 4, max_len=97), IMAGE, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def squares(**options: Any) -> Llava:
    return llava(projector=LinearProjector(20, 24, pixel_shuffle=2, bias=False), vision_feature_layers=None, **options)


def batch(count: int, rows: int = 4, q: int = 7) -> CaptionBatch:
    """Two rows of each picture, whose placeholders stand behind one token and before q - 1 others."""
    torch.manual_seed(5)
    text = torch.randint(1, IMAGE, (rows, q))
    tokens = torch.cat((text[:, :1], torch.full((rows, count), IMAGE), text[:, 1:]), 1)
    attention_mask = torch.arange(q + count) < count + torch.tensor([7, 4, 6, 3])[:rows, None]
    loss_mask = attention_mask & (torch.arange(q + count) > count + 1)
    return CaptionBatch(tokens, attention_mask, loss_mask, pixels=torch.randn(rows // 2, 1, 3, 16, 24))


@torch.no_grad()
def test_by_definition() -> None:
    model, given = llava(), batch(24)
    assert given.pixels is not None
    for row in range(4):
        tokens = model.vision.tokens_after(given.pixels[row // 2], [1])[0][0, 2:]
        image = model.projector.fc2(F.gelu(model.projector.fc1(tokens)))  # type: ignore[union-attr]
        words = model.decoder.embed_tokens(given.tokens[row])
        x = torch.cat((words[:1], image, words[25:]))[None]
        positions = torch.arange(31)
        hidden = model.decoder.forward_embeds(model.decoder.add_positions(x, positions), positions)
        torch.testing.assert_close(model.logits(given)[row], model.head(hidden)[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_squares_of_patches_by_definition() -> None:
    model, given = squares(), batch(6)
    assert given.pixels is not None
    grid = model.vision.forward_features(given.pixels[1])[0, 2:].reshape(4, 6, 20)
    merged = [
        torch.cat([grid[2 * y + a, 2 * x + b] for a in range(2) for b in range(2)]) for y in range(2) for x in range(3)
    ]
    want = torch.stack(merged) @ model.projector.fc.weight.T  # type: ignore[union-attr]
    torch.testing.assert_close(model.image_embeds(given)[1], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [llava, squares])
@torch.no_grad()
def test_step_by_step_from_prompts_padded_on_the_left(make: Any) -> None:
    model = make()
    given = batch(24 if make is llava else 6)
    whole = model.logits(given)
    rows = [row[real] for row, real in zip(given.tokens, given.attention_mask, strict=True)]
    prompts = [row[:-2] for row in rows]
    longest = max(map(len, prompts))
    left = torch.stack([F.pad(row, (longest - len(row), 0), value=9) for row in prompts])
    mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in prompts])
    first, state = model.prefill(CaptionBatch(left, mask, mask, given.pixels), expand_size=2, max_new_tokens=3)
    then = model.decode_step(torch.stack([row[-2] for row in rows]).repeat_interleave(2), state)
    for i, row in enumerate(rows):
        for logits, place in ((first, len(row) - 3), (then, len(row) - 2)):
            torch.testing.assert_close(logits[2 * i + 1], whole[i, place], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_images_that_are_padding_and_features_of_a_cache() -> None:
    model, given = squares(), batch(12, rows=2)
    pixels, real = torch.randn(1, 3, 3, 16, 24), torch.tensor([[True, False, True]])
    padded = replace(given, pixels=pixels, image_mask=real)
    alone = replace(given, pixels=pixels[:, [0, 2]])
    torch.testing.assert_close(model.logits(padded), model.logits(alone))
    cached = replace(padded, pixels=None, visual_tokens=model.forward_features(pixels))
    torch.testing.assert_close(model.logits(cached), model.logits(alone), atol=1e-5, rtol=1e-5)
    heat = model.attention_map(padded)
    assert heat.shape == (2, given.tokens.shape[1], 3, 4, 6)
    torch.testing.assert_close(heat[:, :, [0, 2]], model.attention_map(alone))
    assert not heat[:, :, 1].any()


def test_the_loss_is_of_the_answer_alone() -> None:
    model, given = llava(), batch(24)
    logits = model.logits(given)
    predicted = given.loss_mask[:, 1:]
    want = F.cross_entropy(logits[:, :-1][predicted], given.tokens[:, 1:][predicted])
    torch.testing.assert_close(caption_loss(model, given), want, atol=1e-5, rtol=1e-5)


POINTS = TileConfig(((16, 48), (32, 24)))
KINDS: dict[str, dict[str, Any]] = {
    "the last but one": {},
    "the last": {"vision_feature_layers": (-1,)},
    "with the class token": {"keep_prefix_tokens": True},
    "tiles": {"tiles": POINTS},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("again", [False, True])
def test_whatever_learns_gets_a_gradient(kind: str, again: bool) -> None:
    model = llava(**KINDS[kind], freeze_vision=False, freeze_decoder=False).train()
    model.vision.set_grad_checkpointing(again)
    given = batch(26 if kind == "with the class token" else 24)
    if model.newline is not None:
        (gh, gw), size = model.vision.grid_size, (16, 40)
        wide = batch(model.tiles.num_tokens(size, (1, 2), (gh, gw)))
        given = TiledBatch(
            wide.tokens, wide.attention_mask, wide.loss_mask, torch.randn(2, 3, 3, 16, 24),
            image_sizes=torch.tensor([[size], [size]]),
        )  # fmt: skip
    model(given).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    tower = [(name, p) for name, p in model.named_parameters() if name.startswith("vision.blocks")]
    frozen = {name.split(".")[2] for name, p in tower if not p.requires_grad}
    assert frozen == (set() if kind == "the last" else {"2"})


# --- tiles


def test_the_best_pinpoint_keeps_most_and_wastes_least() -> None:
    points = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]
    for size, best in (((100, 200), (336, 672)), ((1200, 1100), (672, 672)), ((3000, 500), (1008, 336))):
        assert best_pinpoint(size, points) == best
    assert best_pinpoint((50, 50), [(100, 100), (100, 100), (200, 200)]) == (100, 100)


def test_counts_of_tokens_as_published() -> None:
    sides = range(384, 2305, 384)
    ours = TileConfig(tuple((h, w) for h in sides for w in sides), 9, single_only=True)
    for size, count in (((384, 384), 1485), ((480, 640), 2929), ((1024, 768), 4744), ((3000, 500), 5265)):
        assert ours.num_tokens(size, ours.tiles(size, (384, 384)), (27, 27)) == count
    assert ours.num_tokens((480, 640), ours.tiles((480, 640), (384, 384), pictures=2), (27, 27)) == 730


@torch.no_grad()
def test_tiles_are_laid_side_by_side_and_their_padding_left_out() -> None:
    size, tiles, grid = (40, 100), (2, 2), (3, 3)  # 6 x 6 tokens, of which 2.4 rows show the picture
    x = torch.arange(5 * 9.0).reshape(5, 9, 1)
    joined = POINTS.join(x, size, tiles, grid, torch.tensor([-1.0]))[:, 0].tolist()
    assert joined[:9] == list(range(9))
    rows = [[15.0, 16, 17, 24, 25, 26, -1], [27.0, 28, 29, 36, 37, 38, -1]]
    assert joined[9:] == rows[0] + rows[1]
    assert POINTS.num_tokens(size, tiles, grid) == len(joined) == 9 + 2 * 7

    weights = torch.rand(4, len(joined))
    maps = POINTS.on_grid(weights, size, tiles, grid)
    newlines = weights[:, [15, 22]].sum(1)
    torch.testing.assert_close(maps.sum((1, 2)), weights.sum(1) - newlines)
    want: Tensor = weights[0, :9].reshape(3, 3).clone()
    for i in range(2):  # of two rows, the first lies on the view's first, the second on its last
        for j in range(6):
            want[(2 * i + 1) * 3 // 4, (2 * j + 1) * 3 // 12] += weights[0, 9 + 7 * i + j]
    torch.testing.assert_close(maps[0], want)
