"""`mmt caption`: pictures in, captions out; any number of them."""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from mmtransformer.cli.many import ManyImages
from mmtransformer.cli.options import (
    add_generation_options,
    add_many_options,
    add_model_options,
    add_out_options,
    check_out_options,
    command_parser,
    generation_changes,
)
from mmtransformer.serialization.printable import counted, program, say
from mmtransformer.serialization.writing import check_place

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmtransformer.data.image_files import ImageFiles
    from mmtransformer.generation.captions import CaptionResult, PromptBuilder
    from mmtransformer.pipelines.caption_files import ResultFile
    from mmtransformer.pipelines.few_shot import FewShotPromptBuilder
    from mmtransformer.pipelines.image_captioner import ImageCaptioner
    from mmtransformer.pipelines.many_images import Said


def run(name: str, words: Sequence[str]) -> int:
    """Captions pictures; the exit code is 1 if some of them could not be used."""
    args = _parser(name).parse_args(list(words))
    _check(args)

    from mmtransformer.pipelines.framing import framed
    from mmtransformer.pipelines.many_images import CaptionJob, devices_of

    many = ManyImages(name, words, args.images, partial(_open, args) if args.out else None)
    images = many.images
    devices = devices_of(args.device, args.devices)
    languages = None if args.language is None else (args.language,)
    job = CaptionJob(partial(_start, args), images, languages, generation_changes(args), args.batch_size)
    heat = None
    if len(devices) == 1 and many.todo:
        model, prompt_builder = _start(args, devices[0])
        model.inference_model(prepack=len(images) > 1)  # prepacked weights pay from the second picture on
        results = job.here(model, prompt_builder, many.todo)
        heat = _Heatmaps(model, prompt_builder, Path(args.heatmap)) if args.heatmap else None
    else:
        results = job.on([str(device) for device in devices], many.todo)
    blank = 0

    def take(i: int, said: "Said") -> Iterable[str]:
        nonlocal blank
        blank += not any(caption.text.strip() for caption in said[0])
        captions = list(framed(said[0], args.prefix, args.suffix, plain=args.detokenize))
        if many.out:
            many.out.write(i, captions)
        if heat:
            heat.add(images.name(i), images.image(i), said[0][0])
        return () if many.out else _lines(images.name(i), captions, args.json, len(images))

    many.each(results, take, args.batch_size)
    if heat:
        heat.close()
    code = many.finish("captioned", "captions")
    if blank:
        why = "the model ended them at once, which --min-new-tokens N forbids, or wrote no letters: train it longer"
        say(f"{blank:,} of {counted(len(many.todo) - len(many.bad), 'caption')} without a word: {why}", file=sys.stderr)
    return code


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
    add_out_options(parser, "captions", text)
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
    check_out_options(args, "captions")


def _open(args: argparse.Namespace, images: "ImageFiles") -> "ResultFile":
    """Where captions go; a file that has these pictures' captions in another language is refused."""
    from mmtransformer.pipelines.caption_files import CAPTIONS, result_file
    from mmtransformer.pipelines.image_captioner import ImageCaptioner

    out = result_file(args.out, CAPTIONS, images, overwrite=args.overwrite)
    there = [code for i in range(len(images)) if (code := out.kind(i))]
    if args.language and (others := sorted({*there} - {args.language})):
        ImageCaptioner.from_pretrained(args.model, device=args.device).language(args.language)  # one that it knows
        count = counted(sum(code != args.language for code in there), "picture")
        raise ValueError(
            f"{args.out} holds captions in {', '.join(others)} of {count}, which would have none in {args.language}: "
            f"--overwrite writes them anew, or name another file"
        )
    return out


def _lines(name: str, captions: Sequence["CaptionResult"], as_json: bool, images: int) -> Iterator[str]:
    """What is printed of a picture."""
    from mmtransformer.pipelines.caption_files import CAPTIONS

    if as_json:
        yield CAPTIONS.json_line(name, captions)
        return
    for caption in captions:
        lead = f"{name}: " if images > 1 else ""
        tail = f"   ({caption.log_prob:.2f})" if len(captions) > 1 else ""
        yield f"{lead}{caption.text}{tail}"


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
    if args.language is None and len(known := model.tokenizer.languages) > 1:
        say(f"captions are in {known[0]}; --language says another ({', '.join(known[1:])})", file=sys.stderr)
    own = None if model.processor is None else model.processor.prompt
    if own and args.prompt is None and args.examples is None:
        say(f'captioned after "{own}"; --prompt says something else', file=sys.stderr)
    return model, model.prompt_builder(args.prompt, None if args.examples is None else _examples(model, args))


def _examples(model: "ImageCaptioner", args: argparse.Namespace) -> "FewShotPromptBuilder":
    """The examples of --examples: those to train on where the data names any, else all."""
    from mmtransformer.data.files.read_options import ReadOptions
    from mmtransformer.data.open_sources import open_pairs
    from mmtransformer.pipelines.few_shot import FewShotPromptBuilder, check_reader

    check_reader(model.model)
    known = model.tokenizer.languages
    try:
        source = open_pairs(args.examples, ReadOptions(val_fraction=0.0), splits=["train"], known_languages=known)
    except ValueError as error:
        if "--" not in str(error):
            raise
        way = f"repair them (`{program()} check {quote(args.examples)}` shows all), or make a CSV in UTF-8 of them"
        raise ValueError(f"--examples are read without the options of other commands: {way}. {error}") from error
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
        if model.model.heatmap_error:
            raise ValueError(f"--heatmap: {model.model.heatmap_error}; leave it out")
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
