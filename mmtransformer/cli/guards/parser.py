"""The parser of recipes and their keys."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser


class RecipeParser(LightningArgumentParser):
    """Takes no abbreviated keys, and null for every key that may be null; so do the parsers that it makes for classes.

    "None" is null as well: jsonargparse (4.53) reads `--data.read.encoding=null` as None, and hands it on
    in these letters to the parser of what stands inside, which took it for a text.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["allow_abbrev"] = False
        super().__init__(*args, **kwargs)

    def parse_args(self, args: Sequence[str] | None = None, *rest: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As its parent's, with "None" in the place of a value read as null."""
        if args is not None:
            args = ["null" if arg == "None" else _null(arg) for arg in args]
        return super().parse_args(args, *rest, **kwargs)


def _null(arg: str) -> str:
    return arg.removesuffix("None") + "null" if arg.startswith("--") and arg.endswith("=None") else arg
