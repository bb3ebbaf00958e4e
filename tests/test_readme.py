"""The README is true: its commands and Python are run in order, its links and its file map lead somewhere.

A reader's folder is made: the recipes, a photo and small sets of pairs under the names that README uses. In it `mmt`
gets recipes/tiny.yaml behind the recipe of every training command, so that it takes seconds, and `make` runs the
commands of the real Makefile, without the set-up.
"""

import os
import random
import re
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image, ImageDraw

from mmtransformer import ViT

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")

# The first line of each block that is not run -> why.
NOT_RUN: dict[str, str] = {}

# Commands of make that are looked up in the Makefile only: they would run this test again, or set up.
ONLY_LOOKED_UP = ("test", "setup", "lint")

# Where a recipe of drawn pictures says how many there are, and of which splits; data.source and all three if not here.
SIZES = {
    "lm_scenes.yaml": ("data.source.pairs", ("train", "val", "compositional")),
    "translate_scenes.yaml": ("data.source.scenes", ("train", "val", "compositional")),
    "vit_classify.yaml": ("data.source.scenes", ("train", "val", "compositional")),
    "few_shot_scenes.yaml": ("data.documents", ("train", "val")),
}


class Block(NamedTuple):
    """A fenced block of README."""

    language: str
    code: str
    line: int
    section: str


def blocks() -> Iterator[Block]:
    for fence in re.finditer(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL):
        before = README[: fence.start()]
        headings = re.findall(
            r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", before, flags=re.M | re.S), re.MULTILINE
        )
        yield Block(fence[1], fence[2], before.count("\n") + 2, headings[-1])


def parts(section: str) -> str:
    """The code of the tables of a section: what stands in backquotes in the last cell of each row."""
    body = re.search(rf"^#+ {re.escape(section)}$(.*?)(?=^#+ |\Z)", README, re.MULTILINE | re.DOTALL)
    assert body
    return "\n".join(re.findall(r"^\|.*\| `([^`]+)` \|$", body[1], re.MULTILINE))


@pytest.fixture
def reader(tmp_path: Path) -> Path:
    """The folder in which a reader types the commands."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    rng = random.Random(3)
    scene(rng).save(tmp_path / "photo.jpg")

    # In place of the pretrained tower that would be downloaded: a folder of that name comes before the hub.
    ViT(dim=192, depth=1, num_heads=3).save_pretrained(tmp_path / "deit_tiny_patch16_224")

    photos = tmp_path / "photos"
    flickr = tmp_path / "flickr8k"
    images = flickr / "Flicker8k_Dataset"
    for folder in (photos, images):
        folder.mkdir(parents=True)
    tokens, names = [], []
    for i in range(60):
        image, name = scene(rng), f"{i:04}.jpg"
        image.save(photos / name)
        (photos / name).with_suffix(".txt").write_text(f"a picture of thing number {i} on a lawn\n", "utf-8")
        image.save(images / name)
        names.append(name)
        tokens += [f"{name}#{n}\tA dog number {i} runs , seen by person {n} .\n" for n in range(5)]
    (flickr / "Flickr8k.token.txt").write_text("".join(tokens), "utf-8")
    for split, part in (("train", names[:40]), ("dev", names[40:50]), ("test", names[50:])):
        (flickr / f"Flickr_8k.{split}Images.txt").write_text("".join(f"{n}\n" for n in part), "utf-8")
    return tmp_path


def scene(rng: random.Random) -> Image.Image:
    image = Image.new("RGB", (64, 48), tuple(rng.randrange(256) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        x, y = rng.randrange(50), rng.randrange(36)
        draw.ellipse((x, y, x + 12, y + 9), fill=tuple(rng.randrange(256) for _ in range(3)))
    return image


def environment(folder: Path) -> dict[str, str]:
    """Puts this Python's commands first in PATH, and before them the stand-ins for `mmt` and `make`."""
    here, stand_ins = Path(sys.executable).parent, folder / ".bin"
    if shutil.which("make") is None:
        pytest.skip("needs make")
    if not (here / "mmt").exists():
        pytest.fail(f"{here / 'mmt'} is missing: run make setup")
    stand_ins.mkdir()
    mmt = f"""import os, sys
args = sys.argv[1:]
if args and args[0] in ("fit", "validate", "test", "ablate"):
    after = args.index("--recipe" if args[0] == "ablate" else "--config") + 2
    recipe = os.path.basename(args[after - 1])
    source, splits = {SIZES!r}.get(recipe, ("data.source", ("train", "val", "compositional")))
    fewer = [f"--{{source}}.{{split}}_size={{40 if split == 'train' else 8}}" for split in splits]
    args[after:after] = ["--config", "recipes/tiny.yaml"] + fewer * ("scenes" in recipe or recipe in {SIZES!r})
    args += ["--bridges", "qformer,prefix"] * (args[0] == "ablate")  # two of the four: it is slow
os.execv({str(here / "mmt")!r}, ["mmt", *args])
"""
    # The real make by its full name: plain `make` is this stand-in, which would call itself without end.
    dry_run = [shutil.which("make"), "--no-print-directory", "-C", str(ROOT), "-n", "-o", ".venv/.installed"]
    make = f"""import subprocess, sys
target = sys.argv[1]
lines = subprocess.run({dry_run!r} + sys.argv[1:], capture_output=True, text=True, check=True).stdout
commands = [line.replace(".venv/bin/", "") for line in lines.splitlines() if line.startswith(".venv/bin/mmt")]
if target not in {ONLY_LOOKED_UP!r}:
    assert commands, lines
    sys.exit(subprocess.run(["sh", "-ec", chr(10).join(commands)]).returncode)
"""
    for name, source in (("mmt", mmt), ("make", make)):
        (stand_ins / f"{name}.py").write_text(source, "utf-8")
        # Not "#!python": the first line of a program may hold no space, but the folder of .venv may.
        words = shlex.join([sys.executable, str(stand_ins / f"{name}.py")])
        (stand_ins / name).write_text(f'#!/bin/sh\nexec {words} "$@"\n', "utf-8")
        (stand_ins / name).chmod(stat.S_IRWXU)
    path = os.pathsep.join([str(stand_ins), str(here), os.environ["PATH"]])
    # What `make test ARGS=...` passes on to this test is not meant for the reader's commands.
    ours = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "ARGS")
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    return {**inherited, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def test_every_block_runs(reader: Path) -> None:
    env = environment(reader)
    for block in blocks():
        if block.language not in ("bash", "python") or block.code.splitlines()[0] in NOT_RUN:
            continue
        if block.language == "bash":
            command = ["bash", "-euo", "pipefail", "-c", block.code]
        else:
            rows, block_of_rows = (
                parts(block.section),
                next(b for b in blocks() if b.section == block.section),
            )
            code = block.code + (rows if block == block_of_rows else "")
            command = [sys.executable, "-W", "error", "-c", code]
        done = subprocess.run(
            command, cwd=reader, env=env, capture_output=True, text=True, check=False, timeout=900
        )
        assert done.returncode == 0, (
            f"README.md:{block.line} fails:\n{command[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )


def test_what_is_not_run_is_in_the_readme() -> None:
    first_lines = {block.code.splitlines()[0] for block in blocks()}
    assert set(NOT_RUN) <= first_lines


def test_blocks_say_their_language() -> None:
    strange = [
        f"README.md:{b.line}" for b in blocks() if b.language not in ("bash", "python", "text", "yaml", "csv")
    ]
    assert not strange, f"{strange}: write ```bash, ```python (both are run), ```text, ```yaml or ```csv"


def test_tables_of_code_follow_a_block_that_imports_what_they_use() -> None:
    sections = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S), re.MULTILINE)
    with_python = {block.section for block in blocks() if block.language == "python"}
    assert [s for s in sections if parts(s)], "README has no table of the parts"
    assert not [s for s in sections if parts(s) and s not in with_python]


def test_links_lead_somewhere() -> None:
    text = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    slugs = {
        re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-")
        for h in re.findall(r"^#+ (.*)$", text, re.M)
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in slugs, f"{target}: no such heading"
        elif "://" not in target:
            assert (ROOT / target).exists(), f"{target}: no such file"


def test_file_map_is_complete() -> None:
    """The map names every module and folder of the package and nothing else; so does its part on the top level."""
    (text,) = (block.code for block in blocks() if block.language == "text" and block.section == "Files")
    listed = {line.split()[0] for line in text.splitlines() if line.strip()}
    missing = sorted(name for name in listed if not (ROOT / name).exists())
    assert not missing, f"listed, but not there: {missing}"
    modules = {
        f"mmtransformer/{path.name}" + ("/" if path.is_dir() else "")
        for path in (ROOT / "mmtransformer").iterdir()
        if path.name[0] != "_" and (path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py"))))
    }
    assert not sorted(modules - listed), f"there, but not listed: {sorted(modules - listed)}"
