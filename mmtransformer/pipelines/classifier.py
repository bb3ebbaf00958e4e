"""ImageClassifier: pictures in, classes out, and everything that belongs to a saved model in one folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch

from mmtransformer.backbones.vit import ViT
from mmtransformer.images import ImageTransform, load
from mmtransformer.layers.weight_prepacking import for_inference
from mmtransformer.pipelines.base import (
    PREPROCESSOR,
    ImageLike,
    Pipeline,
    check_count,
    fast_autocast,
    in_batches,
    listed,
    pick_device,
    read_transform,
    write_card,
    write_json,
)
from mmtransformer.serialization.pretrained import find_folder, read_json
from mmtransformer.serialization.printable import counted

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
        self.device = pick_device(device)
        self.model, self.classes, self.transform = model.to(self.device).eval(), tuple(classes), transform

    @torch.inference_mode()
    def __call__(
        self, images: ImageLike | Sequence[ImageLike], *, top_k: int = 1, batch_size: int = 64
    ) -> list[list[tuple[str, float]]]:
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
        check_count("top_k", top_k)
        many: list[ImageLike] = listed(images)
        found: list[list[tuple[str, float]]] = []
        for some in in_batches(many, batch_size):
            pixels = torch.stack([self.transform(load(image)) for image in some])
            with fast_autocast(self.device):
                logits = self.model(pixels.to(self.device))
            best = logits.float().softmax(-1).topk(min(top_k, len(self.classes)), dim=-1)
            for shares, numbers in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                found.append([(self.classes[i], share) for i, share in zip(numbers, shares, strict=True)])
        return found

    def save_pretrained(self, folder: str | Path, *, card: str = "") -> None:
        """Writes model, classes, image transform and a model card.

        Args:
            folder: Where to; made if it is not there.
            card: Text for the model card, below its heading: how it was trained, its scores.
        """
        folder = Path(folder)
        self.model.save_pretrained(folder)
        write_json(folder / CLASSES, {"classes": list(self.classes)})
        write_json(folder / PREPROCESSOR, self.transform.to_dict())
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
    def from_pretrained(cls, folder_or_id: str | Path, *, device: torch.device | str | None = None) -> Self:
        """Loads what `save_pretrained` wrote, from a folder or from the hub; nothing is ever unpickled.

        On a CPU its linear weights are prepacked (`weight_prepacking.for_inference`).

        Raises:
            ValueError: If a part is missing or damaged, or the parts do not fit; names the file.
        """
        folder = find_folder(folder_or_id)
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
