"""Image generation: a diffusion transformer that learns to draw what texts say. The mirror of captioning."""

from collections.abc import Sequence
from shlex import quote

import torch
from PIL import Image, ImageOps

from mmtransformer.batch import CaptionBatch, SumAndCount
from mmtransformer.data.captions import CaptionData
from mmtransformer.data.loading.source import Pairs
from mmtransformer.data.scenes.scenes import SceneSplit
from mmtransformer.diffusion.image_generation import ImageGenerationConfig
from mmtransformer.diffusion.text_to_image import TextToImageModel
from mmtransformer.images import ImageError
from mmtransformer.pipelines.image_captioner import ImageCaptioner
from mmtransformer.pipelines.image_generator import EXAMPLE, ImageGenerator
from mmtransformer.plots import Card, CardCaption, plot_gallery, save_image
from mmtransformer.serialization.printable import fenced, program, say
from mmtransformer.training.engine.optim import OptimConfig
from mmtransformer.training.engine.run import Run
from mmtransformer.training.engine.task import Task
from mmtransformer.training.evaluation.drawn_facts import (
    SEED,
    compare_seeds,
    reader_accuracy,
    score_drawings,
    table,
    texts_of,
)
from mmtransformer.training.evaluation.report import model_option
from mmtransformer.training.evaluation.second_reader import read_by_captioner
from mmtransformer.training.tasks.data_checks import check_texts


class ImageGeneration(Task[CaptionData]):
    """Trains a model to draw what people say of a picture.

    Where the data are drawn scenes, what the model draws is read back and judged by facts (`scenes.facts_from_image`);
    of other data the gallery shows it beside the pictures.

    Args:
        model: The model.
        optim: The optimizer and its schedule.
        generation: How pictures are drawn when the run is evaluated; saved with the model.
        num_test_images: Texts of each split and language that are drawn and judged when the run ends.
        num_validation_images: The same, fewer, at every validation: a curve over the run; 0 = none.
        guidance_scales: The first half as many texts are also drawn with each of these: a curve.
        captioner: Folder of a captioner of scenes that also reads what is drawn of the validation splits, and whose
            vision encoder tells how far drawings are from true pictures; None = the reader by rules alone.
        num_gallery_images: Pictures in the gallery.
    """

    data_kind = CaptionData
    val_metrics = (("facts", "{:.1%} of facts drawn right"),)

    def __init__(
        self,
        model: TextToImageModel,
        *,
        optim: OptimConfig = OptimConfig(),  # noqa: B008 (frozen)
        generation: ImageGenerationConfig = ImageGenerationConfig(),  # noqa: B008 (frozen)
        num_test_images: int = 200,
        num_validation_images: int = 0,
        guidance_scales: Sequence[float] = (),
        captioner: str | None = None,
        num_gallery_images: int = 24,
    ) -> None:
        super().__init__(optim)
        if num_test_images < 1 or num_gallery_images < 0 or num_validation_images < 0:
            raise ValueError(
                f"num_test_images ({num_test_images}) must be at least 1, num_validation_images "
                f"({num_validation_images}) and num_gallery_images ({num_gallery_images}) not below 0"
            )
        self.model, self.generation, self.num_gallery_images = model, generation, num_gallery_images
        self.num_test_images, self.num_validation_images = num_test_images, num_validation_images
        self.guidance_scales = tuple(guidance_scales)
        self.captioner = None if captioner is None else ImageCaptioner.from_pretrained(captioner, device="cpu")

    def setup(self, stage: str) -> None:
        """Checks that model and data fit, before anything is computed.

        Raises:
            ValueError: If vocabulary or texts are larger than the model, or patches do not divide the pictures.
        """
        if self.data is not None:
            check_texts(self.data, self.data.max_len, self.model, "text")
            ImageGenerator(self.model, self.data.tokenizer, self.data.transform, device="cpu")

    def loss(self, batch: CaptionBatch) -> SumAndCount:
        """The losses of the batch's texts, each at a time of its own."""
        return self.model(batch)

    def validation_step(self, batch: CaptionBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds up the loss, with the same times and noise in every validation."""
        chance = torch.Generator().manual_seed(batch_idx)
        self.add(self.split_names[dataloader_idx], "loss", self.model(batch, generator=chance))

    def on_validation_epoch_end(self) -> None:
        """Draws and judges a few texts of each split, where its scenes are known."""
        data = self.data
        if data is not None and self.num_validation_images and not self.trainer.sanity_checking:
            painter = ImageGenerator(
                self.model, data.tokenizer, data.transform, generation=self.generation, device=self.device
            )
            for split, batches in zip(self.split_names, self.trainer.num_val_batches, strict=True):
                pairs, count = data.pairs(split), min(self.num_validation_images, int(batches * data.batch_size))
                if not isinstance(pairs, SceneSplit):
                    continue
                for language in pairs.languages:
                    found, _ = score_drawings(painter, pairs, language, count)
                    right, true = torch.tensor(found.right.right), torch.tensor(found.right.true)
                    self.add(split, "facts", SumAndCount(right.to(self.device), true.to(self.device)))
        super().on_validation_epoch_end()

    def finish(self, run: Run) -> None:
        """Draws the texts of the validation splits; writes scores, a gallery, curves and the model."""
        data = self.data
        if data is None:
            return
        painter = ImageGenerator(
            self.model, data.tokenizer, data.transform, generation=self.generation, device=run.device
        )
        count = self.num_test_images if run.limit_batches is None else min(self.num_test_images, 2 * run.limit_batches)
        scores, curve, reader, seeds, second, cards = {}, {}, {}, {}, {}, []
        losses, example = {}, EXAMPLE
        for split in data.val_splits:
            pairs = data.pairs(split)
            if not isinstance(pairs, SceneSplit):
                drawn = draw_captions(painter, pairs, min(self.num_gallery_images // len(data.val_splits), count))
                cards += drawn
                example = min((card.captions[0].text for card in drawn), key=len, default=example)
                if (loss := self.validation_means.get(f"{split}/loss")) is not None:
                    losses[split] = loss
                continue
            reader[split] = reader_accuracy(pairs, count).to_dict()
            scores[split], second[split] = {}, {}
            for language in pairs.languages:
                found, drawings = score_drawings(painter, pairs, language, count)
                scores[split][language] = found.to_dict()
                if self.captioner is not None:
                    second[split][language] = read_by_captioner(self.captioner, pairs, language, drawings)
                if language == pairs.languages[0]:
                    seeds[split] = compare_seeds(painter, pairs, language, drawings[: max(count // 4, 2)])
                share = max(self.num_gallery_images // (2 * len(data.val_splits)), 1)
                shown = zip(texts_of(pairs, language, share), drawings, found.judgements, strict=False)
                for text, image, judged in shown:
                    cards.append(Card(image, [CardCaption(text, language, facts=judged.claims)]))
            for scale in self.guidance_scales:
                some, _ = score_drawings(painter, pairs, pairs.languages[0], max(count // 2, 1), guidance_scale=scale)
                curve.setdefault(split, {})[str(scale)] = some.to_dict()
        metrics = {"drawings": scores, "reader": reader, "guidance": curve, "seeds": seeds, "captioner": second}
        metrics |= {"loss": losses} if losses else {}
        found = "\n".join(
            filter(None, (table(scores), *(f"{split}: loss {loss:.4f}" for split, loss in losses.items())))
        )
        note = f"## Scores\n\n{fenced(found)}" if found else ""
        painter.save_pretrained(run.folder / "model", card=note, example=example)
        if cards:
            gallery = plot_gallery(cards, title=run.title, columns=6, card_width=200)
            save_image(gallery, run.folder / "gallery.png")
        if limits := ", ".join(f"{split} {read_['facts']:.1%}" for split, read_ in reader.items()):
            found = f"of true pictures the reader reads {limits} of the facts\n{found}"
        for split, both in seeds.items():
            found += (
                f"\n{split}: two seeds of a text say the same {both['same']:.1%} of the time; their pixels are "
                f"{both['pixels']:.3f} apart, those of different texts {both['texts']:.3f}"
            )
        for split, languages in second.items():
            for language, saw in languages.items():
                found += (
                    f"\n{split} {language}: the captioner sees {saw['facts']:.1%} of the facts, "
                    f"{saw['true_facts']:.1%} in true pictures; distance {saw['distance']:.2f}"
                )
        self.conclude(run, metrics, found, files={"gallery": "gallery.png"} if cards else {})
        command = (
            f"{program()} draw {quote(example)} {model_option(run.folder / 'model', self.model)} --out picture.png"
        )
        say(f"\nDraw something of your own:\n  {command}")


def draw_captions(painter: ImageGenerator, pairs: Pairs, count: int) -> list[Card]:
    """Cards of what is drawn of the first captions of a split, each to the right of the picture that it is of."""
    cards = []
    for i in range(len(pairs)):
        if len(cards) == count:
            break
        try:
            image, caption = pairs.image(i), pairs.captions(i)[0]
        except ImageError:
            continue
        text = " ".join(caption.text.split())
        language = caption.language if caption.language in painter.tokenizer.languages else None
        ((drawn,),) = painter(text, language=language, seed=SEED + i, truncate=True)
        sheet = Image.new("RGB", (2 * drawn.width + 4, drawn.height), "white")
        sheet.paste(ImageOps.pad(image, drawn.size, color="white"))
        sheet.paste(drawn, (drawn.width + 4, 0))
        cards.append(Card(sheet, [CardCaption(text, language)], heading=pairs.name(i)))
    return cards
