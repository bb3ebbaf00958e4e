"""The options that say how pairs of one's own are read, the same in every command that takes a path to some."""

import argparse
from typing import get_args

from mmtransformer.data.files.read_options import Format, ReadOptions


def add_read_options(parser: argparse.ArgumentParser) -> None:
    """Adds them to a command; in a recipe they are the keys of data.read."""
    add = parser.add_argument_group("how pairs are read, where it is not to be detected").add_argument
    add("--format", choices=get_args(Format), default="auto", help="the format")
    add("--images", metavar="DIR", help="folder or archive of the pictures, if not at the root")
    add("--image-column", metavar="NAME", help="column with the picture's path")
    add("--caption-column", metavar="NAME", action="append", help="column with captions; may be given again")
    add("--language-column", metavar="NAME", help="column with the language of a row's captions")
    add("--split-column", metavar="NAME", help="column with the split")
    add("--language", metavar="CODE", help="language of captions whose script does not tell")


def read_options(args: argparse.Namespace) -> ReadOptions:
    """What was given."""
    return ReadOptions(
        format=args.format,
        images=args.images,
        image_column=args.image_column,
        caption_column=args.caption_column,
        language_column=args.language_column,
        split_column=args.split_column,
        language=args.language,
    )
