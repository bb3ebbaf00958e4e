"""CudaGraphRunner: a decoding step is recorded once and replayed for every token, which then costs no Python.

    model = CudaGraphRunner(captioner)             # on a GPU
    texts = generate(model, batch, eos_id=2)        # as ever

A recording is the same operations on the same memory every time. So caches have their full length from the start, masks
hide what is not yet written, and every tensor stays where it is (`DecoderState.make_static`). The recording is kept for
later batches of the same shapes.

Shapes: m rows of texts.
"""

from collections.abc import Callable, Iterator
from typing import Any, Generic

import torch
from torch import Tensor

from mmtransformer.backbones.base import DecoderState
from mmtransformer.captioners.base import State
from mmtransformer.generation.base import BatchT, GenerativeModel

Step = Callable[[], Tensor]
"""Reads tokens from a fixed place and gives logits (m v)."""


def cuda_graph(step: Step) -> Step:
    """Records a step as one CUDA graph; its logits come in the same memory every time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # Libraries make their workspaces in a first call, which a graph could not hold.
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay


def compiled(step: Step) -> Step:
    """Compiles a step with torch.compile, the whole of it in one graph; the first token then takes a minute or so."""
    return torch.compile(step, fullgraph=True, dynamic=False)


class CudaGraphState:
    """A model's state, the place where its next tokens are put, and the recorded step, once there is one.

    Args:
        state: what the model's `prefill` gave, with all its decoder states static.
        rows: rows of text, m.
    """

    def __init__(self, state: State, rows: int) -> None:
        self.state = state
        self.tensors = list(tensors_of(state))
        self.tokens = torch.zeros(rows, dtype=torch.long, device=self.tensors[0].device)
        self.replay: Step | None = None

    def has_shapes_of(self, other: "CudaGraphState") -> bool:
        """Whether a recording for one can serve the other."""
        mine, others = ([(x.shape, x.dtype, x.device) for x in state.tensors] for state in (self, other))
        return mine == others

    def copy_(self, other: "CudaGraphState") -> None:
        """Takes over what another state of the same shapes holds; every tensor stays where it is."""
        for mine, new in zip(self.tensors, other.tensors, strict=True):
            mine.copy_(new)

    def reorder(self, rows: Tensor) -> None:
        """Reorders the model's state, in place.

        Raises:
            ValueError: if there are more or fewer rows than before: what is recorded writes into the memory of so many.
        """
        if len(rows) != len(self.tokens):
            raise ValueError(f"a recorded step has {len(self.tokens)} rows: reorder them, not {len(rows)}")
        self.state.reorder(rows)


class CudaGraphRunner(Generic[BatchT]):
    """A model for `generate` and `stream` whose steps are one recording, replayed for every token.

    It writes one batch at a time, and holds on to where the weights were: make a new one after the model was moved.
    For guidance put it around: `CudaGraphRunner(Guided(captioner, 2.0))`.

    Args:
        model: any model with `prefill` and `decode_step` over the library's own blocks.
        record: `cuda_graph`, or `compiled`.
    """

    def __init__(self, model: GenerativeModel[BatchT], record: Callable[[Step], Step] = cuda_graph) -> None:
        self.model, self.record = model, record
        self.vocab_size, self.max_len, self.modules = model.vocab_size, model.max_len, model.modules
        self._last: CudaGraphState | None = None

    def prefill(
        self, batch: BatchT, *, expand_size: int = 1, max_new_tokens: int = 40
    ) -> tuple[Tensor, CudaGraphState]:
        """As the model's; the state is then static, and takes the place of the last one if that had the same shapes.

        Raises:
            ValueError: if the model's state cannot be made static.
        """
        logits, state = self.model.prefill(batch, expand_size=expand_size, max_new_tokens=max_new_tokens)
        parts = list(decoder_states_of(state))
        if not parts:
            raise ValueError(
                f"the state of a {type(self.model).__name__} cannot be made static, so its steps cannot be recorded: "
                f"{type(state).__name__} holds no DecoderState"
            )
        for part in parts:
            part.make_static()
        new, last = CudaGraphState(state, len(logits)), self._last
        if last is None or not new.has_shapes_of(last):
            self._last = new
            return logits, new
        last.copy_(new)
        return logits, last

    def decode_step(self, tokens: Tensor, state: CudaGraphState) -> Tensor:
        """Adds a token to each row: (m) long -> logits (m v), which the next step may overwrite.

        Raises:
            ValueError: under autocast, whose casts of the weights a recording would lose.
        """
        with torch.cuda.device_of(tokens):
            state.tokens.copy_(tokens)
            if state.replay is None:
                state.replay = self._recorded(state)
            return state.replay()

    def _recorded(self, state: CudaGraphState) -> Step:
        if torch.is_autocast_enabled(state.tokens.device.type):
            raise ValueError(
                "a recorded step knows no autocast: leave it, and convert the model instead, model.bfloat16()"
            )
        # Recording takes steps. Of what a step changes, keys and values at its place are written again by the next one;
        # the rest is put back.
        changed = [x for part in decoder_states_of(state.state) for x in vars(part).values() if isinstance(x, Tensor)]
        before = [x.clone() for x in changed]
        replay = self.record(lambda: self.model.decode_step(state.tokens, state.state))
        for x, was in zip(changed, before, strict=True):
            x.copy_(was)
        return replay


def decoder_states_of(state: Any) -> Iterator[DecoderState]:
    """The decoder states that a model's state holds, however deep."""
    if isinstance(state, DecoderState):
        yield state
    elif not isinstance(state, Tensor):
        for part in _parts(state):
            yield from decoder_states_of(part)


def tensors_of(state: Any) -> Iterator[Tensor]:
    """All tensors of a state, always in the same order."""
    if isinstance(state, Tensor):
        yield state
    else:
        for part in _parts(state):
            yield from tensors_of(part)


def _parts(state: Any) -> Iterator[Any]:
    """What a state is made of: the values of its attributes, or of a list."""
    if isinstance(state, list | tuple):
        yield from state
    elif hasattr(state, "__dict__"):
        yield from vars(state).values()
