"""Flamingo with a frozen GPT-2-small-shaped language model (gated blocks before all 12 layers, a resampler of 2 layers,
64 latents of width 768) against transformers' Idefics layers of the same sizes and with the same weights.

Training: 8 captions of 9 to 21 tokens, each with its picture's 197 visual tokens, as of a cache. Ours runs as the
recipes run it: fused AdamW, float32 products that compute in bfloat16 inside. The peer runs as it comes, and in the
lines "same ..." with these. Peak memory is measured in a process of its own for each side, above the weights.
Generating: 64 latents, the language model's cache on both sides; the ids must be the same.

python tests/benchmarks/bench_flamingo.py [--threads N] [--pairs N] [--only NAME]
"""

import multiprocessing
import os
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import cast

import torch
from bench_captioner import optimizer
from harness import compare, process_as, start, timed
from peer import VOCAB, caption_batch
from peer_flamingo import PATCHES, VISUAL, PeerFlamingo, ours_of
from torch import Tensor, nn

from mmtransformer import CaptionBatch, Flamingo, caption_loss, generate
from mmtransformer.layers.weight_prepacking import prepack_weights

NEW = 20


def features(rows: int = 8, captions: int = 1) -> CaptionBatch:
    """Random visual tokens and captions of random lengths; so many captions share a picture."""
    batch = caption_batch(rows)
    return replace(batch, pixels=None, visual_tokens=torch.randn(rows // captions, 1, PATCHES, VISUAL))


class Step:
    """One training step of either side."""

    def __init__(
        self, model: nn.Module, batch: CaptionBatch, memory: Tensor, dtype: torch.dtype, *, tuned: bool
    ) -> None:
        self.model, self.batch, self.dtype, self.tuned = model, batch, dtype, tuned
        self.adamw = optimizer(model, memory, fused=tuned)
        self.labels = batch.tokens.masked_fill(~batch.loss_mask, -100)[:, 1:]

    def loss(self) -> Tensor:
        if isinstance(self.model, Flamingo):
            loss = caption_loss(self.model, self.batch, reduction="sum")
            return loss.sum / loss.count
        tokens, visual = self.batch.tokens[:, :-1], cast(Tensor, self.batch.visual_tokens)[:, 0]
        logits = self.model(tokens, visual.repeat_interleave(len(tokens) // len(visual), 0))
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), self.labels.flatten(), ignore_index=-100)

    def __call__(self) -> Tensor:
        process_as(mmt_fit=self.tuned)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            loss = self.loss()
        loss.backward()
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return loss


def moments(model: nn.Module) -> Tensor:
    """Room for AdamW's two."""
    return torch.zeros(2, sum(p.numel() for p in model.parameters() if p.requires_grad))


def peak(ours: bool, dtype: torch.dtype, threads: int, answer: multiprocessing.Queue) -> None:
    """Puts the most bytes that a step holds beside weights and optimizer state into `answer`."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    peer = PeerFlamingo()
    model = ours_of(peer) if ours else peer
    step = Step(model, features(), moments(model), dtype, tuned=True)
    del peer
    step()  # Optimizer state and oneDNN's buffers come with the first.
    Path("/proc/self/clear_refs").write_text("5")  # Sets the high-water mark to what is held now.
    before = memory("VmRSS")
    step()
    answer.put(memory("VmHWM") - before)


def memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def print_memory(dtype: torch.dtype, threads: int) -> None:
    # Freed memory goes back at once, so that what is held can be seen.
    os.environ |= {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    sizes = []
    for ours in (True, False):
        context = multiprocessing.get_context("spawn")
        answer = context.Queue()
        process = context.Process(target=peak, args=(ours, dtype, threads, answer))
        process.start()
        sizes.append(answer.get() / 2**20)
        process.join()
    print(f"  peak memory of a step above what stays: {sizes[0]:.0f} MiB against {sizes[1]:.0f} MiB", flush=True)


def prompts(rows: int) -> CaptionBatch:
    batch = features(rows)
    yes = torch.ones(rows, 1, dtype=torch.bool)
    return CaptionBatch(batch.tokens[:, :1], yes, ~yes, visual_tokens=batch.visual_tokens)


def our_ids(model: Flamingo, batch: CaptionBatch, beams: int) -> list[list[int]]:
    found = generate(model, batch, eos_id=VOCAB - 1, max_new_tokens=NEW, min_new_tokens=NEW, num_beams=beams)
    return [texts[0].tokens for texts in found]


def token_cost(model: Flamingo, rows: int = 8) -> tuple[float, int]:
    """CPU milliseconds of a step of decoding, and how often it projected latents."""
    calls: list[float] = []
    counted: list[int] = []
    hooks = [b.attn.k_proj.register_forward_hook(lambda *_: counted.append(1)) for b in model.gated_blocks]
    with torch.inference_mode():
        logits, state = model.prefill(prompts(rows), max_new_tokens=NEW)
        counted.clear()
        calls = [timed(lambda: model.decode_step(logits.argmax(1), state)).cpu for _ in range(NEW - 1)]
    for hook in hooks:
        hook.remove()
    return 1e3 * median(calls), len(counted)


def main() -> None:
    args = start(__doc__ or "")
    peer = PeerFlamingo()
    ours = ours_of(peer)
    bf16, fp32 = torch.bfloat16, torch.float32
    room = moments(peer)
    for name, dtype, captions, tuned, target in (
        ("train, bf16", bf16, 1, False, 1.3),
        ("train, bf16, same optimizer", bf16, 1, True, None),
        ("train, fp32", fp32, 1, False, 1.3),
        ("train, fp32, same optimizer and precision", fp32, 1, True, None),
        ("train, bf16, 4 captions a picture", bf16, 4, False, None),
    ):
        if args.only in name:
            batch = features(captions=captions)
            mine = Step(ours, batch, room, dtype, tuned=True)
            them = Step(peer, batch, room, dtype, tuned=tuned)
            compare(name, mine, them, target=target, pairs=args.pairs, unit=(8, "captions"))
            del mine, them
    del room
    if args.only in "memory":
        for dtype in (bf16, fp32):
            print(f"{str(dtype).removeprefix('torch.')}:")
            print_memory(dtype, args.threads)
    torch.set_float32_matmul_precision("highest")
    del ours
    peer.eval()
    with torch.no_grad():  # Louder branches, so that rounding decides no token.
        for parameter in peer.lm.transformer.h.parameters():
            parameter.mul_(3)
    ours = prepack_weights(ours_of(peer).eval())
    for rows, beams in ((1, 1), (8, 1), (1, 5), (8, 5)):
        name, batch = f"generate, {beams} beams, pictures: {rows}", prompts(rows)
        if args.only in name:
            visual = cast(Tensor, batch.visual_tokens)[:, 0]
            same = our_ids(ours, batch, beams) == peer.generate(batch.tokens, visual, NEW, beams).tolist()
            print(f"{name}: {'the same ids' if same else 'OTHER IDS'}")
            compare(
                f"{name}, fp32, prepacked",
                lambda batch=batch, beams=beams: our_ids(ours, batch, beams),
                lambda batch=batch, visual=visual, beams=beams: peer.generate(batch.tokens, visual, NEW, beams),
                target=3.0,
                pairs=args.pairs,
                unit=(rows * NEW, "tokens"),
            )
    if args.only in "token cost":
        cost, projected = token_cost(ours)
        print(f"a step of 8 pictures: {cost:.1f} ms CPU, {projected} projections of latents")


if __name__ == "__main__":
    main()
