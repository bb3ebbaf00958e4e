"""`mmt caption`: pictures in, captions out."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmtransformer.cli.options import add_generation_options, add_model_options, command_parser, generation_changes
from mmtransformer.text.printable import printable

if TYPE_CHECKING:
    from mmtransformer.pipelines.few_shot import FewShot
    from mmtransformer.pipelines.image_captioner import ImageCaptioner

SHOWN = ("text", "language", "log_prob", "tokens", "token_log_probs", "finished")
"""Of a caption, in a line of JSON."""


def run(name: str, words: Sequence[str]) -> int:
    """Captions pictures."""
    parser = command_parser(name)
    add_model_options(parser, precision=True)
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="picture files")
    add("--language", metavar="CODE", help="language of the captions, such as ko")
    add("--examples", metavar="DIR", help="pictures with captions, to be shown to the model as examples")
    add("--num-examples", type=int, metavar="N", help="examples before each picture (4)")
    add("--nearest", action="store_true", help="choose the examples that are most like the picture, not any")
    add("--json", action="store_true", help="one line of JSON a picture")
    add("--heatmap", metavar="OUT.png", help="draw where the model looked for each word (or OUT.html)")
    add_generation_options(parser)
    args = parser.parse_args(list(words))

    from mmtransformer.images import load
    from mmtransformer.pipelines.image_captioner import ImageCaptioner

    if args.heatmap and Path(args.heatmap).suffix.lower() not in (".png", ".html"):
        raise ValueError(
            f"--heatmap {args.heatmap}: a heat map is a picture or a page; let the name end in .png or .html"
        )
    if args.examples is None and (args.num_examples is not None or args.nearest):
        raise ValueError("--num-examples and --nearest need examples to choose from: --examples FOLDER")
    images = [load(path) for path in args.images]
    model = ImageCaptioner.from_pretrained(args.model, device=args.device, precision=args.precision)
    prompts = None if args.examples is None else _examples(model, args)
    results = model(images, language=args.language, prompts=prompts, **generation_changes(args))
    for path, captions in zip(args.images, results, strict=True):
        if args.json:
            said = [{key: getattr(caption, key) for key in SHOWN} for caption in captions]
            print(json.dumps({"image": path, "captions": said}, ensure_ascii=False))
            continue
        for caption in captions:
            lead = f"{path}: " if len(args.images) > 1 else ""
            tail = f"   ({caption.log_prob:.2f})" if len(captions) > 1 else ""
            print(printable(f"{lead}{caption.text}{tail}"))
    if args.heatmap:
        _heatmaps(model, args.images, images, results, Path(args.heatmap), prompts)
    return 0


def _examples(model: "ImageCaptioner", args: argparse.Namespace) -> "FewShot":
    """The examples of --examples: those to train on where the data names any, else all."""
    from mmtransformer.data.files.read_options import ReadOptions
    from mmtransformer.data.opening import open_pairs
    from mmtransformer.pipelines.few_shot import FewShot

    source = open_pairs(args.examples, ReadOptions(val_fraction=0.0))
    splits = source.splits()
    return FewShot(
        source.split("train" if "train" in splits else splits[0]),
        model.captioner,
        model.tokenizer,
        model.transform,
        num_examples=4 if args.num_examples is None else args.num_examples,
        choose="nearest" if args.nearest else "random",
        seed=args.seed or 0,
    )


def _heatmaps(
    model: "ImageCaptioner", paths: list[str], images: list, results: list, out: Path, prompts: "FewShot | None"
) -> None:
    """One sheet a picture, OUT.png, OUT-2.png and so on; or one page for all."""
    import sys

    from mmtransformer.plots import Card, CardCaption, draw_word_heatmaps, grid_box, save_html_gallery, save_image

    cards = []
    for i, (path, image, captions) in enumerate(zip(paths, images, results, strict=True)):
        box, best = grid_box(image.size, model.transform.size, model.transform.resize), captions[0]
        words = [word for word, _ in best.words]
        if not words:
            print(f"{path}: the caption has no word to draw", file=sys.stderr)
            continue
        heat = model.heatmap(image, best, prompts)
        if out.suffix.lower() == ".html":
            said = CardCaption(best.text, best.language, words=words, heat=heat, box=box)
            cards.append(Card(image, [said], heading=path))
            continue
        sheet = out if i == 0 else out.with_name(f"{out.stem}-{i + 1}{out.suffix}")
        save_image(draw_word_heatmaps(image, words, heat, box=box, title=best.text), sheet)
        print(f"{sheet}: where the model looked in {path}", file=sys.stderr)
    if cards:
        save_html_gallery(cards, out, title="Where the model looked")
        print(f"{out}: where the model looked; point at a word", file=sys.stderr)
