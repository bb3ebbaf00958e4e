"""Prompts: what a caption is written after.

Shapes: b samples, r languages, n = b * r rows.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch

from mmtransformer.captioners.base import CaptionBatch
from mmtransformer.text.tokenizer import Tokenizer


class Prompts(Protocol):
    """Makes the batch that generation starts from out of pictures to be captioned."""

    def __call__(self, batch: CaptionBatch, languages: Sequence[str | None]) -> CaptionBatch:
        """Gives each of the batch's b samples one left-padded prompt a language: n = b * r rows.

        A sample's last picture is the one to be captioned; pictures before it are examples.
        """
        ...


def with_prompts(
    batch: CaptionBatch,
    tokenizer: Tokenizer,
    languages: Sequence[str | None],
    prompts: Prompts | None = None,
    *,
    mark: bool = False,
) -> CaptionBatch:
    """The same pictures with one prompt a language in place of the captions: n = b * r rows.

    Args:
        batch: Pictures; their texts are not looked at.
        tokenizer: Makes the prompts.
        languages: The languages.
        prompts: Makes them; None makes plain ones.
        mark: Whether plain prompts end with an image token a picture.

    Raises:
        ValueError: If the tokenizer has no image token and should mark pictures with it.
    """
    if prompts is not None:
        return prompts(batch, languages)
    b, i = batch.visual.shape[:2]
    if mark and tokenizer.image_id is None:
        raise ValueError(
            f"pictures cannot be marked (mark_images): the tokenizer ({tokenizer.vocab_size} tokens) has no image "
            f'token; "image_token" in its tokenizer_config.json names one'
        )
    marks = [tokenizer.image_id] * i if mark and tokenizer.image_id is not None else []
    tokens, attention_mask = tokenizer.pad([tokenizer.prompt(language) + marks for language in languages], side="left")
    tokens, attention_mask = (
        tokens.repeat(b, 1).to(batch.tokens.device),
        attention_mask.repeat(b, 1).to(batch.tokens.device),
    )
    return dataclasses.replace(
        batch,
        tokens=tokens,
        attention_mask=attention_mask,
        loss_mask=torch.zeros_like(attention_mask),
        image_index=(tokens == tokenizer.image_id).long().cumsum(1) if marks else None,
        first_image_index=None,
        document_ids=None,
    )
