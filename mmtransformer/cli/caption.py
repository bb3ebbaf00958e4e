"""`mmt caption`: pictures in, captions out; any number of them."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from mmtransformer.cli.options import (
    add_generation_options,
    add_many_options,
    add_model_options,
    command_parser,
    generation_changes,
    progress_bar,
)
from mmtransformer.serialization.printable import counted, printable, say
from mmtransformer.serialization.writing import check_place

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmtransformer.data.image_files import ImageFiles
    from mmtransformer.generation.captions import CaptionResult, PromptBuilder
    from mmtransformer.pipelines.caption_files import CaptionFile
    from mmtransformer.pipelines.few_shot import FewShotPromptBuilder
    from mmtransformer.pipelines.image_captioner import ImageCaptioner


def run(name: str, words: Sequence[str]) -> int:
    """Captions pictures; the exit code is 1 if some of them could not be used."""
    args = _parser(name).parse_args(list(words))
    _check(args)
    options = [word for word in words if word not in ("--", *args.images)]

    from mmtransformer.data.image_files import ImageFiles
    from mmtransformer.images import ImageError
    from mmtransformer.pipelines.caption_files import caption_file, framed, write_bad
    from mmtransformer.pipelines.many_images import CaptionJob, devices_of

    images = ImageFiles(places(args.images))
    if not len(images):
        raise ValueError("the list names no picture")
    out = caption_file(args.out, images, overwrite=args.overwrite) if args.out else None
    todo = [i for i in range(len(images)) if out is None or not out.has(i)]
    devices = devices_of(args.device, args.devices)
    languages = None if args.language is None else (args.language,)
    job = CaptionJob(partial(_start, args), images, languages, generation_changes(args), args.batch_size)
    heat = None
    if len(devices) == 1 and todo:
        model, prompt_builder = _start(args, devices[0])
        model.inference_model(prepack=len(images) > 1)  # prepacked weights pay from the second picture on
        results = job.here(model, prompt_builder, todo)
        heat = _Heatmaps(model, prompt_builder, Path(args.heatmap)) if args.heatmap else None
    else:
        results = job.on([str(device) for device in devices], todo)
    bad: dict[str, str] = {}
    blank = 0
    with progress_bar(len(todo), shown=len(todo) > args.batch_size) as bar:
        for done, (i, said) in enumerate(results, 1):
            if isinstance(said, ImageError):
                kept = "; its earlier caption stays" if out and out.keeps(i) else ""
                bad[images.name(i)] = f"{said}{kept}"
                if len(images) > 1:  # a lone one is told below
                    bar.write(printable(f"mmt {name}: {said}{kept}"), file=sys.stderr)
            else:
                blank += not any(caption.text.strip() for caption in said[0])
                captions = list(framed(said[0], args.prefix, args.suffix, plain=args.detokenize))
                if out:
                    out.write(i, captions)
                else:
                    bar.write("\n".join(_lines(images.name(i), captions, args.json, len(images))), file=sys.stdout)
                if heat:
                    heat.add(images.name(i), images.image(i), said[0][0])
            bar.update()
            if done % args.batch_size == 0:
                sys.stdout.flush()
    if heat:
        heat.close()
    if out:
        write_bad(out.bad_list, map(images.name, range(len(images))), bad)
    if len(bad) == len(images):
        first, more = next(iter(bad.values())), len(bad) - 1
        raise ValueError(first + (f"; nor can {counted(more, 'other picture')} be used" if more else ""))
    if blank:
        why = "the model ended them at once, which --min-new-tokens N forbids, or wrote no letters: train it longer"
        say(f"{blank:,} of {counted(len(todo) - len(bad), 'caption')} without a word: {why}", file=sys.stderr)
    if len(images) > 1 or out:
        say(_summary(options, out, images, len(todo), bad), file=sys.stderr)
    return 1 if bad else 0


def _parser(name: str) -> argparse.ArgumentParser:
    parser = command_parser(name)
    add_model_options(parser, precision=True)
    add = parser.add_argument
    text = "pictures, folders (with subfolders), patterns, zips, tars; @FILE is a list of them, - one on stdin"
    add("images", nargs="+", metavar="IMAGE", help=text)
    add("--prompt", metavar="TEXT", help="words that a public model captions after, in place of its own")
    add("--language", metavar="CODE", help="language of the captions, such as ko")
    add("--examples", metavar="DIR", help="pictures with captions, to be shown to the model as examples")
    add("--num-shots", type=int, metavar="N", help="examples before each picture (4)")
    add("--nearest", action="store_true", help="choose the examples that are most like the picture, not random ones")
    add("--json", action="store_true", help="print one line of JSON per picture")
    add("--heatmap", metavar="OUT.png", help="draw where the model looked for each word (or OUT.html)")
    add(
        "--restrict-vocabulary",
        metavar="FILE",
        help="write only tokens of this text, such as a training's captions: faster",
    )
    text = "FILE.jsonl, FILE.csv, FOLDER/ for one text file per picture, or txt or caption for text files next to them"
    add("--out", metavar="OUT", help=f"write the captions: {text}; pictures that have captions there are skipped")
    add("--overwrite", action="store_true", help="caption again what has captions in OUT")
    add("--detokenize", action="store_true", help="remove spaces before points and commas, where a model writes them")
    add("--prefix", default="", metavar="TEXT", help="words before every caption")
    add("--suffix", default="", metavar="TEXT", help="words after every caption")
    add_many_options(parser, batch_size=16)
    add_generation_options(parser)
    return parser


def _check(args: argparse.Namespace) -> None:
    """Refuses options that cannot be, or would do nothing."""
    if args.heatmap and Path(args.heatmap).suffix.lower() not in (".png", ".html"):
        raise ValueError(
            f"--heatmap {args.heatmap}: a heat map is a picture or a page; let the name end in .png or .html"
        )
    if args.heatmap:
        check_place(args.heatmap, "--heatmap")
    if args.heatmap and args.devices > 1:
        raise ValueError("--heatmap is drawn by one process: leave out --devices")
    if args.examples is None and (args.num_shots is not None or args.nearest):
        raise ValueError("--num-shots and --nearest need examples to choose from: --examples FOLDER")
    if args.overwrite and not args.out:
        raise ValueError("--overwrite writes captions anew, and none are written: --out OUT")
    if args.json and args.out:
        raise ValueError("--json prints captions, and --out writes them: take --out FILE.jsonl alone")


def places(words: Sequence[str]) -> Iterator[str]:
    """The pictures and folders that words of a command line name, lists (@list.txt, - for the standard input) read."""
    from mmtransformer.data.image_files import listed

    for word in words:
        if word == "-":
            yield from listed(sys.stdin.buffer.read(), "the standard input")
        elif word.startswith("@") and not Path(word).exists():
            yield from listed(Path(word[1:]).read_bytes(), word[1:])
        elif Path(word).suffix.lower() == ".txt" and Path(word).is_file():
            raise ValueError(f"{word}: not a picture but a text; if it lists pictures, write @{word}")
        else:
            yield word


def _lines(name: str, captions: Sequence["CaptionResult"], as_json: bool, images: int) -> Iterator[str]:
    """What is printed of a picture."""
    from mmtransformer.pipelines.caption_files import json_line

    if as_json:
        yield json_line(name, captions)
        return
    for caption in captions:
        lead = f"{name}: " if images > 1 else ""
        tail = f"   ({caption.log_prob:.2f})" if len(captions) > 1 else ""
        yield printable(f"{lead}{caption.text}{tail}")


def _summary(
    options: Sequence[str], out: "CaptionFile | None", images: "ImageFiles", todo: int, bad: dict[str, str]
) -> str:
    """What was done, in a line; and what does the rest, with the options of this call."""
    parts = [f"{counted(todo - len(bad), 'picture')} captioned" + (f" in {out.where}" if out else "")]
    if len(images) > todo:
        parts.append(f"{len(images) - todo:,} had captions there already (--overwrite captions them anew)")
    if images.others:
        parts.append(f"{counted(images.others, 'other file')} left alone")
    if bad:
        again = " ".join(map(quote, ("mmt", "caption", f"@{out.bad_list}", *options))) if out else ""
        listed = f": {out.bad_list} names them (`{again}` tries them again)" if out else ""
        parts.append(f"{len(bad):,} could not be used{listed}")
    return "; ".join(parts)


def _start(args: argparse.Namespace, device: str | None) -> "tuple[ImageCaptioner, PromptBuilder | None]":
    """The model on a device, and its prompts."""
    from mmtransformer.pipelines.image_captioner import ImageCaptioner

    model = ImageCaptioner.from_pretrained(args.model, device=device, precision=args.precision)
    if args.restrict_vocabulary:
        from mmtransformer.pipelines.vocabulary import restrict_vocabulary

        try:
            texts = Path(args.restrict_vocabulary).read_text("utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"--restrict-vocabulary {args.restrict_vocabulary} is no text in UTF-8 ({error.reason})"
            ) from error
        left = restrict_vocabulary(model, filter(str.strip, texts))
        say(f"{left:,} of {model.tokenizer.vocab_size:,} tokens are left to write", file=sys.stderr)
    own = None if model.processor is None else model.processor.prompt
    if own and args.prompt is None and args.examples is None:
        say(f'captioned after "{own}"; --prompt says something else', file=sys.stderr)
    return model, model.prompt_builder(args.prompt, None if args.examples is None else _examples(model, args))


def _examples(model: "ImageCaptioner", args: argparse.Namespace) -> "FewShotPromptBuilder":
    """The examples of --examples: those to train on where the data names any, else all."""
    from mmtransformer.data.files.read_options import ReadOptions
    from mmtransformer.data.opening import open_pairs
    from mmtransformer.pipelines.few_shot import FewShotPromptBuilder

    source = open_pairs(args.examples, ReadOptions(val_fraction=0.0), splits=["train"])
    splits = source.splits()
    return FewShotPromptBuilder(
        source.split("train" if "train" in splits else splits[0]),
        model.model,
        model.tokenizer,
        model.transform,
        num_shots=4 if args.num_shots is None else args.num_shots,
        choose="nearest" if args.nearest else "random",
        seed=args.seed or 0,
    )


class _Heatmaps:
    """One sheet a picture, OUT.png, OUT-2.png and so on; or one page for all."""

    def __init__(self, model: "ImageCaptioner", prompt_builder: "PromptBuilder | None", out: Path) -> None:
        if not model.model.has_heatmaps:
            kind = type(model.model).__name__
            raise ValueError(f"--heatmap: there are no heat maps of a {kind} that runs in transformers: leave it out")
        self.model, self.prompt_builder, self.out = model, prompt_builder, out
        self.cards, self.seen = [], 0

    def add(self, name: str, image: "Image", best: "CaptionResult") -> None:
        """Draws one picture's."""
        from mmtransformer.plots import Card, CardCaption, grid_box, plot_word_heatmaps, save_image

        self.seen += 1
        words = [word for word, _ in best.words]
        if not words:
            say(f"{name}: the caption has no word to draw", file=sys.stderr)
            return
        box = grid_box(image.size, self.model.transform.size, self.model.transform.resize)
        heat = self.model.heatmap(image, best, self.prompt_builder)
        if self.out.suffix.lower() == ".html":
            image.thumbnail((448, 448))  # of many pictures the page keeps no more
            said = CardCaption(best.text, best.language, words=words, heat=heat, box=box)
            self.cards.append(Card(image, [said], heading=name))
            return
        sheet = self.out if self.seen == 1 else self.out.with_name(f"{self.out.stem}-{self.seen}{self.out.suffix}")
        save_image(plot_word_heatmaps(image, words, heat, box=box, title=best.text), sheet)
        say(f"{sheet}: where the model looked in {name}", file=sys.stderr)

    def close(self) -> None:
        """Writes the page."""
        from mmtransformer.plots import save_html_gallery

        if self.cards:
            save_html_gallery(self.cards, self.out, title="Where the model looked")
            say(f"{self.out}: where the model looked in {counted(len(self.cards), 'picture')}", file=sys.stderr)
