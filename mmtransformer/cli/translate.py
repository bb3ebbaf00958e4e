"""`mmt translate`: texts in, translations out."""

import argparse
import json
import sys
from collections.abc import Sequence

from mmtransformer.cli.generation_options import add_generation_options, generation_changes
from mmtransformer.text.printable import printable

ABOUT_IMAGES = ("guidance_scale", "force_words", "mark_images")


def run(name: str, words: Sequence[str]) -> int:
    """Translates texts.

    Args:
        name: The command's name.
        words: The words after it.
    """
    parser = argparse.ArgumentParser(f"mmt {name}", description="Translate texts with a trained Transformer.")
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="texts; without any, lines are read from the input")
    parser.add_argument("--model", required=True, metavar="DIR", help="a model's folder, or its name on the hub")
    parser.add_argument("--language", required=True, metavar="CODE", help="the language to write, such as ko")
    parser.add_argument("--json", action="store_true", help="one line of JSON a text")
    parser.add_argument(
        "--attention", metavar="OUT.png", help="draw where the model looked in the first text for each token"
    )
    parser.add_argument("--device", help="cpu or cuda (a GPU if there is one)")
    add_generation_options(parser, without=("num_return_sequences", *ABOUT_IMAGES))
    args = parser.parse_args(list(words))

    from mmtransformer.pipelines.translator import Translator

    texts = args.texts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not texts:
        raise ValueError("there is nothing to translate: name a text, or pipe lines into the command")
    translator = Translator.from_pretrained(args.model, device=args.device)
    said = translator(texts, args.language, **generation_changes(args))
    for text, translation in zip(texts, said, strict=True):
        row = {"text": text, "language": args.language, "translation": translation}
        print(json.dumps(row, ensure_ascii=False) if args.json else printable(translation))
    if args.attention:
        from mmtransformer.plots import draw_attention, save_image

        queries, keys, weights = translator.attention_map(texts[0], said[0], args.language)
        named = {f"block {i}": block for i, block in enumerate(weights)}
        title = f"{texts[0]} → {said[0]}"
        save_image(draw_attention(named, queries, keys, title=title), args.attention)
    return 0
