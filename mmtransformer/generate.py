"""generate(): texts from any captioner or encoder-decoder, by greedy search, sampling or beam search.

Letters: n rows of prompts, s beams (or samples) of a row, t new tokens, v vocabulary.
"""

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from mmtransformer.captioner import State

_IMPOSSIBLE = (
    -1e9
)  # Finite, so that sums and comparisons of impossible candidates stay ordered and free of NaN.


class Prompts(Protocol):
    """What `generate` reads of a batch; the model reads the rest (pictures, source texts)."""

    tokens: Tensor
    """(n q) long, padded on the left."""
    valid: Tensor
    """(n q) bool, True = a real token."""


Batch = TypeVar("Batch", bound=Prompts, contravariant=True)


class Writer(Protocol[Batch]):
    """What `generate` needs of a model: every `Captioner` has it, and so has the 2017 `Transformer`."""

    training: bool

    @property
    def max_len(self) -> int:
        """Most text tokens of a row, prompt included."""
        ...

    def start(self, batch: Batch, *, copies: int = 1, max_new_tokens: int = 40) -> tuple[Tensor, State]:
        """See `Captioner.start`."""
        ...

    def step(self, tokens: Tensor, state: Any) -> Tensor:
        """See `Captioner.step`."""
        ...

    def eval(self) -> Any:
        """Evaluation mode."""
        ...

    def train(self, mode: bool = True) -> Any:
        """Training mode."""
        ...


@dataclass(frozen=True)
class Generated:
    """One text that was generated.

    Attributes:
        tokens: its ids, without the prompt and the end-of-sequence.
        log_prob: log-probability of the whole text under the model, natural log, the end-of-sequence included.
        token_log_probs: that of each token of `tokens`.
        finished: whether the model ended it; False = cut at `max_new_tokens`.
    """

    tokens: list[int]
    log_prob: float
    token_log_probs: list[float]
    finished: bool


@dataclass(frozen=True)
class Rules:
    """What is done to the scores of the next token before one is chosen; the names and effects are transformers'.

    Attributes:
        eos_id: the id that ends a text.
        min_new_tokens: no end before so many tokens.
        repetition_penalty: above 1, tokens of prompt and text get less likely (CTRL, arXiv:1909.05858).
        no_repeat_ngram: no n-gram of this length comes twice; 0 = they may.
    """

    eos_id: int
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0

    def apply(self, scores: Tensor, history: Tensor, known: Tensor, new_tokens: int) -> Tensor:
        """Changed scores (m v), for rows whose prompt and text are `history` (m t) where `known` (m t) is True."""
        if self.repetition_penalty != 1.0:
            used = (
                torch.zeros_like(scores, dtype=torch.int8)
                .scatter_add_(1, history, known.to(torch.int8))
                .bool()
            )
            penalised = torch.where(
                scores < 0, scores * self.repetition_penalty, scores / self.repetition_penalty
            )
            scores = torch.where(used, penalised, scores)
        size = self.no_repeat_ngram
        if size and history.shape[1] >= size:
            grams, real = history.unfold(1, size, 1), known.unfold(1, size, 1).all(-1)
            last = history[:, history.shape[1] - size + 1 :]
            repeats = (grams[..., :-1] == last[:, None]).all(-1) & real
            banned = torch.zeros_like(scores, dtype=torch.int8).scatter_add_(
                1, grams[..., -1], repeats.to(torch.int8)
            )
            scores = scores.masked_fill(banned.bool(), float("-inf"))
        if new_tokens < self.min_new_tokens:
            scores = scores.index_fill(1, torch.tensor([self.eos_id], device=scores.device), float("-inf"))
        return scores


@torch.inference_mode()
def generate(
    captioner: Writer[Batch],
    batch: Batch,
    *,
    eos_id: int,
    max_new_tokens: int = 40,
    min_new_tokens: int = 0,
    num_beams: int = 1,
    num_return: int = 1,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    no_repeat_ngram: int = 0,
    length_penalty: float = 1.0,
    length_offset: float = 0.0,
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
        num_return: texts a row: samples, or the best of the beams.
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
        generator: source of randomness for sampling.

    Returns:
        For each row its texts, best first (samples: in the order drawn).

    Raises:
        ValueError: for numbers that make no sense, alone or together.
    """
    _check(captioner, batch, max_new_tokens, num_beams, num_return, do_sample, temperature, top_k, top_p)
    if length_offset < 0:
        raise ValueError(f"length_offset must not be below 0, not {length_offset}")
    rules = Rules(eos_id, min_new_tokens, repetition_penalty, no_repeat_ngram)
    training = captioner.training
    captioner.eval()
    try:
        if num_beams > 1:
            divide = _LengthPenalty(length_penalty, length_offset)
            return _beam_search(captioner, batch, rules, max_new_tokens, num_beams, num_return, divide)
        drawing = _Drawing(temperature, top_k, top_p, generator) if do_sample else None
        return _sample(captioner, batch, rules, max_new_tokens, num_return, drawing)
    finally:
        captioner.train(training)


def _check(
    captioner: Writer[Batch],
    batch: Batch,
    max_new_tokens: int,
    num_beams: int,
    num_return: int,
    do_sample: bool,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    prompt = batch.tokens.shape[1]
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if prompt + max_new_tokens > captioner.max_len:
        raise ValueError(
            f"a prompt of {prompt} and {max_new_tokens} new tokens are more than the {captioner.max_len} that the "
            f"captioner reads; at most {captioner.max_len - prompt} new tokens fit"
        )
    if num_beams < 1 or num_return < 1:
        raise ValueError(f"num_beams ({num_beams}) and num_return ({num_return}) must be at least 1")
    if num_beams > 1 and do_sample:
        raise ValueError(f"beam search (num_beams={num_beams}) does not draw: do_sample needs num_beams=1")
    if num_beams > 1 and num_return > num_beams:
        raise ValueError(f"num_return ({num_return}) cannot exceed num_beams ({num_beams})")
    if num_beams == 1 and not do_sample and num_return > 1:
        raise ValueError(f"greedy search gives one text, not {num_return}: use do_sample or num_beams")
    if temperature <= 0:
        raise ValueError(
            f"temperature must be above 0, not {temperature}; for the likeliest token use do_sample=False"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], not {top_p}")


@dataclass(frozen=True)
class _LengthPenalty:
    power: float
    offset: float

    def __call__(self, log_probs: Tensor, tokens: int) -> Tensor:
        return log_probs / ((self.offset + tokens) / (self.offset + 1)) ** self.power


@dataclass(frozen=True)
class _Drawing:
    temperature: float
    top_k: int | None
    top_p: float | None
    generator: torch.Generator | None

    def draw(self, scores: Tensor) -> Tensor:
        """One id a row, (m v) -> (m)."""
        scores = scores / self.temperature
        if self.top_k is not None and self.top_k < scores.shape[1]:
            least = scores.topk(self.top_k, dim=1).values[:, -1:]
            scores = scores.masked_fill(scores < least, float("-inf"))
        if self.top_p is not None and self.top_p < 1:
            ordered, order = scores.sort(dim=1, descending=True)
            before = ordered.softmax(1).cumsum(1) - ordered.softmax(1)
            dropped = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before >= self.top_p)
            scores = scores.masked_fill(dropped, float("-inf"))
        return torch.multinomial(scores.softmax(1), 1, generator=self.generator)[:, 0]


def _sample(
    captioner: Writer[Batch],
    batch: Batch,
    rules: Rules,
    max_new_tokens: int,
    copies: int,
    drawing: _Drawing | None,
) -> list[list[Generated]]:
    logits, state = captioner.start(batch, copies=copies, max_new_tokens=max_new_tokens)
    history = batch.tokens.repeat_interleave(copies, 0)
    known = batch.valid.repeat_interleave(copies, 0)
    prompt = history.shape[1]
    rows = history.shape[0]
    done = torch.zeros(rows, dtype=torch.bool, device=history.device)
    log_probs: list[Tensor] = []
    for step in range(max_new_tokens):
        scores = rules.apply(logits.float(), history, known, step)
        tokens = scores.argmax(1) if drawing is None else drawing.draw(scores)
        tokens = tokens.masked_fill(done, rules.eos_id)
        log_probs.append(logits.float().log_softmax(1).gather(1, tokens[:, None])[:, 0])
        history = torch.cat((history, tokens[:, None]), 1)
        known = torch.cat((known, ~done[:, None]), 1)
        done = done | (tokens == rules.eos_id)
        if step + 1 == max_new_tokens or bool(done.all()):
            break
        logits = captioner.step(tokens, state)
    new, scored = history[:, prompt:].tolist(), torch.stack(log_probs, 1).tolist()
    texts = [_text(ids, scores, rules.eos_id) for ids, scores in zip(new, scored, strict=True)]
    return [texts[i : i + copies] for i in range(0, rows, copies)]


def _text(ids: list[int], scores: list[float], eos_id: int) -> Generated:
    finished = eos_id in ids
    length = ids.index(eos_id) if finished else len(ids)
    return Generated(ids[:length], sum(scores[: length + finished]), scores[:length], finished)


def _beam_search(
    captioner: Writer[Batch],
    batch: Batch,
    rules: Rules,
    max_new_tokens: int,
    beams: int,
    num_return: int,
    divide: _LengthPenalty,
) -> list[list[Generated]]:
    """Beam search over all rows at once; transformers' rules of what is a finished beam and when a row is done."""
    n, prompt = batch.tokens.shape
    logits, state = captioner.start(batch, copies=beams, max_new_tokens=max_new_tokens)
    device, vocab = logits.device, logits.shape[1]
    known = batch.valid.repeat_interleave(beams, 0)
    history = batch.tokens.repeat_interleave(beams, 0)
    spoken = torch.zeros(n, beams, 0, device=device)  # log-probability of each new token
    running = torch.full((n, beams), _IMPOSSIBLE, device=device)
    running[:, 0] = 0.0
    best = torch.full((n, beams), _IMPOSSIBLE, device=device)  # normalised scores of finished texts
    best_ids = torch.full((n, beams, max_new_tokens), rules.eos_id, dtype=torch.long, device=device)
    best_spoken = torch.zeros(n, beams, max_new_tokens, device=device)
    done = torch.zeros(n, 1, dtype=torch.bool, device=device)
    first_row = torch.arange(n, device=device)[:, None] * beams
    width = min(2 * beams, beams * vocab)
    for step in range(max_new_tokens):
        raw = logits.float().log_softmax(1)
        scores = rules.apply(raw, history, known, step).view(n, beams, vocab)
        total, where = (running[..., None] + scores).view(n, beams * vocab).topk(width, dim=1)
        beam, token = where // vocab, where % vocab
        ids = torch.cat(
            (history.view(n, beams, -1).gather(1, _like(beam, history.shape[1])), token[..., None]), 2
        )
        said = raw.view(n, beams * vocab).gather(1, where)
        said = torch.cat((spoken.gather(1, _like(beam, step)), said[..., None]), 2)

        ends = token == rules.eos_id
        last = step + 1 == max_new_tokens
        complete = ends | last
        complete[:, beams:] = False  # Only a candidate that would have stayed in the beam may finish.
        ended = divide(total, step + 1).masked_fill(~complete | done, _IMPOSSIBLE)
        best, pick = torch.cat((best, ended), 1).topk(beams, dim=1)
        new_ids = best_ids.new_full((n, width, max_new_tokens), rules.eos_id)
        new_ids[..., : step + 1] = ids[..., prompt:]
        new_spoken = best_spoken.new_zeros(n, width, max_new_tokens)
        new_spoken[..., : step + 1] = said
        best_ids = torch.cat((best_ids, new_ids), 1).gather(1, _like(pick, max_new_tokens))
        best_spoken = torch.cat((best_spoken, new_spoken), 1).gather(1, _like(pick, max_new_tokens))

        running, keep = total.masked_fill(ends, _IMPOSSIBLE).topk(beams, dim=1)
        hope = divide(running[:, :1], step + 1)
        done = done | ((best[:, -1:] > _IMPOSSIBLE / 2) & (best[:, -1:] >= hope))
        if last or bool(done.all()):
            break
        history = ids.gather(1, _like(keep, ids.shape[2])).view(n * beams, -1)
        spoken = said.gather(1, _like(keep, step + 1))
        source = (first_row + beam.gather(1, keep)).view(-1)
        known = torch.cat((known, torch.ones_like(known[:, :1])), 1)
        state.reorder(source)
        logits = captioner.step(history[:, -1], state)
    ids, said, found = best_ids.tolist(), best_spoken.tolist(), (best > _IMPOSSIBLE / 2).tolist()
    return [
        [_text(ids[row][k], said[row][k], rules.eos_id) for k in range(num_return) if found[row][k]]
        for row in range(n)
    ]


def _like(index: Tensor, width: int) -> Tensor:
    return index[..., None].expand(-1, -1, width)
