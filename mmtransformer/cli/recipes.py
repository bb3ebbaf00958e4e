"""`mmt recipes`, and where a recipe's file is: the user's own, or one of those that come with the library."""

import argparse
import difflib
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from mmtransformer.serialization.printable import program, say
from mmtransformer.serialization.writing import write_whole

PACKAGE = Path(__file__).parents[1]
_OVERLAY = "tiny"  # of the library's files the one that is no recipe of its own


def run(name: str, words: Sequence[str]) -> int:
    """Lists the recipes, shows one, or copies one."""
    text = "The recipes that come with the library, each with its time and its score."
    parser = argparse.ArgumentParser(f"mmt {name}", description=text)
    commands = parser.add_subparsers(dest="command", metavar="show|copy")
    show = commands.add_parser("show", help="print a recipe")
    copy = commands.add_parser("copy", help="copy a recipe here, to change it")
    for command in (show, copy):
        command.add_argument("recipe", metavar="NAME")
    copy.add_argument("to", nargs="?", metavar="FILE", help="where to (NAME.yaml)")
    args = parser.parse_args(list(words))
    if args.command is None:
        say("\n".join(listing()))
        return 0
    file = Path(recipe_file(args.recipe))
    if args.command == "show":
        say(file.read_text("utf-8").rstrip("\n"))
        return 0
    to = Path(args.to or file.name)
    if to.exists():
        raise ValueError(f"{to} is there already; name another file: mmt {name} copy {args.recipe} FILE")
    write_whole(to, file.read_bytes())
    way = "lay it over a recipe: {} fit --config caption_scenes" if file.stem == _OVERLAY else "run it with: {} fit"
    say(f"{to}; {way.format(program())} --config {quote(str(to))}")
    return 0


def folder() -> Path:
    """The library's recipes: in an installed package within it, in a clone of the repository beside it."""
    inside = PACKAGE / "recipes"
    return inside if inside.is_dir() else PACKAGE.parent / "recipes"


def names() -> list[str]:
    """The names of the library's recipes; "tiny", which is laid over others, is none of them."""
    return sorted(path.stem for path in folder().glob("*.yaml") if path.stem != _OVERLAY)


def recipe_file(recipe: str) -> str:
    """The file of a recipe: a path, or the name of one of the library's, as "caption_scenes" or as a clone has it.

    Raises:
        ValueError: If there is no such recipe, with one of a similar name, if there is one; of a run's folder, or of
            its model's, with the run's.
    """
    path = Path(recipe)
    if path.is_file():
        return recipe
    if path.is_dir():
        near = next((f for f in (path / "config.yaml", path.parent / "config.yaml") if f.is_file()), None)
        run = f"; the run's is {near}: name that" if near else ", not a recipe; mmt recipes lists the library's"
        raise ValueError(f"{recipe}: a folder{run}")
    if path.parent in (Path(), Path("recipes")) and path.suffix in ("", ".yaml"):
        own = folder() / f"{path.stem}.yaml"
        if own.is_file():
            return str(own)
    known = {name: name for name in names()} | {near.stem: near.name for near in path.parent.glob("*.yaml")}
    close = difflib.get_close_matches(path.stem, known, n=1, cutoff=0.6)
    meant = f'; did you mean "{known[close[0]]}"?' if close else ""
    raise ValueError(f"{recipe}: no such recipe{meant}; mmt recipes lists the library's")


def check_whole(files: Sequence[str], words: Sequence[str]) -> None:
    """Refuses files that were looked through, if one has no keys, or none and no word says which model is trained.

    Raises:
        ValueError: Naming the file; the first, which can be laid over a recipe only, where no model is named.
    """
    import yaml

    named = {"--model", "--model.class_path"} & {word.partition("=")[0] for word in words}
    for file in files:
        try:
            held = yaml.safe_load(Path(file).read_text("utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{file}: not plain YAML: {' '.join(str(error).split())}") from None
        if not isinstance(held, dict):
            raise ValueError(f"{file} is no recipe: it must hold keys with values, as `mmt recipes show tiny` has them")
        named |= {"model"} & {*held}
    if not files or named:
        return
    raise ValueError(
        f"{files[0]} names no model, so it is no recipe; it can be laid over one: "
        f"{program()} fit --config caption_scenes --config {quote(files[0])}"
    )


def with_files(words: Sequence[str]) -> list[str]:
    """A command line with the files of the recipes that --config names."""
    found: list[str] = []
    for word in words:
        option, equals, value = word.partition("=")
        if equals and option in ("--config", "-c"):
            found.append(f"{option}={recipe_file(value)}")
        else:
            found.append(recipe_file(word) if found[-1:] in (["--config"], ["-c"]) else word)
    return found


def listing() -> list[str]:
    """Of each recipe what it is for, its time and its score, out of its header."""
    lines = []
    for name in names():
        text = (folder() / f"{name}.yaml").read_text("utf-8")
        purpose = text.splitlines()[0].lstrip("# ")
        fields = {
            field: " ".join(re.sub(r"\n# +", " ", value).split())
            for field, value in re.findall(r"^#   (time|score) +(.*(?:\n#     .*)*)", text, re.MULTILINE)
        }
        lines.append(f"{name:<25}{purpose}")
        lines += [f"{'':<25}{field:<7}{textwrap.shorten(fields[field], 120)}" for field in ("time", "score")]
    return [*lines, "", "mmt fit --config NAME trains one; mmt recipes show|copy NAME prints or copies it."]


_VISIONS, _TOWER = ("--model.captioner.vision", "--model.model.vision"), "mmtransformer.weights.load_vit"


def with_tower(words: Sequence[str]) -> list[str]:
    """A command line in which the `vision.source` of a captioner or a CLIP says, too, that its tower is loaded."""
    keys, found = [word.partition("=")[0].replace(".init_args.", ".") for word in words], list(words)
    for vision in _VISIONS:
        place = next((i for i, key in enumerate(keys) if key == f"{vision}.source"), None)
        if place is not None and not {vision, f"{vision}.class_path"} & {*keys}:
            found.insert(place, f"{vision}={_TOWER}")
            keys.insert(place, vision)
    return found


def cap_sizes(config: Any, most: int) -> None:
    """Lets no split of drawn data be larger, wherever in a configuration its size stands.

    Raises:
        ValueError: If nothing would be left.
    """
    if most < 1:
        raise ValueError(f"max_scenes ({most}) must be at least 1")
    for key, value in vars(config).items():
        if key in ("train_size", "val_size", "compositional_size"):
            config[key] = min(value, most)
        elif hasattr(value, "__dict__"):
            cap_sizes(value, most)
