"""What examples are worth: the captions that a model writes after 0, 1, 2, ... of them, scored.

Fewer examples that score better than more, or than none, are a sign that a model does not read them (as OpenFlamingo's
users saw); so the scores of all numbers are reported side by side.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from mmtransformer.captioners.base import Captioner
from mmtransformer.data.captions import CaptionData
from mmtransformer.data.interleaved_data import InterleavedData
from mmtransformer.data.loading.source import Pairs
from mmtransformer.data.scenes.facts import score as score_facts
from mmtransformer.data.scenes.scene_documents import SceneDocuments
from mmtransformer.generation.captions import write_captions
from mmtransformer.generation.config import GenerationConfig
from mmtransformer.pipelines.few_shot import FewShotPromptBuilder
from mmtransformer.training.evaluation.evaluation import evaluate

_EXAMPLES = 200  # pictures that the examples of an aspect are chosen from


@dataclass(frozen=True)
class FewShotScores:
    """Scores by what was asked for and by the number of examples.

    Attributes:
        unit: What is scored, such as "CIDEr-D".
        scores: What was asked for ("color, ko", or a split) -> number of examples -> score.
    """

    unit: str
    scores: dict[str, dict[int, float]]

    def table(self) -> str:
        """The scores as lines of text."""
        counts = sorted({k for by in self.scores.values() for k in by})
        lines = [f"{f'{self.unit} after so many examples':<44}" + "".join(f"{k:>8}" for k in counts)]
        for name, by in self.scores.items():
            lines.append(f"  {name:<42}" + "".join(f"{100 * by[k]:>8.1f}" if k in by else f"{'':>8}" for k in counts))
        return "\n".join(lines)

    def headline(self) -> str:
        """The means of all that was asked for, in a line."""
        counts = sorted({k for by in self.scores.values() for k in by})
        means = [fmean(by[k] for by in self.scores.values() if k in by) for k in counts]
        found = ", ".join(f"{k}: {100 * mean:.1f}" for k, mean in zip(counts, means, strict=True))
        return f"{self.unit} after so many examples: {found}; shown here after none"

    def to_dict(self) -> dict[str, object]:
        """Plain data for metrics.json."""
        scores = {name: {str(k): round(v, 4) for k, v in by.items()} for name, by in self.scores.items()}
        return {"unit": self.unit, "scores": scores}


def score_few_shot(
    captioner: Captioner,
    data: CaptionData | InterleavedData,
    num_shots: Sequence[int],
    *,
    generation: GenerationConfig,
    device: torch.device,
    autocast: torch.dtype | None = None,
    limit_batches: int | None = None,
) -> FewShotScores:
    """Captions after examples of every number that is asked for.

    With `SceneDocuments` each aspect is asked for by its examples alone, in each language; all that count are answers
    that are right to the letter (of descriptions: their facts). With other data the examples are training pictures,
    and the validation splits' CIDEr-D is scored.

    Args:
        captioner: The model, one that reads pictures anywhere in the text.
        data: The run's data.
        num_shots: Numbers of examples.
        generation: How captions are searched for.
        device: Where to compute.
        autocast: The number format; None computes in that of the weights.
        limit_batches: Most batches of a split.
    """
    captioner.to(device)
    if isinstance(data, InterleavedData) and isinstance(data.source, SceneDocuments):
        source, most = data.source, min(data.source.sizes["val"], (limit_batches or 10**9) * data.batch_size)
        scores: dict[str, dict[int, float]] = {}
        for aspect in source.aspects:
            for language in source.languages:
                questions = source.pairs("questions", most, aspect, language)
                examples = source.pairs("examples", _EXAMPLES, aspect, language)
                by = scores[f"{aspect}, {language}"] = {}
                few = FewShotPromptBuilder(
                    examples, captioner, data.tokenizer, data.transform, num_shots=max(num_shots)
                )
                for count in num_shots:
                    few.num_shots = count
                    with torch.autocast(device.type, autocast, autocast is not None):
                        said = _say(captioner, data, questions, few, generation, device)
                    if aspect == "description":
                        by[count] = score_facts(said, [questions.scene(i) for i in range(most)], language).facts
                    else:
                        right = [_same(text, questions.captions(i)[0].text) for i, text in enumerate(said)]
                        by[count] = sum(right) / most
        return FewShotScores("% of answers right", scores)
    captions = data.captions if isinstance(data, InterleavedData) else data
    examples = captions.pairs(captions.train_split)
    found: dict[str, dict[int, float]] = {}
    few = FewShotPromptBuilder(examples, captioner, captions.tokenizer, captions.transform, num_shots=max(num_shots))
    for count in num_shots:
        few.num_shots = count
        result = evaluate(
            captioner,
            captions,
            generation=generation,
            device=device,
            autocast=autocast,
            limit_batches=limit_batches,
            n_resamples=0,
            prompt_builder=few,
        )
        for split, by_language in result.captions.items():
            for code, scored in by_language.items():
                found.setdefault(f"{split}, {code}", {})[count] = float(scored.values["cider_d"])
    return FewShotScores("CIDEr-D", found)


def _say(
    captioner: Captioner,
    data: InterleavedData,
    questions: Pairs,
    few: FewShotPromptBuilder,
    generation: GenerationConfig,
    device: torch.device,
) -> list[str]:
    """The greedy answer to every question."""
    said: list[str] = []
    language = questions.captions(0)[0].language if data.tokenizer.languages else None
    for start in range(0, len(questions), data.batch_size):
        places = range(start, min(start + data.batch_size, len(questions)))
        batch = few.batch([questions.image(i) for i in places], [questions.name(i) for i in places])
        rows = write_captions(
            captioner,
            data.tokenizer,
            batch.to(device),
            [language],
            generation=generation.one_at_a_time(),
            prompt_builder=few,
        )
        said += [row[0][0].text for row in rows]
    return said


def _same(a: str, b: str) -> bool:
    """Whether two texts are the same but for spaces around them."""
    return unicodedata.normalize("NFC", a).strip() == unicodedata.normalize("NFC", b).strip()
