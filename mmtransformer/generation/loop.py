"""generate() and stream(): texts from any model with start and step, by greedy search, sampling or beam search.

Letters: n rows of prompts.
"""

from collections.abc import Iterator, Sequence

import torch

from mmtransformer.captioners.base import Captioner
from mmtransformer.generation.beam_search import Beams, LengthPenalty, beam_search
from mmtransformer.generation.constrained import ConstrainedBeams, Word, required_words
from mmtransformer.generation.guidance import Guided
from mmtransformer.generation.logits_processors import Batch, Generated, GenerativeModel, Rules
from mmtransformer.generation.sampling import Drawing, sample, walk


@torch.inference_mode()
def generate(
    captioner: GenerativeModel[Batch],
    batch: Batch,
    *,
    eos_id: int,
    max_new_tokens: int = 40,
    min_new_tokens: int = 0,
    num_beams: int = 1,
    num_return_sequences: int = 1,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    no_repeat_ngram: int = 0,
    length_penalty: float = 1.0,
    length_offset: float = 0.0,
    num_beam_groups: int = 1,
    diversity_penalty: float = 0.0,
    required: Sequence[Word] = (),
    image_guidance: float = 1.0,
    generator: torch.Generator | None = None,
) -> list[list[Generated]]:
    """Continues each row's prompt. Names, defaults and results follow transformers' `generate`.

    Pictures are encoded once, their keys and values projected once, and shared by all beams and samples.

    Args:
        captioner: the model; evaluation mode is set for the call.
        batch: pictures (or source texts) and prompts; prompts are padded on the left.
        eos_id: the id that ends a text.
        max_new_tokens: most new tokens, the end included.
        min_new_tokens: no end before so many tokens.
        num_beams: beams; 1 = greedy, or sampling.
        num_return_sequences: texts a row: samples, or the best of the beams.
        do_sample: draw tokens instead of taking the likeliest.
        temperature: divides the scores before drawing.
        top_k: draw from the k likeliest only.
        top_p: draw from the fewest tokens that hold this share of probability (nucleus, arXiv:1904.09751).
        repetition_penalty: see `Rules`.
        no_repeat_ngram: see `Rules`.
        length_penalty: a beam's score is its log-probability divided by its length to this power; above 0 favours
            longer texts.
        length_offset: o in that length, (o + tokens) / (o + 1); 5 is Google's formula (arXiv:1609.08144, equation 14),
            which "Attention Is All You Need" used with `length_penalty=0.6`.
        num_beam_groups: groups that the beams are divided into, each avoiding the words of those before it.
        diversity_penalty: how much a group avoids them (diverse beam search, arXiv:1610.02424).
        required: words that must come, each as the ways to spell it in tokens (see `search.words`); needs beams.
        image_guidance: above 1, what the picture makes likelier than a blank one does counts for more
            (arXiv:2207.12598); it takes twice the work. Reported log-probabilities are then the guided ones.
        generator: source of randomness for sampling.

    Returns:
        For each row its texts, best first (samples: in the order drawn).

    Raises:
        ValueError: for numbers that make no sense, alone or together.
    """
    _check(
        captioner,
        batch,
        max_new_tokens,
        num_beams,
        num_return_sequences,
        do_sample,
        temperature,
        top_k,
        top_p,
    )
    _check_beams(num_beams, num_beam_groups, diversity_penalty, length_offset, required, max_new_tokens)
    model = _guided(captioner, image_guidance)
    rules = Rules(eos_id, min_new_tokens, repetition_penalty, no_repeat_ngram)
    training = captioner.training
    captioner.eval()
    try:
        if num_beams == 1:
            drawing = Drawing(temperature, top_k, top_p, generator) if do_sample else None
            return sample(model, batch, rules, max_new_tokens, num_return_sequences, drawing)
        divide = LengthPenalty(length_penalty, length_offset)
        size = num_beams // num_beam_groups
        new = (batch.tokens.shape[0], size, max_new_tokens, rules, divide, batch.tokens.device)
        if required:
            return required_words(
                model, batch, rules, max_new_tokens, ConstrainedBeams(*new, required), num_return_sequences
            )
        groups = [Beams(*new) for _ in range(num_beam_groups)]
        return beam_search(
            model, batch, rules, max_new_tokens, groups, num_return_sequences, diversity_penalty
        )
    finally:
        captioner.train(training)


@torch.inference_mode()
def stream(
    captioner: GenerativeModel[Batch],
    batch: Batch,
    *,
    eos_id: int,
    max_new_tokens: int = 40,
    min_new_tokens: int = 0,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    no_repeat_ngram: int = 0,
    image_guidance: float = 1.0,
    generator: torch.Generator | None = None,
) -> Iterator[list[int | None]]:
    """Yields tokens while they are written: what `generate` would give with the same arguments, a step at a time.

    Args:
        captioner: the model; evaluation mode is set until the last token, or until the iterator is closed.
        batch: pictures (or source texts) and prompts; prompts are padded on the left.
        eos_id: see `generate`, as all that follow.
        max_new_tokens: see `generate`.
        min_new_tokens: see `generate`.
        do_sample: see `generate`.
        temperature: see `generate`.
        top_k: see `generate`.
        top_p: see `generate`.
        repetition_penalty: see `generate`.
        no_repeat_ngram: see `generate`.
        image_guidance: see `generate`.
        generator: see `generate`.

    Yields:
        The new id of each row; None where its text has ended.

    Raises:
        ValueError: for numbers that make no sense.
    """
    _check(captioner, batch, max_new_tokens, 1, 1, do_sample, temperature, top_k, top_p)
    rules = Rules(eos_id, min_new_tokens, repetition_penalty, no_repeat_ngram)
    drawing = Drawing(temperature, top_k, top_p, generator) if do_sample else None
    training, ended = captioner.training, [False] * batch.tokens.shape[0]
    captioner.eval()
    try:
        model = _guided(captioner, image_guidance)
        for tokens, _ in walk(model, batch, rules, max_new_tokens, 1, drawing):
            ids = tokens.tolist()
            ended = [was or token == eos_id for was, token in zip(ended, ids, strict=True)]
            yield [None if end else token for end, token in zip(ended, ids, strict=True)]
            if all(ended):
                return
    finally:
        captioner.train(training)


def _guided(captioner: GenerativeModel[Batch], scale: float) -> GenerativeModel[Batch]:
    if scale == 1.0:
        return captioner
    if scale < 0:
        raise ValueError(f"image_guidance must not be below 0, not {scale}")
    if not isinstance(captioner, Captioner):
        raise ValueError(
            f"image_guidance is for captioners, and a {type(captioner).__name__} sees no picture"
        )
    return Guided(captioner, scale)  # pyright: ignore[reportReturnType]  # Its batches are a captioner's.


def _check(
    model: GenerativeModel[Batch],
    batch: Batch,
    max_new_tokens: int,
    num_beams: int,
    num_return_sequences: int,
    do_sample: bool,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    prompt = batch.tokens.shape[1]
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if prompt + max_new_tokens > model.max_len:
        raise ValueError(
            f"a prompt of {prompt} and {max_new_tokens} new tokens are more than the {model.max_len} that the "
            f"captioner reads; at most {model.max_len - prompt} new tokens fit"
        )
    if num_beams < 1 or num_return_sequences < 1:
        raise ValueError(
            f"num_beams ({num_beams}) and num_return ({num_return_sequences}) must be at least 1"
        )
    if num_beams > 1 and do_sample:
        raise ValueError(f"beam search (num_beams={num_beams}) does not draw: do_sample needs num_beams=1")
    if num_beams > 1 and num_return_sequences > num_beams:
        raise ValueError(f"num_return ({num_return_sequences}) cannot exceed num_beams ({num_beams})")
    if num_beams == 1 and not do_sample and num_return_sequences > 1:
        raise ValueError(
            f"greedy search gives one text, not {num_return_sequences}: use do_sample or num_beams"
        )
    if temperature <= 0:
        raise ValueError(
            f"temperature must be above 0, not {temperature}; for the likeliest token use do_sample=False"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], not {top_p}")


def _check_beams(
    num_beams: int,
    num_beam_groups: int,
    diversity_penalty: float,
    length_offset: float,
    required: Sequence[Word],
    max_new_tokens: int,
) -> None:
    if length_offset < 0:
        raise ValueError(f"length_offset must not be below 0, not {length_offset}")
    if num_beam_groups < 1 or num_beams % num_beam_groups:
        raise ValueError(f"num_beams ({num_beams}) must be a multiple of num_beam_groups ({num_beam_groups})")
    if diversity_penalty < 0 or (diversity_penalty and num_beam_groups == 1):
        raise ValueError(
            f"diversity_penalty ({diversity_penalty}) must not be below 0, and needs num_beam_groups above 1"
        )
    if not required:
        return
    if num_beams == 1 or num_beam_groups > 1:
        raise ValueError(
            f"required words need beams in one group: num_beams is {num_beams}, num_beam_groups {num_beam_groups}"
        )
    if any(not word or any(not ids for ids in word) for word in required):
        raise ValueError("a required word has no token: give at least one spelling, of at least one token")
    if (least := sum(min(map(len, word)) for word in required)) > max_new_tokens:
        raise ValueError(
            f"the required words have {least} tokens, more than max_new_tokens ({max_new_tokens})"
        )
