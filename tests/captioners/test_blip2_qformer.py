"""Stage 1's model: its shared passes against the three modes one by one, its losses against their definitions, in one
process and in two, and as a captioner."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmtransformer import Blip2QFormer, CaptionBatch, QFormer, ViT, caption_loss, generate, itc_loss
from mmtransformer.captioners.base import Captioner
from mmtransformer.connectors.qformer_block import mode_mask
from mmtransformer.losses.contrastive import Similarity
from mmtransformer.losses.hard_negatives import hard_pairs, pair_noise

VOCAB, CLASS, PAD = 53, 52, 0


def model(**options: Any) -> Blip2QFormer:
    torch.manual_seed(2)
    qformer = QFormer(
        3, 20, 3, 4, visual_dim=12, cross_attention_frequency=2, vocab_size=VOCAB, max_len=19, mlp_dim=31, dropout=0.0
    )
    options = {"embed_dim": 7, "cls_token_id": CLASS, "init_temperature": 0.9} | options  # soft: negatives vary
    found = Blip2QFormer(ViT((16, 24), 8, 12, 1, 3), qformer, **options)
    for parameter in found.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return found.double().eval()


def named(given: CaptionBatch, *ids: int) -> CaptionBatch:
    return replace(given, names=tuple(map(str, ids)))


def batch(lengths: tuple[int, ...] = (7, 3, 11, 5, 8, 4, 6, 9), images: int = 4) -> CaptionBatch:
    """Rows of a prompt of one, a caption and an end, right-padded; two rows share a picture."""
    torch.manual_seed(3)
    q = max(lengths)
    attention_mask = torch.arange(q) < torch.tensor(lengths)[:, None]
    tokens = torch.randint(1, CLASS, (len(lengths), q)).masked_fill(~attention_mask, PAD)
    loss_mask = attention_mask & (torch.arange(q) >= 1)
    pixels = torch.randn(images, 1, 3, 16, 24, dtype=torch.float64)
    return CaptionBatch(tokens, attention_mask, loss_mask, pixels=pixels)


# ------------------------------------------------------------------------------------------------- definitions


def passes(m: Blip2QFormer, visual: Tensor, tokens: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """Queries and text of one unpadded row in one pass, with the printed mask of the mode and nothing shared."""
    l, q = m.qformer.num_queries, tokens.shape[1]
    mask = mode_mask(mode, l, torch.ones(1, q, dtype=torch.bool))  # type: ignore[arg-type]
    embedded = m.qformer.tok_embed(tokens) + m.qformer.pos_embed.weight[:q]  # type: ignore[misc, union-attr]
    x = m.qformer.norm(torch.cat((m.qformer.query_tokens, embedded), 1))
    for block in m.qformer.blocks:
        x = block.norm1(x + block.attn(x, mask=mask))  # type: ignore[operator, union-attr]
        queries, text = x[:, :l], x[:, l:]
        if block.cross_attn is not None:
            queries = block.norm_cross(queries + block.cross_attn(queries, visual))  # type: ignore[operator]
        queries = block.query_norm(queries + block.query_mlp(queries))  # type: ignore[operator]
        text = block.norm2(text + block.mlp(text))  # type: ignore[operator, misc]
        x = torch.cat((queries, text), 1)
    return x[:, :l], x[:, l:]


def with_class(tokens: Tensor) -> Tensor:
    return torch.cat((torch.full_like(tokens[:, :1], CLASS), tokens[:, 1:]), 1)


def row(given: CaptionBatch, j: int) -> Tensor:
    return given.tokens[j, : int(given.attention_mask[j].sum())][None]


@torch.no_grad()
def test_losses_are_their_definitions() -> None:
    m, given = model(), batch()
    found = m(given, itc_smoothing=0.1, label_smoothing=0.2, seed=5)
    assert given.pixels is not None
    seen = [m.vision.forward_features(pixels) for pixels in given.pixels]

    images, texts, itg, count = [], [], 0.0, 0
    for j in range(8):
        visual, tokens = seen[j // 2], row(given, j)
        queries, text = passes(m, visual, with_class(tokens), "unimodal")
        images.append(F.normalize(m.vision_proj(queries[0]), dim=-1))
        texts.append(F.normalize(m.text_proj(text[0, 0]), dim=-1))
        _, said = passes(m, visual, tokens, "multimodal_causal")
        hidden = F.layer_norm(F.gelu(m.head_dense(said)), (20,), m.head_norm.weight, m.head_norm.bias, 1e-12)
        logits = (hidden @ m.qformer.tok_embed.weight.T + m.head_bias)[0]  # type: ignore[union-attr]
        itg += float(F.cross_entropy(logits[:-1], tokens[0, 1:], reduction="sum", label_smoothing=0.2))
        count += tokens.shape[1] - 1
    vectors = torch.stack(images[::2])
    itc = itc_loss(vectors, torch.stack(texts), m.log_temperature.exp(), label_smoothing=0.1)
    assert float(found.terms["itc"]) == pytest.approx(float(itc), abs=1e-12)
    assert float(found.terms["itg"]) == pytest.approx(itg / count, abs=1e-12)

    # Matching: negatives by multinomial (Gumbel-max over softmax) of the nearest query, none of the same picture.
    scores = torch.stack([(vector @ torch.stack(texts).T).amax(0) for vector in vectors]) / m.temperature
    owner = torch.arange(8) // 2
    keys = owner * 1_000_003 + torch.arange(8) % 2
    total, right = 0.0, 0
    for j in range(8):
        noise = [pair_noise(5, keys[j : j + 1], torch.arange(4)), pair_noise(6, keys[j : j + 1], keys)]
        gumbel = [-(-x[0].log()).log() for x in noise]
        image = int((scores[:, j] + gumbel[0]).masked_fill(torch.arange(4) == owner[j], -torch.inf).argmax())
        text = int((scores[owner[j]] + gumbel[1]).masked_fill(owner == owner[j], -torch.inf).argmax())
        for at, words, match in ((owner[j], j, 1), (image, j, 0), (owner[j], text, 0)):
            queries, _ = passes(m, seen[int(at)], with_class(row(given, words)), "bidirectional")
            logits = m.itm_head(queries[0]).mean(0)  # the mean of the queries' logits
            total += float(F.cross_entropy(logits, torch.tensor(match)))
            right += int(logits.argmax()) == match
    assert float(found.terms["itm"]) == pytest.approx(total / 24, abs=1e-12)
    assert float(found.terms["itm_accuracy"]) == pytest.approx(right / 24)
    assert float(found.loss) == pytest.approx(sum(float(found.terms[name]) for name in ("itc", "itm", "itg")))


def test_images_are_projected_once(monkeypatch: pytest.MonkeyPatch) -> None:
    m, given = model(), batch()
    calls: list[int] = []
    for block in m.qformer.blocks:
        if block.cross_attn is not None:
            block.cross_attn.k_proj.register_forward_hook(lambda _, x, __: calls.append(len(x[0])))  # type: ignore[union-attr]
    passed: list[int] = []
    see = QFormer.encode_queries
    monkeypatch.setattr(QFormer, "encode_queries", lambda self, visual: passed.append(1) or see(self, visual))
    m(given)
    assert calls == [4, 4]  # one pass over the four pictures, for each of the two layers that read them
    assert passed == [1]


# -------------------------------------------------------------------------------------------------- properties


@torch.no_grad()
def test_matching_waits_for_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negatives and all three kinds of pairs, on a device where nothing has a value to wait for."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # It does not know this device.
    m, given = model().to("meta"), batch().to("meta")
    visual_tokens = torch.empty(4, 5, m.vision.dim, dtype=m.itm_head.weight.dtype, device="meta")
    near = torch.empty(4, 8, device="meta")
    ids = torch.empty(4, dtype=torch.long, device="meta")
    s = Similarity(near, near.T, ids, ids.repeat_interleave(2), ids, ids.repeat_interleave(2))
    visual = m.qformer.project_visual(visual_tokens)
    pairs = hard_pairs(s, m.temperature, texts=2, seed=0)
    logits, match, is_real = m._matches(given, visual_tokens, visual, pairs)
    assert logits.shape == (3 * 8, 2)
    assert match.shape == is_real.shape == (3 * 8,)


@torch.no_grad()
def test_padding_and_order_change_nothing() -> None:
    m, given = model(), batch()
    given = named(given, 5, 11, 2, 7)
    plain = m(given, seed=3)
    wide = replace(given, **{k: F.pad(getattr(given, k), (0, 5)) for k in ("tokens", "attention_mask", "loss_mask")})
    order = torch.tensor([2, 0, 3, 1])
    rows = (order[:, None] * 2 + torch.arange(2)).flatten()
    assert given.pixels is not None
    rotated = CaptionBatch(given.tokens[rows], given.attention_mask[rows], given.loss_mask[rows], given.pixels[order])
    for other in (m(wide, seed=3), m(named(rotated, 2, 5, 7, 11), seed=3)):
        torch.testing.assert_close(dict(other.terms), dict(plain.terms), atol=1e-12, rtol=0)
    assert float(m(given, seed=4).terms["itm"] - plain.terms["itm"]) != 0


@torch.no_grad()
def test_fillers_take_no_part() -> None:
    m, given = model(), batch()
    assert given.pixels is not None
    alone = CaptionBatch(given.tokens[:6], given.attention_mask[:6], given.loss_mask[:6], given.pixels[:3])
    loss_mask = given.loss_mask.clone()
    loss_mask[6:] = False
    beside = m(named(replace(given, loss_mask=loss_mask), 8, 1, 4, 9))
    torch.testing.assert_close(dict(beside.terms), dict(m(named(alone, 8, 1, 4)).terms), atol=1e-12, rtol=0)


def test_one_single_pair_is_a_batch() -> None:
    m, given = model().train(), batch((5,), 1)
    found = m(given, itc_smoothing=0.1)
    found.loss.backward()
    assert float(found.terms["itc"]) == 0.0
    assert float(found.terms["itm"]) > 0  # the true pair; there are no others
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.qformer.parameters())


def test_copies_of_one_image_are_no_negatives() -> None:
    m, given = model(), batch((5, 6), 2)
    with torch.no_grad():
        same = m(named(given, 4, 4))
        logits = torch.cat([
            m.match(m.context(replace(given, pixels=given.pixels[j : j + 1])), row(given, j), row(given, j) > 0)  # type: ignore[index]
            for j in range(2)
        ])  # fmt: skip
    assert float(same.terms["itm"]) == pytest.approx(float(F.cross_entropy(logits, torch.ones(2).long())), abs=1e-12)


def test_temperature_starts_where_it_is_told() -> None:
    qformer = QFormer(3, 20, 2, 4, visual_dim=12, vocab_size=VOCAB)
    m = Blip2QFormer(ViT(16, 8, 12, 1, 3), qformer)
    assert float(m.temperature.detach()) == pytest.approx(0.07)
    assert m.log_temperature.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qformer": QFormer(3, 20, 2, 4, visual_dim=12)}, "needs a Q-Former with a text stream"),
        ({"vision": ViT(16, 8, 24, 1, 3)}, r"visual_dim \(12\) must be the vision encoder's dim \(24\)"),
        ({"cls_token_id": 53}, r"cls_token_id \(53\) must be one of the Q-Former's 53 ids"),
        ({"init_temperature": 0.0}, r"init_temperature \(0.0\) must be above 0"),
        ({"train_vision_norm": True}, "train_vision_norm is for a frozen vision encoder"),
    ],
)
def test_parts_must_fit(change: dict[str, Any], message: str) -> None:
    parts = {"vision": ViT(16, 8, 12, 1, 3), "qformer": QFormer(3, 20, 2, 4, visual_dim=12, vocab_size=VOCAB)}
    with pytest.raises(ValueError, match=message):
        Blip2QFormer(**(parts | change))  # type: ignore[arg-type]


def test_bad_texts_are_named() -> None:
    m, given = model(), batch()
    attention_mask = given.attention_mask.clone()
    attention_mask[5] = False
    with pytest.raises(ValueError, match="text 5 of 8 is empty"):
        m(replace(given, attention_mask=attention_mask, loss_mask=given.loss_mask & attention_mask))
    with pytest.raises(ValueError, match="rows of 23 tokens, but the captioner reads 19 at most"):
        m(batch((23, 5), 2))
    with pytest.raises(ValueError, match="8 texts cannot be shared out among 3 images"):
        m(replace(given, pixels=given.pixels[:3]))  # type: ignore[index]


# ------------------------------------------------------------------------------------------------- a captioner


@torch.no_grad()
def test_generation_loss_is_the_captioners() -> None:
    m, given = model(), batch()
    loss = caption_loss(m, given, reduction="sum")
    assert float(loss.sum / loss.count) == pytest.approx(float(m(given).terms["itg"]), abs=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("expand_size", [1, 3])
def test_decoding_step_by_step_is_one_pass(expand_size: int) -> None:
    m, given = model(), batch((7, 7, 7, 7), 2)
    whole = m.logits(given)
    prompt = replace(
        given, tokens=given.tokens[:, :3], attention_mask=given.attention_mask[:, :3], loss_mask=given.loss_mask[:, :3]
    )
    left = {k: F.pad(getattr(prompt, k), (2, 0)) for k in ("tokens", "attention_mask", "loss_mask")}
    for start in (prompt, replace(prompt, **left)):  # as it is, and padded on the left
        logits, state = m.prefill(start, expand_size=expand_size, max_new_tokens=5)
        for at in range(3, 8):
            torch.testing.assert_close(logits, whole[:, at - 1].repeat_interleave(expand_size, 0), atol=1e-12, rtol=0)
            if at < 7:
                logits = m.decode_step(given.tokens[:, at].repeat_interleave(expand_size), state)
                order = torch.arange(4 * expand_size).flip(0) if expand_size == 1 else torch.arange(4 * expand_size)
                state.reorder(order)
                state.reorder(order)
    with pytest.raises(ValueError, match="22 tokens were asked for, but this Q-Former has 19 positions"):
        m.prefill(prompt, max_new_tokens=19)


def test_a_stage_1_model_captions(tmp_path: Path) -> None:
    m, given = model(), batch((2, 2, 2), 3)
    before = generate(m, given, eos_id=1, max_new_tokens=6, num_beams=3)
    m.float().save_pretrained(tmp_path)
    loaded = Captioner.from_pretrained(tmp_path)
    assert isinstance(loaded, Blip2QFormer)
    assert [r[0].tokens for r in generate(loaded.double(), given, eos_id=1, max_new_tokens=6, num_beams=3)] == [
        r[0].tokens for r in before
    ]


@torch.no_grad()
def test_heat_is_where_the_queries_look_that_the_words_read() -> None:
    m, given = model(), batch()
    look = m.attention_map(given)
    assert look.shape == (8, 11, 1, 2, 3)
    assert (look >= 0).all()
    assert float(look.sum((2, 3, 4)).max()) <= 1 + 1e-6
    first = m.qformer.blocks[0].cross_attn
    for block in m.qformer.blocks:  # all queries look at patch 4 (the class token is key 0)
        if block.cross_attn is not None:
            block.cross_attn.k_proj.weight.zero_()  # type: ignore[union-attr]
    assert first is not None
    spread = m.attention_map(given)
    share = spread / spread.sum((3, 4), keepdim=True)
    torch.testing.assert_close(share, torch.full_like(share, 1 / 6), atol=1e-6, rtol=0)  # nowhere in particular


def test_frozen_tower_with_a_norm_that_learns() -> None:
    m, given = model(freeze_vision=True, train_vision_norm=True), batch()
    m.train()
    assert not m.vision.training
    assert {n for n, p in m.vision.named_parameters() if p.requires_grad} == {"norm.weight", "norm.bias"}
    plain = model(freeze_vision=True)
    assert given.pixels is not None
    cached = replace(given, pixels=None, visual_tokens=m.forward_features(given.pixels))
    first, second, third = m(given), m(cached), plain(given)
    for other in (second, third):
        torch.testing.assert_close(dict(other.terms), dict(first.terms), atol=1e-12, rtol=0)
    second.loss.backward()
    assert m.vision.norm.weight.grad is not None


# ----------------------------------------------------------------------------------------------- two processes


def run(rank: int, world: int, folder: str) -> None:
    """One process with every second picture; losses and gradients, as DDP would have them, into a file."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    try:
        torch.save(losses_and_gradients(rank, world), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def losses_and_gradients(rank: int, world: int) -> tuple[list[Tensor], list[Tensor]]:
    m, given = model(), batch((7, 3, 11, 5, 8, 4, 6, 9, 5, 5), 5)
    assert given.pixels is not None
    ids = (5, 11, 2, 5, 7)
    mine = torch.arange(5)[rank::world]
    rows = (mine[:, None] * 2 + torch.arange(2)).flatten()
    part = CaptionBatch(given.tokens[rows], given.attention_mask[rows], given.loss_mask[rows], given.pixels[mine])
    part = part.truncate(int(part.attention_mask.sum(1).max()))  # other lengths in other processes
    found = m(named(part, *(ids[k] for k in mine.tolist())), seed=9)
    found.loss.backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in m.parameters()]
    if world > 1:
        for grad in grads:
            dist.all_reduce(grad)
    return [found.terms[name] for name in ("itc", "itm", "itg")], [grad / world for grad in grads]


def test_two_processes_are_one(tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("fork")
    workers = [context.Process(target=run, args=(rank, 2, str(tmp_path))) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    losses, grads = losses_and_gradients(0, 1)
    for a, b, whole in zip(parts[0][0], parts[1][0], losses, strict=True):
        assert float((a + b) / 2) == pytest.approx(float(whole), abs=1e-13)
    for part in parts:
        assert max(float((a - b).abs().max()) for a, b in zip(part[1], grads, strict=True)) < 1e-13
    assert max(float(g.abs().max()) for g in grads) > 1e-2
