"""transformers' Idefics (the first one, after Flamingo) -> `Flamingo`, and back: towers, resampler, gated layers."""

from typing import Any

import torch
from torch import Tensor, nn

from mmtransformer.backbones.base import Decoder
from mmtransformer.backbones.decoder import TextDecoder
from mmtransformer.backbones.extended_vocabulary import ExtendedVocabulary
from mmtransformer.backbones.patches import PatchConfig
from mmtransformer.backbones.vit import BlockConfig, ViT
from mmtransformer.captioners.flamingo import Flamingo
from mmtransformer.captioners.image_attention_mask import VisibleImages
from mmtransformer.connectors.resampler import PerceiverResampler
from mmtransformer.weights.shared.configs import activation_of
from mmtransformer.weights.shared.keys import export, fill, nested, part
from mmtransformer.weights.text.llama import decoder_from_llama, decoder_to_llama
from mmtransformer.weights.vision.common import fill_vit, vit_tensors

_ROWS, _HEAD = "model.embed_tokens.additional_embedding.weight", "lm_head.additional_fc.weight"
RESAMPLER = {
    "latents": "latents",
    "blocks.*.0.[context,latents]_layer_norm": "blocks.*.[norm_context,norm1]",
    "blocks.*.0.[q_proj,k_proj,v_proj,output_proj]": "blocks.*.attn.[q_proj,k_proj,v_proj,out_proj]",
    "blocks.*.0.[q,k]_layer_norm": "blocks.*.attn.[q,k]_norm",
    "blocks.*.1.[ln,fc,c_proj]": "blocks.*.[norm2,mlp.fc1,mlp.fc2]",
    "layer_norm": "last_norm",
}
"""The key table of `IdeficsPerceiverResampler`."""

GATED = {
    "alpha_[cross_attn,dense]": "[attn,mlp]_gate",
    "[input,post_attention]_layernorm": "norm[1,2]",
    "cross_attn.[q_proj,k_proj,v_proj,o_proj]": "attn.[q_proj,k_proj,v_proj,out_proj]",
    "cross_attn.[q,k]_layer_norm": "attn.[q,k]_norm",
    "mlp.[gate,up,down]_proj": "mlp.[gate,up,down]_proj",
}
"""The key table of `IdeficsGatedCrossAttentionLayer`."""

_GATED = nested(GATED, source="*.", target="*.")
_TOWER = {
    "embeddings.patch_embedding": "patch_embed.proj",
    "pre_layrnorm": "first_norm",
    "encoder.layers.*.layer_norm[1,2]": "blocks.*.norm[1,2]",
    "encoder.layers.*.self_attn.[q_proj,k_proj,v_proj,out_proj]": "blocks.*.attn.[q_proj,k_proj,v_proj,out_proj]",
    "encoder.layers.*.mlp.fc[1,2]": "blocks.*.mlp.fc[1,2]",
}
_POSITIONS, _CLASS = "embeddings.position_embedding.weight", "embeddings.class_embedding"


def from_idefics(model: nn.Module, *, visible_images: VisibleImages = "last") -> Flamingo:
    """A `Flamingo` with all weights of a transformers `IdeficsForVisionText2Text` that has a resampler.

    Its resampler reads the vision tower's tokens without their last norm and norms them itself, so here the tower's
    last norm is the plain one: a norm of a norm changes nothing but rounding.

    Args:
        model: the model.
        visible_images: which pictures a token sees; there, the caller's mask says.

    Raises:
        ValueError: if it has no resampler, or a part is of another kind than ours.
    """
    config: Any = model.config
    context = f"transformers' {type(model).__name__}"
    if not config.use_resampler:
        raise ValueError(
            f"{context}: without a resampler it reads tokens that are not normed, which ViT does not give"
        )
    state = dict(model.state_dict())
    text = {"model_type": "llama"} | {
        name: getattr(config, name)
        for name in (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
            "rms_norm_eps", "hidden_act", "rope_parameters",
        )
    }  # fmt: skip
    text |= {"vocab_size": config.vocab_size, "tie_word_embeddings": config.tie_word_embeddings}
    others = (
        "model.vision_model.",
        "model.perceiver_resampler.",
        "model.gated_cross_attn_layers.",
        _ROWS,
        _HEAD,
    )
    words = {name: tensor for name, tensor in state.items() if not name.startswith(others)}
    decoder = _with_more_words(decoder_from_llama(text, words, context), state)
    vision = _vision(config.vision_config, part(state, "model.vision_model."), context)
    perceiver = config.perceiver_config
    qk_norm = perceiver.qk_layer_norms_perceiver
    resampler = PerceiverResampler(
        vision.dim,
        perceiver.resampler_depth,
        perceiver.resampler_n_heads,
        perceiver.resampler_head_dim,
        perceiver.resampler_n_latents,
        activation="relu",
        qk_norm="layer" if qk_norm else None,
    )
    fill(resampler, RESAMPLER, part(state, "model.perceiver_resampler."), context)
    flamingo = Flamingo(
        vision,
        decoder,
        resampler=resampler,
        cross_layers=list(range(0, decoder.depth, config.cross_layer_interval)),
        num_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        mlp="swiglu",
        mlp_dim=config.intermediate_size,
        norm="rms",
        norm_eps=config.rms_norm_eps,
        qk_norm="rms" if config.qk_layer_norms else None,
        per_channel=config.alpha_type == "vector",
        mlp_without_image=True,
        visible_images=visible_images,
    )
    gated = {
        n: t.flatten() if "alpha" in n else t
        for n, t in part(state, "model.gated_cross_attn_layers.").items()
    }
    fill(flamingo.gated_blocks, _GATED, gated, context)
    return flamingo.eval()


def to_idefics(model: Flamingo) -> dict[str, Tensor]:
    """Tensors named as in `IdeficsForVisionText2Text`; an `ExtendedVocabulary`'s new tokens are the additional ones.

    The tower's last norm must be the plain one, as `from_idefics` makes it: there, nobody reads it.

    Raises:
        ValueError: if the captioner is of another kind.
    """
    resampler, vision = model.resampler, model.vision
    longer = model.decoder if isinstance(model.decoder, ExtendedVocabulary) else None
    decoder = model.decoder if longer is None else longer.decoder
    if (
        not isinstance(decoder, TextDecoder)
        or resampler is None
        or model.mlp != "swiglu"
        or model.norm != "rms"
    ):
        raise ValueError(
            f"Idefics has a Llama, a resampler, mlp swiglu and norm rms, not {type(decoder).__name__}, "
            f"{'a' if resampler else 'no'} resampler, mlp {model.mlp} and norm {model.norm}"
        )
    last = vision.norm.state_dict()
    plain = {"weight": torch.ones_like(last["weight"]), "bias": torch.zeros_like(last["bias"])}
    kept = [name for name, tensor in last.items() if not torch.equal(tensor, plain[name])]
    if kept or not vision.patches.norm or resampler.activation != "relu":
        raise ValueError(
            f"Idefics has a vision tower with norm_pre and a plain last norm, and activation relu in the resampler; "
            f"this one has norm_pre {vision.patches.norm}, a last norm with {kept or 'nothing'} of its own, and "
            f"{resampler.activation}"
        )
    source = decoder_to_llama(decoder)
    if longer is not None:
        if longer.first != decoder.vocab_size:
            raise ValueError(
                f"Idefics has its additional words behind the other {decoder.vocab_size}, not from id {longer.first}"
            )
        source[_ROWS] = longer.new_embed.weight.detach()
        source[_HEAD] = source[_ROWS] if longer.new_head is None else longer.new_head.weight.detach()
    tower = vit_tensors(vision, _TOWER, "Idefics", positions=_POSITIONS, prefix=[_CLASS], kept=("norm.",))
    tower |= {_POSITIONS: tower[_POSITIONS][0], _CLASS: tower[_CLASS][0, 0]}
    tower |= {f"post_layernorm.{name}": tensor for name, tensor in plain.items()}
    gated = {
        name: tensor[None, None] if "alpha" in name and model.per_channel else tensor
        for name, tensor in export(model.gated_blocks, _GATED, "Idefics").items()
    }
    for place, tensors in (
        ("vision_model", tower),
        ("perceiver_resampler", export(resampler, RESAMPLER, "Idefics")),
        ("gated_cross_attn_layers", gated),
    ):
        source |= {f"model.{place}.{name}": tensor for name, tensor in tensors.items()}
    return source


def _with_more_words(decoder: TextDecoder, state: dict[str, Tensor]) -> Decoder:
    """The decoder with the additional vocabulary, if there is one: its rows learn, as they do there."""
    if _ROWS not in state:
        return decoder
    longer = ExtendedVocabulary(decoder, len(state[_ROWS]))
    with torch.no_grad():
        longer.new_embed.weight.copy_(state[_ROWS])
        if longer.new_head is not None:
            longer.new_head.weight.copy_(state[_HEAD])
    return longer


def _vision(config: Any, state: dict[str, Tensor], context: str) -> ViT:
    activation = activation_of(config.to_dict(), "hidden_act", context)
    vision = ViT(
        config.image_size,
        config.patch_size,
        config.embed_dim,
        config.num_hidden_layers,
        config.num_attention_heads,
        mlp_dim=config.intermediate_size,
        patches=PatchConfig(config.num_channels, bias=False, norm=True),
        block=BlockConfig(activation, config.layer_norm_eps),
    )
    plain = {"norm.weight": torch.ones(vision.dim), "norm.bias": torch.zeros(vision.dim)}
    unread = ["post_layernorm.weight", "post_layernorm.bias", "embeddings.position_ids"]
    return fill_vit(
        vision, _TOWER, state, context, positions=_POSITIONS, prefix=[_CLASS], ignored=unread, extra=plain
    )
