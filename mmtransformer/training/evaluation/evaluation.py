"""How good a captioner is: captions of whole splits, scored; exactly where the data knows what its pictures show."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from mmtransformer.captioners.base import Captioner
from mmtransformer.data.captions import CaptionData
from mmtransformer.data.loading.source import Pairs
from mmtransformer.data.scenes.facts import FactScores
from mmtransformer.data.scenes.facts import score as score_facts
from mmtransformer.data.scenes.scenes import SceneSplit
from mmtransformer.generation.captions import CAPTIONING, CaptionResult, PromptBuilder, write_captions
from mmtransformer.generation.config import GenerationConfig
from mmtransformer.metrics import CaptionScores, score_captions
from mmtransformer.serialization.writing import write_whole
from mmtransformer.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prediction:
    """What the model said of one picture in one language.

    Attributes:
        index: The picture's place in its split.
        name: Its name.
        said: The caption.
        references: What people said, in this language.
    """

    index: int
    name: str
    said: CaptionResult
    references: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, one line of a JSON-lines file."""
        return {
            "name": self.name,
            "language": self.said.language,
            "caption": self.said.text,
            "log_prob": round(self.said.log_prob, 4),
            "references": list(self.references),
        }


@dataclass
class Evaluation:
    """The captions of some splits, and their scores, by split and then by language.

    Attributes:
        predictions: The captions.
        facts: Scores against the scenes, for the embedded data.
        captions: Scores against the references.
        generation: How captions were searched for.
    """

    generation: GenerationConfig
    predictions: dict[str, dict[str, list[Prediction]]] = field(default_factory=dict)
    facts: dict[str, dict[str, FactScores]] = field(default_factory=dict)
    captions: dict[str, dict[str, CaptionScores]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `metrics.json`; "facts" holds fractions by split and language."""
        out: dict[str, Any] = {}
        if self.facts:
            out["facts"] = {s: {k: v.facts for k, v in by.items()} for s, by in self.facts.items()}
            out["scenes"] = {s: {k: v.to_dict() for k, v in by.items()} for s, by in self.facts.items()}
        out["captions"] = {s: {k: v.to_dict() for k, v in by.items()} for s, by in self.captions.items()}
        return out | {"generation": asdict(self.generation)}

    def table(self) -> str:
        """The scores as lines of text."""
        lines: list[str] = []
        if self.facts:
            languages = list(dict.fromkeys(code for by in self.facts.values() for code in by))
            lines.append(f"{'% of facts right':<34}" + "".join(f"{code:>9}" for code in languages))
            for split, by in self.facts.items():
                for name, share in (
                    (split, lambda s: s.facts),
                    ("  captions without a fault", lambda s: s.exact),
                    ("  objects that are not there", lambda s: s.hallucinated / max(s.objects.said, 1)),
                ):
                    cells = "".join(f"{share(by[code]):>9.1%}" if code in by else " " * 9 for code in languages)
                    lines.append(f"{name:<34}{cells}")
        else:
            for split, by in self.captions.items():
                for code, scores in by.items():
                    lines += [f"{split}{f', {code}' if code != ANY else ''}: {scores.table()}", ""]
        for split, by in self.predictions.items():
            for code, some in by.items():
                if empty := sum(not any(map(str.isalnum, prediction.said.text)) for prediction in some):
                    of = f"{empty:,} of {len(some):,} captions are empty or hold no readable letters"
                    lines.append(f"{split}{f', {code}' * (code != ANY)}: {of}")
        return "\n".join(lines).rstrip()

    def write(self, folder: str | Path) -> None:
        """Writes one `predictions_SPLIT.jsonl` a split."""
        for split, by in self.predictions.items():
            said = (prediction for some in by.values() for prediction in some)
            write_predictions(Path(folder) / f"predictions_{split}.jsonl", said)


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Writes predictions, one line of JSON each."""
    lines = (json.dumps(prediction.to_dict(), ensure_ascii=False) for prediction in predictions)
    write_whole(path, "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace"))


ANY = "any"
"""What stands for the language where captions have none."""


def evaluate(
    captioner: Captioner,
    data: CaptionData,
    splits: Sequence[str] | None = None,
    *,
    generation: GenerationConfig = CAPTIONING,
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
    limit_batches: int | None = None,
    n_resamples: int = 1000,
    prompt_builder: PromptBuilder | None = None,
) -> Evaluation:
    """Captions whole splits in every language that they have, and scores the captions.

    Args:
        captioner: The model; it is in evaluation mode while it captions.
        data: The data, with the model's tokenizer and transform.
        splits: Which splits; those that the data validates on unless told.
        generation: How captions are searched for.
        device: Where to compute.
        autocast: The number format; None computes in that of the weights.
        limit_batches: Most batches of a split.
        n_resamples: Resampled sets behind the confidence intervals.
        prompt_builder: Makes the prompts, with examples for instance (`FewShotPromptBuilder`); None makes the data's,
            plain ones for most.

    Returns:
        Captions and scores.
    """
    prompt_builder = data.prompt_builder if prompt_builder is None else prompt_builder
    captioner.to(device)
    result = Evaluation(generation)
    for split in data.val_splits if splits is None else splits:
        codes = split_languages(data.tokenizer, data.rows(split).languages)
        by: dict[str, list[Prediction]] = {code or ANY: [] for code in codes}
        pairs = data.pairs(split)
        places = {pairs.name(i): i for i in range(len(pairs))}
        seen: set[str] = set()
        for batch in islice(data.loader(split), limit_batches):
            with torch.inference_mode(), torch.autocast(torch.device(device).type, autocast, autocast is not None):
                rows = write_captions(
                    captioner,
                    data.tokenizer,
                    batch.to(device),
                    codes,
                    generation=result.generation,
                    prompt_builder=prompt_builder,
                )
            for name, references, row in zip(batch.names, batch.references, rows, strict=True):
                if name in seen:  # a replacement sample for a picture that cannot be read
                    continue
                seen.add(name)
                for code, (said, *_) in zip(codes, row, strict=True):
                    mine = tuple(text for text, language in references if code is None or language == code)
                    if mine:
                        by[code or ANY].append(Prediction(places[name], name, said, mine))
        score_split(result, split, by, pairs, n_resamples)
    return result


def score_split(
    result: Evaluation, split: str, by: dict[str, list[Prediction]], pairs: Pairs, n_resamples: int = 1000
) -> None:
    """Adds the captions of a split, by language, and their scores to an evaluation."""
    result.predictions[split] = by
    for code, predictions in by.items():
        if predictions:
            _score(result, split, code, predictions, pairs, n_resamples)


def _score(
    result: Evaluation, split: str, code: str, predictions: list[Prediction], pairs: Pairs, n_resamples: int
) -> None:
    if isinstance(pairs, SceneSplit):
        result.facts.setdefault(split, {})[code] = score_facts(
            [p.said.text for p in predictions], [pairs.scene(p.index) for p in predictions], code
        )
    english = code in (ANY, "en")
    scores = result.captions.setdefault(split, {})[code] = score_captions(
        {p.name: p.said.text for p in predictions},
        {p.name: list(p.references) for p in predictions},
        n_resamples=0 if isinstance(pairs, SceneSplit) else n_resamples,
        meteor="auto" if english and not isinstance(pairs, SceneSplit) else False,
        spice=False,
        answers=all(caption.question for p in predictions for caption in pairs.captions(p.index)[:1]),
    )
    if not english:
        scores.values["meteor"] = f'not computed: it knows English, and these captions are "{code}"'


def split_languages(tokenizer: Tokenizer, languages: Sequence[str | None]) -> tuple[str | None, ...]:
    """The languages to caption a split in: those of its captions; None, no language named, is one of them."""
    if not tokenizer.languages:
        return (None,)
    return tuple(languages)


def image_ablation(metrics: Mapping[str, Any], splits: Sequence[str]) -> dict[str, dict[str, float]]:
    """The losses with right, other and blank images out of a trainer's metrics, by split."""
    return pick_metrics(metrics, splits, ("loss", "loss_right_image", "loss_other_image", "loss_blank_image"))


def pick_metrics(
    metrics: Mapping[str, Any], splits: Sequence[str], names: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Those of a trainer's metrics, SPLIT/NAME, that there are of some splits and names, by split."""
    found = {s: {n: float(metrics[f"{s}/{n}"]) for n in names if f"{s}/{n}" in metrics} for s in splits}
    return {split: numbers for split, numbers in found.items() if numbers}


def ablation_text(losses: Mapping[str, float]) -> str:
    """The losses with right, other and blank images in words; nothing if they were not computed."""
    if "loss_right_image" not in losses:
        return ""
    right, other, blank = (losses[f"loss_{kind}_image"] for kind in ("right", "other", "blank"))
    return f"right picture {right:.3f}, another {other:.3f}, blank {blank:.3f}"
