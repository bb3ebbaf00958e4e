"""OpenFlamingo's resampler and gated layers -> `Flamingo`, and back. Language models and towers come from elsewhere.

A checkpoint holds what was trained: `perceiver.*`, `lang_encoder.<layers>.N.gated_cross_attn_layer.*` and, context the
language model got new tokens, its embedding, which belongs to the decoder that is given here.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from mmtransformer.backbones.base import Decoder
from mmtransformer.backbones.vit import ViT
from mmtransformer.captioners.flamingo import Flamingo, GatedConfig
from mmtransformer.captioners.image_attention_mask import VisibleImages
from mmtransformer.connectors.resampler import PerceiverResampler
from mmtransformer.serialization.untrusted import built_from
from mmtransformer.weights.shared.configs import only_these
from mmtransformer.weights.shared.folders import read_state, write_folder
from mmtransformer.weights.shared.keys import export, fill

_GATED = re.compile(r"^(?:.*\.)?(\d+)\.gated_cross_attn_layer\.(.+)$")
_HEAD_DIM = 64  # The peer's, whatever the widths.


_RESAMPLER = {
    "perceiver.latents": "latents",
    "perceiver.[frame,media_time]_embs": "[frame,image]_embed",
    "perceiver.layers.*.0.norm_[media,latents]": "blocks.*.[norm_context,norm1]",
    "perceiver.layers.*.0.to_q": "blocks.*.attn.q_proj",
    "perceiver.layers.*.0.to_kv": "blocks.*.attn.[k,v]_proj",
    "perceiver.layers.*.0.to_out": "blocks.*.attn.out_proj",
    "perceiver.layers.*.1.[0,1,3]": "blocks.*.[norm2,mlp.fc1,mlp.fc2]",
    "perceiver.norm": "last_norm",
}
_BLOCKS = {
    "*.[attn,ff]_gate": "*.[attn,mlp]_gate",
    "*.attn.norm": "*.norm1",
    "*.attn.to_q": "*.attn.q_proj",
    "*.attn.to_kv": "*.attn.[k,v]_proj",
    "*.attn.to_out": "*.attn.out_proj",
    "*.ff.[0,1,3]": "*.[norm2,mlp.fc1,mlp.fc2]",
}


def from_openflamingo(
    state: dict[str, Tensor],
    vision: ViT,
    decoder: Decoder,
    *,
    visible_images: VisibleImages = "last",
    context: str = "the state dict",
) -> Flamingo:
    """A `Flamingo` with OpenFlamingo's trained weights between a vision tower and a language model, both frozen.

    Args:
        state: its tensors by name, with or without those of the towers, which are not read.
        vision: the vision tower, of CLIP for the released weights; its class token is left out, as there.
        decoder: the language model, its vocabulary already with the added tokens.
        visible_images: which pictures a token sees.
        context: what the tensors come from, for errors.

    Raises:
        ValueError: if tensors are missing, or do not fit the towers.
    """
    perceiver = {name: tensor for name, tensor in state.items() if name.startswith("perceiver.")}
    gated: dict[str, Tensor] = {}
    for name, tensor in state.items():
        found = _GATED.match(name)
        if found and "old_decoder_blocks" not in name:
            gated[f"{found[1]}.{found[2]}"] = tensor
    for name in ("perceiver.latents", "perceiver.layers.0.0.to_q.weight", "perceiver.layers.0.1.1.weight"):
        if name not in perceiver:
            raise ValueError(f'{context} has no tensor "{name}", so it is not OpenFlamingo\'s')
    layers = sorted({int(name.split(".")[0]) for name in gated})
    if not layers:
        raise ValueError(f"{context} has no gated_cross_attn_layer, so it is not OpenFlamingo's")
    latents, queries = perceiver["perceiver.latents"], perceiver["perceiver.layers.0.0.to_q.weight"]
    times = perceiver.get("perceiver.media_time_embs")
    frames = perceiver.get("perceiver.frame_embs")
    resampler = PerceiverResampler(
        latents.shape[1],
        1 + max(int(name.split(".")[2]) for name in perceiver if name.startswith("perceiver.layers.")),
        queries.shape[0] // _HEAD_DIM,
        _HEAD_DIM,
        latents.shape[0],
        mlp_dim=perceiver["perceiver.layers.0.1.1.weight"].shape[0],
        max_frames=None if frames is None else frames.shape[0],
        max_images=None if times is None else times.shape[0],
    )
    if times is not None:
        perceiver["perceiver.media_time_embs"] = times.flatten(0, 1)
    fill(resampler, _RESAMPLER, perceiver, context)
    first = layers[0]
    model = Flamingo(
        vision,
        decoder,
        resampler=resampler,
        cross_layers=layers,
        gated=GatedConfig(
            num_heads=gated[f"{first}.attn.to_q.weight"].shape[0] // _HEAD_DIM,
            head_dim=_HEAD_DIM,
            mlp_dim=gated[f"{first}.ff.1.weight"].shape[0],
            mlp_without_image=True,
        ),
        visible_images=visible_images,
        patches_only=True,
    )
    fill(model.gated_blocks, _block_keys(layers), gated, context)
    return model.eval()


def to_openflamingo(model: Flamingo, layers: str = "model.layers") -> dict[str, Tensor]:
    """OpenFlamingo's trained tensors, by the names in its checkpoints.

    Args:
        model: a captioner of OpenFlamingo's kind.
        layers: where the language model keeps its list of layers there: "transformer.blocks" for MPT, "model.layers"
            for Llama, "gpt_neox.layers", "model.decoder.layers" for OPT, "transformer.h" for GPT-2.

    Raises:
        ValueError: if it is of another kind.
    """
    resampler = model.resampler
    if not isinstance(resampler, PerceiverResampler):
        raise ValueError(
            "OpenFlamingo always has a resampler, a PerceiverResampler; this captioner has "
            + ("none" if resampler is None else f"a {type(resampler).__name__}")
        )
    only_these(
        "OpenFlamingo",
        {
            "resampler.activation": (resampler.activation, "gelu"),
            "resampler.qk_norm": (resampler.qk_norm, None),
            "resampler.head_dim": (resampler.head_dim, _HEAD_DIM),
            "resampler.norm_eps": (resampler.norm_eps, 1e-5),
            "gated.head_dim": (model.gated.head_dim, _HEAD_DIM),
            "gated.mlp": (model.gated.mlp, "gelu"),
            "gated.norm": (model.gated.norm, "layer"),
            "gated.norm_eps": (model.gated.norm_eps, 1e-5),
            "gated.qk_norm": (model.gated.qk_norm, None),
            "gated.per_channel": (model.gated.per_channel, False),
        },
    )
    source = export(resampler, _RESAMPLER, "OpenFlamingo")
    if "perceiver.media_time_embs" in source:
        source["perceiver.media_time_embs"] = source["perceiver.media_time_embs"][:, None]
    gated = export(model.gated_blocks, _block_keys(model.cross_layers), "OpenFlamingo")
    for name, tensor in gated.items():
        number, _, rest = name.partition(".")
        source[f"lang_encoder.{layers}.{number}.gated_cross_attn_layer.{rest}"] = tensor
    return source


def _block_keys(layers: Sequence[int]) -> dict[str, str]:
    """The gated blocks' table: there, they are numbered as the layers that they stand in."""
    return {
        key.replace("*", str(number)): value.replace("*", str(block))
        for block, number in enumerate(layers)
        for key, value in _BLOCKS.items()
    }


def load_openflamingo(
    source: str | Path, vision: ViT, decoder: Decoder, *, visible_images: VisibleImages = "last"
) -> Flamingo:
    """A `Flamingo` from a file or folder that `save_openflamingo` wrote, or one converted from a checkpoint.

    The published checkpoints are pickles, which this library does not open: `torch.load(path, weights_only=True)` and
    `safetensors.torch.save_file` make a file of one.

    Args:
        source: a `.safetensors` file, a folder with `model.safetensors`, or the name of a hub's repository.
        vision: see `from_openflamingo`, as all that follow.
        decoder: the language model.
        visible_images: which pictures a token sees.

    Raises:
        ValueError: naming what is missing or does not fit.
    """
    state, context = read_state(source)
    with built_from(state, context):
        return from_openflamingo(state, vision, decoder, visible_images=visible_images, context=context)


def save_openflamingo(model: Flamingo, folder: str | Path, *, layers: str = "model.layers") -> None:
    """Writes OpenFlamingo's trained tensors as `model.safetensors`, and how many layers stand between two of them.

    Args:
        model: a captioner of OpenFlamingo's kind; its towers are not written.
        folder: where to.
        layers: see `to_openflamingo`.

    Raises:
        ValueError: if it is of another kind, before anything is written.
    """
    first, *others = model.cross_layers
    config = {"model_type": "openflamingo", "cross_attn_every_n_layers": others[0] - first if others else 1}
    write_folder(folder, config, to_openflamingo(model, layers))
