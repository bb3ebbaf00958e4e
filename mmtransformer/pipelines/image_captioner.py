"""ImageCaptioner: pictures in, captions out, and everything that belongs to a saved model in one folder.

Shapes: gh gw rows and columns of patches.
"""

import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, cast, overload

import torch
from PIL.Image import Image
from torch import Tensor

from mmtransformer.captioners.base import CaptionBatch, Captioner
from mmtransformer.generation.captions import (
    CAPTIONING,
    CaptionResult,
    Prompts,
    heatmap_of,
    stream_caption,
    write_captions,
)
from mmtransformer.generation.config import GenerationConfig
from mmtransformer.images import ImageError, ImageTransform, load
from mmtransformer.layers.weight_packing import Precision, for_inference
from mmtransformer.pipelines.base import (
    GENERATION,
    PREPROCESSOR,
    ImageLike,
    check_vocabulary,
    fast_autocast,
    in_batches,
    pick_device,
    read_generation,
    read_transform,
    write_card,
    write_json,
)
from mmtransformer.pipelines.many_images import Said, caption_all
from mmtransformer.serialization.pretrained import find_folder
from mmtransformer.text.tokenizer import Tokenizer

_READY = threading.Lock()


class ImageCaptioner:
    """Captions pictures with a trained model.

    With the first picture the model is made ready for it (`ready`): on a CPU its linear weights are packed.

    Args:
        captioner: The model.
        tokenizer: Its tokenizer.
        transform: How a picture becomes pixels.
        generation: How captions are searched for, unless a call says otherwise.
        device: Where to compute; a GPU if there is one.
        precision: What to compute with: "fp32" is the weights as they are; "bf16" and, on a CPU, "int8" are faster and
            round.
    """

    def __init__(
        self,
        captioner: Captioner,
        tokenizer: Tokenizer,
        transform: ImageTransform,
        *,
        generation: GenerationConfig = CAPTIONING,
        device: torch.device | str | None = None,
        precision: Precision = "fp32",
    ) -> None:
        check_vocabulary(tokenizer, captioner.vocab_size)
        self.device = pick_device(device)
        self.captioner = captioner.to(self.device).eval()
        self.tokenizer, self.transform, self.generation = tokenizer, transform, generation
        self.precision: Precision = precision
        self._ready = False

    def __repr__(self) -> str:
        known = ", ".join(self.tokenizer.languages)
        size = sum(p.numel() for p in self.captioner.parameters()) / 1e6
        return (
            f"ImageCaptioner({type(self.captioner).__name__}, {size:.1f} million parameters, "
            f"{self.tokenizer.vocab_size} tokens{f', languages {known}' if known else ''}, "
            f"{self.precision} on {self.device})"
        )

    @classmethod
    def from_pretrained(
        cls, folder_or_id: str | Path, *, device: torch.device | str | None = None, precision: Precision = "fp32"
    ) -> Self:
        """Loads what `save_pretrained` wrote, from a folder or from the hub; nothing is ever unpickled.

        Raises:
            ValueError: If a part is missing or damaged, or the parts do not fit; names the file.
        """
        folder = find_folder(folder_or_id)
        captioner = Captioner.from_pretrained(folder)
        transform, generation = (
            read_transform(folder / PREPROCESSOR),
            read_generation(folder / GENERATION, CAPTIONING),
        )
        tokenizer = Tokenizer.from_pretrained(folder)
        return cls(captioner, tokenizer, transform, generation=generation, device=device, precision=precision)

    def ready(self) -> Captioner:
        """The model as it captions: in its precision, and packed where it runs on a CPU (`pack_weights.for_inference`).

        It is converted in place, with the first picture: what `save_pretrained` writes after that is in its precision.

        Raises:
            ValueError: If it cannot be had in this precision here.
        """
        with _READY:  # threads may caption side by side
            if not self._ready:
                for_inference(self.captioner, self.precision)
                self._ready = True
        return self.captioner

    def save_pretrained(self, folder: str | Path, *, card: str | None = None) -> None:
        """Writes model, tokenizer, image transform, generation settings and a model card.

        Args:
            folder: Where to; made if it is not there.
            card: Text for the model card, below its heading: how it was trained, its scores.
        """
        folder = Path(folder)
        self.captioner.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        write_json(folder / PREPROCESSOR, self.transform.to_dict())
        write_json(folder / GENERATION, dataclasses.asdict(self.generation))
        known, kind = self.tokenizer.languages, type(self.captioner).__name__
        write_card(
            folder,
            self.captioner,
            task="image-to-text",
            about=f"A {kind} of mmtransformer that captions pictures in {self.tokenizer.vocab_size} tokens",
            usage="from mmtransformer import ImageCaptioner\n\n"
            'captioner = ImageCaptioner.from_pretrained("FOLDER")  # this folder\n'
            'print(captioner("picture.jpg")[0][0].text)',
            languages=known,
            note=card or "",
        )

    @torch.inference_mode()
    def __call__(
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        language: str | None = None,
        generation: GenerationConfig | None = None,
        prompts: Prompts | None = None,
        batch_size: int = 16,
        **changes: Any,
    ) -> list[list[CaptionResult]]:
        """Captions pictures.

        Args:
            images: A picture (path, bytes, file or PIL image), or a list of them.
            language: Its code, if the model knows several; the first one it knows unless told.
            generation: How to search, in place of the model's own settings.
            prompts: Makes the prompts: `FewShot` puts examples before each picture.
            batch_size: Pictures at once.
            changes: Single settings of the search, such as `num_beams=5` or `num_return_sequences=3` (as
                `GenerationConfig.updated`).

        Returns:
            For each picture its captions, best first.

        Raises:
            ImageError: If a picture cannot be used; names the file, the fault and the remedy.
            ValueError: If the model does not know the language, or settings make no sense.
        """
        many: list[ImageLike] = [*images] if isinstance(images, (list, tuple)) else [images]  # pyright: ignore
        generation = (generation or self.generation).updated(**changes)
        language = self.language(language)
        captions = []
        for some in in_batches(many, batch_size):
            with fast_autocast(self.device):
                rows = write_captions(
                    self.ready(), self.tokenizer, self.batch(some), [language], generation=generation, prompts=prompts
                )
            captions += [row[0] for row in rows]
        return captions

    def language(self, language: str | None) -> str | None:
        """The language to caption in: the one asked for, or else the first that the model knows.

        Raises:
            ValueError: If the model does not know it.
        """
        known = self.tokenizer.languages
        if language is not None and language not in known:
            raise ValueError(
                f'the model does not know the language "{language}"; it knows '
                f"{', '.join(known) if known else 'none by name, so leave it out'}"
            )
        return language or (known[0] if known else None)

    @overload
    def stream(  # pyright: ignore[reportOverlappingOverload] (a path is letters, too)
        self,
        images: ImageLike,
        *,
        language: str | None = None,
        generation: GenerationConfig | None = None,
        prompts: Prompts | None = None,
    ) -> Iterator[str]: ...

    @overload
    def stream(
        self,
        images: Iterable[ImageLike],
        *,
        language: str | None = None,
        generation: GenerationConfig | None = None,
        prompts: Prompts | None = None,
        batch_size: int = 16,
        on_error: Callable[[ImageLike, ImageError], object] | None = None,
        **changes: Any,
    ) -> Iterator[list[CaptionResult]]: ...

    def stream(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        language: str | None = None,
        generation: GenerationConfig | None = None,
        prompts: Prompts | None = None,
        batch_size: int = 16,
        on_error: Callable[[ImageLike, ImageError], object] | None = None,
        **changes: Any,
    ) -> Iterator[str] | Iterator[list[CaptionResult]]:
        """Yields one picture's caption piece by piece, as it is written; or the captions of any number of pictures.

        Of many pictures only the next few batches are in memory, loaded by threads while the last one is captioned.

        Args:
            images: The picture, whose caption is written greedily, or drawn. Or pictures, as a list or an iterator
                without end.
            language: The captions' language; the first one that the model knows unless told.
            generation: How to search, in place of the model's own settings; for one picture beams are left aside.
            prompts: Makes the prompts: `FewShot` puts examples before each picture.
            batch_size: Of many pictures, how many at once.
            on_error: Called with each of many pictures that cannot be used, and why; in its place an empty list is
                yielded. None raises the error.
            changes: Single settings of the search, for many pictures, as of a call.

        Yields:
            Of one picture, pieces of text. Of many, for each in their order its captions, best first.

        Raises:
            ImageError: If a picture cannot be used.
            ValueError: If the model does not know the language, or settings make no sense.
        """
        settings, language = (generation or self.generation).updated(**changes), self.language(language)
        if isinstance(images, str | bytes | Path | Image) or hasattr(images, "read"):
            with torch.inference_mode():
                batch = self.batch([cast(ImageLike, images)])
            return stream_caption(self.ready(), self.tokenizer, batch, language, generation=settings, prompts=prompts)
        many = caption_all(
            self,
            cast(Iterable[ImageLike], images),
            load,
            [language],
            generation=settings,
            prompts=prompts,
            batch_size=batch_size,
        )
        return self._stream_many(many, on_error)

    @staticmethod
    def _stream_many(
        many: Iterator[tuple[ImageLike, Said | ImageError]], on_error: Callable[[ImageLike, ImageError], object] | None
    ) -> Iterator[list[CaptionResult]]:
        for image, said in many:
            if not isinstance(said, ImageError):
                yield said[0]
            elif on_error is None:
                raise said
            else:
                on_error(image, said)
                yield []

    @torch.inference_mode()
    def heatmap(self, image: ImageLike, caption: CaptionResult, prompts: Prompts | None = None) -> Tensor:
        """Where the model looked while it wrote each word of a caption: (words gh gw).

        Args:
            image: The picture.
            caption: What the model said of it.
            prompts: What made the prompts when it was captioned.
        """
        return heatmap_of(
            self.ready(), self.tokenizer, self.batch([image]), caption, prompts, mark=self.generation.mark_images
        )

    def batch(self, images: Sequence[ImageLike]) -> CaptionBatch:
        """Pictures as a batch without texts."""
        return self.batch_of([self.transform(load(image)) for image in images])

    def batch_of(self, pixels: Sequence[Tensor]) -> CaptionBatch:
        """A batch without texts of pictures that the transform has made pixels of, each (3 height width)."""
        none = torch.zeros(len(pixels), 0, dtype=torch.long, device=self.device)
        return CaptionBatch(none, none.bool(), none.bool(), pixels=torch.stack([*pixels])[:, None].to(self.device))
