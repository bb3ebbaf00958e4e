"""OpenFlamingo's resampler and gated layers -> `Flamingo`, and back. Language models and towers come from elsewhere.

A checkpoint holds what was trained: `perceiver.*`, `lang_encoder.<layers>.N.gated_cross_attn_layer.*` and, context the
language model got new tokens, its embedding, which belongs to the decoder that is given here.
"""

import re

from torch import Tensor

from mmtransformer.backbones.base import Decoder
from mmtransformer.backbones.vit import ViT
from mmtransformer.captioners.flamingo import Flamingo
from mmtransformer.captioners.image_attention_mask import VisibleImages
from mmtransformer.connectors.resampler import PerceiverResampler
from mmtransformer.serialization.pretrained import load_strictly
from mmtransformer.weights.shared.keys import Row, convert, convert_back, layer

_GATED = re.compile(r"^(?:.*\.)?(\d+)\.gated_cross_attn_layer\.(.+)$")
_HEAD_DIM = 64  # The peer's, whatever the widths.


def _resampler_table(resampler: PerceiverResampler) -> list[Row]:
    rows = [Row("perceiver.latents", ("latents",))]
    rows += [Row("perceiver.frame_embs", ("frame_embed",))] * (resampler.max_frames is not None)
    rows += [Row("perceiver.media_time_embs", ("image_embed",))] * (resampler.max_images is not None)
    for n in range(resampler.depth):
        attn, mlp, ours = f"perceiver.layers.{n}.0", f"perceiver.layers.{n}.1", f"blocks.{n}"
        rows += layer(f"{attn}.norm_media", f"{ours}.norm_context") + layer(
            f"{attn}.norm_latents", f"{ours}.norm1"
        )
        rows += _attention(attn, f"{ours}.attn")
        rows += _mlp(mlp, f"{ours}.norm2", f"{ours}.mlp")
    return rows + layer("perceiver.norm", "last_norm")


def _gated_table(number: int, block: int) -> list[Row]:
    theirs, ours = f"{number}", f"{block}"
    rows = [
        Row(f"{theirs}.attn_gate", (f"{ours}.attn_gate",)),
        Row(f"{theirs}.ff_gate", (f"{ours}.mlp_gate",)),
    ]
    rows += layer(f"{theirs}.attn.norm", f"{ours}.norm1") + _attention(f"{theirs}.attn", f"{ours}.attn")
    return rows + _mlp(f"{theirs}.ff", f"{ours}.norm2", f"{ours}.mlp")


def _attention(theirs: str, ours: str) -> list[Row]:
    return [
        *layer(f"{theirs}.to_q", f"{ours}.q_proj", bias=False),
        *layer(f"{theirs}.to_kv", f"{ours}.k_proj", f"{ours}.v_proj", bias=False),
        *layer(f"{theirs}.to_out", f"{ours}.out_proj", bias=False),
    ]


def _mlp(theirs: str, norm: str, ours: str) -> list[Row]:
    return [
        *layer(f"{theirs}.0", norm),
        *layer(f"{theirs}.1", f"{ours}.fc1", bias=False),
        *layer(f"{theirs}.3", f"{ours}.fc2", bias=False),
    ]


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
    load_strictly(resampler, convert(_resampler_table(resampler), perceiver, context), context)
    first = layers[0]
    model = Flamingo(
        vision,
        decoder,
        resampler=resampler,
        cross_layers=layers,
        num_heads=gated[f"{first}.attn.to_q.weight"].shape[0] // _HEAD_DIM,
        head_dim=_HEAD_DIM,
        mlp_dim=gated[f"{first}.ff.1.weight"].shape[0],
        mlp_without_image=True,
        visible_images=visible_images,
        patches_only=True,
    )
    table = [row for block, number in enumerate(layers) for row in _gated_table(number, block)]
    load_strictly(model.gated_blocks, convert(table, gated, context), context)
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
    if resampler is None:
        raise ValueError("OpenFlamingo always has a resampler, this captioner has none")
    differs = [
        f"{name}={found!r}"
        for name, found, wanted in (
            ("resampler.activation", resampler.activation, "gelu"),
            ("resampler.qk_norm", resampler.qk_norm, None),
            ("resampler.head_dim", resampler.head_dim, _HEAD_DIM),
            ("resampler.norm_eps", resampler.norm_eps, 1e-5),
            ("head_dim", model.head_dim, _HEAD_DIM),
            ("mlp", model.mlp, "gelu"),
            ("norm", model.norm, "layer"),
            ("norm_eps", model.norm_eps, 1e-5),
            ("qk_norm", model.qk_norm, None),
            ("per_channel", model.per_channel, False),
        )
        if found != wanted
    ]
    if differs:
        raise ValueError(f"OpenFlamingo has nothing like {', '.join(differs)}")
    theirs = convert_back(_resampler_table(resampler), dict(resampler.state_dict()))
    if "perceiver.media_time_embs" in theirs:
        theirs["perceiver.media_time_embs"] = theirs["perceiver.media_time_embs"][:, None]
    ours = dict(model.gated_blocks.state_dict())
    for block, number in enumerate(model.cross_layers):
        for name, tensor in convert_back(_gated_table(number, block), ours).items():
            rest = name.removeprefix(f"{number}.")
            theirs[f"lang_encoder.{layers}.{number}.gated_cross_attn_layer.{rest}"] = tensor
    return theirs
