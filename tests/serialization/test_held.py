"""Loading takes neither a copy of the weights nor random numbers, and a file may be replaced while its model lives."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BlipConfig, BlipForConditionalGeneration

from mmtransformer import TextDecoder, ViT
from mmtransformer.serialization.pretrained import load_strictly
from mmtransformer.serialization.untrusted import built_from
from mmtransformer.serialization.weight_files import read_safetensors, write_weights
from mmtransformer.weights import (
    ViTSettings,
    from_transformers,
    load_blip,
    load_lm,
    load_vit,
    save_blip,
    save_lm,
    to_timm,
)

SMALL = {"hidden_size": 24, "intermediate_size": 29, "num_hidden_layers": 2, "num_attention_heads": 3}


def blip() -> BlipForConditionalGeneration:
    torch.manual_seed(1)
    return BlipForConditionalGeneration(BlipConfig(text_config=SMALL, vision_config=SMALL | {"image_size": 32}))


def places(module: nn.Module) -> set[int]:
    return {parameter.data_ptr() for parameter in module.parameters()}


def test_what_was_read_becomes_the_model() -> None:
    state = {"0.weight": torch.randn(3, 5), "0.bias": torch.randn(3), "1.weight": torch.randn(3, 2, 3)[:, 0]}
    with built_from(state, "x"):
        model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 3, bias=False))
        load_strictly(model, state, "x")
    named = dict(model.named_parameters())
    assert [named[name].data_ptr() == state[name].data_ptr() for name in state] == [True, True, False]  # one has gaps
    assert all(torch.equal(named[name], state[name]) for name in state)


def test_what_is_a_callers_is_copied() -> None:
    state = {"weight": torch.randn(3, 5), "bias": torch.randn(3)}
    model = nn.Linear(5, 3)
    load_strictly(model, state, "x")
    peer = blip()
    assert not places(model) & {tensor.data_ptr() for tensor in state.values()}
    assert not places(from_transformers(peer)) & places(peer)


def test_other_number_formats_are_converted() -> None:
    state = {"weight": torch.randn(3, 5).half(), "bias": torch.randn(3)}
    with built_from(state, "x"):
        load_strictly(model := nn.Linear(5, 3), state, "x")
    assert (model.weight.dtype, model.bias.data_ptr()) == (torch.float32, state["bias"].data_ptr())
    assert torch.equal(model.weight, state["weight"].float())


def test_two_parameters_stay_two_and_one_stays_one() -> None:
    """A file may give one tensor to two parameters; they learn apart unless they are tied."""
    shared = torch.randn(3, 3)
    with built_from({"x": shared}, "x"):
        model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
        load_strictly(model, {"0.weight": shared, "1.weight": shared}, "x")
        tied = nn.Sequential(*[nn.Linear(3, 3, bias=False)] * 2)
        load_strictly(tied, {"0.weight": shared.clone()}, "x")
    assert len(places(model)) == 2
    assert torch.equal(model[0].weight, model[1].weight)
    assert tied[0].weight is tied[1].weight


@pytest.mark.parametrize("family", ["timm", "gpt2", "blip", "own"])
def test_weights_lie_in_the_file_and_no_random_number_is_drawn(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    if family == "timm":
        write_weights(path, to_timm(ViT(16, 8, 64, 2, 1)))
    elif family == "gpt2":
        save_lm(TextDecoder(97, 16, 2, 2, max_len=24), tmp_path)
    elif family == "blip":
        save_blip(from_transformers(blip()), tmp_path)  # type: ignore[arg-type]
    else:
        TextDecoder(97, 16, 2, 2, max_len=24).save_pretrained(tmp_path)
    read: set[int] = set()

    def watched(file: Path) -> dict[str, torch.Tensor]:
        found = read_safetensors(file)
        read.update(tensor.untyped_storage().data_ptr() for tensor in found.values())
        return found

    for module in ("serialization.pretrained", "weights.shared.folders", "weights.vision.load"):
        monkeypatch.setattr(f"mmtransformer.{module}.read_safetensors", watched, raising=False)
    before = torch.get_rng_state()
    source = path if family == "timm" else tmp_path
    tower = partial(load_vit, settings=ViTSettings(1, (2, 2), "gelu", 1e-6, "class"))
    load = {"timm": tower, "gpt2": load_lm, "blip": load_blip, "own": TextDecoder.from_pretrained}[family]
    model = load(source)
    if family != "timm":  # A tower may have parts that its file does not fill, such as another head.
        assert torch.equal(torch.get_rng_state(), before)
    made = [name for name, p in model.named_parameters() if p.untyped_storage().data_ptr() not in read]
    if family == "gpt2":  # which keeps matrices the other way round
        assert all(name.startswith("blocks.") and name.endswith(".weight") for name in made)
    else:  # the class token, to which its position was added
        assert made == {"timm": ["prefix_tokens"], "blip": ["vision.prefix_tokens"], "own": []}[family]
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_a_file_is_replaced_while_its_model_lives(tmp_path: Path) -> None:
    """Training goes on and is saved where it began: no model sees the other's numbers, nor does the process die."""
    TextDecoder(97, 16, 2, 2, max_len=24).save_pretrained(tmp_path)
    model, first = TextDecoder.from_pretrained(tmp_path), TextDecoder.from_pretrained(tmp_path)
    before = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in first.state_dict().items())
    model.save_pretrained(tmp_path)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["config.json", "model.safetensors"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in first.state_dict().items())
    again = TextDecoder.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, before[name] + 1) for name, tensor in again.state_dict().items())


def test_whole_numbers_are_no_weights() -> None:
    """They have been quantised, and nobody says by what to multiply them."""
    state = {"weight": torch.ones(3, 5, dtype=torch.int8), "bias": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"x does not fit Linear; number formats: weight is torch\.int8"):
        load_strictly(nn.Linear(5, 3), state, "x")
