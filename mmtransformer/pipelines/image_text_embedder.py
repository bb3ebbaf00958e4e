"""ImageTextEmbedder: pictures and texts -> vectors that can be compared; a model and what it needs, in one folder.

Shapes: n pictures or texts, m labels, d width of the vectors.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtransformer.batch.images import pad_images
from mmtransformer.dual_encoders.clip import CLIP
from mmtransformer.images import ImageTransform, load
from mmtransformer.images.transforms import check_transform
from mmtransformer.layers.linear import upcast_products
from mmtransformer.layers.weight_prepacking import for_inference
from mmtransformer.pipelines.base import (
    PREPROCESSOR,
    ImageLike,
    Pipeline,
    check_count,
    check_vocabulary,
    fast_autocast,
    in_batches,
    listed,
    pick_device,
    read_transform,
    texts_of,
    transform_settings,
    write_card,
    write_json,
)
from mmtransformer.serialization.folder_config import folder_config
from mmtransformer.serialization.hub import HubOptions
from mmtransformer.serialization.pretrained import CONFIG, find_folder, read_json
from mmtransformer.text.tokenizer import Tokenizer
from mmtransformer.weights.dual_encoders.inputs import ids_of, preprocessor_of, read_inputs, write_inputs
from mmtransformer.weights.dual_encoders.transformers import dual_encoder_type, load_clip, save_clip
from mmtransformer.weights.processors.pixels import open_clip_pixels

TEMPLATES: tuple[str, ...] = (
    "{}",
    "a photo of a {}.",
    "a photo of the {}.",
    "a picture of a {}.",
    "a close-up photo of a {}.",
    "a bad photo of a {}.",
)
"""Sentences that zero-shot classes are put into, a few of the kinds that CLIP's authors use (section 3.1.4)."""

_FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ImageTextEmbedder(Pipeline[CLIP]):
    """Turns pictures and texts into vectors of length 1, the nearer the better they fit.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        transform: How a picture becomes pixels.
        device: Where to compute; a GPU if there is one.

    Raises:
        ValueError: If the tokenizer has more tokens than the model.
    """

    def __init__(
        self, model: CLIP, tokenizer: Tokenizer, transform: ImageTransform, *, device: torch.device | str | None = None
    ) -> None:
        check_vocabulary(tokenizer, model.vocab_size)
        check_transform(transform)
        self.device = pick_device(device)
        self.model, self.tokenizer, self.transform = model.to(self.device).eval(), tokenizer, transform
        self._said_cut = False

    @property
    def dim(self) -> int:
        """Width d of the vectors."""
        return self.model.dim

    # ------------------------------------------------------------------------------------------------- vectors

    @torch.no_grad()  # What is learnt on top of the vectors may need their gradients.
    def encode_images(
        self, images: ImageLike | Tensor | Sequence[ImageLike | Tensor], *, batch_size: int = 64
    ) -> Tensor:
        """Pictures as vectors of length 1.

        Args:
            images: A picture (path, bytes, file, PIL image, or its pixels (3 height width) as the transform makes
                them), or a list of them.
            batch_size: Pictures at once.

        Returns:
            (n d) float32, on the CPU; a row for each picture, in their order.

        Raises:
            ImageError: If a picture cannot be used; names the file, the fault and the remedy.
        """
        many, names = listed(images)
        found = [torch.empty(0, self.dim)]
        for some in in_batches(range(len(many)), batch_size):
            given = [many[i] if isinstance(many[i], Tensor) else load(many[i], name=names[i]) for i in some]
            batch = self._batch([x if isinstance(x, Tensor) else self.transform(x) for x in given])
            with fast_autocast(self.device):
                found.append(self.model.encode_image(*(x.to(self.device) for x in batch)).float().cpu())
        return F.normalize(torch.cat(found), dim=-1)

    def _batch(self, images: list[Tensor]) -> tuple[Tensor, ...]:
        """Pixels as the model's `encode_image` reads them; of images of native size patches and their grids."""
        if (patch_size := self.transform.patch_size) is None:
            return (torch.stack(images),)
        patches, grids = pad_images([[image] for image in images], patch_size)
        return patches[:, 0], grids[:, 0]

    @torch.no_grad()
    def encode_texts(self, texts: str | Sequence[str], *, batch_size: int = 256) -> Tensor:
        """Texts as vectors of length 1, in any language that the model has learnt.

        Args:
            texts: A text, or a list of them; one that is longer than the model reads is cut and keeps its end
                (the first time with a warning).
            batch_size: Texts at once.

        Returns:
            (n d) float32, on the CPU.

        Raises:
            ValueError: If a text is empty.
        """
        many = texts_of(texts)
        if blank := [i for i, text in enumerate(many) if not text.strip()]:
            raise ValueError(f"text {blank[0]} of {len(many)} is empty, and would fit every picture: leave it out")
        found, cut = [torch.empty(0, self.dim)], 0
        for some in in_batches(many, batch_size):
            rows = [self._cut(text) for text in some]
            cut += sum(lost for _, lost in rows)
            tokens, attention_mask = self.tokenizer.pad([ids for ids, _ in rows])
            with fast_autocast(self.device):
                vectors = self.model.encode_text(tokens.to(self.device), attention_mask.to(self.device))
            found.append(vectors.float().cpu())
        if cut and not self._said_cut:
            self._said_cut = True
            warnings.warn(
                f"{cut} of {len(many)} texts are longer than the {self.model.max_len} tokens that the model reads, and "
                f"were cut; what follows is cut without a word",
                stacklevel=3,  # no_grad's wrapper lies between
            )
        return F.normalize(torch.cat(found), dim=-1)

    def ids(self, text: str) -> list[int]:
        """What the text tower reads of a text: what opens it, its words as far as there is room, and its end."""
        return self._cut(text)[0]

    def _cut(self, text: str) -> tuple[list[int], bool]:
        """The ids, and whether words were left out."""
        opening = self.tokenizer.prompt() if self.model.add_bos_token else []
        words, room = self.tokenizer.encode(text), self.model.max_len - len(opening) - 1
        return [*opening, *words[:room], self.tokenizer.eos_id], len(words) > room

    # --------------------------------------------------------------------------------------------- comparisons

    def similarity(
        self, images: ImageLike | Tensor | Sequence[ImageLike | Tensor], texts: str | Sequence[str]
    ) -> Tensor:
        """The cosines of all pictures and all texts: (n m) float32, from -1 to 1.

        Args:
            images: As of `encode_images`, or their vectors (n d).
            texts: As of `encode_texts`.
        """
        given = isinstance(images, Tensor) and images.ndim == 2
        vectors = images if given else self.encode_images(images)  # pyright: ignore
        return vectors @ self.encode_texts(texts).T  # pyright: ignore[reportOperatorIssue]

    def encode_labels(self, labels: Sequence[str], templates: Sequence[str] = TEMPLATES) -> Tensor:
        """A vector a label: the mean of its sentences' vectors, of length 1 again (arXiv:2103.00020, section 3.1.4).

        Args:
            labels: The names of the classes.
            templates: Sentences with {} where the name belongs.

        Returns:
            (m d) float32.

        Raises:
            ValueError: If there is no label or template, or a template has no place for the name.
        """
        if isinstance(labels, str) or len(labels) == 0:
            raise ValueError(f"labels must be a list of names, one at least, not {labels!r:.40}")
        if isinstance(templates, str) or len(templates) == 0:
            raise ValueError(f"templates must be a list of sentences, one at least, not {templates!r:.40}")
        if bad := [template for template in templates if "{}" not in template]:
            raise ValueError(f"the template {bad[0]!r:.60} has no {{}} where a label's name belongs")
        sentences = [template.replace("{}", label) for label in labels for template in templates]
        vectors = self.encode_texts(sentences).unflatten(0, (len(labels), len(templates)))
        return F.normalize(vectors.mean(1), dim=-1)

    def classify(
        self,
        images: ImageLike | Tensor | Sequence[ImageLike | Tensor],
        labels: Sequence[str],
        *,
        templates: Sequence[str] = TEMPLATES,
        top_k: int = 1,
        batch_size: int = 64,
    ) -> list[list[tuple[str, float]]]:
        """Classifies pictures into classes that are known by their names alone (zero-shot).

        Args:
            images: A picture, or a list of them.
            labels: The names of the classes.
            templates: Sentences with {} where the name belongs, in the language of the labels; several are averaged.
            top_k: How many classes of each.
            batch_size: Pictures at once.

        Returns:
            For each picture its likeliest classes, best first, with their shares: of 1 among the labels for a model of
            the softmax loss; of the sigmoid loss each label's own probability.

        Raises:
            ImageError: If a picture cannot be used.
            ValueError: If there is no label, a template has no {}, or `top_k` is no number of things.
        """
        check_count("top_k", top_k)
        named = self.encode_labels(labels, templates)
        vectors = self.encode_images(images, batch_size=batch_size)
        with torch.no_grad():
            logits = self.model.logits(vectors.to(self.device), named.to(self.device)).float().cpu()
        shares = logits.softmax(-1) if self.model.logit_bias is None else logits.sigmoid()
        best = logits.topk(min(top_k, len(labels)), dim=-1).indices
        names = list(labels)
        return [[(names[i], float(row[i])) for i in chosen] for row, chosen in zip(shares, best.tolist(), strict=True)]

    # -------------------------------------------------------------------------------------------------- folders

    def save_pretrained(self, folder: str | Path, *, card: str = "") -> None:
        """Writes model, tokenizer, image transform and a model card.

        Args:
            folder: Where to; made if it is not there.
            card: Text for the model card, below its heading: how it was trained, its scores.
        """
        folder = Path(folder)
        pixels = transform_settings(self.transform)
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        write_json(folder / PREPROCESSOR, pixels)
        write_card(
            folder,
            self.model,
            task="zero-shot-image-classification",
            about="A dual encoder of mmtransformer, which compares pictures and texts",
            usage="from mmtransformer import ImageTextEmbedder\n\n"
            'model = ImageTextEmbedder.from_pretrained("FOLDER")  # this folder\n'
            'print(model.classify("picture.jpg", ["a cat", "a dog"])[0])',
            languages=self.tokenizer.languages,
            note=card,
        )

    def save_transformers(self, folder: str | Path) -> None:
        """Writes a folder that transformers reads: the model as the dual encoder it is there, tokenizer and processor.

        Raises:
            ValueError: If transformers has no such model, or no such transform, before anything is written.
        """
        pixels = preprocessor_of(self.model, self.transform)
        save_clip(self.model, folder, ids=ids_of(self.tokenizer))
        write_inputs(Path(folder), self.model, self.tokenizer, pixels)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        device: torch.device | str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Loads a dual encoder, from a folder or from the hub; nothing is ever unpickled that could run code.

        Args:
            name_or_path: What `save_pretrained` wrote, or a public model: one of transformers' that `load_clip`
                knows (CLIP, MetaCLIP 2, SigLIP, SigLIP 2, Chinese-CLIP, AltCLIP and others), or one of open_clip, with
                its tokenizer.json.
            dtype: What its weights are kept in, and computed with; on a CPU float32 linear weights are prepacked
                (`weight_prepacking.for_inference`).
            device: Where to compute; a GPU if there is one.
            revision: A branch, tag or commit of the hub's repository.
            token: Of an account on the hub.
            cache_dir: The hub's cache.
            local_files_only: Whether to take what the cache has and ask nobody.

        Raises:
            ValueError: If a part is missing or damaged, the parts do not fit, or the folder holds another model (a
                tower or a text model alone, a captioner); names the file.
        """
        if dtype not in _FORMATS:
            raise ValueError(f'dtype must be {", ".join(_FORMATS)}, not "{dtype}"')
        folder = find_folder(name_or_path, HubOptions(revision, token, cache_dir, local_files_only), look=_refuse)
        model = load_clip(folder)
        if not (folder / PREPROCESSOR).exists() and (folder / CONFIG).exists():
            tokenizer, transform = read_inputs(folder, str(read_json(folder / CONFIG).get("model_type")), model)
        else:
            tokenizer = Tokenizer.from_pretrained(folder)
            if (folder / PREPROCESSOR).exists():
                transform = read_transform(folder / PREPROCESSOR, getattr(model.vision, "image_size", None))
            else:
                transform = open_clip_pixels(folder, model.vision.image_size)
        found = cls(model.to(_FORMATS[dtype]), tokenizer, transform, device=device)
        if dtype == "float32":
            for_inference(found.model)
        else:
            upcast_products(found.model)
        return found


def _refuse(folder: Path) -> None:
    """Refuses another model by its config.json, before anything large is fetched."""
    config = folder_config(folder)
    if "class" not in config and config.get("model_type") != "open_clip":
        dual_encoder_type(config, str(folder / CONFIG))
