"""diffusers' DiT and PixArt beside `DiffusionTransformer`, both holding the same weights, in both directions."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmtransformer import DiffusionTransformer
from mmtransformer.weights import dit_from_diffusers, dit_to_diffusers, load_dit, save_dit

SIZES: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 3,
    "out_channels": 5,
    "num_layers": 3,
    "patch_size": 2,
}
KINDS = {
    "DiTTransformer2DModel": SIZES | {"sample_size": 8, "num_embeds_ada_norm": 7},
    "PixArtTransformer2DModel": SIZES | {"sample_size": 8, "cross_attention_dim": 24, "caption_channels": 7},
    "PixArtTransformer2DModel, finer": SIZES
    | {"sample_size": 12, "cross_attention_dim": 24, "caption_channels": 7, "interpolation_scale": 2},
}


@pytest.fixture(scope="module")
def diffusers() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("diffusers")


def theirs(diffusers: Any, kind: str) -> Any:
    torch.manual_seed(0)
    model = getattr(diffusers, kind.split(",")[0])(**KINDS[kind])
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 0.1)
    if kind.startswith("DiT"):  # The published ones hold the same time and classes in every block.
        first = model.transformer_blocks[0].norm1.emb.state_dict()
        for block in model.transformer_blocks:
            block.norm1.emb.load_state_dict(first)
    return model.eval()


def exact(module: Any, args: tuple[torch.Tensor], waves: torch.Tensor) -> torch.Tensor:
    """diffusers tells a time in float32 even where all else is float64."""
    i = torch.arange(128, dtype=torch.float64)
    rates = torch.exp(-math.log(10_000) * i / (128 - module.downscale_freq_shift))
    angles = args[0].double()[:, None] * rates
    found = torch.cat((angles.cos(), angles.sin()), dim=1)
    torch.testing.assert_close(found, waves.double(), atol=1e-4, rtol=0)
    return found


def compare(reference: Any, ours: DiffusionTransformer, kind: str) -> None:
    """In float64, with padded texts, on images of other sizes than the model's own too."""
    reference, ours, generator = reference.double(), ours.double(), torch.Generator().manual_seed(1)
    for module in reference.modules():
        if type(module).__name__ == "Timesteps":
            module.register_forward_hook(exact)
    steps = torch.tensor([37, 801])
    times = steps.double() / 1000
    with torch.no_grad():
        for size in ((8, 8), (16, 16), (8, 12)):
            if kind.startswith("DiT") and size[0] != size[1]:
                continue  # diffusers' gives back squares alone.
            images = torch.randn(2, 3, *size, generator=generator, dtype=torch.float64)
            if kind.startswith("DiT"):
                labels = torch.tensor([4, 7])  # 7 = any
                want = reference(images, steps, labels, return_dict=False)[0]
                found = ours(images, times, labels=labels)
            else:
                context = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
                mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
                want = reference(images, context, steps, encoder_attention_mask=mask.double(), return_dict=False)[0]
                found = ours(images, times, context, context_mask=mask)
            # diffusers' positions are in float32.
            torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_diffusers_in_both_directions(diffusers: Any, kind: str, tmp_path: Path) -> None:
    reference = theirs(diffusers, kind)
    reference.save_pretrained(tmp_path / "pipeline" / "transformer")
    ours = load_dit(tmp_path / "pipeline")
    assert not ours.training
    compare(reference, ours, kind)
    save_dit(ours.float(), tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = type(reference).from_pretrained(tmp_path / "ours", low_cpu_mem_usage=False)
    reference, given = reference.float().state_dict(), again.state_dict()
    assert given.keys() == reference.keys()
    assert all(torch.equal(given[name], reference[name]) for name in given)
    compare(again, ours, kind)


def make(**changes: Any) -> DiffusionTransformer:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"num_classes": 7, "modulation": "block", "base_grid": 4}
    model = DiffusionTransformer(2, 3, 24, 3, 2, **settings | changes)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def test_a_block_with_a_time_of_its_own_is_refused() -> None:
    config, tensors = dit_to_diffusers(make())
    name = "transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.weight"
    assert tensors[name].data_ptr() != tensors[name.replace(".2.", ".0.")].data_ptr()
    tensors[name] = tensors[name] + 1
    with pytest.raises(ValueError, match=r"here: transformer_blocks\.2\.norm1\.emb\..* is not that of block 0"):
        dit_from_diffusers(config, tensors, "here")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, '_class_name is "FluxTransformer2DModel"'),
        ({"use_additional_conditions": True}, "use_additional_conditions is True"),
        ({"use_additional_conditions": None, "sample_size": 128}, "use_additional_conditions is True"),
        ({"caption_channels": None}, "the config lacks caption_channels"),
        ({"num_layers": None}, "the config lacks num_layers"),
        ({"num_layers": 4}, r"missing: transformer_blocks\.3"),
        ({"activation_fn": "geglu"}, "activation_fn is 'geglu', and DiffusionTransformer has only"),
    ],
)
def test_what_cannot_be_loaded_is_said(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_dit(make(context_dim=7, num_classes=0, modulation="shared"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | changes), "utf-8")
    with pytest.raises(ValueError, match=message):
        load_dit(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_dim": 7}, "PixArtTransformer2DModel has nothing like modulation='block', num_classes=True"),
        ({"modulation": "shared"}, "DiTTransformer2DModel has nothing like modulation='shared'"),
        ({"mlp_dim": 50}, "mlp_dim=50"),
        ({"bottleneck_dim": 5}, "bottleneck_dim=5"),
        ({"qk_norm": "rms"}, "qk_norm='rms'"),
        ({"context_dim": 7, "num_classes": 0, "modulation": "shared", "pooled_context": True}, "pooled_context=True"),
        ({"base_grid": None}, "base_grid=True"),
    ],
)
def test_what_cannot_be_written_is_said(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        save_dit(make(**changes), tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_a_folder_without_weights_is_said(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(dit_to_diffusers(make())[0]), "utf-8")
    with pytest.raises(ValueError, match=r"has neither model\.safetensors nor .*; was it downloaded whole"):
        load_dit(tmp_path)
