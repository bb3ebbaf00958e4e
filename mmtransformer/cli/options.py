"""Options that commands share: the model and where it computes, generation, how pairs are read."""

import argparse
import dataclasses
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from mmtransformer.cli import COMMANDS
from mmtransformer.cli.guards.own_modules import IMPORT_HELP, import_own
from mmtransformer.data.files.read_options import ReadOptions
from mmtransformer.generation.config import GenerationConfig
from mmtransformer.serialization.printable import printable
from mmtransformer.serialization.writing import check_place

if TYPE_CHECKING:
    from tqdm import tqdm


def command_parser(name: str) -> argparse.ArgumentParser:
    """The parser of a command, with its line of `mmt --help`."""
    return _Parser(f"mmt {name}", description=COMMANDS[name][1], allow_abbrev=False)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, with the option that was meant, and not all options there are."""

    words: Sequence[str] = ()

    def parse_args(self, args: Sequence[str]) -> argparse.Namespace:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See argparse; the words are kept for what is said of them."""
        self.words = args
        return super().parse_args(args)

    def error(self, message: str) -> NoReturn:
        """Ends the process with code 2; see argparse."""
        dashed = [word for word in self.words if word.startswith("-") and word != "-" and Path(word).is_file()]
        if dashed:
            self.exit(2, printable(f"{self.prog}: error: {dashed[0]} is read as an option: write ./{dashed[0]}\n"))
        if found := re.match(r"unrecognized arguments: (-\S+)", message):
            from mmtransformer.cli.guards.errors import suggest

            message += suggest(found[1].partition("=")[0], self._option_string_actions)
        self.exit(2, printable(f"{self.prog}: error: {message}; see {self.prog} --help\n"))


class _Import(argparse.Action):
    """Imports what is named, before the model is read."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        import_own(values)


def add_model_options(parser: argparse.ArgumentParser, *, precision: bool = False) -> None:
    """Adds `--model`, `--import` and `--device`; and `--precision`, where a model can be rounded."""
    parser.add_argument("--model", required=True, metavar="DIR", help="a model's folder, or its name on the hub")
    parser.add_argument("--import", action=_Import, metavar="MODULE", help=IMPORT_HELP)
    parser.add_argument("--device", help="cpu, cuda, mps (a GPU if there is one)")
    if precision:
        kinds = ("fp32", "bf16", "int8", "auto")
        parser.add_argument(
            "--precision",
            choices=kinds,
            default="fp32",
            help="faster, and rounded (fp32); auto: bf16 if it is fast here",
        )


def add_many_options(parser: argparse.ArgumentParser, *, batch_size: int) -> None:
    """Adds `--batch-size` and `--devices`, for captions of many pictures."""
    add = parser.add_argument
    add("--batch-size", type=int, default=batch_size, metavar="N", help=f"pictures at once ({batch_size})")
    add("--devices", type=int, default=1, metavar="N", help="GPUs, or processes on a CPU, that share the pictures (1)")


def add_out_options(parser: argparse.ArgumentParser, what: str, forms: str) -> None:
    """Adds `--out` and `--overwrite`, for what is said of many pictures.

    Args:
        parser: The command's parser.
        what: What is written: "captions".
        forms: The names that can be given.
    """
    text = f"write the {what}: {forms}; pictures that have {what} there are skipped, so a stopped call can be run again"
    parser.add_argument("--out", metavar="OUT", help=text)
    parser.add_argument("--overwrite", action="store_true", help=f"replace the {what} of these pictures in OUT")


def check_out_options(args: argparse.Namespace, what: str) -> None:
    """Refuses `--overwrite` and `--json` where they would do nothing."""
    if args.overwrite and not args.out:
        raise ValueError(f"--overwrite writes {what} anew, and none are written: --out OUT")
    if args.json and args.out:
        raise ValueError(f"--json prints {what}, and --out writes them: take --out FILE.jsonl alone")


def check_image_file(path: str, option: str, more: Collection[str] = ()) -> None:
    """Refuses the name of a picture that could not be written, before long work is begun.

    Raises:
        ValueError: If its ending is none of a picture's, or `more`, or nothing can be written there.
    """
    from mmtransformer.plots.files import FORMATS

    endings = (*FORMATS, *more)
    if Path(path).suffix.lower() not in endings:
        raise ValueError(f"{option} {path}: let the name end in {', '.join(endings)}")
    check_place(path, option)


def progress_bar(total: int, *, shown: bool) -> "tqdm":
    """How many pictures are done and how long the others will take, on a terminal's standard error."""
    from tqdm import tqdm

    return tqdm(total=total, unit=" pictures", disable=not (shown and sys.stderr.isatty()), dynamic_ncols=True)


def add_generation_options(parser: argparse.ArgumentParser, *, without: Collection[str] = ()) -> None:
    """Adds `--num-beams` and its like: an option for every field of `GenerationConfig`, under its name.

    Args:
        parser: The command's parser.
        without: Settings that say nothing to it.
    """
    group = parser.add_argument_group("generation", "how texts are searched for, in place of the model's own settings")
    _add_fields(group, GenerationConfig, without)


def generation_changes(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given, for `GenerationConfig.updated`."""
    return _given(args, GenerationConfig)


def add_read_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say how pairs are read, the same in every command; in a recipe the keys of data.read."""
    group = parser.add_argument_group("how pairs are read, where it is not to be detected")
    _add_fields(group, ReadOptions, ("val_fraction",))


def read_options(args: argparse.Namespace) -> ReadOptions:
    """What was given of them."""
    return ReadOptions(**_given(args, ReadOptions))


def _add_fields(group: Any, kind: type, without: Collection[str]) -> None:
    """An option for every field of a dataclass, with the words of its docstring."""
    hints, said = get_type_hints(kind), kind.__doc__ or ""
    for name in (field.name for field in dataclasses.fields(kind) if field.name not in without):
        flag, hint = f"--{name.replace('_', '-')}", hints[name]
        words = re.search(rf"^ +{name}: ((?:[^.;]|\.(?=\d))+)", said, re.MULTILINE)
        text = " ".join((words[1] if words else "").split()).replace("%", "%%")
        one = (get_args(hint) or (hint,))[0]
        literal = next((kind for kind in (hint, one) if get_origin(kind) is Literal), None)
        if literal is not None and list[literal] in get_args(hint):
            group.add_argument(flag, choices=get_args(literal), action="append", help=f"{text}; may be repeated")
        elif literal is not None:
            group.add_argument(flag, choices=get_args(literal), help=text)
        elif one is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        elif hint == tuple[str, ...] or list[str] in get_args(hint):
            group.add_argument(flag, metavar="WORD", action="append", help=f"{text}; may be repeated")
        else:
            group.add_argument(flag, type=one, metavar={int: "N", float: "X"}.get(one, "WORD"), help=text)


def _given(args: argparse.Namespace, kind: type) -> dict[str, Any]:
    """The values of a dataclass's fields that stand on the command line."""
    values = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(kind)}
    return {name: value for name, value in values.items() if value is not None}
