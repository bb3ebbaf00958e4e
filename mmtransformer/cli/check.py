"""`mmt check`: what is wrong with image-text pairs, or pictures in folders of classes, before any training."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmtransformer.cli.options import add_read_options, command_parser, read_options
from mmtransformer.serialization.printable import say
from mmtransformer.serialization.writing import check_place

if TYPE_CHECKING:
    from mmtransformer.data.class_sources import ImageFolder


def run(name: str, words: Sequence[str]) -> int:
    """Looks at pairs; the exit code is 1 if training would be hurt."""
    parser = command_parser(name)
    add = parser.add_argument
    add(
        "root", metavar="ROOT", help="a folder, an archive, one manifest or documents.jsonl, or a pattern of tar shards"
    )
    add("--model", metavar="DIR", help="count tokens with this model's tokenizer")
    add("--max-len", type=int, default=64, metavar="N", help="most tokens of a caption (64)")
    add("--max-bad-fraction", type=float, default=0.01, metavar="X", help="share that is tolerable (0.01)")
    add("--out", metavar="OUT.json", help="write what was found to this file")
    add_read_options(parser)
    args = parser.parse_args(list(words))
    if args.out:
        check_place(args.out, "--out")

    import sys

    from mmtransformer.data.check import check, check_classes
    from mmtransformer.data.files.read_options import ReadOptions
    from mmtransformer.data.open_sources import open_pairs
    from mmtransformer.pipelines.base import write_json
    from mmtransformer.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_pretrained(args.model) if args.model else None
    known = () if tokenizer is None else tokenizer.languages
    source = open_pairs(args.root, read_options(args), max_bad_fraction=1.0, known_languages=known)
    terminal = sys.stderr.isatty()
    bare = source.report is not None and {*source.report.errors} == {"no caption file"} and not source.splits()
    plain = tokenizer is None and read_options(args) == ReadOptions()
    if bare and plain and (classes := _classes(args.root)) is not None:
        say(f"{args.root} holds no captions: looked at as classes by their folders (mmt fit --config vit_classify)\n")
        report = check_classes(classes, max_bad_fraction=args.max_bad_fraction, progress=terminal)
    else:
        report = check(
            source, tokenizer=tokenizer, max_len=args.max_len, max_bad_fraction=args.max_bad_fraction, progress=terminal
        )
    say(str(report))
    if args.out:
        write_json(Path(args.out), report.to_dict())
    return 1 if report.hurts else 0


def _classes(root: str) -> "ImageFolder | None":
    """A folder of folders of pictures; None if it is not divided into classes."""
    from mmtransformer.data.class_sources import ImageFolder

    try:
        return ImageFolder(root)
    except (ValueError, OSError):
        return None
