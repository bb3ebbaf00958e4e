"""ImageCaptioner: pictures in, captions out, and everything that belongs to a saved model in one folder.

Letters: b pictures, r languages, n = b * r rows, q text tokens, gh gw rows and columns of patches.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

import torch
from PIL.Image import Image
from torch import Tensor

from mmtransformer.captioner import CaptionBatch, Captioner
from mmtransformer.generate import Generated, generate
from mmtransformer.images import ImageTransform, load
from mmtransformer.pretrained import find_folder, read_json
from mmtransformer.prompts import Prompts, with_prompts
from mmtransformer.tokenizer import Tokenizer

PREPROCESSOR, GENERATION, CARD = "preprocessor.json", "generation.json", "README.md"
Picture = str | Path | bytes | BinaryIO | Image


@dataclass(frozen=True)
class Decoding:
    """How captions are searched for; saved with a model. Names and effects are those of `generate`.

    Args:
        num_beams: Beams; 1 = greedy, or sampling.
        max_new_tokens: Most tokens of a caption, its end included.
        min_new_tokens: No end before so many tokens.
        length_penalty: A beam's log-probability is divided by its length to this power; above 0 favours longer ones.
        length_offset: o in that length, (o + tokens) / (o + 1); 5 is Google's formula, see `generate`.
        repetition_penalty: Above 1, tokens that were used get less likely.
        no_repeat_ngram: No n-gram of this length comes twice; 0 = they may.
        do_sample: Draw tokens instead of taking the likeliest.
        temperature: Divides the scores before drawing.
        top_k: Draw from the k likeliest only.
        top_p: Draw from the fewest tokens that hold this share of probability.
        seed: Seed of the drawing.
        mark_pictures: Let the prompt show where the picture stands, by the tokenizer's image token: for a model that
            was trained so, on interleaved documents.
    """

    num_beams: int = 3
    max_new_tokens: int = 60
    min_new_tokens: int = 0
    length_penalty: float = 1.0
    length_offset: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    mark_pictures: bool = False


@dataclass(frozen=True)
class CaptionResult:
    """One caption of a picture.

    Attributes:
        text: The caption.
        language: Its language, or None if the model knows none.
        tokens: Its ids, without prompt and end.
        log_prob: Natural log of its probability, the end included.
        token_log_probs: That of each token.
        words: Its words, each with the places in `tokens` of its pieces.
        finished: Whether the model ended it; False = cut at `max_new_tokens`.
    """

    text: str
    language: str | None
    tokens: list[int]
    log_prob: float
    token_log_probs: list[float]
    words: list[tuple[str, list[int]]]
    finished: bool


def write_captions(
    captioner: Captioner,
    tokenizer: Tokenizer,
    batch: CaptionBatch,
    languages: Sequence[str | None] = (None,),
    *,
    num_captions: int = 1,
    decoding: Decoding | None = None,
    prompts: Prompts | None = None,
) -> list[list[list[CaptionResult]]]:
    """Captions the pictures of a batch, in each language; every picture is encoded once.

    Args:
        captioner: The model.
        tokenizer: Its tokenizer.
        batch: Pictures; their texts are not looked at.
        languages: The languages; None where the tokenizer has none.
        num_captions: Captions a picture and language.
        decoding: How to search.
        prompts: Makes the prompts, with examples for instance; None makes plain ones.

    Returns:
        For each picture, for each language, its captions, best first.
    """
    d = decoding or Decoding()
    if prompts is None:
        batch = with_prompts(batch, tokenizer, languages, mark=d.mark_pictures)
    else:
        batch = prompts(batch, languages)
    room = captioner.max_len - batch.tokens.shape[1]
    generator = torch.Generator(batch.tokens.device).manual_seed(d.seed) if d.do_sample else None
    rows = generate(
        captioner,
        batch,
        eos_id=tokenizer.eos_id,
        max_new_tokens=min(d.max_new_tokens, room),
        min_new_tokens=d.min_new_tokens,
        num_beams=d.num_beams if d.do_sample or d.num_beams >= num_captions else num_captions,
        num_return=num_captions,
        do_sample=d.do_sample,
        temperature=d.temperature,
        top_k=d.top_k,
        top_p=d.top_p,
        repetition_penalty=d.repetition_penalty,
        no_repeat_ngram=d.no_repeat_ngram,
        length_penalty=d.length_penalty,
        length_offset=d.length_offset,
        generator=generator,
    )
    results = [
        [_result(said, tokenizer, languages[i % len(languages)]) for said in row]
        for i, row in enumerate(rows)
    ]
    return [results[i : i + len(languages)] for i in range(0, len(results), len(languages))]


def _result(said: Generated, tokenizer: Tokenizer, language: str | None) -> CaptionResult:
    # A model may score more ids than its tokenizer has (a small corpus gives fewer); those say nothing.
    known = [
        (t, p) for t, p in zip(said.tokens, said.token_log_probs, strict=True) if t < tokenizer.vocab_size
    ]
    tokens = [token for token, _ in known]
    return CaptionResult(
        text=tokenizer.decode(tokens),
        language=language,
        tokens=tokens,
        log_prob=said.log_prob,
        token_log_probs=[log_prob for _, log_prob in known],
        words=tokenizer.words(tokens),
        finished=said.finished,
    )


def heat_of(
    captioner: Captioner,
    tokenizer: Tokenizer,
    batch: CaptionBatch,
    said: CaptionResult,
    prompts: Prompts | None = None,
    *,
    mark: bool = False,
) -> Tensor:
    """Where the model looked while it wrote each word, (words gh gw), for a batch of one picture.

    The position that predicts a token is the one that looks for it; a word takes the mean of its tokens.

    Args:
        captioner: The model.
        tokenizer: Its tokenizer.
        batch: The picture.
        said: What the model said of it.
        prompts: What made the prompt it was said after, if not plain ones.
        mark: Whether the plain prompt marks the picture.
    """
    if prompts is None:
        prompt = with_prompts(batch, tokenizer, [said.language], mark=mark)
    else:
        prompt = prompts(batch, [said.language])
    tokens = torch.cat([prompt.tokens, prompt.tokens.new_tensor([said.tokens])], 1)
    valid = torch.ones_like(tokens, dtype=torch.bool)
    media = prompt.media
    if media is not None:
        media = torch.cat([media, media[:, -1:].expand(-1, len(said.tokens))], 1)
    whole = dataclasses.replace(prompt, tokens=tokens, valid=valid, target=~valid, media=media)
    look = captioner.look(whole)[0, :, -1]
    first = prompt.tokens.shape[1] - 1
    if not said.words:
        return look.new_zeros(0, *look.shape[1:]).cpu()
    return torch.stack([look[[first + p for p in places]].mean(0) for _, places in said.words]).float().cpu()


class ImageCaptioner:
    """Captions pictures with a trained model.

    Args:
        captioner: The model.
        tokenizer: Its tokenizer.
        transform: How a picture becomes pixels.
        decoding: How captions are searched for, unless a call says otherwise.
        device: Where to compute; a GPU if there is one.
    """

    def __init__(
        self,
        captioner: Captioner,
        tokenizer: Tokenizer,
        transform: ImageTransform,
        *,
        decoding: Decoding | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if tokenizer.vocab_size > captioner.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, but the model scores {captioner.vocab_size}; "
                f"they do not belong together"
            )
        self.device = torch.device(device) if device is not None else _best_device()
        self.captioner = captioner.to(self.device).eval()
        self.tokenizer, self.transform, self.decoding = tokenizer, transform, decoding or Decoding()

    @classmethod
    def from_pretrained(cls, folder_or_id: str | Path, *, device: torch.device | str | None = None) -> Self:
        """Loads what `save_pretrained` wrote, from a folder or from the hub; nothing is ever unpickled.

        Raises:
            ValueError: If a part is missing or damaged, or the parts do not fit; names the file.
        """
        folder = find_folder(folder_or_id)
        captioner = Captioner.from_pretrained(folder)
        transform = ImageTransform.from_dict(read_json(folder / PREPROCESSOR))
        decoding = _decoding(folder / GENERATION) if (folder / GENERATION).is_file() else None
        return cls(captioner, Tokenizer.from_folder(folder), transform, decoding=decoding, device=device)

    def save_pretrained(self, folder: str | Path, *, card: str | None = None) -> None:
        """Writes model, tokenizer, image transform, decoding and a model card.

        Args:
            folder: Where to; made if it is not there.
            card: Text for the model card, below its heading: how it was trained, its scores.
        """
        folder = Path(folder)
        self.captioner.save_pretrained(folder)
        self.tokenizer.save(folder)
        _write_json(folder / PREPROCESSOR, self.transform.to_dict())
        _write_json(folder / GENERATION, dataclasses.asdict(self.decoding))
        (folder / CARD).write_text(self._card(folder.resolve(), card), encoding="utf-8")

    @torch.inference_mode()
    def __call__(
        self,
        images: Picture | Sequence[Picture],
        *,
        language: str | None = None,
        num_captions: int = 1,
        num_beams: int | None = None,
        max_new_tokens: int | None = None,
        decoding: Decoding | None = None,
        prompts: Prompts | None = None,
        batch_size: int = 16,
    ) -> list[list[CaptionResult]]:
        """Captions pictures.

        Args:
            images: A picture (path, bytes, file or PIL image), or a list of them.
            language: Its code, if the model knows several; the first one it knows unless told.
            num_captions: Captions a picture.
            num_beams: Beams, in place of the model's own setting.
            max_new_tokens: Most tokens of a caption, in place of the model's own setting.
            decoding: All settings of the search, in place of the model's own.
            prompts: Makes the prompts: `FewShot` puts examples before each picture.
            batch_size: Pictures at once.

        Returns:
            For each picture its captions, best first.

        Raises:
            ImageError: If a picture cannot be used; names the file, the fault and the remedy.
            ValueError: If the model does not know the language.
        """
        many: list[Picture] = [*images] if isinstance(images, (list, tuple)) else [images]  # pyright: ignore
        d = decoding or self.decoding
        d = dataclasses.replace(
            d,
            num_beams=d.num_beams if num_beams is None else num_beams,
            max_new_tokens=d.max_new_tokens if max_new_tokens is None else max_new_tokens,
        )
        language = self.language(language)
        captions = []
        for start in range(0, len(many), batch_size):
            batch = self.batch(many[start : start + batch_size])
            with fast_autocast(self.device):
                rows = write_captions(
                    self.captioner,
                    self.tokenizer,
                    batch,
                    [language],
                    num_captions=num_captions,
                    decoding=d,
                    prompts=prompts,
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

    @torch.inference_mode()
    def heat(self, image: Picture, caption: CaptionResult, prompts: Prompts | None = None) -> Tensor:
        """Where the model looked while it wrote each word of a caption: (words gh gw).

        Args:
            image: The picture.
            caption: What the model said of it.
            prompts: What made the prompts when it was captioned.
        """
        return heat_of(
            self.captioner,
            self.tokenizer,
            self.batch([image]),
            caption,
            prompts,
            mark=self.decoding.mark_pictures,
        )

    def batch(self, images: Sequence[Picture]) -> CaptionBatch:
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

# {folder.parent.name if folder.name == "model" else folder.name}

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


def _decoding(path: Path) -> Decoding:
    values = read_json(path)
    known = [field.name for field in dataclasses.fields(Decoding)]
    if unknown := [key for key in values if key not in known]:
        raise ValueError(f"{path}: unknown keys {unknown}; known: {known}")
    return Decoding(**values)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
