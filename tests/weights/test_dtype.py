"""Frozen parts kept in bfloat16, and low-rank products beside a frozen tower, as recipes load them."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmtransformer import (
    AttentionConfig,
    Blip2,
    Blip2QFormer,
    CaptionBatch,
    Flamingo,
    MLPConfig,
    NormConfig,
    PositionConfig,
    PrefixCaptioner,
    QFormer,
    TextDecoder,
    ViT,
    caption_loss,
    generate,
)
from mmtransformer.captioners.base import Captioner
from mmtransformer.layers.lora import merge_lora
from mmtransformer.layers.modes import freeze
from mmtransformer.training import Captioning
from mmtransformer.weights import load_lm, load_vit
from mmtransformer.weights.shared.dtype import cast_frozen
from tests.support.products import Products, slow_in_bfloat16

VOCAB, SIZE = 53, (16, 24)
LLAMA: dict[str, Any] = {
    "attention": AttentionConfig(bias=False),
    "mlp": MLPConfig("swiglu", bias=False),
    "norm": NormConfig("rms"),
    "positions": PositionConfig("rotary"),
    "tied": False,
}


def shaken(model: nn.Module) -> Any:
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(name="folders")
def saved(tmp_path: Path) -> tuple[Path, Path]:
    """A vision tower and a language model."""
    torch.manual_seed(2)
    shaken(ViT(SIZE, 8, 20, 2, 4)).save_pretrained(tmp_path / "vit")
    shaken(TextDecoder(VOCAB, 24, 2, 4, max_len=41, **LLAMA)).save_pretrained(tmp_path / "lm")
    return tmp_path / "vit", tmp_path / "lm"


def qformer(vocab_size: int | None = None) -> QFormer:
    torch.manual_seed(1)
    return QFormer(3, 12, 2, 3, 20, vocab_size=vocab_size, max_len=17, dropout=0.0)


def batch(vocab: int = VOCAB) -> CaptionBatch:
    torch.manual_seed(5)
    tokens = torch.randint(vocab, (6, 7))
    known = torch.ones_like(tokens, dtype=torch.bool)
    return CaptionBatch(tokens, known, known, pixels=torch.randn(3, 1, 3, *SIZE))


def formats(model: nn.Module) -> tuple[set[torch.dtype], set[torch.dtype]]:
    """Those of what learns, and of what does not."""
    learns = {p.dtype for p in model.parameters() if p.requires_grad}
    return learns, {p.dtype for p in model.parameters() if not p.requires_grad}


def opened(model: Flamingo) -> Flamingo:
    for block in model.gated_blocks:
        nn.init.constant_(block.attn_gate, 0.5)  # type: ignore[arg-type]
    return model


BRIDGES = {
    "blip2": lambda vision, decoder: Blip2(vision, qformer(), decoder),
    "blip2, last norm learns": lambda vision, decoder: Blip2(vision, qformer(), decoder, train_vision_norm=True),
    "prefix": PrefixCaptioner,
    "flamingo": lambda vision, decoder: opened(Flamingo(vision, decoder)),
    "stage 1, last norm learns": lambda vision, decoder: Blip2QFormer(
        vision, qformer(VOCAB), embed_dim=8, freeze_vision=True, train_vision_norm=True
    ),
}


@pytest.mark.parametrize("name", BRIDGES)
@pytest.mark.parametrize("mixed", [False, True])
def test_a_bridge_learns_between_parts_in_bfloat16(
    name: str, mixed: bool, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    vision, lm = map(str, folders)

    def build(dtype: Any) -> Captioner:
        torch.manual_seed(7)
        return BRIDGES[name](load_vit(vision, dtype=dtype), load_lm(lm, dtype=dtype)).train()

    def loss(model: Captioner) -> Tensor:
        with torch.autocast("cpu", enabled=mixed):
            return model(batch()).loss if isinstance(model, Blip2QFormer) else caption_loss(model, batch())

    model, whole = build("bfloat16"), build("float32")
    assert formats(model) == ({torch.float32}, {torch.bfloat16})
    found, want = loss(model), loss(whole)
    torch.testing.assert_close(found, want, rtol=0.02, atol=0.02)
    found.backward(), want.backward()
    grads = [
        torch.cat([p.grad.flatten() for p in m.parameters() if p.requires_grad and p.grad is not None])
        for m in (model, whole)
    ]
    assert grads[0].shape == grads[1].shape
    assert (grads[0] - grads[1]).norm() < 0.1 * grads[1].norm()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved")
    for (path, mine), back in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(mine.float(), back), path
    begin = batch()
    prompts = CaptionBatch(
        begin.tokens[:3, :2], begin.attention_mask[:3, :2], ~begin.attention_mask[:3, :2], pixels=begin.pixels
    )
    texts = generate(model.eval(), prompts, eos_id=0, max_new_tokens=4, num_beams=2)
    assert len(texts) == 3


@pytest.mark.parametrize("name", BRIDGES)
def test_parts_in_bfloat16_do_not_multiply_in_it_where_that_is_slow(
    name: str, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zen 3 multiplies 80 times as fast in float32."""
    slow_in_bfloat16(monkeypatch)
    vision, lm = map(str, folders)
    model = BRIDGES[name](load_vit(vision, dtype="bfloat16"), load_lm(lm, dtype="bfloat16")).train()
    with Products() as made:
        loss = model(batch()).loss if isinstance(model, Blip2QFormer) else caption_loss(model, batch())
        loss.backward()
    assert made.dtypes == {torch.float32}


def test_a_last_norm_that_learns_gives_float32(folders: tuple[Path, Path]) -> None:
    """A GPU's LayerNorm refuses bfloat16 beside weights in float32; a CPU's would round its result."""
    half, whole = (load_vit(str(folders[0]), dtype=dtype) for dtype in ("bfloat16", "float32"))
    half.norm.float()
    pixels = torch.randn(3, 3, *SIZE)
    for read in (lambda vit: vit.forward_features(pixels), lambda vit: vit.tokens_after(pixels, [-1], norm=True)[0]):
        found = read(half)
        assert found.dtype == torch.float32
        assert not torch.equal(found, found.bfloat16().float())
        torch.testing.assert_close(found, read(whole), rtol=0.05, atol=0.05)


def test_new_tokens_stay_in_float32(folders: tuple[Path, Path]) -> None:
    half, whole = (load_lm(folders[1], new_tokens=2, dtype=dtype) for dtype in ("bfloat16", "float32"))
    for model in (half, whole):
        model.requires_grad_(False)
    assert formats(half) == ({torch.float32}, {torch.bfloat16})
    half.load_state_dict(whole.state_dict())
    tokens = torch.tensor([[4, VOCAB, 7, VOCAB + 1, 9]])
    found, want = half.head(half(tokens)), whole.head(whole(tokens))
    assert found.shape == (1, 5, VOCAB + 2)
    assert (found - want).abs().mean() < 0.03 * want.std()
    found.square().sum().backward()
    assert all(p.grad is not None for p in half.parameters() if p.requires_grad)


def test_a_model_of_transformers_in_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(6)
    theirs = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=VOCAB, hidden_size=24, num_hidden_layers=2,
                                              num_attention_heads=4, intermediate_size=31,
                                              max_position_embeddings=29))  # fmt: skip
    theirs.save_pretrained(tmp_path)
    half, whole = (load_lm(tmp_path, dtype=dtype) for dtype in ("bfloat16", "float32"))
    rates = {name: b.dtype for name, b in half.named_buffers() if "inv_freq" in name}
    assert set(rates.values()) == {torch.float32}
    models = [Blip2(ViT(SIZE, 8, 20, 1, 4), qformer(), decoder) for decoder in (half, whole)]
    models[0].load_state_dict(models[1].state_dict())
    slow_in_bfloat16(monkeypatch)
    want = models[1].eval().logits(batch())
    with Products() as made:
        found = models[0].eval().logits(batch())
    assert made.dtypes == {torch.float32}
    assert (found - want).abs().mean() < 0.03 * want.std()


def test_a_tower_takes_low_rank_products_and_gives_them_back(folders: tuple[Path, Path], tmp_path: Path) -> None:
    vision = load_vit(str(folders[0]), lora_rank=3, lora_target_modules=["q_proj", "fc2"])
    trained = {name for name, p in vision.named_parameters() if p.requires_grad}
    assert {name.split(".")[-4] for name in trained} == {"q_proj", "fc2"}
    assert all("lora_" in name for name in trained)
    model = Blip2(vision, qformer(), load_lm(folders[1]), freeze_vision=False).train()
    caption_loss(model, batch()).backward()
    learnt = {name for name, p in model.vision.named_parameters() if p.grad is not None}
    assert learnt == trained
    with torch.no_grad():
        for name, parameter in model.vision.named_parameters():
            if name in trained:
                parameter.add_(0.3 * torch.randn_like(parameter))
    before = model.eval().logits(batch())
    merge_lora(model).save_pretrained(tmp_path / "merged")
    again = Blip2.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again.logits(batch()), before, atol=1e-5, rtol=1e-4)
    plain = Blip2(load_vit(str(folders[0])), qformer(), load_lm(folders[1])).eval()
    assert not torch.allclose(plain.logits(batch()), before, atol=1e-2)


def test_what_cannot_be(folders: tuple[Path, Path]) -> None:
    vision, lm = map(str, folders)
    with pytest.raises(ValueError, match='dtype must be "float32", "bfloat16" or "nf4", not "float16"'):
        load_lm(lm, dtype="float16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"lora_rank \(4\) needs dtype float32, not bfloat16"):
        load_lm(lm, dtype="bfloat16", lora_rank=4)
    with pytest.raises(ValueError, match=r"lora_rank \(4\) needs freeze false and dtype float32, not true and float32"):
        load_vit(vision, freeze=True, lora_rank=4)


def test_what_is_kept_in_bfloat16_may_not_learn_unless_all_does(folders: tuple[Path, Path]) -> None:
    """AdamW's steps of 1e-4 would leave a weight of 0.5 where it is."""
    vision, lm = map(str, folders)
    model = PrefixCaptioner(load_vit(vision), load_lm(lm, dtype="bfloat16"), freeze_decoder=False)
    count = len(list(model.decoder.parameters()))
    module = Captioning(model)
    trainer = {"strategy": None, "precision": "bf16-mixed", "estimated_stepping_batches": 7}
    module.trainer = type("Trainer", (), trainer)()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=rf"{count} of the parameters that learn .* \(captioner\.decoder\."):
        module.configure_optimizers()
    module.trainer.precision = "bf16-true"  # type: ignore[misc]
    assert module.configure_optimizers()
    freeze(model.decoder)
    module.trainer.precision = "bf16-mixed"  # type: ignore[misc]
    assert module.configure_optimizers()


def test_tied_weights_stay_tied() -> None:
    model = cast_frozen(TextDecoder(VOCAB, 24, 1, 4), "bfloat16")
    assert model.embedding_weights[0] is model.embedding_weights[1]
    assert model.embedding_weights[0].dtype == torch.bfloat16


class Linear4bit(torch.nn.Linear):
    """A stand-in for bitsandbytes': sixteen steps of the largest weight, taken when it is asked for."""

    def __init__(self, inputs: int, outputs: int, bias: bool, compute_dtype: torch.dtype, quant_type: str) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.compute_dtype, self.quant_type = compute_dtype, quant_type

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        step = self.weight.abs().max() / 7
        return torch.nn.functional.linear(input, (self.weight / step).round() * step, self.bias)


def test_four_bits_are_for_a_gpu_with_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = TextDecoder(53, 24, 2, 3)
    before = {name: x.clone() for name, x in decoder.state_dict().items()}
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=r'dtype "nf4": four-bit weights are for a GPU, .*: take "bfloat16"'):
        cast_frozen(decoder, "nf4")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match='dtype "nf4" needs bitsandbytes: pip install bitsandbytes'):
        cast_frozen(decoder, "nf4")
    assert all(torch.equal(x, before[name]) for name, x in decoder.state_dict().items())
    assert {x.dtype for x in decoder.parameters()} == {torch.float32}


@pytest.mark.parametrize("tied", [True, False])
def test_four_bits_by_a_stand_in(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    stand_in = SimpleNamespace(nn=SimpleNamespace(Linear4bit=Linear4bit))
    monkeypatch.setitem(sys.modules, "bitsandbytes", stand_in)
    torch.manual_seed(0)
    decoder = TextDecoder(53, 24, 2, 3, tied=tied).eval()
    tokens = torch.randint(53, (2, 7))
    exact = decoder.head(decoder(tokens))
    linear = {name for name, layer in decoder.named_modules() if isinstance(layer, torch.nn.Linear)}
    weights = {name: decoder.get_parameter(f"{name}.weight").clone() for name in linear}
    cast_frozen(decoder, "nf4")
    four = {name for name, layer in decoder.named_modules() if isinstance(layer, Linear4bit)}
    assert four == {name for name in linear if name.startswith("blocks.")}
    for name in four:
        layer: Any = decoder.get_submodule(name)
        assert torch.equal(layer.weight, weights[name].bfloat16())
        assert (layer.compute_dtype, layer.quant_type, layer.weight.requires_grad) == (torch.bfloat16, "nf4", False)
    assert {x.dtype for x in decoder.parameters()} == {torch.bfloat16}
    rounded = decoder.head(decoder(tokens)).float()
    assert 1e-4 < (rounded - exact).abs().max() / exact.abs().max() < 0.5
