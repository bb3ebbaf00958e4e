"""`mmt check`: what is wrong with image-text pairs, before any training."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from mmtransformer.data.files.read_options import Format, ReadOptions
from mmtransformer.text.printable import printable


def run(name: str, words: Sequence[str]) -> int:
    """Looks at pairs; the exit code is 1 if training would be hurt.

    Args:
        name: The command's name.
        words: The words after it.
    """
    parser = argparse.ArgumentParser(f"mmt {name}", description="Look at image-text pairs before training on them.")
    parser.add_argument(
        "root", metavar="ROOT", help="a folder, an archive, one manifest or documents.jsonl, or a pattern of tar shards"
    )
    parser.add_argument("--model", metavar="DIR", help="count tokens with this model's tokenizer")
    parser.add_argument("--max-len", type=int, default=64, metavar="N", help="most tokens of a caption (64)")
    parser.add_argument("--max-bad", type=float, default=0.01, metavar="X", help="share that is tolerable (0.01)")
    parser.add_argument("--json", metavar="OUT", help="write what was found to this file")
    add_read_options(parser)
    args = parser.parse_args(list(words))

    import sys

    from mmtransformer.data.check import check
    from mmtransformer.data.opening import open_pairs
    from mmtransformer.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_pretrained(args.model) if args.model else None
    source = open_pairs(args.root, read_options(args), max_bad=1.0)
    report = check(
        source, tokenizer=tokenizer, max_len=args.max_len, max_bad=args.max_bad, progress=sys.stderr.isatty()
    )
    print(printable(str(report)))
    if args.json:
        text = json.dumps(report.to_dict(), indent=2, ensure_ascii=False)
        Path(args.json).write_text(text + "\n", encoding="utf-8")
    return 1 if report.hurts else 0


def add_read_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say how pairs are read, the same in every command; in a recipe the keys of data.read."""
    add = parser.add_argument_group("how pairs are read, where it is not to be detected").add_argument
    add("--format", choices=get_args(Format), default="auto", help="the format")
    add("--images", metavar="DIR", help="folder or archive of the pictures, if not at the root")
    add("--image-column", metavar="NAME", help="column with the picture's path")
    add("--caption-column", metavar="NAME", action="append", help="column with captions; may be given again")
    add("--language-column", metavar="NAME", help="column with the language of a row's captions")
    add("--split-column", metavar="NAME", help="column with the split")
    add("--language", metavar="CODE", help="language of captions whose script does not tell")


def read_options(args: argparse.Namespace) -> ReadOptions:
    """What was given of them."""
    return ReadOptions(
        format=args.format,
        images=args.images,
        image_column=args.image_column,
        caption_column=args.caption_column,
        language_column=args.language_column,
        split_column=args.split_column,
        language=args.language,
    )
