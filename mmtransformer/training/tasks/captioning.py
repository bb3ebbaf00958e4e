"""Captioning: any captioner as a training task. The loss is per token, whatever the batches and processes."""

import copy
import dataclasses
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from mmtransformer.backbones.base import Decoder
from mmtransformer.backbones.extended_vocabulary import ExtendedDecoder
from mmtransformer.batch import CaptionBatch, SumAndCount
from mmtransformer.captioners.base import Captioner, caption_loss
from mmtransformer.captioners.coca import CoCa
from mmtransformer.captioners.published.hf_captioner import HFBatch, HFCaptioner
from mmtransformer.data.captions import CaptionData
from mmtransformer.data.interleaved_data import InterleavedData
from mmtransformer.generation.captions import CAPTIONING
from mmtransformer.generation.config import GenerationConfig
from mmtransformer.generation.guidance import blank_images
from mmtransformer.layers.lora import merge_lora
from mmtransformer.layers.modes import freeze, is_frozen
from mmtransformer.pipelines.few_shot import check_reader
from mmtransformer.pipelines.image_captioner import ImageCaptioner
from mmtransformer.serialization.printable import counted, program, say
from mmtransformer.text.tokenizer import Tokenizer
from mmtransformer.training.callbacks.samples import sample_captions
from mmtransformer.training.engine.optim import OptimConfig
from mmtransformer.training.engine.run import Run
from mmtransformer.training.engine.task import Task
from mmtransformer.training.evaluation.evaluation import ablation_text, evaluate, image_ablation
from mmtransformer.training.evaluation.few_shot import score_few_shot
from mmtransformer.training.evaluation.report import how_to, seconds_to_text, write_report
from mmtransformer.training.tasks.data_checks import check_pixels, check_texts, refuse_empty_captions
from mmtransformer.training.tasks.tuning import TuningConfig
from mmtransformer.weights.adapters import Adapter, hash_of, learned
from mmtransformer.weights.captioner_folders import base_name, open_captioner


class Captioning(Task):
    """Trains a captioner to say what people say of a picture.

    Every validation also asks whether the pictures are used at all: the loss with the right pictures is set beside
    that with other pictures of the batch and that with blank ones. A captioner that only knows what captions sound
    like has three equal losses.

    Args:
        captioner: The model.
        optim: The optimizer and its schedule.
        label_smoothing: Share of the target's probability that is spread over the vocabulary, in training only.
        image_ablation_batches: Batches of each validation that are looked at with wrong and blank pictures too.
        generation: How captions are searched for when the run is evaluated; saved with the model.
        num_shots: Numbers of examples to caption after as well when the run is evaluated, such as [0, 1, 4]; for
            models that read pictures inside the text.
    """

    def __init__(
        self,
        captioner: Captioner,
        *,
        optim: OptimConfig = OptimConfig(),  # noqa: B008 (frozen)
        label_smoothing: float = 0.0,
        image_ablation_batches: int = 4,
        generation: GenerationConfig = CAPTIONING,
        num_shots: Sequence[int] = (),
    ) -> None:
        super().__init__(optim)
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing ({label_smoothing}) must be at least 0 and below 1")
        self.captioner, self.label_smoothing = captioner, label_smoothing
        self.image_ablation_batches = image_ablation_batches
        self.generation, self.num_shots = generation, tuple(num_shots)
        if self.num_shots:
            check_reader(captioner)
        self.start: ImageCaptioner | None = None
        """The saved model that this one goes on from; its tokenizer and transform are then the data's."""
        self.tuning: TuningConfig | None = None
        """What of it learns, if that was said."""

    def loss(self, batch: CaptionBatch) -> SumAndCount:
        """The losses of the batch's target tokens, and what else the captioner trains on."""
        return self.captioner(batch, label_smoothing=self.label_smoothing).sums

    def sample(self, turn: int) -> list[str]:
        """What the model says of a held-out picture, in each of the data's languages."""
        return [] if self.data is None else sample_captions(self.captioner, self.data, self.device, turn=turn)

    def describe(self, split: str, metrics: Mapping[str, Tensor]) -> str:
        """A validation's losses, with those of other and blank pictures beside them."""
        text = super().describe(split, metrics)
        said = ablation_text(image_ablation(metrics, [split])[split])
        return f"{text} ({said})" if said else text

    def setup(self, stage: str) -> None:
        """Checks that model and data fit, before anything is computed.

        Raises:
            ValueError: If the vocabulary or the captions are larger than the model, the pictures are of another size,
                or the data is interleaved and the model does not read where pictures stand.
        """
        data = self.data
        if interleaved := isinstance(getattr(self.trainer, "datamodule", None), InterleavedData):
            check_reader(self.captioner, blind=True)
        if data is None:
            return
        self.generation = dataclasses.replace(self.generation, add_image_tokens=data.add_image_tokens)
        check_texts(data, data.max_len, self.captioner, "decoder", "row_len" if interleaved else "max_len")
        if isinstance(self.captioner, CoCa) and self.captioner.contrastive_weight:
            refuse_empty_captions(data, testing=stage == "test")
        if not isinstance(self.captioner, HFCaptioner):  # Its own processor makes its pixels.
            check_pixels(data, self.captioner)

    @property
    def data(self) -> CaptionData | None:
        """The run's pairs: its data, or those that interleaved data is scored on; None for data of other kinds."""
        data = getattr(self.trainer, "datamodule", None)
        data = data.captions if isinstance(data, InterleavedData) else data
        return data if isinstance(data, CaptionData) else None

    def on_fit_start(self) -> None:
        """Computes the features of a frozen vision tower, if the data keeps a cache."""
        data = self.data
        if data is not None and data.cache_features:
            half = self.trainer.precision == "bf16-mixed"
            data.use_features(
                self.captioner,
                device=self.device,
                autocast=torch.bfloat16 if half else None,
                progress=sys.stderr.isatty(),
            )

    def validation_step(self, batch: CaptionBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds up the losses with right, other and blank pictures."""
        split = self.split_names[dataloader_idx]
        if not batch.loss_mask[:, 1:].any():
            return
        loss = caption_loss(self.captioner, batch, reduction="sum")
        self.add(split, "loss", loss)
        others = other_images(batch) if batch_idx < self.image_ablation_batches and len(batch.names) > 1 else None
        if others is not None:
            self.add(split, "loss_right_image", loss)
            blank = blank_images(self.captioner, batch, self.data.transform.size if self.data else None)
            for name, other in (("other", others), ("blank", blank)):
                self.add(split, f"loss_{name}_image", caption_loss(self.captioner, other, reduction="sum"))

    def finish(self, run: Run) -> None:
        """Captions the validation splits, and writes scores, galleries, curves and the model."""
        data, trainer = self.data, self.trainer
        if data is None:
            return
        whole = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]  # a validation sets another
        took = f"trained {counted(trainer.global_step, 'step')} in {seconds_to_text(run.seconds)}"
        say(f"{took}; now captioning {', '.join(data.val_splits)}")
        facts = self.training_facts(run)
        use = image_ablation(self.validation_means, data.val_splits)
        if not use and trainer.world_size == 1:  # the run ended before its first validation
            trainer.validate(self, datamodule=data, verbose=False)
            use = image_ablation(self.validation_means, data.val_splits)
        began, adapter = time.monotonic(), self._adapter()
        if adapter is not None:
            self._merge(adapter)
        evaluation = evaluate(
            self.captioner,
            data,
            generation=self.generation,
            device=run.device,
            autocast=run.autocast,
            limit_batches=run.limit_batches,
        )
        few_shot, note = self._score_few_shot(whole, run) if self.num_shots else ({}, "")
        facts["evaluation_seconds"] = round(time.monotonic() - began, 1)
        merge_lora(self.captioner)
        model = ImageCaptioner(
            self.captioner,
            _most_trained_first(data),
            data.transform,
            generation=self.generation,
            device=run.device,
            processor=data.processor,
        )
        if adapter is not None and self.tuning is not None and not self.tuning.save_merged:
            model.adapter = adapter
        extra = few_shot | {"image_ablation": use, "training": facts}
        write_report(run.folder, model, data, evaluation, extra=extra, note=note)
        unit = "question" if data.answers_questions else "picture"
        lines = ["", evaluation.table(), "", *run.unread(unit)]
        lines += [f"{split}: loss of the {said}" for split, x in use.items() if (said := ablation_text(x))]
        lines += ["", f"metrics   {run.folder / 'metrics.json'}"]
        lines += [f"gallery   {run.folder / 'gallery.png'}   {run.folder / 'gallery.html'}"]
        lines += [f"model     {run.folder / 'model'}", "", "Caption a picture of your own:"]
        lines += [f"  {how_to(run.folder, model, evaluation, asked=data.answers_questions)}"]
        say("\n".join(lines))

    def _adapter(self) -> Adapter | None:
        """What was learned on top of a public model, where not all of it learned."""
        start, tuning = self.start, self.tuning
        if start is None or tuning is None or tuning.everything or start.processor is None or start.processor.adapted:
            return None
        folder = start.processor.folder
        assert folder is not None
        base = base_name(folder)
        hub = base if "/" in base else ""
        scaling = tuning.alpha / tuning.rank if tuning.method == "lora" else 1.0
        revision = folder.name if hub else None  # A cache's folders are called by the commit.
        return Adapter(hub or str(folder.resolve()), hash_of(folder), learned(self.captioner), scaling, revision)

    def _merge(self, adapter: Adapter) -> None:
        """Puts what was learned on the base's own numbers, which frozen parts in bfloat16 have rounded."""
        assert self.start is not None
        assert self.start.processor is not None
        start = self.start.processor
        assert start.folder is not None
        if self.tuning is not None and self.tuning.frozen_dtype != "float32":
            self.captioner = open_captioner(start.folder, start.options)[0]
            adapter.apply(self.captioner)

    def _score_few_shot(self, data: CaptionData | InterleavedData, run: Run) -> tuple[dict[str, object], str]:
        """The scores after examples, and a line of them; a prompt that does not fit is said, and costs no model."""
        try:
            scored = score_few_shot(
                self.captioner,
                data,
                self.num_shots,
                generation=self.generation,
                device=run.device,
                autocast=run.autocast,
                limit_batches=run.limit_batches,
            )
        except ValueError as error:
            say(f"not scored after examples (num_shots {list(self.num_shots)}): {error}")
            return {"few_shot": {"error": str(error)}}, ""
        say(f"\n{scored.table()}")
        return {"few_shot": scored.to_dict()}, scored.headline()


_START = "runs/caption_scenes/model"


def finetune(
    init: str = _START,
    *,
    freeze_vision: bool = False,
    freeze_decoder: bool = False,
    tuning: TuningConfig | None = None,
    add_languages: Sequence[str] = (),
    optim: OptimConfig = OptimConfig(lr=3e-4, warmup_steps=50),  # noqa: B008 (frozen)
    label_smoothing: float = 0.0,
    image_ablation_batches: int = 4,
    generation: GenerationConfig | None = None,
) -> Captioning:
    """Goes on from a saved or public model, with its own tokenizer, image transform and prompt.

    What of a public model its makers keep frozen (BLIP-2's vision encoder and language model) stays so.

    Args:
        init: The model's folder, or its name on the hub.
        freeze_vision: Leave the vision tower as it is, and train the rest.
        freeze_decoder: Leave the language model as it is, and train the rest.
        tuning: Which parts learn and how: in full, their last blocks, low-rank products. Of a public model, what
            learned is then saved as an adapter. None = as its makers left it, and as freeze_vision and freeze_decoder
            say.
        add_languages: Codes of languages that the model does not know yet, such as "de": each gets a token, and the
            language model's tables a row for it.
        optim: The optimizer and its schedule.
        label_smoothing: Share of the target's probability that is spread over the vocabulary, in training only.
        image_ablation_batches: Batches of each validation that are looked at with wrong and blank pictures too.
        generation: How captions are searched for; that of the saved model unless told.
    """
    if init == _START and not Path(init).is_dir():
        raise ValueError(
            f"{init}: no such folder; it is where training starts unless told: make it with "
            f"`{program()} fit --config caption_scenes`, or name another model with --model.init"
        )
    saved = ImageCaptioner.from_pretrained(init, device="cpu")
    captioner = saved.model
    if add_languages:
        _add_languages(saved, add_languages)
    if tuning is not None:
        public = saved.processor is not None and not saved.processor.adapted
        if tuning.frozen_dtype != "float32" and not public:
            raise ValueError("tuning.frozen_dtype is for public models as they came: nothing else has their numbers")
        if freeze_vision or freeze_decoder:
            raise ValueError("tuning.parts says what learns: leave freeze_vision and freeze_decoder out")
        tuning.apply(captioner)
        say(tuning.describe(captioner))
    if freeze_vision and not is_frozen(captioner.vision):
        freeze(captioner.vision)
    if freeze_decoder:
        freeze(_decoder(captioner, "freeze_decoder"))
    module = Captioning(
        captioner,
        optim=optim,
        label_smoothing=label_smoothing,
        image_ablation_batches=image_ablation_batches,
        generation=generation or saved.generation,
    )
    module.start, module.tuning = saved, tuning
    return module


def _decoder(captioner: Captioner, asked: str) -> Decoder:
    """The language model of a captioner.

    Raises:
        ValueError: If it has none by this name.
    """
    decoder = getattr(captioner, "decoder", None)
    if not isinstance(decoder, Decoder):
        raise ValueError(f"{asked} is for captioners with a language model; {type(captioner).__name__} has none")
    return decoder


def _add_languages(saved: ImageCaptioner, languages: Sequence[str]) -> None:
    """Lets a model caption in more languages once it has learnt them: tokens, and rows of its tables for them.

    Raises:
        ValueError: If it knows one of them, or a code is none.
    """
    known = saved.tokenizer.languages
    if again := [code for code in languages if code in known]:
        raise ValueError(f"add_languages: the model knows {', '.join(again)} already")
    if not known:
        raise ValueError("add_languages: the model names no languages, and has learnt to caption without; start anew")
    more = saved.tokenizer.with_special_tokens(languages=languages)
    new, first = more.vocab_size - saved.tokenizer.vocab_size, saved.tokenizer.vocab_size
    decoder = _decoder(saved.model, "add_languages")
    if new:
        saved.model.decoder = ExtendedDecoder(decoder, new, first=first).merged().requires_grad_(True)
    saved.tokenizer = more


def _most_trained_first(data: CaptionData) -> Tokenizer:
    """The tokenizer with the language first that captions are written in unless one is asked for.

    That is the first that it knows, of those with at least half as many captions to train on as the most frequent one.
    """
    known = data.tokenizer.languages
    if len(known) < 2 or data.train_split not in data.source.splits():  # what scores interleaved data may have none
        return data.tokenizer
    pairs = data.source.split(data.train_split)
    some = range(0, len(pairs), max(1, len(pairs) // 10_000))
    counts = Counter(caption.language for i in some for caption in pairs.captions(i))
    most = max(counts[code] for code in known)
    found = copy.copy(data.tokenizer)
    found.languages = tuple(sorted(known, key=lambda code: code != next(c for c in known if 2 * counts[c] >= most)))
    return found


def other_images(batch: CaptionBatch) -> CaptionBatch | None:
    """The batch with every (real) picture moved on by one place, so that each text gets another's picture.

    None where pictures are cut into tiles and are of several shapes, which have prompts of their own.
    """
    if isinstance(batch, HFBatch):  # Its pictures are part of its prompts.
        return None
    shape = batch.visual.shape[:2]
    for name in ("image_sizes", "grids"):
        if (found := getattr(batch, name, None)) is not None:
            if any(x != y for x, y in pairwise(torch.as_tensor(found).tolist())):
                return None
            return dataclasses.replace(batch, pixels=batch.visual.roll(1, 0))
    real = torch.ones(shape, dtype=torch.bool) if batch.image_mask is None else batch.image_mask.cpu()
    places = real.flatten().nonzero()[:, 0]
    order = torch.arange(real.numel())  # autocast cannot `roll` float16 on a CPU
    order[places] = places.roll(1)

    return batch.pick_images(order.unflatten(0, shape))
