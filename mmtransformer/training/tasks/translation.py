"""Translation: an encoder-decoder that learns to translate, scored by BLEU, exact match and facts."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

from mmtransformer.backbones.seq2seq import Transformer
from mmtransformer.batch import Seq2SeqBatch, SumAndCount
from mmtransformer.data.parallel_texts import Parallel
from mmtransformer.data.scenes.facts import judge
from mmtransformer.data.translation import TranslationData
from mmtransformer.generation.config import GenerationConfig
from mmtransformer.losses.next_token import next_token_loss
from mmtransformer.metrics import score_captions
from mmtransformer.pipelines.translator import PAPER, Translator
from mmtransformer.plots import plot_attention, save_image
from mmtransformer.serialization.printable import fenced
from mmtransformer.training.engine.optim import OptimConfig
from mmtransformer.training.engine.run import Run
from mmtransformer.training.engine.task import Task
from mmtransformer.training.tasks.data_checks import check_texts


@dataclass(frozen=True)
class TranslationScore:
    """How good the translations of a split are, in one direction.

    Attributes:
        bleu_4: corpus BLEU-4 in [0, 1], in lower case without punctuation, with its 95 % bootstrap interval.
        bleu_low: lower end of that interval.
        bleu_high: upper end.
        exact: share that equals the reference, letter for letter.
        facts: share that says just what the scene shows, in whatever words; None where no scene is known.
        pairs: how many were translated.
    """

    bleu_4: float
    bleu_low: float
    bleu_high: float
    exact: float
    facts: float | None
    pairs: int


def score_translations(said: Sequence[str], pairs: Sequence[Parallel]) -> TranslationScore:
    """Scores translations of one direction, in the order of the pairs.

    Raises:
        ValueError: If there are not as many translations as pairs, or none.
    """
    if len(said) != len(pairs) or not said:
        raise ValueError(f"{len(said)} translations for {len(pairs)} pairs; there must be one for each, and any")
    names = [str(i) for i in range(len(pairs))]
    references = {name: [pair.text] for name, pair in zip(names, pairs, strict=True)}
    scores = score_captions(dict(zip(names, said, strict=True)), references, meteor=False, spice=False)
    low, high = scores.intervals["bleu_4"]
    facts = [
        judge(text, pair.scene, pair.language).exact
        for text, pair in zip(said, pairs, strict=True)
        if pair.scene is not None
    ]
    return TranslationScore(
        scores.numbers["bleu_4"],
        low,
        high,
        sum(text == pair.text for text, pair in zip(said, pairs, strict=True)) / len(pairs),
        sum(facts) / len(facts) if facts else None,
        len(pairs),
    )


class Translation(Task[TranslationData]):
    """Trains an encoder-decoder to translate (Vaswani et al., arXiv:1706.03762).

    Args:
        model: The model.
        optim: The optimizer and its schedule.
        label_smoothing: Share of the target's probability that is spread over the vocabulary, in training only.
        generation: How translations are searched for when the run is evaluated; saved with the model.
    """

    unit = "pairs"
    data_kind = TranslationData
    val_metrics = (("perplexity", "perplexity {:.3f}"),)

    def __init__(
        self,
        model: Transformer,
        *,
        optim: OptimConfig = OptimConfig(),  # noqa: B008 (frozen)
        label_smoothing: float = 0.1,
        generation: GenerationConfig = PAPER,
    ) -> None:
        super().__init__(optim)
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing ({label_smoothing}) must be at least 0 and below 1")
        self.model, self.label_smoothing, self.generation = model, label_smoothing, generation

    def setup(self, stage: str) -> None:
        """Checks that model and data fit, before anything is computed.

        Raises:
            ValueError: If the vocabulary or the texts are larger than the model.
        """
        data = self.data
        if data is None:
            return
        check_texts(data, data.max_len, self.model, "model")

    def loss(self, batch: Seq2SeqBatch) -> SumAndCount:
        """The losses of the batch's target tokens, each after the true ones before it."""
        return self._loss(batch, self.label_smoothing)

    def _loss(self, batch: Seq2SeqBatch, label_smoothing: float) -> SumAndCount:
        hidden = self.model.hidden_states(batch.truncate(batch.tokens.shape[1] - 1))
        return next_token_loss(hidden, batch.tokens, batch.loss_mask, self.model.head, label_smoothing=label_smoothing)

    def validation_step(self, batch: Seq2SeqBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds up the loss, without smoothing."""
        if batch.loss_mask.any():
            self.add(self.split_names[dataloader_idx], "loss", self._loss(batch, 0.0))

    def sample(self, turn: int) -> list[str]:
        """A held-out text in each direction, with what the model makes of it."""
        data = self.data
        if data is None or not data.val_splits:
            return []
        greedy = self.generation.one_at_a_time()
        translator = Translator(self.model, data.tokenizer, generation=greedy, device=self.device)
        lines = []
        for direction, pairs in by_direction(data.rows(data.val_splits[0]).pairs).items():
            pair = pairs[turn % len(pairs)]
            (said,) = translator(pair.source, pair.language)
            lines += [f"{direction}: {pair.source}", f"    {said}", f"    (reference: {pair.text})"]
        return lines

    def finish(self, run: Run) -> None:
        """Translates the validation splits; writes scores, translations, curves and the model."""
        data = self.data
        if data is None:
            return
        translator = Translator(self.model, data.tokenizer, generation=self.generation, device=run.device)
        scores: dict[str, dict[str, TranslationScore]] = {}
        shown: list[str] = []
        for split in data.val_splits:
            pairs = data.rows(split).pairs
            if run.limit_batches is not None:
                pairs = pairs[: run.limit_batches * data.batch_size]
            scores[split], rows = {}, []
            for direction, some in by_direction(pairs).items():
                said = translator([pair.source for pair in some], some[0].language)
                scores[split][direction] = score_translations(said, some)
                rows += [
                    {"name": pair.name, "direction": direction, "source": pair.source, "translation": text,
                     "reference": pair.text, "exact": text == pair.text}
                    for pair, text in zip(some, said, strict=True)
                ]  # fmt: skip
                shown += [f"  {direction}  {some[0].source}", f"         {said[0]}"]
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            (run.folder / f"translations_{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        plain = {split: {key: asdict(score) for key, score in by.items()} for split, by in scores.items()}
        self._draw(translator, data, run)
        found = table(scores)
        translator.save_pretrained(run.folder / "model", card=f"## Scores\n\n{fenced(found)}")
        self.conclude(run, {"translation": plain}, found, shown=["It translates, for example:", *shown])

    def _draw(self, translator: Translator, data: TranslationData, run: Run) -> None:
        """Where the decoder looked while it wrote the first translation of each direction."""
        if not data.val_splits:
            return
        for direction, (pair, *_) in by_direction(data.rows(data.val_splits[0]).pairs).items():
            (said,) = translator(pair.source, pair.language)
            queries, keys, weights = translator.attention_map(pair.source, said, pair.language)
            named = {f"block {i}": block for i, block in enumerate(weights)}
            with suppress(ValueError):  # too long to be seen
                sheet = plot_attention(named, queries, keys, title=f"{pair.source} → {said}")
                save_image(sheet, run.folder / f"attention_{direction}.png")


def by_direction(pairs: Sequence[Parallel]) -> dict[str, list[Parallel]]:
    """The pairs of each direction, such as "en-ko", in their order."""
    found: dict[str, list[Parallel]] = {}
    for pair in pairs:
        found.setdefault(pair.direction, []).append(pair)
    return found


def table(scores: Mapping[str, Mapping[str, TranslationScore]]) -> str:
    """The scores as lines of text."""
    lines = [f"{'split':<14}{'direction':<11}{'pairs':>6}  BLEU-4                  exact    facts right"]
    for split, by in scores.items():
        for direction, s in by.items():
            bleu = f"{100 * s.bleu_4:5.1f} [{100 * s.bleu_low:.1f}, {100 * s.bleu_high:.1f}]"
            facts = "-" if s.facts is None else f"{s.facts:.1%}"
            lines.append(f"{split:<14}{direction:<11}{s.pairs:>6}  {bleu:<24}{s.exact:<9.1%}{facts}")
    return "\n".join(lines)
