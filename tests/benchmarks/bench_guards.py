"""What the guards cost in CPU time: a training step and the loading of a model beside ones without, in turns.

    python tests/benchmarks/bench_guards.py

Guarded is what `mmt fit` does: seeded batches, the gradient's global norm and check, the log, the meter, and the signal
watch (asked at every step; no checkpoint falls due). Bare is the same model, batches and optimizer in a plain
loop that scales the gradient and clips it, which any training does. A ViT-B (86 million numbers) is loaded with its
check sum and the look for NaN, and without both; the file is in the page cache.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from typing import Any

import lightning.pytorch as pl
import torch

from mmtransformer import TextDecoder, VisionEncoderDecoder, ViT
from mmtransformer.batch import CaptionBatch
from mmtransformer.serialization import pretrained
from mmtransformer.training.callbacks.saving import LastCheckpoint
from mmtransformer.training.callbacks.throughput import Throughput
from mmtransformer.training.engine.log import MetricsLog
from mmtransformer.training.engine.optim import OptimConfig, adamw
from mmtransformer.training.tasks.captioning import Captioning


def model() -> VisionEncoderDecoder:
    torch.manual_seed(3)
    vision = ViT(64, 8, 192, 4, 6, class_token=False, pool="mean")
    return VisionEncoderDecoder(vision, TextDecoder(640, 192, 3, 6, max_len=64, context_dim=192))


def batches(count: int, size: int) -> list[CaptionBatch]:
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(count):
        tokens = torch.randint(3, 640, (size, 48), generator=generator)
        attention_mask = torch.ones_like(tokens, dtype=torch.bool)
        pixels = torch.randn(size, 1, 3, 64, 64, generator=generator)
        found.append(CaptionBatch(tokens, attention_mask, attention_mask, pixels, names=tuple(map(str, range(size)))))
    return found


class Clock(pl.Callback):
    """CPU seconds of every step, with the bare steps done in between."""

    def __init__(self, bare: Any) -> None:
        self.bare, self.guarded, self.plain = bare, [], []
        self._began = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        began = time.process_time()
        self.bare(batch)
        self.plain.append(time.process_time() - began)


def loading(turns: int) -> tuple[float, float]:
    """Median CPU seconds of loading a model, without guards and with them."""
    guards = {name: getattr(pretrained, name) for name in ("refuse_damaged", "refuse_nan")}
    plain, guarded = list[float](), list[float]()
    with tempfile.TemporaryDirectory() as folder:
        ViT(224, 16, 768, 12, 12).save_pretrained(folder)
        for turn in range(2 * turns + 2):
            for name, guard in guards.items():
                setattr(pretrained, name, guard if turn % 2 else lambda *_: None)
            began = time.process_time()
            ViT.from_pretrained(folder)
            if turn > 1:
                (guarded if turn % 2 else plain).append(time.process_time() - began)
    return statistics.median(plain), statistics.median(guarded)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--turns", type=int, default=9, help="models loaded with guards, and as many without")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    bare = model().train()
    optimizer = adamw(bare, lr=1e-3)

    def plain(batch: CaptionBatch) -> None:
        loss = bare(batch).sums
        loss.sum.backward()
        grads = [p.grad for p in bare.parameters() if p.grad is not None]
        torch._foreach_mul_(grads, 1 / int(loss.count))
        torch.nn.utils.clip_grad_norm_(bare.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    clock = Clock(plain)

    class Timed(Captioning):
        """The guarded step, timed from the seed to the last callback."""

    ends: list[float] = []

    class First(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            clock.guarded.append(time.process_time())

    class Last(LastCheckpoint):
        def on_train_batch_end(self, *arguments: Any) -> None:
            super().on_train_batch_end(*arguments)
            ends.append(time.process_time())

    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu", logger=MetricsLog(folder), enable_model_summary=False, enable_progress_bar=False,
            default_root_dir=folder, max_steps=args.steps, gradient_clip_val=1.0, log_every_n_steps=20,
            callbacks=[clock, First(), Throughput(), Last(every_n_minutes=1e6)],
        )  # fmt: skip
        loader = torch.utils.data.DataLoader(batches(args.steps, args.size), batch_size=None)  # type: ignore[arg-type]
        trainer.fit(Timed(model(), optim=OptimConfig()), train_dataloaders=loader)
    guarded = [end - begin for begin, end in zip(clock.guarded, ends, strict=True)]
    skip = 5  # the counted batch, and the first ones
    pairs = list(zip(guarded[skip:], clock.plain[skip:], strict=True))
    share = statistics.median(a / b for a, b in pairs) - 1
    plain_ms, guarded_ms = (1e3 * statistics.median(values) for values in zip(*pairs, strict=True))
    print(f"a step of {args.size} pictures: bare {plain_ms:.1f} ms, guarded {guarded_ms:.1f} ms: {share:+.2%}")
    plain_s, guarded_s = loading(args.turns)
    print(
        f"a ViT-B loaded: bare {1e3 * plain_s:.0f} ms, guarded {1e3 * guarded_s:.0f} ms: {guarded_s / plain_s - 1:+.2%}"
    )


if __name__ == "__main__":
    main()
