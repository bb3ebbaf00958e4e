"""ImageClassifier: pictures in, classes out, and everything that belongs to a saved model in one folder."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Self, TypeVar

import torch
from PIL.Image import Image
from torch import Tensor

from mmtransformer.backbones.vit import ViT
from mmtransformer.images import ImageError, ImageTransform, load
from mmtransformer.images.transforms import check_transform
from mmtransformer.layers.weight_prepacking import for_inference
from mmtransformer.pipelines.base import (
    PREPROCESSOR,
    ImageLike,
    Pipeline,
    check_count,
    fast_autocast,
    listed,
    pick_device,
    read_transform,
    refuse_public,
    transform_settings,
    write_card,
    write_json,
)
from mmtransformer.pipelines.many_images import by_batches
from mmtransformer.serialization.pretrained import find_folder, read_json
from mmtransformer.serialization.printable import counted

T = TypeVar("T")
Classes = list[tuple[str, float]]
"""Of a picture its likeliest classes with their probabilities, best first."""

CLASSES = "classes.json"


class ImageClassifier(Pipeline[ViT]):
    """Classifies pictures with a trained ViT.

    Args:
        model: The model, with a head.
        classes: The names of its classes, in the order of their numbers.
        transform: How a picture becomes pixels.
        device: Where to compute; a GPU if there is one.

    Raises:
        ValueError: If the head has not as many classes as there are names.
    """

    def __init__(
        self, model: ViT, classes: Sequence[str], transform: ImageTransform, *, device: torch.device | str | None = None
    ) -> None:
        if model.num_classes != len(classes):
            raise ValueError(f"the model tells {model.num_classes} classes apart, but there are {len(classes)} names")
        check_transform(transform)
        self.device = pick_device(device)
        self.model, self.classes, self.transform = model.to(self.device).eval(), tuple(classes), transform

    def __call__(
        self, images: ImageLike | Sequence[ImageLike], *, top_k: int = 1, batch_size: int = 64
    ) -> list[Classes]:
        """Classifies pictures.

        Args:
            images: A picture (path, bytes, file or PIL image), or a list of them.
            top_k: How many classes of each.
            batch_size: Pictures at once.

        Returns:
            For each picture its likeliest classes with their probabilities, best first.

        Raises:
            ImageError: If a picture cannot be used; names the file, the fault and the remedy.
            ValueError: If `top_k` or `batch_size` is no number of things.
        """
        found: list[Classes] = []
        things = zip(*listed(images), strict=True)
        for _, classes in self.stream(things, lambda x: load(x[0], name=x[1]), top_k=top_k, batch_size=batch_size):
            if isinstance(classes, ImageError):
                raise classes
            found.append(classes)
        return found

    def stream(
        self, things: Iterable[T], load: Callable[[T], Image], *, top_k: int = 1, batch_size: int = 64
    ) -> Iterator[tuple[T, "Classes | ImageError"]]:
        """Classifies any number of pictures, of which few are in memory at a time; they are loaded in threads.

        Args:
            things: What pictures are loaded from.
            load: Loads one.
            top_k: How many classes of each.
            batch_size: Pictures at once.

        Yields:
            Each thing with its likeliest classes, best first, or with what is wrong with its picture.

        Raises:
            ValueError: If `top_k` or `batch_size` is no number of things.
        """
        check_count("top_k", top_k)
        return by_batches(
            things,
            lambda thing: self.transform(load(thing)),
            lambda some: self._classes(torch.stack([pixels for _, pixels in some]), top_k),
            batch_size=batch_size,
        )

    @torch.inference_mode()
    def _classes(self, pixels: Tensor, top_k: int) -> list[Classes]:
        with fast_autocast(self.device):
            logits = self.model(pixels.to(self.device))
        best = logits.float().softmax(-1).topk(min(top_k, len(self.classes)), dim=-1)
        return [
            [(self.classes[i], share) for i, share in zip(numbers, shares, strict=True)]
            for shares, numbers in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]

    def save_pretrained(self, folder: str | Path, *, card: str = "") -> None:
        """Writes model, classes, image transform and a model card.

        Args:
            folder: Where to; made if it is not there.
            card: Text for the model card, below its heading: how it was trained, its scores.
        """
        folder = Path(folder)
        pixels = transform_settings(self.transform)
        self.model.save_pretrained(folder)
        write_json(folder / CLASSES, {"classes": list(self.classes)})
        write_json(folder / PREPROCESSOR, pixels)
        write_card(
            folder,
            self.model,
            task="image-classification",
            about=f"A ViT of mmtransformer that tells {counted(len(self.classes), 'class', 'classes')} apart",
            usage="from mmtransformer import ImageClassifier\n\n"
            'classifier = ImageClassifier.from_pretrained("FOLDER")  # this folder\n'
            'print(classifier("picture.jpg", top_k=3)[0])',
            note=card,
        )

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, *, device: torch.device | str | None = None) -> Self:
        """Loads what `save_pretrained` wrote, from a folder or from the hub; nothing is ever unpickled.

        On a CPU its linear weights are prepacked (`weight_prepacking.for_inference`).

        Raises:
            ValueError: If a part is missing or damaged, or the parts do not fit; names the file.
        """
        folder = find_folder(name_or_path, look=refuse_public)
        if not (folder / CLASSES).is_file():
            ViT.from_pretrained(folder)  # of another model it says what that is for
            raise ValueError(f"{folder}: a ViT without {CLASSES}, the names of its classes; vit_classify leaves both")
        names = read_json(folder / CLASSES).get("classes")
        if not isinstance(names, list):
            raise ValueError(f'{folder / CLASSES}: no list "classes"')
        model = ViT.from_pretrained(folder)
        transform = read_transform(folder / PREPROCESSOR, model.image_size)
        found = cls(model, [str(name) for name in names], transform, device=device)
        for_inference(found.model)
        return found
