"""README and the pages of docs/ are true: commands and Python are run in order, links lead somewhere.

A reader's folder is made: the recipes, a photo and small sets of pairs under the names that the pages use. A training
command gets recipes/tiny.yaml behind its recipe, so that it takes seconds, and `make` runs the commands of the real
Makefile, without the set-up. What a page takes from another one (runs/NAME/model) is trained by that recipe first.
"""

import importlib
import inspect
import os
import random
import re
import shlex
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from PIL import Image, ImageDraw

import draw_packages
import list_families
import mmtransformer
from mmtransformer import CLIP, ImageTextEmbedder, ImageTransform, TextTower, Tokenizer, ViT
from mmtransformer.cli import main
from mmtransformer.cli.recipes import recipe_file

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml") if path.stem != "tiny")
PAGES = {
    str(p.relative_to(ROOT)): p.read_text("utf-8") for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}

# Commands that are not run, by their first words -> why.
NOT_RUN = {
    "make test": "it would run this test again",
    "make lint": "the same",
    "make setup": "it installs",
    "python -m": "the same",
    **dict.fromkeys(
        (
            "mmt caption photo.jpg --model Salesforce/",
            "mmt evaluate --model Salesforce/",
            "mmt export Salesforce/",
            "mmt fit --config recipes/finetune_hub.yaml --model.init Salesforce/",
        ),
        "it would ask the hub",
    ),
}

# Pages whose Python goes on from block to block, as they say; elsewhere each block runs alone.
ONE_SESSION = {"docs/diffusion.md", "docs/generation.md", "docs/metrics.md", "docs/weights.md"}

# Where a recipe of drawn pictures says how many there are, and of which splits; data.source and all three if not here.
SIZES = {
    "lm_scenes": ("data.source.pairs", ("train", "val", "compositional")),
    "translate_scenes": ("data.source.scenes", ("train", "val", "compositional")),
    "vit_classify": ("data.source.scenes", ("train", "val", "compositional")),
    "few_shot_scenes": ("data.source", ("train", "val")),
}


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    code: str
    where: str
    section: str


def blocks(page: str) -> list[Block]:
    text, found = PAGES[page], []
    for fence in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        before = text[: fence.start()]
        section = re.findall(r"^#+ (.*)$", without_fences(before), re.MULTILINE)[-1]
        found.append(Block(fence[1], fence[2], f"{page}:{before.count(chr(10)) + 2}", section))
    return found


def without_fences(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def parts(page: str, section: str) -> str:
    """The code of the tables of a section: what stands in backquotes in the last cell of each row."""
    body = re.search(rf"^#+ {re.escape(section)}$(.*?)(?=^#+ |\Z)", PAGES[page], re.MULTILINE | re.DOTALL)
    assert body
    return "\n".join(re.findall(r"^\|.*\| `([^`]+)` \|$", body[1], re.MULTILINE))


def commands(code: str) -> Iterator[list[str]]:
    """The commands of a block for the shell, each as its words."""
    for line in code.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which a reader types the commands, on every page."""
    tmp_path = tmp_path_factory.mktemp("reader")
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    rng = random.Random(3)
    scene(rng).save(tmp_path / "photo.jpg")

    # In place of the pretrained tower that would be downloaded: a folder of that name comes before the hub.
    ViT(dim=192, depth=1, num_heads=3).save_pretrained(tmp_path / "deit_tiny_patch16_224")
    clip = CLIP(ViT(32, 16, 16, 1, 2), TextTower(300, 16, 1, 2, max_len=32), embed_dim=8)
    tokenizer = Tokenizer.train(["a red star", "빨간 별"] * 3, 300, ["en", "ko"])
    ImageTextEmbedder(clip, tokenizer, ImageTransform(32), device="cpu").save_pretrained(
        tmp_path / "openai" / "clip-vit-base-patch32"
    )

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


@pytest.fixture
def reader(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    which = shutil.which  # without Java there is no METEOR, which would take most of the time
    monkeypatch.setattr(shutil, "which", lambda name, *more: None if name == "java" else which(name, *more))
    return folder


def scene(rng: random.Random) -> Image.Image:
    image = Image.new("RGB", (64, 48), tuple(rng.randrange(256) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        x, y = rng.randrange(50), rng.randrange(36)
        draw.ellipse((x, y, x + 12, y + 9), fill=tuple(rng.randrange(256) for _ in range(3)))
    return image


def mmt(words: list[str]) -> int:
    """`mmt`, with tiny.yaml behind the recipe of a command that trains, and everything there that its recipe reads."""
    if words[0] in ("fit", "ablate", "plan"):
        after = {"fit": 3, "ablate": 3, "plan": 2}[words[0]]  # fit --config RECIPE
        recipe = Path(recipe_file(words[after - 1]))
        name = recipe.stem
        needed = re.findall(r"runs/(\w+)/model", recipe.read_text("utf-8").partition("\nseed_everything")[2])
        source, splits = SIZES.get(name, ("data.source", ("train", "val", "compositional")))
        fewer = [f"--{source}.{split}_size={16 if split == 'train' else 4}" for split in splits]
        words[after:after] = ["--config", "recipes/tiny.yaml"] + fewer * ("scenes" in name or name in SIZES)
        words += ["--captioners", "qformer,prefix"] * (words[0] == "ablate")  # two of the four: it is slow
        if words[0] == "fit" and "--trainer.default_root_dir" not in words:
            shutil.rmtree(Path("runs", name), ignore_errors=True)  # of another page: a reader's run is not written over
    else:
        needed = re.findall(r"runs/(\w+)/model", " ".join(words))
    have_trained(needed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a reader sees them; what they say is not the page's
        return main(words)


def have_trained(names: list[str]) -> None:
    for name in names:
        if not Path("runs", name, "model").exists():
            data = ["--data.root", "flickr8k"] if "flickr8k" in name else []
            data = ["--data.root", "photos"] if name == "finetune_pairs" else data
            assert mmt(["fit", "--config", f"recipes/{name}.yaml", *data]) == 0, name


def make(words: list[str]) -> int:
    """`make`: the commands of `mmt` that it would run."""
    dry_run = [
        "make",
        "--no-print-directory",
        "-C",
        str(ROOT),
        "-n",
        "-o",
        ".venv/.installed",
        "-o",
        ".venv/.installed-dev",
    ]
    ours = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "ARGS")  # what runs this test is not the reader's
    env = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run([*dry_run, *words], capture_output=True, text=True, check=True, env=env)
    found = [
        line.removeprefix(".venv/bin/mmt") for line in done.stdout.splitlines() if line.startswith(".venv/bin/mmt ")
    ]
    assert found, done.stdout
    return max(mmt(shlex.split(line)) for line in found)


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*")  # of Lightning itself
def test_every_block_runs(page: str, reader: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done: set[str] = set()
    session = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "bash":
            for words in commands(block.code):
                if " ".join(words).startswith(tuple(NOT_RUN)):
                    continue
                assert words[0] in ("mmt", "make"), f"{block.where}: no way to run {words[0]} in a test"
                if words[0] == "make" and shutil.which("make") is None:
                    pytest.skip("needs make")
                code = {"mmt": mmt, "make": make}[words[0]](words[1:])
                out, err = capsys.readouterr()
                assert code == 0, f"{block.where}: {shlex.join(words)}\n{out[-2000:]}\n{err[-4000:]}"
        elif block.language == "python":
            code = block.code + parts(page, block.section) * (block.section not in done)
            done.add(block.section)
            have_trained(re.findall(r"runs/(\w+)/model", code))
            exec(compile(code, block.where, "exec"), session if page in ONE_SESSION else {"__name__": "__main__"})


def unknown_arguments(node: Any) -> list[str]:
    """What no constructor takes of a piece of a recipe; an ImportError for a class that is not there."""
    if isinstance(node, list):
        return [fault for item in node for fault in unknown_arguments(item)]
    if not isinstance(node, dict):
        return []
    found = [fault for value in node.values() for fault in unknown_arguments(value)]
    if "class_path" in node:
        module, _, name = node["class_path"].rpartition(".")
        known = inspect.signature(getattr(importlib.import_module(module), name)).parameters
        found += [f"{name}: {argument}" for argument in node.get("init_args", {}) if argument not in known]
    return found


def test_yaml_names_what_there_is() -> None:
    pieces = [b for page in PAGES for b in blocks(page) if b.language == "yaml"]
    assert pieces
    assert not [(b.where, fault) for b in pieces for fault in unknown_arguments(yaml.safe_load(b.code))]
    wrong = {"class_path": "mmtransformer.data.Mixture", "init_args": {"sauces": {}}}
    assert unknown_arguments({"data": [wrong]}) == ["Mixture: sauces"]


@pytest.mark.parametrize("page", PAGES)
def test_blocks_say_their_language(page: str) -> None:
    strange = [b.where for b in blocks(page) if b.language not in ("bash", "python", "text", "yaml", "csv")]
    assert not strange, f"{strange}: write ```bash, ```python (both are run), ```text, ```yaml or ```csv"


def test_tables_of_code_follow_a_block_that_imports_what_they_use() -> None:
    found = []
    for page, text in PAGES.items():
        if page == "docs/towers.md":  # its tables name models
            continue
        sections = re.findall(r"^#+ (.*)$", without_fences(text), re.MULTILINE)
        found += [(page, section) for section in sections if parts(page, section)]
        with_python = {block.section for block in blocks(page) if block.language == "python"}
        assert not [s for p, s in found if p == page and s not in with_python]
    assert ("README.md", "Parts") in found
    assert ("docs/parts.md", "The parts") in found


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "tests/benchmarks/README.md"])
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_fences((ROOT / page).read_text("utf-8"))):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}: no such file"
        if heading:
            assert heading in slugs(file.read_text("utf-8")), f"{page}: {target}: no such heading"


def slugs(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", without_fences(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}


def test_readme_is_short_and_leads_to_every_page() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 150
    assert not [page for page in PAGES if page != "README.md" and f"({page})" not in PAGES["README.md"]]


def test_readme_has_every_recipe() -> None:
    listed = re.findall(r"\(recipes/(\w+)\.yaml\)", PAGES["README.md"])
    assert sorted(listed) == RECIPES


def test_every_public_name_has_its_line() -> None:
    section = PAGES["docs/parts.md"].partition("\n## All public names\n")[2]
    rows = re.findall(r"^\| (`.*?) \| .+ \|$", section, re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == mmtransformer.__all__
    folders = {name for name in dir(mmtransformer) if name[0] != "_"} - {*mmtransformer.__all__}
    assert folders <= {*re.findall(r"`(\w+)`", section)}


def test_files_are_listed() -> None:
    (text,) = (block.code for block in blocks("README.md") if block.section == "Files")
    names = [line.split()[0] for line in text.splitlines()]
    assert not [name for name in names if not (ROOT / name).exists()]
    folders = {f"{p.name}/" for p in ROOT.iterdir() if p.is_dir() and any(p.glob("*.*")) and p.name[0] not in "._"}
    assert folders - {"runs/", "build/", "dist/"} <= set(names)


def test_the_packages_are_drawn_as_they_are() -> None:
    page = ROOT / "docs/architecture.md"
    stale = "stale: run python tests/draw_packages.py"
    assert draw_packages.with_packages(page.read_text("utf-8")) == page.read_text("utf-8"), f"{page.name} is {stale}"
    picture = draw_packages.PICTURE
    assert draw_packages.description() in picture.read_text("utf-8"), f"{picture.name} is {stale}"


def test_the_families_of_weights_are_listed_as_they_are() -> None:
    for page, marks in zip(list_families.PAGES, (list_families.MARKS, list_families.CAPTIONERS), strict=True):
        text = page.read_text("utf-8")
        assert marks[0] in text
        assert list_families.with_families(text) == text, f"{page.name} is stale: run python tests/list_families.py"
