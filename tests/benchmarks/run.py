"""`make bench`: every benchmark, part by part, and the table of what this kind of CPU gives.

    python tests/benchmarks/run.py                # all parts, an hour or two; parts that are there are not run again
    python tests/benchmarks/run.py --quick        # a line or two of each, within 12 minutes on a quiet machine
    python tests/benchmarks/run.py --only lm      # parts whose name has this in it
    python tests/benchmarks/run.py --table        # the table of all CPU kinds measured, as Markdown

Results lie in results/CPU.json, one file a kind of CPU, with the lines of each part, the machine's rates in the same
run and how busy it was; results/README.md is the table of all. A part that is stopped is run again; --again runs all.
Lines of a whole run are not replaced by those of a quick one, but the other way round.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PARTS: dict[str, tuple[str, str, str | None]] = {
    "vit": ("bench_vit.py", "--pairs 5", "--pairs 2 --only inference"),
    "captioner": ("bench_captioner.py", "--pairs 3", "--pairs 2 --only folded,_bf16"),
    "generate fp32": ("bench_generate.py", "--pairs 5", "--pairs 2 --only beams"),
    "generate bf16": ("bench_generate.py", "--pairs 3 --weights bf16", None),
    "generate int8": ("bench_generate.py", "--pairs 3 --weights int8", None),
    "lm fp32": ("bench_lm.py", "--pairs 5", "--pairs 2"),
    "lm bf16": ("bench_lm.py", "--pairs 5 --weights bf16", "--pairs 2 --weights bf16 --only rows:_8"),
    "lm bf16 beside bf16": ("bench_lm.py", "--pairs 5 --weights bf16 --peer bf16", None),
    "lm int8": ("bench_lm.py", "--pairs 5 --weights int8", None),
    "qformer": ("bench_qformer.py", "--pairs 3", "--pairs 2 --only forward"),
    "flamingo": ("bench_flamingo.py", "--pairs 3", "--pairs 2 --only 1_beams"),
    "public": ("bench_public.py", "--pairs 3", None),
    "public auto": ("bench_public.py", "--pairs 3 --weights auto", None),
    "families": ("bench_families.py", "--pairs 2", None),
    "tuning": ("bench_tuning.py", "--pairs 3", None),
    "towers": ("bench_towers.py", "--pairs 3", None),
    "contrast": ("bench_contrast.py", "--pairs 3", None),
    "draw": ("bench_draw.py", "--pairs 3", None),
    "search": ("bench_search.py", "--pairs 3 --count 300", None),
    "pictures": ("bench_loading.py", "--pairs 7 --only pictures", "--pairs 5 --only pictures"),
    "loading": ("bench_loading.py", "--pairs 5 --only loading --images 512",
                "--pairs 3 --only 1_workers --images 128"),
    "scale": ("bench_scale.py", "--pairs 3", None),
    "manifest": ("bench_loading.py", "--only start --manifest 200000", None),
}  # fmt: skip
"""Of each part the file, its arguments, and those of --quick; None = not in it. "_" stands for a space in a name."""


def main(argv: list[str] | None = None) -> int:
    """Runs what is asked for; 1 if a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--again", action="store_true", help="run parts again that are there")
    parser.add_argument("--only", default="", help="the parts whose name has this in it")
    parser.add_argument("--table", action="store_true", help="write and print the table of all CPU kinds; run nothing")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if args.table:
        (args.results / "README.md").write_text(found := page(args.results) + "\n")
        print(found, end="")
        return 0
    args.results.mkdir(exist_ok=True)
    path = args.results / f"{cpu_kind()}.json"
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"cpu": cpu_kind(), "parts": {}}
    failed = []
    for name, (file, whole, quick) in PARTS.items():
        options = quick if args.quick else whole
        there = kept["parts"].get(name)
        if args.only not in name or options is None:
            continue
        if there and not args.again and (args.quick or not there["quick"]):
            print(f"{name}: measured {there['date']}; --again measures anew")
            continue
        found = run_part(file, options, args.threads)
        if found is None:
            failed.append(name)
            continue
        kept["parts"][name] = {"quick": args.quick, **found}
        path.write_text(json.dumps(kept, indent=1) + "\n")
        (args.results / "README.md").write_text(page(args.results) + "\n")
    print(table([kept]))
    print(f"\n{path}: kept" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def run_part(file: str, options: str, threads: int) -> dict[str, Any] | None:
    """One benchmark in a process of its own; None if it failed."""
    words = [word.replace("_", " ") if not word.startswith("-") else word for word in options.split()]
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "lines"
        command = [sys.executable, str(HERE / file), "--threads", str(threads), *words]
        begin = datetime.datetime.now()
        print(f"\n$ {' '.join([file, *words])}", flush=True)
        busy = os.getloadavg()[0]
        code = subprocess.run(command, env=os.environ | {"BENCH_RECORD": str(record)}, check=False).returncode
        lines = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    if code or not lines:
        print(f"{file} failed (exit code {code})", flush=True)
        return None
    rates, own = [line for line in lines if "rates" in line], [line for line in lines if "line" in line]
    return {
        "date": begin.strftime("%Y-%m-%d %H:%M"),
        "seconds": round((datetime.datetime.now() - begin).total_seconds()),
        "load": round(busy, 1),
        "rates": rates[0] if rates else None,
        "lines": [{key: _short(value) for key, value in line.items()} for line in own],
    }


def _short(value: object) -> object:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def cpu_kind(info: str | None = None) -> str:
    """The CPU's name, family and model (hypervisors often give no more of a name than "AMD EPYC"), as a file's name."""
    if info is None:
        path = Path("/proc/cpuinfo")
        info = path.read_text() if path.exists() else ""
    found = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+)$", info, re.MULTILINE))
    if not found:
        import platform

        return re.sub(r"\W+", "-", platform.processor() or platform.machine())
    name = f"{found.get('model name', 'CPU')} {found.get('cpu family', '')} {found.get('model', '')}"
    if "AMD" in name and found.get("cpu family") in ("25", "26"):
        model = int(found.get("model", "0"))
        # Family 25 is Zen 3 and Zen 4 (its models 16 to 31, 96 to 127 and 160 to 175), family 26 Zen 5.
        zen4 = 16 <= model < 32 or 96 <= model < 128 or 160 <= model < 176
        name += " Zen 5" if found["cpu family"] == "26" else " Zen 4" if zen4 else " Zen 3"
    return re.sub(r"\W+", "-", name).strip("-")


def page(results: Path) -> str:
    """results/README.md: the table of all kinds of CPU that have a file there."""
    kinds = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    return (
        "# What each kind of CPU gives\n\nOurs over the peer's speed, and the share of what the machine could do at "
        "most (see ../README.md).\nWritten by `make bench`; a line is missed where its ratio is below the target.\n\n"
        + table(kinds)
    )


def table(kinds: list[dict[str, Any]]) -> str:
    """Markdown: a row for each line, and of each CPU kind the ratio to the peer and the share of the limit."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for kind in kinds:
        for part, found in kind["parts"].items():
            for line in found["lines"]:
                rows.setdefault((part, line["line"]), {})[kind["cpu"]] = line
    names = [kind["cpu"] for kind in kinds]
    out = [f"| part | line | target | {' | '.join(f'{name}: ratio | share of the limit' for name in names)} |"]
    out.append("|---|---|---|" + "---|---|" * len(names))
    for (part, line), found in rows.items():
        target = next((one["target"] for one in found.values() if one.get("target")), None)
        cells = []
        for name in names:
            one = found.get(name)
            cells += ["", ""] if one is None else [_result(one), _share(one)]
        out.append(f"| {part} | {line} | {'' if target is None else f'{target:g}'} | {' | '.join(cells)} |")
    out.append("")
    for kind in kinds:
        for part, found in kind["parts"].items():
            if (rates := found["rates"]) is None:
                out.append(f"- {kind['cpu']}, {part}: {found['date']}, ratios of CPU time, copied from older tables")
                continue
            said = ", ".join(f"{name} {rate:.0f}" for name, rate in rates["rates"].items())
            out.append(
                f"- {kind['cpu']}, {part}: {found['date']}, {found['seconds']} s, load {found['load']} at its start, "
                f"{rates['threads']} thread{'s' * (rates['threads'] > 1)}{', quick' * found['quick']}; GFLOP/s {said}; "
                f"reading {rates['read']:.1f} GB/s"
            )
    return "\n".join(out)


def _result(line: dict[str, Any]) -> str:
    if "ratio" not in line:
        return f"{line['value']:.3g} {line['unit']}"
    missed = line["target"] is not None and line["ratio"] < line["target"]
    return f"{line['ratio']:.2f}{' missed' if missed else ''}"


def _share(line: dict[str, Any]) -> str:
    return "" if line.get("share") is None else f"{100 * line['share']:.0f} % {line.get('bound') or ''}".strip()


if __name__ == "__main__":
    sys.exit(main())
