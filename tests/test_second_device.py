"""Everything on a GPU that is none: no tensor is made in the wrong place, no texts differ, and waits are counted."""

import contextlib
import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mmtransformer import Blip2QFormer, Captioner, CudaGraphRunner, QFormer, TextEncoder, ViT, generate, stream
from mmtransformer.cli import main
from mmtransformer.training.engine.log import MetricsLog
from mmtransformer.training.tasks.captioning import Captioning
from mmtransformer.training.tasks.qformer_stage1 import QFormerStage1
from support import tiny
from support.generators import DIM, EOS, MODELS, QUERIES, VOCAB, batch_for, noisy, told, vit
from support.recipes import NAMES, RECIPES, arguments
from support.second_device import GPU, Graph, OnGPU, SecondDevice, Stream, WrongDevice

ALL: dict[str, Callable[[], Any]] = MODELS | {
    "image-text": lambda: Blip2QFormer(vit(), QFormer(**QUERIES, vocab_size=VOCAB, max_len=37))
}
SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.7, "no_repeat_ngram_size": 2},
    "forced words": {"num_beams": 5, "force_words_ids": [[[7, 9]], [[11]]], "repetition_penalty": 1.3},
}


# --- the stand-in itself


def test_it_refuses_what_a_gpu_refuses() -> None:
    with SecondDevice() as gpu:
        layer = torch.nn.Linear(3, 2).to(gpu.device)
        x = torch.arange(6.0, device="cuda").view(2, 3)
        assert {x.device, layer.weight.device, layer(x).device, (x * torch.tensor(2.0)).device} == {GPU}
        with pytest.raises(WrongDevice, match=r"tensors on the CPU, \[\(3,\)\], beside 1 on the GPU"):
            x + torch.ones(3)
        layer(x).sum().backward()
        assert layer.weight.grad is not None
        assert layer.weight.grad.device == GPU
        assert not gpu.waits
        assert x[x > 3].tolist() == [4.0, 5.0]
        with torch.inference_mode():
            assert bool((x.to("cpu") == torch.arange(6.0).view(2, 3)).all())
        assert x[[1]].sum().item() == 12.0
        assert gpu.waits == {"index": 1, "_to_copy": 2, "_local_scalar_dense": 1}
        graph = Graph()
        with gpu.graph(graph):
            y = x * 2
            with pytest.raises(WrongDevice, match="cannot wait"):
                y.sum().item()
            with pytest.raises(WrongDevice, match="cannot copy"):
                torch.tensor(3.0, device=gpu.device)
        x.fill_(5.0)
        assert y.max().item() == 10.0 * 1.0
        graph.replay()
        assert y.tolist() == [[10.0] * 3] * 2


# --- models


def check_generation(kind: str, options: dict[str, Any]) -> None:
    model = noisy(ALL[kind]())
    batch = batch_for(model, 1)
    want = told(model, batch, **options)
    with SecondDevice() as gpu:
        model, batch = model.to(gpu.device), batch.to(gpu.device)
        assert told(model, batch, **options) == want
        waits = []
        for new in (7, 15):
            gpu.waits.clear()
            generate(model, batch, eos_id=0, max_new_tokens=new, **options)
            waits.append(gpu.waits.total())
    assert waits[1] - waits[0] <= 1, waits


@pytest.mark.parametrize("kind", ALL)
def test_the_same_texts_and_a_wait_every_eight_tokens(kind: str) -> None:
    check_generation(kind, SEARCHES["beams"])


@pytest.mark.parametrize("search", SEARCHES)
def test_every_search_waits_as_seldom(search: str) -> None:
    check_generation("cross-attention", SEARCHES[search])


@pytest.mark.parametrize("kind", ["extended", "transformer", "flamingo"])
def test_streams_and_samples(kind: str) -> None:
    model = noisy(ALL[kind]())
    batch = batch_for(model, 1)
    want = list(stream(model, batch, eos_id=EOS, max_new_tokens=5))
    with SecondDevice() as gpu:
        model, batch = model.to(gpu.device), batch.to(gpu.device)
        assert list(stream(model, batch, eos_id=EOS, max_new_tokens=5)) == want
        sampled = generate(model, batch, eos_id=EOS, max_new_tokens=5, do_sample=True, top_k=5, top_p=0.9)
        assert len(sampled) == len(batch.tokens)


@pytest.mark.parametrize("kind", [kind for kind in ALL if isinstance(ALL[kind](), Captioner)])
def test_the_same_gradients_and_heat(kind: str) -> None:
    model = noisy(ALL[kind]())
    given = batch_for(model, 1)
    whole = torch.ones_like(given.attention_mask)
    batch = dataclasses.replace(given, attention_mask=whole, loss_mask=whole)

    def learned(batch: Any) -> dict[str, Tensor]:
        model.zero_grad()
        model(batch).loss.backward()
        return {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}

    want, seen = learned(batch), model.attention_map(batch)
    with SecondDevice() as gpu:
        model, batch = model.to(gpu.device), batch.to(gpu.device)
        got = learned(batch)
        assert got.keys() == want.keys()
        for name in want:
            torch.testing.assert_close(got[name], want[name], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model.attention_map(batch).cpu(), seen, atol=1e-5, rtol=1e-4)


def test_an_encoder_learns_there() -> None:
    """Hidden words and pairs, with padding."""
    from mmtransformer.data.text_only.masked_rows import MaskedBatch
    from mmtransformer.training import MaskedLanguageModeling

    encoder = TextEncoder(VOCAB, DIM, 2, 4, max_len=9, mlm_head=True, nsp_head=True, dropout=0.0)
    module = MaskedLanguageModeling(encoder)
    tokens = torch.randint(3, VOCAB, (4, 9))
    attention_mask = torch.arange(9) < torch.tensor([9, 4, 7, 6])[:, None]
    loss_mask = attention_mask & (torch.rand(4, 9) < 0.4)
    loss_mask[:, 1] = True
    other = torch.tensor([0, 1, -1, 1])
    batch = MaskedBatch(tokens, tokens, loss_mask, torch.zeros_like(tokens), (tokens > 9).long(), attention_mask, other)
    want = module.loss(batch)
    with SecondDevice() as gpu:
        encoder.to(gpu.device)
        got = module.loss(batch.to(gpu.device))
        got.sum.backward()
        assert all(p.grad is not None and p.grad.device == GPU for p in encoder.parameters())
        torch.testing.assert_close(got.sum.cpu(), want.sum)
        assert int(got.count) == int(want.count)


# --- a decoding step as a CUDA graph


@pytest.mark.parametrize("kind", MODELS)
def test_a_graph_can_hold_a_step(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy from the CPU and no wait inside; played again for a second batch, it writes that one's texts."""
    model, graphs = noisy(MODELS[kind]()), []
    batches = [batch_for(model, seed) for seed in (1, 2)]
    want = [told(model, batch, num_beams=2) for batch in batches]

    def new_graph() -> Graph:
        graphs.append(Graph())
        return graphs[-1]

    with SecondDevice() as gpu:
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", new_graph)
        monkeypatch.setattr(torch.cuda, "graph", gpu.graph)
        captured = CudaGraphRunner(model.to(gpu.device))
        assert [told(captured, batch.to(gpu.device), num_beams=2) for batch in batches] == want
    assert len(graphs) == 1
    assert graphs[0].replays > 8


@pytest.fixture
def trainer_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's CPU accelerator computes there, and what asks the driver gets an answer."""
    plain, save = SingleDeviceStrategy.__init__, torch.save

    def on_it(self: Any, device: Any = "cpu", *args: Any, **kwargs: Any) -> None:
        plain(self, GPU, *args, **kwargs)

    class Generator(torch.Generator):
        def __new__(cls, device: Any = None) -> "Generator":
            return super().__new__(cls)

    def save_numbers(what: Any, *args: Any, **kwargs: Any) -> None:
        save(tree_map_only(OnGPU, lambda x: x.inner, what), *args, **kwargs)

    monkeypatch.setattr(SingleDeviceStrategy, "__init__", on_it)
    monkeypatch.setattr(CPUAccelerator, "setup_device", lambda self, device: None)
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch, "save", save_numbers)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a stand-in")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: 10**6)


# --- a run


class Waits(pl.Callback):
    """What was waited for in each batch of a training."""

    def __init__(self, gpu: SecondDevice) -> None:
        self.gpu, self.batches = gpu, []

    def on_train_batch_start(self, *_: Any) -> None:
        self.gpu.waits.clear()

    def on_train_batch_end(self, *_: Any) -> None:
        self.batches.append(dict(self.gpu.waits))


@pytest.mark.parametrize("kind", ["captions", "stage 1"])
@pytest.mark.usefixtures("trainer_on_it")
def test_a_step_waits_once_however_many_batches_it_has(kind: str, tmp_path: Path) -> None:
    """Where its numbers are read: how many tokens have logits is known before a batch comes to the device."""
    if kind == "captions":
        module: Captioning = Captioning(tiny.captioner())
    else:
        qformer = QFormer(3, 16, 1, 2, 24, vocab_size=tiny.VOCAB + 1, max_len=60)
        module = QFormerStage1(Blip2QFormer(ViT(32, 8, 24, 1, 3), qformer, cls_token_id=tiny.VOCAB))
    with warnings.catch_warnings(), SecondDevice() as gpu:
        warnings.simplefilter("ignore")
        waits = Waits(gpu)
        pl.Trainer(
            accelerator="cpu",
            precision="32-true",
            max_epochs=1,
            accumulate_grad_batches=3,
            gradient_clip_val=1.0,
            limit_val_batches=0,
            logger=MetricsLog(tmp_path),
            log_every_n_steps=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=tmp_path,
            callbacks=[waits],
        ).fit(module, datamodule=tiny.scenes(2, train_size=12))
    assert waits.batches == [{}, {}, {"_to_copy": 1}] * 2
    assert module.samples_seen == 12


# --- recipes


IN_CI = ("flamingo_scenes",)


@pytest.mark.parametrize(
    "name", [name if name in IN_CI else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
@pytest.mark.usefixtures("trainer_on_it")
def test_recipe_runs_there(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training, validation, checkpoints, and everything at the end: scores, pictures, the model."""
    monkeypatch.setenv("PATH", "")
    words = ["--config", str(RECIPES / f"{name}.yaml"), "--config", str(RECIPES / "tiny.yaml")]
    words += [f"--trainer.default_root_dir={tmp_path / 'run'}", *arguments(name, tmp_path)]
    with warnings.catch_warnings(), SecondDevice():
        warnings.simplefilter("ignore")
        code = main(["fit", *words, "--trainer.accelerator=cpu", "--trainer.precision=32-true"])
    assert code == 0, capsys.readouterr().err
    metrics = json.loads((tmp_path / "run/metrics.json").read_text("utf-8"))
    assert metrics["training"]["device"] == "a stand-in"
    assert (tmp_path / "run/checkpoints/last.ckpt").is_file()
    assert (tmp_path / "run/model/model.safetensors").is_file()
