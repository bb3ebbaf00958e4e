"""ImageGenerator: texts in, images out, and everything that belongs to a saved model in one folder."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from numbers import Integral
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from mmtransformer.data.loading.pixels import of_one_size
from mmtransformer.diffusion.image_generation import Edit, ImageGenerationConfig, generate_images, seeded_noise
from mmtransformer.diffusion.text_to_image import TextToImageModel
from mmtransformer.images import ImageTransform, load
from mmtransformer.layers.modes import evaluation_mode
from mmtransformer.layers.record import record_attention
from mmtransformer.pipelines.base import (
    GENERATION,
    PREPROCESSOR,
    ImageLike,
    Pipeline,
    check_count,
    in_batches,
    pick_device,
    read_transform,
    refuse_public,
    settings_for,
    texts_of,
    transform_settings,
    write_card,
    write_json,
)
from mmtransformer.serialization.pretrained import find_folder, read_json
from mmtransformer.serialization.printable import counted, json_text
from mmtransformer.serialization.untrusted import settings_of
from mmtransformer.text.tokenizer import Tokenizer

EXAMPLE = "a large red star"
"""What a model of the embedded scenes can draw."""


class ImageGenerator(Pipeline[TextToImageModel]):
    """Draws what texts say with a trained model.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        transform: How a picture became pixels in training: its size, and what its numbers mean.
        generation: How to draw unless a call says otherwise.
        device: Where to compute; a GPU if there is one.

    Raises:
        ValueError: If the tokenizer has more ids than the model, or the patch does not divide the size.
    """

    def __init__(
        self,
        model: TextToImageModel,
        tokenizer: Tokenizer,
        transform: ImageTransform,
        *,
        generation: ImageGenerationConfig = ImageGenerationConfig(),  # noqa: B008
        device: torch.device | str | None = None,
    ) -> None:
        if tokenizer.vocab_size > model.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} ids, but the model reads {model.vocab_size}: they do not "
                "belong together"
            )
        of_one_size(transform, "a diffusion transformer draws")
        if any(side % model.patch_side for side in transform.size):
            raise ValueError(
                f"pictures of {transform.size[0]} x {transform.size[1]} px are not divided by the model's patches of "
                f"{model.patch_side} px"
            )
        if model.autoencoder is not None and {*transform.mean, *transform.std} != {0.5}:
            raise ValueError(
                f"the autoencoder takes pixels in [-1, 1], but the image transform's mean {transform.mean} and std "
                f"{transform.std} give others: both must be 0.5"
            )
        self.device = pick_device(device)
        self.model, self.tokenizer, self.transform = model.to(self.device).eval(), tokenizer, transform
        self.generation = generation

    def __call__(
        self,
        texts: str | Sequence[str],
        *,
        language: str | None = None,
        num_images: int = 1,
        seed: int | Sequence[int] = 0,
        negative_prompt: str | None = None,
        generation: ImageGenerationConfig | None = None,
        image: ImageLike | None = None,
        strength: float | None = None,
        mask_image: ImageLike | None = None,
        truncate: bool = False,
        batch_size: int = 16,
        on_step: Callable[[int, list[Image.Image]], None] | None = None,
        **changes: Any,
    ) -> list[list[Image.Image]]:
        """Draws pictures.

        Args:
            texts: What to draw: a text, or a list of them.
            language: Its language, for a model that knows several; found by the letters unless told.
            num_images: Pictures a text: of the seeds `seed`, `seed + 1`, ...
            seed: Of the noise that a picture begins as, the same whatever else is drawn beside it; a number, or one a
                text. A text and a seed make one picture up to rounding: the bytes of two calls may differ.
            negative_prompt: What to keep away from.
            generation: How to draw.
            image: A picture to begin with instead of noise (SDEdit).
            strength: How far from it: near 0 = hardly, 1 = as from noise; 0.6 unless told.
            mask_image: A picture, white where to draw in `image` and black where it stays.
            truncate: Read the beginning of texts that are longer than the model can read, as in training.
            batch_size: Pictures at once.
            on_step: Sees the pictures of a batch as they are after each step, and the step's number.
            changes: Single settings of how to draw, such as `num_inference_steps=4` (as
                `ImageGenerationConfig.updated`).

        Returns:
            For each text its pictures.

        Raises:
            ValueError: If a text is longer than the model can read, or an argument would have no effect: `mask_image`
                or `strength` without `image`.
        """
        many, generation = texts_of(texts), settings_for(generation, self.generation, changes)
        check_count("num_images", num_images)
        for name, value in {"mask_image": mask_image, "strength": strength}.items():
            if value is not None and image is None:
                raise ValueError(f"{name} is of a picture to begin with: give image too, or leave it out")
        rows = [self._row(text, language, truncate) for text in many for _ in range(num_images)]
        firsts = list(seed) if isinstance(seed, Iterable) else [seed] * len(many)
        if bad := [first for first in firsts if not isinstance(first, Integral) or isinstance(first, bool)]:
            raise ValueError(f"seed must be a whole number, or a list of one a text, not {bad[0]!r:.80}")
        if len(firsts) != len(many):
            raise ValueError(
                f"{counted(len(firsts), 'seed')} for {counted(len(many), 'text')}: give one number, or one a text"
            )
        seeds = [first + k for first in firsts for k in range(num_images)]
        away = None if negative_prompt is None else self._padded([self._row(negative_prompt, language)])
        found: list[Image.Image] = []
        for some, of in zip(in_batches(rows, batch_size), in_batches(seeds, batch_size), strict=True):
            tokens, mask = self._padded([*some])
            side = self.model.patch_side // self.model.transformer.patch_size
            height, width = (length // side for length in self.transform.size)
            shape = (self.model.transformer.in_channels, height, width)
            noise = seeded_noise(of, shape).to(self.device)
            edit = None if image is None else self._edit(image, strength, mask_image, len(tokens))
            look = None if on_step is None else lambda k, x, see=on_step: see(k, self._images(x))
            drawn = generate_images(self.model, tokens, mask, noise, generation, negative=away, edit=edit, on_step=look)
            found += self._images(drawn)
        return [found[i : i + num_images] for i in range(0, len(found), num_images)]

    def heatmap(
        self,
        text: str,
        *,
        language: str | None = None,
        seed: int = 0,
        negative_prompt: str | None = None,
        generation: ImageGenerationConfig | None = None,
        image: ImageLike | None = None,
        strength: float | None = None,
        mask_image: ImageLike | None = None,
        **changes: Any,
    ) -> tuple[Image.Image, list[str], Tensor]:
        """Draws one picture and says where each word steered it.

        Args:
            text: What to draw.
            language: As of a call.
            seed: As of a call.
            negative_prompt: As of a call.
            generation: As of a call.
            image: As of a call.
            strength: As of a call.
            mask_image: As of a call.
            changes: As of a call.

        Returns:
            The picture, the words, and (steps words gh gw): the share of the patch's look at the text that went to the
            word, averaged over heads and blocks. Over the whole way it is `heat.mean(0)`.
        """
        row = self._row(text, language)
        words = [(word, places) for word, places in self.tokenizer.words(row) if word.strip()]
        looks: list[Tensor] = []
        with record_attention(self.model.transformer, keep="cross_attn") as record:
            ((drawn,),) = self(
                text,
                language=language,
                seed=seed,
                negative_prompt=negative_prompt,
                generation=generation,
                image=image,
                strength=strength,
                mask_image=mask_image,
                **changes,
                on_step=lambda *_: looks.append(torch.stack([w[0].mean(0) for w in record.values()]).mean(0)),
            )
        look = torch.stack(looks)  # (steps q k)
        rows = self.transform.size[0] // self.model.patch_side
        heat = torch.stack([look[:, :, places].sum(2) for _, places in words], dim=1)
        return drawn, [word for word, _ in words], rearrange(heat, "s w (y x) -> s w y x", y=rows).cpu()

    def _row(self, text: str, language: str | None, truncate: bool = False) -> list[int]:
        if not isinstance(text, str):
            raise ValueError(f"what to draw, or to keep away from, is one text here, not {text!r:.80}")
        known = self.tokenizer.languages
        if language is None and known:
            hangul = any("가" <= letter <= "힣" for letter in text)
            language = "ko" if hangul and "ko" in known else next((c for c in known if c != "ko"), known[0])
        row = [*self.tokenizer.prompt(language), *self.tokenizer.encode(text), self.tokenizer.eos_id]
        if len(row) > self.model.max_len and not truncate:
            raise ValueError(
                f'"{text[:40]}" has {counted(len(row), "token")}, but the model reads {self.model.max_len}: shorten it'
            )
        return row[: self.model.max_len]

    def _padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        tokens, mask = self.tokenizer.pad(rows, side="right")
        return tokens.to(self.device), mask.to(self.device)

    def _edit(self, image: ImageLike, strength: float | None, mask_image: ImageLike | None, count: int) -> Edit:
        pixels = self.transform(load(image)).to(self.device)
        with evaluation_mode(self.model):
            images = self.model.encode(pixels[None]).expand(count, -1, -1, -1)
        where = None
        if mask_image is not None:
            white = (
                self.transform(load(mask_image)).mean(0) > self.transform(Image.new("RGB", (8, 8), "#808080")).mean()
            )
            side = self.model.patch_side // self.model.transformer.patch_size
            white = rearrange(white, "(y p) (x q) -> y p x q", p=side, q=side).any(dim=3).any(dim=1)
            where = white.to(self.device).expand(count, 1, -1, -1)
        return Edit(images, 0.6 if strength is None else strength, where)

    @torch.inference_mode()
    def _images(self, drawn: Tensor) -> list[Image.Image]:
        pixels = self.model.decode(drawn)
        mean, std = torch.tensor((self.transform.mean, self.transform.std), device=pixels.device).view(2, 1, 3, 1, 1)
        colours = (pixels.float() * std + mean).clamp(0, 1).mul(255).round().byte()
        return [Image.fromarray(np.ascontiguousarray(x)) for x in colours.permute(0, 2, 3, 1).cpu().numpy()]

    def save_pretrained(self, folder: str | Path, *, card: str = "", example: str = EXAMPLE) -> None:
        """Writes model, tokenizer, image transform, how to draw, and a model card.

        Args:
            folder: Where to; made if it is not there.
            card: Text for the model card, below its heading: how it was trained, its scores.
            example: A text like those that it has learnt, which the card shows how to draw.
        """
        folder = Path(folder)
        pixels = transform_settings(self.transform)
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        write_json(folder / PREPROCESSOR, pixels)
        write_json(folder / GENERATION, asdict(self.generation))
        height, width = self.transform.size
        write_card(
            folder,
            self.model,
            task="text-to-image",
            about=f"A diffusion transformer of mmtransformer that draws {width} x {height} pixels",
            usage="from mmtransformer import ImageGenerator\n\n"
            'painter = ImageGenerator.from_pretrained("FOLDER")  # this folder\n'
            f'painter({json_text(example)})[0][0].save("picture.png")',
            note=card,
        )

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, *, device: torch.device | str | None = None) -> Self:
        """Loads what `save_pretrained` wrote, from a folder or from the hub; nothing is ever unpickled.

        Raises:
            ValueError: If a part is missing or damaged, or the parts do not fit; names the file.
        """
        folder = find_folder(name_or_path, look=refuse_public)
        model = TextToImageModel.from_pretrained(folder)  # first, as it says which other model a folder holds
        settings = settings_of(ImageGenerationConfig, read_json(folder / GENERATION), str(folder / GENERATION))
        return cls(
            model,
            Tokenizer.from_pretrained(folder),
            read_transform(folder / PREPROCESSOR, model.image_size),
            generation=settings,
            device=device,
        )
