"""The set-up: what is pinned is what pyproject.toml asks for, and make says what is wrong."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
FILES = {name: (ROOT / name).read_text("utf-8") for name in ("requirements.txt", "requirements-dev.txt")}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT, EXTRAS = PYPROJECT["project"], PYPROJECT["project"]["optional-dependencies"]

# What users need, and what tests and checks need besides.
USERS = [
    *PROJECT["dependencies"],
    *PYPROJECT["dependency-groups"]["setup"],
    *(requirement for extra in ("hf", "lora", "parquet") for requirement in EXTRAS[extra]),
]
DEVELOPERS = [*(r for extra in EXTRAS.values() for r in extra), *PYPROJECT["dependency-groups"]["dev"]]

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def pins(*files: str) -> dict[str, list[tuple[Version, str, str]]]:
    """name -> (version, marker, the lines that follow) of every pin; a name may have one pin a platform."""
    found: dict[str, list[tuple[Version, str, str]]] = {}
    for entry in re.split(r"\n(?=\S)", "\n".join(FILES[file].strip() for file in files or FILES)):
        head, _, hashes = entry.partition("\\\n")
        requirement, _, marker = head.strip().partition(" ; ")
        name, _, version = requirement.partition("==")
        found.setdefault(name.partition("[")[0], []).append((Version(version), marker, hashes))
    return found


@pytest.mark.parametrize(
    ("files", "wanted"), [(["requirements.txt"], USERS), (list(FILES), USERS + DEVELOPERS)], ids=["users", "all"]
)
def test_every_requirement_is_pinned_within_its_bounds(files: list[str], wanted: list[str]) -> None:
    found = pins(*files)
    for requirement in map(Requirement, wanted):
        assert requirement.name in found, f"{requirement.name} is not pinned: make lock"
        for version, _, _ in found[requirement.name]:
            assert version in requirement.specifier, f"{requirement.name} {version}, not {requirement.specifier}"


def test_users_install_no_tools_of_the_tests() -> None:
    assert not set(pins("requirements.txt")) & set(pins("requirements-dev.txt"))
    tools = {Requirement(name).name for name in PYPROJECT["dependency-groups"]["dev"]}
    assert tools <= set(pins("requirements-dev.txt"))


def test_every_pin_has_hashes_and_no_address() -> None:
    for text in FILES.values():
        assert "://" not in text
        assert not re.search(r"^-", text, re.MULTILINE), "options such as an index do not belong here"
    for name, entries in pins().items():
        for version, marker, hashes in entries:
            lines = [line.strip(" \\") for line in hashes.splitlines()]
            assert lines, f"{name}: no hash"
            assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", line) for line in lines), name
            assert version.local is None, f"{name} {version}: a local build cannot be had from the index"
            assert not marker or Marker(marker)


def test_what_is_installed_is_what_is_pinned() -> None:
    """torchvision's wheel only imports beside the build of torch it was made for."""
    import torch
    import torchvision

    for module in (torch, torchvision):
        (pin,) = pins()[module.__name__]
        installed = Version(module.__version__)
        if sys.prefix == str(ROOT / ".venv"):
            assert installed.base_version == str(pin[0])
        assert installed.local != "cpu" or sys.platform != "linux"
    kept = torchvision.ops.nms(torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1]]), torch.tensor([1.0, 2.0]), 0.5)
    assert kept.tolist() == [1]


@needs_make
def test_make_lists_its_commands() -> None:
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = re.findall(r"^ +make ([\w-]+) +\S", done.stdout, re.MULTILINE)
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert phony
    assert sorted(listed) == sorted(phony[1].split())


@needs_make
@pytest.mark.parametrize("python", ["", "no-such-python", "false"])
def test_make_names_the_python_it_needs(python: str, tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", *FILES):
        shutil.copy(ROOT / name, tmp_path)
    done = subprocess.run(
        ["make", "setup", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "needs Python 3.11 or newer with its venv module" in done.stderr
    assert not python or f"({python} is not)" in done.stderr
    assert not (tmp_path / ".venv").exists()
