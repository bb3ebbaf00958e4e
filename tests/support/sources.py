"""A source of pictures of noise, and its batches."""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from mmtransformer.data.captions import CaptionData
from mmtransformer.data.loading.source import Caption
from mmtransformer.images import ImageError, ImageTransform
from mmtransformer.text.tokenizer import Tokenizer

TRANSFORM = ImageTransform(image_size=(11, 13))


WORDS = ["red", "small", "star", "dog", "runs", "over", "grass", "and", "a", "very", "tall", "tree"]


class FakePairs:
    """Pictures of noise, with `count(i)` captions of different lengths."""

    def __init__(self, size, languages=("en",), count=lambda i: 3, bad=(), seed=0):
        self.size, self.languages, self.count, self.bad, self.seed = size, languages, count, set(bad), seed

    def __len__(self):
        return self.size

    def name(self, i):
        return f"p{i}.jpg"

    def image(self, i):
        if i in self.bad:
            raise ImageError(f"p{i}.jpg: cut off")
        return Image.fromarray(np.random.default_rng([self.seed, i]).integers(0, 256, (17, 19, 3), dtype=np.uint8))

    def captions(self, i):
        found = []
        for language in self.languages:
            for j in range(self.count(i)):
                words = WORDS if language == "en" else ["빨간", "별", "강아지", "나무"]
                length = 2 + (7 * i + 3 * j) % 19
                text = " ".join(words[(i + j + k) % len(words)] for k in range(length))
                found.append(Caption(f"{text} {i} {j}", language))
        return found


class FakeSource:
    def __init__(self, **splits):
        self.pairs = splits
        self.languages = next(iter(splits.values())).languages

    def splits(self):
        return tuple(self.pairs)

    def split(self, name):
        if name not in self.pairs:
            raise ValueError(f"no split {name}, only {list(self.pairs)}")
        return self.pairs[name]


@functools.cache
def tokenizer():
    captions = FakePairs(40, ("en", "ko")).captions
    return Tokenizer.train((c.text for i in range(40) for c in captions(i)), 400, ("en", "ko"))


def make(source=None, report_dir=None, **options):
    source = source or FakeSource(train=FakePairs(53), val=FakePairs(11, seed=1))
    data = CaptionData(source, **({"transform": TRANSFORM, "tokenizer": tokenizer(), "batch_size": 7} | options))
    data.report_dir = report_dir
    data.setup("fit")
    return data


def batches_of(data, epoch=0):
    loader = data.train_dataloader()
    loader.place.set_epoch(epoch)
    return list(loader)


def same(a, b):
    return a.names == b.names and all(
        torch.equal(getattr(a, field), getattr(b, field))
        for field in ("tokens", "attention_mask", "loss_mask", "pixels")
    )


def share_of_padding(lengths: np.ndarray, batches: Sequence[Sequence[int]]) -> float:
    """Measure which share of the batches' token places is padding, with one row of `lengths` an index."""
    real = sum(int(lengths[list(batch)].sum()) for batch in batches)
    room = sum(len(batch) * int(lengths[list(batch)].max()) for batch in batches)
    return 1 - real / room
