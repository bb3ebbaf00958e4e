"""ImageCaptioner: pictures in, captions out, and everything that belongs to a saved model in one folder.

Letters: gh gw rows and columns of patches.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
from PIL.Image import Image
from torch import Tensor

from mmtransformer.captioners.base import CaptionBatch, Captioner
from mmtransformer.generation.captions import (
    CAPTIONING,
    CaptionResult,
    heatmap_of,
    stream_caption,
    write_captions,
)
from mmtransformer.generation.config import GenerationConfig
from mmtransformer.generation.prompts import Prompts
from mmtransformer.images import ImageTransform, load
from mmtransformer.layers.weight_packing import Precision, for_inference
from mmtransformer.serialization.pretrained import find_folder, read_json
from mmtransformer.serialization.untrusted import settings_of
from mmtransformer.text.tokenizer import Tokenizer

PREPROCESSOR, GENERATION, CARD = "preprocessor.json", "generation_config.json", "README.md"
_MOST_PIXELS = 100_000_000
ImageLike = str | Path | bytes | BinaryIO | Image


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
        if tokenizer.vocab_size > captioner.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, but the model scores {captioner.vocab_size}; "
                f"they do not belong together"
            )
        self.device = torch.device(device) if device is not None else _best_device()
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
        cls,
        folder_or_id: str | Path,
        *,
        device: torch.device | str | None = None,
        precision: Precision = "fp32",
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
        """The model as it captions: in its precision, and packed where it runs on a CPU (`prepack.for_inference`).

        It is converted in place, with the first picture: what `save_pretrained` writes after that is in its precision.

        Raises:
            ValueError: If it cannot be had in this precision here.
        """
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
        _write_json(folder / PREPROCESSOR, self.transform.to_dict())
        _write_json(folder / GENERATION, dataclasses.asdict(self.generation))
        (folder / CARD).write_text(self._card(folder.resolve(), card), encoding="utf-8")

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
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        generation = (generation or self.generation).updated(**changes)
        language = self.language(language)
        captions = []
        for start in range(0, len(many), batch_size):
            batch = self.batch(many[start : start + batch_size])
            with fast_autocast(self.device):
                rows = write_captions(
                    self.ready(), self.tokenizer, batch, [language], generation=generation, prompts=prompts
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

    def stream(
        self,
        image: ImageLike,
        *,
        language: str | None = None,
        generation: GenerationConfig | None = None,
        prompts: Prompts | None = None,
    ) -> Iterator[str]:
        """Yields a picture's caption piece by piece, as it is written: greedily, or drawn.

        Args:
            image: The picture.
            language: The caption's language; the first one that the model knows unless told.
            generation: How to search, in place of the model's own settings; beams are left aside.
            prompts: Makes the prompt: `FewShot` puts examples before the picture.

        Raises:
            ImageError: If the picture cannot be used.
            ValueError: If the model does not know the language.
        """
        with torch.inference_mode():
            batch = self.batch([image])
        return stream_caption(
            self.ready(),
            self.tokenizer,
            batch,
            self.language(language),
            generation=generation or self.generation,
            prompts=prompts,
        )

    @torch.inference_mode()
    def heatmap(self, image: ImageLike, caption: CaptionResult, prompts: Prompts | None = None) -> Tensor:
        """Where the model looked while it wrote each word of a caption: (words gh gw).

        Args:
            image: The picture.
            caption: What the model said of it.
            prompts: What made the prompts when it was captioned.
        """
        return heatmap_of(
            self.ready(),
            self.tokenizer,
            self.batch([image]),
            caption,
            prompts,
            mark=self.generation.mark_images,
        )

    def batch(self, images: Sequence[ImageLike]) -> CaptionBatch:
        """Pictures as a batch without texts."""
        pixels = torch.stack([self.transform(load(image)) for image in images])[:, None]
        none = torch.zeros(len(images), 0, dtype=torch.long, device=self.device)
        return CaptionBatch(none, none.bool(), none.bool(), pixels=pixels.to(self.device))

    def _card(self, folder: Path, text: str | None) -> str:
        known = self.tokenizer.languages
        parameters = sum(p.numel() for p in self.captioner.parameters())
        head = ["library_name: mmtransformer", "pipeline_tag: image-to-text"]
        head += [f"language: [{', '.join(known)}]"] if known else []
        return f"""---
{chr(10).join(head)}
---

# {escape(folder.parent.name if folder.name == "model" else folder.name)}

A {type(self.captioner).__name__} of mmtransformer that captions pictures: {parameters / 1e6:.1f} million parameters,
{self.tokenizer.vocab_size} tokens{f", languages {', '.join(known)}" if known else ""}.

```python
from mmtransformer import ImageCaptioner

captioner = ImageCaptioner.from_pretrained("{folder.name}")  # this folder
print(captioner("picture.jpg")[0][0].text)
```

{text or ""}
"""


@contextmanager
def fast_autocast(device: torch.device) -> Iterator[None]:
    """bfloat16 on a GPU that has it; elsewhere nothing changes."""
    on = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    with torch.autocast(device.type, torch.bfloat16, enabled=on):
        yield


def _best_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def read_generation(path: Path, default: GenerationConfig) -> GenerationConfig:
    """How a saved model searches; the default, if its folder does not say.

    Raises:
        ValueError: naming the file, if it is damaged or asks for what makes no sense.
    """
    return settings_of(GenerationConfig, read_json(path), str(path)) if path.exists() else default


def read_transform(path: Path) -> ImageTransform:
    """How a saved model's pictures become pixels.

    Raises:
        ValueError: naming the file, if it is missing, damaged or asks for what makes no sense.
    """
    transform = settings_of(ImageTransform, read_json(path), str(path))
    if (pixels := math.prod(transform.size)) > _MOST_PIXELS:
        raise ValueError(f"{path}: pictures of {pixels:,} pixels are larger than {_MOST_PIXELS:,}")
    return transform


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
