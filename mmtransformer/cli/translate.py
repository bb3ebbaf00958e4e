"""`mmt translate`: texts in, translations out."""

import json
import sys
from collections.abc import Sequence

from mmtransformer.cli.options import add_generation_options, add_model_options, command_parser, generation_changes
from mmtransformer.text.printable import printable

ABOUT_IMAGES = ("guidance_scale", "force_words", "mark_images")


def run(name: str, words: Sequence[str]) -> int:
    """Translates texts."""
    parser = command_parser(name)
    add_model_options(parser)
    add = parser.add_argument
    add("texts", nargs="*", metavar="TEXT", help="texts; without any, lines are read from the input")
    add("--language", required=True, metavar="CODE", help="the language to write, such as ko")
    add("--json", action="store_true", help="one line of JSON a text")
    add("--attention", metavar="OUT.png", help="draw where the model looked in the first text for each token")
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
