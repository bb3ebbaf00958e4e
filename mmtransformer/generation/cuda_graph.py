"""Captured: a model whose decoding step is recorded once and then played, so that a token costs kernels and no Python.

    model = Captured(captioner)                     # a CUDA graph: on a GPU
    texts = generate(model, batch, eos_id=2)        # as ever

Caches have their full length from the start, masks hide what is not yet written, and every tensor stays where it is:
so all steps are the same operations on the same memory. The recording is kept for later batches of the same shapes.

Letters: m rows of text, v vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import Any, Generic

import torch
from torch import Tensor

from mmtransformer.backbones.base import DecoderState
from mmtransformer.captioners.base import State
from mmtransformer.generation.logits_processors import Batch, GenerativeModel

Step = Callable[[], Tensor]
"""Reads tokens from a fixed place and gives logits (m v)."""


def cuda_graph(step: Step) -> Step:
    """Records a step as one CUDA graph; its logits come in the same memory every time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # Libraries make their workspaces in a first call, which a graph could not hold.
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()

    def play() -> Tensor:
        graph.replay()
        return logits

    return play


def compiled(step: Step) -> Step:
    """Compiles a step with torch.compile, the whole of it in one graph; the first token then takes a minute or so."""
    return torch.compile(step, fullgraph=True, dynamic=False)


class CudaGraphState:
    """A model's state, the place where its next tokens are put, and the recorded step, once there is one."""

    def __init__(self, state: State, tokens: Tensor) -> None:
        self.state, self.tokens = state, tokens
        self.tensors = list(_tensors(state))
        self.play: Step | None = None

    def reorder(self, rows: Tensor) -> None:
        """Reorders the model's state, in place.

        Raises:
            ValueError: if there are more or fewer rows than before: what is recorded writes into the memory of so many.
        """
        if len(rows) != len(self.tokens):
            raise ValueError(f"a recorded step has {len(self.tokens)} rows: reorder them, not {len(rows)}")
        self.state.reorder(rows)


class CudaGraphDecoder(Generic[Batch]):
    """A model for `generate` and `stream` whose steps are one recording, played for every token.

    It writes one batch at a time, and holds on to where the weights were: make a new one after the model was moved.
    For guidance put it around: `CudaGraphDecoder(Guided(captioner, 2.0))`.

    Args:
        model: any model with `prefill` and `decode_step` over the library's own blocks.
        record: `cuda_graph`, or `compiled`.
    """

    def __init__(self, model: GenerativeModel[Batch], record: Callable[[Step], Step] = cuda_graph) -> None:
        self.model, self.record = model, record
        self._last: CudaGraphState | None = None

    @property
    def training(self) -> bool:
        """That of the model."""
        return self.model.training

    @property
    def max_len(self) -> int:
        """That of the model."""
        return self.model.max_len

    def eval(self) -> None:
        """Evaluation mode."""
        self.model.eval()

    def train(self, mode: bool = True) -> None:
        """Training mode."""
        self.model.train(mode)

    def prefill(
        self, batch: Batch, *, expand_size: int = 1, max_new_tokens: int = 40
    ) -> tuple[Tensor, CudaGraphState]:
        """As the model's; the state is then fixed, and takes the place of the last one if that had the same shapes.

        Raises:
            ValueError: if the model's state cannot be fixed.
        """
        logits, state = self.model.prefill(batch, expand_size=expand_size, max_new_tokens=max_new_tokens)
        found = list(_decoder_states(state))
        if not found:
            raise ValueError(
                f"the state of a {type(self.model).__name__} cannot be fixed, so its steps cannot be recorded: "
                f"{type(state).__name__} holds no DecoderState"
            )
        for part in found:
            part.make_static()
        tokens = torch.zeros(logits.shape[0], dtype=torch.long, device=logits.device)
        new, last = CudaGraphState(state, tokens), self._last
        if last is None or not _alike(new.tensors, last.tensors):
            self._last = new
            return logits, new
        for old, now in zip(last.tensors, new.tensors, strict=True):
            old.copy_(now)
        return logits, last

    def decode_step(self, tokens: Tensor, state: CudaGraphState) -> Tensor:
        """Adds a token to each row: (m) long -> logits (m v), which the next step may overwrite.

        Raises:
            ValueError: under autocast, whose casts of the weights a recording would lose.
        """
        with torch.cuda.device_of(tokens):
            return self._play(tokens, state)

    def _play(self, tokens: Tensor, state: CudaGraphState) -> Tensor:
        state.tokens.copy_(tokens)
        if state.play is None:
            kind = tokens.device.type
            if torch.is_autocast_enabled(kind):
                raise ValueError(
                    "a recorded step knows no autocast: leave it, and convert the model instead, model.bfloat16()"
                )
            parts = list(_decoder_states(state.state))
            moving = [x for part in parts for x in _own(part)]
            before = [x.clone() for x in moving]
            state.play = self.record(lambda: self.model.decode_step(state.tokens, state.state))
            for x, was in zip(moving, before, strict=True):
                x.copy_(was)  # Recording may have taken steps.
        return state.play()


def _parts(x: Any) -> Iterator[Any]:
    """What a state is made of: the values of its attributes, or of a list."""
    if isinstance(x, list | tuple):
        yield from x
    elif hasattr(x, "__dict__"):
        yield from vars(x).values()


def _decoder_states(x: Any) -> Iterator[DecoderState]:
    if isinstance(x, DecoderState):
        yield x
    elif not isinstance(x, Tensor):
        for part in _parts(x):
            yield from _decoder_states(part)


def _own(state: DecoderState) -> Iterator[Tensor]:
    """What a step changes in a state besides the keys and values at its place, which the next step writes again."""
    yield from (x for x in vars(state).values() if isinstance(x, Tensor))


def _tensors(x: Any) -> Iterator[Tensor]:
    """All tensors of a state, always in the same order."""
    if isinstance(x, Tensor):
        yield x
    else:
        for part in _parts(x):
            yield from _tensors(part)


def _alike(new: list[Tensor], old: list[Tensor]) -> bool:
    shape = [(x.shape, x.dtype, x.device) for x in new]
    return shape == [(x.shape, x.dtype, x.device) for x in old]
