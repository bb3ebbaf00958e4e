"""Captions of any number of pictures: loaded beside computing, batch by batch, on one device or several."""

import dataclasses
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from itertools import islice
from typing import Any, Protocol, TypeVar

import torch
from PIL.Image import Image

from mmtransformer.batch import CaptionBatch
from mmtransformer.captioners.base import Captioner
from mmtransformer.generation.captions import CaptionResult, PromptBuilder, write_captions
from mmtransformer.generation.config import GenerationConfig
from mmtransformer.images import ImageError, ImageTransform
from mmtransformer.pipelines.base import check_cores, check_count, fast_autocast
from mmtransformer.serialization.model_kinds import imported_modules
from mmtransformer.serialization.pretrained import Pretrained, import_again
from mmtransformer.text.tokenizer import Tokenizer

T = TypeVar("T")
R = TypeVar("R")
P = TypeVar("P")
Said = list[list[CaptionResult]]
"""Of one picture: for each language its captions, best first."""

_MOST_THREADS = 8  # that load pictures; each has one of them decoded in memory
_CHUNK = 4  # batches that a process of several is given at once


class Model(Protocol):
    """What is asked of an `ImageCaptioner`."""

    device: torch.device
    tokenizer: Tokenizer
    transform: ImageTransform
    generation: GenerationConfig

    def inference_model(self) -> Captioner:
        """The model as it captions."""
        ...

    def prepare(self, image: Image) -> Any:
        """What a picture is before it is in a batch."""
        ...

    def batch_of(self, prepared: Sequence[Any]) -> CaptionBatch:
        """A batch without texts."""
        ...

    def prompt_builder(
        self, prompt: Sequence[str | None] | None = None, given: PromptBuilder | None = None
    ) -> PromptBuilder | None:
        """What makes the prompts."""
        ...

    def language(self, language: str | None) -> str | None:
        """The language to caption in, or a ValueError."""
        ...


class Images(Protocol):
    """Pictures by index: `ImageFiles`, or a split of pairs."""

    def __len__(self) -> int:
        """The number of pictures."""
        ...

    def name(self, i: int) -> str:
        """The name of picture i."""
        ...

    def image(self, i: int) -> Image:
        """Picture i as RGB, or an ImageError."""
        ...


def default_threads() -> int:
    """Threads that load pictures, unless told: as many as there are cores, 8 at most."""
    return min(_MOST_THREADS, os.cpu_count() or 1)


def load_ahead(make: Callable[[T], R], things: Iterable[T], *, threads: int, ahead: int) -> Iterator[R]:
    """What is made of each thing, in their order, made by threads while the last ones are used.

    Args:
        make: Makes it; what it raises is raised in its place.
        things: May be without end: `ahead` of them at most are taken before they are asked for.
        threads: How many make.
        ahead: How many may be waiting.
    """
    things, waiting = iter(things), deque[Future[R]]()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="load")
    try:
        while True:
            waiting.extend(pool.submit(make, thing) for thing in islice(things, ahead - len(waiting)))
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def caption_all(
    model: Model,
    things: Iterable[T],
    load: Callable[[T], Image],
    languages: Sequence[str | None],
    *,
    generation: GenerationConfig,
    prompt_builder: PromptBuilder | None = None,
    words: Callable[[T], str | None] | None = None,
    batch_size: int = 16,
    threads: int | None = None,
) -> Iterator[tuple[T, Said | ImageError]]:
    """Captions whatever pictures are loaded from, by the batch, and yields in order.

    Args:
        model: The model.
        things: What pictures are loaded from.
        load: Loads one.
        languages: The languages to caption in.
        generation: How to search.
        prompt_builder: Makes the prompts; None makes plain ones.
        words: What each picture is captioned after, such as a question; None = the model's own prompt.
        batch_size: Pictures at once.
        threads: Threads that load; as many as there are cores, 8 at most, unless told.

    Yields:
        Each thing with its captions, or with what is wrong with its picture.

    Raises:
        ValueError: if no batch could be made.
    """

    def caption(some: Sequence[tuple[T, Any]]) -> list[Said]:
        asked = None if words is None else [words(thing) for thing, _ in some]
        return _captions(model, [x for _, x in some], asked, languages, generation, prompt_builder)

    return by_batches(things, lambda thing: model.prepare(load(thing)), caption, batch_size=batch_size, threads=threads)


def by_batches(
    things: Iterable[T],
    prepare: Callable[[T], P],
    compute: Callable[[Sequence[tuple[T, P]]], Iterable[R]],
    *,
    batch_size: int,
    threads: int | None = None,
) -> Iterator[tuple[T, R | ImageError]]:
    """Computes whatever pictures are loaded from, by the batch, and yields in order.

    Args:
        things: What pictures are loaded from.
        prepare: Loads one, as it goes into a batch; in threads, beside the computing.
        compute: Gives one result for each of a batch.
        batch_size: Pictures at once.
        threads: Threads that load; as many as there are cores, 8 at most, unless told.

    Yields:
        Each thing with its result, or with what is wrong with its picture.
    """
    check_count("batch_size", batch_size)
    threads = threads or default_threads()

    def prepared(thing: T) -> tuple[T, P | ImageError]:
        try:
            return thing, prepare(thing)
        except ImageError as error:
            return thing, error

    waiting: list[tuple[T, P | ImageError]] = []
    for pair in load_ahead(prepared, things, threads=threads, ahead=2 * batch_size + threads):
        waiting.append(pair)
        if sum(not isinstance(x, ImageError) for _, x in waiting) == batch_size:
            yield from _computed(waiting, compute)
            waiting = []
    yield from _computed(waiting, compute)


def _computed(
    waiting: Sequence[tuple[T, P | ImageError]], compute: Callable[[Sequence[tuple[T, P]]], Iterable[R]]
) -> Iterator[tuple[T, R | ImageError]]:
    good = [(thing, x) for thing, x in waiting if not isinstance(x, ImageError)]
    results = iter(compute(good) if good else ())
    yield from ((thing, x if isinstance(x, ImageError) else next(results)) for thing, x in waiting)


@torch.inference_mode()
def _captions(
    model: Model,
    prepared: Sequence[Any],
    words: Sequence[str | None] | None,
    languages: Sequence[str | None],
    generation: GenerationConfig,
    prompt_builder: PromptBuilder | None,
) -> list[Said]:
    with fast_autocast(model.device):
        batch, made = model.batch_of(prepared), model.prompt_builder(words, prompt_builder)
        return write_captions(
            model.inference_model(), model.tokenizer, batch, languages, generation=generation, prompt_builder=made
        )


@dataclass(frozen=True)
class CaptionJob:
    """A model's captions of pictures by index, for this process or several.

    Args:
        start: Makes model and prompts on a device; a function that can be pickled, for several devices.
        images: The pictures.
        languages: Of the captions; None is the first that the model knows.
        changes: Settings of the search (`GenerationConfig.updated`).
        batch_size: Pictures at once.
        threads: Threads of a process that load pictures; see `caption_all`.
        questions: What is asked of pictures, by index; the others are captioned.
    """

    start: Callable[[str | None], tuple[Model, PromptBuilder | None]]
    images: Images
    languages: Sequence[str | None] | None = None
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    batch_size: int = 16
    threads: int | None = None
    questions: Mapping[int, str] = dataclasses.field(default_factory=dict)

    def here(
        self, model: Model, prompt_builder: PromptBuilder | None, indices: Iterable[int]
    ) -> Iterator[tuple[int, Said | ImageError]]:
        """Captions by a model in this process, in the order of the indices."""
        languages = [model.language(None)] if self.languages is None else self.languages
        for code in languages:
            model.language(code)
        return caption_all(
            model,
            indices,
            self.images.image,
            languages,
            generation=model.generation.updated(**self.changes),
            prompt_builder=prompt_builder,
            words=self.questions.get if self.questions else None,
            batch_size=self.batch_size,
            threads=self.threads,
        )

    def on(self, devices: Sequence[str], indices: Sequence[int]) -> Iterator[tuple[int, Said | ImageError]]:
        """Captions by one process a device, each with the model whole, in the order of the indices.

        Raises:
            ValueError: If a process dies (as for want of memory), or the model cannot be had.
        """
        size = _CHUNK * self.batch_size
        chunks = iter([indices[at : at + size] for at in range(0, len(indices), size)])
        context = multiprocessing.get_context("spawn")  # CUDA cannot be used in forked processes
        free = context.SimpleQueue()
        for i, device in enumerate(devices):
            free.put((device, i == 0))
        cores = max(1, torch.get_num_threads() // len(devices))
        given = (imported_modules(Pretrained), self, free, cores)
        pool = ProcessPoolExecutor(len(devices), context, initializer=_begin, initargs=given)
        waiting = deque[Future[list[tuple[int, Said | ImageError]]]]()
        try:
            while True:
                more = islice(chunks, 2 * len(devices) - len(waiting))
                with _deaf():
                    waiting.extend(pool.submit(_some, chunk) for chunk in more)
                if not waiting:
                    return
                yield from waiting.popleft().result()
        except BrokenProcessPool as error:
            raise ValueError(
                f"a process of {len(devices)} ended before its captions were written; it says why above, or ran out of "
                f"memory: take fewer --devices, or a smaller --batch-size"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _deaf() -> Iterator[None]:
    """Where processes are begun that Ctrl+C does not reach: it is this one's to end them, without a word of theirs."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_mine: dict[str, Any] = {}
"""What a process of several holds."""


def _begin(modules: Sequence[str], job: CaptionJob, free: Any, cores: int) -> None:
    import_again(modules)
    device, speaks = free.get()
    if device == "cpu":
        torch.set_num_threads(cores)
    with nullcontext() if speaks else redirect_stderr(StringIO()):  # what is said of the model is said once
        model, prompt_builder = job.start(device)
    _mine.update(job=dataclasses.replace(job, threads=job.threads or cores), model=model, prompt_builder=prompt_builder)


def _some(indices: Sequence[int]) -> list[tuple[int, Said | ImageError]]:
    return list(_mine["job"].here(_mine["model"], _mine["prompt_builder"], indices))


def devices_of(device: str | None, count: int) -> list[str | None]:
    """The devices of so many processes: GPUs in their order, or the CPU for all.

    Raises:
        ValueError: If there are not so many.
    """
    if count < 1:
        raise ValueError(f"--devices must be at least 1, not {count}")
    if count == 1:
        return [device]
    kind = torch.device(device).type if device else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and (there := torch.cuda.device_count()) < count:
        raise ValueError(f"--devices {count}: there {'is' if there == 1 else 'are'} {there} GPU{'s' * (there != 1)}")
    if kind == "cpu":
        check_cores("--devices", count)
    return [f"cuda:{i}" for i in range(count)] if kind == "cuda" else [kind] * count
