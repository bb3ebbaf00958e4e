"""The shape of the house: modules import only from lower floors, and files stay short, portable and lazy."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mmtransformer"

# One line a floor; a name is a module or a folder of the package.
FLOORS = {
    1: "attention masks images tokenizer tokenizer_files outside spelling metrics batch",
    2: "next_token processes language positions blocks qformer_block linear_attention record prepack pretrained lora",
    3: "vit decoder hub hub_seq2seq vocabulary encoder seq2seq resampler qformer",
    4: "captioner soft_prompt soft_source objectives hard_pairs media",
    5: "encoder_decoder flamingo image_text blip2 prefix coca search generate captured decoding prompts weights",
    6: "data training pictures pipeline translator classifier few_shot",
    7: "cli",
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names.split()}

# The only imports that stay on a floor (files of one folder may always import each other): who -> whom.
SAME_FLOOR = {
    "tokenizer": {"spelling", "tokenizer_files"},
    "tokenizer_files": {"outside"},
    "prepack": {"blocks"},
    "qformer_block": {"blocks"},
    "seq2seq": {"decoder"},
    "hub_seq2seq": {"seq2seq"},
    "generate": {"search"},
    "captured": {"search"},
    "decoding": {"generate", "search", "prompts"},
    "hard_pairs": {"objectives"},
    "media": {"captioner"},
    "weights": {"flamingo", "blip2", "image_text"},
    "soft_prompt": {"captioner"},
    "soft_source": {"captioner"},
    "translator": {"data", "pipeline"},
    "classifier": {"pipeline"},
    "training": {"data", "pictures", "translator", "classifier", "pipeline", "few_shot"},
    "few_shot": {"data"},
}

# Libraries that only some floors may import, anywhere in a file.
LIBRARY_FLOORS = {"lightning": {6, 7}, "pytorch_lightning": set(), "jsonargparse": {7}}

# What `import mmtransformer`, and any module of floors 1-5, must not pull in: slow to import, or optional.
LAZY = (
    "lightning",
    "matplotlib",
    "transformers",
    "peft",
    "pyarrow",
    "timm",
    "pandas",
    "pycocoevalcap",
    "jsonargparse",
)

MAX_LINES = 400


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def name_of(path: Path) -> str:
    """The name in the floor table: mmtransformer/data/scenes.py -> data."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, *, when_loaded: bool = False) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of what a file imports; `when_loaded` leaves out the imports inside functions."""
    package = ["mmtransformer", *path.relative_to(PACKAGE).parts[:-1]]
    nodes: list[ast.AST] = [ast.parse(path.read_text("utf-8"), filename=str(path))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join(above + ([node.module] if node.module else []))
            for alias in node.names:  # from mmtransformer import masks: a module, not a name in one
                is_module = (
                    base == "mmtransformer" or (PACKAGE.parent / base.replace(".", "/") / alias.name).exists()
                )
                is_module |= (PACKAGE.parent / base.replace(".", "/") / f"{alias.name}.py").exists()
                yield node.lineno, f"{base}.{alias.name}" if is_module else base
        elif not (when_loaded and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))):
            nodes += ast.iter_child_nodes(node)


def faults(path: Path) -> list[str]:
    """What is wrong with a file's imports, one line each."""
    who, where = name_of(path), path.relative_to(ROOT)
    if who not in FLOOR:
        return [f"{where}: {who} is on no floor yet; add it to FLOORS in {Path(__file__).name}"]
    found = []
    for line, imported in imports(path):
        library, _, rest = imported.partition(".")
        if library in LIBRARY_FLOORS and FLOOR[who] not in LIBRARY_FLOORS[library]:
            allowed = sorted(LIBRARY_FLOORS[library]) or "none"
            found.append(
                f"{where}:{line}: {library} may be imported on floors {allowed}, not on {FLOOR[who]}"
            )
        if library != "mmtransformer":
            continue
        whom = rest.partition(".")[0]
        if not whom and FLOOR[who] == max(FLOORS):  # the command line asks the package for its version
            continue
        if whom not in FLOOR:
            what = f"{whom} is on no floor" if whom else "import from the module that defines the name"
            found.append(f"{where}:{line}: {imported}: {what}")
        elif FLOOR[whom] > FLOOR[who]:
            found.append(f"{where}:{line}: {who} (floor {FLOOR[who]}) imports {whom} (floor {FLOOR[whom]})")
        elif FLOOR[whom] == FLOOR[who] and whom != who and whom not in SAME_FLOOR.get(who, ()):
            found.append(
                f"{where}:{line}: {who} imports {whom}, which stands on the same floor ({FLOOR[who]})"
            )
    return found


def test_modules_import_only_from_lower_floors() -> None:
    found = [fault for path in modules() for fault in faults(path)]
    assert not found, "\n".join(found)


def test_no_two_files_import_each_other() -> None:
    """Within a folder too: what a file imports when it is loaded must not lead back to it."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in modules()}
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    edges = {
        name: {i for _, i in imports(path, when_loaded=True) if i in files} for name, path in files.items()
    }
    while free := [name for name, below in edges.items() if not below & edges.keys()]:
        edges = {name: below for name, below in edges.items() if name not in free}
    cycles = "\n".join(
        f"{name} -> {', '.join(sorted(below & edges.keys()))}" for name, below in edges.items()
    )
    assert not edges, f"these files import each other, or files that do:\n{cycles}"


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("from mmtransformer.vit import ViT", "blocks (floor 2) imports vit (floor 3)"),
        (
            "def f():\n    from . import captioner",
            "blocks.py:2: blocks (floor 2) imports captioner (floor 4)",
        ),
        ("import mmtransformer.record", "blocks imports record, which stands on the same floor (2)"),
        ("import lightning.pytorch as pl", "lightning may be imported on floors [6, 7], not on 2"),
        ("from mmtransformer import ViT", "ViT is on no floor"),
    ],
)
def test_a_fault_is_found(source: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "mmtransformer"
    package.mkdir()
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(globals(), "PACKAGE", package)
    for name in ("blocks", "novelty"):
        (package / f"{name}.py").write_text(source, "utf-8")
    assert fault in "\n".join(faults(package / "blocks.py"))
    assert "novelty is on no floor yet" in faults(package / "novelty.py")[0]


@pytest.mark.parametrize("floors", [0, 5], ids=["the package", "every module of floors 1-5"])
def test_import_is_lazy(floors: int) -> None:
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules()]
    names = ["mmtransformer", *(n for n in names if FLOOR.get(n.split(".")[1], 8) <= floors)]
    script = f"import sys, importlib\nfor name in {names}: importlib.import_module(name)\n" + (
        f"print(*sorted(set({LAZY}) & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [], f"import {names[-1]}, or one before it, also imports {done.stdout}"


def test_files_stay_short() -> None:
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in modules()}
    long = [f"{path.relative_to(ROOT)}: {n} lines" for path, n in lengths.items() if n > MAX_LINES]
    assert not long, f"files of more than {MAX_LINES} lines: {', '.join(long)}"


# Written so that no pattern matches itself.
NOT_PORTABLE = {
    "a package registry's host or a download address": r"py[p]i\.|python[h]osted|/sim[p]le/|https?://\S+\.wh[l]",
    "a path of one machine": r"(?<![\w.])/(?:work|root|home|opt)/|\.\./shar[e]d",
}


def test_nothing_depends_on_one_machine() -> None:
    found = []
    for path in text_files():
        text = path.read_text("utf-8")
        for what, pattern in NOT_PORTABLE.items():
            lines = (text[: match.start()].count("\n") + 1 for match in re.finditer(pattern, text))
            found += [f"{path.relative_to(ROOT)}:{line}: {what}" for line in lines]
    assert not found, "\n".join(found)


def text_files() -> Iterator[Path]:
    """The repository's own text files, without asking git (a source archive has none)."""
    yield from (p for p in ROOT.iterdir() if p.is_file() and not p.name.startswith(".git"))
    endings = {".py", ".yaml", ".md", ".txt", ".json", ".csv", ".html", ".css", ""}
    for folder in ("mmtransformer", "recipes", "tests", ".ci", "assets"):
        paths = (path for path in (ROOT / folder).rglob("*") if path.suffix in endings and path.is_file())
        yield from (path for path in paths if "__pycache__" not in path.parts)
