"""`mmt classify`: pictures in, classes out."""

import argparse
import json
from collections.abc import Sequence

from mmtransformer.text.printable import printable


def run(name: str, words: Sequence[str]) -> int:
    """Classifies pictures.

    Args:
        name: The command's name.
        words: The words after it.
    """
    parser = argparse.ArgumentParser(f"mmt {name}", description="Classify pictures with a trained ViT.")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="picture files")
    parser.add_argument("--model", required=True, metavar="DIR", help="a model's folder, or its name on the hub")
    parser.add_argument("--top", type=int, default=1, metavar="N", help="classes a picture (1)")
    parser.add_argument("--json", action="store_true", help="one line of JSON a picture")
    parser.add_argument(
        "--attention", metavar="OUT.png", help="draw what the model gathered of the first picture, block by block"
    )
    parser.add_argument("--device", help="cpu or cuda (a GPU if there is one)")
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
