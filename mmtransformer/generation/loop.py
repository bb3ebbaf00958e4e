"""generate() and stream(): texts from any model with start and step, by greedy search, sampling or beam search.

Letters: n rows of prompts.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from mmtransformer.captioners.base import Captioner
from mmtransformer.generation.beam_search import Beams, LengthPenalty, beam_search
from mmtransformer.generation.config import GenerationConfig
from mmtransformer.generation.constrained import ConstrainedBeams, Word, required_words
from mmtransformer.generation.guidance import Guided
from mmtransformer.generation.logits_processors import Batch, Generated, GenerativeModel, Rules
from mmtransformer.generation.sampling import Drawing, sample, walk


@torch.inference_mode()
def generate(
    captioner: GenerativeModel[Batch],
    batch: Batch,
    config: GenerationConfig | None = None,
    *,
    eos_id: int,
    force_words_ids: Sequence[Word] = (),
    generator: torch.Generator | None = None,
    **changes: Any,
) -> list[list[Generated]]:
    """Continues each row's prompt. Names, defaults and results follow transformers' `generate`.

    Pictures are encoded once, their keys and values projected once, and shared by all beams and samples.

    Args:
        captioner: the model; evaluation mode is set for the call.
        batch: pictures (or source texts) and prompts; prompts are padded on the left.
        config: how to search; greedily unless told.
        eos_id: the id that ends a text.
        force_words_ids: words that must come, each as the ways to spell it in tokens; needs beams.
        generator: source of randomness for sampling.
        changes: settings of `GenerationConfig`, in place of those of `config`.

    Returns:
        For each row its texts, best first (samples: in the order drawn).

    Raises:
        ValueError: for numbers that make no sense, alone or together, or with this model and batch.
    """
    c = dataclasses.replace(config or GenerationConfig(), **changes)
    check(c, captioner, batch, force_words_ids)
    model = _guided(captioner, c.guidance_scale)
    rules = Rules(eos_id, c.min_new_tokens, c.repetition_penalty, c.no_repeat_ngram_size)
    training = captioner.training
    captioner.eval()
    try:
        if c.num_beams == 1:
            drawing = Drawing(c.temperature, c.top_k, c.top_p, generator) if c.do_sample else None
            return sample(model, batch, rules, c.max_new_tokens, c.num_return_sequences, drawing)
        divide = LengthPenalty(c.length_penalty, c.length_offset)
        size = c.num_beams // c.num_beam_groups
        new = (batch.tokens.shape[0], size, c.max_new_tokens, rules, divide, batch.tokens.device)
        if force_words_ids:
            beams = ConstrainedBeams(*new, force_words_ids)
            return required_words(model, batch, rules, c.max_new_tokens, beams, c.num_return_sequences)
        groups = [Beams(*new) for _ in range(c.num_beam_groups)]
        return beam_search(
            model, batch, rules, c.max_new_tokens, groups, c.num_return_sequences, c.diversity_penalty
        )
    finally:
        captioner.train(training)


@torch.inference_mode()
def stream(
    captioner: GenerativeModel[Batch],
    batch: Batch,
    config: GenerationConfig | None = None,
    *,
    eos_id: int,
    generator: torch.Generator | None = None,
    **changes: Any,
) -> Iterator[list[int | None]]:
    """Yields tokens while they are written: what `generate` would give with the same arguments, a step at a time.

    Args:
        captioner: the model; evaluation mode is set until the last token, or until the iterator is closed.
        batch: pictures (or source texts) and prompts; prompts are padded on the left.
        config: how to search, without beams; greedily unless told.
        eos_id: the id that ends a text.
        generator: source of randomness for sampling.
        changes: settings of `GenerationConfig`, in place of those of `config`.

    Yields:
        The new id of each row; None where its text has ended.

    Raises:
        ValueError: as `generate`; and for several beams or texts, of which no token is sure before the end.
    """
    c = dataclasses.replace(config or GenerationConfig(), **changes)
    check(c, captioner, batch)
    if c.num_beams > 1 or c.num_return_sequences > 1:
        raise ValueError(
            f"a stream is one text, without beams: num_beams is {c.num_beams}, num_return_sequences "
            f"{c.num_return_sequences}"
        )
    rules = Rules(eos_id, c.min_new_tokens, c.repetition_penalty, c.no_repeat_ngram_size)
    drawing = Drawing(c.temperature, c.top_k, c.top_p, generator) if c.do_sample else None
    training, ended = captioner.training, [False] * batch.tokens.shape[0]
    captioner.eval()
    try:
        model = _guided(captioner, c.guidance_scale)
        for tokens, _ in walk(model, batch, rules, c.max_new_tokens, 1, drawing):
            ids = tokens.tolist()
            ended = [was or token == eos_id for was, token in zip(ended, ids, strict=True)]
            yield [None if end else token for end, token in zip(ended, ids, strict=True)]
            if all(ended):
                return
    finally:
        captioner.train(training)


def check(
    config: GenerationConfig,
    model: GenerativeModel[Batch],
    batch: Batch,
    force_words_ids: Sequence[Word] = (),
) -> None:
    """Refuses settings that make no sense with a model and a batch.

    Raises:
        ValueError: naming the setting.
    """
    prompt, new = batch.tokens.shape[1], config.max_new_tokens
    if prompt + new > model.max_len:
        raise ValueError(
            f"a prompt of {prompt} and max_new_tokens ({new}) are more than the {model.max_len} tokens that the model "
            f"reads; at most {model.max_len - prompt} new tokens fit"
        )
    if config.guidance_scale != 1 and not isinstance(model, Captioner):
        raise ValueError(f"guidance_scale is for captioners, and a {type(model).__name__} sees no picture")
    if config.force_words and not force_words_ids:
        raise ValueError("force_words are text, and only a tokenizer knows their ids: give force_words_ids")
    if not force_words_ids:
        return
    if config.num_beams == 1 or config.num_beam_groups > 1:
        raise ValueError(
            f"force_words_ids need beams in one group: num_beams is {config.num_beams}, num_beam_groups "
            f"{config.num_beam_groups}"
        )
    if any(not word or any(not ids for ids in word) for word in force_words_ids):
        raise ValueError(
            "force_words_ids has a word without a token: give at least one spelling, of at least one token"
        )
    if (least := sum(min(map(len, word)) for word in force_words_ids)) > new:
        raise ValueError(f"force_words_ids has {least} tokens, more than max_new_tokens ({new})")


def _guided(captioner: GenerativeModel[Batch], scale: float) -> GenerativeModel[Batch]:
    if scale == 1.0 or not isinstance(captioner, Captioner):
        return captioner
    return Guided(captioner, scale)  # pyright: ignore[reportReturnType]  # Its batches are a captioner's.
