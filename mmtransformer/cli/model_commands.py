"""`mmt classify`, `translate`, `export`, `parity` and `rehash`: what else is done with saved models."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mmtransformer.cli.many import ManyImages
from mmtransformer.cli.options import (
    add_generation_options,
    add_model_options,
    add_out_options,
    check_image_file,
    check_out_options,
    command_parser,
    generation_changes,
)
from mmtransformer.serialization.printable import json_text, say
from mmtransformer.serialization.writing import whole_folder

if TYPE_CHECKING:
    from mmtransformer.pipelines.classifier import Classes

_BATCH = 16  # pictures that are classified at once

ABOUT_IMAGES = ("guidance_scale", "force_words", "add_image_tokens")


def run(name: str, words: Sequence[str]) -> int:
    """Runs one of the five."""
    commands = {"classify": _classify, "translate": _translate, "export": _export, "parity": _parity, "rehash": _rehash}
    return commands[name](name, words)


def _classify(name: str, words: Sequence[str]) -> int:
    parser = command_parser(name)
    add_model_options(parser)
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="pictures, folders, patterns, zips, tars; @list.txt or - for a list")
    add("--top-k", type=int, default=1, metavar="N", help="classes per picture (1)")
    add("--json", action="store_true", help="print one line of JSON per picture")
    add_out_options(parser, "classes", "FILE.jsonl or FILE.csv")
    add(
        "--heatmap",
        metavar="OUT.png",
        help="draw which parts of the first picture each block attends to (attention rollout)",
    )
    args = parser.parse_args(list(words))
    check_out_options(args, "classes")
    if args.heatmap:
        check_image_file(args.heatmap, "--heatmap")

    from mmtransformer.pipelines.caption_files import CLASSES, result_file
    from mmtransformer.pipelines.classifier import ImageClassifier

    open_file = partial(result_file, args.out, CLASSES, overwrite=args.overwrite) if args.out else None
    many = ManyImages(name, words, args.images, open_file)
    images, first = many.images, -1
    classifier = ImageClassifier.from_pretrained(args.model, device=args.device)
    if many.out:
        there = {" ".join(many.out.kind(i).split()) for i in range(len(images)) if many.out.has(i)}
        if others := sorted(there - {" ".join(label.split()) for label in ("", *classifier.classes)}):
            raise ValueError(
                f"{args.out} holds classes of these pictures that {args.model} does not know "
                f"({', '.join(others[:3])}): --overwrite writes them anew, or name another file"
            )

    def take(i: int, classes: "Classes") -> Iterable[str]:
        nonlocal first
        first = i if first < 0 else first
        if many.out:
            many.out.write(i, classes)
            return
        told = ", ".join(f"{label} {share:.1%}" for label, share in classes)
        told = f"{images.name(i)}: {told}" if len(images) > 1 else told
        yield CLASSES.json_line(images.name(i), classes) if args.json else told

    many.each(classifier.stream(many.todo, images.image, top_k=args.top_k, batch_size=_BATCH), take, _BATCH)
    if args.heatmap and first >= 0:
        from mmtransformer.plots import plot_rollout, save_image

        sheet = plot_rollout(classifier.model, images.image(first), classifier.transform, title=images.name(first))
        save_image(sheet, args.heatmap)
    return many.finish("classified", "classes")


def _translate(name: str, words: Sequence[str]) -> int:
    parser = command_parser(name)
    add_model_options(parser)
    add = parser.add_argument
    add("texts", nargs="*", metavar="TEXT", help="texts; without any, lines of standard input")
    add("--language", required=True, metavar="CODE", help="the language to write, such as ko")
    add("--json", action="store_true", help="print one line of JSON per text")
    add("--attention", metavar="OUT.png", help="draw where the model looked in the first text for each token")
    add_generation_options(parser, without=("num_return_sequences", *ABOUT_IMAGES))
    args = parser.parse_args(list(words))
    if args.attention:
        check_image_file(args.attention, "--attention")

    from mmtransformer.pipelines.translator import Translator

    texts = args.texts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not texts:
        raise ValueError("there is nothing to translate: name a text, or pipe lines into the command")
    if not all(map(str.strip, texts)):
        raise ValueError("a text is empty, and there is nothing to translate: leave it out")
    if file := next((text for text in args.texts if _is_file(text)), None):
        raise ValueError(f"{file} is a file, not a text: mmt translate ... < {file} translates its lines")
    translator = Translator.from_pretrained(args.model, device=args.device)
    said = translator(texts, args.language, **generation_changes(args))
    for text, translation in zip(texts, said, strict=True):
        row = {"text": text, "language": args.language, "translation": translation}
        say(json_text(row) if args.json else translation)
    if args.attention:
        from mmtransformer.plots import plot_attention, save_image

        queries, keys, weights = translator.attention_map(texts[0], said[0], args.language)
        named = {f"block {i}": block for i, block in enumerate(weights)}
        title = f"{texts[0]} → {said[0]}"
        save_image(plot_attention(named, queries, keys, title=title), args.attention)
    return 0


def _export(name: str, words: Sequence[str]) -> int:
    parser = command_parser(name)
    add = parser.add_argument
    _add_model(parser, "a captioner's folder, or its name on the hub")
    add("--to", choices=("transformers", "open_clip"), help="the library that is to read it (the family's own)")
    add("out", nargs="?", metavar="OUT", help="the folder to write")
    add("--family", metavar="NAME", help="which family to write it as, where a captioner of this library fits several")
    args = parser.parse_intermixed_args(list(words))  # MODEL --to transformers OUT
    if args.out is None and args.model is not None:  # the only word is where to
        args.place, args.out = None, args.place
    if args.out is None:
        parser.error("the folder to write is missing: mmt export MODEL OUT")
    args.model = _model(parser, args)

    from mmtransformer.pipelines.image_captioner import ImageCaptioner
    from mmtransformer.weights.captioner_folders import FAMILIES, captioner_family, export_captioner

    model = ImageCaptioner.from_pretrained(args.model, device="cpu")
    out = Path(args.out)
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise ValueError(f"{out} is there already: name a folder that is new or empty")
    if model.processor is None:
        with whole_folder(out) as folder:
            parts = model.model, model.tokenizer, model.transform
            family = export_captioner(*parts, folder, args.family, reader=args.to)
        say(f"{out}: a {family}, as {FAMILIES[family].reader} reads it")
        return 0
    if args.family is not None:
        raise ValueError(f"--family {args.family}: {args.model} is written as what it came as; leave it out")
    assert model.processor.folder is not None
    family = captioner_family(model.processor.folder)
    assert family is not None
    if args.to not in (None, family.reader):
        raise ValueError(f"--to {args.to}: {args.model} is of a family that {family.reader} reads; leave it out")
    with whole_folder(out) as folder:
        model.save_pretrained(folder)
    say(f"{out}: as {family.reader} reads it")
    return 0


def _add_model(parser: argparse.ArgumentParser, text: str) -> None:
    """The model as the first word, or behind `--model` as in other commands."""
    parser.add_argument("place", nargs="?", metavar="MODEL", help=text)
    parser.add_argument("--model", metavar="DIR", help="the same, as other commands take it")


def _model(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    given = [word for word in (args.model, args.place) if word is not None]
    if not given:
        parser.error("a model is needed, as the first word or behind --model")
    if len(given) > 1:
        parser.error("the model is there twice, as the first word and behind --model: leave one out")
    return given[0]


def _rehash(name: str, words: Sequence[str]) -> int:
    parser = command_parser(name)
    _add_model(parser, "the model's folder: the check sum in its config.json becomes that of its weights")
    model = _model(parser, parser.parse_args(list(words)))

    from mmtransformer.serialization.pretrained import rehash

    say(f"{model}: the check sum of its weights is now {rehash(model)}")
    return 0


def _parity(name: str, words: Sequence[str]) -> int:
    parser = command_parser(name)
    add = parser.add_argument
    _add_model(parser, "a public captioner's folder, or its name on the hub; it is loaded twice")
    add("images", nargs="*", metavar="IMAGE", help="picture files (three that the library draws)")
    add("--prompt", metavar="TEXT", help="the prompt (the family's own)")
    add("--max-new-tokens", type=int, default=20, metavar="N", help="most new tokens (20)")
    add("--num-beams", type=int, default=3, metavar="N", help="beams of the second search; the first is greedy (3)")
    args = parser.parse_intermixed_args(list(words))
    if args.model is not None and args.place is not None:  # all places are pictures
        args.images.insert(0, args.place)
        args.place = None
    args.model = _model(parser, args)

    from mmtransformer.pipelines.parity import compare

    sizes = {"max_new_tokens": args.max_new_tokens, "num_beams": args.num_beams}
    report = compare(args.model, args.images, prompt=args.prompt, **sizes)
    say(report.table())
    return 0 if report.equal else 1


def _is_file(text: str) -> bool:
    with suppress(OSError, ValueError):  # too long for a name, or with signs that none has
        return Path(text).is_file()
    return False
