"""All scores of a set of captions in one call, with confidence intervals, and a paired test of two runs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple
from zlib import crc32

import numpy as np

from mmtransformer.metrics import java
from mmtransformer.metrics.bleu import bleu, bleu_statistics
from mmtransformer.metrics.bootstrap import Combine, Comparison, bootstrap_intervals, paired_test
from mmtransformer.metrics.cider import cider_d
from mmtransformer.metrics.diversity import diversity
from mmtransformer.metrics.ptb import tokenize
from mmtransformer.metrics.rouge import rouge_l
from mmtransformer.metrics.vqa import vqa_accuracy
from mmtransformer.serialization.printable import counted


class Score(NamedTuple):
    """A line of the table of scores.

    Attributes:
        label: How it is written there.
        times: What it is multiplied by there.
        each: From the words of a caption and of its references to its score, if the set's score is the mean of these.
    """

    label: str
    times: int = 100
    each: Callable[[list[str], list[list[str]]], float] | None = None


TABLE = (
    {"vqa_accuracy": Score("VQA accuracy")}
    | {f"bleu_{n}": Score(f"BLEU-{n}") for n in range(1, 5)}
    | {
        "rouge_l": Score("ROUGE-L", each=rouge_l),
        "cider_d": Score("CIDEr-D"),
        "meteor": Score("METEOR"),
        "spice": Score("SPICE"),
        "distinct_1": Score("distinct-1 %"),
        "distinct_2": Score("distinct-2 %"),
        "repeated": Score("repeated %"),
        "vocabulary": Score("vocabulary", 1),
        "mean_length": Score("mean length", 1),
    }
)
"""All scores, as they are printed."""

HEADLINE = ("bleu_4", "cider_d", "rouge_l")
"""Those that stand above a gallery, and that `mmt ablate` compares."""

# Characters of a caption that are scored. What is longer is no caption, and would take minutes and gigabytes.
_MOST = 10_000


@dataclass(frozen=True)
class Statistics:
    """Scores that come from the same sums: what each picture adds (n s), and how sums become scores."""

    names: tuple[str, ...]
    values: np.ndarray
    combine: Combine


@dataclass(frozen=True)
class CaptionScores:
    """The scores of a set of captions.

    Args:
        values: Score by name: ``bleu_1`` ... ``bleu_4``, ``rouge_l``, ``meteor``, ``spice`` as fractions of
            1, ``cider_d`` as the official tool gives it (0 to 10), and ``distinct_1``, ``distinct_2``,
            ``repeated``, ``vocabulary``, ``mean_length``; of answers ``vqa_accuracy``, too. A text in place of a
            number is "not computed: " and the reason.
        intervals: The 95 % bootstrap interval of each score that has one.
        per_image: Scores of each picture by name (BLEU of one caption is smoothed and says little).
        references: References a picture, on average.
        unit: What was counted, "word" or "character".
        cut: The pictures with a caption or reference of more than 10,000 characters, of which the rest is not scored.
        statistics: What the scores are made of, a picture each: for `compare`.
        checksums: Of each picture's references, by its name, whatever their order: for `compare`.
    """

    values: dict[str, float | str]
    intervals: dict[str, tuple[float, float]]
    per_image: dict[str, dict[str, float]]
    references: float
    unit: str
    cut: tuple[str, ...] = ()
    statistics: tuple[Statistics, ...] = field(repr=False, compare=False, default=())
    checksums: dict[str, int] = field(repr=False, compare=False, default_factory=dict)

    @property
    def numbers(self) -> dict[str, float]:
        """The scores that are numbers, as a logger wants them."""
        return {name: value for name, value in self.values.items() if not isinstance(value, str)}

    def to_dict(self, *, per_image: bool = False) -> dict[str, object]:
        """Return plain data that JSON can hold.

        Args:
            per_image: Also the scores of every picture.
        """
        out: dict[str, object] = {
            "images": len(self.per_image),
            "references_per_image": self.references,
            "unit": self.unit,
            "values": dict(self.values),
            "intervals": {name: list(ends) for name, ends in self.intervals.items()},
        }
        if self.cut:
            out["cut"] = list(self.cut)
        if per_image:
            out["per_image"] = {name: dict(scores) for name, scores in self.per_image.items()}
        return out

    def table(self) -> str:
        """Return the scores as lines of text, times 100 as papers print them."""
        scored = counted(len(self.per_image), "question" if "vqa_accuracy" in self.values else "picture")
        lines = [f"{scored}, {self.references:.1f} references each, counted in {self.unit}s"]
        if self.cut:
            some = ", ".join(map(repr, self.cut[:5])) + (", ..." if len(self.cut) > 5 else "")
            lines.append(
                f"only the first {_MOST:,} characters are scored of {counted(len(self.cut), 'picture')}: {some}"
            )
        for name, value in self.values.items():
            label, times, _ = TABLE[name]
            if isinstance(value, str):
                lines.append(f"{label:<13}{value}")
                continue
            line = f"{label:<13}{value * times:7.1f}"
            if name in self.intervals:
                low, high = self.intervals[name]
                line += f"   [{low * times:.1f}, {high * times:.1f}]"
            lines.append(line)
        return "\n".join(lines)


def score_captions(
    candidates: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    *,
    n_resamples: int = 1000,
    seed: int = 0,
    meteor: bool | Literal["auto"] = "auto",
    spice: bool | Literal["auto"] = "auto",
    unit: Literal["word", "character"] = "word",
    answers: bool = False,
) -> CaptionScores:
    """Score one caption a picture against its references.

    Texts are cut into words as the official COCO evaluation does (``ptb.tokenize``): that is what papers
    mean by BLEU "in lower case without punctuation". The figures equal the official tool's. All captions of a
    call should be in one language; for Korean, words are what stands between spaces, so that a wrong particle
    makes a wrong word, and ``unit="character"`` counts syllables, which forgives that.

    The interval resamples pictures; CIDEr-D keeps the n-gram weights of the whole set meanwhile.

    Args:
        candidates: The caption of each picture, by the picture's name.
        references: The references of each picture, one at least; the same names.
        n_resamples: Resampled sets behind the intervals; 0 for no intervals.
        seed: The same seed gives the same intervals.
        meteor: True computes METEOR or fails, "auto" says "not computed" where Java or pycocoevalcap is
            missing, False leaves it out. It takes 5 to 10 s, so leave it out of validation during training.
        spice: As ``meteor``; it takes minutes and needs jars that pycocoevalcap does not bring.
        unit: Count words or characters.
        answers: Whether they are answers to questions, whose accuracy is then scored too (`vqa_accuracy`).

    Returns:
        The scores.

    Raises:
        ValueError: If the names differ, a picture has no reference, a value is not text, or a score that must
            be computed (``True``) cannot be.
    """
    _check(candidates, references, n_resamples, unit)
    names = list(candidates)
    long = [name for name in names if max(map(len, (candidates[name], *references[name]))) > _MOST]
    mine = [_cut(candidates[name], unit) for name in names]
    theirs = [[_cut(text, unit) for text in references[name]] for name in names]
    # The official n-gram counters cut once more at white space, also inside the token "2 1/2".
    mine_split = [_split(words) for words in mine]
    theirs_split = [[_split(words) for words in refs] for refs in theirs]

    counted = np.array([bleu_statistics(m, r) for m, r in zip(mine_split, theirs_split, strict=True)], float)
    parts = [
        Statistics(("bleu_1", "bleu_2", "bleu_3", "bleu_4"), counted, bleu),
        _means("cider_d", cider_d(mine_split, theirs_split)),
        *(
            _means(name, np.array([score.each(m, r) for m, r in zip(mine, theirs, strict=True)]))
            for name, score in TABLE.items()
            if score.each is not None
        ),
    ]
    if answers:
        parts.append(
            _means("vqa_accuracy", np.array([vqa_accuracy(candidates[name], references[name]) for name in names]))
        )
    reasons: dict[str, float | str] = {}
    texts = [" ".join(words) for words in mine], [[" ".join(words) for words in refs] for refs in theirs]
    for name, wanted, compute in (("meteor", meteor, _meteor), ("spice", spice, _spice)):
        try:
            if wanted is False:
                raise java.NotComputed("not asked for")
            if unit != "word":
                raise java.NotComputed(f"it counts words, and unit is {unit!r}")
            parts.append(compute(*texts))
        except java.NotComputed as error:
            if wanted is True:
                raise ValueError(
                    f"{name} cannot be computed: {error}; pass {name}='auto' to go on without it"
                ) from error
            reasons[name] = f"not computed: {error}"

    def combine(sums: np.ndarray) -> np.ndarray:
        pieces = np.split(sums, np.cumsum([part.values.shape[1] for part in parts])[:-1], axis=-1)
        return np.concatenate([part.combine(x) for part, x in zip(parts, pieces, strict=True)], axis=-1)

    statistics = np.concatenate([part.values for part in parts], axis=1)
    scored = [name for part in parts for name in part.names]
    values = dict(zip(scored, combine(statistics.sum(0)).tolist(), strict=True)) | reasons | diversity(mine)
    each = combine(statistics)
    ends = bootstrap_intervals(statistics, combine, n_resamples=n_resamples, seed=seed) if n_resamples else ((), ())
    return CaptionScores(
        values={name: values[name] for name in TABLE if name in values},
        intervals={name: (float(low), float(high)) for name, low, high in zip(scored, *ends)},
        per_image={name: dict(zip(scored, row, strict=True)) for name, row in zip(names, each.tolist())},
        references=sum(map(len, theirs)) / len(theirs),
        unit=unit,
        cut=tuple(long),
        statistics=tuple(parts),
        checksums={name: crc32(repr(sorted(refs)).encode()) for name, refs in zip(names, theirs, strict=True)},
    )


def compare(
    first: CaptionScores, second: CaptionScores, *, n_resamples: int = 1000, seed: int = 0
) -> dict[str, Comparison]:
    """Test whether two runs on the same pictures and references differ.

    Args:
        first: The scores of one run, from ``score_captions``.
        second: The scores of the other run.
        n_resamples: Resampled sets behind the interval, and swaps behind the p-value.
        seed: The same seed gives the same figures.

    Returns:
        By name of each score that both have: second minus first, its 95 % interval, and the p-value.

    Raises:
        ValueError: If the runs are not on the same pictures and references, or count different units.
    """
    if first.unit != second.unit:
        raise ValueError(f"one run counts {first.unit}s and the other {second.unit}s")
    _same_names("the first run", first.per_image, "the second run", second.per_image)
    others = [name for name in first.per_image if first.checksums.get(name) != second.checksums.get(name)]
    if others:
        raise ValueError(
            f"the runs were scored against different references of {counted(len(others), 'picture')}, such as "
            f"{others[0]!r}: score both against the same ones"
        )
    place = {name: i for i, name in enumerate(second.per_image)}
    order = [place[name] for name in first.per_image]
    theirs = {part.names: part for part in second.statistics}
    out: dict[str, Comparison] = {}
    for part in first.statistics:
        if (other := theirs.get(part.names)) is not None:
            found = paired_test(part.values, other.values[order], part.combine, n_resamples=n_resamples, seed=seed)
            out |= dict(zip(part.names, found, strict=True))
    return out


def _cut(text: str, unit: str) -> list[str]:
    words = tokenize(text[:_MOST])
    return words if unit == "word" else list("".join(words).replace("\u00a0", ""))


def _split(words: list[str]) -> list[str]:
    return " ".join(words).split() if any("\u00a0" in word for word in words) else words


def _means(name: str, scores: np.ndarray) -> Statistics:
    values = np.stack([scores, np.ones_like(scores)], axis=1)
    return Statistics((name,), values, lambda sums: sums[..., :1] / sums[..., 1:])


def _meteor(candidates: list[str], references: list[list[str]]) -> Statistics:
    return Statistics(("meteor",), java.meteor_statistics(candidates, references), java.meteor)


def _spice(candidates: list[str], references: list[list[str]]) -> Statistics:
    return _means("spice", java.spice(candidates, references))


def _check(candidates: Mapping[str, str], references: Mapping[str, Sequence[str]], n_resamples: int, unit: str) -> None:
    if not candidates and not references:
        raise ValueError("no caption to score; candidates and references are empty")
    _same_names("candidates", candidates, "references", references)
    for name, text in candidates.items():
        if not isinstance(text, str):
            raise ValueError(
                f"the candidate of {name!r} is {type(text).__name__}, not text; give one caption a picture"
            )
    for name, texts in references.items():
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"the references of {name!r} must be a list of texts")
        if not texts:
            raise ValueError(f"{name!r} has no reference; give one at least, or leave the picture out")
    if n_resamples < 0 or n_resamples == 1:
        raise ValueError(f"n_resamples ({n_resamples}) must be 0 (no intervals) or at least 2 resamples")
    if unit not in ("word", "character"):
        raise ValueError(f"unit {unit!r} must be 'word' or 'character'")


def _same_names(a: str, first: Mapping[str, object], b: str, second: Mapping[str, object]) -> None:
    faults = []
    for here, names, there, others in ((a, first, b, second), (b, second, a, first)):
        lacking = [name for name in others if name not in names]
        if lacking:
            some = ", ".join(map(repr, lacking[:5])) + (", ..." if len(lacking) > 5 else "")
            faults.append(f"{here} lack {len(lacking)} of {counted(len(others), 'picture')} of {there}: {some}")
    if faults:
        raise ValueError("; ".join(faults))
