"""Pictures with captions as a LightningDataModule for a captioner."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmtransformer.batch import CaptionBatch
from mmtransformer.data.files.read_options import ReadOptions
from mmtransformer.data.loading.dataset import CaptionDataset, Collate
from mmtransformer.data.loading.epoch_mixture import EpochMixture
from mmtransformer.data.loading.errors import BadImages
from mmtransformer.data.loading.features import FeatureCache, FeatureCacheConfig
from mmtransformer.data.loading.fingerprints import Parts
from mmtransformer.data.loading.module import DataModule, Lengths, LoaderConfig, Splits
from mmtransformer.data.loading.pixels import Resize, fitted, of_tower
from mmtransformer.data.loading.rows import CaptionRows, Opening, image_token
from mmtransformer.data.loading.source import Lazy, Pairs, PairSource, image_readers, size_of
from mmtransformer.data.loading.split_cache import once_a_split
from mmtransformer.data.open_sources import open_pairs
from mmtransformer.data.pairs import PairSplit
from mmtransformer.images import Augment, ImageError, ImageTransform
from mmtransformer.images.transforms import check_transform
from mmtransformer.serialization.printable import counted
from mmtransformer.text.tokenizer import Tokenizer
from mmtransformer.weights.processors.processor import Processor, ProcessorPromptBuilder

_log = logging.getLogger(__name__)
MAX_LEN = 64  # tokens of a caption unless told


class CaptionData(DataModule):
    """Pictures with captions, in batches grouped by length, the same for any number of workers and processes.

    Args:
        source: Where the pairs come from, such as `PairFiles`, `TarShards`, `Scenes`, or a `Mixture` of some; or a
            path: a folder, CSV, TSV, JSONL, JSON (COCO, Karpathy), Parquet, zip, tar or shards, whose format is
            detected. Of interleaved documents each picture is taken with the text that follows it.
        read: How a path is read, such as the names of columns, where that is not to be detected.
        transform: How a picture becomes pixels; saved with the model. None = as the vision encoder reads them, where
            it is a public one, else `ImageTransform()` at its size. A saved model that is fine-tuned brings its own.
        resize: How a picture is made to fit, in place of the vision encoder's own way, where `transform` is left out;
            "native" keeps its shape, with as many patches as the encoder has otherwise.
        augment: Random changes to training pictures, seeded by (seed, epoch, index).
        tokenizer: A tokenizer, or a folder or hub name to load one from; None trains one on the training captions. A
            saved model that is fine-tuned brings its own.
        vocab_size: The most tokens of a tokenizer that is trained here.
        captions_per_image: Captions of a picture in a batch; they share one pass of the vision encoder.
        max_len: The most tokens of a caption, with prompt and end; None = 64, or as many as a saved model that is
            fine-tuned reads, if these are fewer.
        cache_features: Compute a frozen vision encoder's visual tokens once, and how they are kept; None does not.
        batch_size: Pictures in a batch of one process.
        loader: How samples are loaded and ordered, and how many may be unusable.
        splits: Which splits are for training, validation and test.

    Attributes:
        add_image_tokens: Whether prompts show where the picture stands, by the tokenizer's image token, as in
            documents.
    """

    unit = "picture"
    add_image_tokens = False

    def __init__(
        self,
        source: PairSource | str,
        *,
        read: ReadOptions = ReadOptions(),
        transform: ImageTransform | None = None,
        resize: Resize | None = None,
        augment: Augment | None = None,
        tokenizer: Tokenizer | str | None = None,
        vocab_size: int = 4096,
        captions_per_image: int = 1,
        max_len: int | None = None,
        cache_features: FeatureCacheConfig | None = None,
        batch_size: int = 32,
        loader: LoaderConfig = LoaderConfig(),
        splits: Splits = Splits(),
    ):
        super().__init__(
            batch_size=batch_size, loader=loader, splits=splits, tokenizer=tokenizer, vocab_size=vocab_size
        )
        if captions_per_image < 1:
            raise ValueError(f"captions_per_image ({captions_per_image}) must be at least 1")
        self._open: Callable[..., PairSource] | None = None  # a path, once more
        if isinstance(source, str | Path):
            wanted = (splits.train, *splits.val)
            self._open = partial(open_pairs, source, read, max_bad_fraction=loader.max_bad_fraction, splits=wanted)
            source = self._open()
        self.source: PairSource = source
        self.processor: Processor | None = None
        self._opening: Callable[[str | None], Opening] | None = None
        self._tiled: Processor | None = None
        if transform is not None and resize is not None:
            raise ValueError(f"data.resize ({resize}) would have no effect beside data.transform: say transform.resize")
        self.transform = transform or fitted(ImageTransform(), resize)
        check_transform(self.transform)
        self.augment, self._own_transform = augment, transform
        self._resize: Resize | None = resize
        self.captions_per_image, self.cache_features = captions_per_image, cache_features
        self.max_len, self._own_max_len = MAX_LEN if max_len is None else max_len, max_len
        self._features: dict[str, FeatureCache] = {}
        self._datasets: dict[str, list[CaptionDataset]] = {}

    def train_tokenizer(self) -> Tokenizer:
        """Train a tokenizer on the training captions."""
        pairs = self.pairs(self.train_split)
        texts = (caption.text for i in range(len(pairs)) for caption in pairs.captions(i))
        return Tokenizer.train(texts, self.vocab_size, self.source.languages)

    def continue_from(
        self,
        tokenizer: Tokenizer,
        transform: ImageTransform,
        processor: Processor | None = None,
        max_len: int | None = None,
    ) -> None:
        """Use the tokenizer and transform of a saved model in place of one's own, before anything was tokenised.

        Args:
            tokenizer: Its tokenizer.
            transform: Its transform.
            processor: Of a public model: its prompts stand before the captions.
            max_len: The most tokens that it reads; None = any number.

        Raises:
            ValueError: If another transform was asked for, which could have no effect, a cache of features for a model
                that cuts pictures into tiles, or captions longer than it reads.
        """
        if max_len is not None and self.max_len > max_len:
            if self._own_max_len is not None:
                raise ValueError(
                    f"data.max_len ({self.max_len}) is more than the {max_len} tokens that the model of model.init "
                    f"reads: set data.max_len to {max_len} or less, or leave it out"
                )
            self.max_len = max_len
            _log.warning("captions may have %d tokens, as many as the model of model.init reads", max_len)
        if self._own_transform is not None and self._own_transform != transform:
            raise ValueError(
                f"data.transform would have no effect: the model that is trained on reads pictures as {transform}, not "
                f"as {self._own_transform}; leave data.transform out"
            )
        if self._open is not None and not self.source.languages and tokenizer.languages:
            self.source = self._open(known_languages=tokenizer.languages)
        self.tokenizer, self.transform, self.processor = tokenizer, transform, processor
        self._opening, self._tiled = None, None
        if processor is not None:
            self._opening = partial(_opening, processor)
            self._tiled = processor if processor.opening()[0] is None else None
        if self._tiled is not None and self.cache_features is not None:
            raise ValueError("data.cache_features is for pictures of one tile, and this model cuts them into several")
        self.clear_cache()
        self._features, self._datasets = {}, {}

    def use_vision_transform(self, own: ImageTransform, patch_size: int = 16, known: bool = True) -> str:
        """Read pictures as a vision encoder does, unless `transform` says otherwise; return a line that says how.

        Args:
            own: Its transform.
            patch_size: Side of its patches, px.
            known: Whether it says so itself; else `own` is the default.
        """
        self.transform, line = of_tower(self._own_transform, self._resize, own, patch_size, known)
        return line

    @property
    def prompt_builder(self) -> ProcessorPromptBuilder | None:
        """What makes the prompts of a public model; None = plain ones."""
        return None if self.processor is None else ProcessorPromptBuilder(self.processor)

    @property
    def answers_questions(self) -> bool:
        """Whether the captions to validate on are answers, of a model that is asked the questions."""
        return self.processor is not None and any(self.rows(split).asked for split in self.val_splits)

    @once_a_split
    def pairs(self, split: str) -> Pairs:
        """Return the pairs of a split; for a model without prompts, of conversations the first turn alone."""
        found = self.source.split(split)
        if self.processor is None and isinstance(found, PairSplit):
            first = found.without_follow_ups()
            if len(first) < len(found):
                what = "%s: left out, as the model reads no prompts: %s to later turns of conversations"
                _log.warning(what, split, counted(len(found) - len(first), "answer"))
            return first
        return found

    @once_a_split
    def rows(self, split: str) -> CaptionRows:
        """Return the captions of a split, tokenised at the first call; captions that had to be cut are reported."""
        rows = CaptionRows(
            self.pairs(split), self.tokenizer, self.max_len, mark=self.add_image_tokens, opening=self._opening
        )
        if rows.asked and self.processor is None:
            what = "%s: left out, as the model is trained without prompts: %s"
            _log.warning(what, split, counted(rows.asked, "question"))
        if rows.cut:
            _log.warning(
                "%s: %d of %d captions are longer than max_len (%d tokens; the longest has %d) and were cut",
                *(split, rows.cut, len(rows.prompt), self.max_len, rows.longest),
            )
        unknown = 0 if self.tokenizer.unk_id is None else int((rows.tokens == self.tokenizer.unk_id).sum())
        learned = int(rows.sizes.sum() - rows.prompt.sum())
        if 100 * unknown > learned:  # a rare sign here and there is no other script
            what = "%s: the tokenizer has no tokens for %.0f%% of what the captions say, and the model cannot learn it"
            _log.warning(f"{what} (`mmt check DATA --model MODEL` lists the words)", split, 100 * unknown / learned)
        return rows

    def prepare(self, split: str) -> None:
        """Read and tokenise a split."""
        self.rows(split)

    def bad_samples(self, split: str) -> BadImages:
        """Where pictures that cannot be read are recorded."""
        unit = "question" if self.processor is not None and self.rows(split).asked else self.unit
        return BadImages.of_split(self.report_folder(), split, len(self.pairs(split)), self.max_bad_fraction, unit)

    def bad_sample_readers(self, split: str, names: Collection[str]) -> dict[str, Callable[[], Any]]:
        """Of pictures that could not be read, those that are still in a split."""
        return image_readers(self.pairs(split), names)

    def use_features(
        self,
        captioner: nn.Module,
        *,
        stage: str | None = "fit",
        device: torch.device | str = "cpu",
        autocast: torch.dtype | None = None,
        progress: bool = True,
    ) -> None:
        """From now on yield visual tokens, computed once, in place of pixels; for a frozen vision encoder.

        Args:
            captioner: A captioner (its `forward_features` are what is stored), or a vision encoder alone.
            stage: Whose splits: "fit", "validate" or "test".
            device: Where to compute.
            autocast: The number format of the computation; None computes in that of the weights.
            progress: Show a progress bar.

        Raises:
            ValueError: If the vision encoder has trainable parameters, whose features would change.
        """
        vision = getattr(captioner, "vision", captioner)
        trainable = [name for name, parameter in vision.named_parameters() if parameter.requires_grad]
        if trainable:
            raise ValueError(
                f"cache_features needs a frozen vision encoder, but {len(trainable)} of its parameters are trainable "
                f"({trainable[0]}, ...); freeze it, or set cache_features to null"
            )
        if self.transform.patch_size is not None:
            raise ValueError(
                "cache_features keeps the tokens of pictures of one size, and these have sizes of their own: leave it "
                "out, or set data.resize to squash"
            )
        if self.augment is not None:
            raise ValueError(
                "cache_features cannot be used with augment; set augment to null (cache_features.flip mirrors)"
            )
        encode: Callable[[Tensor], Tensor] | None = None
        if vision is not captioner:  # A captioner's takes the images of each sample side by side.
            encode = getattr(captioner, "forward_features", None)
        config = self.cache_features or FeatureCacheConfig()
        for split in self.splits_of(stage):
            if split not in self._features:
                self._features[split] = FeatureCache.build(
                    vision,
                    self.pairs(split),
                    self.transform,
                    dataclasses.replace(config, flip=config.flip and split == self.train_split),
                    encode=None if encode is None else lambda pixels: encode(pixels[:, None])[:, 0],
                    autocast=autocast,
                    num_workers=self.num_workers,
                    device=device,
                    name=split,
                    progress=progress,
                )
            for dataset in self._datasets.get(split, ()):  # Lightning may have asked for the loaders already
                dataset.features = self._features[split]

    def dataset(self, split: str, *, training: bool = False) -> CaptionDataset:
        """Return a split as a dataset of `SampleIndex`s."""
        rows, every_language = self.rows(split), len(self.rows(split).languages)
        dataset = CaptionDataset(
            self.pairs(split),
            rows,
            self.transform,
            captions_per_image=max(self.captions_per_image, 0 if training else every_language),
            training=training,
            seed=self.seed,
            augment=self.augment if training else None,
            features=self._features.get(split),
            mirror=self.cache_features is not None and self.cache_features.flip,
            bad=self.bad_samples(split),
            tiled=self._tiled,
        )
        self._datasets.setdefault(split, []).append(dataset)
        return dataset

    def collate(self, split: str, *, training: bool = False) -> Collate:
        """What makes a `CaptionBatch` of pictures with their captions."""
        complete = None if self.processor is None else self.processor.complete
        mark = self.tokenizer.image_token_id if self.add_image_tokens else None
        native = self.transform.patch_size
        return Collate(self.tokenizer.pad_id, mark, patch_size=native, complete=complete, tiled=self._tiled)

    def lengths(self, split: str) -> Lengths:
        """How long the captions are that an epoch chooses."""
        rows = self.rows(split)
        return lambda epoch, index: rows.lengths(self.seed, epoch, self.captions_per_image, index)

    @once_a_split
    def patches(self, split: str) -> np.ndarray | None:
        """How many patches the pictures of a split have at most, by the sizes that their files name."""
        if self.transform.patch_size is None:
            return None
        pairs, native = self.pairs(split), self.transform.native
        crops = self.augment is not None and self.augment.scale != (1, 1)
        count = native.most_patches if crops else native.num_patches
        found = np.full(len(pairs), native.max_num_patches)
        for i in range(len(pairs)):
            with contextlib.suppress(ImageError):  # Another picture takes its place, which may be a large one.
                found[i] = count(*size_of(pairs, i))
        return found

    def mixture(self, split: str) -> EpochMixture | None:
        """How a training epoch is mixed; None if it is no mixture."""
        mixture: Callable[[int], EpochMixture] | None = getattr(self.pairs(split), "mixture", None)
        return None if mixture is None else mixture(self.seed)

    def prompts(self, batch: CaptionBatch, language: str | None = None) -> CaptionBatch:
        """Make the batch that generation starts from: the prompt alone, one row a picture.

        Args:
            batch: Any batch of this data.
            language: The language to caption in; None names none.

        Returns:
            The same pictures with tokens (b q).
        """
        if self.prompt_builder is not None:
            return self.prompt_builder(batch, [language])
        prompt = self.tokenizer.prompt(language if self.tokenizer.languages else None)
        prompt = torch.tensor(prompt + [image_token(self.tokenizer)] * self.add_image_tokens)
        tokens = prompt.to(batch.tokens.device).expand(len(batch.names), -1)
        attention_mask = torch.ones_like(tokens, dtype=torch.bool)
        image_index = (tokens == self.tokenizer.image_token_id).long().cumsum(1) if self.add_image_tokens else None
        return dataclasses.replace(
            batch, tokens=tokens, attention_mask=attention_mask, loss_mask=~attention_mask, image_index=image_index
        )

    def identity(self) -> dict[str, Any]:
        """How the pictures are mixed, and the tokenizer."""
        mixture = self.mixture(self.train_split)
        return {"mixture": [] if mixture is None else list(mixture.quotas), "tokenizer": self.tokenizer_hash}

    def parts(self, split: str) -> Parts:
        """Pictures and captions."""
        pairs, rows = self.pairs(split), self.rows(split)
        texts = Lazy(len(rows), lambda i: [part for caption in rows.captions[i] for part in caption])
        return Parts(pairs.name, texts, getattr(pairs, "fingerprint", None), sums=rows.sums)

    def mismatch_message(self, name: str, was: Any, now: Any) -> str:
        """What to say when the mixture or the tokenizer is not what it was."""
        if name == "mixture":
            return (
                f"an epoch of the run took {was} pictures of its sources, and now takes {now}; use the weights of "
                f"the run, or start a new one"
            )
        return super().mismatch_message(name, was, now)


def _opening(processor: Processor, question: str | None) -> Opening:
    ids, before = processor.opening(question)
    return Opening(ids or [], before)
