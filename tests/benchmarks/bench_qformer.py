"""The Q-Former (32 queries, 768 wide, 12 layers, 257 x 1408 visual tokens, 32 text tokens, 16 pictures) against
transformers' Blip2QFormerModel (SDPA) with the same weights; BLIP-2's stage 2 (ViT-Ti/16, 6-layer Q-Former, frozen
OPT-125m shape, 8 captions of 9 to 21 tokens) and its decoding with 5 beams, against transformers'
Blip2ForConditionalGeneration; and a whole stage-1 step of 8 pairs against the same step by LAVIS's passes.

In stage 2 ours trains as in bench_captioner, with fused AdamW and, in float32, matrix products that compute in bfloat16
inside; the peer as it comes, and in the lines "same ..." with both; "frozen parts in bf16" are ours, loaded with
dtype="bfloat16". LAVIS computes the padding of texts, as ours does not. Elsewhere the two sides have the same
optimizer and precision. No dropout on either side unless said.

python tests/benchmarks/bench_qformer.py [--threads N] [--pairs N] [--only NAME]
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from harness import compare, process_as, start
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2QFormerConfig, Blip2QFormerModel, OPTConfig

from mmtransformer import Blip2, CaptionBatch, QFormer, ViT, caption_loss, generate
from mmtransformer.captioners.blip2_qformer import Blip2QFormer
from mmtransformer.connectors import qformer as qformer_module
from mmtransformer.layers.weight_prepacking import prepack_weights
from mmtransformer.weights import from_transformers
from mmtransformer.weights.captioners.parts.qformer import BLIP2, qformer_keys
from mmtransformer.weights.shared.dtype import cast_frozen
from mmtransformer.weights.shared.keys import fill, key_mappings

IMAGES, ROWS, CAPTIONS, QUERIES, TEXT, BEAMS, NEW = 16, 8, 8, 32, 32, 5, 20
IMAGE, BEGIN, VOCAB = 50_271, 2, 50_272
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FROZEN_HALF, SAME = ", frozen parts in bf16", ", same optimizer and precision"


def optimizer(model: nn.Module, fused: bool) -> torch.optim.AdamW:
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-5, fused=fused or None)


def training(
    loss: Callable[[], Tensor],
    model: nn.Module | torch.optim.AdamW,
    dtype: torch.dtype,
    *,
    fused: bool = True,
    precision: str = "highest",
) -> Callable[[], object]:
    """One training step; precision "medium" = matrix products of float32 compute in bfloat16 inside."""
    adamw = optimizer(model, fused) if isinstance(model, nn.Module) else model

    def step() -> None:
        process_as(mmt_fit=precision == "medium")
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            value = loss()
        value.backward()
        adamw.step()
        adamw.zero_grad(set_to_none=True)

    return step


@contextmanager
def weights_kept(*models: nn.Module) -> Iterator[None]:
    """Gives models their weights back, so that each line begins from those that the two sides share."""
    kept = [[parameter.detach().clone() for parameter in model.parameters()] for model in models]
    try:
        yield
    finally:
        with torch.no_grad():
            for model, weights in zip(models, kept, strict=True):
                for parameter, weight in zip(model.parameters(), weights, strict=True):
                    parameter.copy_(weight)


def flops(run: Callable[[], object]) -> float:
    """Floating point operations of the matrix products that a call really makes."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


# ---------------------------------------------------------------------------------------------- the Q-Former alone


def qformers(dropout: float = 0.0) -> tuple[QFormer, Any]:
    """Ours with words of its own, and the peer, which reads embeddings."""
    config = Blip2QFormerConfig(use_qformer_text_input=True, vocab_size=1000, hidden_dropout_prob=dropout,
                                attention_probs_dropout_prob=dropout)  # fmt: skip
    peer = Blip2QFormerModel(config)
    ours = QFormer(vocab_size=1000, dropout=dropout)
    named = {f"qformer.{name}": tensor for name, tensor in peer.state_dict().items()}
    for row in key_mappings(qformer_keys(BLIP2), own := ours.state_dict()):
        named.setdefault(row.source, own[row.target[0]])
    fill(ours, qformer_keys(BLIP2), named, "the peer")
    return ours, peer


def bench_qformer(args: Any, dropout: float) -> None:
    ours, peer = qformers(dropout)
    assert ours.tok_embed is not None
    assert ours.pos_embed is not None
    words, places = ours.tok_embed, ours.pos_embed
    visual, tokens = torch.randn(IMAGES, 257, 1408), torch.randint(1000, (IMAGES, TEXT))

    def theirs(text: bool) -> Tensor:
        embeds = ours.query_tokens.expand(IMAGES, -1, -1)
        if text:
            embeds = torch.cat((embeds, words(tokens) + places.weight[:TEXT]), 1)
        return peer(embeds, query_length=QUERIES, encoder_hidden_states=visual).last_hidden_state

    def mine(text: bool, model: QFormer = ours) -> Tensor:
        return torch.cat(model.encode_pair(visual, tokens), 1) if text else model(visual)

    ours.eval(), peer.eval()
    with torch.no_grad():  # Before anything is trained.
        for text in (False, True):
            torch.testing.assert_close(mine(text), theirs(text), atol=1e-4, rtol=1e-4)
    for text, what in ((False, "queries"), (True, "queries and text")):
        asked = flops(lambda text=text: mine(text))
        trained = flops(lambda text=text: mine(text).square().mean().backward())
        ours.zero_grad(set_to_none=True)
        for name, dtype in DTYPES.items():
            line = f"Q-Former, {what}, forward, {name}"
            if args.only in line and not dropout:
                ours.eval(), peer.eval()

                def forward(run: Callable[[bool], Tensor], dtype: torch.dtype = dtype, text: bool = text) -> None:
                    torch.set_float32_matmul_precision("highest")
                    with torch.no_grad(), torch.autocast("cpu", enabled=dtype == torch.bfloat16):
                        run(text)

                compare(line, lambda f=forward: f(mine), lambda f=forward: f(theirs), target=1.0, flops=asked,
                        gemm=args.gemm[dtype], pairs=args.pairs)  # fmt: skip
                if dtype == torch.float32:
                    prepacked = prepack_weights(copy.deepcopy(ours))
                    compare(f"{line}, prepacked", lambda f=forward, p=prepacked: f(partial(mine, model=p)),
                            lambda f=forward: f(theirs), target=1.0, flops=asked, gemm=args.gemm[dtype],
                            pairs=args.pairs)  # fmt: skip
            line = f"Q-Former, {what}, training, {name}" + (f", dropout {dropout}" if dropout else "")
            if args.only in line:
                ours.train(), peer.train()
                own = training(lambda text=text: mine(text).square().mean(), ours, dtype)
                other = training(lambda text=text: theirs(text).square().mean(), peer, dtype)
                with weights_kept(ours, peer):
                    compare(line, own, other, target=1.0, flops=trained, gemm=args.gemm[dtype], pairs=args.pairs)


# --------------------------------------------------------------------------------------------------------- stage 2


def stage2() -> tuple[Blip2, Any]:
    vision = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 12, "num_attention_heads": 3,
              "image_size": 224, "patch_size": 16, "initializer_range": 0.02}  # fmt: skip
    qformer = {"num_hidden_layers": 6, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    text = OPTConfig(dropout=0.0)
    peer = Blip2ForConditionalGeneration(
        Blip2Config(vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=QUERIES,
                    image_token_index=IMAGE)
    )  # fmt: skip
    nn.init.normal_(peer.query_tokens, std=0.02)
    peer.vision_model.requires_grad_(False)
    peer.language_model.requires_grad_(False)
    ours = from_transformers(peer)
    assert isinstance(ours, Blip2)
    return ours, peer


def captions(rows: int = CAPTIONS, shortest: int = 9, longest: int = 21) -> CaptionBatch:
    lengths = torch.linspace(shortest, longest, rows).round().long()
    tokens = torch.randint(4, IMAGE, (rows, longest))
    tokens[:, 0] = BEGIN
    attention_mask = torch.arange(longest) < lengths[:, None]
    loss_mask = attention_mask & (torch.arange(longest) > 0)
    return CaptionBatch(
        tokens.where(attention_mask, 1), attention_mask, loss_mask, pixels=torch.randn(rows, 1, 3, 224, 224)
    )


def bench_stage2(args: Any, ours: Blip2, peer: Any) -> None:
    ours.train(), peer.train()
    full = captions()
    with torch.no_grad():
        cached = replace(full, pixels=None, visual_tokens=ours.forward_features(cast(Tensor, full.pixels)))
    ids = torch.cat((torch.full((CAPTIONS, QUERIES), IMAGE), full.tokens), 1)
    known = torch.cat((torch.ones(CAPTIONS, QUERIES, dtype=torch.long), full.attention_mask.long()), 1)
    labels = full.tokens.masked_fill(~full.loss_mask, -100)
    # The peer's own loss takes labels of the whole row only.
    labels = torch.cat((torch.full((CAPTIONS, QUERIES), -100), labels), 1)
    pixels = cast(Tensor, full.pixels)[:, 0]

    def theirs() -> Tensor:
        return peer(pixel_values=pixels, input_ids=ids, attention_mask=known, labels=labels).loss

    def mine(model: Blip2, batch: CaptionBatch) -> Tensor:
        loss = caption_loss(model, batch, reduction="sum")
        return loss.sum / loss.count

    with torch.no_grad():
        torch.testing.assert_close(mine(ours, full), theirs(), atol=1e-4, rtol=1e-4)
    half = copy.deepcopy(ours)  # Autocast then has no frozen weight to cast in every step.
    cast_frozen(half.decoder, "bfloat16"), cast_frozen(half.vision, "bfloat16")
    for name, dtype in DTYPES.items():
        for kind, batch in (("", full), (", cached features", cached)):
            goal = {("fp32", ""): 2.0, ("bf16", ""): 1.5}.get((name, kind), 3.0 if name == "fp32" else 2.2)
            for how, model in (("", ours), (FROZEN_HALF, half), (SAME, ours)):
                line = f"stage 2, {name}{kind}{how}"
                if args.only in line:
                    same = how == SAME
                    own = training(partial(mine, model, batch), model, dtype, precision="medium")
                    other = training(theirs, peer, dtype, fused=same, precision="medium" if same else "highest")
                    with weights_kept(model, peer):
                        compare(line, own, other, target=None if same else goal, pairs=args.pairs,
                                unit=(CAPTIONS, "captions"))  # fmt: skip


def bench_generate(args: Any, ours: Blip2, peer: Any) -> None:
    ours.eval(), peer.eval()
    with torch.no_grad():  # Louder branches, so that texts depend on pictures and rounding decides no token.
        for model in (ours, peer):
            louder = [model.decoder.blocks, model.qformer.blocks] if model is ours else [
                model.language_model.model.decoder.layers, model.qformer.encoder.layer
            ]  # fmt: skip
            for parameter in (
                p for part in louder for name, p in part.named_parameters() if "norm" not in name.lower()
            ):
                parameter.mul_(3)
    prepack_weights(ours)
    torch.set_float32_matmul_precision("highest")
    for rows in (1, 8):
        full = captions(rows)
        begin = full.tokens[:, :1]
        prompts = CaptionBatch(begin, begin > 0, begin < 0, pixels=full.pixels)
        ids = torch.cat((torch.full((rows, QUERIES), IMAGE), begin), 1)
        pixels = cast(Tensor, full.pixels)[:, 0]

        def mine(prompts: CaptionBatch = prompts) -> list[list[int]]:
            found = generate(ours, prompts, eos_id=BEGIN, max_new_tokens=NEW, min_new_tokens=NEW, num_beams=BEAMS)
            return [texts[0].tokens for texts in found]

        def theirs(pixels: Tensor = pixels, ids: Tensor = ids) -> list[list[int]]:
            with torch.inference_mode():
                out = peer.generate(pixels, ids, torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW,
                                    num_beams=BEAMS)  # fmt: skip
            return out[:, -NEW:].tolist()

        line = f"{BEAMS} beams, {NEW} tokens, pictures: {rows}"
        if args.only in line:
            print(f"{line}: {'the same ids' if mine() == theirs() else 'OTHER IDS'}")
            compare(f"{line}, fp32, prepacked", mine, theirs, target=2.0, pairs=args.pairs, unit=(rows * NEW, "tokens"))


# --------------------------------------------------------------------------------------------------------- stage 1


@contextmanager
def padding_computed() -> Iterator[None]:
    """LAVIS computes padding as it does tokens."""
    real_places = qformer_module.real_places
    qformer_module.real_places = lambda attention_mask: None
    try:
        yield
    finally:
        qformer_module.real_places = real_places


@padding_computed()
def by_lavis(model: Blip2QFormer, visual: Tensor, batch: CaptionBatch) -> Tensor:
    """The three losses by LAVIS's passes: matching projects and reads all pictures again, three times."""
    qformer, tokens, attention_mask = model.qformer, batch.tokens, batch.attention_mask
    seen = qformer.encode_queries(visual)
    images, words = model.project_queries(seen.queries), model.encode_text(tokens, attention_mask)
    similarity = (images @ words.T).amax(1) / model.temperature
    goal = torch.arange(ROWS)
    itc = (F.cross_entropy(similarity, goal, label_smoothing=0.1)
           + F.cross_entropy(similarity.T, goal, label_smoothing=0.1)) / 2  # fmt: skip
    own = torch.eye(ROWS, dtype=torch.bool)
    weights = similarity.detach().masked_fill(own, -1e4).softmax(1)
    other_texts = torch.multinomial(weights, 1)[:, 0]
    other_images = torch.multinomial(similarity.detach().T.masked_fill(own, -1e4).softmax(1), 1)[:, 0]
    rows = torch.cat((visual, visual[other_images], visual))
    queries, _ = qformer.encode_pair(rows, torch.cat((tokens, tokens, tokens[other_texts])),
                              torch.cat((attention_mask, attention_mask, attention_mask[other_texts])))  # fmt: skip
    logits = model.itm_head(queries).mean(1)
    itm = F.cross_entropy(logits, torch.cat((torch.ones(ROWS), torch.zeros(2 * ROWS))).long())
    said = model.head(qformer.encode_text(tokens, attention_mask, seen)[:, :-1])
    labels = tokens.masked_fill(~batch.loss_mask, -100)[:, 1:]
    return itc + itm + F.cross_entropy(said.flatten(0, 1), labels.flatten(), label_smoothing=0.1)


def bench_stage1(args: Any) -> None:
    """Bert's vocabulary, the published sizes; visual tokens come from a cache, as a frozen tower's may."""
    if not any(args.only in f"stage 1, {name}" for name in DTYPES):
        return
    model = Blip2QFormer(ViT(224, 14, 1408, 1, 16), QFormer(vocab_size=30_523, dropout=0.0), freeze_vision=True).train()
    tokens = torch.randint(1, 30_000, (ROWS, TEXT))
    attention_mask = torch.arange(TEXT) < torch.linspace(9, TEXT, ROWS).round().long()[:, None]
    loss_mask = attention_mask & (torch.arange(TEXT) > 0)
    batch = CaptionBatch(tokens, attention_mask, loss_mask, visual_tokens=torch.randn(ROWS, 1, 257, 1408))
    visual = cast(Tensor, batch.visual_tokens)[:, 0]
    adamw = optimizer(model, fused=True)  # Of both sides, which train the same weights.
    for name, dtype in DTYPES.items():
        if args.only in f"stage 1, {name}":
            own = training(lambda: model(batch, label_smoothing=0.1, itc_smoothing=0.1).loss, adamw, dtype)
            other = training(lambda: by_lavis(model, visual, batch), adamw, dtype)
            with weights_kept(model):
                compare(f"stage 1, {name}", own, other, target=1.3, pairs=args.pairs, unit=(ROWS, "pairs"))


def main() -> None:
    args = start(__doc__ or "")
    # A part is built only where one of its lines is asked for.
    if any(args.only in f"Q-Former, queries{and_text}, {how}, {name}, dropout 0.1" for and_text in ("", " and text")
           for how in ("forward", "training") for name in DTYPES):  # fmt: skip
        for dropout in (0.0, 0.1):
            bench_qformer(args, dropout)
    bench_stage1(args)
    trains = any(
        args.only in f"stage 2, {name}{kind}{how}"
        for name in DTYPES
        for kind in ("", ", cached features")
        for how in ("", FROZEN_HALF, SAME)
    )
    writes = any(args.only in f"{BEAMS} beams, {NEW} tokens, pictures: {rows}, fp32, prepacked" for rows in (1, 8))
    if trains or writes:
        ours, peer = stage2()
        if trains:
            bench_stage2(args, ours, peer)
        if writes:
            bench_generate(args, ours, peer)


if __name__ == "__main__":
    main()
