"""Private parts of Lightning and of torch's distributed code are leaned on in one file, whose versions are capped."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import mmtransformer

PACKAGE = Path(mmtransformer.__file__).parent
INTERNALS = PACKAGE / "training/engine/internals.py"


def private(path: Path) -> Iterator[str]:
    """The private names that a file takes from what is not its own."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and re.search(r"^(lightning|torch\.distributed).*\._", node.module or ""):
            yield node.module or ""
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            if owner not in ("self", "cls", "torch"):
                yield node.attr


def test_private_parts_are_used_in_one_file() -> None:
    known = set(private(INTERNALS))
    assert {"_should_accumulate", "_data_fetcher", "torch.distributed._composable_state"} < known
    for path in [*(PACKAGE / "training").rglob("*.py"), *(PACKAGE / "cli").rglob("*.py")]:
        found = set(private(path))
        if path != INTERNALS:
            assert not {name for name in found if name in known or "." in name} - {"_parameters"}, path


def test_their_versions_are_capped() -> None:
    """Raise a cap after having read internals.py."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text("utf-8"))["project"]
    for name, cap in {"lightning": "<2.7", "torch": "<2.16"}.items():
        (wanted,) = [text for text in project["dependencies"] if re.match(rf"{name}\W", text)]
        assert cap in wanted
