"""`make bench-gpu`: all that waits for a GPU, in parts of at most 8 minutes, without network; results are appended.

    python tests/benchmarks/bench_gpu.py                 # every part that has no result yet
    python tests/benchmarks/bench_gpu.py --only decode   # parts whose name has this in it
    python tests/benchmarks/bench_gpu.py --minutes 20    # stop to begin parts after so long; a second call goes on
    python tests/benchmarks/bench_gpu.py --tiny          # the same code, small sizes, on a CPU: that it still runs

A part is a process of its own; what fails or takes too long is a line in the results too (results/gpu-NAME.jsonl), and
--again tries those. "whole" recipes are stopped after 7 minutes and go on at the next call. Parts:

- recipe NAME: every recipe under recipes/tiny.yaml, on the GPU.
- whole NAME: the two captioning recipes as they are (--flickr8k=FOLDER for the one that needs its data).
- mfu NAME: a ViT-L/16 training step and a BLIP-2 stage-2 step, in bfloat16, beside the rate of a large product.
- captioning: training steps of a ViT with a GPT-2-small-shaped decoder beside transformers, pictures a second.
- decode ROWS: greedy decoding with a CUDA graph beside transformers' generate, and the limit of reading weights.
- flex: FlexAttention beside SDPA on packed rows.
- memory NAME: what `mmt plan` says beside the peak of the steps.
"""

import argparse
import datetime
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECIPES = HERE.parents[1] / "recipes"
LIMIT, WHOLE = 480, "00:00:07:00"
RECIPES_WHOLE = ("caption_scenes", "caption_flickr8k")
Found = dict[str, Any]


def names() -> list[str]:
    """All parts, in order: what is short and says most comes first."""
    recipes = sorted(path.stem for path in RECIPES.glob("*.yaml") if path.stem != "tiny")
    return [
        *("mfu ViT-L", "mfu BLIP-2 stage 2", "captioning", "decode 1", "decode 8", "decode 64", "flex"),
        *(f"recipe {name}" for name in recipes),
        "memory caption_scenes",
        *(f"whole {name}" for name in RECIPES_WHOLE),
    ]


# ------------------------------------------------------------------------------------------------------- the parts


def seconds(run: Callable[[], object], device: Any, calls: int = 10) -> float:
    """Of the fastest call, the device waited for."""
    import torch

    found = []
    for _ in range(calls + 2):
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - begin)
    return min(found[2:])


def part_mfu(name: str, device: Any, tiny: bool) -> Found:
    """The share of the rate of a large product that a whole training step reaches."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from mmtransformer import Blip2, CaptionBatch, QFormer, TextDecoder, ViT
    from mmtransformer.training.callbacks.throughput import gemm_rate
    from mmtransformer.weights.shared.dtype import cast_frozen

    rows = 2 if tiny else 64
    if name == "ViT-L":
        model: Any = (ViT(32, 8, 32, 1, 2) if tiny else ViT(224, 16, 1024, 24, 16)).to(device)
        pixels = torch.randn(rows, 3, *[32 if tiny else 224] * 2, device=device)
        loss = lambda: model(pixels).float().square().mean()  # noqa: E731
    else:
        if tiny:
            parts = ViT(32, 8, 32, 1, 2), QFormer(4, 24, 1, 2, 32), TextDecoder(50, 16, 1, 2, max_len=64)
        else:
            parts = ViT(224, 14, 1024, 24, 16), QFormer(visual_dim=1024), TextDecoder(50_272, 2560, 32, 32, max_len=512)
        model = Blip2(*parts).to(device)
        if not tiny:
            cast_frozen(model.vision, "bfloat16"), cast_frozen(model.decoder, "bfloat16")
        tokens = torch.randint(1, 49 if tiny else 50_000, (rows, 12 if tiny else 32), device=device)
        yes = torch.ones_like(tokens, dtype=torch.bool)
        pixels = torch.randn(rows, 1, 3, *[32 if tiny else 224] * 2, device=device)
        batch = CaptionBatch(tokens, yes, yes, pixels=pixels)
        loss = lambda: model(batch).loss  # noqa: E731
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=fused or None)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with FlopCounterMode(display=False) as counter:
        step()
    took = seconds(step, device, 2 if tiny else 10)
    rate = gemm_rate(device, torch.bfloat16, 64 if tiny else 8192)
    return {"rows": rows, "ms": 1e3 * took, "pictures_per_s": rows / took, "goal": 0.6,
            "mfu_of_measured_product": counter.get_total_flops() / took / rate, "product_tflops": rate / 1e12,
            **memory(device)}  # fmt: skip


def memory(device: Any) -> Found:
    import torch

    return {"peak_gb": torch.cuda.max_memory_allocated(device) / 1e9} if device.type == "cuda" else {}


def captioner(tiny: bool) -> tuple[Any, Any, Any]:
    """Ours, the peer with the same weights, and a batch of captions."""
    import torch
    from peer import caption_batch, make_ours, make_peer

    torch.manual_seed(0)
    peer = make_peer(1 if tiny else 12)
    return make_ours(peer, folded=True), peer, caption_batch(2 if tiny else 64)


def part_captioning(name: str, device: Any, tiny: bool) -> Found:
    """Training steps beside transformers, both in bfloat16 and with fused AdamW."""
    import torch

    ours, peer, batch = captioner(tiny)
    ours, peer, batch = ours.train().to(device), peer.train().to(device), batch.to(device)
    labels = batch.tokens.masked_fill(~batch.loss_mask, -100)[:, 1:]

    def step(model: Any, loss: Callable[[], Any]) -> Callable[[], object]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type == "cuda" or None)

        def run() -> None:
            with torch.autocast(device.type, torch.bfloat16):
                value = loss()
            value.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return run

    def theirs() -> Any:
        logits = peer(pixel_values=batch.pixels[:, 0], decoder_input_ids=batch.tokens[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)

    calls, rows = 1 if tiny else 10, len(batch.tokens)
    mine = seconds(step(ours, lambda: ours(batch).loss), device, calls)
    other = seconds(step(peer, theirs), device, calls)
    return {"pictures_per_s": rows / mine, "transformers_pictures_per_s": rows / other, "ratio": other / mine,
            **memory(device)}  # fmt: skip


def part_decode(name: str, device: Any, tiny: bool) -> Found:
    """Greedy text of a captioner's language model, in bfloat16 on both sides."""
    import torch
    from bench_lm import VOCAB

    from mmtransformer import CaptionBatch, CudaGraphRunner, generate
    from mmtransformer.generation.cuda_graph import cuda_graph
    from mmtransformer.weights import from_transformers

    import transformers  # isort: skip

    rows, new = int(name), 4 if tiny else 64
    torch.manual_seed(0)
    peer: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1 if tiny else 12)).eval()
    peer.generation_config.eos_token_id = peer.generation_config.pad_token_id = VOCAB - 1
    ours: Any = from_transformers(peer).to(device, torch.bfloat16)
    peer = peer.to(device, torch.bfloat16)
    record = cuda_graph if device.type == "cuda" else lambda step: step
    graph = CudaGraphRunner(ours, record)
    tokens = torch.randint(0, VOCAB - 1, (rows, 16), device=device)
    yes = torch.ones_like(tokens, dtype=torch.bool)
    batch = CaptionBatch(tokens, yes, ~yes)
    asked: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new}

    def theirs() -> list[list[int]]:
        with torch.inference_mode():
            return peer.generate(tokens, attention_mask=yes.long(), do_sample=False, **asked)[:, 16:].tolist()

    def mine(model: Any = graph) -> list[list[int]]:
        return [texts[0].tokens for texts in generate(model, batch, eos_id=VOCAB - 1, **asked)]

    same = sum(a == b for a, b in zip(mine(), mine(ours), strict=True))
    calls = 1 if tiny else 5
    took, plain, other = (seconds(run, device, calls) for run in (mine, lambda: mine(ours), theirs))
    large = torch.empty(2**20 if tiny else 2**30, dtype=torch.bfloat16, device=device)
    read = large.nbytes / seconds(lambda: large.sum(), device, calls)
    weights = sum(p.nbytes for p in ours.parameters())
    return {"tokens_per_s": rows * new / took, "without_graph": rows * new / plain, "ratio": other / took, "goal": 3.0,
            "transformers_tokens_per_s": rows * new / other, "rows_with_the_same_ids_as_without_graph": same,
            "share_of_reading": new * weights / read / took, "read_gb_s": read / 1e9, **memory(device)}  # fmt: skip


def part_flex(name: str, device: Any, tiny: bool) -> Found:
    """Packed rows: several documents a row, that may not see each other; forward alone."""
    import torch

    from mmtransformer.layers import masks
    from mmtransformer.layers.attention import attend

    found: Found = {}
    for length in (64,) if tiny else (1024, 4096, 16384):
        q = torch.randn(1, 2 if tiny else 16, length, 16 if tiny else 64, device=device, dtype=torch.bfloat16)
        ids = (torch.arange(length, device=device) // (length // 8))[None]
        rule = masks.all_of(masks.causal(), masks.documents(ids))
        dense = masks.dense(rule, 1, length, length, device)
        block = masks.block(rule, 1, length, length, device)
        with torch.inference_mode():
            away = (attend(q, q, q, dense).float() - attend(q, q, q, block).float()).abs().max().item()
            sdpa, flex = (seconds(lambda mask=mask, q=q: attend(q, q, q, mask), device, 3) for mask in (dense, block))
        found[f"{length} keys"] = {"sdpa_ms": 1e3 * sdpa, "flex_ms": 1e3 * flex, "ratio": sdpa / flex, "away": away}
    return found


def fit(name: str, folder: Path, device: Any, words: list[str]) -> None:
    """`mmt fit` of a recipe, in this process."""
    from mmtransformer.cli import main as mmt

    where = "gpu" if device.type == "cuda" else "cpu"
    code = mmt(["fit", "--config", str(RECIPES / f"{name}.yaml"), *words, f"--trainer.accelerator={where}",
                f"--trainer.default_root_dir={folder}"])  # fmt: skip
    if code:
        raise RuntimeError(f"mmt fit ended with exit code {code}")


def part_recipe(name: str, device: Any, tiny: bool) -> Found:
    """The recipe under its tiny overlay."""
    sys.path.insert(0, str(HERE.parent))
    from support.recipes import arguments

    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        overlay = ["--config", str(RECIPES / "tiny.yaml"), *arguments(name, Path(folder))]
        fit(name, Path(folder) / "run", device, overlay)
        return {"s": time.perf_counter() - begin, **memory(device)}


def part_whole(name: str, device: Any, tiny: bool, flickr8k: str | None = None) -> Found:
    """The recipe as it is, seven minutes of it; the run goes on at the next call, and its metrics come with its end."""
    run = Path(tempfile.mkdtemp()) if tiny else HERE / "results" / "runs" / name
    words = ["--config", str(RECIPES / "tiny.yaml")] if tiny else ["--resume", f"--trainer.max_time={WHOLE}"]
    if name == "caption_flickr8k":
        if flickr8k is None:
            raise RuntimeError("it needs the data: --flickr8k=FOLDER")
        words.append(f"--data.source={flickr8k}")
    begin = time.perf_counter()
    fit(name, run, device, words)
    metrics = run / "metrics.json"
    found = json.loads(metrics.read_text()) if metrics.exists() else {}
    return {"s": time.perf_counter() - begin, "unfinished": not found, "metrics": found, **memory(device)}


def part_memory(name: str, device: Any, tiny: bool) -> Found:
    """What `mmt plan` says, and the peak of twenty steps."""
    import torch

    from mmtransformer.cli.plan import plan

    where = f"--trainer.accelerator={'gpu' if device.type == 'cuda' else 'cpu'}"
    words = ["--config", str(RECIPES / f"{name}.yaml"), where]
    overlay = ["--config", str(RECIPES / "tiny.yaml"), where] if tiny else []
    needs, _, _ = plan([*words, *overlay])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with tempfile.TemporaryDirectory() as folder:
        fit(name, Path(folder), device, [*overlay, "--trainer.max_steps=20", "--trainer.limit_val_batches=0"])
    return {"planned_gb": needs.memory / 1e9, **memory(device)}


PARTS: dict[str, Callable[..., Found]] = {
    "mfu": part_mfu,
    "captioning": part_captioning,
    "decode": part_decode,
    "flex": part_flex,
    "recipe": part_recipe,
    "memory": part_memory,
    "whole": part_whole,
}


# ------------------------------------------------------------------------------------------------------ the driver


def run_here(part: str, tiny: bool, flickr8k: str | None) -> Found:
    """One part in this process."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() and not tiny else "cpu")
    kind, _, name = part.partition(" ")
    more = {"flickr8k": flickr8k} if kind == "whole" else {}
    return PARTS[kind](name, device, tiny, **more)


def run_apart(part: str, words: list[str], limit: float = LIMIT) -> Found:
    """One part in a process of its own; whatever happens to it is a result."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, __file__, "--part", part, "--out", str(out), *words]
        begin = time.perf_counter()
        try:
            done = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {limit:.0f} s"}
        if out.exists():
            return json.loads(out.read_text())
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or [f"exit code {done.returncode}"]
        return {"failed": last[0][:300], "s": time.perf_counter() - begin}


def measured(path: Path) -> dict[str, Found]:
    """The last result of each part."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {line["part"]: line for line in map(json.loads, lines)}


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


def main(argv: list[str] | None = None) -> int:
    """Runs the parts that have no result yet; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--again", action="store_true", help="run parts again that failed, or all that --only names")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no part after so long")
    parser.add_argument("--tiny", action="store_true", help="small sizes, on a CPU")
    parser.add_argument("--flickr8k", help="Flickr8k's folder")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.part:
        args.out.write_text(json.dumps(run_here(args.part, args.tiny, args.flickr8k)))
        return 0
    device = "tiny-cpu" if args.tiny else device_name()
    if device == "none":
        print("no GPU here; --tiny runs the same code with small sizes on a CPU", file=sys.stderr)
        return 2
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / f"gpu-{re.sub(r'[^0-9A-Za-z]+', '-', device)}.jsonl"
    there, begin, failed = measured(path), time.monotonic(), 0
    words = ["--tiny"] * args.tiny + ([f"--flickr8k={args.flickr8k}"] if args.flickr8k else [])
    for part in names():
        old = there.get(part)
        done = old is not None and not old.get("unfinished") and not (args.again and (args.only or "failed" in old))
        if args.only not in part or done:
            continue
        if time.monotonic() - begin > 60 * args.minutes:
            print(f"stopped before {part}: call again to go on")
            break
        found = run_apart(part, words)
        failed += "failed" in found
        line = {"part": part, "device": device, "date": f"{datetime.datetime.now():%Y-%m-%d %H:%M}", **found}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
