"""`mmt evaluate`: a trained model's captions of a split, scored."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mmtransformer.cli.options import (
    add_generation_options,
    add_model_options,
    add_read_options,
    command_parser,
    generation_changes,
    read_options,
)


def run(name: str, words: Sequence[str]) -> int:
    """Scores a model."""
    parser = command_parser(name)
    add_model_options(parser, precision=True)
    add = parser.add_argument
    add(
        "--data",
        required=True,
        metavar="ROOT",
        help='a folder, archive, manifest or pattern of tar shards; "scenes" is the embedded data',
    )
    add("--split", default="val", help="which split (val)")
    add("--num-examples", type=int, metavar="N", help="put N training pictures with captions before each as examples")
    add("--nearest", action="store_true", help="choose the examples that are most like the picture")
    add("--batch-size", type=int, default=32, metavar="N", help="pictures at once (32)")
    add("--limit", type=int, metavar="N", help="only about so many pictures")
    add("--json", metavar="OUT", help="write the scores to this file")
    add("--predictions", metavar="OUT", help="write the captions, one line of JSON each")
    add_generation_options(parser, without=("num_return_sequences",))
    add_read_options(parser)
    args = parser.parse_args(list(words))

    from mmtransformer.data.captions import CaptionData
    from mmtransformer.data.loading.module import Splits
    from mmtransformer.data.opening import open_pairs
    from mmtransformer.data.scenes.scenes import Scenes
    from mmtransformer.pipelines.base import write_json
    from mmtransformer.pipelines.few_shot import FewShot
    from mmtransformer.pipelines.image_captioner import ImageCaptioner
    from mmtransformer.training.engine.precision import fast_matmuls
    from mmtransformer.training.evaluation.evaluation import evaluate, write_predictions

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
        write_json(Path(args.json), result.to_dict())
    if args.predictions:
        said = (p for by in result.predictions.values() for some in by.values() for p in some)
        write_predictions(Path(args.predictions), said)
    return 0
