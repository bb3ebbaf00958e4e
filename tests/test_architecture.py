"""The architecture: files import only from packages before theirs, and files stay short, portable and lazy."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import packages
from support.packages import IMPORT_ORDER, PACKAGE, ROOT, file_of, imports, modules, package_of

# Libraries that only some packages may import, anywhere in a file.
LIGHTNING = ("data", "training", "cli")
ALLOWED_IN = {"lightning": LIGHTNING, "pytorch_lightning": (), "jsonargparse": ("cli",)}

# The one dynamic import of the library by a name that is not its own: a saved model's class, among the public names.
DYNAMIC = "serialization/pretrained.py"

# What `import mmtransformer`, and any module below plots, must not pull in: slow to import, or optional.
LAZY = ("lightning", "matplotlib", "transformers", "peft", "pyarrow", "timm", "pandas", "pycocoevalcap", "jsonargparse")

MAX_LINES, MAX_FILES = 400, 15


def faults(path: Path) -> list[str]:
    """What is wrong with a file's imports, one line each."""
    package, where = package_of(path), path.relative_to(ROOT)
    if package not in IMPORT_ORDER:
        return [f"{where}: {package} is no package yet; add it to IMPORT_ORDER in support/packages.py"]
    found = []
    for line, imported in imports(path):
        library, _, rest = imported.partition(".")
        if library in ALLOWED_IN and package.partition("/")[0] not in ALLOWED_IN[library]:
            allowed = ", ".join(ALLOWED_IN[library]) or "no package"
            found.append(f"{where}:{line}: {library} may be imported in {allowed}, not in {package}")
        if library != "mmtransformer" or (not rest and package == "cli"):  # mmt asks the package for its version
            continue
        whom = package_of(file_of(imported)) if rest else ""
        if path.name == "__init__.py" and whom.startswith(f"{package}/"):  # what a folder shows of what lies in it
            continue
        if whom not in IMPORT_ORDER:
            found.append(f"{where}:{line}: {imported}: import from the module that defines the name")
        elif IMPORT_ORDER.index(whom) > IMPORT_ORDER.index(package):
            found.append(f"{where}:{line}: {package} imports {whom}, which comes after it")
    return found


def test_modules_import_only_from_earlier_packages() -> None:
    found = [fault for path in modules() for fault in faults(path)]
    assert not found, "\n".join(found)


def test_what_is_imported_by_a_name_is_known() -> None:
    dynamic = [path for path in modules() if re.search(r"import_module\(", path.read_text("utf-8"))]
    names = {
        str(path.relative_to(PACKAGE)) for path in dynamic if package_of(path).partition("/")[0] not in ("cli", "lazy")
    }
    assert names == {DYNAMIC}


def test_no_folder_shows_a_function_with_the_name_of_one_of_its_files() -> None:
    found = []
    for init in [PACKAGE / "__init__.py", *PACKAGE.rglob("*/__init__.py")]:
        package = importlib.import_module(".".join(init.relative_to(ROOT).parent.parts))
        files = {path.stem for path in init.parent.iterdir() if path.suffix == ".py" or path.is_dir()}
        found += [f"{package.__name__}.{name}" for name in files & set(getattr(package, "__all__", ()))]
    assert not found, found


def test_no_two_files_import_each_other() -> None:
    """Within a folder too: what a file imports when it is loaded must not lead back to it."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in modules()}
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    edges = {name: {i for _, i in imports(path, when_loaded=True) if i in files} for name, path in files.items()}
    while free := [name for name, below in edges.items() if not below & edges.keys()]:
        edges = {name: below for name, below in edges.items() if name not in free}
    cycles = "\n".join(f"{name} -> {', '.join(sorted(below & edges.keys()))}" for name, below in edges.items())
    assert not edges, f"these files import each other, or files that do:\n{cycles}"


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("from mmtransformer.backbones.vit import ViT", "layers imports backbones, which comes after it"),
        (
            "def f():\n    from mmtransformer.captioners import base",
            "novelty.py:2: layers imports captioners, which comes after it",
        ),
        ("import lightning.pytorch as pl", "lightning may be imported in data, training, cli, not in layers"),
        ("from mmtransformer import ViT", "import from the module that defines the name"),
    ],
)
def test_a_fault_is_found(source: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "mmtransformer"
    for folder in ("layers", "backbones", "captioners", "attic"):
        (package / folder).mkdir(parents=True)
    for module in (globals(), vars(packages)):
        monkeypatch.setitem(module, "ROOT", tmp_path)
        monkeypatch.setitem(module, "PACKAGE", package)
    (package / "captioners" / "base.py").touch()
    for folder in ("layers", "attic"):
        (package / folder / "novelty.py").write_text(source, "utf-8")
    assert fault in "\n".join(faults(package / "layers" / "novelty.py"))
    assert "attic is no package yet" in faults(package / "attic" / "novelty.py")[0]


@pytest.mark.parametrize("top", ["lazy", "weights"], ids=["the package", "up to weights"])
def test_import_is_lazy(top: str) -> None:
    below = IMPORT_ORDER[: IMPORT_ORDER.index(top) + 1]
    names = [path.relative_to(ROOT).with_suffix("").parts for path in modules() if package_of(path) in below]
    names = ["mmtransformer", *(".".join(parts) for parts in names)]
    script = f"import sys, importlib\nfor name in {names}: importlib.import_module(name)\n" + (
        f"print(*sorted(set({LAZY}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [], f"import {names[-1]}, or one before it, also imports {done.stdout}"


def test_saved_models_need_no_trainer() -> None:
    names = [f"mmtransformer.pipelines.{path.stem}" for path in (PACKAGE / "pipelines").glob("[!_]*.py")]
    for name in names:
        script = f"import sys, {name}; print(*{{'lightning', 'matplotlib'}} & set(sys.modules))"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
        assert (done.returncode, done.stdout.split()) == (0, []), f"{name}: {done.stdout}{done.stderr}"


def test_contributing_tells_the_import_order() -> None:
    """A row names folders by their top level; which of two comes first in a row is which is imported first."""
    page = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    table = page.partition("| folders | |\n|---|---|\n")[2].partition("\n\n")[0]
    told = [name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    tops = [name for name in IMPORT_ORDER if "/" not in name]
    assert told == tops


def test_constructors_read_their_arguments() -> None:
    found = []
    for path in modules():
        for kind in (node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.ClassDef)):
            for made in kind.body:
                if isinstance(made, ast.FunctionDef) and made.name == "__init__":
                    read = {node.id for line in made.body for node in ast.walk(line) if isinstance(node, ast.Name)}
                    told = [argument.arg for argument in (*made.args.args[1:], *made.args.kwonlyargs)]
                    found += [f"{path.relative_to(ROOT)}: {kind.name}: {name}" for name in told if name not in read]
    assert not found, found


def test_folders_stay_small() -> None:
    counts = {f: len([p for p in f.iterdir() if p.is_file()]) for f in {path.parent for path in modules()}}
    large = [f"{folder.relative_to(ROOT)}: {n} files" for folder, n in counts.items() if n > MAX_FILES]
    assert not large, f"folders of more than {MAX_FILES} files: {', '.join(large)}"


def test_files_stay_short() -> None:
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in modules()}
    long = [f"{path.relative_to(ROOT)}: {n} lines" for path, n in lengths.items() if n > MAX_LINES]
    assert not long, f"files of more than {MAX_LINES} lines: {', '.join(long)}"


def test_tests_share_through_support_alone() -> None:
    """Any test file runs alone: what two of them need lies in tests/support."""
    pattern = re.compile(r"^\s*(?:from|import) (?:tests\.)?(?:\w+\.)*test_\w+", re.MULTILINE)
    files = [path for path in (ROOT / "tests").rglob("*.py") if pattern.search(path.read_text("utf-8"))]
    assert not files, f"these import from a test file: {[str(path.relative_to(ROOT)) for path in files]}"


def test_tests_mirror_the_library() -> None:
    """A package's tests lie in the folder of its name; no two files of tests have one name, as pytest asks."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    folders = {path.parent.relative_to(ROOT / "tests") for path in files} - {Path()}
    assert not [str(folder) for folder in folders if not (PACKAGE / folder).is_dir()]
    names = [path.name for path in files]
    assert not {name for name in names if names.count(name) > 1}


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
    yield from (p for p in ROOT.iterdir() if p.is_file() and p.name != ".git")
    endings = {".py", ".yaml", ".md", ".txt", ".json", ".csv", ".html", ".css", ".svg", ".yml", ""}
    for folder in ("mmtransformer", "recipes", "tests", "docs", ".ci", ".github", "assets"):
        paths = (path for path in (ROOT / folder).rglob("*") if path.suffix in endings and path.is_file())
        yield from (path for path in paths if "__pycache__" not in path.parts)
