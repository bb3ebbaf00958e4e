"""`mmt draw`: texts in, pictures out."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from mmtransformer.cli.options import add_model_options, check_image_file, command_parser
from mmtransformer.serialization.printable import say


def run(name: str, words: Sequence[str]) -> int:
    """Draws pictures."""
    parser = command_parser(name)
    add_model_options(parser)
    add = parser.add_argument
    add("texts", nargs="+", metavar="TEXT", help="what to draw")
    add(
        "--out",
        default="picture.png",
        metavar="OUT.png",
        help="file to write (picture.png); further pictures get -2, -3 ... before the ending",
    )
    add("--num-images", type=int, default=1, metavar="N", help="pictures per text (1)")
    add("--seed", type=int, default=0, help="seed of the first picture (0)")
    add("--language", metavar="CODE", help="language of the texts (detected by their letters)")
    add(
        "--num-inference-steps",
        type=int,
        metavar="N",
        help="solver steps from noise to picture, such as 20 (the model's own number)",
    )
    add(
        "--guidance-scale",
        type=float,
        metavar="SCALE",
        help="classifier-free guidance: how much more the picture follows the text; 1 = none",
    )
    add("--solver", choices=("euler", "heun", "dpm"), help="how steps are computed (the model's own)")
    add("--negative-prompt", metavar="TEXT", help="what the picture should not show")
    add("--image", metavar="IMAGE", help="a picture to begin with instead of noise")
    add("--strength", type=float, metavar="X", help="how far from --image, above 0 and at most 1 (0.6)")
    add("--mask-image", metavar="IMAGE", help="where to draw in --image: white is drawn anew, black is kept")
    add("--strip", metavar="OUT.png", help="draw the steps of the first picture from noise side by side, or as OUT.gif")
    add("--heatmap", metavar="OUT.png", help="draw where in its picture each word of the first text had its effect")
    args = parser.parse_args(list(words))
    if not all(map(str.strip, args.texts)):
        raise ValueError("a text is empty, and says nothing to draw: leave it out")
    if args.image is None and (args.strength is not None or args.mask_image is not None):
        parser.error("--strength and --mask-image need a picture to begin with: --image IMAGE")
    for option in ("out", "strip", "heatmap"):
        if place := getattr(args, option):
            check_image_file(place, f"--{option}", (".gif",) if option == "strip" else ())
    changes = {
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "solver": args.solver,
    }
    changes = {key: value for key, value in changes.items() if value is not None}

    from mmtransformer.pipelines.image_generator import ImageGenerator
    from mmtransformer.plots.files import save_image
    from mmtransformer.plots.strips import save_strip

    painter = ImageGenerator.from_pretrained(args.model, device=args.device)
    generation = dataclasses.replace(painter.generation, **changes)
    how = {name: getattr(args, name) for name in ("language", "negative_prompt", "image", "strength", "mask_image")}
    how |= {"seed": args.seed, "generation": generation}
    steps: list = []
    drawn = painter(
        args.texts,
        num_images=args.num_images,
        **how,
        on_step=(lambda _, images: steps.append(images[0])) if args.strip else None,
    )
    out = Path(args.out)
    for k, image in enumerate(image for images in drawn for image in images):
        path = out if k == 0 else out.with_name(f"{out.stem}-{k + 1}{out.suffix}")
        say(str(save_image(image, path)))
    if args.strip:
        save_strip(steps[: generation.num_inference_steps], args.strip)
        say(f"{args.strip}: out of the noise, step by step", file=sys.stderr)
    if args.heatmap:
        from mmtransformer.plots import plot_word_heatmaps

        text, scale = args.texts[0], "of a patch's attention on one word"
        image, found, heat = painter.heatmap(text, **how)
        save_image(plot_word_heatmaps(image, found, heat.mean(0), title=text, scale=scale), args.heatmap)
        say(f"{args.heatmap}: where each word steered the picture", file=sys.stderr)
    return 0
