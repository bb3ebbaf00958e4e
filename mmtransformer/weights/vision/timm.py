"""timm's Vision Transformers (ViT, DeiT, DINOv2, CLIP, SigLIP ...) -> `ViT`, and back, in memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from mmtransformer.backbones.patches import PatchConfig
from mmtransformer.backbones.vit import BlockConfig, ViT
from mmtransformer.layers.config import Activation
from mmtransformer.weights.vision.common import fill_vit, vit_tensors

Pool = Literal["class", "mean", "attention"]
POOLS: dict[str, Pool] = {"token": "class", "avg": "mean", "map": "attention"}
"""timm's names of ways to pool, and the library's."""

_ACTIVATIONS: dict[str, Activation] = {
    "GELU": "gelu",
    "GELUTanh": "gelu_tanh",
    "QuickGELU": "quick_gelu",
    "SiLU": "silu",
}
_KEYS = {
    "patch_embed.proj": "patch_embed.proj",
    "norm_pre": "first_norm",
    "blocks.*.norm[1,2]": "blocks.*.norm[1,2]",
    "blocks.*.attn.qkv": "blocks.*.attn.[q,k,v]_proj",
    "blocks.*.attn.proj": "blocks.*.attn.out_proj",
    "blocks.*.mlp.fc[1,2]": "blocks.*.mlp.fc[1,2]",
    "blocks.*.ls[1,2].gamma": "blocks.*.branch[1,2].0.gamma",
    "norm": "norm",
    "fc_norm": "pool_norm",
    "attn_pool.latent": "attn_pool.queries",
    "attn_pool.q": "attn_pool.attn.q_proj",
    "attn_pool.kv": "attn_pool.attn.[k,v]_proj",
    "attn_pool.proj": "attn_pool.attn.out_proj",
    "attn_pool.norm": "attn_pool.norm",
    "attn_pool.mlp.fc[1,2]": "attn_pool.mlp.fc[1,2]",
    "head": "head",
}


@dataclass(frozen=True)
class ViTSettings:
    """What the tensors of a Vision Transformer do not say of themselves; wrong ones give other numbers, not an error.

    Attributes:
        num_heads: attention heads; 12 in ViT-B.
        grid: rows and columns of patches that positions are for; 14 and 14 at 224 px in patches of 16.
        activation: of the MLPs: "gelu" in the paper, "quick_gelu" in OpenAI's CLIP, "gelu_tanh" in some SigLIPs.
        norm_eps: of the LayerNorms: 1e-6 in the paper's code and timm, 1e-5 in CLIP.
        pool: what `forward` returns; vision towers of captioners do not pool.
    """

    num_heads: int
    grid: tuple[int, int]
    activation: Activation
    norm_eps: float
    pool: Pool


def from_timm(model: nn.Module) -> ViT:
    """Our ViT with the weights of a timm `VisionTransformer`; equal to 1e-5 in float32.

    Raises:
        ValueError: naming what it has and `ViT` has not (other blocks, query/key norms, gated MLPs, other pooling),
            or if it is no Vision Transformer.
    """
    from timm.layers.attention import Attention
    from timm.layers.mlp import Mlp
    from timm.models.vision_transformer import Block, VisionTransformer

    timm_model: Any = model
    context = f"timm's {type(model).__name__}"
    if type(model) is not VisionTransformer:
        raise ValueError(f"{context} is not a VisionTransformer, which alone fits ViT")
    block = timm_model.blocks[0]
    for part, kinds in (
        (block, Block),
        (getattr(block, "attn", None), Attention),
        (getattr(block, "mlp", None), Mlp),
    ):
        if type(part) is not kinds:
            raise ValueError(f"{context} has blocks with {type(part).__name__}: ViT knows {kinds.__name__}")
    pool = timm_model.global_pool
    if pool not in (*POOLS, "") or (timm_model.pool_include_prefix and pool in ("avg", "map")):
        raise ValueError(
            f'ViT does not pool like timm\'s global_pool="{pool}" '
            f"(with prefix tokens: {timm_model.pool_include_prefix})"
        )
    name = type(block.mlp.act).__name__
    if name == "GELU" and getattr(block.mlp.act, "approximate", "none") == "tanh":
        name = "GELUTanh"
    if name not in _ACTIVATIONS:
        raise ValueError(f"ViT has no activation like timm's {name}: it has {', '.join(_ACTIVATIONS)}")
    epsilons = {m.eps for m in timm_model.modules() if isinstance(m, nn.LayerNorm)}
    if len(epsilons) > 1:
        raise ValueError(f"{context} has norms with eps {sorted(epsilons)}: ViT's have one")
    settings = ViTSettings(
        block.attn.num_heads,
        timm_model.patch_embed.grid_size,
        _ACTIVATIONS[name],
        epsilons.pop(),
        POOLS.get(pool, "class" if timm_model.has_class_token else "mean"),
    )
    return vit_from_state(timm_model.state_dict(), settings, context)


def vit_from_state(
    state: Mapping[str, Tensor], settings: ViTSettings, context: str = "the state dict"
) -> ViT:
    """Our ViT from tensors with timm's names.

    Args:
        state: timm's tensors by name.
        settings: what they do not say.
        context: what the tensors come from, for errors.

    Raises:
        ValueError: if the tensors are not a Vision Transformer's that `ViT` can hold.
    """
    for name in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"):
        if name not in state:
            raise ValueError(f'{context} has no tensor "{name}", so it is not a ViT with timm\'s names')
    dim, channels, patch, width = state["patch_embed.proj.weight"].shape
    if patch != width:
        raise ValueError(f"{context} has patches of {patch} x {width} px, and ViT square ones")
    prefix = [name for name in ("cls_token", "reg_token") if name in state]
    count, has_class = sum(state[name].shape[1] for name in prefix), "cls_token" in state
    places, (rows, columns) = state["pos_embed"].shape[1], settings.grid
    if places not in (rows * columns, rows * columns + count):
        raise ValueError(
            f"{context}: {places} positions are not those of a grid of {rows} x {columns} and {count} prefix tokens"
        )
    vit = ViT(
        (rows * patch, columns * patch),
        patch,
        dim,
        1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        settings.num_heads,
        mlp_dim=state["blocks.0.mlp.fc1.weight"].shape[0],
        class_token=has_class,
        num_registers=count - has_class,
        pool=settings.pool,
        num_classes=state["head.weight"].shape[0] if "head.weight" in state else 0,
        patches=PatchConfig(channels, bias="patch_embed.proj.bias" in state, norm="norm_pre.weight" in state),
        block=BlockConfig(
            settings.activation,
            settings.norm_eps,
            layer_scale=1.0 if "blocks.0.ls1.gamma" in state else None,
        ),
        last_norm="tokens" if "norm.weight" in state else "pooled" if "fc_norm.weight" in state else "none",
    )
    return fill_vit(vit, _KEYS, state, context, positions="pos_embed", prefix=prefix)


def to_timm(vit: ViT) -> dict[str, Tensor]:
    """Tensors with timm's names, for a timm `VisionTransformer` of the same shape; prefix tokens' positions are 0."""
    if vit.patches.stem != "patch":
        raise ValueError(
            f'timm has no ViT with our stem="{vit.patches.stem}"; only stem="patch" can be written with its names'
        )
    return vit_tensors(vit, _KEYS, "timm", positions="pos_embed", prefix=["cls_token", "reg_token"])


def timm_config(vit: ViT) -> dict[str, Any]:
    """The config.json with which timm builds a `VisionTransformer` for these tensors.

    Raises:
        ValueError: if timm's arguments cannot say what this tower is.
    """
    known = {1e-6: "vit_base_patch16_224", 1e-5: "vit_base_patch16_clip_224"}
    if vit.block.norm_eps not in known or vit.patches.bias == vit.patches.norm:
        raise ValueError(
            f"timm's ViTs have norm_eps {' or '.join(map(str, known))}, and biases of patches where there is no norm "
            f"before the blocks; this has {vit.block.norm_eps}, bias {vit.patches.bias}, norm {vit.patches.norm}"
        )
    activations = {"gelu": "gelu", "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "silu": "silu"}
    if vit.block.activation not in activations:
        raise ValueError(f"timm's ViTs are not built with {vit.block.activation} by a name")
    return {
        "architecture": known[vit.block.norm_eps],
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
            "mlp_ratio": (vit.mlp_dim + 0.5) / vit.dim,  # timm rounds down.
            "init_values": vit.block.layer_scale,
            "class_token": vit.class_token,
            "reg_tokens": vit.num_registers,
            "pre_norm": vit.patches.norm,
            "final_norm": vit.last_norm != "none",
            "fc_norm": vit.last_norm == "pooled",
            "global_pool": pool,
            "act_layer": activations[vit.block.activation],
        },
        "pretrained_cfg": {
            "input_size": [vit.patches.in_channels, *vit.image_size],
            "num_classes": vit.num_classes,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
