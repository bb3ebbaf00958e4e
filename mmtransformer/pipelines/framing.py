"""Words before and after captions."""

import dataclasses
from collections.abc import Iterator, Sequence

from mmtransformer.generation.captions import CaptionResult
from mmtransformer.text.detokenize import detokenize


def between(prefix: str, text: str, suffix: str) -> str:
    """A caption with words before and after it, a space between unless there is one, or a comma or the like."""
    before = prefix if not prefix or prefix[-1].isspace() else f"{prefix} "
    after = suffix if not suffix or not (suffix[0].isalnum() or suffix[0] in "([{<\"'") else f" {suffix}"
    return f"{before}{text}{after}"


def framed(
    captions: Sequence[CaptionResult], prefix: str, suffix: str, *, plain: bool = False
) -> Iterator[CaptionResult]:
    """Captions with words before and after them; their tokens and scores stay those of what the model said.

    Args:
        captions: The captions.
        prefix: Words before them.
        suffix: Words after them.
        plain: Whether spaces that a tokenizer of words has put in are taken out (`detokenize`).
    """
    for caption in captions:
        text = detokenize(caption.text) if plain else caption.text
        yield dataclasses.replace(caption, text=between(prefix, text, suffix))
