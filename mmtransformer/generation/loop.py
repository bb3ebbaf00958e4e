"""generate() and stream(): texts from any model with prefill and decode_step, by greedy search, sampling or beams."""

from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from mmtransformer.batch.captions import check_texts
from mmtransformer.captioners.base import Captioner
from mmtransformer.generation.base import BatchT, GenerationResult, GenerativeModel, Search
from mmtransformer.generation.beam_search import Beams, BeamSearch
from mmtransformer.generation.config import GenerationConfig
from mmtransformer.generation.constrained import ConstrainedBeams
from mmtransformer.generation.forced_words import ForcedWords, Word
from mmtransformer.generation.guidance import Guided
from mmtransformer.generation.sampling import Sampler
from mmtransformer.layers.modes import evaluation_mode

LOOK_EVERY = {"cpu": 1}
"""Steps after which it is looked whether all texts have ended: 8 elsewhere, where every look waits for the device."""


@torch.inference_mode()
def generate(
    model: GenerativeModel[BatchT],
    batch: BatchT,
    config: GenerationConfig | None = None,
    *,
    eos_id: int | Sequence[int],
    force_words_ids: ForcedWords | Sequence[Word] = (),
    row_seeds: Sequence[int] | None = None,
    num_tokens: int | None = None,
    **changes: Any,
) -> list[list[GenerationResult]]:
    """Continues each row's prompt. Names, defaults and results follow transformers' `generate`.

    Pictures are encoded once, their keys and values projected once, and shared by all beams and samples.

    Args:
        model: the model; it is in evaluation mode for the call.
        batch: pictures (or source texts) and prompts; prompts are padded on the left.
        config: how to search; greedily unless told.
        eos_id: the id that ends a text, or several.
        force_words_ids: words that must come, each as the ways to spell it in tokens; needs beams.
        row_seeds: a number for each row that its noise comes from, besides `seed` and the number of the sample, where
            tokens are drawn; a checksum of its pictures (or source text) and its prompt unless told.
        num_tokens: ids that the tokenizer has, where the model scores more of them (a padded vocabulary): the others
            are never written. None = all are.
        changes: settings of `GenerationConfig`, in place of those of `config`.

    Returns:
        For each row its texts, best first (samples: in the order drawn).

    Raises:
        ValueError: for numbers that make no sense, alone or together, or with this model and batch.
    """
    c = GenerationConfig() if config is None else config
    c = c.changed(**changes) if changes else c
    forced = force_words_ids if isinstance(force_words_ids, ForcedWords) else ForcedWords(force_words_ids)
    eos_ids = torch.tensor(check(c, model, batch, eos_id, forced.words), device=batch.tokens.device)
    num_tokens = None if num_tokens == model.vocab_size else num_tokens
    if not len(batch.tokens):
        return []
    search: Search
    if c.num_beams == 1:
        search = Sampler(batch, c, eos_ids, row_seeds, num_tokens)
    else:
        n, size = len(batch.tokens), c.num_beams // c.num_beam_groups
        if forced.words:
            groups: list[Beams] = [ConstrainedBeams(n, size, c, eos_ids, forced)]
        else:
            groups = [Beams(n, size, c, eos_ids) for _ in range(c.num_beam_groups)]
        search = BeamSearch(batch, c, eos_ids, groups, num_tokens)
    for _ in decode_loop(model, batch, c, search):
        pass
    return search.texts()


@torch.inference_mode()
def stream(
    model: GenerativeModel[BatchT],
    batch: BatchT,
    config: GenerationConfig | None = None,
    *,
    eos_id: int | Sequence[int],
    row_seeds: Sequence[int] | None = None,
    num_tokens: int | None = None,
    **changes: Any,
) -> Iterator[list[int | None]]:
    """Yields tokens while they are written: what `generate` would give with the same arguments, a step at a time.

    Args:
        model: the model; it is in evaluation mode until the last token, or until the iterator is closed.
        batch: pictures (or source texts) and prompts; prompts are padded on the left.
        config: how to search, without beams; greedily unless told.
        eos_id: the id that ends a text, or several.
        row_seeds: see `generate`.
        num_tokens: see `generate`.
        changes: settings of `GenerationConfig`, in place of those of `config`.

    Yields:
        The new id of each row; None where its text has ended.

    Raises:
        ValueError: as `generate`; and for several beams or texts, of which no token is sure before the end.
    """
    c = GenerationConfig() if config is None else config
    c = c.changed(**changes) if changes else c
    ends = check(c, model, batch, eos_id)
    num_tokens = None if num_tokens == model.vocab_size else num_tokens
    if c.num_beams > 1 or c.num_return_sequences > 1:
        raise ValueError(
            f"a stream is one text, without beams: num_beams is {c.num_beams}, num_return_sequences "
            f"{c.num_return_sequences}"
        )
    eos_ids = torch.tensor(ends, device=batch.tokens.device)
    search = Sampler(batch, c, eos_ids, row_seeds, num_tokens)
    for tokens in decode_loop(model, batch, c, search):
        yield [None if end else token for end, token in zip(search.done.tolist(), tokens.tolist(), strict=True)]
        if search.done.all():
            return


def decode_loop(
    model: GenerativeModel[BatchT], batch: BatchT, config: GenerationConfig, search: Search
) -> Iterator[Tensor]:
    """Yields the tokens of every step (m), until all texts have ended or `max_new_tokens` are written.

    Raises:
        ValueError: if the model's scores are no numbers.
    """
    writer: Any = model
    if config.guidance_scale != 1.0:
        writer = Guided(writer, config.guidance_scale)
    new, every = config.max_new_tokens, LOOK_EVERY.get(batch.tokens.device.type, 8)
    with evaluation_mode(model):  # pyright: ignore[reportArgumentType]  # it has `modules`, like a Module
        try:
            logits, state = writer.prefill(batch, expand_size=search.expand_size, max_new_tokens=new)
        except IndexError as error:
            if batch.tokens.shape[1]:
                raise
            raise ValueError(
                f"a {type(model).__name__} goes on from one token at least, and prompts have none"
            ) from error
        if logits.numel() and not (best := logits.amax()).isfinite():
            raise ValueError(
                f"the model scores its first tokens with {best.item()}: its weights are damaged, or its numbers too "
                "large for this precision; float32 holds the largest"
            )
        for step in range(new):
            rows, tokens = search.advance(logits, step)
            yield tokens
            if step + 1 == new or ((step + 1) % every == 0 and bool(search.done.all())):
                return
            if rows is not None:
                state.reorder(rows)
            logits = writer.decode_step(tokens, state)


def check(
    config: GenerationConfig,
    model: GenerativeModel[BatchT],
    batch: BatchT,
    eos_id: int | Sequence[int],
    force_words_ids: Sequence[Word] = (),
) -> list[int]:
    """Refuses settings that make no sense with a model and a batch; gives the ids that end a text.

    Raises:
        TypeError: of a batch or settings of another kind.
        ValueError: naming the setting.
    """
    if not hasattr(batch, "tokens"):
        what = "tensor" if isinstance(batch, Tensor) else type(batch).__name__
        raise TypeError(
            "generate reads a batch, such as CaptionBatch(tokens, attention_mask, loss_mask, pixels) or, of a language "
            f"model, mmtransformer.backbones.base.PromptBatch(tokens, attention_mask), not a {what}"
        )
    if not hasattr(model, "prefill"):
        raise TypeError(
            f"generate writes with a captioner or a language model, and a {type(model).__name__} is neither"
        )
    if not isinstance(config, GenerationConfig):
        raise TypeError(f"config is a GenerationConfig, not a {type(config).__name__}: pictures travel in the batch")
    if isinstance(eos_id, Tensor):
        eos_id = eos_id.flatten().tolist()
    ends: list[Any] = [*eos_id] if isinstance(eos_id, Sequence) and not isinstance(eos_id, str) else [eos_id]
    if not all(isinstance(i, Integral) and not isinstance(i, bool) for i in ends):
        raise ValueError(f"eos_id must be an id or several, not {eos_id!r:.80}")
    check_texts(batch)
    prompt, new = batch.tokens.shape[1], config.max_new_tokens
    if prompt + new > model.max_len:
        left = model.max_len - prompt
        raise ValueError(
            f"a prompt of {prompt} and max_new_tokens ({new}) are more than the {model.max_len} tokens that the model "
            f"reads; {f'at most {left} new tokens fit' if left > 0 else 'shorten the prompt'}"
        )
    real = batch.attention_mask
    if bool((ends_early := (real[:, :-1] & ~real[:, 1:]).any(1)).any()):
        raise ValueError(
            f"row {int(ends_early.nonzero()[0])} of the prompts has padding behind its tokens: what is to be continued "
            'ends with a token, so prompts are padded on the left (padding_side="left" in transformers)'
        )
    if not ends or not all(0 <= i < model.vocab_size for i in ends):
        raise ValueError(f"eos_id {ends} is not in the model's vocabulary, 0 to {model.vocab_size - 1}")
    if config.guidance_scale != 1 and not isinstance(model, Captioner):
        raise ValueError(f"guidance_scale is for captioners, and a {type(model).__name__} sees no picture")
    if config.force_words and not force_words_ids:
        raise ValueError("force_words are text, and only a tokenizer knows their ids: give force_words_ids")
    if not force_words_ids:
        return ends
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
    return ends
