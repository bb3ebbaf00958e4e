"""`mmt classify`: pictures in, classes out."""

import json
from collections.abc import Sequence

from mmtransformer.cli.options import add_model_options, command_parser
from mmtransformer.text.printable import printable


def run(name: str, words: Sequence[str]) -> int:
    """Classifies pictures."""
    parser = command_parser(name)
    add_model_options(parser)
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="picture files")
    add("--top", type=int, default=1, metavar="N", help="classes a picture (1)")
    add("--json", action="store_true", help="one line of JSON a picture")
    add("--attention", metavar="OUT.png", help="draw what the model gathered of the first picture, block by block")
    args = parser.parse_args(list(words))

    from mmtransformer.images import load
    from mmtransformer.pipelines.classifier import ImageClassifier

    images = [load(path) for path in args.images]
    classifier = ImageClassifier.from_pretrained(args.model, device=args.device)
    for path, best in zip(args.images, classifier(images, top=args.top), strict=True):
        if args.json:
            row = {"image": path, "classes": [{"class": label, "share": share} for label, share in best]}
            print(json.dumps(row, ensure_ascii=False))
        else:
            told = ", ".join(f"{label} {share:.1%}" for label, share in best)
            print(printable(f"{path}: {told}" if len(args.images) > 1 else told))
    if args.attention:
        from mmtransformer.plots import draw_rollout, save_image

        sheet = draw_rollout(classifier.vit, images[0], classifier.transform, title=args.images[0])
        save_image(sheet, args.attention)
    return 0
