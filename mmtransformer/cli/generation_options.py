"""Settings of the search on the command line: an option for every field of `GenerationConfig`, under its name."""

import argparse
import dataclasses
import re
from collections.abc import Collection
from typing import Any, get_args, get_type_hints

from mmtransformer.generation.config import GenerationConfig


def add_generation_options(parser: argparse.ArgumentParser, *, without: Collection[str] = ()) -> None:
    """Adds `--num-beams` and its like, with the words of the docstring; what is not given stays the model's own.

    Args:
        parser: The command's parser.
        without: Settings that say nothing to it.
    """
    group = parser.add_argument_group("search", "settings of the search, in place of the model's own")
    hints, said = get_type_hints(GenerationConfig), GenerationConfig.__doc__ or ""
    for name in (field.name for field in dataclasses.fields(GenerationConfig) if field.name not in without):
        flag, words = (
            f"--{name.replace('_', '-')}",
            re.search(rf"^ +{name}: ((?:[^.;]|\.(?=\d))+)", said, re.MULTILINE),
        )
        text = " ".join((words[1] if words else "").split()).replace("%", "%%")
        kind = (get_args(hints[name]) or (hints[name],))[0]
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        elif hints[name] == tuple[str, ...]:
            group.add_argument(flag, metavar="WORD", action="append", help=f"{text}; may be repeated")
        else:
            group.add_argument(flag, type=kind, metavar="N" if kind is int else "X", help=text)


def generation_changes(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given, for `GenerationConfig.updated`."""
    given = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(GenerationConfig)}
    return {name: value for name, value in given.items() if value is not None}
