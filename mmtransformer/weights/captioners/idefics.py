"""transformers' Idefics (the first one, after Flamingo) -> `Flamingo`, and back: towers, resampler, gated layers."""

from typing import Any

import torch
from torch import Tensor, nn

from mmtransformer.backbones.base import Decoder
from mmtransformer.backbones.decoder import TextDecoder
from mmtransformer.backbones.extended_vocabulary import ExtendedVocabulary
from mmtransformer.backbones.vit import ViT
from mmtransformer.captioners.flamingo import Flamingo
from mmtransformer.captioners.image_attention_mask import VisibleImages
from mmtransformer.connectors.resampler import PerceiverResampler
from mmtransformer.serialization.pretrained import load_strictly
from mmtransformer.weights.shared.keys import Row, convert, convert_back, layer
from mmtransformer.weights.text.llama import decoder_from_llama, decoder_to_llama

_ROWS, _HEAD = "model.embed_tokens.additional_embedding.weight", "lm_head.additional_fc.weight"
_ACTIVATIONS = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def resampler_table(depth: int, *, qk_norm: bool, prefix: str = "") -> list[Row]:
    """The rows of `IdeficsPerceiverResampler`."""
    rows = [Row(f"{prefix}latents", ("latents",))]
    for n in range(depth):
        attn, mlp, ours = f"{prefix}blocks.{n}.0", f"{prefix}blocks.{n}.1", f"blocks.{n}"
        rows += layer(f"{attn}.context_layer_norm", f"{ours}.norm_context")
        rows += layer(f"{attn}.latents_layer_norm", f"{ours}.norm1")
        for name in ("q", "k", "v"):
            rows += layer(f"{attn}.{name}_proj", f"{ours}.attn.{name}_proj", bias=False)
        rows += layer(f"{attn}.output_proj", f"{ours}.attn.out_proj", bias=False)
        if qk_norm:
            rows += layer(f"{attn}.q_layer_norm", f"{ours}.attn.q_norm")
            rows += layer(f"{attn}.k_layer_norm", f"{ours}.attn.k_norm")
        rows += layer(f"{mlp}.ln", f"{ours}.norm2") + layer(f"{mlp}.fc", f"{ours}.mlp.fc1", bias=False)
        rows += layer(f"{mlp}.c_proj", f"{ours}.mlp.fc2", bias=False)
    return rows + layer(f"{prefix}layer_norm", "last_norm")


def gated_table(*, qk_norm: bool, theirs: str = "", ours: str = "") -> list[Row]:
    """The rows of `IdeficsGatedCrossAttentionLayer`; prefixes end with a dot."""
    rows = [
        Row(f"{theirs}alpha_cross_attn", (f"{ours}attn_gate",)),
        Row(f"{theirs}alpha_dense", (f"{ours}mlp_gate",)),
    ]
    rows += layer(f"{theirs}input_layernorm", f"{ours}norm1", bias=False)
    rows += layer(f"{theirs}post_attention_layernorm", f"{ours}norm2", bias=False)
    for there, here in (
        ("q_proj", "q_proj"),
        ("k_proj", "k_proj"),
        ("v_proj", "v_proj"),
        ("o_proj", "out_proj"),
    ):
        rows += layer(f"{theirs}cross_attn.{there}", f"{ours}attn.{here}", bias=False)
    if qk_norm:
        rows += layer(f"{theirs}cross_attn.q_layer_norm", f"{ours}attn.q_norm", bias=False)
        rows += layer(f"{theirs}cross_attn.k_layer_norm", f"{ours}attn.k_norm", bias=False)
    for name in ("gate_proj", "up_proj", "down_proj"):
        rows += layer(f"{theirs}mlp.{name}", f"{ours}mlp.{name}", bias=False)
    return rows


def _vision_table(depth: int) -> list[Row]:
    rows = [Row("embeddings.patch_embedding.weight", ("patch_embed.proj.weight",))]
    rows += layer("pre_layrnorm", "first_norm")
    for n in range(depth):
        theirs, ours = f"encoder.layers.{n}", f"blocks.{n}"
        rows += layer(f"{theirs}.layer_norm1", f"{ours}.norm1") + layer(
            f"{theirs}.layer_norm2", f"{ours}.norm2"
        )
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            rows += layer(f"{theirs}.self_attn.{name}", f"{ours}.attn.{name}")
        rows += layer(f"{theirs}.mlp.fc1", f"{ours}.mlp.fc1") + layer(f"{theirs}.mlp.fc2", f"{ours}.mlp.fc2")
    return rows


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
    parts = (
        "model.vision_model.",
        "model.perceiver_resampler.",
        "model.gated_cross_attn_layers.",
        _ROWS,
        _HEAD,
    )
    words = {name: tensor for name, tensor in state.items() if not name.startswith(parts)}
    decoder = _with_more_words(decoder_from_llama(text, words, context), state)
    vision = _vision(config.vision_config, _under(state, "model.vision_model."), context)
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
    table = resampler_table(resampler.depth, qk_norm=qk_norm)
    load_strictly(resampler, convert(table, _under(state, "model.perceiver_resampler."), context), context)
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
        for n, t in _under(state, "model.gated_cross_attn_layers.").items()
    }
    load_strictly(flamingo.gated_blocks, convert(_gated_rows(flamingo), gated, context), context)
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
    if kept or not vision.norm_pre or resampler.activation != "relu":
        raise ValueError(
            f"Idefics has a vision tower with norm_pre and a plain last norm, and activation relu in the resampler; "
            f"this one has norm_pre {vision.norm_pre}, a last norm with {kept or 'nothing'} of its own, and "
            f"{resampler.activation}"
        )
    theirs = decoder_to_llama(decoder)
    if longer is not None:
        if longer.first != decoder.vocab_size:
            raise ValueError(
                f"Idefics has its additional words behind the other {decoder.vocab_size}, not from id {longer.first}"
            )
        theirs[_ROWS] = longer.new_embed.weight.detach()
        theirs[_HEAD] = theirs[_ROWS] if longer.new_head is None else longer.new_head.weight.detach()
    tower = convert_back(_vision_table(vision.depth), dict(vision.state_dict()))
    patches = tower["embeddings.patch_embedding.weight"]
    tower["embeddings.patch_embedding.weight"] = patches.unflatten(
        1, (vision.in_channels, vision.patch_size, vision.patch_size)
    )
    assert vision.prefix_tokens is not None
    tower["embeddings.class_embedding"] = vision.prefix_tokens[0, 0].detach()
    positions = vision.pos_embed[0].detach()
    tower["embeddings.position_embedding.weight"] = torch.cat((torch.zeros_like(positions[:1]), positions))
    tower |= {f"post_layernorm.{name}": tensor for name, tensor in plain.items()}
    theirs |= {f"model.vision_model.{name}": tensor for name, tensor in tower.items()}
    table = resampler_table(
        resampler.depth, qk_norm=resampler.qk_norm is not None, prefix="model.perceiver_resampler."
    )
    theirs |= convert_back(table, dict(resampler.state_dict()))
    gated = convert_back(_gated_rows(model), dict(model.gated_blocks.state_dict()))
    for name, tensor in gated.items():
        vector = "alpha" in name and model.per_channel
        theirs[f"model.gated_cross_attn_layers.{name}"] = tensor[None, None] if vector else tensor
    return theirs


def _gated_rows(model: Flamingo) -> list[Row]:
    qk_norm = model.qk_norm is not None
    blocks = range(len(model.cross_layers))
    return [row for n in blocks for row in gated_table(qk_norm=qk_norm, theirs=f"{n}.", ours=f"{n}.")]


def _under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


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
    if config.hidden_act not in _ACTIVATIONS:
        raise ValueError(
            f"{context}: ViT has no activation like {config.hidden_act}: it has {', '.join(_ACTIVATIONS)}"
        )
    vision = ViT(
        config.image_size,
        config.patch_size,
        config.embed_dim,
        config.num_hidden_layers,
        config.num_attention_heads,
        mlp_dim=config.intermediate_size,
        in_channels=config.num_channels,
        activation=_ACTIVATIONS[config.hidden_act],  # pyright: ignore[reportArgumentType]
        norm_eps=config.layer_norm_eps,
        patch_bias=False,
        norm_pre=True,
    )
    positions = state.pop("embeddings.position_embedding.weight")
    first = state.pop("embeddings.class_embedding") + positions[0]
    unread = ["post_layernorm.weight", "post_layernorm.bias", "embeddings.position_ids"]
    ours = convert(_vision_table(vision.depth), state, context, ignored=unread)
    ours["patch_embed.proj.weight"] = ours["patch_embed.proj.weight"].flatten(1)
    ours |= {"prefix_tokens": first[None, None], "pos_embed": positions[None, 1:]}
    ours |= {"norm.weight": torch.ones(vision.dim), "norm.bias": torch.zeros(vision.dim)}
    load_strictly(vision, ours, context)
    return vision
