"""Looks at data before any training: what is missing, broken, doubled, empty or too long in pairs, or in classes."""

import dataclasses
import hashlib
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np

from mmtransformer.data.check_captions import Kind, TokenizerLike, caption_kinds
from mmtransformer.data.class_sources import Classified, ImageFolder
from mmtransformer.data.files.normalize import BY_HASH
from mmtransformer.data.files.read_options import check_share
from mmtransformer.data.loading.errors import FIRST, Report, allowed
from mmtransformer.data.loading.source import Caption, Pairs, PairSource
from mmtransformer.data.open_sources import open_pairs
from mmtransformer.images import ImageError
from mmtransformer.serialization.printable import counted

_BAR = 24  # width of a histogram's longest bar
_CLASSES = 50  # classes that are listed


@dataclasses.dataclass
class Finding:
    """One kind of trouble.

    Attributes:
        what: "corrupt pictures in train".
        count: How many of them.
        of: Out of how many.
        hurts: Whether training or its evaluation would suffer.
        first: The first offenders.
        remedy: What to do about it.
    """

    what: str
    count: int
    of: int
    hurts: bool
    first: list[str]
    remedy: str = ""


@dataclasses.dataclass
class CheckReport:
    """What `check` found.

    Attributes:
        source: What was looked at, in words.
        images: Split -> number of pictures.
        captions: Split -> number of captions.
        languages: Language -> number of captions; "unnamed" for those without.
        words: Words of a caption -> number of captions.
        sizes: The smallest, middle and largest height and width, each as (height, width); empty without pictures.
        findings: Every kind of trouble, those that hurt first.
        classes: Class -> split -> number of pictures, where folders name classes; empty for pairs.
    """

    source: str
    images: dict[str, int]
    captions: dict[str, int]
    languages: dict[str, int]
    words: dict[int, int]
    sizes: dict[str, tuple[int, int]]
    findings: list[Finding]
    classes: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)

    @property
    def hurts(self) -> bool:
        """Whether training would be hurt."""
        return any(finding.hurts for finding in self.findings)

    def to_dict(self) -> dict[str, object]:
        """Plain data, for JSON."""
        return {**dataclasses.asdict(self), "hurts": self.hurts}

    def __str__(self) -> str:
        lines = [self.source, ""]
        for split, count in self.images.items():
            captions = f"{counted(self.captions[split], 'caption'):>20}" if split in self.captions else ""
            lines.append(f"  {split:<14}{counted(count, 'picture'):>18}{captions}")
        lines += ["", *_class_table(self.classes)] if self.classes else []
        if self.languages:
            lines += ["", "  languages     " + ", ".join(f"{code} {n:,}" for code, n in self.languages.items())]
        if self.sizes:
            said = ", ".join(f"{name} {h} x {w}" for name, (h, w) in self.sizes.items())
            lines += [f"  height x width  {said}"]
        lines += ["", *_histogram(self.words)] if self.words else []
        lines.append("")
        for finding in self.findings:
            share = f" of {finding.of:,} ({finding.count / finding.of:.2%})" if finding.of else ""
            lines.append(f"{'HURTS' if finding.hurts else 'note ':<6} {finding.what}: {finding.count:,}{share}")
            lines += [f"         {offender}" for offender in finding.first]
            lines += [f"         -> {finding.remedy}"] * bool(finding.remedy)
        if not self.findings:
            lines.append("Nothing is wrong.")
        elif self.hurts:
            lines.append("Training would be hurt. Repair what is marked HURTS.")
        else:
            lines.append("Good enough to train on.")
        return "\n".join(lines)


def check(
    source: str | Path | PairSource,
    *,
    tokenizer: TokenizerLike | None = None,
    max_len: int = 64,
    max_bad_fraction: float = 0.01,
    threads: int | None = None,
    progress: bool = True,
) -> CheckReport:
    """Reads every picture and caption once and says what would hurt training.

    A kind of trouble hurts when it concerns more than `max_bad_fraction` of the rows, pictures or captions; one picture
    or caption alone never does, unless `max_bad_fraction` is 0. Pictures that cannot be read are judged split by split,
    as training does. Nothing to train on, or to validate on, always hurts.

    Args:
        source: A path to pairs, tar shards or interleaved documents, or pairs already opened (with
            `max_bad_fraction=1` to see everything).
        tokenizer: Counts the tokens of a caption; without it words are counted, and what is said to be cut is the
            least that will be.
        max_len: The most tokens a caption may have in training; its start, its end and its language, if
            the data names any, take one each.
        max_bad_fraction: Share that is tolerable.
        threads: Threads that decode; as many as the machine has cores, 8 at most, if not given.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If nothing is there that could be pairs, or `max_bad_fraction` is no share.
    """
    check_share("max_bad_fraction", max_bad_fraction, whole=True)
    pairs = open_pairs(source, max_bad_fraction=1.0) if isinstance(source, str | Path) else source
    report, describe = getattr(pairs, "report", None), getattr(pairs, "describe", None)
    splits = {name: pairs.split(name) for name in pairs.splits()}
    captions = {name: [split.captions(i) for i in range(len(split))] for name, split in splits.items()}
    pictures = {name: _pictures(split, captions[name]) for name, split in splits.items()}
    looked = _look(splits, pictures, threads or min(8, os.cpu_count() or 1), progress)
    flat = [caption for split in captions.values() for group in split for caption in group]
    words = Counter(len(caption.text.split()) for caption in flat)
    findings = _rows(report, max_bad_fraction) if isinstance(report, Report) else []
    said = describe() if describe else type(pairs).__name__
    kinds = _images(looked, named_splits=BY_HASH not in said) + caption_kinds(
        splits, captions, tokenizer, max_len, 3 if pairs.languages else 2
    )
    findings += [
        Finding(what, len(some), of, may_hurt and len(some) > allowed(of, max_bad_fraction), some[:FIRST], remedy)
        for what, some, of, may_hurt, remedy in kinds
        if some
    ]
    findings += _one_caption(captions)
    findings += [
        Finding(f"no pictures in {name}", 0, 0, True, [], f"{what} needs some")
        for name, what in (("train", "training"), ("val", "the choice of the best weights"))
        if name not in splits
    ]
    return CheckReport(
        source=said,
        images={name: len(some) for name, some in pictures.items()},
        captions={name: sum(map(len, groups)) for name, groups in captions.items()},
        languages=dict(Counter(caption.language or "unnamed" for caption in flat).most_common()),
        words=dict(sorted(words.items())),
        sizes=_sizes([image.size for image in looked if image.size]),
        findings=sorted(findings, key=lambda finding: not finding.hurts),
    )


def check_classes(
    source: ImageFolder, *, max_bad_fraction: float = 0.01, threads: int | None = None, progress: bool = True
) -> CheckReport:
    """Reads every picture of a folder with a folder for each class, as `check` does of pairs.

    Args:
        source: The folder.
        max_bad_fraction: See `check`.
        threads: See `check`.
        progress: See `check`.
    """
    check_share("max_bad_fraction", max_bad_fraction, whole=True)
    splits = {name: source.split(name) for name in source.splits()}
    pictures = {name: {split.name(i): i for i in range(len(split))} for name, split in splits.items()}
    looked = _look(splits, pictures, threads or min(8, os.cpu_count() or 1), progress)
    classes: dict[str, dict[str, int]] = {name: dict.fromkeys(splits, 0) for name in source.classes}
    for name, split in splits.items():
        for i in range(len(split)):
            classes[source.classes[split.label(i)]][name] += 1
    kinds = _images(looked, named_splits=source.named_splits, again="take out all but one of the copies")
    findings = [
        Finding(what, len(some), of, may_hurt and len(some) > allowed(of, max_bad_fraction), some[:FIRST], remedy)
        for what, some, of, may_hurt, remedy in kinds
        if some
    ]
    if untaught := [name for name, counts in classes.items() if not counts["train"]]:
        what, remedy = "classes without a picture in train", "put some there"
        findings.append(Finding(what, len(untaught), len(classes), True, untaught[:FIRST], remedy))
    return CheckReport(
        source="; ".join(filter(None, (f"pictures of {counted(len(classes), 'class', 'classes')}", source.left_out))),
        images={name: len(split) for name, split in splits.items()},
        captions={},
        languages={},
        words={},
        sizes=_sizes([image.size for image in looked if image.size]),
        findings=sorted(findings, key=lambda finding: not finding.hurts),
        classes=classes,
    )


@dataclasses.dataclass
class _Looked:
    split: str
    name: str
    size: tuple[int, int] | None = None  # height, width
    digest: bytes = b""
    error: str = ""
    blank: bool = False


def _pictures(split: Pairs, captions: Sequence[Sequence[Caption]]) -> dict[str, int]:
    """The pictures of a split, each with its first place there; one of which several things are asked is one."""
    found: dict[str, int] = {}
    for i, some in enumerate(captions):
        name = split.name(i)
        found.setdefault(name.partition("?")[0] if some and some[0].question else name, i)
    return found


def _look(
    splits: Mapping[str, Pairs | Classified], pictures: Mapping[str, Mapping[str, int]], threads: int, progress: bool
) -> list[_Looked]:
    """Decodes every picture, a few hundred ahead at most."""
    from tqdm import tqdm

    todo = iter([(name, split, *each) for name, split in splits.items() for each in pictures[name].items()])
    total = sum(map(len, pictures.values()))
    looked: list[_Looked] = []
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=total, unit=" pictures", desc="check", disable=not progress, leave=False) as bar,
    ):
        while chunk := list(islice(todo, 256)):
            looked += pool.map(lambda item: _look_at(*item), chunk)
            bar.update(len(chunk))
    return looked


def _look_at(split: str, pairs: Pairs | Classified, name: str, i: int) -> _Looked:
    try:
        image = pairs.image(i)
    except ImageError as error:
        return _Looked(split, name, error=str(error))
    # of the pixels, so that a copy with other metadata, or in another lossless format, is found as well
    size = (image.height, image.width)
    digest = hashlib.blake2b(image.tobytes(), key=repr(size).encode(), digest_size=16).digest()
    pixels = np.asarray(image)
    blank = _one_colour(pixels[::16, ::16]) and _one_colour(pixels)
    return _Looked(split, name, size, digest, blank=blank)


def _one_colour(pixels: np.ndarray) -> bool:
    return bool((pixels == pixels[0, 0]).all())


_REMEDIES = {
    "missing picture": "put the pictures beside their captions, or name their folder: --image-folder FOLDER "
    "(data.read.image_folder)",
    "refused path": "write paths relative to the manifest, inside the root",
    "ambiguous name": "write the folder before the name too, as in train/a.jpg",
    "picture in two splits": "give all rows of a picture the same split",
    "no picture named": "write the picture's path into these rows, or name its column: --image-column NAME",
    "empty caption": "write captions, or take the rows out",
    "no caption file": "write a .txt of the same name beside each, or a table of image,caption; or have a model write "
    "them: mmt caption FOLDER --model MODEL --out FOLDER/; where folders name classes: mmt fit --config vit_classify",
    "no caption": "write captions, or take the pictures out of the list",
    "not valid Unicode": "write these captions anew: they hold halves of characters",
    "wrong number of cells": 'put captions with commas, quotes or line breaks into double quotes: "a dog, asleep"',
    "a caption that is not text": "write captions as texts, or lists of texts",
    "a caption that is nested too deeply": "write captions as texts, or lists of texts",
    "not a language": "write codes such as en and ko, or name the column: --language-column NAME",
    "not JSON": "write one whole JSON object a line",
    "not a JSON object": "write one whole JSON object a line",
    "caption file that can't be read": "look at the file's permissions, and whether it is text",
    "marks and pictures differ in number": "write one <image> where each picture of the list stands",
}


def _remedy(cause: str, first: Sequence[str]) -> str:
    """What to do about the errors of a manifest, with the option that does it."""
    if cause == "not UTF-8":
        guess = next((found[1] for said in first if (found := re.search(r"--encoding (\S+)", said))), "cp949")
        return (
            f"read them with --encoding {guess} (in `mmt fit`: --data.read.encoding {guess}), or save the file as UTF-8"
        )
    if cause == "refused path" and "nothing is downloaded" in first[0]:
        return "download the pictures, as img2dataset does, and give the folder that it writes"
    if cause == "refused path" and "base64" in first[0]:
        return "write each picture into a file (base64.b64decode), and its name in its place"
    return _REMEDIES.get(cause, "repair these rows, or take them out")


def _rows(report: Report, max_bad_fraction: float) -> list[Finding]:
    """The manifest's own errors. They are judged together, as training judges them."""
    hurts = report.bad_rows > allowed(report.rows, max_bad_fraction)
    found = [
        Finding(cause, count, report.rows, hurts, report.first[cause], _remedy(cause, report.first[cause]))
        for cause, count in report.errors.items()
    ]
    return found + [Finding(note, count, 0, False, report.first[note]) for note, count in report.notes.items()]


def _images(looked: Sequence[_Looked], *, named_splits: bool, again: str = "list its captions together") -> list[Kind]:
    first: dict[bytes, _Looked] = {}
    inside: list[str] = []
    across: list[str] = []
    # train first, so that a copy of a training picture is found where it does harm
    for image in sorted(looked, key=lambda p: p.split != "train"):
        if image.digest and (known := first.setdefault(image.digest, image)) is not image:
            said = f"{image.split}/{image.name} = {known.split}/{known.name}"
            (inside if known.split == image.split else across).append(said)
    thin = [
        f"{image.name}: {image.size[0]} x {image.size[1]}"
        for image in looked
        if image.size and (min(image.size) < 16 or max(image.size) > 8 * min(image.size))
    ]
    totals, total = Counter(p.split for p in looked), len(looked)
    bad = {name: [p.error for p in looked if p.split == name and p.error] for name in totals}
    held_out = total - totals["train"]
    blank = [p.name for p in looked if p.blank]
    out, apart = "replace them or take them out", "put copies into the same split, or take out all but one"
    if not named_splits:
        apart = "name the splits, with copies in the same one: in a column split, or by folders train/ and val/"
    return [
        *((f"corrupt pictures in {name}", bad[name], n, True, out) for name, n in totals.items()),
        ("pictures that are in two splits", across, held_out, True, apart),
        ("the same picture again in its split", inside, total, False, again),
        ("pictures of a single colour", blank, total, True, "take them out"),
        ("pictures under 16 pixels, or 8 times longer than wide", thin, total, True, "take them out"),
    ]


def _one_caption(captions: Mapping[str, list[list[Caption]]]) -> list[Finding]:
    """The caption that most pictures have, if these are more than chance makes alike."""
    groups = [[c for c in group if not c.question] for split in captions.values() for group in split]
    often = Counter(text for group in groups for text in dict.fromkeys(caption.text for caption in group))
    for text, count in often.most_common(1):
        if count > max(FIRST, len(groups) // 20):
            what, remedy = "pictures share one caption", "a model learns to say this of every picture"
            return [Finding(what, count, len(groups), count > len(groups) // 2, [repr(text[:80])], remedy)]
    return []


def _class_table(classes: Mapping[str, Mapping[str, int]]) -> list[str]:
    """The pictures of each class by split, the largest classes first."""
    ordered = sorted(classes.items(), key=lambda item: -sum(item[1].values()))
    names = list(ordered[0][1])
    lines = ["  class" + " " * 19 + "".join(f"{name:>10}" for name in names)]
    lines += [f"  {name:<24}" + "".join(f"{counts[s]:>10,}" for s in names) for name, counts in ordered[:_CLASSES]]
    return [*lines, *[f"  ... and {len(classes) - _CLASSES:,} more"] * (len(classes) > _CLASSES), ""]


def _sizes(sizes: Sequence[tuple[int, int]]) -> dict[str, tuple[int, int]]:
    if not sizes:
        return {}
    ordered = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    return {"smallest": ordered[0], "middle": ordered[len(ordered) // 2], "largest": ordered[-1]}


def _histogram(words: dict[int, int]) -> list[str]:
    """Words a caption, in at most 12 bins of equal width; those far beyond the others are in the last one together."""
    lengths = np.repeat([*words], [*words.values()])
    usual = min(max(words), 2 * int(np.quantile(lengths, 0.75)) + 8)
    width = max(1, -(-(usual + 1) // 12))
    last = usual // width
    bins = Counter(np.minimum(lengths // width, last).tolist())
    most = max(bins.values())
    lines = ["  words     captions"]
    for at in range(min(bins), max(bins) + 1):
        label = f"{at * width}-{at * width + width - 1}" if width > 1 else str(at)
        label = f"{at * width}+" if at == last and max(words) >= (last + 1) * width else label
        bar = "#" * round(_BAR * bins[at] / most)
        lines.append(f"  {label:<8}{bins[at]:>10,}  {bar}".rstrip())
    return lines
