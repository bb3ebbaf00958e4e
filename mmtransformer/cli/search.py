"""`mmt search`: pictures found by texts, by other pictures, and by each other."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from mmtransformer.cli.many import told_when_stopped
from mmtransformer.cli.options import add_model_options, command_parser
from mmtransformer.serialization.printable import counted, json_text, printable, say
from mmtransformer.serialization.writing import check_place

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmtransformer.pipelines.search.image_index import Duplicate, ImageIndex, Match
    from mmtransformer.plots.search_page import Found

PAGES, SHEETS = (".html", ".htm"), (".png", ".jpg", ".jpeg", ".webp")


def run(name: str, words: Sequence[str]) -> int:
    """Searches pictures; the exit code is 1 if some of them could not be used."""
    args = _parser(name).parse_args(list(words))
    _check(args)

    from mmtransformer.images import load

    for picture in args.like:  # before the index is made
        load(picture)
    index = _index(name, args)
    if args.duplicates:
        _show_groups(index, index.duplicates(args.threshold, progress=sys.stderr.isatty()), args)
    else:
        _show_found(index, index.search(args.texts, like=args.like, without=args.without, top_k=args.top_k), args)
    return 1 if index.changes.bad else 0


def _parser(name: str) -> argparse.ArgumentParser:
    parser = command_parser(name)
    add_model_options(parser)
    add = parser.add_argument
    add("texts", nargs="*", metavar="TEXT", help="what to look for; the vectors of several are added")
    text = "pictures: a file, a folder (with subfolders), a pattern, a zip or tar; may be repeated"
    add("--images", action="append", default=[], metavar="PLACE", help=text)
    text = "find pictures like this one; may be repeated, and combined with a text"
    add("--like", action="append", default=[], metavar="IMAGE", help=text)
    add("--not", action="append", default=[], dest="without", metavar="TEXT", help="what not to show; may be repeated")
    add("--duplicates", action="store_true", help="find pictures that are the same, or nearly so")
    text = "cosine from which two pictures are near duplicates; at 1 only files of the same bytes are (0.95)"
    add("--threshold", type=float, metavar="X", help=text)
    add("--top-k", type=int, metavar="N", help="pictures to show; with --duplicates, groups (20)")
    add("--json", action="store_true", help="print one line of JSON per picture or group")
    add("--out", metavar="OUT.html", help="show the answer as a page of pictures (or OUT.png, a sheet)")
    text = "the index's file, which knows its pictures; without it in the user's cache, never in the pictures' folders"
    add("--index-file", metavar="FILE.safetensors", help=text)
    add(
        "--no-update", action="store_true", help="answer from the index as it is, without checking for changed pictures"
    )
    add("--batch-size", type=int, default=32, metavar="N", help="pictures computed at once (32)")
    return parser


def _check(args: argparse.Namespace) -> None:
    """Refuses options that cannot be, or would do nothing."""
    from mmtransformer.pipelines.base import check_count

    if not (args.texts or args.like or args.duplicates):
        what = "--not takes off what is looked for, and nothing is" if args.without else "there is nothing to look for"
        raise ValueError(f"{what}: give a TEXT, --like IMAGE or --duplicates")
    if args.duplicates and (args.texts or args.like or args.without):
        raise ValueError("--duplicates compares the pictures with each other: leave out TEXT, --like and --not")
    if args.threshold is not None and not args.duplicates:
        raise ValueError("--threshold says how near duplicates are: it goes with --duplicates")
    args.threshold = 0.95 if args.threshold is None else args.threshold  # image_index.ALIKE, which waits for torch
    if not 0 < args.threshold <= 1:
        raise ValueError(f"--threshold must be above 0 and at most 1, not {args.threshold:g}")
    if any(not text.strip() for text in (*args.texts, *args.without)):
        raise ValueError("a text is empty, and would fit every picture: leave it out")
    args.top_k = 20 if args.top_k is None else args.top_k
    check_count("--top-k", args.top_k)
    check_count("--batch-size", args.batch_size)
    if args.out and Path(args.out).suffix.lower() not in PAGES + SHEETS:
        raise ValueError(f"--out {args.out}: the answer is a page or a picture; let the name end in .html or .png")
    if args.out:
        check_place(args.out, "--out")
    if args.index_file and Path(args.index_file).suffix != ".safetensors":
        raise ValueError(
            f"--index-file {args.index_file}: an index is a safetensors file; let the name end in .safetensors"
        )
    if args.index_file and Path(args.index_file).is_dir():
        raise ValueError(f"--index-file {args.index_file} is a folder; name a file in it")
    if not (args.images or args.index_file):
        raise ValueError("say where to look: --images PLACE, or --index-file FILE of an index that there is")
    if files := [place for place in args.images if place.endswith(".safetensors")]:
        raise ValueError(f"--images {files[0]} is an index, which knows its pictures: give it alone, as --index-file")


def _index(name: str, args: argparse.Namespace) -> "ImageIndex":
    """The index: made, brought up to date, or as it is."""
    from mmtransformer.images import ImageError
    from mmtransformer.pipelines.image_text_embedder import ImageTextEmbedder
    from mmtransformer.pipelines.search.image_index import ImageIndex, cached_path
    from mmtransformer.pipelines.search.index_update import fingerprint

    if not args.images and not Path(args.index_file).exists():
        raise ValueError(f"{args.index_file}: no such index; add --images FOLDER, which makes it")
    encoder = ImageTextEmbedder.from_pretrained(args.model, device=args.device)
    model = fingerprint(encoder)
    path = Path(args.index_file or cached_path(args.images, model))
    if args.no_update:
        if not path.exists():
            raise ValueError(
                f"--no-update: there is no index of {', '.join(args.images)} by this model yet; leave it out"
            )
        return ImageIndex.load(path, encoder, model=model)

    def refused(picture: str, error: ImageError) -> None:
        from tqdm import tqdm

        tqdm.write(printable(f"mmt {name}: {error}"), file=sys.stderr)

    options: dict[str, Any] = {"batch_size": args.batch_size, "progress": sys.stderr.isatty(), "on_error": refused}
    with told_when_stopped(
        lambda: f"before all was in the index: what is done is in {path}, and the same call goes on"
    ):
        if args.images:
            options |= {"path": path, "model": model, "model_name": str(args.model)}
            index = ImageIndex.build(encoder, args.images, **options)
        else:
            index = ImageIndex.load(path, encoder, model=model)
            index.update(**options)
    say(_summary(index), file=sys.stderr)
    return index


def _summary(index: "ImageIndex") -> str:
    """What the index holds and where it lies, in a line."""
    found = index.changes
    counts = {"new": found.new, "changed": found.changed, "gone": found.gone, "could not be used": len(found.bad)}
    counts["hidden and left out"] = found.hidden
    said = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
    return f"{counted(len(index), 'picture')}{f' ({said})' if said else ''}; index: {index.path}"


def _shown(path: str) -> str:
    """A path as it is seen from here."""
    try:
        return Path(path).relative_to(Path.cwd()).as_posix()
    except ValueError:
        return path


def _show_found(index: "ImageIndex", found: "Sequence[Match]", args: argparse.Namespace) -> None:
    if args.out:  # before anything is printed, which `head` may cut
        folder = Path(args.model)  # a run's is called "model"
        by = folder.resolve().parent.name if folder.name == "model" else folder.name
        _draw(index, [found], args, f"{counted(len(index), 'picture')}, by {by}")
    for rank, match in enumerate(found, 1):
        if args.json:
            row = {"rank": rank, "image": _shown(match.path), "score": round(match.score, 6)}
            say(json_text(row))
        else:
            say(f"{match.score:.3f}  {_shown(match.path)}")


def _show_groups(index: "ImageIndex", groups: "Sequence[Sequence[Duplicate]]", args: argparse.Namespace) -> None:
    count = sum(map(len, groups))
    more = f", of which {args.top_k:,} are shown (--top-k)" if len(groups) > args.top_k else ""
    said = f"{counted(len(groups), 'group')} of {counted(count, 'picture')} that are alike{more}"
    say(said, file=sys.stderr)
    if args.out:
        _draw(index, groups[: args.top_k], args, f"{said}; among {len(index):,}, cosines from {args.threshold:g}")
    for i, group in enumerate(groups[: args.top_k], 1):
        if args.json:
            rows = [{"image": _shown(x.path), "score": round(x.score, 6), "same_bytes": x.exact} for x in group]
            say(json_text({"group": i, "images": rows}))
            continue
        if i > 1:
            say()
        for one in group:
            say(f"{one.score:.3f}  {_shown(one.path)}{'  (same bytes)' if one.exact else ''}")


def _draw(index: "ImageIndex", groups: "Sequence[Sequence[Match]]", args: argparse.Namespace, hint: str) -> None:
    """The answer as a page or a sheet."""
    from mmtransformer.images import load
    from mmtransformer.plots.files import save_image
    from mmtransformer.plots.search_page import save_search_page

    out = Path(args.out)
    asked = [load(picture) for picture in args.like]
    title = " + ".join(args.texts) or ("Near duplicates" if args.duplicates else "Pictures like this")
    chips = [(f"without {text}", "bad") for text in args.without]
    found = [_founds(index, group, out) for group in groups]
    if out.suffix.lower() not in PAGES and not any(groups):
        say(f"{out}: not drawn, since nothing was found", file=sys.stderr)
        return
    if out.suffix.lower() in PAGES:
        save_search_page(found, out, title=title, chips=chips, asked=asked, hint=hint)
    else:
        save_image(_sheet([*found], title, hint), out)
    say(f"{out}: the answer in pictures", file=sys.stderr)


def _founds(index: "ImageIndex", group: "Sequence[Match]", out: Path) -> "list[Found]":
    """What is shown of a group, with small pictures."""
    from mmtransformer.images import ImageError
    from mmtransformer.plots.search_page import Found

    images, found = index.images(group), []
    for i, match in enumerate(group):
        try:
            image = images.image(i)
            image.thumbnail((480, 480))
        except ImageError as error:
            say(f"mmt search: {error}", file=sys.stderr)
            image = None
        link = ""
        if not images.in_archive(i):
            link = quote(Path(os.path.relpath(match.path, out.resolve().parent)).as_posix(), errors="surrogateescape")
        found.append(Found(image, match.name, match.score, link, "same bytes" if getattr(match, "exact", 0) else ""))
    return found


def _sheet(groups: "Sequence[Sequence[Found]]", title: str, subtitle: str) -> "Image":
    from PIL.Image import new

    from mmtransformer.plots.cards import Card, CardCaption
    from mmtransformer.plots.gallery import plot_gallery

    cards = []
    for n, group in enumerate(groups, 1):
        for rank, one in enumerate(group, 1):
            lead = f"{n}.{rank}" if len(groups) > 1 else f"{rank}"
            said = CardCaption(" · ".join(filter(None, (lead, f"{one.score:.3f}", one.mark))))
            cards.append(Card(one.image or new("RGB", (4, 3), "grey"), [said], heading=one.name))
    return plot_gallery(cards, columns=5, card_width=300, title=title, subtitle=subtitle)
