"""What surrounds a public captioner, BLIP-base's shape with random weights against transformers: loading, memory, LoRA.

- load: from a folder of safetensors (0.99 GB in float32), CPU time, and the most memory that no file backs, above what
  there was before, each side in a process of its own, once and after a caption too (ours prepacks its weights with it).
- LoRA: a training step of `recipes/finetune_hub.yaml` (rank 16 beside queries and values of both towers, AdamW) in
  float32 on both sides; the peer is peft's, beside BLIP's fused queries, keys and values in the vision tower.

python tests/benchmarks/bench_tuning.py [--threads N] [--pairs N] [--only NAME] [--rows N] [--size base|small]
"""

import multiprocessing
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from bench_public import blip, ours_ids, peer_ids
from harness import compare, note, start
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import BlipForConditionalGeneration
from transformers.utils import logging

from mmtransformer import CaptionBatch, caption_loss
from mmtransformer.layers.weight_prepacking import for_inference
from mmtransformer.training.tasks.tuning import TuningConfig
from mmtransformer.weights import from_transformers, load_blip

WORDS = 16
END = 102


def private_bytes() -> int:
    """Of this process, what no file backs."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


class Peak(threading.Thread):
    """The most bytes that no file backs while it runs, above those at its start."""

    def __enter__(self) -> Self:
        self.first = self.most = private_bytes()
        self.done = threading.Event()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.join()

    def run(self) -> None:
        while not self.done.wait(0.002):
            self.most = max(self.most, private_bytes())


def peaks(ours: bool, folder: str, side: int, first: int, search: dict[str, Any], threads: int, answer: Any) -> None:
    """Bytes at the peak of loading, and of loading with one caption."""
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    pixels = torch.randn(1, 3, side, side)
    found = []
    with Peak() as peak:
        model: Any = load(ours, folder)
        found.append(peak.most - peak.first)
        if ours:
            ours_ids(for_inference(model), pixels, first, END, search)
        else:
            peer_ids(model, pixels, search)
    answer.put([*found, peak.most - peak.first])


def load(ours: bool, folder: str) -> nn.Module:
    return load_blip(folder) if ours else BlipForConditionalGeneration.from_pretrained(folder, dtype="float32")


def memory(size: int, *given: Any) -> None:
    """A line for each peak: ours and the peer's, in MB, beside the file's size."""
    # Freed memory goes back at once, so that what is held can be seen.
    os.environ |= {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    context, rows = multiprocessing.get_context("spawn"), []
    for ours in (True, False):
        answer = context.Queue()
        process = context.Process(target=peaks, args=(ours, *given, answer))
        process.start()
        rows.append(answer.get())
        process.join()
    for what, mine, theirs in zip(("loading", "loading and a caption"), *rows, strict=True):
        note(f"peak memory, {what}: ours", mine / 1e6, f"MB ({mine / size:.2f} of the file)")
        note(f"peak memory, {what}: the peer", theirs / 1e6, f"MB ({theirs / size:.2f} of the file)")


class Step:
    """One training step of either side, over what learns; both with torch's fused AdamW."""

    def __init__(self, model: nn.Module, loss: Callable[[], Tensor]) -> None:
        self.loss: Callable[[], Tensor] = loss
        self.learning = [p for p in model.parameters() if p.requires_grad]
        self.adamw = torch.optim.AdamW(self.learning, lr=2e-4, weight_decay=0.0, fused=True)

    def __call__(self) -> Tensor:
        loss = self.loss()
        loss.backward()
        nn.utils.clip_grad_norm_(self.learning, 1.0)
        self.adamw.step()
        self.adamw.zero_grad()
        return loss.detach()


def steps(peer: Any, ours: Any, rows: int, side: int, first: int) -> tuple[Step, Step]:
    """The same step of both: captions of 8 to 16 words."""
    TuningConfig(("vision", "decoder"), "lora").apply(ours)
    peer.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=16, lora_alpha=32, target_modules=["qkv", "query", "value"]), peer)
    tokens = torch.randint(1000, 30000, (rows, WORDS + 2))
    lengths = torch.linspace(WORDS // 2, WORDS, rows).long()[:, None]
    real = torch.arange(WORDS + 2) < lengths + 2
    tokens = tokens.masked_fill(~real, 0).scatter(1, lengths + 1, END)
    tokens[:, 0] = first
    pixels = torch.randn(rows, 3, side, side)
    batch = CaptionBatch(tokens, real, real & (torch.arange(WORDS + 2) > 0), pixels)
    labels = tokens.masked_fill(~real, -100)
    labels[:, 0] = -100

    def theirs() -> Tensor:
        return peer(pixel_values=pixels, input_ids=tokens, attention_mask=real.long(), labels=labels).loss

    ours.train()
    peer.train()
    return Step(ours, lambda: caption_loss(ours, batch)), Step(peer, theirs)


def main() -> None:
    args = start(__doc__ or "", rows=4, size=("base", "small"))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    peer, side, first, search = blip(args.size == "small")
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        size = (Path(folder) / "model.safetensors").stat().st_size
        if args.only in "load":
            name = f"load BLIP {args.size}, {size / 1e9:.2f} GB"
            compare(name, lambda: load(True, folder), lambda: load(False, folder), target=1.0, pairs=args.pairs)
        if args.only in "memory":
            memory(size, folder, side, first, search, args.threads)
    if args.only in "LoRA step":
        mine, them = steps(peer, from_transformers(peer), args.rows, side, first)
        print(f"losses: {mine.loss().item():.4f} and {them.loss().item():.4f}")
        name = f"LoRA step BLIP {args.size}, fp32, captions: {args.rows}"
        compare(name, mine, them, target=1.3, pairs=args.pairs, unit=(args.rows, "captions"))


if __name__ == "__main__":
    main()
