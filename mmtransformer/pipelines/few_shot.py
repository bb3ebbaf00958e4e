"""Few-shot prompts: examples before each picture that is to be captioned, chosen at random or by likeness.

    bos, language tag, <image>, caption, eos, <image>, caption, eos, ..., <image>

It is the form that documents have in training (`data.packing`), so a model that learnt to go on with a document goes on
with the examples.

Shapes: r languages, n = b * r rows; i images of a row are the examples, then the one to be captioned.
"""

import dataclasses
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mmtransformer.batch import CaptionBatch
from mmtransformer.captioners.base import Captioner
from mmtransformer.data.loading.hashing import hash64
from mmtransformer.data.loading.pixels import of_one_size
from mmtransformer.data.loading.rows import image_token
from mmtransformer.data.loading.source import Caption, Pairs
from mmtransformer.images import ImageTransform
from mmtransformer.layers.modes import evaluation_mode
from mmtransformer.text.tokenizer import Tokenizer

_KEPT = 256  # examples whose visual tokens are kept in memory
_AT_ONCE = 32  # examples that are encoded together


def check_reader(captioner: Captioner, *, blind: bool = False) -> None:
    """Makes sure that a model reads pictures anywhere in the text.

    Args:
        captioner: The model.
        blind: Whether one that is told to see no picture (visible_images="none") will do.

    Raises:
        ValueError: It does not.
    """
    visible_images = getattr(captioner, "visible_images", None)
    if visible_images is None or (visible_images == "none" and not blind):
        raise ValueError(
            f"{type(captioner).__name__} reads the pictures of a text as a whole, so it cannot tell which of them a "
            f'word belongs to; documents and examples take a Flamingo with visible_images="last" or "all_previous"'
        )


class FewShotPromptBuilder:
    """Puts examples before every picture: `ImageCaptioner(...)(images, prompt_builder=FewShotPromptBuilder(...))`.

    The examples of a picture depend on the picture, the seed and nothing else, so neither on its batch.

    Args:
        examples: Pictures with captions.
        captioner: The model; it must be one that reads pictures anywhere in the text, as `Flamingo` does.
        tokenizer: Its tokenizer, with an image token.
        transform: How a picture becomes pixels.
        num_shots: Examples before each picture; 0 = none, the picture alone, marked as in a document.
        choose: "random", or "nearest": those whose pooled features of the vision tower are most like the picture's, the
            most alike last (RICES; Yang et al., arXiv:2109.05014).
        seed: Of the random choice: of examples, and of one caption of each.

    Raises:
        ValueError: If the model cannot read several pictures, the tokenizer has no image token, or there are fewer
            examples than shots.
    """

    keeps_prompt = False

    def __init__(
        self,
        examples: Pairs,
        captioner: Captioner,
        tokenizer: Tokenizer,
        transform: ImageTransform,
        *,
        num_shots: int = 4,
        choose: Literal["random", "nearest"] = "random",
        seed: int = 0,
    ):
        check_reader(captioner)
        if num_shots < 0 or num_shots > len(examples):
            raise ValueError(f"num_shots ({num_shots}) must be from 0 to the number of examples ({len(examples)})")
        if choose not in ("random", "nearest"):
            raise ValueError(f'choose must be "random" or "nearest", not "{choose}"')
        self.image_token_id = image_token(tokenizer)
        self.examples, self.captioner, self.tokenizer = examples, captioner, tokenizer
        self.transform = of_one_size(transform, "examples before a picture are")
        self.num_shots, self.choose, self.seed = num_shots, choose, seed
        self._captions = [examples.captions(i) for i in range(len(examples))]
        self._places: dict[str | None, int] = {examples.name(i): i for i in range(len(examples))}
        self._able_in: dict[tuple[str | None, ...], np.ndarray] = {}
        self._seen: OrderedDict[int, Tensor] = OrderedDict()  # example -> (p d)
        self._features: Tensor | None = None

    def batch(self, images: Sequence[Image.Image], names: Sequence[str] = ()) -> CaptionBatch:
        """Pictures as a batch of one picture a sample, to be called with.

        Args:
            images: The pictures.
            names: Their names; an example of the same name is not used.
        """
        pixels = torch.stack([self.transform(image) for image in images])[:, None]
        none = torch.zeros(len(images), 0, dtype=torch.long)
        return CaptionBatch(none, none.bool(), none.bool(), pixels=pixels, names=tuple(names))

    @torch.no_grad()
    def __call__(self, batch: CaptionBatch, languages: Sequence[str | None]) -> CaptionBatch:
        """Puts the examples before the pictures of a batch of one picture a sample: n = b * r rows.

        An example of the same name as a sample is not used for it.

        Raises:
            ValueError: If there are too few captions in a language, or a prompt leaves too little of what the model
                reads for a caption as long as the longest example's.
        """
        given, visual = batch.visual, batch.visual_tokens
        if given.shape[1] != 1:
            raise ValueError(f"examples go before one picture a sample, but these samples have {given.shape[1]}")
        visual = self._encode(given) if visual is None else visual
        names = batch.names or (None,) * len(given)
        able = self._able(tuple(languages))
        chosen: list[list[int]] = []
        for row, name in enumerate(names):
            others = able[able != self._places.get(name, -1)]
            if len(others) < self.num_shots:
                codes = ", ".join(code for code in languages if code) or "any language"
                known = sorted({caption.language or "any" for found in self._captions for caption in found})
                raise ValueError(
                    f"{self.num_shots} examples were asked for, but only {len(others)} of {len(self.examples)} can "
                    f"be used (another picture, with captions in {codes}): ask for fewer, or for a language that they "
                    f"have, {' or '.join(known) or 'which is none'} (mmt caption --language)"
                )
            chosen.append(self._choose(others, given[row], visual[row, 0]))
        rows = [self._row(some, language) for some in chosen for language in languages]
        tokens, attention_mask = self.tokenizer.pad(rows, side="left")
        tokens, attention_mask = tokens.to(visual.device), attention_mask.to(visual.device)
        shots = [torch.stack([*(self._visual(int(i)).to(visual) for i in some), visual[row, 0]]) for row, some in
                 enumerate(chosen)]  # fmt: skip
        return dataclasses.replace(
            batch,
            tokens=tokens,
            attention_mask=attention_mask,
            loss_mask=torch.zeros_like(attention_mask),
            pixels=None,
            visual_tokens=torch.stack(shots),
            image_mask=None,
            image_index=(tokens == self.image_token_id).long().cumsum(1),
            first_image_index=None,
            document_ids=None,
        )

    def _in(self, example: int, language: str | None) -> list[Caption]:
        """An example's captions in a language; those that name none are in any."""
        found = self._captions[example]
        return [c for c in found if language is None or c.language in (None, language)]

    def _able(self, languages: tuple[str | None, ...]) -> np.ndarray:
        """The examples that have captions in all of the languages."""
        if languages not in self._able_in:
            found = [i for i in range(len(self.examples)) if all(self._in(i, code) for code in languages)]
            self._able_in[languages] = np.array(found, np.int64)
        return self._able_in[languages]

    def _choose(self, others: np.ndarray, given: Tensor, query: Tensor) -> list[int]:
        """The examples of one picture, as it was given and as visual tokens (p d); the most alike last."""
        if self.choose == "random" or not self.num_shots:
            key = zlib.crc32(given.float().cpu().numpy().tobytes())
            return others[np.argsort(hash64(self.seed, key, others, 8), kind="stable")[: self.num_shots]].tolist()
        features, mean = self._all_features()
        near = features[torch.from_numpy(others)] @ F.normalize(self._pool(query[None]) - mean, dim=-1)[0]
        return others[near.topk(self.num_shots).indices.flip(0).cpu().numpy()].tolist()

    def _row(self, shots: Sequence[int], language: str | None) -> list[int]:
        """A prompt's ids."""
        tok = self.tokenizer
        head = tok.prompt(language if tok.languages else None)
        chunks: list[list[int]] = []
        for example in shots:
            captions = self._in(example, language)
            caption = captions[int(hash64(self.seed, example, 9)) % len(captions)]
            chunks.append([self.image_token_id, *tok.encode(caption.text), tok.eos_id])
        prompt, new = sum(chunks, head) + [self.image_token_id], max(map(len, chunks), default=2) - 1
        if (needed := len(prompt) + new) > (most := self.captioner.max_len):
            fits = 0
            while len(head) + 1 + new + sum(map(len, chunks[-fits - 1 :])) <= most:
                fits += 1
            raise ValueError(
                f"the prompt of {self.num_shots} examples is {len(prompt)} tokens long and a caption like theirs "
                f"takes {new} more: {needed}, but the model reads {most}; use fewer examples ({fits} fit)"
            )
        return prompt

    def _visual(self, example: int) -> Tensor:
        """An example's visual tokens (p d), computed once as long as there is room to keep them."""
        if example not in self._seen:
            device = next(self.captioner.parameters()).device
            pixels = self.transform(self.examples.image(example)).to(device)
            self._seen[example] = self._encode(pixels[None, None])[0, 0]
            if len(self._seen) > _KEPT:
                self._seen.popitem(last=False)
        self._seen.move_to_end(example)
        return self._seen[example]

    def _encode(self, pixels: Tensor) -> Tensor:
        """As `Captioner.forward_features`, in evaluation mode: what is kept must not be what dropout has left."""
        with evaluation_mode(self.captioner):
            return self.captioner.forward_features(pixels)

    def _pool(self, visual_tokens: Tensor) -> Tensor:
        """One feature a picture, (b p d) -> (b d), in float32."""
        return self.captioner.vision.forward_head(visual_tokens, pre_logits=True).float()

    def _all_features(self) -> tuple[Tensor, Tensor]:
        """The features of all examples, of length 1 and around their mean (examples d), and the mean (1 d)."""
        if self._features is None:
            device = next(self.captioner.parameters()).device
            found: list[Tensor] = []
            for start in range(0, len(self.examples), _AT_ONCE):
                places = range(start, min(start + _AT_ONCE, len(self.examples)))
                pixels = torch.stack([self.transform(self.examples.image(i)) for i in places])
                found.append(self._pool(self._encode(pixels[:, None].to(device))[:, 0]))
            self._features = torch.cat(found)
        mean = self._features.mean(0, keepdim=True)
        return F.normalize(self._features - mean, dim=-1), mean
