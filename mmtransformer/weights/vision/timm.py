"""timm's Vision Transformers (ViT, DeiT, DINOv2, CLIP, SigLIP ...) -> `ViT`, and back, in memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from mmtransformer.backbones.grid_rope import ViTRopeConfig
from mmtransformer.backbones.patches import ViTPatchConfig
from mmtransformer.backbones.vit import ViT
from mmtransformer.backbones.vit_blocks import ViTBlockConfig, ViTOutputConfig
from mmtransformer.layers.config import Activation
from mmtransformer.layers.positions import ViTPosEmbedConfig
from mmtransformer.weights.processors.transforms import to_timm_data, with_data
from mmtransformer.weights.shared.configs import only_these
from mmtransformer.weights.shared.keys import part
from mmtransformer.weights.shared.vit import fill_vit, vit_tensors
from mmtransformer.weights.vision.timm_eva import from_eva
from mmtransformer.weights.vision.timm_keys import ACTIVATIONS, POOLS, Pool, norm_eps_of, tower_keys
from mmtransformer.weights.vision.timm_naflex import naflex_parts


@dataclass(frozen=True)
class ViTSettings:
    """What the tensors of a Vision Transformer do not say of themselves; wrong ones give other numbers, not an error.

    Attributes:
        num_heads: attention heads; 12 in ViT-B.
        grid: rows and columns of patches that the tower is for; 14 and 14 at 224 px in patches of 16.
        activation: of the MLPs: "gelu" in the paper, "quick_gelu" in OpenAI's CLIP, "gelu_tanh" in some SigLIPs.
        norm_eps: of the LayerNorms: 1e-6 in the paper's code and timm, 1e-5 in CLIP.
        pool: what `forward` returns; vision towers of captioners do not pool.
        order: where the blocks' norms stand, see `ViTBlockConfig`; parallel blocks are seen by their tensors.
        pool_prefix: whether attention pooling also reads class token and registers.
        pos_embed: how positions are resized, and their own grid where that is another (NaFlexViT).
    """

    num_heads: int
    grid: tuple[int, int]
    activation: Activation | Literal["swiglu"]
    norm_eps: float
    pool: Pool
    order: Literal["pre", "res_post"] = "pre"
    pool_prefix: bool = False
    pos_embed: ViTPosEmbedConfig = ViTPosEmbedConfig()  # noqa: RUF009 (frozen)


def from_timm(model: nn.Module) -> ViT:
    """Our ViT with the weights of a timm `VisionTransformer`, `Eva` or `NaFlexVit`; equal to 1e-5 in float32.

    Raises:
        ValueError: naming what it has and `ViT` has not (other blocks, MLPs or pooling), or if it is no Vision
            Transformer.
    """
    from timm.layers.attention import Attention
    from timm.layers.mlp import GluMlp, Mlp, SwiGLU
    from timm.layers.patch_embed import PatchEmbed
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.eva import Eva
    from timm.models.naflexvit import NaFlexVit
    from timm.models.vision_transformer import Block, ParallelScalingBlock, ResPostBlock, VisionTransformer

    timm_model: Any = model
    context = f"timm's {type(model).__name__}"
    if type(model) is Eva:
        return with_data(from_eva(model), model)
    distilled, naflex = (type(model) is kind for kind in (VisionTransformerDistilled, NaFlexVit))
    if type(model) is not VisionTransformer and not distilled and not naflex:
        raise ValueError(f"{context} is not a VisionTransformer, Eva or NaFlexVit, which alone fit ViT")
    if not naflex and type(timm_model.patch_embed) is not PatchEmbed:
        stem = type(timm_model.patch_embed).__name__
        raise ValueError(f"{context} has a convolutional network in front ({stem}): ViT cuts patches")
    block: Any = timm_model.blocks[0]
    kind: type = type(block)
    parallel = kind is ParallelScalingBlock
    parts: list[tuple[Any, tuple[type, ...]]] = [(block, (Block, ResPostBlock, ParallelScalingBlock))]
    parts += [] if parallel else [(getattr(block, "attn", None), (Attention,))]
    parts += [] if parallel else [(getattr(block, "mlp", None), (Mlp, GluMlp, SwiGLU))]
    for module, kinds in parts:
        if type(module) not in kinds:
            names = ", ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{context} has blocks with {type(module).__name__}: ViT knows {names}")
    pool = timm_model.global_pool
    if pool not in (*POOLS, "") or (timm_model.pool_include_prefix and pool == "avg"):
        raise ValueError(
            f'ViT does not pool like timm\'s global_pool="{pool}" '
            f"(with prefix tokens: {timm_model.pool_include_prefix})"
        )
    activation = block.mlp_act if parallel else block.mlp.act
    name = type(activation).__name__
    if name == "GELU" and getattr(activation, "approximate", "none") == "tanh":
        name = "GELUTanh"
    gated = not parallel and type(block.mlp) is not Mlp
    known: dict[str, Any] = {"SiLU": "swiglu"} if gated else ACTIVATIONS
    if name not in known or getattr(getattr(block, "mlp", None), "gate_last", False):
        raise ValueError(
            f"ViT has no {'gated MLP' if gated else 'activation'} like timm's {name}: it has {', '.join(known)}"
        )
    if gated and timm_model.attn_pool is not None and type(timm_model.attn_pool.mlp.act).__name__ != "GELU":
        raise ValueError(f"{context} pools with an MLP that is not gated and has no gelu, ViT with one that has")
    table, state = ViTPosEmbedConfig(), timm_model.state_dict()
    if naflex:
        grid, table, state = naflex_parts(timm_model)
    else:
        grid = timm_model.patch_embed.grid_size
    settings = ViTSettings(
        block.num_heads if parallel else block.attn.num_heads,
        grid,
        known[name],
        norm_eps_of(model, context),
        "distilled" if distilled else POOLS.get(pool, "class" if timm_model.has_class_token else "mean"),
        "res_post" if kind is ResPostBlock else "pre",
        timm_model.pool_include_prefix and pool == "map",
        table,
    )
    return with_data(vit_from_state(state, settings, context), model)


def vit_from_state(state: Mapping[str, Tensor], settings: ViTSettings, context: str = "the state dict") -> ViT:
    """Our ViT from tensors with timm's names.

    Args:
        state: timm's tensors by name.
        settings: what they do not say.
        context: what the tensors come from, for errors.

    Raises:
        ValueError: if the tensors are not a Vision Transformer's that `ViT` can hold.
    """
    state = _unpacked(state, context)
    for name in ("patch_embed.proj.weight", "pos_embed"):
        if name not in state:
            raise ValueError(f'{context} has no tensor "{name}", so it is not a ViT with timm\'s names')
    dim, channels, patch, width = state["patch_embed.proj.weight"].shape
    if patch != width:
        raise ValueError(f"{context} has patches of {patch} x {width} px, and ViT square ones")
    prefix = [name for name in ("cls_token", "dist_token", "reg_token") if name in state]
    count, has_class = sum(state[name].shape[1] for name in prefix), "cls_token" in state
    places, (rows, columns) = state["pos_embed"].shape[1], settings.pos_embed.grid or settings.grid
    if places not in (rows * columns, rows * columns + count):
        raise ValueError(
            f"{context}: {places} positions are not those of a grid of {rows} x {columns} and {count} prefix tokens"
        )
    block, mlp_dim, packed = _blocks_of(state, settings, context)
    vit = ViT(
        (settings.grid[0] * patch, settings.grid[1] * patch),
        patch,
        dim,
        1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        settings.num_heads,
        mlp_dim=mlp_dim,
        class_token=has_class,
        num_registers=count - has_class,
        pool=settings.pool,
        num_classes=state["head.weight"].shape[0] if "head.weight" in state else 0,
        patches=ViTPatchConfig(
            channels,
            bias="patch_embed.proj.bias" in state,
            pre_norm="norm_pre.weight" in state,
            embed_norm="patch_embed.norm.weight" in state,
            pos_embed=settings.pos_embed,
        ),
        block=block,
        output=ViTOutputConfig(
            "tokens" if "norm.weight" in state else "pooled" if "fc_norm.weight" in state else "none",
            pool_prefix=settings.pool_prefix,
        ),
    )
    keys = tower_keys(block, packed=packed)
    if settings.pool == "distilled":
        keys["head"] = "head.of_class"
    return fill_vit(vit, keys, state, context, positions="pos_embed", prefix=prefix)


def _blocks_of(state: Mapping[str, Tensor], settings: ViTSettings, context: str) -> tuple[ViTBlockConfig, int, bool]:
    """What the blocks are made of, the MLPs' width, and whether gate and up are one matrix."""
    first = part(state, "blocks.0.")
    parallel = "in_proj.q.weight" in first
    last = "mlp_out_proj.weight" if parallel else "mlp.fc2.weight"
    if last not in first:
        raise ValueError(f'{context} has no tensor "blocks.0.{last}", so it is not a ViT with timm\'s names')
    norm = "in_norm" if parallel else "norm1"
    block = ViTBlockConfig(
        settings.activation,
        settings.norm_eps,
        layer_scale=1.0 if "ls1.gamma" in first or "ls.gamma" in first else None,
        norm="layer" if f"{norm}.bias" in first else "rms",
        order="parallel" if parallel else settings.order,
        qkv_bias="attn.qkv.bias" in first or "in_proj.q.bias" in first,
        bias=last.replace("weight", "bias") in first,
        qk_norm="attn.q_norm.weight" in first or "q_norm.weight" in first,
        attn_norm="attn.norm.weight" in first,
        mlp_norm="mlp.norm.weight" in first,
    )
    return block, first[last].shape[1], "mlp.fc1.weight" in first


def _unpacked(state: Mapping[str, Tensor], context: str) -> dict[str, Tensor]:
    """The matrices of parallel blocks, each a layer of the MLP and queries, keys and values, taken apart."""
    found = dict(state)
    for name in [name for name in state if ".in_proj." in name]:
        stem, kind = name.rsplit(".", 1)
        out = state.get(stem.replace("in_proj", "attn_out_proj") + ".weight")
        if out is None:
            raise ValueError(f"{context} has {name} without the block's attn_out_proj")
        sizes = [len(found[name]) - 3 * len(out), *[len(out)] * 3]
        for layer, tensor in zip(("mlp", "q", "k", "v"), found.pop(name).split(sizes), strict=True):
            found[f"{stem}.{layer}.{kind}"] = tensor
        alone = stem.replace("in_proj", "mlp_bias")
        if alone in found:
            found[f"{stem}.mlp.bias"] = found.pop(alone)
    return found


def to_timm(vit: ViT) -> dict[str, Tensor]:
    """Tensors with timm's names, for a timm `VisionTransformer` of the same shape; prefix tokens' positions are 0."""
    if vit.patches.stem != "patch":
        raise ValueError(
            f'timm has no ViT with our stem="{vit.patches.stem}"; only stem="patch" can be written with its names'
        )
    only_these(
        "timm's VisionTransformer",
        {
            "rope": (vit.rope, ViTRopeConfig()),
            "pos_embed": (vit.patches.pos_embed, ViTPosEmbedConfig()),
            "pool_heads": (vit.output.pool_heads or vit.num_heads, vit.num_heads),
            "pool": (vit.pool if vit.pool == "distilled" else None, None),
        },
    )
    keys = tower_keys(vit.block, packed=vit.block.norm == "layer")
    return vit_tensors(vit, keys, "timm", positions="pos_embed", prefix=["cls_token", "reg_token"])


def timm_config(vit: ViT) -> dict[str, Any]:
    """The config.json with which timm builds a `VisionTransformer` for these tensors.

    Raises:
        ValueError: if timm's arguments cannot say what this tower is.
    """
    block, gated = vit.block, vit.block.activation == "swiglu"
    known = {  # What no argument of JSON's can say, an architecture says.
        ("layer", 1e-6, False): "vit_base_patch16_224",
        ("layer", 1e-5, False): "vit_base_patch16_clip_224",
        ("layer", 1e-6, True): "vit_giant_patch14_dinov2",
        ("rms", 1e-5, True): "aimv2_large_patch14_224",
    }
    kind = (block.norm, block.norm_eps, gated)
    if kind not in known or vit.patches.bias == vit.patches.pre_norm or block.order != "pre":
        raise ValueError(
            f"timm has names for ViTs of the kinds (norm, norm_eps, gated) {', '.join(map(str, known))}, with pre-norm "
            f"blocks and biases of patches where there is no norm before the blocks; this has {kind}, "
            f"order {block.order}, bias {vit.patches.bias}, pre_norm {vit.patches.pre_norm}"
        )
    if vit.patches.embed_norm != (block.norm == "rms") or (gated and vit.pool == "attention"):
        raise ValueError(
            f"timm's {known[kind]} has embed_norm {block.norm == 'rms'} and, where it is gated, no attention pooling; "
            f"this has embed_norm {vit.patches.embed_norm} and pool {vit.pool}"
        )
    activations = {"gelu": "gelu", "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "silu": "silu"}
    if not gated and block.activation not in activations:
        raise ValueError(f"timm's ViTs are not built with {block.activation} by a name")
    width = vit.mlp_dim * (2 if gated and block.norm == "layer" else 1)
    return {
        "architecture": known[kind],
        "num_classes": vit.num_classes,
        "num_features": vit.dim,
        "global_pool": (pool := {ours: theirs for theirs, ours in POOLS.items()}[vit.pool]),
        "model_args": {
            "img_size": list(vit.image_size),
            "patch_size": vit.patch_size,
            "in_chans": vit.patches.in_channels,
            "embed_dim": vit.dim,
            "depth": vit.depth,
            "num_heads": vit.num_heads,
            "mlp_ratio": (width + 0.5) / vit.dim,  # timm rounds down.
            "init_values": block.layer_scale,
            "class_token": vit.class_token,
            "reg_tokens": vit.num_registers,
            "pre_norm": vit.patches.pre_norm,
            "final_norm": vit.output.norm != "none",
            "fc_norm": vit.output.norm == "pooled",
            "pool_include_prefix": vit.output.pool_prefix,
            "global_pool": pool,
            "qkv_bias": block.qkv_bias,
            "proj_bias": block.bias,
            "qk_norm": block.qk_norm,
            "scale_attn_norm": block.attn_norm,
            "scale_mlp_norm": block.mlp_norm,
        }
        | ({} if gated else {"act_layer": activations[block.activation]}),
        "pretrained_cfg": {
            "input_size": [vit.patches.in_channels, *vit.image_size],
            "num_classes": vit.num_classes,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
        | ({} if vit.transform is None else to_timm_data(vit.transform)),
    }
