"""What a run leaves in its folder: the model, metrics.json, predictions, curves, and galleries with heat maps."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import Any

from PIL.Image import Image
from torch import Tensor, nn

from mmtransformer.backbones.base import Decoder
from mmtransformer.backbones.encoder import TextEncoder
from mmtransformer.data.captions import CaptionData
from mmtransformer.data.scenes.facts import judge
from mmtransformer.data.scenes.scenes import Scenes, SceneSplit
from mmtransformer.generation.captions import PromptBuilder
from mmtransformer.images import ImageError
from mmtransformer.metrics.scores import HEADLINE, TABLE
from mmtransformer.pipelines.base import write_json
from mmtransformer.pipelines.image_captioner import ImageCaptioner
from mmtransformer.plots import (
    Card,
    CardCaption,
    grid_box,
    plot_gallery,
    save_html_gallery,
    save_image,
    save_loss_curves,
)
from mmtransformer.serialization.model_kinds import own_modules
from mmtransformer.serialization.pretrained import Pretrained
from mmtransformer.serialization.printable import fenced, json_text, markup, program
from mmtransformer.text.tokenizer import Tokenizer
from mmtransformer.training.evaluation.evaluation import ANY, Evaluation, Prediction
from mmtransformer.training.evaluation.predictions import save_scenes


def write_report(
    folder: str | Path,
    model: ImageCaptioner,
    data: CaptionData,
    evaluation: Evaluation,
    *,
    extra: Mapping[str, Any] | None = None,
    note: str = "",
    num_gallery_images: int = 24,
) -> dict[str, Any]:
    """Writes everything that one wants to see after a run.

    Args:
        folder: The run's folder.
        model: The trained model, with tokenizer and transform.
        data: What it was evaluated on.
        evaluation: Captions and scores.
        extra: More for `metrics.json`: time, steps, the losses of other images.
        note: More for the line at the top of the gallery.
        num_gallery_images: Pictures in the galleries.

    Returns:
        What stands in `metrics.json`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metrics = evaluation.to_dict() | dict(extra or {})
    write_json(folder / "metrics.json", metrics)
    evaluation.write(folder)
    model.save_pretrained(folder / "model", card=f"## Scores\n\n{fenced(evaluation.table())}")
    if isinstance(data.source, Scenes):
        save_scenes(folder / "model", data.source)
    cards = make_cards(model, data, evaluation, num_gallery_images)
    title = folder.resolve().name.replace("_", " ")
    if cards:
        subtitle = "; ".join(part for part in (headline(evaluation), note) if part)
        save_image(plot_gallery(cards, title=title, subtitle=subtitle), folder / "gallery.png")
        hint = f"Caption a picture of your own: `{how_to(folder, model, evaluation, asked=data.answers_questions)}`"
        table = page_table(evaluation)
        save_html_gallery(cards, folder / "gallery.html", title=title, metrics=table, hint=hint)
    plot_curves(folder)
    return metrics


def plot_curves(folder: Path) -> None:
    """Draws the losses of the run's metrics.csv under its name, if there are any; too few steps have no curve."""
    if not (folder / "metrics.csv").is_file():
        return
    with suppress(ValueError):
        save_loss_curves(folder / "metrics.csv", folder / "curves.png", title=folder.resolve().name.replace("_", " "))


def make_cards(model: ImageCaptioner, data: CaptionData, evaluation: Evaluation, num_gallery_images: int) -> list[Card]:
    """Cards of pictures evenly over the splits, with captions, references, facts and heat maps."""
    cards: list[Card] = []
    splits = [split for split, by in evaluation.predictions.items() if any(by.values())]
    for turn, split in enumerate(splits):
        by = evaluation.predictions[split]
        images: dict[int, list[Prediction]] = {}
        for predictions in by.values():
            for prediction in predictions:
                images.setdefault(prediction.index, []).append(prediction)
        share = num_gallery_images // len(splits) + (turn < num_gallery_images % len(splits))
        indices = sorted(images)
        for k in range(min(share, len(indices))):
            index = indices[k * len(indices) // min(share, len(indices))]
            if (card := _card(model, data, split, images[index])) is not None:
                cards.append(card)
    return cards


def _card(model: ImageCaptioner, data: CaptionData, split: str, predictions: list[Prediction]) -> Card | None:
    pairs = data.pairs(split)
    index = predictions[0].index
    try:
        image = pairs.image(index)
    except ImageError:  # it was captioned from the feature cache, and has gone since
        return None
    name, asked = predictions[0].name, pairs.captions(index)[0].question
    prompt_builder = model.prompt_builder([asked]) if model.processor is not None else None
    box = grid_box(image.size, data.transform.size, data.transform.resize)
    said = []
    for p in predictions:
        claims = ()
        if isinstance(pairs, SceneSplit) and p.said.language:
            claims = judge(p.said.text, pairs.scene(index), p.said.language).claims
        said.append(
            CardCaption(
                text=p.said.text,
                language=p.said.language,
                references=p.references,
                score=p.said.log_prob / max(len(p.said.tokens) + 1, 1),
                facts=claims,
                words=[word for word, _ in p.said.words],
                heat=_heat(model, image, p, prompt_builder),
                box=box,
            )
        )
    return Card(
        image, said, heading=f"{split}: {name}" if asked is None else f"{split}: {name.partition('?')[0]} ? {asked}"
    )


def _heat(
    model: ImageCaptioner, image: Image, prediction: Prediction, prompt_builder: PromptBuilder | None
) -> Tensor | None:
    """Where the model looked; None where it has no words, or has no heat maps."""
    if not prediction.said.words or not model.model.has_heatmaps:
        return None
    return model.heatmap(image, prediction.said, prompt_builder)


def headline(evaluation: Evaluation) -> str:
    """The scores in a line or two, for the top of a gallery."""
    parts = []
    for split, by in evaluation.facts.items():
        parts.append(f"{split}: facts right " + ", ".join(f"{code} {s.facts:.1%}" for code, s in by.items()))
    if not parts:
        for split, by in evaluation.captions.items():
            for code, scores in by.items():
                said = (f"{TABLE[name].label} {TABLE[name].times * scores.numbers[name]:.1f}" for name in HEADLINE)
                parts.append(f"{split}{'' if code == ANY else f' {code}'}: " + ", ".join(said))
    return "; ".join(parts)


def page_table(evaluation: Evaluation) -> dict[str, Any]:
    """The scores as a table for the HTML page: rows are scores, columns splits and languages."""
    table: dict[str, dict[str, Any]] = {}
    for split, by in evaluation.facts.items():
        for code, s in by.items():
            column = f"{split} {code}"
            table.setdefault("facts right", {})[column] = f"{s.facts:.1%}"
            table.setdefault("captions without a fault", {})[column] = f"{s.exact:.1%}"
            for name, rates in (("objects", s.objects), ("attributes", s.attributes), ("relations", s.relations)):
                table.setdefault(f"{name}: precision", {})[column] = f"{rates.precision:.1%}"
                table.setdefault(f"{name}: recall", {})[column] = f"{rates.recall:.1%}"
            made_up = s.hallucinated / max(s.objects.said, 1)
            table.setdefault("objects that are not there", {})[column] = f"{made_up:.1%}"
    for split, by in evaluation.captions.items():
        for code, scores in by.items():
            column = split if code == ANY else f"{split} {code}"
            for name, value in scores.values.items():
                label, times, _ = TABLE[name]
                figures = () if isinstance(value, str) else (value, *scores.intervals.get(name, ()))
                shown = [f"{x * times:.1f}" for x in figures]
                cell = f"{shown[0]} [{shown[1]}, {shown[2]}]" if len(shown) == 3 else shown[0] if shown else None
                table.setdefault(label, {})[column] = cell
    return table


def how_to(folder: Path, model: ImageCaptioner, evaluation: Evaluation, *, asked: bool = False) -> str:
    """The command that captions one's own picture with this model, in a language that it was scored in.

    Args:
        folder: The run's folder.
        model: The model.
        evaluation: Its scores.
        asked: Whether it answers questions.
    """
    folder = folder.resolve()
    shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    known = model.tokenizer.languages
    scored = [code for by in evaluation.captions.values() for code in by if code in known]
    language = f" --language {scored[-1]}" if len(known) > 1 and scored else ""
    heat = " --heatmap words.png" if model.model.has_heatmaps else ""
    asked_for = ' --prompt "QUESTION"' * asked + language + heat
    return f"{program()} caption YOUR_PICTURE.jpg {model_option(shown / 'model', model.model)}{asked_for}"


def model_option(folder: Path, model: nn.Module) -> str:
    """The words by which a command takes a saved model, with the modules that its own classes are of."""
    return " ".join([f"--model {quote(str(folder))}", *(f"--import {module}" for module in own_modules(model))])


def seconds_to_text(seconds: float) -> str:
    """12 s, or 3 min 5 s."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def save_text_model(model: Decoder | TextEncoder, tokenizer: Tokenizer, folder: Path, *, note: str = "") -> None:
    """Writes a language model or a text encoder, its tokenizer and a model card into one folder.

    Args:
        model: The model, one that can be saved.
        tokenizer: Its tokenizer.
        folder: Where to.
        note: More for the folder's README.md: scores, say.
    """
    assert isinstance(model, Pretrained)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    encodes = isinstance(model, TextEncoder)
    kind, tag = ("text encoder", "fill-mask") if encodes else ("language model", "text-generation")
    name, door = ("encoder", "TextEncoder.from_pretrained") if encodes else ("decoder", "load_lm")
    imports = (
        "from mmtransformer import TextEncoder, Tokenizer"
        if encodes
        else ("from mmtransformer import Tokenizer\nfrom mmtransformer.weights import load_lm")
    )
    languages = f"\nlanguage: [{', '.join(tokenizer.languages)}]" if tokenizer.languages else ""
    parameters = sum(p.numel() for p in model.parameters())
    card = f"""---
library_name: mmtransformer
pipeline_tag: {tag}{languages}
---

# {markup(folder.parent.name if folder.name == "model" else folder.name)}

A {kind} of mmtransformer: {parameters / 1e6:.1f} million parameters, {tokenizer.vocab_size} tokens.

```python
{imports}

{name} = {door}({json_text(folder.name)})  # this folder
tokenizer = Tokenizer.from_pretrained("{folder.name}")
```

{note}
"""
    (folder / "README.md").write_text(card, encoding="utf-8")
