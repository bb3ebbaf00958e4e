"""`mmt evaluate`: a trained model's captions of a split, scored."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from mmtransformer.cli.check import add_read_options, read_options
from mmtransformer.cli.generation_options import add_generation_options, generation_changes


def run(name: str, words: Sequence[str]) -> int:
    """Scores a model.

    Args:
        name: The command's name.
        words: The words after it.
    """
    parser = argparse.ArgumentParser(f"mmt {name}", description="Caption a split with a trained model, and score it.")
    parser.add_argument("--model", required=True, metavar="DIR", help="a model's folder, or its name on the hub")
    parser.add_argument(
        "--data",
        required=True,
        metavar="ROOT",
        help='a folder, archive, manifest or pattern of tar shards; "scenes" is the embedded data',
    )
    parser.add_argument("--split", default="val", help="which split (val)")
    parser.add_argument(
        "--num-examples", type=int, metavar="N", help="put N training pictures with captions before each as examples"
    )
    parser.add_argument("--nearest", action="store_true", help="choose the examples that are most like the picture")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="pictures at once (32)")
    parser.add_argument("--limit", type=int, metavar="N", help="only about so many pictures")
    parser.add_argument("--json", metavar="OUT", help="write the scores to this file")
    parser.add_argument("--predictions", metavar="OUT", help="write the captions, one line of JSON each")
    parser.add_argument("--device", help="cpu, cuda, mps (a GPU if there is one)")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "int8"), default="fp32", help="faster, and rounded (fp32)"
    )
    add_generation_options(parser, without=("num_return_sequences",))
    add_read_options(parser)
    args = parser.parse_args(list(words))

    from mmtransformer.data.captions import CaptionData
    from mmtransformer.data.loading.module import Splits
    from mmtransformer.data.opening import open_pairs
    from mmtransformer.data.scenes.scenes import Scenes
    from mmtransformer.pipelines.few_shot import FewShot
    from mmtransformer.pipelines.image_captioner import ImageCaptioner
    from mmtransformer.training.engine.precision import fast_matmuls
    from mmtransformer.training.evaluation.evaluation import evaluate

    if args.nearest and args.num_examples is None:
        raise ValueError("--nearest chooses examples, and none were asked for: --num-examples N")
    fast_matmuls()
    model = ImageCaptioner.from_pretrained(args.model, device=args.device, precision=args.precision)
    if args.data == "scenes":
        source = Scenes(image_size=max(model.transform.size))
    else:
        known = model.tokenizer.languages
        read = read_options(args)
        read = dataclasses.replace(read, language=read.language or (known[0] if known else None))
        source = open_pairs(args.data, read)
        print(source.describe())
    data = CaptionData(
        source,
        image=model.transform,
        tokenizer=model.tokenizer,
        batch_size=args.batch_size,
        max_len=model.captioner.max_len,
        splits=Splits(val=[args.split]),
    )
    generation = model.generation.updated(**generation_changes(args))
    prompts = None
    if args.num_examples is not None:
        prompts = FewShot(
            source.split("train"),
            model.captioner,
            model.tokenizer,
            model.transform,
            num_examples=args.num_examples,
            choose="nearest" if args.nearest else "random",
        )
    limit = None if args.limit is None else -(-args.limit // args.batch_size)
    result = evaluate(
        model.ready(), data, generation=generation, device=model.device, limit_batches=limit, prompts=prompts
    )
    print(result.table())
    if args.json:
        text = json.dumps(result.to_dict(), indent=2, ensure_ascii=False)
        Path(args.json).write_text(text + "\n", encoding="utf-8")
    if args.predictions:
        lines = [
            json.dumps(p.to_dict(), ensure_ascii=False)
            for by in result.predictions.values()
            for some in by.values()
            for p in some
        ]
        Path(args.predictions).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0
