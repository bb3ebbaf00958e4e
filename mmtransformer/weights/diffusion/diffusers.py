"""diffusers' DiT and PixArt -> `DiffusionTransformer`, and back; its AutoencoderKL -> `HFAutoencoder`.

DiT (arXiv:2212.09748) is steered by a class, PixArt (arXiv:2310.00426) by a text. What is drawn with them are an
autoencoder's latents; both may predict a variance too: the last half of `out_channels`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtransformer.backbones.diffusion_transformer import DiffusionTransformer
from mmtransformer.backbones.hf.autoencoder import HFAutoencoder
from mmtransformer.serialization.pretrained import CONFIG, find_folder, load_strictly, read_json
from mmtransformer.serialization.weight_files import read_safetensors
from mmtransformer.weights.shared.configs import only, only_these, read_sizes
from mmtransformer.weights.shared.folders import read_tensors, write_folder
from mmtransformer.weights.shared.keys import export, fill

DIT, PIXART = "DiTTransformer2DModel", "PixArtTransformer2DModel"
"""`_class_name` of a folder's config.json."""

WEIGHTS = "diffusion_pytorch_model.safetensors"

_BOTH = {
    "pos_embed.proj": "patch_embed",
    "transformer_blocks.*.attn1.[to_q,to_k,to_v,to_out.0]": "blocks.*.attn.[q_proj,k_proj,v_proj,out_proj]",
    "transformer_blocks.*.ff.net.[0.proj,2]": "blocks.*.mlp.[fc1,fc2]",
}
_PIXART = _BOTH | {
    "transformer_blocks.*.attn2.[to_q,to_k,to_v,to_out.0]": "blocks.*.cross_attn.[q_proj,k_proj,v_proj,out_proj]",
    "transformer_blocks.*.scale_shift_table": "blocks.*.modulation.table",
    "adaln_single.emb.timestep_embedder.linear_[1,2]": "time_embed.fc[1,2]",
    "adaln_single.linear": "shared_modulation.proj",
    "caption_projection.linear_[1,2]": "context_proj.fc[1,2]",
    "scale_shift_table": "last_modulation.table",
    "proj_out": "head",
}
_DIT = _BOTH | {
    "transformer_blocks.*.norm1.linear": "blocks.*.modulation.proj",
    "transformer_blocks.0.norm1.emb.timestep_embedder.linear_[1,2]": "time_embed.fc[1,2]",
    "transformer_blocks.0.norm1.emb.class_embedder.embedding_table": "class_embed",
    "proj_out_1": "last_modulation.proj",
    "proj_out_2": "head",
}
_EMB = ".norm1.emb."
"""In a DiT's names: the embedding of time and class, of which diffusers keeps a copy in each block."""

_SIZES = {
    "num_attention_heads": "num_heads",
    "num_layers": "depth",
    "in_channels": "in_channels",
    "patch_size": "patch_size",
    "out_channels": "out_channels",
}


def dit_from_diffusers(config: Mapping[str, Any], state: Mapping[str, Tensor], context: str) -> DiffusionTransformer:
    """A transformer of diffusers' as a `DiffusionTransformer`, in evaluation mode; equal to 1e-5.

    Times are in [0, 1] here: diffusers' timestep / 1000.

    Args:
        config: its configuration.
        state: its tensors.
        context: what they come from, for errors.

    Raises:
        ValueError: for a transformer that this class cannot be, and tensors that do not fit.
    """
    kind = config.get("_class_name")
    if kind not in (DIT, PIXART):
        raise ValueError(f'{context}: _class_name is "{kind}", and DiffusionTransformer holds {DIT} and {PIXART}')
    text = kind == PIXART
    config = {"out_channels": config.get("in_channels")} | {k: v for k, v in config.items() if v is not None}
    expected = {"activation_fn": "gelu-approximate", "attention_bias": True, "norm_elementwise_affine": False}
    expected |= {"norm_type": "ada_norm_single" if text else "ada_norm_zero", "norm_eps": 1e-6 if text else 1e-5}
    sizes = read_sizes(config, {**_SIZES, "sample_size": "side", "attention_head_dim": "head_dim"}, context)
    side, dim = sizes.pop("side"), sizes["num_heads"] * sizes.pop("head_dim")
    if text:
        expected |= {"use_additional_conditions": False, "cross_attention_dim": dim}
        if "use_additional_conditions" not in config and side == 128:
            config["use_additional_conditions"] = True  # what diffusers takes for granted
        read_sizes(config, {"caption_channels": "context_dim"}, context)
    only(config, context, expected, "DiffusionTransformer")
    step = config.get("interpolation_scale", max(side // 64, 1)) if text else 1
    model = DiffusionTransformer(
        dim=dim,
        **sizes,
        context_dim=config["caption_channels"] if text else None,
        num_classes=0 if text else int(config.get("num_embeds_ada_norm") or 1000),
        modulation="shared" if text else "block",
        base_grid=side // sizes["patch_size"] // step,
    )
    state = dict(state)
    patches = "pos_embed.proj.weight"
    if patches in state:
        state[patches] = state[patches].flatten(1)
    copies = {name: name.replace(name.split(_EMB)[0], "transformer_blocks.0", 1) for name in state if _EMB in name}
    if differs := [name for name, one in copies.items() if one in state and not torch.equal(state[name], state[one])]:
        raise ValueError(f"{context}: {differs[0]} is not that of block 0, and DiffusionTransformer has one for all")
    fill(model, _PIXART if text else _DIT, state, context, ignored=[n for n, one in copies.items() if n != one])
    return model.eval()


def dit_to_diffusers(model: DiffusionTransformer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors as diffusers has them; a copy of time and class for each of a DiT's blocks.

    Raises:
        ValueError: if neither of its transformers is like this one.
    """
    text, name = model.context_dim is not None, PIXART if model.context_dim is not None else DIT
    only_these(
        name,
        {
            "modulation": (model.modulation, "shared" if text else "block"),
            "num_classes": (model.num_classes > 0, not text),
            "mlp_dim": (model.mlp_dim, 4 * model.dim),
            "bottleneck_dim": (model.bottleneck_dim, None),
            "pooled_context": (model.pooled_context, False),
            "qk_norm": (model.qk_norm, None),
            "conv_width": (model.conv_width, None),
            "base_grid": (model.base_grid is None, False),
        },
    )
    assert model.base_grid is not None
    tensors = export(model, _PIXART if text else _DIT, name)
    patches = "pos_embed.proj.weight"
    tensors[patches] = tensors[patches].unflatten(1, (model.in_channels, model.patch_size, model.patch_size))
    for own in [own for own in tensors if _EMB in own]:
        tensors |= {own.replace(".0.", f".{i}.", 1): tensors[own].clone() for i in range(1, model.depth)}
    config: dict[str, Any] = {"_class_name": name, **{source: getattr(model, ours) for source, ours in _SIZES.items()}}
    config |= {"attention_head_dim": model.dim // model.num_heads, "sample_size": model.base_grid * model.patch_size}
    if text:
        more = {"cross_attention_dim": model.dim, "caption_channels": model.context_dim, "interpolation_scale": 1}
        return config | more | {"use_additional_conditions": False, "norm_type": "ada_norm_single"}, tensors
    return config | {"num_embeds_ada_norm": model.num_classes, "norm_type": "ada_norm_zero"}, tensors


def load_dit(source: str | Path) -> DiffusionTransformer:
    """A transformer out of diffusers' folder: the pipeline's, or its `transformer` alone.

    Args:
        source: the folder, or the name of a hub's repository that has the transformer at its top.

    Raises:
        ValueError: naming what is missing, damaged or otherwise than here.
    """
    folder = find_folder(source)
    folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
    state = read_safetensors(folder / WEIGHTS) if (folder / WEIGHTS).is_file() else read_tensors(folder)
    return dit_from_diffusers(read_json(folder / CONFIG), state, str(folder))


def save_dit(model: DiffusionTransformer, folder: str | Path) -> None:
    """Writes a folder that diffusers' `from_pretrained` reads.

    Raises:
        ValueError: if neither of its transformers is like this one, before anything is written.
    """
    write_folder(folder, *dit_to_diffusers(model), weights=WEIGHTS)


def load_autoencoder(source: str | Path) -> HFAutoencoder:
    """An autoencoder out of diffusers' folder: a pipeline's, or its `vae` alone; needs diffusers.

    Args:
        source: the folder, or the name of a hub's repository that has the autoencoder at its top.

    Raises:
        ValueError: naming what is missing, damaged or otherwise than here.
    """
    folder = find_folder(source)
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    found = HFAutoencoder(read_json(folder / CONFIG))
    load_strictly(found.model, read_safetensors(folder / WEIGHTS), str(folder / WEIGHTS))
    return found
