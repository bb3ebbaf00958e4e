"""Recorded steps against the same steps taken one by one: on a CPU a tape of operations stands for the CUDA graph."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmtransformer import CudaGraphRunner, VisionEncoderDecoder, generate, stream
from mmtransformer.generation.cuda_graph import Step, compiled
from mmtransformer.generation.guidance import Guided
from mmtransformer.generation.loop import LOOK_EVERY
from support.generators import DIM, EOS, LLAMA, MODELS, ROWS, VOCAB, batch_for, decoder, noisy, told, vit

SYNCS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero")


class Tape(TorchDispatchMode):
    """What a CUDA graph does: keeps the operations and their memory, and does them again without any Python of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        assert not any(word in str(func) for word in SYNCS), f"a step waits for the device: {func}"
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Recorder:
    """Gives tapes, and counts them."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []

    def __call__(self, step: Step) -> Step:
        step()  # As a CUDA graph's warm-up does.
        tape = Tape()
        with tape:
            logits = step()
        self.tapes.append(tape)

        def replay() -> Tensor:
            tape.replay()
            return logits

        return replay


# --- the same texts


@pytest.mark.parametrize("kind", MODELS)
def test_a_recording_says_what_the_model_says(kind: str) -> None:
    """And is used again for other texts of the same shapes, and made anew for others."""
    torch.manual_seed(0)
    model, record = noisy(MODELS[kind]()), Recorder()
    captured = CudaGraphRunner(model, record)
    for seed, rows, tapes in ((1, 3, 1), (2, 3, 1), (3, 5, 2), (4, 5, 2)):
        batch = batch_for(model, seed, rows)
        want = told(model, batch, min_new_tokens=5)
        assert told(captured, batch, min_new_tokens=5) == want
        assert len({str(row) for row in want}) == rows, "texts that do not depend on their rows would show nothing"
        assert len(record.tapes) == tapes


@pytest.mark.parametrize("options", [
    {"num_beams": 4, "num_return_sequences": 3},
    {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.7, "no_repeat_ngram_size": 2},
    {"num_beams": 5, "force_words_ids": [[[7, 9]], [[11]]], "repetition_penalty": 1.3},
    {"do_sample": True, "num_return_sequences": 2, "top_p": 0.9},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", ["window", "cross-attention", "flamingo"])
def test_every_search_can_replay_it(kind: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, record = noisy(MODELS[kind]()), Recorder()
    captured = CudaGraphRunner(model, record)
    for seed in (1, 2):
        batch = batch_for(model, seed)
        assert told(captured, batch, **options) == told(model, batch, **options)
    assert len(record.tapes) == 1


def test_streams_and_guidance_can_replay_it() -> None:
    torch.manual_seed(0)
    model, record = noisy(MODELS["cross-attention"]()), Recorder()
    batch = batch_for(model, 1)
    want = list(stream(model, batch, eos_id=EOS, max_new_tokens=9, guidance_scale=2.0))
    guided: Any = Guided(model, 2.0)
    assert list(stream(CudaGraphRunner(guided, record), batch, eos_id=EOS, max_new_tokens=9)) == want


@pytest.mark.parametrize("kind", ["gpt2", "llama", "transformer", "cross-attention", "flamingo"])
def test_a_compiled_step_says_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, **options: compile_(step, backend="eager", **options))
    model = noisy(MODELS[kind]())
    captured = CudaGraphRunner(model, compiled)
    for seed in (1, 2):
        batch = batch_for(model, seed)
        assert told(captured, batch, num_beams=2) == told(model, batch, num_beams=2)


# --- what a step costs


def shapes_made(model: Any, batch: Any, beams: int, steps: int) -> Iterator[set[tuple[int, ...]]]:
    """For each step the shapes of what it makes, views left out."""
    with torch.inference_mode():
        logits, state = model.prefill(batch, expand_size=beams, max_new_tokens=steps)
        for _ in range(steps):
            with Tape() as tape:
                state.reorder(torch.arange(logits.shape[0]))
                logits = model.decode_step(logits.argmax(1), state)
            made = set()
            for _, args, kwargs, out in tape.calls:
                read = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
                news = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
                made |= {tuple(x.shape) for x in news if x.untyped_storage().data_ptr() not in read}
            yield made


@pytest.mark.parametrize("kind", MODELS)
def test_recorded_steps_make_the_same_tensors_every_time(kind: str) -> None:
    torch.manual_seed(0)
    model = noisy(MODELS[kind]())
    captured = CudaGraphRunner(model, lambda step: step)
    _, second, *rest = shapes_made(captured, batch_for(model, 1), 2, 8)  # The first takes room for reordering.
    assert all(made == second for made in rest)


@pytest.mark.parametrize("kind", MODELS)
def test_no_step_waits_for_the_device_or_makes_what_grows_but_scores(kind: str) -> None:
    """Of the tensors that plain steps make, only scores over the keys so far grow: a number a head and key."""
    torch.manual_seed(0)
    model = noisy(MODELS[kind]())
    _, second, *_, last = shapes_made(model, batch_for(model, 1), 2, 8)
    heads = 4 * 2 * ROWS
    assert all(torch.Size(shape).numel() <= heads * (4 + 8 + 12) for shape in last - second), last - second


def test_recording_leaves_no_mark() -> None:
    """Steps that a recorder takes are taken back: positions, padding and places are as before."""
    torch.manual_seed(0)
    model = noisy(decoder(**LLAMA))
    batch = batch_for(model, 1)
    with torch.inference_mode():
        logits, state = CudaGraphRunner(model, Recorder()).prefill(batch, max_new_tokens=9)
        plain, own = model.prefill(batch, max_new_tokens=9)
        assert torch.equal(logits, plain)
        captured = CudaGraphRunner(model, Recorder())
        _, state = captured.prefill(batch, max_new_tokens=9)
        for _ in range(5):
            tokens = plain.argmax(1)
            torch.testing.assert_close(captured.decode_step(tokens, state), plain := model.decode_step(tokens, own))
    inner: Any = state.state
    assert inner.cache_position.tolist() == [own.length - 1]
    assert torch.equal(inner.next_positions, own.next_positions)
    with pytest.raises(ValueError, match=f"a recorded step has {len(plain)} rows: reorder them, not 1"):
        state.reorder(torch.tensor([0]))


# --- errors


def test_what_cannot_be_recorded() -> None:
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="read nothing"):
        decoder().new_state(7).make_static()
    model = decoder().eval()

    class Forgetful(torch.nn.Module):
        vocab_size, max_len = VOCAB, 37

        def prefill(self, batch: Any, **_: Any) -> tuple[Tensor, SimpleNamespace]:
            return torch.zeros(len(batch.tokens), VOCAB), SimpleNamespace(reorder=lambda rows: None)

    with pytest.raises(ValueError, match=r"of a Forgetful cannot be made.* SimpleNamespace holds no DecoderState"):
        told(CudaGraphRunner(Forgetful(), Recorder()), batch_for(model, 1))  # pyright: ignore[reportArgumentType]
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"model\.bfloat16\(\)"):
        told(CudaGraphRunner(model, Recorder()), batch_for(model, 1))


def test_caches_of_others_cannot_be_recorded() -> None:
    transformers = pytest.importorskip("transformers")
    from mmtransformer import HFDecoder

    config = transformers.GPTNeoXConfig(vocab_size=VOCAB, hidden_size=DIM, num_hidden_layers=1, num_attention_heads=2,
                                        intermediate_size=31)  # fmt: skip
    model = HFDecoder.from_model(transformers.GPTNeoXForCausalLM(config).eval())
    with pytest.raises(ValueError, match="grows with every token"):
        told(CudaGraphRunner(model, Recorder()), batch_for(model, 1))


def test_a_recorders_modules_are_the_models() -> None:
    model = decoder()
    captured = CudaGraphRunner(model)
    assert list(captured.modules()) == list(model.modules())
    assert (captured.max_len, captured.vocab_size) == (37, VOCAB)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", MODELS)
def test_a_cuda_graph_says_what_the_model_says(kind: str) -> None:
    torch.manual_seed(0)
    model = noisy(MODELS[kind]()).cuda()
    captured = CudaGraphRunner(model)
    for seed in (1, 2):
        batch = batch_for(model, seed).to("cuda")
        for options in ({}, {"num_beams": 3}):
            assert [[text[0] for text in row] for row in told(captured, batch, **options)] == [
                [text[0] for text in row] for row in told(model, batch, **options)
            ]


# --- how often a search looks whether it may stop


class Looks(TorchDispatchMode):
    """Counts how often a value is taken out of a tensor: on a GPU each of them waits for all that is under way."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += any(word in str(func) for word in SYNCS)
        return func(*args, **(kwargs or {}))


SEARCHES: list[dict[str, Any]] = [
    {},
    {"do_sample": True, "top_k": 5, "top_p": 0.9},
    {"num_beams": 3, "no_repeat_ngram_size": 3, "repetition_penalty": 1.2, "min_new_tokens": 9},
    {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.7},
    {"num_beams": 5, "force_words_ids": [[[7, 9]], [[11]]]},
    {"num_beams": 2, "guidance_scale": 2.0},
]


@pytest.mark.parametrize("options", SEARCHES, ids=str)
def test_a_gpu_is_waited_for_every_eight_tokens_only(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With what a GPU gets for `LOOK_EVERY`: the same texts, and as many looks as there are eights of tokens."""
    torch.manual_seed(0)
    model = noisy(VisionEncoderDecoder(vit(), decoder(context_dim=DIM)))
    batch = batch_for(model, 1)
    want = told(model, batch, **options)
    monkeypatch.setitem(LOOK_EVERY, "cpu", 8)
    assert told(model, batch, **options) == want
    counts = []
    for new in (7, 15, 31):
        least: dict[str, Any] = {"min_new_tokens": new} if "min_new_tokens" in options else {}
        with Looks() as looks:
            generate(model, batch, eos_id=0, max_new_tokens=new, **options | least)
        counts.append(looks.count)
    assert counts[1] - counts[0] <= 1, counts
    assert counts[2] - counts[1] <= 2, counts
