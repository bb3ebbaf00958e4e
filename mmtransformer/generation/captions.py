"""Captions as texts: prompts, and what a model writes after them, from a batch of pictures.

Shapes: b samples, r languages, n = b * r rows; gh gw rows and columns of patches.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mmtransformer.batch import CaptionBatch
from mmtransformer.captioners.attribution import word_heatmaps
from mmtransformer.captioners.base import Captioner
from mmtransformer.generation.config import GenerationConfig
from mmtransformer.generation.forced_words import ForcedWords
from mmtransformer.generation.loop import generate, stream
from mmtransformer.generation.sampling import checksums
from mmtransformer.text.tokenizer import Tokenizer

CAPTIONING = GenerationConfig(num_beams=3, max_new_tokens=60)
"""How captions are searched for unless told."""


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


class PromptBuilder(Protocol):
    """Makes the batch that generation starts from out of pictures to be captioned."""

    @property
    def keeps_prompt(self) -> bool:
        """Whether a caption goes on from its prompt's own words ("a photo of"), so that its text begins with them."""
        ...

    def __call__(self, batch: CaptionBatch, languages: Sequence[str | None]) -> CaptionBatch:
        """Gives each of the batch's b samples one left-padded prompt a language: n = b * r rows.

        A sample's last picture is the one to be captioned; pictures before it are examples.
        """
        ...


def with_prompts(
    batch: CaptionBatch,
    tokenizer: Tokenizer,
    languages: Sequence[str | None],
    prompt_builder: PromptBuilder | None = None,
    *,
    mark: bool = False,
) -> CaptionBatch:
    """The same pictures with one prompt a language in place of the captions: n = b * r rows.

    Args:
        batch: Pictures; their texts are not looked at.
        tokenizer: Makes the prompts.
        languages: The languages.
        prompt_builder: Makes them; None makes plain ones.
        mark: Whether plain prompts end with an image token a picture.

    Raises:
        ValueError: If the tokenizer has no image token and should mark pictures with it.
    """
    if prompt_builder is not None:
        return prompt_builder(batch, languages)
    b, i = batch.visual.shape[:2]
    if mark and tokenizer.image_token_id is None:
        raise ValueError(
            f"pictures cannot be marked (add_image_tokens): the tokenizer ({tokenizer.vocab_size} tokens) has no image "
            f'token; "image_token" in its tokenizer_config.json names one'
        )
    marks = [tokenizer.image_token_id] * i if mark and tokenizer.image_token_id is not None else []
    tokens, attention_mask = tokenizer.pad([tokenizer.prompt(language) + marks for language in languages], side="left")
    tokens, attention_mask = (x.repeat(b, 1).to(batch.tokens.device) for x in (tokens, attention_mask))
    return dataclasses.replace(
        batch,
        tokens=tokens,
        attention_mask=attention_mask,
        loss_mask=torch.zeros_like(attention_mask),
        image_index=(tokens == tokenizer.image_token_id).long().cumsum(1) if marks else None,
        first_image_index=None,
        document_ids=None,
    )


def write_captions(
    captioner: Captioner,
    tokenizer: Tokenizer,
    batch: CaptionBatch,
    languages: Sequence[str | None] = (None,),
    *,
    generation: GenerationConfig = CAPTIONING,
    prompt_builder: PromptBuilder | None = None,
) -> list[list[list[CaptionResult]]]:
    """Captions the pictures of a batch, in each language; every picture is encoded once.

    Args:
        captioner: The model.
        tokenizer: Its tokenizer.
        batch: Pictures; their texts are not looked at.
        languages: The languages; None where the tokenizer has none.
        generation: How to search. Captions end where the model can read no further.
        prompt_builder: Makes the prompts, with examples for instance; None makes plain ones.

    Returns:
        For each picture, for each language, its captions, best first.
    """
    given, batch = batch, with_prompts(batch, tokenizer, languages, prompt_builder, mark=generation.add_image_tokens)
    c = generation.limited(captioner.max_len - batch.tokens.shape[1])
    rows = generate(
        captioner,
        batch,
        c,
        eos_id=tokenizer.eos_ids,
        force_words_ids=ForcedWords.of(tokenizer, c.force_words, captioner.vocab_size) if c.force_words else (),
        row_seeds=checksums(batch, given) if c.do_sample else None,
        num_tokens=tokenizer.vocab_size,
    )
    found: list[list[CaptionResult]] = []
    keep = prompt_builder is not None and prompt_builder.keeps_prompt
    openings = [row[real].tolist() * keep for row, real in zip(batch.tokens, batch.attention_mask, strict=True)]
    # A GPT-2's texts begin with the id that ends them, which would end them here, too; a BLIP's with none of its words.
    vocab, ends = tokenizer.vocab_size, tokenizer.eos_ids
    openings = [[token for token in row if token < vocab and token not in ends] for row in openings]
    for row, opening, language in zip(rows, openings, itertools.cycle(languages), strict=False):
        found.append([])
        for said in sorted(row, key=lambda said: -said.log_prob) if c.do_sample else row:  # beams are in their order
            found[-1].append(
                CaptionResult(
                    text=tokenizer.decode([*opening, *said.tokens]).strip(" "),
                    language=language,
                    tokens=said.tokens,
                    log_prob=said.log_prob,
                    token_log_probs=said.token_log_probs,
                    words=tokenizer.words(said.tokens),
                    finished=said.finished,
                )
            )
    return [found[i : i + len(languages)] for i in range(0, len(found), len(languages))]


def stream_caption(
    captioner: Captioner,
    tokenizer: Tokenizer,
    batch: CaptionBatch,
    language: str | None = None,
    *,
    generation: GenerationConfig = CAPTIONING,
    prompt_builder: PromptBuilder | None = None,
) -> Iterator[str]:
    """Yields one picture's caption piece by piece, as it is written: greedily, or drawn.

    A character whose bytes are spread over several tokens comes whole, with the last of them.

    Args:
        captioner: The model.
        tokenizer: Its tokenizer.
        batch: One picture.
        language: The language; None where the tokenizer has none.
        generation: How to search; what takes several beams is left aside.
        prompt_builder: Makes the prompt; None makes a plain one.

    Raises:
        ValueError: If there are words that the caption must contain.
    """
    settings = generation.streamed()
    given, batch = batch, with_prompts(batch, tokenizer, [language], prompt_builder, mark=generation.add_image_tokens)
    c = settings.limited(captioner.max_len - batch.tokens.shape[1])
    row_seeds = checksums(batch, given) if c.do_sample else None
    size = tokenizer.vocab_size
    tokens = stream(captioner, batch, c, eos_id=tokenizer.eos_ids, row_seeds=row_seeds, num_tokens=size)
    ids: list[int] = []
    text, shown = "", 0
    for (token,) in tokens:
        ids += [] if token is None else [token]
        text = tokenizer.decode(ids).lstrip(" ")
        sure = len(text) - tokenizer.decomposes  # The next letter may join the last syllable.
        if sure > shown:
            yield text[shown:sure]
            shown = sure
    if text[shown:]:
        yield text[shown:]


def heatmap_of(
    captioner: Captioner,
    tokenizer: Tokenizer,
    batch: CaptionBatch,
    said: CaptionResult,
    prompt_builder: PromptBuilder | None = None,
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
        prompt_builder: What made the prompt it was said after, if not plain ones.
        mark: Whether the plain prompt marks the picture.

    Raises:
        TypeError: of what is no `CaptionResult`, such as its text.
        ValueError: if the model has no heat maps.
    """
    if captioner.heatmap_error:
        raise ValueError(captioner.heatmap_error)
    if not isinstance(said, CaptionResult):
        raise TypeError(
            f"a heat map is of a CaptionResult, one of those in captioner(image)[0], not of {said!r:.80}: "
            "it has the tokens that the model looked with"
        )
    prompt = with_prompts(batch, tokenizer, [said.language], prompt_builder, mark=mark)
    tokens = torch.cat([prompt.tokens, prompt.tokens.new_tensor([said.tokens])], 1)
    attention_mask = torch.ones_like(tokens, dtype=torch.bool)
    image_index = prompt.image_index
    if image_index is not None:
        image_index = torch.cat([image_index, image_index[:, -1:].expand(-1, len(said.tokens))], 1)
    whole = dataclasses.replace(
        prompt, tokens=tokens, attention_mask=attention_mask, loss_mask=~attention_mask, image_index=image_index
    )
    first = prompt.tokens.shape[1] - 1
    words = [[first + place for place in places] for _, places in said.words]
    return word_heatmaps(captioner.attention_map(whole)[0, :, -1], words).float().cpu()
