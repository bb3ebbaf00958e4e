"""The packages of the library, and which imports which, read from the imports themselves."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mmtransformer"

# A file imports only from its own package and from those above it in this list.
IMPORT_ORDER = [
    "lazy",
    "batch",
    "layers",
    "serialization",
    "text",
    "images",
    "metrics",
    "backbones",
    "backbones/vit_variants",
    "backbones/hf",
    "connectors",
    "losses",
    "captioners",
    "captioners/published",
    "dual_encoders",
    "generation",
    "diffusion",
    "weights/shared",
    "weights/processors",
    "weights/vision",
    "weights/diffusion",
    "weights/text",
    "weights/captioners/parts",
    "weights/captioners",
    "weights/dual_encoders",
    "weights",
    "plots",
    "data/loading",
    "data/files",
    "data/formats/json",
    "data/formats",
    "data/documents",
    "data/pair_files",
    "data/text_only",
    "data/scenes",
    "data",
    "pipelines",
    "pipelines/search",
    "training/evaluation",
    "training/engine",
    "training/callbacks",
    "training/tasks",
    "training",
    "cli/guards",
    "cli",
]


def modules() -> list[Path]:
    top = {PACKAGE / "__init__.py", PACKAGE / "__main__.py"}  # which are in none of the packages
    return sorted(path for path in PACKAGE.rglob("*.py") if path not in top)


def package_of(path: Path) -> str:
    """mmtransformer/data/files/tables.py -> data/files; a file at the top is a package of its own."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "/".join(parts[:-1]) or parts[0]


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
                is_module = base == "mmtransformer" or (PACKAGE.parent / base.replace(".", "/") / alias.name).exists()
                is_module |= (PACKAGE.parent / base.replace(".", "/") / f"{alias.name}.py").exists()
                yield node.lineno, f"{base}.{alias.name}" if is_module else base
        elif not (when_loaded and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))):
            nodes += ast.iter_child_nodes(node)


def file_of(name: str) -> Path:
    """The file of a dotted name: mmtransformer.layers.masks -> mmtransformer/layers/masks.py."""
    path = PACKAGE.parent / name.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def arrows(*, nested: bool = False) -> dict[str, list[str]]:
    """Package -> the packages that it imports, both in import order; those within packages apart if `nested`."""
    found: dict[str, set[str]] = {}
    for path in modules():
        package = _shown(package_of(path), nested)
        below = found.setdefault(package, set())
        for _, name in imports(path):
            if name.startswith("mmtransformer."):
                below.add(_shown(package_of(file_of(name)), nested))
        below.discard(package)
    order = list(dict.fromkeys(_shown(package, nested) for package in IMPORT_ORDER))
    return {package: sorted(found[package], key=order.index) for package in order if package in found}


def _shown(package: str, nested: bool) -> str:
    return package if nested else package.partition("/")[0]


def purpose(package: str) -> str:
    """What a package is for: the first line of its docstring."""
    path = PACKAGE / package
    text = ast.get_docstring(
        ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text("utf-8"))
    )
    assert text, package
    return text.splitlines()[0]
