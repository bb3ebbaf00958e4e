"""timm's Vision Transformers (ViT, DeiT, DINOv2, CLIP, SigLIP ...) -> `ViT`, and back."""

import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmtransformer.backbones.patches import PatchConfig
from mmtransformer.backbones.vit import BlockConfig, ViT
from mmtransformer.captioners.base import Captioner
from mmtransformer.captioners.base import freeze as freeze_module
from mmtransformer.layers.config import Activation
from mmtransformer.layers.lora import add_lora
from mmtransformer.serialization.pretrained import (
    CONFIG,
    WEIGHTS,
    Pretrained,
    load_strictly,
    read_json,
    read_safetensors,
)
from mmtransformer.serialization.untrusted import built_from
from mmtransformer.weights.shared.dtype import DType, cast_frozen
from mmtransformer.weights.vision.common import fill_vit, vit_tensors

_KEYS = {
    "patch_embed.proj": "patch_embed.proj",
    "norm_pre": "first_norm",
    "blocks.*.norm[1,2]": "blocks.*.norm[1,2]",
    "blocks.*.attn.qkv": "blocks.*.attn.[q,k,v]_proj",
    "blocks.*.attn.proj": "blocks.*.attn.out_proj",
    "blocks.*.mlp.fc[1,2]": "blocks.*.mlp.fc[1,2]",
    "blocks.*.ls[1,2].gamma": "blocks.*.branch[1,2].0.gamma",
    "norm": "norm",
    "attn_pool.latent": "attn_pool.queries",
    "attn_pool.q": "attn_pool.attn.q_proj",
    "attn_pool.kv": "attn_pool.attn.[k,v]_proj",
    "attn_pool.proj": "attn_pool.attn.out_proj",
    "attn_pool.norm": "attn_pool.norm",
    "attn_pool.mlp.fc[1,2]": "attn_pool.mlp.fc[1,2]",
    "head": "head",
}


def from_timm(model: nn.Module) -> ViT:
    """Our ViT with the weights of a timm `VisionTransformer`; equal to 1e-5 in float32.

    Raises:
        ValueError: if it is no Vision Transformer, or has parts that `ViT` does not (query/key norms, gated MLPs, a
            norm after pooling).
    """
    from timm.models.vision_transformer import VisionTransformer

    timm_model: Any = model
    if not isinstance(model, VisionTransformer):
        raise ValueError(f"timm's {type(model).__name__} is not a VisionTransformer, which alone fits ViT")
    pools = {"token": "class", "avg": "mean", "map": "attention", "": None}
    if timm_model.global_pool not in pools or (
        timm_model.pool_include_prefix and timm_model.global_pool == "avg"
    ):
        raise ValueError(
            f'ViT does not pool like timm\'s global_pool="{timm_model.global_pool}" '
            f"(with prefix tokens: {timm_model.pool_include_prefix})"
        )
    block = timm_model.blocks[0]
    activations: dict[str, Activation] = {
        "GELU": "gelu",
        "GELUTanh": "gelu_tanh",
        "QuickGELU": "quick_gelu",
        "SiLU": "silu",
    }
    name = type(block.mlp.act).__name__
    if name == "GELU" and getattr(block.mlp.act, "approximate", "none") == "tanh":
        name = "GELUTanh"
    if name not in activations:
        raise ValueError(f"ViT has no activation like timm's {name}: it has {', '.join(activations)}")
    return vit_from_state(
        timm_model.state_dict(),
        num_heads=block.attn.num_heads,
        grid=timm_model.patch_embed.grid_size,
        activation=activations[name],
        norm_eps=block.norm1.eps,
        pool=pools[timm_model.global_pool],
        context=f"timm's {type(model).__name__}",
    )


def vit_from_state(
    state: dict[str, Tensor],
    *,
    num_heads: int | None = None,
    grid: tuple[int, int] | None = None,
    activation: Activation = "gelu",
    norm_eps: float = 1e-6,
    pool: str | None = None,
    context: str = "the state dict",
) -> ViT:
    """Our ViT from tensors with timm's names; what shapes do not say is given, or as the paper's.

    Args:
        state: timm's tensors by name.
        num_heads: heads; None = dim / 64, as in all sizes from Ti to L.
        grid: rows and columns of patches; None = square.
        activation: of the MLPs.
        norm_eps: of the LayerNorms.
        pool: "class", "mean" or "attention"; None = what the tensors allow, in this order: attention, class, mean.
        context: what the tensors come from, for errors.

    Raises:
        ValueError: if the tensors are not a Vision Transformer's that `ViT` can hold.
    """
    for name in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight", "norm.weight"):
        if name not in state:
            hint = (
                ": it norms after pooling (fc_norm), which ViT does not do"
                if "fc_norm.weight" in state and name == "norm.weight"
                else ""
            )
            raise ValueError(f'{context} has no tensor "{name}", so it is not a ViT with timm\'s names{hint}')
    dim, channels, patch, _ = state["patch_embed.proj.weight"].shape
    prefix = [name for name in ("cls_token", "reg_token") if name in state]
    count, has_class = sum(state[name].shape[1] for name in prefix), "cls_token" in state
    places = state["pos_embed"].shape[1]
    embedded = places - (math.prod(grid) if grid else math.isqrt(places) ** 2)
    if embedded not in (0, count):
        raise ValueError(f"{context}: {places} positions are not those of a grid and {count} prefix tokens")
    rows, columns = grid or (math.isqrt(places - embedded),) * 2
    if pool is None:
        pool = "attention" if "attn_pool.latent" in state else "class" if has_class else "mean"
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    scale = state.get("blocks.0.ls1.gamma")
    pools: dict[str, Literal["class", "mean", "attention"]] = {
        "class": "class",
        "mean": "mean",
        "attention": "attention",
    }
    vit = ViT(
        (rows * patch, columns * patch),
        patch,
        dim,
        depth,
        num_heads or dim // 64,
        mlp_dim=state["blocks.0.mlp.fc1.weight"].shape[0],
        class_token=has_class,
        num_registers=count - has_class,
        pool=pools[pool],
        num_classes=state["head.weight"].shape[0] if "head.weight" in state else 0,
        patches=PatchConfig(channels, bias="patch_embed.proj.bias" in state, norm="norm_pre.weight" in state),
        block=BlockConfig(activation, norm_eps, layer_scale=None if scale is None else 1.0),
    )
    return fill_vit(vit, _KEYS, state, context, positions="pos_embed", prefix=prefix)


def to_timm(vit: ViT) -> dict[str, Tensor]:
    """Tensors with timm's names, for a timm `VisionTransformer` of the same shape; prefix tokens' positions are 0."""
    if vit.patches.stem != "patch":
        raise ValueError(
            f'timm has no ViT with our stem="{vit.patches.stem}"; only stem="patch" can be written with its names'
        )
    return vit_tensors(vit, _KEYS, "timm", positions="pos_embed", prefix=["cls_token", "reg_token"])


def load_vit(
    source: str,
    *,
    image_size: int | tuple[int, int] | None = None,
    freeze: bool = False,
    keep_head: bool = False,
    dtype: DType = "float32",
    lora_rank: int = 0,
    lora_targets: Sequence[str] = ("q_proj", "v_proj"),
) -> ViT:
    """A pretrained ViT, from what is there: for recipes (`class_path: mmtransformer.load_vit`).

    Args:
        source: a folder (a ViT saved by this library, or a captioner, whose tower is taken, or `config.json` and
            `model.safetensors` with timm's names), a `.safetensors` file with timm's names, or the name of a timm
            model, which timm then fetches from the hub.
        image_size: picture size to resize the positions to, px; None = as trained.
        freeze: whether the tower is taken out of training.
        keep_head: whether a classifier is kept; captioners do not read it.
        dtype: "bfloat16" keeps a tower that stays frozen in half the memory.
        lora_rank: width of low-rank products that learn beside the frozen weights, see `add_lora`; 0 = none. A bridge
            must then not freeze the tower itself (freeze_vision: false).
        lora_targets: ends of the names of the layers that get them.

    Raises:
        ValueError: naming what is missing or does not fit.
    """
    if lora_rank and (freeze or dtype != "float32"):
        raise ValueError(
            f"lora_rank ({lora_rank}) needs freeze false and dtype float32, not {str(freeze).lower()} and {dtype}: the "
            f"products learn, and are added to the weights in the end"
        )
    path = Path(source)
    if path.is_dir():
        vit = _from_folder(path)
    elif path.suffix == ".safetensors" or path.exists():
        state = read_safetensors(path)
        with built_from(state, str(path)):
            vit = vit_from_state(state, context=str(path))
    elif "/" in source and not source.startswith(("hf-hub:", "timm/")):
        raise ValueError(f"{source}: no such folder or file")
    else:
        vit = _from_name(source)
    if not keep_head and vit.num_classes:
        vit.head, vit.num_classes = nn.Identity(), 0
    if image_size is not None:
        vit.set_input_size(image_size)
    if lora_rank:
        add_lora(vit, lora_targets, rank=lora_rank, alpha=2.0 * lora_rank)
    cast_frozen(vit, dtype)
    return freeze_module(vit) if freeze else vit


def _from_folder(folder: Path) -> ViT:
    config = read_json(folder / CONFIG)
    if "class" in config:
        if config["class"] == ViT.__name__:
            return ViT.from_pretrained(folder)
        model = Pretrained.from_pretrained(folder)
        if not isinstance(model, Captioner):
            raise ValueError(
                f"{folder} holds a {type(model).__name__}, neither a ViT nor a captioner that has one"
            )
        return model.vision
    state = read_safetensors(folder / WEIGHTS)
    with built_from(state, str(folder / CONFIG)):
        if "pretrained_cfg" in config:  # As timm writes it: the architecture says what shapes do not.
            return _as_timm_wrote(folder, config, state)
        return vit_from_state(
            state,
            num_heads=config.get("num_heads"),
            activation=config.get("activation", "gelu"),
            norm_eps=config.get("layer_norm_eps", 1e-6),
            context=str(folder),
        )


def _as_timm_wrote(folder: Path, config: dict[str, Any], state: dict[str, Tensor]) -> ViT:
    import timm
    from timm.models.vision_transformer import VisionTransformer

    name, classes = config.get("architecture", ""), state.get("head.bias", torch.empty(0)).shape[0]
    if not isinstance(name, str) or not timm.is_model(name):
        raise ValueError(f'{folder / CONFIG}: timm has no model "{name}"')
    given = config.get("model_args", {})
    # timm's own arguments would read other files (checkpoint_path) and fetch some (pretrained_cfg).
    allowed = set(inspect.signature(VisionTransformer).parameters)
    if other := sorted(set(given) - allowed):
        raise ValueError(
            f"{folder / CONFIG}: model_args {', '.join(other)} are no sizes of a Vision Transformer"
        )
    model = timm.create_model(name, pretrained=False, **{"num_classes": classes} | given)
    load_strictly(model, state, str(folder / WEIGHTS))
    return from_timm(model)


def _from_name(name: str) -> ViT:
    import timm

    if not name.startswith(("hf-hub:", "timm/")) and not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:5])
        raise ValueError(
            f'"{name}" is no folder, no file and no timm model' + (f"; timm has {close} ..." if close else "")
        )
    try:
        return from_timm(timm.create_model(name, pretrained=True))
    except (OSError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"timm could not load {name}: {reason}. Without a network, give a folder instead"
        ) from error
