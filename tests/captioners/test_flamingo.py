"""Flamingo: its definition in float64, its properties over random layouts, what is frozen, decoding, looking."""

import hashlib
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mmtransformer import (
    AttentionConfig,
    CaptionBatch,
    Flamingo,
    GatedBlockConfig,
    HFDecoder,
    MLPConfig,
    NormConfig,
    PerceiverResampler,
    PositionConfig,
    TextDecoder,
    ViT,
    caption_loss,
    generate,
    image_attention_mask,
    record_attention,
    show_mask,
)
from mmtransformer.backbones.extended_vocabulary import ExtendedDecoder
from mmtransformer.captioners.flamingo import FlamingoState
from mmtransformer.layers.attention import Attention
from mmtransformer.layers.modes import is_frozen
from mmtransformer.training.engine.recompute_and_compile import checkpoint_activations

VOCAB, DEPTH = 53, 3
LLAMA: dict[str, Any] = {
    "attention": AttentionConfig(num_kv_heads=2, bias=False),
    "mlp": MLPConfig("swiglu", bias=False),
    "norm": NormConfig("rms"),
    "positions": PositionConfig("rotary"),
}
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama, as idefics": {
        "lm": LLAMA,
        "activation": "swiglu",
        "norm": "rms",
        "qk_norm": "rms",
        "mlp_without_image": True,
    },
    "no resampler": {"latents": 0, "cross_attn_every_n_layers": 2, "visible_images": "all_previous"},
    "gates a channel": {"per_channel": True, "cross_layers": [0, 2], "visible_images": "all_previous"},
}


def grouped(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the gated blocks, together."""
    names = {field.name for field in fields(GatedBlockConfig)} & options.keys()
    return {k: v for k, v in options.items() if k not in names} | {
        "gated": GatedBlockConfig(**{name: options[name] for name in names})
    }


def flamingo(*, latents: int = 5, opened: bool = True, lm: dict[str, Any] | None = None, **options: Any) -> Flamingo:
    torch.manual_seed(4)
    model = Flamingo(
        ViT((16, 24), 8, 20, 1, 4, num_registers=1),
        TextDecoder(VOCAB, 24, DEPTH, 4, **{"max_len": 31} | (lm or {})),
        connector=PerceiverResampler(20, 2, 3, 7, latents) if latents else None,
        **grouped({"num_heads": 3, "head_dim": 7} | options),
    )
    for name, parameter in model.named_parameters():
        if opened or "gate" not in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


@cache
def ready(visible_images: str, mlp_without_image: bool) -> Flamingo:
    """A model that hypothesis need not build again for each example."""
    return flamingo(visible_images=visible_images, mlp_without_image=mlp_without_image)


def batch(n: int = 6, b: int = 3, i: int = 1, q: int = 7, size: tuple[int, int] = (16, 24)) -> CaptionBatch:
    torch.manual_seed(5)
    tokens = torch.randint(VOCAB, (n, q))
    return CaptionBatch(tokens, tokens >= 0, tokens >= 0, pixels=torch.randn(b, i, 3, *size))


def laid_out(*rows: str) -> CaptionBatch:
    """Rows of documents: "I" is a picture's own token, "." is text, "|" begins another document."""
    torch.manual_seed(6)
    q = max(len(row.replace("|", "")) for row in rows)
    i = max(row.count("I") for row in rows)
    image_index, first, document_ids, attention_mask = (torch.zeros(len(rows), q, dtype=torch.long) for _ in range(4))
    for r, row in enumerate(rows):
        t = before = 0
        for number, document in enumerate(row.split("|")):
            for k in range(len(document)):
                here = document[: k + 1].count("I")
                image_index[r, t] = before + here if here else 0
                first[r, t], document_ids[r, t], attention_mask[r, t] = before + 1, number, 1
                t += 1
            before += document.count("I")
    tokens = torch.randint(VOCAB, (len(rows), q)) * attention_mask
    images = torch.arange(i) < torch.tensor([row.count("I") for row in rows])[:, None]
    pixels = torch.randn(len(rows), i, 3, 16, 24) * images[..., None, None, None]
    packed = any("|" in row for row in rows)
    return CaptionBatch(
        tokens, attention_mask > 0, attention_mask > 0, pixels, image_mask=images,
        image_index=image_index, first_image_index=first,
        document_ids=document_ids if packed else None,
    )  # fmt: skip


def sees(rows: tuple[str, ...], visible_images: str) -> list[list[set[int]]]:
    """The pictures (from 0) that each token may see, by walking over the letters."""
    found = []
    for row in rows:
        tokens, count = [], 0
        for document in row.split("|"):
            mine: list[int] = []
            for letter in document:
                if letter == "I":
                    mine.append(count)
                    count += 1
                tokens.append({"last": set(mine[-1:]), "all_previous": set(mine), "none": set()}[visible_images])
        found.append(tokens)
    return found


documents = st.text(alphabet=".I", min_size=1, max_size=6)
layouts = st.lists(st.lists(documents, min_size=1, max_size=3).map("|".join), min_size=1, max_size=3).map(tuple)


# --- the definition


def one_row(model: Flamingo, tokens: Tensor, latents: Tensor, seen: Tensor) -> Tensor:
    """Hidden states (q d) of one row, in float64: latents (k c) of all its pictures, seen (q k)."""
    decoder: Any = model.decoder
    x = decoder.embed(tokens[None], torch.arange(len(tokens)))[0]
    rope = None if decoder.rotary is None else decoder.rotary(torch.arange(len(tokens)))
    blocks: Any = model.gated_blocks
    for i, block in enumerate(decoder.blocks):
        if i in model.cross_layers:
            x = one_block(blocks[model.cross_layers.index(i)], x, latents, seen)
        x = block(x[None], mask="causal", rope=rope)[0]
    return decoder.last_norm(x)


def one_block(block: Any, x: Tensor, latents: Tensor, seen: Tensor) -> Tensor:
    attn, asking, heads = block.attn, block.norm1(x), []
    for h in range(attn.num_heads):
        some = slice(h * attn.head_dim, (h + 1) * attn.head_dim)
        q, k = (attn.q_norm(asking @ attn.q_proj.weight[some].T), attn.k_norm(latents @ attn.k_proj.weight[some].T))
        v, out = latents @ attn.v_proj.weight[some].T, torch.zeros(len(x), attn.head_dim, dtype=x.dtype)
        for t in range(len(x)):
            if seen[t].any():
                weights = (q[t] @ k[seen[t]].T / attn.head_dim**0.5).exp()
                out[t] = weights / weights.sum() @ v[seen[t]]
        heads.append(out)
    x = x + torch.tanh(block.attn_gate) * (torch.cat(heads, -1) @ attn.out_proj.weight.T)
    more = torch.tanh(block.mlp_gate) * block.mlp(block.norm2(x))
    return x + more * (1.0 if block.mlp_without_image else seen.any(-1, keepdim=True))


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_definition(kind: str) -> None:
    model, rows = flamingo(**KINDS[kind]).double(), ("..I..I.", "....", "II..", ".I")
    given = laid_out(*rows)
    assert given.pixels is not None
    given = replace(given, pixels=given.pixels.double())
    found, may = model.hidden_states(given), sees(rows, model.visible_images)
    for r, row in enumerate(rows):
        features = model.vision.forward_features(given.pixels[r])
        latents = features if model.connector is None else model.connector(features[None])[0]
        seen = torch.zeros(len(row), len(latents), dtype=torch.bool)
        for t in range(len(row)):
            seen[t, list(may[r][t])] = True
        width = latents.shape[1]
        want = one_row(model, given.tokens[r, : len(row)], latents.flatten(0, 1), seen.repeat_interleave(width, 1))
        torch.testing.assert_close(found[r, : len(row)], want, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(model.logits(given), model.decoder.head(found))


# --- masks and layouts


@settings(max_examples=60, deadline=None)
@given(rows=layouts, visible_images=st.sampled_from(["last", "all_previous", "none"]))
def test_the_mask_is_who_sees_whom(rows: tuple[str, ...], visible_images: Any) -> None:
    given = laid_out(*rows)
    mask, want = image_attention_mask(given, visible_images), sees(rows, visible_images)
    for r, row in enumerate(want):
        for t, may in enumerate(row):
            found = {0} if mask is None else set(mask[r, t].nonzero()[:, 0].tolist())
            assert found == may


@settings(max_examples=25, deadline=None)
@given(
    rows=layouts,
    visible_images=st.sampled_from(["last", "all_previous"]),
    mlp_without_image=st.booleans(),
    data=st.data(),
)
def test_a_image_changes_only_what_comes_after_it_in_its_document(
    rows: tuple[str, ...], visible_images: str, mlp_without_image: bool, data: st.DataObject
) -> None:
    model, given = ready(visible_images, mlp_without_image), laid_out(*rows)
    assert given.pixels is not None
    assert given.image_mask is not None
    if not given.image_mask.any():
        return
    row, image = data.draw(st.sampled_from(given.image_mask.nonzero().tolist()))
    pixels = given.pixels.clone()
    pixels[row, image] += torch.randn(3, 16, 24)
    changed = (model.hidden_states(given) != model.hidden_states(replace(given, pixels=pixels))).any(-1)
    place = [t for t, letter in enumerate(rows[row].replace("|", "")) if letter == "I"][image]
    end = place + len(
        rows[row].split("|")[int(laid_out(*rows).document_ids[row, place]) if "|" in "".join(rows) else 0]
    )
    documents = rows[row].split("|")
    starts = [sum(map(len, documents[:k])) for k in range(len(documents) + 1)]
    end = next(start for start in starts if start > place)
    want = torch.zeros_like(changed)
    want[row, place:end] = True
    assert torch.equal(changed & given.attention_mask, want)


@settings(max_examples=15, deadline=None)
@given(rows=layouts, visible_images=st.sampled_from(["last", "all_previous"]), mlp_without_image=st.booleans())
def test_documents_packed_and_batched_are_as_each_alone(
    rows: tuple[str, ...], visible_images: str, mlp_without_image: bool
) -> None:
    model, given = ready(visible_images, mlp_without_image), laid_out(*rows)
    assert given.pixels is not None
    found = model.logits(given)
    for r, row in enumerate(rows):
        t = i = 0
        for document in row.split("|"):
            alone = laid_out(document)
            count = document.count("I")
            alone = replace(
                alone,
                tokens=given.tokens[r : r + 1, t : t + len(document)],
                pixels=given.pixels[r : r + 1, i : i + count],
            )
            torch.testing.assert_close(found[r, t : t + len(document)], model.logits(alone)[0], atol=2e-5, rtol=2e-5)
            t, i = t + len(document), i + count


@pytest.mark.parametrize("visible_images", ["last", "all_previous"])
def test_what_sees_no_image_is_the_language_models_own(visible_images: str) -> None:
    model, rows = flamingo(visible_images=visible_images), ("...I..", "......", "I....")
    given = laid_out(*rows)
    plain, found = model.decoder(given.tokens), model.hidden_states(given)
    same = (plain == found).all(-1)
    assert same.tolist() == [[True] * 3 + [False] * 3, [True] * 6, [False] * 6]
    blind = flamingo(visible_images=visible_images, mlp_without_image=True)  # As the peers: the MLP works on all.
    assert not (blind.hidden_states(given) == plain).all(-1).any()
    none = flamingo(visible_images="none")
    assert torch.equal(none.logits(given), none.decoder.head(none.decoder(given.tokens)))
    textual = replace(
        given, pixels=torch.zeros(3, 0, 3, 16, 24), image_index=None, image_mask=None, first_image_index=None
    )
    assert torch.equal(model.hidden_states(textual), plain)
    no_real = replace(given, image_mask=torch.zeros(3, 1, dtype=torch.bool), image_index=None, first_image_index=None)
    assert torch.equal(model.hidden_states(no_real), plain)
    assert torch.equal(blind.hidden_states(textual), blind.hidden_states(no_real))
    assert not torch.equal(blind.hidden_states(textual), plain)


def test_images_without_places_stand_before_the_text() -> None:
    model, given = flamingo(visible_images="last"), batch(i=3)
    assert given.pixels is not None
    torch.testing.assert_close(model.logits(given), model.logits(replace(given, pixels=given.pixels[:, 2:])))
    every = flamingo(visible_images="all_previous")
    shuffled = replace(given, pixels=given.pixels[:, [2, 0, 1]])
    torch.testing.assert_close(every.logits(given), every.logits(shuffled), atol=1e-5, rtol=1e-5)
    some = torch.tensor([[True, True, False], [True, False, False], [True] * 3])
    found = model.logits(replace(given, image_mask=some))
    for row, last in ((0, 1), (2, 0), (4, 2)):
        alone = replace(given.pick_images(torch.tensor([[row // 2 * 3 + last]])), tokens=given.tokens[row : row + 1])
        alone = replace(alone, attention_mask=given.attention_mask[:1], loss_mask=given.loss_mask[:1])
        torch.testing.assert_close(found[row], model.logits(alone)[0], atol=1e-5, rtol=1e-5)


def test_images_that_are_padding_are_not_even_computed() -> None:
    model, given = flamingo(), laid_out("I.I..", "..I..", ".....")
    assert given.pixels is not None
    assert given.image_mask is not None
    broken = given.pixels.masked_fill(~given.image_mask[..., None, None, None], float("nan"))
    assert torch.equal(model.logits(replace(given, pixels=broken)), model.logits(given))
    numbered = flamingo(latents=0)
    numbered = Flamingo(ViT((16, 24), 8, 20, 1, 4), numbered.decoder, connector=PerceiverResampler(20, 1, max_images=2))
    assert numbered.latents(given).shape == (3, 2, 64, 20)


def test_texts_share_their_images_as_if_each_had_a_copy() -> None:
    given = batch(i=2)
    assert given.pixels is not None
    spread = replace(given, pixels=given.pixels.repeat_interleave(2, 0))
    for kind in KINDS.values():
        model = flamingo(**kind)
        torch.testing.assert_close(model.logits(given), model.logits(spread), atol=1e-5, rtol=1e-5)


def test_the_visual_tokens_of_a_cache_are_those_of_the_pixels() -> None:
    model, given = flamingo(), laid_out("I.I..", "..I..")
    assert given.pixels is not None
    tokens = model.forward_features(given.pixels)
    assert tokens.shape == (2, 2, 8, 20)
    cached = replace(given, pixels=None, visual_tokens=tokens)
    torch.testing.assert_close(model.logits(cached), model.logits(given), atol=1e-5, rtol=1e-5)
    halved = replace(cached, visual_tokens=tokens.half())
    torch.testing.assert_close(model.logits(halved), model.logits(given), atol=0.05, rtol=0.05)


def test_a_mask_as_text() -> None:
    given = laid_out(".I.I.", "I.|.I")
    words = ["a", "<image>", "cat", "<image>", "dog"]
    want = "        12\n      a ..\n<image> #.\n    cat #.\n<image> .#\n    dog .#"
    assert show_mask(given, words=words) == want
    assert show_mask(given, "all_previous", words=words) == want.replace(".#", "##")
    ids = [str(t) for t in given.tokens[1].tolist()]
    lines = [line.split() for line in show_mask(given, row=1).splitlines()]
    assert lines == [["12"], [ids[0], "#."], [ids[1], "#."], [ids[2], ".."], [ids[3], ".#"], ["0", ".."]]
    assert show_mask(batch(q=2), words=["a", "b"]) == "  1\na #\nb #"


@pytest.mark.parametrize("visible_images", ["last", "all_previous"])
def test_the_first_image_of_a_document_counts_where_all_images_stand_before_the_text(visible_images: Any) -> None:
    given = replace(batch(q=3), first_image_index=torch.tensor([[1, 2, 2]]).expand(len(batch(q=3).tokens), -1))
    mask = image_attention_mask(given, visible_images)
    assert mask is not None
    assert mask[0].tolist() == [[True], [False], [False]]


def test_layouts_that_cannot_be_are_refused() -> None:
    model, given = flamingo(), laid_out("I.I..", "..I..")
    assert given.image_index is not None
    with pytest.raises(ValueError, match="row 1 has text after image 3, but only 1 images"):
        model.logits(replace(given, image_index=given.image_index + torch.tensor([[0], [2]])))
    with pytest.raises(ValueError, match="image_index of row 1 has -1: images are numbered from 1"):
        model.logits(replace(given, image_index=given.image_index - torch.tensor([[0], [1]])))
    packed = laid_out("I.|I..")
    with pytest.raises(ValueError, match="need image_index: which"):
        model.logits(replace(packed, image_index=None))
    with pytest.raises(ValueError, match="need first_image_index: which"):
        flamingo(visible_images="all_previous").logits(replace(packed, first_image_index=None))
    with pytest.raises(ValueError, match="document_ids were given"):
        model.prefill(packed)
    with pytest.raises(ValueError, match='"previous"'):
        image_attention_mask(given, "previous")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="pixels or visual_tokens"):
        model.logits(replace(given, pixels=None))


# --- at initialisation, and frozen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("autocast", [False, True])
def test_at_first_it_is_the_language_model_bit_for_bit(kind: str, autocast: bool) -> None:
    model = flamingo(opened=False, **KINDS[kind])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for given in (batch(i=2), laid_out("..I..I.", "....")):
            want = model.decoder.head(model.decoder(given.tokens))
            assert torch.equal(model.logits(given), want)
    given = batch()
    logits, state = model.prefill(given, max_new_tokens=2)
    lm_state = model.decoder.new_state(9)
    assert torch.equal(logits, model.decoder.head(model.decoder(given.tokens, state=lm_state)[:, -1]))
    assert torch.equal(
        model.decode_step(given.tokens[:, 0], state),
        model.decoder.head(model.decoder(given.tokens[:, :1], state=lm_state)[:, 0]),
    )


def digest(module: nn.Module) -> str:
    found = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def train(model: Flamingo, given: CaptionBatch, steps: int = 3) -> torch.optim.Optimizer:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    for _ in range(steps):
        loss = caption_loss(model, given, reduction="sum")
        optimizer.zero_grad()
        loss.sum.backward()
        optimizer.step()
    return optimizer


def test_frozen_is_frozen() -> None:
    model, given = flamingo(opened=False, lm={"dropout": 0.3}, cross_attn_every_n_layers=2), batch()
    before = digest(model.vision), digest(model.decoder)
    start = caption_loss(model, given, reduction="sum").sum.item()
    optimizer = train(model, given, steps=4)
    assert (digest(model.vision), digest(model.decoder)) == before
    assert is_frozen(model.vision)
    assert is_frozen(model.decoder)
    assert all(p.grad is None for tower in (model.vision, model.decoder) for p in tower.parameters())
    learned = {p for group in optimizer.param_groups for p in group["params"]}
    assert not learned & {*model.vision.parameters(), *model.decoder.parameters()}
    assert model.training
    assert model.gated_blocks.training
    assert not any(m.training for tower in (model.vision, model.decoder) for m in tower.modules())
    still = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert still == []
    assert caption_loss(model.eval(), given, reduction="sum").sum.item() < start


def seen_by_blocks(model: Flamingo, given: CaptionBatch) -> list[bool]:
    """Whether the input of each of the decoder's blocks is part of the backward pass."""
    found: list[bool] = []
    inner: Any = model.decoder.decoder if isinstance(model.decoder, ExtendedDecoder) else model.decoder
    blocks: Any = inner.blocks
    hooks = [b.register_forward_pre_hook(lambda _, args: found.append(args[0].requires_grad)) for b in blocks]
    caption_loss(model.train(), given, reduction="sum").sum.backward()
    for hook in hooks:
        hook.remove()
    return found


def test_the_backward_pass_stops_below_the_first_gated_block() -> None:
    given = batch()
    assert seen_by_blocks(flamingo(cross_layers=[2]), given) == [False, False, True]
    assert seen_by_blocks(flamingo(cross_layers=[1]), given) == [False, True, True]
    assert seen_by_blocks(flamingo(), given) == [True, True, True]
    longer = ExtendedDecoder(TextDecoder(VOCAB, 24, 3, 4), 1)
    assert seen_by_blocks(Flamingo(ViT((16, 24), 8, 20, 1, 4), longer, cross_layers=[2]), given) == [True, True, True]


def test_recomputation_reaches_the_frozen_blocks_above_the_first_gated_one() -> None:
    plain, saving, given, calls = (flamingo(cross_layers=[1]).train(), flamingo(cross_layers=[1]).train(), batch(), [])
    checkpoint_activations(saving)
    blocks: Any = saving.decoder.blocks
    for i, block in enumerate(blocks):
        block.mlp.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
    for model in (plain, saving):
        caption_loss(model, given, reduction="sum").sum.backward()
    assert sorted(calls) == [0, 1, 1, 2, 2]
    for mine, theirs in zip(saving.gated_blocks.parameters(), plain.gated_blocks.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_what_is_not_frozen_learns() -> None:
    model, given = flamingo(freeze_vision=False, freeze_decoder=False), batch()
    before = digest(model.vision), digest(model.decoder)
    train(model, given)
    after = digest(model.vision), digest(model.decoder)
    assert before[0] != after[0]
    assert before[1] != after[1]
    assert model.vision.training
    assert model.decoder.training


@pytest.mark.parametrize("kind", ["gpt2", "llama, as idefics"])
def test_only_new_tokens_of_the_language_model_learn(kind: str) -> None:
    plain, given = flamingo(opened=False, **KINDS[kind]), batch()
    options = {name: value for name, value in KINDS[kind].items() if name != "lm"}
    longer = ExtendedDecoder(plain.decoder, 2)
    model = Flamingo(plain.vision, longer, **grouped({"num_heads": 3, "head_dim": 7} | options)).eval()
    assert model.vocab_size == VOCAB + 2
    assert torch.equal(model.logits(given)[..., :VOCAB], plain.decoder.head(plain.decoder(given.tokens)))
    tokens = given.tokens.clone()
    tokens[:, 3], tokens[0, 5] = VOCAB + 1, VOCAB
    new = replace(given, tokens=tokens)
    before, rows = digest(plain.decoder), longer.new_embed.weight.clone()
    train(model, new)
    assert digest(plain.decoder) == before
    assert not plain.decoder.training
    assert not (longer.new_embed.weight == rows).all(1).any()
    model.eval()
    full = model.logits(new)
    logits, state = model.prefill(new.truncate(4), max_new_tokens=3)
    torch.testing.assert_close(logits, full[:, 3], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.decode_step(new.tokens[:, 4], state), full[:, 4], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.decode_step(new.tokens[:, 5], state), full[:, 5], atol=1e-5, rtol=1e-5)


# --- decoding


def few_shot(rows: tuple[str, ...], prompt: int) -> tuple[CaptionBatch, CaptionBatch]:
    """Whole rows, padded on the left so that all end together; and their prompts, without the last tokens."""
    given = laid_out(*rows)
    q = given.tokens.shape[1]
    shifts = [q - len(row) for row in rows]
    roll = lambda x: torch.stack([row.roll(s) for row, s in zip(x, shifts, strict=True)])  # noqa: E731
    names = ("tokens", "attention_mask", "loss_mask", "image_index", "first_image_index")
    whole = replace(given, **{name: roll(getattr(given, name)) for name in names})
    return whole, whole.truncate(prompt)


@pytest.mark.parametrize("visible_images", ["last", "all_previous", "none"])
@pytest.mark.parametrize("kind", ["gpt2", "llama, as idefics", "no resampler"])
def test_prompts_of_any_length_and_number_of_images_go_on_as_each_alone(kind: str, visible_images: str) -> None:
    model = flamingo(**KINDS[kind] | {"visible_images": visible_images})
    rows = ("..I..I......", "I......", ".......", "..I.I.I......")
    whole, prompt = few_shot(rows, prompt=10)
    logits, state = model.prefill(prompt, max_new_tokens=3)
    steps = [logits] + [model.decode_step(whole.tokens[:, t], state) for t in (10, 11, 12)]
    for r, row in enumerate(rows):
        alone = laid_out(row)
        assert whole.pixels is not None
        tokens = whole.tokens[r][whole.attention_mask[r]][None]
        alone = replace(alone, tokens=tokens, pixels=whole.pixels[r : r + 1, : row.count("I")])
        want = model.logits(alone)[0, -4:]
        torch.testing.assert_close(torch.stack([step[r] for step in steps]), want, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="holds 13 tokens, but 14"):
        model.decode_step(whole.tokens[:, 0], state)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("i", [1, 2])
def test_cached_steps_equal_the_full_pass_where_texts_share_images(kind: str, i: int) -> None:
    model, given = flamingo(**KINDS[kind]), batch(i=i)
    logits, state = model.prefill(given.truncate(4), max_new_tokens=3)
    steps = [logits] + [model.decode_step(given.tokens[:, t], state) for t in (4, 5, 6)]
    torch.testing.assert_close(torch.stack(steps, 1), model.logits(given)[:, 3:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [("..I..I.", "I..", "...."), None], ids=["documents", "shared pictures"])
def test_copies_and_reordered_rows_go_on_like_the_rows_they_came_from(rows: tuple[str, ...] | None) -> None:
    model = flamingo()
    given = batch(i=2) if rows is None else few_shot(rows, prompt=7)[0]
    n = len(given.tokens)
    logits, alone = model.prefill(given, max_new_tokens=2)
    copied, state = model.prefill(given, expand_size=3, max_new_tokens=2)
    assert torch.equal(copied, logits.repeat_interleave(3, 0))
    new = torch.randint(VOCAB, (3 * n,))
    first = model.decode_step(new, state)
    order = torch.arange(3 * n).view(n, 3)[:, [2, 0, 0]].flatten()
    state.reorder(order)
    second = model.decode_step(new, state)
    for copy in range(3):
        _, alone = model.prefill(given, max_new_tokens=2)
        torch.testing.assert_close(model.decode_step(new[copy::3], alone), first[copy::3], atol=1e-5, rtol=1e-5)
        _, alone = model.prefill(given, max_new_tokens=2)
        model.decode_step(new[order][copy::3], alone)
        torch.testing.assert_close(model.decode_step(new[copy::3], alone), second[copy::3], atol=1e-5, rtol=1e-5)


def test_images_are_read_once_and_never_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given, calls = flamingo(), batch(), []
    blocks: Any = model.gated_blocks
    for block in blocks:
        assert isinstance(block.attn, Attention)
        project = block.attn.project_kv
        monkeypatch.setattr(block.attn, "project_kv", lambda x, f=project: (calls.append("kv"), f(x))[1])
    seen = model.vision.forward_features
    monkeypatch.setattr(model.vision, "forward_features", lambda x: (calls.append("vision"), seen(x))[1])
    _, state = model.prefill(given, expand_size=5, max_new_tokens=3)
    assert calls == ["vision", "kv", "kv", "kv"]
    assert isinstance(state, FlamingoState)
    assert state.context is not None
    assert state.mask is None
    before = [(kv.k.data_ptr(), kv.v.data_ptr()) for kv in state.context]
    assert all(kv.k.shape == kv.v.shape == (3, 3, 5, 7) for kv in state.context)  # Not 6 rows, not 30 beams.
    state.reorder(torch.arange(30).view(6, 5).flip(1).flatten())
    model.decode_step(torch.zeros(30, dtype=torch.long), state)
    assert [(kv.k.data_ptr(), kv.v.data_ptr()) for kv in state.context] == before
    assert len(calls) == 4


def test_of_several_images_new_tokens_keep_only_the_last() -> None:
    model, (given, _) = flamingo(), few_shot(("..I..I.", "I.I.I..", ".I....."), 7)
    _, state = model.prefill(given, expand_size=2, max_new_tokens=3)
    assert state.context is not None
    assert state.mask is None  # All rows see one.
    assert all(kv.k.shape == (3, 3, 5, 7) for kv in state.context)  # 5 latents, not 15; 3 rows, not 6.


def test_beams_and_samples() -> None:
    model, (given, _) = flamingo(), few_shot(("..I..I.", "I..", "...."), 7)
    assert given.pixels is not None
    found = generate(model, given, eos_id=1, max_new_tokens=5, num_beams=4, num_return_sequences=2)
    for r in range(3):
        real, count = given.attention_mask[r], int(given.attention_mask[r].sum())
        assert given.image_mask is not None
        assert given.image_index is not None
        few = int(given.image_mask[r].sum())
        tokens = given.tokens[r][real][None]
        alone = CaptionBatch(
            tokens,
            tokens >= 0,
            tokens >= 0,
            given.pixels[r : r + 1, :few],
            image_index=given.image_index[r][real][None],
        )
        want = generate(model, alone, eos_id=1, max_new_tokens=5, num_beams=4, num_return_sequences=2)[0]
        assert [text.tokens for text in found[r]] == [text.tokens for text in want], count


# --- where the words look


def test_look_follows_the_latents_to_the_patches() -> None:
    model, given = flamingo(visible_images="all_previous"), batch(i=2)
    blocks: Any = model.gated_blocks
    for block, openness in zip(blocks, (0.0, 0.2, -0.6), strict=True):
        block.attn_gate.data.fill_(torch.atanh(torch.tensor(openness)))
    with record_attention(model, keep="gated") as words, record_attention(model, keep="connector") as latents:
        model.logits(given)
    a, b = [w.mean(1).view(3, 2, 5, 13) for w in latents.values()]  # 8 visual tokens, then 5 latents.
    held = (a[..., :8] / 2 + b[..., :8] + b[..., 8:] @ (a[..., :8] / 2)) / 2
    second, third = [w.mean(1).view(6, 7, 2, 5) for w in words.values()][1:]
    looks = (0.25 * second + 0.75 * third).unflatten(0, (3, 2))
    want = torch.einsum("b r q i l, b i l p -> b r q i p", looks, held).flatten(0, 1)[..., 2:]
    found = model.attention_map(given)
    assert found.shape == (6, 7, 2, 2, 3)
    torch.testing.assert_close(found, want.unflatten(-1, (2, 3)))
    assert (found >= 0).all()
    assert (found.sum((2, 3, 4)) <= 1).all()
    assert (found.sum((2, 3, 4)) > 0.1).all()
    assert not found.requires_grad


def test_look_sees_what_the_mask_lets_it_see() -> None:
    for kind in KINDS.values():
        model, rows = flamingo(**kind), ("..I..I.", "....", "I......")
        found = model.attention_map(laid_out(*rows)).sum((3, 4))
        for r, row in enumerate(sees(rows, model.visible_images)):
            for t, may in enumerate(row):
                assert set(found[r, t].nonzero()[:, 0].tolist()) == may
    shut = flamingo(opened=False)
    assert (shut.attention_map(batch()).sum((2, 3, 4)) > 0.1).all()
    assert not flamingo(visible_images="none").attention_map(batch()).any()


def test_look_follows_the_size_of_the_image_and_the_cache() -> None:
    model = flamingo()
    assert model.attention_map(batch(size=(40, 16))).shape == (6, 7, 1, 5, 2)
    given = batch(i=2)
    assert given.pixels is not None
    cached = replace(given, pixels=None, visual_tokens=model.forward_features(given.pixels))
    want = model.attention_map(given)
    assert torch.equal(model.attention_map(cached), want)
    assert torch.equal(model.train().attention_map(given), want)
    assert model.training
    assert not model.decoder.training


# --- construction


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_is_the_same(kind: str, tmp_path: Path) -> None:
    model, given = flamingo(**KINDS[kind]), batch(i=2)
    model.save_pretrained(tmp_path)
    again = Flamingo.from_pretrained(tmp_path)
    assert torch.equal(again.logits(given), model.logits(given))
    assert again.cross_layers == model.cross_layers
    assert is_frozen(again.decoder)


def test_a_gated_block_stands_where_openflamingo_has_it() -> None:
    decoder = TextDecoder(VOCAB, 24, 7, 4)
    layers = [Flamingo(ViT(16, 8, 20, 1, 4), decoder, cross_attn_every_n_layers=k).cross_layers for k in (1, 2, 3, 7)]
    assert layers == [[0, 1, 2, 3, 4, 5, 6], [1, 3, 5], [2, 5], [6]]


def test_number_of_parameters_is_that_of_the_peers() -> None:
    def count(dim: int, visual_dim: int, **options: Any) -> int:
        decoder = TextDecoder(11, dim, 1, 32 if dim == 4096 else 4)
        model = Flamingo(ViT(14, 14, visual_dim, 1, 4), decoder, **grouped(options))
        return sum(p.numel() for p in model.gated_blocks.parameters())

    with torch.device("meta"):
        assert [count(dim, 1024) for dim in (768, 2048, 4096)] == [6_556_674, 36_708_354, 139_476_994]
        idefics: dict[str, Any] = {
            "activation": "swiglu",
            "mlp_dim": 11008,
            "norm": "rms",
            "num_heads": 32,
            "head_dim": 128,
        }
        assert count(4096, 1280, **idefics) == 179_314_690


def test_parts_that_do_not_fit_are_refused() -> None:
    vision, decoder = ViT(16, 8, 20, 1, 4), TextDecoder(VOCAB, 24, 3, 4)
    with pytest.raises(ValueError, match=r"connector's visual_dim \(21\).*vision encoder's dim \(20\)"):
        Flamingo(vision, decoder, connector=PerceiverResampler(21, 1))
    with pytest.raises(ValueError, match="without cross-attention of its own"):
        Flamingo(vision, TextDecoder(VOCAB, 24, 3, 4, context_dim=20))
    with pytest.raises(ValueError, match=r"cross_attn_every_n_layers=4.*3 blocks \(0 to 2\)"):
        Flamingo(vision, decoder, cross_attn_every_n_layers=4)
    for layers in ([], [0, 3], [1, 0], [1, 1], [-1]):
        with pytest.raises(ValueError, match=r"cross_layers=.*3 blocks \(0 to 2\)"):
            Flamingo(vision, decoder, cross_layers=layers)
    with pytest.raises(ValueError, match='"first"'):
        Flamingo(vision, decoder, visible_images="first")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"rows of 32 tokens.*31 at most"):
        flamingo().logits(batch(q=32))


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2"])
def test_any_hub_model_can_be_the_language_model(family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(7)
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": VOCAB}
    hub = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            family, **sizes, intermediate_size=31, max_position_embeddings=31, bos_token_id=1, eos_token_id=2
        )
    )
    for parameter in hub.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    decoder, vision = HFDecoder.from_model(hub.eval()), ViT((16, 24), 8, 20, 1, 4, num_registers=1)
    model = Flamingo(vision, decoder, connector=PerceiverResampler(20, 1, 3, 7, 5), gated=GatedBlockConfig(3, 7)).eval()
    (given, prompt), names = few_shot(("..I..I......", "I......", "......."), 9), set(hub.state_dict())
    first = laid_out("..I.I..", ".......")
    want = hub(first.tokens).logits
    assert torch.equal(model.logits(first), want)
    for block in model.gated_blocks:
        for parameter in block.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    logits, state = model.prefill(prompt, max_new_tokens=3)
    steps = [logits] + [model.decode_step(given.tokens[:, t], state) for t in (9, 10, 11)]
    for r, row in enumerate(("..I..I......", "I......", ".......")):
        assert given.pixels is not None
        tokens = given.tokens[r][given.attention_mask[r]][None]
        alone = replace(laid_out(row), tokens=tokens, pixels=given.pixels[r : r + 1, : row.count("I")])
        want = model.logits(alone)[0, -4:]
        torch.testing.assert_close(torch.stack([step[r] for step in steps]), want, atol=1e-5, rtol=1e-5)
    assert not torch.equal(model.logits(first)[0], hub(first.tokens).logits[0])
    assert torch.equal(model.logits(first)[1], hub(first.tokens).logits[1])  # It sees no picture.
    assert set(hub.state_dict()) == names
    model.save_pretrained(tmp_path)
    assert torch.equal(Flamingo.from_pretrained(tmp_path).logits(first), model.logits(first))


def test_documents_of_the_data_module_are_read_as_each_alone() -> None:
    """Rows as the interleaved data packs them: image tokens, several documents, several pictures."""
    from mmtransformer import ImageTransform
    from mmtransformer.data.documents.documents import PairsAsDocuments
    from mmtransformer.data.interleaved_data import InterleavedData
    from mmtransformer.data.scenes.scenes import Scenes

    documents = PairsAsDocuments(Scenes(image_size=32, train_size=9, val_size=2, compositional_size=2))
    data = InterleavedData(
        documents, transform=ImageTransform(16), vocab_size=300, batch_size=2, row_len=120, max_images=4
    )
    data.setup("fit")
    given = next(iter(data.train_dataloader()))
    torch.manual_seed(0)
    decoder = TextDecoder(data.tokenizer.vocab_size, 24, 2, 4, max_len=120)
    model = Flamingo(ViT(16, 8, 20, 1, 4), decoder, visible_images="all_previous", gated=GatedBlockConfig(3, 7))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.eval()
    assert given.document_ids is not None
    assert given.image_index is not None
    assert given.first_image_index is not None
    assert given.pixels is not None
    found, read = model.logits(given), 0
    for row in range(len(given.tokens)):
        for number in given.document_ids[row][given.attention_mask[row]].unique():
            mine = (given.document_ids[row] == number) & given.attention_mask[row]
            first, last = int(given.first_image_index[row][mine][0]), int(given.image_index[row][mine].max())
            tokens, yes = given.tokens[row][mine][None], mine[mine][None]
            alone = CaptionBatch(
                tokens, yes, yes, given.pixels[row : row + 1, first - 1 : last],
                image_index=(given.image_index[row][mine] - first + 1).clamp(min=0)[None],
            )  # fmt: skip
            torch.testing.assert_close(found[row][mine], model.logits(alone)[0], atol=2e-5, rtol=2e-5)
            read += 1
    assert read > 2
    loss = caption_loss(model, given, reduction="sum")
    loss.sum.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.gated_blocks.parameters())
