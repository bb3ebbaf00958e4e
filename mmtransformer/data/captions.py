"""Pictures with captions as a LightningDataModule for a captioner."""

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning
import numpy as np
import torch
from torch import Tensor, nn

from mmtransformer.captioner import CaptionBatch
from mmtransformer.data.dataset import CaptionDataset, Collate
from mmtransformer.data.faults import BadPictures
from mmtransformer.data.features import FeatureCache
from mmtransformer.data.mixture import Mixing
from mmtransformer.data.rows import CaptionRows, image_token
from mmtransformer.data.sampler import PictureSampler, ResumableLoader
from mmtransformer.data.source import Pairs, PairSource
from mmtransformer.images import Augment, ImageTransform
from mmtransformer.pretrained import find_folder
from mmtransformer.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


class CaptionData(lightning.LightningDataModule):
    """Pictures with captions, in batches grouped by length, the same for any number of workers and processes.

    Args:
        source: Where the pairs come from, such as `PairFiles`, `Shards`, `Scenes`, or a `Mixture` of some.
        image: How a picture becomes pixels; saved with the model.
        augment: Random changes to training pictures, seeded by (seed, epoch, index).
        tokenizer: A tokenizer, or a folder or hub name to load one from; None trains one on the training captions.
        vocab_size: The most words of a tokenizer that is trained here.
        captions_per_picture: Captions of a picture in a batch; they share one pass of the vision tower.
        batch_size: Pictures in a batch of one process.
        max_len: The most tokens of a caption, with prompt and end.
        num_workers: Processes that load pictures. The batches are the same for any number.
        seed: Seed of order, augmentation and choice of captions.
        train_split: The split to train on.
        val_splits: The splits to validate on.
        test_splits: The splits to test on.
        languages: Language codes that the tokenizer which is trained here gets; those of the source unless told.
        drop_last: Leave out the last training batch of an epoch if it is not full.
        cache_features: Compute a frozen vision tower's visual tokens once, and read them from `cache_dir`.
        cache_dir: Folder of the visual tokens; "features" beside the runs unless told.
        flip_features: Keep mirrored visual tokens as well, and use them half of the time.
        cache_dtype: Number format of the visual tokens.
        mark_pictures: Let the prompt show where the picture stands, by the tokenizer's image token, as in documents.
        max_bad: Share of the pictures that may be unreadable before the run stops.
        report_dir: Folder of the report on unreadable pictures; the run's folder unless told.
    """

    def __init__(
        self,
        source: PairSource,
        *,
        image: ImageTransform,
        augment: Augment | None = None,
        tokenizer: Tokenizer | str | None = None,
        vocab_size: int = 4096,
        captions_per_picture: int = 1,
        batch_size: int = 32,
        max_len: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        train_split: str = "train",
        val_splits: Sequence[str] = ("val",),
        test_splits: Sequence[str] = ("test",),
        languages: Sequence[str] | None = None,
        drop_last: bool = False,
        cache_features: bool = False,
        cache_dir: str | None = None,
        flip_features: bool = False,
        cache_dtype: Literal["float16", "bfloat16", "float32"] = "float16",
        mark_pictures: bool = False,
        max_bad: float = 0.01,
        report_dir: str | None = None,
    ):
        super().__init__()
        for name, value in (("captions_per_picture", captions_per_picture), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} ({value}) must be at least 1")
        for name, value in (("val_splits", val_splits), ("test_splits", test_splits)):
            if isinstance(value, str):
                raise ValueError(f"{name} must be a list of splits: [{value}]")
        self.source, self.transform, self.augment = source, image, augment
        self.vocab_size, self.languages = vocab_size, languages
        self.captions_per_picture, self.batch_size, self.max_len = captions_per_picture, batch_size, max_len
        self.num_workers, self.seed, self.drop_last = num_workers, seed, drop_last
        self.train_split, self.val_splits, self.test_splits = (
            train_split,
            tuple(val_splits),
            tuple(test_splits),
        )
        self.cache_features, self.cache_dir, self.flip_features = cache_features, cache_dir, flip_features
        self.cache_dtype: Literal["float16", "bfloat16", "float32"] = cache_dtype
        self.mark_pictures, self.max_bad, self.report_dir = mark_pictures, max_bad, report_dir
        self._given = tokenizer
        self._tokenizer: Tokenizer | None = None
        self._pairs: dict[str, Pairs] = {}
        self._rows: dict[str, CaptionRows] = {}
        self._features: dict[str, FeatureCache] = {}
        self._datasets: dict[str, list[CaptionDataset]] = {}

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer: the one given, loaded, or trained on the training captions at the first call."""
        if self._tokenizer is None:
            if isinstance(self._given, Tokenizer):
                self._tokenizer = self._given
            elif self._given is not None:
                self._tokenizer = Tokenizer.from_folder(find_folder(self._given))
            else:
                pairs = self.pairs(self.train_split)
                texts = (caption.text for i in range(len(pairs)) for caption in pairs.captions(i))
                languages = self.source.languages if self.languages is None else self.languages
                self._tokenizer = Tokenizer.train(texts, self.vocab_size, languages)
        return self._tokenizer

    def continue_from(self, tokenizer: Tokenizer, image: ImageTransform) -> None:
        """Use the tokenizer and transform of a saved model in place of one's own, before anything was tokenised."""
        self._tokenizer, self.transform = tokenizer, image
        self._rows, self._features, self._datasets = {}, {}, {}

    def pairs(self, split: str) -> Pairs:
        """Return the pairs of a split."""
        if split not in self._pairs:
            self._pairs[split] = self.source.split(split)
        return self._pairs[split]

    def rows(self, split: str) -> CaptionRows:
        """Return the captions of a split, tokenised at the first call; captions that had to be cut are reported."""
        if split not in self._rows:
            rows = self._rows[split] = CaptionRows(
                self.pairs(split), self.tokenizer, self.max_len, mark=self.mark_pictures
            )
            if rows.cut:
                _log.warning(
                    "%s: %d of %d captions are longer than max_len (%d tokens; the longest has %d) and were cut",
                    *(split, rows.cut, len(rows.prompt), self.max_len, rows.longest),
                )
        return self._rows[split]

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenise the splits of a stage: "fit", "validate" or "test"."""
        for split in self._splits_of(stage):
            self.rows(split)
            if (trainer := self.trainer) is not None and trainer.is_global_zero and not trainer.ckpt_path:
                self._bad(split).reset()

    def _splits_of(self, stage: str | None) -> tuple[str, ...]:
        splits = {
            "fit": (self.train_split, *self.val_splits),
            "validate": self.val_splits,
            "test": self.test_splits,
        }
        return splits.get(stage or "fit", ())

    def use_features(
        self,
        captioner: nn.Module,
        *,
        stage: str | None = "fit",
        device: torch.device | str = "cpu",
        autocast: torch.dtype | None = None,
        progress: bool = True,
    ) -> None:
        """From now on yield visual tokens, computed once, in place of pixels; for a frozen vision tower.

        Args:
            captioner: A captioner (its `encode` is what is stored), or a vision tower alone.
            stage: Whose splits: "fit", "validate" or "test".
            device: Where to compute.
            autocast: The number format of the computation; None computes in that of the weights.
            progress: Show a progress bar.

        Raises:
            ValueError: If the vision tower has trainable parameters, whose features would change.
        """
        vision = getattr(captioner, "vision", captioner)
        trainable = [name for name, parameter in vision.named_parameters() if parameter.requires_grad]
        if trainable:
            raise ValueError(
                f"cache_features needs a frozen vision tower, but {len(trainable)} of its parameters are trainable "
                f"({trainable[0]}, ...); freeze it, or set cache_features to false"
            )
        if self.augment is not None:
            raise ValueError(
                "cache_features cannot be used with augment; set augment to null (flip_features mirrors)"
            )
        encode: Callable[[Tensor], Tensor] | None = getattr(captioner, "encode", None)
        folder = self.cache_dir or "features"
        for split in self._splits_of(stage):
            if split not in self._features:
                self._features[split] = FeatureCache.build(
                    vision,
                    self.pairs(split),
                    self.transform,
                    folder,
                    encode=None if encode is None else lambda pixels: encode(pixels[:, None])[:, 0],
                    flip=self.flip_features and split == self.train_split,
                    dtype=self.cache_dtype,
                    autocast=autocast,
                    num_workers=self.num_workers,
                    device=device,
                    name=split,
                    progress=progress,
                )
            for dataset in self._datasets.get(split, ()):  # Lightning may have asked for the loaders already
                dataset.features = self._features[split]

    def dataset(self, split: str, *, training: bool = False) -> CaptionDataset:
        """Return a split as a dataset of `Pick`s."""
        rows, every_language = self.rows(split), len(self.rows(split).languages)
        dataset = CaptionDataset(
            self.pairs(split),
            rows,
            self.transform,
            captions_per_picture=max(self.captions_per_picture, 0 if training else every_language),
            training=training,
            seed=self.seed,
            augment=self.augment if training else None,
            features=self._features.get(split),
            mirror=self.flip_features,
            bad=self._bad(split),
        )
        self._datasets.setdefault(split, []).append(dataset)
        return dataset

    def _bad(self, split: str) -> BadPictures:
        folder = self.report_dir or (self.trainer.default_root_dir if self.trainer else ".")
        return BadPictures(Path(folder) / f"bad_pictures_{split}.jsonl", len(self.pairs(split)), self.max_bad)

    def loader(self, split: str, *, training: bool = False) -> ResumableLoader:
        """Return the loader of a split: shuffled, grouped and augmented for training, plain otherwise.

        Raises:
            ValueError: If Lightning would replace the sampler.
        """
        dataset, rows = self.dataset(split, training=training), self.rows(split)
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        if self.trainer and world > 1 and self.trainer._accelerator_connector.use_distributed_sampler:
            raise ValueError(
                f"set use_distributed_sampler to false: CaptionData shares the pictures among the {world} processes "
                f"itself, and Lightning's sampler would change their order"
            )
        mixing: Callable[[int], Mixing] | None = getattr(dataset.pairs, "mixing", None)
        pool = mixing(self.seed) if mixing and training else None

        def lengths(epoch: int) -> np.ndarray:
            index, turn = (None, epoch) if pool is None else pool.pictures(epoch)
            return rows.lengths(self.seed, turn, self.captions_per_picture, index)

        sampler = PictureSampler(
            len(dataset) if pool is None else pool.size,
            self.batch_size,
            seed=self.seed,
            shuffle=training,
            lengths=lengths if training else None,
            pool=pool,
            block=self.batch_size * world * getattr(self.trainer, "accumulate_grad_batches", 1),
            rank=rank,
            world=world,
            drop_last=training and self.drop_last,
        )
        return ResumableLoader(
            dataset,
            sampler,
            Collate(self.tokenizer.pad_id, image_id=self.tokenizer.image_id if self.mark_pictures else None),
            num_workers=self.num_workers,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        )

    def train_dataloader(self) -> ResumableLoader:
        """Return the training batches."""
        return self.loader(self.train_split, training=True)

    def val_dataloader(self) -> list[ResumableLoader]:
        """Return one loader for each of `val_splits`, in this order."""
        return [self.loader(split) for split in self.val_splits]

    def test_dataloader(self) -> list[ResumableLoader]:
        """Return one loader for each of `test_splits`, in this order."""
        return [self.loader(split) for split in self.test_splits]

    def transfer_batch_to_device(
        self, batch: CaptionBatch, device: torch.device, dataloader_idx: int
    ) -> CaptionBatch:
        """Copy a batch to the device beside its computation."""
        return batch.to(device, non_blocking=True)

    def prompts(self, batch: CaptionBatch, language: str | None = None) -> CaptionBatch:
        """Make the batch that generation starts from: the prompt alone, one row a picture.

        Args:
            batch: Any batch of this data.
            language: The language to caption in; None names none.

        Returns:
            The same pictures with tokens (b q), q = 1 or 2.
        """
        prompt = self.tokenizer.prompt(language if self.tokenizer.languages else None)
        prompt = torch.tensor(prompt + [image_token(self.tokenizer)] * self.mark_pictures)
        tokens = prompt.to(batch.tokens.device).expand(len(batch.names), -1)
        valid = torch.ones_like(tokens, dtype=torch.bool)
        media = (tokens == self.tokenizer.image_id).long().cumsum(1) if self.mark_pictures else None
        return dataclasses.replace(batch, tokens=tokens, valid=valid, target=~valid, media=media)

    def state_dict(self) -> dict[str, Any]:
        """Which tokenizer the run uses, and how its pictures are mixed."""
        return {"tokenizer": self._tokenizer_hash(), "mixture": self._quotas()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a resumed run has the tokenizer and the mixture it had.

        Raises:
            ValueError: If it has others.
        """
        if state_dict.get("mixture", []) != self._quotas():
            raise ValueError(
                f"cannot resume: an epoch of the run took {state_dict.get('mixture', [])} pictures of its sources, and "
                f"now takes {self._quotas()}; use the weights of the run, or start a new one"
            )
        if state_dict["tokenizer"] != self._tokenizer_hash():
            raise ValueError(
                f"cannot resume: the tokenizer is not that of the run ({self._tokenizer_hash()}, was "
                f"{state_dict['tokenizer']}); the training captions or vocab_size ({self.vocab_size}) have changed"
            )

    def _quotas(self) -> list[int]:
        mixing: Callable[[int], Mixing] | None = getattr(self.pairs(self.train_split), "mixing", None)
        return [] if mixing is None else list(mixing(self.seed).quotas)

    def _tokenizer_hash(self) -> str:
        return hashlib.sha256(self.tokenizer.backend.to_str().encode()).hexdigest()[:16]
