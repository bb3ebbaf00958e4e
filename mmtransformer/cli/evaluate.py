"""`mmt evaluate`: a trained model's captions of a split, scored."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mmtransformer.cli.many import told_when_stopped
from mmtransformer.cli.options import (
    add_generation_options,
    add_many_options,
    add_model_options,
    add_read_options,
    command_parser,
    generation_changes,
    progress_bar,
    read_options,
)
from mmtransformer.data.files.read_options import check_share
from mmtransformer.serialization.printable import counted, printable, say
from mmtransformer.serialization.writing import check_place

if TYPE_CHECKING:
    from mmtransformer.data.loading.source import Pairs, PairSource
    from mmtransformer.generation.captions import PromptBuilder
    from mmtransformer.pipelines.image_captioner import ImageCaptioner
    from mmtransformer.pipelines.image_text_embedder import ImageTextEmbedder
    from mmtransformer.training.evaluation.predictions import PredictionFile


def run(name: str, words: Sequence[str]) -> int:
    """Scores a model; the exit code is 1 if some pictures could not be used."""
    args = _parser(name).parse_args(list(words))
    if args.nearest and args.num_shots is None:
        raise ValueError("--nearest chooses examples, and none were asked for: --num-shots N")
    if args.overwrite and not args.captions_out:
        raise ValueError("--overwrite begins the file of --captions-out anew, and none is named")
    if args.clip_prefix and not args.clip_score:
        raise ValueError("--clip-prefix stands before the captions that --clip-score compares, and no model is named")

    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit must be at least 1 picture, not {args.limit}; leave it out for all")
    check_share("--max-bad-fraction", args.max_bad_fraction)
    if args.out:
        check_place(args.out, "--out")

    from mmtransformer.data.pairs import PairSplit
    from mmtransformer.pipelines.base import write_json
    from mmtransformer.pipelines.caption_files import write_bad
    from mmtransformer.pipelines.many_images import devices_of
    from mmtransformer.training.engine.precision import set_up_process
    from mmtransformer.training.evaluation.evaluation import Evaluation, score_split, split_languages

    set_up_process()
    devices = devices_of(args.device, args.devices)
    judge = _judge(args)  # Before the captions, which take long: it may not be there.
    model = _load(args, devices[0] if len(devices) == 1 else "cpu")
    source = _source(args, model, told=True)
    pairs = source.split(args.split)
    if isinstance(pairs, PairSplit) and (model.processor is None or args.num_shots is not None):
        whole, pairs = len(pairs), pairs.without_follow_ups()
        if len(pairs) < whole:
            say(f"left out: {counted(whole - len(pairs), 'answer')} to later turns of conversations", file=sys.stderr)
    count = len(pairs) if args.limit is None else min(len(pairs), args.limit)
    found = dict.fromkeys(caption.language for i in range(count) for caption in pairs.captions(i))
    if not model.tokenizer.languages and len(found) > 1:
        raise ValueError(
            f"the captions are in {len(found)} languages ({', '.join(map(str, found))}), and the model's tokenizer has "
            f"no tags to ask for one of them: read those of one, --languages {next(filter(None, found), 'CODE')}; or, "
            f"if all are of one, name it: --default-language CODE"
        )
    codes = split_languages(model.tokenizer, tuple(found))
    file = _prediction_file(args, model)
    by, bad = _caption(args, name, model, devices, pairs, count, codes, file)
    result = Evaluation(model.generation.updated(**generation_changes(args)))
    score_split(result, args.split, by, pairs)
    told, more = [result.table()], {}
    if judge is not None:
        from mmtransformer.training.evaluation.clipscore import clip_scores, clip_table

        more = {"clip_scores": {args.split: clip_scores(judge, by, pairs, prefix=args.clip_prefix)}}
        told.append(clip_table(args.clip_score, args.split, more["clip_scores"][args.split]))
    if args.out:  # before anything is printed, which `head` may cut
        write_json(Path(args.out), result.to_dict() | more)
    say("\n\n".join(told))
    listed = ""
    if args.captions_out:
        path = Path(args.captions_out)
        path = path.with_name(f"bad_images_{path.stem}.txt")
        listed = f": {path} names them" if write_bad(path, map(pairs.name, range(count)), bad) else ""
    if bad:
        say(
            f"{len(bad):,} of {counted(count, _unit(pairs, count))} could not be used, and are in no score{listed}",
            file=sys.stderr,
        )
    return 1 if bad else 0


def _parser(name: str) -> argparse.ArgumentParser:
    parser = command_parser(name)
    add_model_options(parser, precision=True)
    add = parser.add_argument
    add(
        "--data",
        required=True,
        metavar="ROOT",
        help='a folder, archive, manifest or pattern of tar shards; "scenes" is the embedded data, as the model was '
        "scored on it",
    )
    add("--split", default="val", help="which split (val)")
    add(
        "--num-shots",
        type=int,
        metavar="N",
        help="show N training pictures with captions as examples before each picture",
    )
    add("--nearest", action="store_true", help="choose the examples that are most like the picture")
    add("--limit", type=int, metavar="N", help="only the first N pictures")
    text = "score them by this dual encoder too, a folder or a name on the hub: CLIPScore and RefCLIPScore"
    add("--clip-score", metavar="MODEL", help=text)
    text = 'what to put before the texts that --clip-score compares; the paper\'s is "A photo depicts"'
    add("--clip-prefix", default="", metavar="WORDS", help=text)
    text = "share of the data's rows that may be unusable and are left out (0.01)"
    add("--max-bad-fraction", type=float, default=0.01, metavar="X", help=text)
    add("--out", metavar="OUT.json", help="write the scores to this file")
    text = "write the captions, one line of JSON each; a stopped call, run again, resumes from the file"
    add("--captions-out", metavar="OUT.jsonl", help=text)
    add("--overwrite", action="store_true", help="begin the file of --captions-out anew")
    add_many_options(parser, batch_size=32)
    add_generation_options(parser, without=("num_return_sequences",))
    add_read_options(parser)
    return parser


def _caption(
    args: argparse.Namespace,
    name: str,
    model: "ImageCaptioner",
    devices: Sequence[str | None],
    pairs: "Pairs",
    count: int,
    codes: Sequence[str | None],
    file: "PredictionFile",
) -> tuple[dict, dict[str, str]]:
    """The predictions of each language, and what is wrong with the pictures that have none."""
    from mmtransformer.images import ImageError
    from mmtransformer.pipelines.many_images import CaptionJob
    from mmtransformer.training.evaluation.evaluation import ANY, Prediction

    by: dict[str, list[Prediction]] = {code or ANY: [] for code in codes}
    references, todo, questions = {}, [], {}
    for i in range(count):
        captions = pairs.captions(i)
        if captions and captions[0].question:
            questions[i] = captions[0].question
        said = {code: tuple(c.text for c in captions if code is None or c.language == code) for code in codes}
        references[i] = {code: texts for code, texts in said.items() if texts}
        if (earlier := file.get(i, pairs.name(i), len(references[i]))) is None:
            todo.append(i)
        for code, prediction in zip(references[i], earlier or (), strict=False):
            by[code or ANY].append(prediction)
    if questions and (model.processor is None or args.num_shots is not None):
        why = "reads no prompts" if model.processor is None else "reads examples in their place"
        say(f"left out, as the model {why}: {counted(len(questions), 'question')}", file=sys.stderr)
        questions.clear()
    changes = generation_changes(args)
    job = CaptionJob(partial(_start, args), pairs, codes, changes, args.batch_size, questions=questions)
    if len(devices) == 1:
        results = job.here(model, _prompts(args, model), todo)
    else:
        results = job.on([str(device) for device in devices], todo)
    bad: dict[str, str] = {}
    done, unit = 0, _unit(pairs, count)

    def so_far() -> str:
        kept = f": what is done is in {file.path}, and the same call goes on"
        kept = (
            kept.replace("same call", "same call without --overwrite") if args.overwrite and done > len(bad) else kept
        )
        return f"after {done:,} of {counted(len(todo), unit)}{kept if file.path else ''}"

    with progress_bar(len(todo), shown=len(todo) > args.batch_size) as bar, told_when_stopped(so_far):
        for done, (i, said) in enumerate(results, 1):  # noqa: B007 (`so_far` says it)
            bar.update()
            if isinstance(said, ImageError):
                bad[pairs.name(i)] = str(said)
                bar.write(printable(f"mmt {name}: {said}"), file=sys.stderr)
                continue
            mine = {
                code: Prediction(i, pairs.name(i), best, references[i][code])
                for code, (best, *_) in zip(codes, said, strict=True)
                if code in references[i]
            }
            file.add(mine.values())
            for code, prediction in mine.items():
                by[code or ANY].append(prediction)
    if len(bad) == count:
        raise ValueError(f"not one of {counted(count, unit)} can be used; the first: {next(iter(bad.values()))}")
    return {code: sorted(some, key=lambda p: p.index) for code, some in by.items()}, bad


def _unit(pairs: "Pairs", count: int) -> str:
    """What the first so many of a split are: pictures, or questions, several of which may be about one."""
    asked = any(caption.question for i in range(count) for caption in pairs.captions(i)[:1])
    return "question" if asked else "picture"


def _load(args: argparse.Namespace, device: str | None) -> "ImageCaptioner":
    from mmtransformer.pipelines.image_captioner import ImageCaptioner

    return ImageCaptioner.from_pretrained(args.model, device=device, precision=args.precision)


def _judge(args: argparse.Namespace) -> "ImageTextEmbedder | None":
    """What tells how well captions fit their pictures, where that is asked for."""
    from mmtransformer.pipelines.image_text_embedder import ImageTextEmbedder

    return ImageTextEmbedder.from_pretrained(args.clip_score) if args.clip_score else None


def _start(args: argparse.Namespace, device: str | None) -> "tuple[ImageCaptioner, PromptBuilder | None]":
    """The model on a device, and its prompts."""
    model = _load(args, device)
    return model, _prompts(args, model)


def _prompts(args: argparse.Namespace, model: "ImageCaptioner") -> "PromptBuilder | None":
    from mmtransformer.pipelines.few_shot import FewShotPromptBuilder

    if args.num_shots is None:
        return None
    examples = _source(args, model).split("train")
    choose = "nearest" if args.nearest else "random"
    parts = (examples, model.model, model.tokenizer, model.transform)
    return FewShotPromptBuilder(*parts, num_shots=args.num_shots, choose=choose)


def _source(args: argparse.Namespace, model: "ImageCaptioner", *, told: bool = False) -> "PairSource[Pairs]":
    """The data; drawn scenes are those that the model was scored on, where its folder says which."""
    from mmtransformer.data.open_sources import open_pairs
    from mmtransformer.data.scenes.scenes import Scenes
    from mmtransformer.serialization.pretrained import find_folder
    from mmtransformer.training.evaluation.predictions import SCENES, saved_scenes

    if args.data == "scenes":
        if (scenes := saved_scenes(find_folder(args.model))) is not None:
            return scenes
        if told:
            say(
                f"the model's folder has no {SCENES}, so it is not known which scenes it was scored on: these are the "
                f"default ones, and their figures are not to be compared with its recipe's",
                file=sys.stderr,
            )
        return Scenes(image_size=max(model.transform.size))
    source = open_pairs(
        args.data,
        read_options(args),
        max_bad_fraction=args.max_bad_fraction,
        splits=[args.split if told else "train"],
        known_languages=model.tokenizer.languages,
    )
    if told:
        say(source.describe())
    return source


def _prediction_file(args: argparse.Namespace, model: "ImageCaptioner") -> "PredictionFile":
    from mmtransformer.serialization.pretrained import find_folder
    from mmtransformer.training.evaluation.predictions import PredictionFile, files_of

    folder = find_folder(args.model)
    settings = {
        "model": str(folder.resolve()),
        "files": files_of(folder),
        "data": str(Path(args.data).resolve()) if Path(args.data).exists() else args.data,
        "search": dataclasses.asdict(model.generation.updated(**generation_changes(args))),
        "read": dataclasses.asdict(read_options(args)),
        **{name: getattr(args, name) for name in ("split", "num_shots", "nearest", "precision")},
    }
    path = Path(args.captions_out) if args.captions_out else None
    return PredictionFile(path, settings, overwrite=args.overwrite)
