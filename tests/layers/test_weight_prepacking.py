import copy
import unittest.mock
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from mmtransformer import TextDecoder, VisionEncoderDecoder, ViT
from mmtransformer.layers import weight_prepacking
from mmtransformer.layers.attention import Attention
from mmtransformer.layers.blocks import MLP
from mmtransformer.layers.config import Activation
from mmtransformer.layers.weight_prepacking import (
    Int8Linear,
    PrepackedLinear,
    _int8_levels,
    for_inference,
    int8_pays,
    prepack_weights,
)
from mmtransformer.layers.weight_prepacking import _memory as memory_of_machine
from tests.support.products import Products, slow_in_bfloat16

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


def vit() -> ViT:
    torch.manual_seed(3)
    return ViT(image_size=28, patch_size=7, dim=22, depth=2, num_heads=2, mlp_dim=37, num_classes=5).eval()


PIXELS = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(5))


def prepacked_layers(model: nn.Module) -> list[PrepackedLinear]:
    return [m for m in model.modules() if isinstance(m, PrepackedLinear)]


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_results_are_the_same(dtype: torch.dtype, most: float):
    plain = vit().to(dtype)
    prepacked = prepack_weights(copy.deepcopy(plain))
    with torch.inference_mode():
        expected, found = plain(PIXELS.to(dtype)), prepacked(PIXELS.to(dtype))
    assert len(prepacked_layers(prepacked)) == 2 * 6 + 2
    joint = [block.attn for block in prepacked.blocks]
    assert all(set(attn._prepacked) == {3} for attn in joint), "queries, keys and values were not one product"
    parts = [layer for attn in joint for layer in (attn.q_proj, attn.k_proj, attn.v_proj)]
    for layer in prepacked_layers(prepacked):
        in_joint = any(layer is part for part in parts)
        assert bool(layer._prepacked) != in_joint, "the prepacked weights were not used, or prepacked twice"
    assert (found - expected).abs().max() <= most * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*jit.* is deprecated")
def test_a_prepacked_model_is_traced_with_its_plain_weights(int8: bool):
    model, plain = prepack_weights(vit(), int8=int8), vit()
    with torch.inference_mode():
        model(PIXELS)  # which prepacks
    with torch.no_grad():
        traced = torch.jit.trace(model, PIXELS, check_trace=False)
        assert torch.allclose(traced(PIXELS), plain(PIXELS), atol=1e-5)


@pytest.mark.parametrize("activation", get_args(Activation))
def test_an_activation_is_computed_with_its_product(activation: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weight_prepacking, "_rows", lambda: weight_prepacking._ANY)
    torch.manual_seed(3)
    plain, x = nn.Sequential(MLP(22, 37, activation=activation)).eval(), torch.randn(3, 5, 22)
    prepacked, calls = prepack_weights(copy.deepcopy(plain)), []
    assert [name for name, _ in prepacked.named_parameters()] == [name for name, _ in plain.named_parameters()]
    with torch.inference_mode():
        torch.testing.assert_close(prepacked(x), plain(x), rtol=1e-5, atol=1e-5)
        with unittest.mock.patch.object(
            PrepackedLinear, "forward", lambda self, x: calls.append(self) or nn.Linear.forward(self, x)
        ):
            prepacked(x)
        fused = activation in ("gelu", "gelu_tanh", "relu")
        assert calls == [prepacked[0].fc2] if fused else calls == [prepacked[0].fc1, prepacked[0].fc2]
        prepacked[0].fc1.register_forward_hook(lambda layer, args, out: calls.append(out.shape))
        prepacked(x)
        assert calls[-1] == (3, 5, 37), "a hook was passed over"
    prepacked(x).sum().backward()
    assert prepacked[0].fc1.weight.grad.any()


@pytest.mark.parametrize(("rows", "pays"), [(1, False), (2, True), (192, True), (193, False)])
def test_without_avx_512_one_row_and_many_are_not_multiplied_with_prepacked_weights(
    rows: int, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zen 3: of 577 rows a prepacked product takes half as long again as torch's, and longer with its activation."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_f": False}, raising=False)
    monkeypatch.setattr(weight_prepacking, "_rows", weight_prepacking._rows.__wrapped__)
    prepacked, eight = prepack_weights(vit()), prepack_weights(vit(), int8=True)
    with torch.inference_mode():
        tokens = torch.randn(rows, 22)
        for model in (prepacked, eight):
            model.blocks[0].mlp(tokens)
    made = [bool(layer._prepacked) for layer in prepacked_layers(prepacked.blocks[0].mlp)]
    assert made == [pays] * 2  # each product by itself, the activation too
    assert all(layer._prepacked for layer in prepacked_layers(eight.blocks[0].mlp))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_f": True}, raising=False)
    assert weight_prepacking._rows() is weight_prepacking._ANY


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_what_reads_the_same_tokens_is_one_product(int8: bool, bias: bool):
    torch.manual_seed(3)
    plain = nn.ModuleDict({"self": Attention(22, 2, bias=bias), "cross": Attention(22, 2, context_dim=13, bias=bias)})
    model, calls = prepack_weights(copy.deepcopy(plain).eval(), int8=int8), []
    x, context = torch.randn(3, 5, 22), torch.randn(3, 7, 13)
    product = type(model["self"].q_proj).product

    def counted(x: torch.Tensor, prepacked: Any, bias: torch.Tensor | None) -> torch.Tensor:
        calls.append(x.shape)
        return product(x, prepacked, bias)

    def both() -> list[torch.Tensor]:
        q, kv = model["self"].project(x)
        return [q, *kv, *model["cross"].project_kv(context)]

    def one_by_one() -> list[torch.Tensor]:
        mine, other = model["self"], model["cross"]
        found = [mine.q_proj(x), mine.k_proj(x), mine.v_proj(x), other.k_proj(context), other.v_proj(context)]
        return [part.unflatten(-1, (2, 11)).transpose(1, 2) for part in found]

    with torch.inference_mode():
        with unittest.mock.patch.object(type(model["self"].q_proj), "product", staticmethod(counted)):
            found = both()
            assert calls == [x.shape, context.shape]
        torch.testing.assert_close(found, one_by_one(), rtol=1e-5, atol=1e-5)
        exact, kv = plain["self"].project(x)
        torch.testing.assert_close(found[:3], [exact, *kv], rtol=0, atol=0.05 if int8 else 1e-5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
        torch.testing.assert_close(both(), one_by_one(), rtol=1e-5, atol=1e-5)
        before = both()
        prepack_weights(model, int8=not int8)
        assert not torch.equal(both()[0], before[0]), "weights prepacked in the other way were used"
        torch.testing.assert_close(both(), one_by_one(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(copy.deepcopy(model)["self"](x), model["self"](x))


def test_parts_that_are_not_alike_are_products_of_their_own():
    torch.manual_seed(3)
    x, plain = torch.randn(3, 5, 22), Attention(22, 2)
    with torch.inference_mode():
        for change in ("hook", "bias", "layer"):
            model, seen = prepack_weights(nn.Sequential(copy.deepcopy(plain)))[0], []
            expected = [model.q_proj(x), model.k_proj(x), model.v_proj(x)]
            if change == "hook":
                model.k_proj.register_forward_hook(lambda layer, args, out, seen=seen: seen.append(out.shape))
            elif change == "bias":
                expected[1] = expected[1] - model.k_proj.bias
                model.k_proj.bias = None
            else:
                model.v_proj = nn.Sequential(model.v_proj)
            q, kv = model.project(x)
            expected = [part.unflatten(-1, (2, 11)).transpose(1, 2) for part in expected]
            torch.testing.assert_close([q, *kv], expected, rtol=1e-5, atol=1e-5)
            assert not model._prepacked
            assert len(seen) == (change == "hook")


def test_parameters_and_state_dict_stay():
    model = vit()
    before, parameters = model.state_dict(), dict(model.named_parameters())
    assert prepack_weights(model) is model
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(before[name].data_ptr() == after[name].data_ptr() for name in before)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    prepack_weights(model)
    assert len(prepacked_layers(model)) == 14


def test_changed_weights_are_prepacked_again():
    model, other = prepack_weights(vit()), vit()
    with torch.no_grad():
        first = model(PIXELS)
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        model.load_state_dict(other.state_dict())
        assert not torch.allclose(model(PIXELS), first)
        torch.testing.assert_close(model(PIXELS), other(PIXELS), rtol=1e-5, atol=1e-5)
        model.to(torch.bfloat16)
        assert model(PIXELS.bfloat16()).dtype == torch.bfloat16


def test_training_goes_around_the_prepacked_weights():
    model, plain = prepack_weights(vit()), vit()
    with torch.no_grad():
        model(PIXELS)
    for m in (model, plain):
        m(PIXELS).square().sum().backward()
    for ours, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad)
    with torch.no_grad():
        for m in (model, plain):
            for parameter in m.parameters():
                parameter -= 0.1 * parameter.grad
        torch.testing.assert_close(model(PIXELS), plain(PIXELS), rtol=1e-5, atol=1e-5)


def test_autocast_and_copies():
    model = prepack_weights(vit())
    with torch.no_grad():
        expected = model(PIXELS)
        torch.testing.assert_close(copy.deepcopy(model)(PIXELS), expected)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(PIXELS), vit()(PIXELS), rtol=0, atol=0)


def test_saved_as_before(tmp_path):
    model = prepack_weights(vit())
    with torch.no_grad():
        expected = model(PIXELS)
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(ViT.from_pretrained(tmp_path)(PIXELS), expected, rtol=1e-5, atol=1e-5)


def test_tied_head_stays_tied():
    decoder = TextDecoder(31, 22, 1, 2, max_len=11, context_dim=22)
    model = prepack_weights(VisionEncoderDecoder(vit(), decoder).eval())
    assert model.decoder.lm_head.weight is model.decoder.tok_embed.weight
    with torch.no_grad():
        hidden = torch.randn(3, 22)
        expected = hidden @ model.decoder.tok_embed.weight.T
        torch.testing.assert_close(model.decoder.head(hidden), expected, rtol=1e-5, atol=1e-5)
    assert isinstance(model.decoder.lm_head, PrepackedLinear)
    assert model.decoder.lm_head._prepacked, "the head went around the prepacked weights"


def test_what_cannot_be_prepacked(monkeypatch):
    with pytest.raises(ValueError, match=r"use PrepackedLinear\(layer\)"):
        prepack_weights(nn.Linear(3, 5))
    double = prepack_weights(nn.Sequential(nn.Linear(3, 5).double()))
    assert not prepacked_layers(double)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(ValueError, match="has none"):
        prepack_weights(vit())


# -------------------------------------------------------------------------------------------------------- eight bits


def test_eight_bits_by_definition() -> None:
    torch.manual_seed(3)
    plain = nn.Linear(37, 23)
    x = torch.randn(2, 5, 37) * torch.tensor([0.1, 1, 10, 100, 1000])[:, None]
    with torch.inference_mode():
        ours = Int8Linear(plain)(x)
        steps = plain.weight.double().abs().amax(1, keepdim=True) / _int8_levels()
        step = x.double().abs().amax(-1, keepdim=True) / 127
        weight, rows = (plain.weight.double() / steps).round() * steps, (x.double() / step).round() * step
        want = rows @ weight.T + plain.bias.double()
    assert ours.shape == (2, 5, 23)
    torch.testing.assert_close(ours.double(), want, atol=1e-4, rtol=1e-4)
    assert not torch.equal(ours, plain(x))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_eight_bits_of_the_largest_numbers_do_not_overflow(sign: float) -> None:
    """Without VNNI a CPU adds up two products in 16 bits, which 255 * 127 * 2 are not."""
    plain = nn.Linear(64, 23, bias=False)
    with torch.no_grad():
        plain.weight.fill_(sign)
        found = Int8Linear(plain)(torch.ones(5, 64))
    torch.testing.assert_close(found, torch.full((5, 23), 64 * sign), atol=1e-3, rtol=0)


@pytest.mark.parametrize("shape", [(37,), (5, 37), (2, 3, 5, 37)])
def test_eight_bits_of_tokens_of_any_shape_and_place(shape: tuple[int, ...]) -> None:
    torch.manual_seed(3)
    layer, x = Int8Linear(nn.Linear(37, 23)), torch.randn(shape)
    rotated = x.movedim(0, -1).contiguous().movedim(-1, 0)
    with torch.inference_mode():
        rows = torch.stack([layer(row[None])[0] for row in x.reshape(-1, 37)])
        torch.testing.assert_close(layer(x), rows.view(*shape[:-1], 23), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(layer(rotated), layer(x), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(layer(torch.stack([x, x], -1)[..., 1]), layer(x), atol=1e-6, rtol=1e-6)


def test_eight_bits_of_a_row_do_not_depend_on_the_rows_beside_it() -> None:
    torch.manual_seed(3)
    layer, x = Int8Linear(nn.Linear(37, 23)), torch.randn(5, 37)
    with torch.inference_mode():
        alone = torch.cat([layer(row) for row in x.split(1)])
        torch.testing.assert_close(layer(x), alone, atol=1e-6, rtol=1e-6)
        x[3] *= 1000
        torch.testing.assert_close(layer(x)[[0, 1, 2, 4]], alone[[0, 1, 2, 4]], atol=1e-6, rtol=1e-6)


def test_eight_bits_are_near_and_follow_the_weight() -> None:
    torch.manual_seed(4)
    model = prepack_weights(nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 11)), int8=True)
    x = torch.randn(7, 64)
    exact = model(x)  # with gradients it is an ordinary linear layer
    with torch.inference_mode():
        near = model(x)
    assert 0 < (near - exact).abs().max() < 0.05 * exact.std()
    with torch.no_grad():
        model[2].weight.mul_(2.0)
        model[2].bias.mul_(2.0)
        torch.testing.assert_close(model(x), 2 * near, atol=1e-5, rtol=1e-4)
    back = prepack_weights(model)  # and back to all bits
    assert type(back[0]) is PrepackedLinear
    with torch.no_grad():
        torch.testing.assert_close(back(x), 2 * exact, atol=1e-4, rtol=1e-4)


def test_eight_bits_of_nothing_but_zeros() -> None:
    plain = nn.Linear(8, 3)
    with torch.no_grad():
        plain.weight.zero_()
        torch.testing.assert_close(Int8Linear(plain)(torch.zeros(2, 8)), plain.bias.expand(2, 3))


# ------------------------------------------------------------------------------------------------------ for inference


def test_a_model_is_made_ready_in_its_precision() -> None:
    kinds = {"fp32": PrepackedLinear, "bf16": PrepackedLinear, "int8": Int8Linear}
    for precision, kind in kinds.items():
        model = vit()
        with torch.inference_mode():
            assert for_inference(model, precision) is model
        assert {type(layer) for layer in prepacked_layers(model)} == {kind}
        assert len(prepacked_layers(model)) == 14
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        model(PIXELS.to(dtype)).sum().backward()  # and may still be trained
    with pytest.raises(ValueError, match='one of fp32, bf16, int8, not "fp16"'):
        for_inference(vit(), "fp16")  # pyright: ignore[reportArgumentType]


def test_prepacked_16_bits_are_float32_where_the_cpu_is_slow_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    slow_in_bfloat16(monkeypatch)
    model = vit()
    for memory, prepacked in ((1e12, True), (0, False)):
        monkeypatch.setattr("mmtransformer.layers.weight_prepacking._memory", lambda memory=memory: memory)
        with torch.no_grad():
            want = model(PIXELS)
            half = for_inference(copy.deepcopy(model), "bf16")
            assert bool(prepacked_layers(half)) == prepacked
            with Products() as made:
                found = half(PIXELS.bfloat16())
        assert found.dtype == torch.bfloat16
        assert made.dtypes == {torch.float32}
        assert (found.float() - want).norm() < 0.02 * want.norm()


def test_weights_that_would_fill_the_memory_are_not_prepacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the memory: each weight counts once, with four bytes, or with one where it is asked for."""
    shared = nn.Linear(10, 25, bias=False)
    make = lambda: nn.Sequential(shared, nn.Linear(25, 10, bias=False), shared)  # noqa: E731
    for memory, prepacked in ((4 * 4 * 500, 3), (4 * 4 * 500 - 1, 0)):
        monkeypatch.setattr("mmtransformer.layers.weight_prepacking._memory", lambda memory=memory: memory)
        assert sum(isinstance(layer, PrepackedLinear) for layer in for_inference(make())) == prepacked
    assert isinstance(for_inference(make(), "int8")[0], Int8Linear)
    monkeypatch.undo()
    assert 2**28 < memory_of_machine() < 2**50
    on_meta = make().to("meta")
    assert not prepacked_layers(for_inference(on_meta))
    with pytest.raises(ValueError, match="int8 weights are for CPUs"):
        for_inference(on_meta, "int8")


def test_merged_low_rank_products_and_new_weights_are_prepacked_anew() -> None:
    from mmtransformer.layers.lora import add_lora, merge_lora

    model = TextDecoder(31, 24, 2, 4, max_len=9).eval()
    tokens = torch.randint(31, (2, 7))

    def logits() -> Tensor:
        with torch.no_grad():
            return model(tokens)

    prepack_weights(model)
    logits()
    add_lora(model, ["q_proj", "v_proj", "fc1"], rank=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    want = logits()
    merge_lora(model)
    torch.testing.assert_close(logits(), want, atol=1e-4, rtol=1e-4)
    for parameter in model.parameters():
        parameter.data.mul_(1.5)  # What nobody can see.
    want = copy.deepcopy(model)(tokens).detach()
    torch.testing.assert_close(prepack_weights(model)(tokens), want)
    torch.testing.assert_close(logits(), want, atol=1e-4, rtol=1e-4)
    layer = model.blocks[0].attn.q_proj
    layer.weight = nn.Parameter(torch.randn(24, 24))
    want = copy.deepcopy(model)(tokens).detach()
    torch.testing.assert_close(logits(), want, atol=1e-4, rtol=1e-4)


def test_another_weight_at_the_same_address_is_another() -> None:
    """As where a weight was replaced, and the next one lies where it lay."""
    layer, x = PrepackedLinear(nn.Linear(3, 3)), torch.eye(3)
    with torch.no_grad():
        first = layer(x)
        old = layer.weight
        layer.weight = nn.Parameter(old.detach())
        old.data.mul_(2.0)  # Neither the address nor the count of changes tells.
        assert (layer.weight.data_ptr(), layer.weight._version) == (old.data_ptr(), old._version)
        torch.testing.assert_close(layer(x) - layer.bias, 2 * (first - layer.bias))
        layer.weight.mul_(2.0)
        torch.testing.assert_close(layer(x) - layer.bias, 4 * (first - layer.bias))


def test_prepacked_attention_keeps_hooks_and_stays_one_where_it_was_one() -> None:
    attn = Attention(24, 4)
    both = nn.ModuleList([nn.Sequential(attn), nn.Sequential(attn)]).eval()
    seen = []
    attn.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    x = torch.randn(2, 5, 24)
    want = attn(x)
    prepack_weights(both)
    assert both[0][0] is both[1][0]
    with torch.no_grad():
        torch.testing.assert_close(both[0](x), want, atol=1e-5, rtol=1e-4)
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("kinds", "cache", "pays"),
    [
        ({"avx512_vnni": True}, 4095, True),
        ({"amx_int8": True}, 4095, True),
        ({"avx512_vnni": True}, 4096, False),  # Two bytes a weight fit: bfloat16 is as fast and rounds less.
        ({"avx2": True}, 0, False),
        ({}, 0, False),
    ],
)
def test_eight_bits_are_for_what_a_cache_does_not_hold(
    kinds: dict[str, bool], cache: int, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: kinds, raising=False)
    monkeypatch.setattr(weight_prepacking, "_last_cache", lambda: cache)
    layer = nn.Linear(32, 32, bias=False)
    twice = nn.Sequential(layer, nn.Linear(32, 32), layer)
    assert int8_pays(twice, torch.device("cpu")) == pays
    assert not int8_pays(twice, torch.device("cuda"))
    assert not int8_pays(twice.to(torch.bfloat16), torch.device("cpu"))


def test_eight_bits_are_not_taken_for_models_never_scored_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx_vnni": True}, raising=False)
    for width, pays in ((31_000, True), (32_000, False)):
        assert int8_pays(nn.Linear(width, width, device="meta"), torch.device("cpu")) == pays


def test_the_cache_is_told_in_bytes() -> None:
    assert 2**20 <= weight_prepacking._last_cache() <= 2**40
