"""The benchmarks' own machinery: what is counted, what is kept, and that the GPU's script still runs (on a CPU)."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

HERE = Path(__file__).parent / "benchmarks"
sys.path.insert(0, str(HERE))

import bench_gpu  # noqa: E402  # pyright: ignore[reportMissingImports]
import harness  # noqa: E402  # pyright: ignore[reportMissingImports]
import run  # noqa: E402  # pyright: ignore[reportMissingImports]
from work import Rates, Work, work_of  # noqa: E402  # pyright: ignore[reportMissingImports]

from mmtransformer.layers.kernels import Bfloat16Hardware, emulated  # noqa: E402
from mmtransformer.layers.weight_prepacking import prepack_weights  # noqa: E402


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24))


def test_products_are_counted_by_number_format_packed_or_not() -> None:
    x, asked = torch.randn(5, 24), 2.0 * 5 * 24 * 40 * 2
    slow = emulated(x.bfloat16())  # A CPU without kernels for bfloat16 prepacks and multiplies in float32.
    with torch.inference_mode():
        for model, rows, kind, size in (
            (network(), x, "fp32", 4),
            (network().bfloat16(), x.bfloat16(), "bf16", 2),
            (prepack_weights(network()), x, "fp32", 4),
            (prepack_weights(network().bfloat16()), x.bfloat16(), *(("fp32", 4) if slow else ("bf16", 2))),
            (prepack_weights(network(), int8=True), x, "int8", 1),
        ):
            model(rows)  # prepacks
            found = work_of(lambda model=model, rows=rows: [model(rows), model(rows)])
            assert found == Work({kind: 2 * asked}, 2 * 2 * 24 * 40 * size, 2 * 24 * 40 * size)
    q = torch.randn(1, 2, 7, 8)
    assert work_of(lambda: nn.functional.scaled_dot_product_attention(q, q, q)).flops == {"fp32": 4.0 * 2 * 7 * 7 * 8}


def test_the_limit_is_the_larger_of_products_and_reading() -> None:
    rates = Rates({"fp32": 100.0, "bf16": 200.0}, 10.0, 50.0)
    assert rates.limit(Work({"fp32": 300.0, "bf16": 200.0}, 20.0, 60.0)) == (4.0, "GEMM")
    assert rates.limit(Work({"fp32": 100.0}, 80.0, 60.0)) == (8.0, "reading")
    assert rates.limit(Work({"fp32": 100.0}, 80.0, 40.0)) == (1.0, "GEMM")  # the weights lie in the cache


def test_a_line_in_bfloat16_is_left_out_where_that_is_emulated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "bfloat16_hardware", lambda device: Bfloat16Hardware(fast=False, words="none"))
    never = lambda: pytest.fail("computed")  # noqa: E731
    assert harness.compare("train Ti/16 bf16, batch 32", never, never) == 0.0
    assert capsys.readouterr().out == "train Ti/16 bf16, batch 32: left out, as the CPU has none\n"


def test_a_line_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BENCH_RECORD", str(tmp_path / "lines"))
    monkeypatch.setattr(harness, "_MEASURED", [Rates({"fp32": 1e9, "medium": 1e9}, 1e9, 0.0)])
    a = torch.randn(64, 64)
    harness.compare("some line", lambda: a @ a, lambda: [a @ a for _ in range(50)], target=1.5, pairs=3)
    harness.note("some other", 2.5, "s")
    first, second = map(json.loads, (tmp_path / "lines").read_text().splitlines())
    assert (first["line"], first["target"], first["bound"]) == ("some line", 1.5, "GEMM")
    assert first["ratio"] > 1
    assert first["share"] > 0
    assert second == {"line": "some other", "value": 2.5, "unit": "s", "target": None, "share": None}
    assert "of GEMM" in capsys.readouterr().out


def fake_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three benchmarks: one that records, one that fails, one that is no part of --quick."""
    (folder / "good.py").write_text(
        "import json, os, sys\n"
        "with open(os.environ['BENCH_RECORD'], 'a') as file:\n"
        "    for line in ({'rates': {'fp32': 90.0}, 'read': 20.0, 'threads': 1},\n"
        "                 {'line': ' '.join(sys.argv[1:]), 'ratio': 1.23456, 'target': 1.3, 'share': 0.5,"
        " 'bound': 'GEMM'}):\n"
        "        file.write(json.dumps(line) + chr(10))\n"
    )
    (folder / "bad.py").write_text("raise SystemExit(3)\n")
    monkeypatch.setattr(run, "HERE", folder)
    parts = {"a": ("good.py", "--pairs 5", "--only two_words"), "b": ("bad.py", "", ""), "c": ("good.py", "", None)}
    monkeypatch.setattr(run, "PARTS", parts)
    return folder / "results"


def test_parts_are_kept_and_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    results = fake_parts(tmp_path, monkeypatch)
    where = ["--results", str(results)]
    assert run.main(["--quick", *where]) == 1  # b fails
    (path,) = results.glob("*.json")
    assert (results / "README.md").read_text().startswith("# What each kind of CPU gives")
    kept: dict[str, Any] = json.loads(path.read_text())
    assert list(kept["parts"]) == ["a"]
    assert kept["parts"]["a"]["quick"] is True
    assert kept["parts"]["a"]["lines"][0] == {
        "line": "--threads 1 --only two words", "ratio": 1.235, "target": 1.3, "share": 0.5, "bound": "GEMM"
    }  # fmt: skip
    assert "failed: b" in capfd.readouterr().out
    assert run.main(["--quick", "--only", "a", *where]) == 0
    assert "--again measures anew" in capfd.readouterr().out
    assert run.main(["--only", "a", *where]) == 0  # a whole run replaces the quick one
    assert run.main(["--only", "c", *where]) == 0
    kept = json.loads(path.read_text())
    assert {name: part["quick"] for name, part in kept["parts"].items()} == {"a": False, "c": False}
    assert run.main(["--table", *where]) == 0
    table = capfd.readouterr().out
    assert "| a | --threads 1 --pairs 5 | 1.3 | 1.24 missed | 50 % GEMM |" in table


def test_the_kept_table_is_that_of_the_kept_files() -> None:
    assert (run.RESULTS / "README.md").read_text() == run.page(run.RESULTS) + "\n"  # --table writes it anew


def test_kinds_of_cpus_are_told_apart() -> None:
    lines = "cpu family\t: {}\nmodel\t\t: {}\nmodel name\t: AMD EPYC\n"
    assert run.cpu_kind(lines.format(25, 17)) == "AMD-EPYC-25-17-Zen-4"
    assert run.cpu_kind(lines.format(25, 1)) == "AMD-EPYC-25-1-Zen-3"
    assert run.cpu_kind(lines.format(26, 2)) == "AMD-EPYC-26-2-Zen-5"
    assert run.cpu_kind("cpu family\t: 6\nmodel\t\t: 143\nmodel name\t: Intel(R) Xeon(R)\n") == "Intel-R-Xeon-R-6-143"
    assert run.cpu_kind("")


def test_every_part_of_the_bench_is_a_file_whose_options_there_are() -> None:
    for file, whole, quick in run.PARTS.values():
        text = (HERE / file).read_text()
        for word in f"{whole} {quick or ''}".split():
            if word.startswith("--"):
                assert word in (HERE / "harness.py").read_text() or f"{word.removeprefix('--')}=" in text, (file, word)


# -------------------------------------------------------------------------------------------------- the GPU's script


@pytest.mark.parametrize("part", ["mfu ViT-L", "mfu BLIP-2 stage 2"])
def test_the_gpus_parts_run_small_on_a_cpu(part: str) -> None:
    found = bench_gpu.run_here(part, True, None)
    assert found["pictures_per_s"] > 0
    assert found["mfu_of_measured_product"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("part", ["captioning", "decode 1", "recipe vit_classify", "whole caption_scenes"])
def test_the_gpus_long_parts_run_small_on_a_cpu(part: str) -> None:
    assert "failed" not in bench_gpu.run_here(part, True, None)


def test_every_gpu_part_is_known_and_failures_are_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {part.partition(" ")[0] for part in bench_gpu.names()} == set(bench_gpu.PARTS)
    ran: list[str] = []

    def apart(part: str, words: list[str], limit: float = 0) -> dict[str, Any]:
        ran.append(part)
        return {"failed": "no room"} if part == "two" else {"unfinished": part == "three" and ran.count(part) == 1}

    monkeypatch.setattr(bench_gpu, "run_apart", apart)
    monkeypatch.setattr(bench_gpu, "names", lambda: ["one", "two", "three"])
    words = ["--tiny", "--results", str(tmp_path)]
    assert bench_gpu.main(words) == 1
    assert bench_gpu.main(words) == 0  # "two" has its line; "three" goes on
    assert ran == ["one", "two", "three", "three"]
    assert bench_gpu.main([*words, "--again"]) == 1
    assert ran[4:] == ["two"]
    assert bench_gpu.main([*words, "--again", "--only", "one", "--minutes", "-1"]) == 0
    assert "stopped before one" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "gpu-tiny-cpu.jsonl").read_text().splitlines()]
    assert [line["part"] for line in lines] == ran
    assert lines[1]["failed"] == "no room"


def test_a_part_that_raises_or_takes_too_long_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 1, stderr="Traceback ...\nRuntimeError: it needs the data\n")
    monkeypatch.setattr(bench_gpu.subprocess, "run", lambda *a, **k: done)
    assert bench_gpu.run_apart("whole x", [])["failed"] == "RuntimeError: it needs the data"

    def late(*args: Any, **kwargs: Any) -> None:
        raise subprocess.TimeoutExpired("x", kwargs["timeout"])

    monkeypatch.setattr(bench_gpu.subprocess, "run", late)
    assert bench_gpu.run_apart("whole x", [], 3) == {"failed": "not done after 3 s"}
