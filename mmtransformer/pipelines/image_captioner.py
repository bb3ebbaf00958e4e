"""ImageCaptioner: pictures in, captions out, a model in a folder. Shapes: gh gw rows and columns of patches."""

import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from PIL.Image import Image
from torch import Tensor

from mmtransformer.batch import CaptionBatch
from mmtransformer.captioners.base import Captioner
from mmtransformer.generation.captions import (
    CAPTIONING,
    CaptionResult,
    PromptBuilder,
    heatmap_of,
    stream_caption,
    write_captions,
)
from mmtransformer.generation.config import GenerationConfig
from mmtransformer.images import ImageError, ImageTransform, load
from mmtransformer.images.transforms import check_transform
from mmtransformer.layers.weight_prepacking import Precision, for_inference
from mmtransformer.pipelines.base import (
    GENERATION,
    PREPROCESSOR,
    ImageLike,
    Pipeline,
    check_vocabulary,
    fast_autocast,
    in_batches,
    listed,
    pick_device,
    public_family,
    read_generation,
    read_transform,
    resolve_precision,
    settings_for,
    transform_settings,
    write_card,
    write_json,
)
from mmtransformer.pipelines.many_images import Said, caption_all
from mmtransformer.serialization.folder_config import folder_config
from mmtransformer.serialization.hub import HubOptions
from mmtransformer.serialization.pretrained import find_folder
from mmtransformer.text.tokenizer import Tokenizer
from mmtransformer.weights.processors.processor import Processor, ProcessorPromptBuilder

if TYPE_CHECKING:
    from mmtransformer.weights.adapters import Adapter

_READY = threading.Lock()


class ImageCaptioner(Pipeline[Captioner]):
    """Captions pictures with a trained model.

    With the first picture the model is made ready (`inference_model`): on a CPU its linear weights are prepacked.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        transform: How a picture becomes pixels.
        generation: How captions are searched for, unless a call says otherwise.
        device: Where to compute; a GPU if there is one.
        precision: What to compute with: "fp32" is the weights as they are; "bf16" and, on a CPU, "int8" are faster and
            round.
        processor: Prompts and batches of a public model; None = those of this library's own models.
    """

    def __init__(
        self,
        model: Captioner,
        tokenizer: Tokenizer,
        transform: ImageTransform,
        *,
        generation: GenerationConfig = CAPTIONING,
        device: torch.device | str | None = None,
        precision: Precision = "fp32",
        processor: Processor | None = None,
    ) -> None:
        check_vocabulary(tokenizer, model.vocab_size)
        check_transform(transform)
        self.device = pick_device(device)
        self.model = model.to(self.device).eval()
        self.tokenizer, self.transform, self.processor = tokenizer, transform, processor
        self.generation, self.precision = generation, precision
        self.adapter: Adapter | None = None
        """What a training learned on top of a public model, if that alone is to be saved."""
        self._ready = False

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        device: torch.device | str | None = None,
        precision: Precision | Literal["auto"] = "fp32",
        dtype: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Loads what `save_pretrained` wrote, or a public model, from a folder or from the hub by its name.

        Public are `mmtransformer.weights.FAMILIES`, in hubs' folders, with their own pixels, prompts, ends and search.
        The config decides the family before weights are fetched, and what a large download takes is said. torch's own
        files (.bin, .pt) are read as tensors alone; no code runs.

        Args:
            name_or_path: The folder, or the name of a hub's repository.
            device: Where to compute; a GPU if there is one.
            precision: See the constructor; "auto" is the fastest that is safe, and says which (`resolve_precision`).
            dtype: The same in transformers' words: "float32", "bfloat16", or "auto", which here is the fastest that was
                measured safe, not the format of the files as in transformers.
            revision: Of the repository: a branch, tag or commit.
            token: Of an account on the hub; that of `hf auth login` unless told.
            cache_dir: Of the hub's cache.
            local_files_only: Take what the cache has, and ask nobody (as HF_HUB_OFFLINE=1).

        Raises:
            ValueError: If a part is missing or damaged, or the parts do not fit; names the file.
        """
        options = HubOptions(revision, token, cache_dir, local_files_only)
        folder = find_folder(name_or_path, options, look=public_family)
        if "class" not in folder_config(folder):
            from mmtransformer.weights.captioner_folders import open_captioner

            model, processor, generation = open_captioner(folder, options)
            tokenizer, transform = processor.tokenizer, processor.transform
        else:
            model, processor = Captioner.from_pretrained(folder), None
            transform = read_transform(folder / PREPROCESSOR, getattr(model.vision, "image_size", None))
            generation = read_generation(folder / GENERATION, CAPTIONING)
            tokenizer = Tokenizer.from_pretrained(folder)
        return cls(
            model,
            tokenizer,
            transform,
            generation=generation,
            device=device,
            precision=resolve_precision(precision, dtype, device, getattr(model, "decoder", None)),
            processor=processor,
        )

    def inference_model(self, *, prepack: bool = True) -> Captioner:
        """The model as it captions: in its precision, prepacked on a CPU (`weight_prepacking.for_inference`), in place.

        From the first picture on, what `save_pretrained` writes is in its precision.

        Args:
            prepack: See `for_inference`; said by the first call.

        Raises:
            ValueError: If it cannot be had in this precision here.
        """
        with _READY:  # threads may caption side by side
            if not self._ready:
                for_inference(self.model, self.precision, prepack=prepack)
                self._ready = True
        return self.model

    def save_pretrained(self, folder: str | Path, *, card: str | None = None) -> None:
        """Writes model, tokenizer, image transform, generation settings and a model card.

        A public model is written as it came, as transformers reads it, its card naming the base and its licence; an
        adapter, where there is one, by itself.

        Args:
            folder: Where to; made if it is not there.
            card: Text for the model card, below its heading: how it was trained, its scores.
        """
        folder = Path(folder)
        if self.processor is not None and self.processor.folder is not None:
            from mmtransformer.weights.captioner_folders import save_adapter, save_captioner

            base, options = self.processor.folder, self.processor.options
            if self.adapter is not None:
                save_adapter(self.adapter, base, folder, note=card or "")
            else:
                save_captioner(self.model, base, folder, note=card or "", options=options)
            return
        pixels = transform_settings(self.transform)
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        write_json(folder / PREPROCESSOR, pixels)
        write_json(folder / GENERATION, dataclasses.asdict(self.generation))
        known, kind = self.tokenizer.languages, type(self.model).__name__
        write_card(
            folder,
            self.model,
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
        prompt: str | Sequence[str | None] | None = None,
        language: str | None = None,
        generation: GenerationConfig | None = None,
        prompt_builder: PromptBuilder | None = None,
        batch_size: int = 16,
        **changes: Any,
    ) -> list[list[CaptionResult]]:
        """Captions pictures.

        Args:
            images: A picture (path, bytes, file or PIL image), or a list of them.
            prompt: The words that a public model captions after, or those for each picture; its own unless told.
            language: Its code, if the model knows several; else the first one.
            generation: How to search, in place of the model's own settings.
            prompt_builder: Makes the prompts: `FewShotPromptBuilder` puts examples before each picture.
            batch_size: Pictures at once.
            changes: Single settings of the search, such as `num_beams=5` or `num_return_sequences=3` (as
                `GenerationConfig.updated`).

        Returns:
            For each picture its captions, best first.

        Raises:
            ImageError: If a picture cannot be used; names the file, the fault and the remedy.
            ValueError: If the model does not know the language, or settings make no sense.
        """
        many, names = listed(images, "captioner.stream(images)")
        generation = settings_for(generation, self.generation, changes)
        language = self.language(language)
        texts = [prompt] * len(many) if prompt is None or isinstance(prompt, str) else [*prompt]
        if len(texts) != len(many):
            raise ValueError(f"there are {len(texts)} prompts for {len(many)} pictures: give one, or one for each")
        captions, said = [], in_batches(texts, batch_size)
        for some, words in zip(in_batches(range(len(many)), batch_size), said, strict=True):
            with fast_autocast(self.device):
                made = self.prompt_builder(words, prompt_builder)
                batch = self.batch_of([self.prepare(load(many[i], name=names[i])) for i in some])
                args = self.inference_model(), self.tokenizer, batch, [language]
                captions += [row[0] for row in write_captions(*args, generation=generation, prompt_builder=made)]
        return captions

    def prompt_builder(
        self, prompt: str | Sequence[str | None] | None = None, given: PromptBuilder | None = None
    ) -> PromptBuilder | None:
        """What makes the prompts of a batch; None = plain ones, of a model of this library.

        Args:
            prompt: The words that a public model captions after, or those for each picture; its own unless told.
            given: What makes them in any case, such as `FewShotPromptBuilder`.

        Raises:
            ValueError: If there are words that nothing would read.
        """
        if prompt is not None and not (isinstance(prompt, str) or any(text is not None for text in prompt)):
            prompt = None
        if prompt is not None and (given is not None or self.processor is None):
            why = "this model was trained without prompts" if given is None else "examples stand before the pictures"
            raise ValueError(f"{why}, so the prompt {prompt!r:.40} would not be read: leave it out")
        return given if given is not None or self.processor is None else ProcessorPromptBuilder(self.processor, prompt)

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
        images: Iterable[ImageLike],
        *,
        prompt: str | None = None,
        language: str | None = None,
        generation: GenerationConfig | None = None,
        prompt_builder: PromptBuilder | None = None,
        batch_size: int = 16,
        on_error: Callable[[ImageLike, ImageError], object] | None = None,
        **changes: Any,
    ) -> Iterator[list[CaptionResult]]:
        """Yields the captions of any number of pictures, in their order.

        Only the next few batches are in memory, loaded by threads while the last one is captioned.

        Args:
            images: The pictures, as a list or an iterator without end.
            prompt: The words that a public model captions after; its own unless told.
            language: The captions' language; the first one that the model knows unless told.
            generation: How to search, in place of the model's own settings.
            prompt_builder: Makes the prompts: `FewShotPromptBuilder` puts examples before each picture.
            batch_size: Pictures at once.
            on_error: Called with each picture that cannot be used, and why; in its place an empty list is yielded. None
                raises the error.
            changes: Single settings of the search, as of a call.

        Yields:
            For each picture its captions, best first.

        Raises:
            ImageError: If a picture cannot be used.
            ValueError: If it is a single picture, the model does not know the language, or settings make no sense.
        """
        if isinstance(images, str | bytes | Path | Image) or hasattr(images, "read"):  # A path is letters, too.
            raise ValueError(
                "stream takes many pictures: give [picture], or write one's caption by stream_text(picture)"
            )
        c, language = settings_for(generation, self.generation, changes), self.language(language)
        made = self.prompt_builder(prompt, prompt_builder)
        many = caption_all(self, images, load, [language], generation=c, prompt_builder=made, batch_size=batch_size)
        return self._stream_many(many, on_error)

    def stream_text(
        self,
        image: ImageLike,
        *,
        prompt: str | None = None,
        language: str | None = None,
        generation: GenerationConfig | None = None,
        prompt_builder: PromptBuilder | None = None,
        **changes: Any,
    ) -> Iterator[str]:
        """Yields one picture's caption piece by piece, as it is written: greedily, or drawn.

        Args:
            image: The picture.
            prompt: As of `stream`.
            language: As of `stream`.
            generation: As of `stream`; beams are left aside.
            prompt_builder: As of `stream`.
            changes: As of `stream`, without what asks for beams.

        Raises:
            ImageError: If the picture cannot be used.
            ValueError: If the model does not know the language, or settings need beams.
        """
        settings = settings_for(generation, self.generation, {}).streamed(**changes)
        language = self.language(language)
        made = self.prompt_builder(prompt, prompt_builder)
        with torch.inference_mode():
            batch = self.batch([image])
        args = self.inference_model(), self.tokenizer, batch, language
        return stream_caption(*args, generation=settings, prompt_builder=made)

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
    def heatmap(self, image: ImageLike, caption: CaptionResult, prompt_builder: PromptBuilder | None = None) -> Tensor:
        """Where the model looked while it wrote each word of a caption: (words gh gw).

        Args:
            image: The picture.
            caption: What the model said of it.
            prompt_builder: What made the prompts when it was captioned.
        """
        mark, made = self.generation.add_image_tokens, self.prompt_builder(given=prompt_builder)
        return heatmap_of(self.inference_model(), self.tokenizer, self.batch([image]), caption, made, mark=mark)

    def prepare(self, image: Image) -> Any:
        """What a picture is before it is in a batch: its pixels, for most models (3 height width)."""
        return self.transform(image) if self.processor is None else self.processor.prepare(image)

    def batch(self, images: Sequence[ImageLike]) -> CaptionBatch:
        """Pictures as a batch without texts."""
        return self.batch_of([self.prepare(load(image)) for image in images])

    def batch_of(self, prepared: Sequence[Any]) -> CaptionBatch:
        """A batch without texts of pictures that `prepare` has made ready."""
        size, own = self.transform.patch_size, self.processor
        return (CaptionBatch.from_pixels(prepared, size) if own is None else own.batch_of(prepared)).to(self.device)
