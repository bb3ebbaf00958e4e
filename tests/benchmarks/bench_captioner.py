"""Training steps of a captioner (ViT-Ti/16, GPT-2-small-shaped decoder, 50,257 words, 8 captions of 9 to 21 tokens)
against transformers' VisionEncoderDecoder with the same weights.

Ours runs as `mmt fit` runs it: fused AdamW, in float32 matrix products that compute in bfloat16 inside
(`set_float32_matmul_precision("medium")`), and freed memory kept by malloc (`keep_freed_memory`). The peer runs as it
comes, and in the lines "same ..." with these.
"same layers": the peer's projection between the towers is kept; "folded": it is multiplied into the cross-attention's
weights, so that this reads the vision tower's narrow tokens, as our captioners do. Needs 4 GB of memory.

In turns neither side is quite by itself: what malloc keeps is the process's. `--side ours` and `--side peer` time one
of them in a process of its own, ours as `mmt fit` sets malloc and the peer as it comes, and print CPU ms.

python tests/benchmarks/bench_captioner.py [--threads N] [--pairs N] [--only NAME] [--side both|ours|peer]
"""

from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import cast

import torch
from harness import compare, process_as, start, timed
from peer import caption_batch, make_ours, make_peer
from torch import Tensor, nn

from mmtransformer import CaptionBatch, Captioner, caption_loss, freeze
from mmtransformer.training.engine.precision import keep_freed_memory

Step = Callable[[], object]
SetUp = Callable[[bool], None]


def precision_only(mmt_fit: bool) -> None:
    """`process_as`, without malloc: that of a process of its own was said once."""
    torch.set_float32_matmul_precision("medium" if mmt_fit else "highest")


def optimizer(model: nn.Module, memory: Tensor, fused: bool) -> torch.optim.AdamW:
    """AdamW whose moments lie in `memory`, which both sides use in turn: it saves 1.3 GB and no time."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(parameters, lr=1e-5, fused=fused or None)
    begin = 0
    for p in parameters:
        first, second = memory[:, begin : begin + p.numel()]
        adamw.state[p] = {
            "step": torch.zeros(()), "exp_avg": first.view(p.shape), "exp_avg_sq": second.view(p.shape)
        }  # fmt: skip
        begin += p.numel()
    return adamw


def alone(name: str, step: Step) -> None:
    """Of seven steps after two the median of CPU time, printed."""
    seconds = [timed(step).cpu for _ in range(9)][2:]
    print(f"{name:<50} {1000 * median(seconds):.0f} ms CPU", flush=True)


def our_step(model: Captioner, batch: CaptionBatch, memory: Tensor, dtype: torch.dtype, set_up: SetUp) -> Step:
    adamw = optimizer(model, memory, fused=True)

    def step() -> Tensor:
        set_up(True)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = caption_loss(model, batch, reduction="sum")
        (loss.sum / loss.count).backward()
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return loss.sum

    return step


def peer_step(
    model: nn.Module, batch: CaptionBatch, memory: Tensor, dtype: torch.dtype, set_up: SetUp, *, same: bool
) -> Step:
    assert batch.pixels is not None
    adamw = optimizer(model, memory, fused=same)
    labels = batch.tokens.masked_fill(~batch.loss_mask, -100)[:, 1:]
    pixels, inputs = batch.pixels[:, 0], batch.tokens[:, :-1]

    def step() -> Tensor:
        set_up(same)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(pixel_values=pixels, decoder_input_ids=inputs).logits
            # The loss is the peer's own, without its second shift of labels that are shifted already.
            loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)
        loss.backward()
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return loss

    return step


def main() -> None:
    args = start(__doc__ or "", side=("both", "ours", "peer"))
    set_up = process_as if args.side == "both" else precision_only
    if args.side == "ours":
        keep_freed_memory()
    bf16, fp32 = torch.bfloat16, torch.float32
    peer = make_peer().train()
    full = caption_batch()
    memory = torch.zeros(2, sum(p.numel() for p in peer.parameters()))

    def line(
        name: str,
        dtype: torch.dtype,
        ours: Captioner,
        batch: CaptionBatch,
        target: float | None = None,
        same: bool = False,
    ) -> None:
        if args.only not in name:
            return
        mine = our_step(ours, batch, memory, dtype, set_up)
        them = peer_step(peer, full, memory, dtype, set_up, same=same)
        if args.side != "both":
            alone(f"{args.side}: {name}", mine if args.side == "ours" else them)
        else:
            compare(name, mine, them, target=target, pairs=args.pairs, unit=(len(batch.tokens), "captions"))
        memory.zero_()

    for form in ("same layers", "folded"):
        ours = make_ours(peer, folded=form == "folded").train()
        line(f"{form}, bf16", bf16, ours, full, 1.4)
        line(f"{form}, bf16, same optimizer", bf16, ours, full, same=True)
        line(f"{form}, fp32", fp32, ours, full, 1.8)
        line(f"{form}, fp32, same optimizer and precision", fp32, ours, full, same=True)
        freeze(ours.vision)
        with torch.no_grad():
            cached = replace(full, pixels=None, visual_tokens=ours.forward_features(cast(Tensor, full.pixels)))
        line(f"{form}, bf16, cached features", bf16, ours, cached, 3.0)
        line(f"{form}, fp32, cached features", fp32, ours, cached, 4.0)
        # As in the recipe: the captions of a picture share its features. The peer computes each row's picture.
        shared = replace(cached, visual_tokens=cast(Tensor, cached.visual_tokens)[:2].clone())
        line(f"{form}, bf16, cached, 4 captions a picture", bf16, ours, shared)
        line(f"{form}, fp32, cached, 4 captions a picture", fp32, ours, shared)


if __name__ == "__main__":
    main()
