"""PrefixCaptioner and CoCa: by definition, cached as uncached, batched as one by one, and what they refuse."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmtransformer import CaptionBatch, CoCa, PositionConfig, PrefixCaptioner, TextDecoder, ViT, caption_loss, generate
from mmtransformer.captioners.base import Captioner

VOCAB = 53


def shaken(model: Captioner) -> Any:
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def tower() -> ViT:
    return ViT((16, 24), 4, 20, 1, 4, num_registers=1)


def prefix(pixel_shuffle: int = 2, **options: Any) -> PrefixCaptioner:
    torch.manual_seed(3)
    return shaken(
        PrefixCaptioner(tower(), TextDecoder(VOCAB, 24, 2, 4, max_len=61), pixel_shuffle=pixel_shuffle, **options)
    )


def coca(**options: Any) -> CoCa:
    torch.manual_seed(3)
    text = TextDecoder(VOCAB, 24, 2, 4, max_len=31)
    upper = TextDecoder(VOCAB, 24, 2, 3, max_len=31, context_dim=20, positions=PositionConfig("rotary"))
    return shaken(CoCa(tower(), text, upper, num_queries=7, num_heads=5, embed_dim=11, **options))


MODELS = {"prefix": prefix, "prefix, each patch": lambda: prefix(1), "coca": coca}


@pytest.fixture(params=MODELS, name="model")
def any_model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


def batch(rows: int = 6, images: int = 3, q: int = 7) -> CaptionBatch:
    torch.manual_seed(5)
    tokens = torch.randint(VOCAB, (rows, q))
    lengths = torch.tensor([7, 4, 6, 2, 7, 5, 3])[:rows, None]
    attention_mask = torch.arange(q) < lengths
    loss_mask = attention_mask & (torch.arange(q) > 0)
    return CaptionBatch(tokens, attention_mask, loss_mask, pixels=torch.randn(images, 1, 3, 16, 24))


def row(given: CaptionBatch, n: int) -> CaptionBatch:
    """One row by itself, with its picture and without its padding."""
    assert given.pixels is not None
    r, length = given.tokens.shape[0] // given.pixels.shape[0], int(given.attention_mask[n].sum())
    texts = {k: getattr(given, k)[n : n + 1, :length] for k in ("tokens", "attention_mask", "loss_mask")}
    return CaptionBatch(**texts, pixels=given.pixels[n // r : n // r + 1])


def test_prefix_by_definition() -> None:
    model, given = prefix(), batch()
    assert given.pixels is not None
    norm, first, second = model.projector.norm, model.projector.fc1, model.projector.fc2
    for n in range(6):
        grid = model.vision.forward_features(given.pixels[n // 2])[0, 2:].reshape(4, 6, 20)
        squares = [
            torch.cat([grid[2 * y + a, 2 * x + b] for a in range(2) for b in range(2)])
            for y in range(2)
            for x in range(3)
        ]
        prefix_embeds = second(F.gelu(first(norm(torch.stack(squares)))))
        text = model.decoder.embed_tokens(given.tokens[n])
        x = torch.cat((prefix_embeds, text))[None]
        x = x + model.decoder.pos_embed.weight[: x.shape[1]]
        want = model.decoder.head(model.decoder.forward_embeds(x, torch.arange(x.shape[1])))[0, 6:]
        torch.testing.assert_close(model.logits(given)[n], want, atol=1e-5, rtol=1e-5)


def test_coca_by_definition() -> None:
    model, given = coca(), batch()
    assert given.pixels is not None
    images, texts = model.image_features(given), model.text_features(given)
    for n in range(6):
        one = row(given, n)
        assert one.pixels is not None
        pooled = model.caption_pool(model.vision.forward_features(one.pixels[0]))
        lower = model.text(one.tokens)
        upper = model.decoder.forward_embeds(lower, torch.arange(lower.shape[1]), pooled)
        want = model.decoder.head(upper)[0]
        torch.testing.assert_close(model.logits(given)[n, : len(want)], want, atol=1e-5, rtol=1e-5)
        x = torch.cat((model.text.embed_tokens(one.tokens), model.end[None, None]), 1)
        gathered = model.text.forward_embeds(model.text.add_positions(x, at := torch.arange(x.shape[1])), at)[0, -1]
        vector = F.normalize(gathered @ model.text_proj.weight.T, dim=0)
        torch.testing.assert_close(texts[n], vector, atol=1e-5, rtol=1e-5)
        seen = model.image_proj(model.contrast_pool(pooled)[0, 0])
        torch.testing.assert_close(images[n // 2], F.normalize(seen, dim=0), atol=1e-5, rtol=1e-5)


def test_cocas_scale_is_learned_as_a_logarithm_and_limited_to_100() -> None:
    model, given = coca(), batch()
    losses = []
    for scale in (100.0, 900.0, 50.0):
        model.logit_scale.data.fill_(math.log(scale))
        losses.append(float(model(given).terms["contrast"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert abs(losses[0] - losses[2]) > 0.1


def test_coca_trains_on_both_losses() -> None:
    model, given = coca(), batch()
    said, both = caption_loss(model, given, reduction="sum"), model(given).sums
    scores = model.logit_scale.exp() * model.image_features(given) @ model.text_features(given).T
    own = torch.arange(6) // 2
    to_images = F.cross_entropy(scores.T, own)
    to_texts = -(scores.log_softmax(1) * (own == torch.arange(3)[:, None]) / 2).sum(1).mean()
    want = 2 * said.sum + (to_images + to_texts) / 2 * said.count
    torch.testing.assert_close(both.sum, want, atol=1e-3, rtol=1e-4)
    assert both.count == said.count
    alone = coca(contrastive_weight=0.0, caption_weight=1.0)
    weights = model.state_dict()
    alone.load_state_dict({name: weights[name] for name in alone.state_dict()})
    torch.testing.assert_close(alone(given).sums.sum, said.sum)
    both.sum.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_batched_as_one_by_one_and_no_token_sees_a_later_one(model: Any) -> None:
    given = batch()
    logits = model.logits(given)
    for n in range(6):
        want = model.logits(row(given, n))[0]
        torch.testing.assert_close(logits[n, : len(want)], want, atol=1e-5, rtol=1e-5)
    changed = replace(given, tokens=given.tokens.clone())
    changed.tokens[:, 4:] = (changed.tokens[:, 4:] + 1) % VOCAB
    after = model.logits(changed)
    assert torch.equal(after[:, :4], logits[:, :4])
    assert not torch.isclose(after[:, 4:], logits[:, 4:]).all(-1).any()


def test_the_image_matters_to_its_own_rows_only(model: Any) -> None:
    given = batch()
    assert given.pixels is not None
    pixels = given.pixels.clone()
    pixels[1, 0, :, 8:, 16:] += torch.randn(3, 8, 8)
    changed = (model.logits(replace(given, pixels=pixels)) != model.logits(given)).any(-1).all(-1)
    assert changed.tolist() == [False, False, True, True, False, False]


def test_cached_decoding_is_the_full_pass_for_prompts_of_different_lengths(model: Any) -> None:
    given = batch(q=7)
    lengths = given.attention_mask.sum(1)
    order = (given.attention_mask.long().argsort(dim=1, stable=True),)  # padding to the left
    left = replace(given, tokens=given.tokens.gather(1, *order), attention_mask=given.attention_mask.gather(1, *order))
    logits, state = model.prefill(left, expand_size=2, max_new_tokens=3)
    extra = torch.randint(VOCAB, (12, 3))
    for k in range(4):
        for m in range(12):
            one = row(given, m // 2)
            tokens = torch.cat((one.tokens, extra[m : m + 1, :k]), 1)
            every = torch.ones_like(tokens, dtype=torch.bool)
            want = model.logits(replace(one, tokens=tokens, attention_mask=every, loss_mask=every))[0, -1]
            torch.testing.assert_close(logits[m], want, atol=1e-5, rtol=1e-5)
        if k < 3:
            logits = model.decode_step(extra[:, k], state)
    assert len(set(lengths.tolist())) > 1


def test_beams_of_a_saved_model(model: Any, tmp_path: Any) -> None:
    given = batch(rows=3)
    prompt = replace(
        given, tokens=given.tokens[:, :1], attention_mask=given.attention_mask[:, :1], loss_mask=given.loss_mask[:, :1]
    )
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    texts = [generate(m, prompt, eos_id=0, max_new_tokens=5, num_beams=3) for m in (model, again)]
    assert texts[0] == texts[1]
    assert len({round(t[0].log_prob, 4) for t in texts[0]}) == 3  # each has its own picture


def test_cached_features_are_as_good_as_pixels_and_looks_lie_on_the_patches(model: Any) -> None:
    given = batch()
    assert given.pixels is not None
    cached = replace(given, pixels=None, visual_tokens=model.forward_features(given.pixels))
    torch.testing.assert_close(model.logits(cached), model.logits(given), atol=1e-6, rtol=1e-5)
    look: Tensor = model.attention_map(cached)
    assert look.shape == (6, 7, 1, 4, 6)
    assert torch.equal(look, model.attention_map(given))
    total = look.sum((2, 3, 4))
    assert ((total > 0) & (total < 1 + 1e-5)).all()
    assert look.std((3, 4)).min() > 0


def test_frozen_parts_learn_nothing() -> None:
    model = prefix().train()
    assert not model.vision.training
    assert not model.decoder.training
    caption_loss(model, batch(), reduction="sum").sum.backward()
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None} == {"projector"}


def test_what_takes_part_in_cocas_contrast() -> None:
    """A picture that stands there twice is no negative of itself, and one without a target is not asked or found."""
    model, given = coca(caption_weight=0.0), replace(batch(), names=("a", "b", "a"))
    scores = model.logit_scale.exp() * model.image_features(given) @ model.text_features(given).T
    same = torch.tensor([[1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 1, 1]]).float()
    to_texts = -(scores.log_softmax(1) * same / same.sum(1, keepdim=True)).sum(1).mean()
    to_images = -(scores.log_softmax(0) * same / same.sum(0)).sum(0).mean()
    found = model(given).sums
    torch.testing.assert_close(found.sum / found.count, (to_texts + to_images) / 2, atol=1e-4, rtol=1e-4)
    with_filler = replace(batch(), names=("a", "b", "c"))
    with_filler.loss_mask[4:] = False
    assert with_filler.pixels is not None
    rows = {k: getattr(with_filler, k)[:4] for k in ("tokens", "attention_mask", "loss_mask")}
    alone = model(CaptionBatch(**rows, pixels=with_filler.pixels[:2], names=("a", "b"))).sums
    torch.testing.assert_close(model(with_filler).sums.sum, alone.sum, atol=1e-4, rtol=1e-4)


def test_an_empty_text_is_refused_where_texts_are_compared() -> None:
    given = batch()
    given.attention_mask[3] = given.loss_mask[3] = False
    with pytest.raises(ValueError, match="text 3 of 6 is empty, and would fit every image"):
        coca()(given)
    assert coca(contrastive_weight=0.0)(given).sums.count == given.loss_mask[:, 1:].sum()


def test_one_single_pair_is_a_batch(model: Any) -> None:
    whole = batch()
    assert whole.pixels is not None
    given = CaptionBatch(
        *(x[:1] for x in (whole.tokens, whole.attention_mask, whole.loss_mask)), pixels=whole.pixels[:1]
    )
    loss = model(given).sums
    loss.sum.backward()
    assert loss.sum.shape == ()
    assert loss.sum.isfinite()
    assert loss.count == 6
    torch.testing.assert_close(model.logits(given)[0], model.logits(whole)[0], atol=1e-5, rtol=1e-5)


def run(rank: int, world: int, folder: str) -> None:
    """One process with two of three pictures, or the third; the loss and the gradients of the global batch."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    try:
        torch.save(loss_and_gradients(rank, world), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def loss_and_gradients(rank: int, world: int) -> tuple[Tensor, list[Tensor]]:
    model, given = coca().double(), batch()
    assert given.pixels is not None
    mine, names = torch.arange(3)[rank::world], "abc"
    rows = (mine[:, None] * 2 + torch.arange(2)).flatten()
    part = CaptionBatch(
        given.tokens[rows], given.attention_mask[rows], given.loss_mask[rows], given.pixels[mine].double(),
        names=tuple(names[i] for i in mine),
    )  # fmt: skip
    loss = model(part).sums
    loss.sum.backward()
    sums = [loss.sum.detach(), loss.count.double()]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    if world > 1:
        for x in (*sums, *grads):
            dist.all_reduce(x)
    return sums[0] / sums[1], [g / sums[1] for g in grads]


def test_cocas_loss_in_two_processes_is_that_in_one(tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("fork")
    workers = [context.Process(target=run, args=(rank, 2, str(tmp_path))) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    loss, grads = loss_and_gradients(0, 1)
    for rank in range(2):
        found, parts = torch.load(tmp_path / f"{rank}.pt")
        assert float(found) == pytest.approx(float(loss), abs=1e-13)
        assert max(float((a - b).abs().max()) for a, b in zip(parts, grads, strict=True)) < 1e-13


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: prefix(3), "squares of 3 x 3 patches do not tile a grid of 4 x 6"),
        (
            lambda: PrefixCaptioner(tower(), TextDecoder(VOCAB, 24, 1, 4, max_len=24)),
            r"24 positions leave no room for text after 24 visual tokens; raise pixel_shuffle \(1\)",
        ),
        (
            lambda: CoCa(tower(), TextDecoder(9, 24, 1, 4), TextDecoder(9, 24, 1, 4, context_dim=20)),
            'positions must be "rotary" or "sinusoidal", not "learned"',
        ),
        (
            lambda: CoCa(tower(), TextDecoder(9, 24, 1, 4), TextDecoder(9, 24, 1, 4, context_dim=19)),
            r"context_dim \(19\) must be the vision encoder's dim \(20\)",
        ),
        (
            lambda: CoCa(tower(), TextDecoder(9, 20, 1, 4), TextDecoder(9, 24, 1, 4, context_dim=20)),
            "as wide as the upper .24.*it has dim 20",
        ),
    ],
)
def test_parts_that_do_not_fit(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_images_inside_the_text_are_refused(model: Any) -> None:
    given = batch()
    with pytest.raises(ValueError, match="does not support the batch field image_index"):
        model.logits(replace(given, image_index=torch.ones_like(given.tokens)))
