"""How timm names a Vision Transformer's tensors."""

from typing import Literal

from torch import nn

from mmtransformer.backbones.vit_blocks import ViTBlockConfig
from mmtransformer.layers.config import Activation

Pool = Literal["class", "mean", "attention", "distilled"]
POOLS: dict[str, Pool] = {"token": "class", "avg": "mean", "map": "attention"}
"""timm's names of ways to pool, and the library's."""

ACTIVATIONS: dict[str, Activation] = {
    "GELU": "gelu",
    "GELUTanh": "gelu_tanh",
    "QuickGELU": "quick_gelu",
    "SiLU": "silu",
}
"""timm's classes of activations, and the library's."""

_KEYS = {
    "patch_embed.proj": "patch_embed.proj",
    "patch_embed.norm": "embed_norm",
    "norm_pre": "first_norm",
    "blocks.*.norm[1,2]": "blocks.*.norm[1,2]",
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
    "head_dist": "head.of_distilled",
}
_PARALLEL = {  # one matrix holds the MLP's first layer and queries, keys, values: see `timm._unpacked`
    "blocks.*.in_norm": "blocks.*.norm",
    "blocks.*.in_proj.[mlp,q,k,v]": "blocks.*.[mlp.fc1,attn.q_proj,attn.k_proj,attn.v_proj]",
    "blocks.*.[q,k]_norm": "blocks.*.attn.[q,k]_norm",
    "blocks.*.[attn,mlp]_out_proj": "blocks.*.[attn.out_proj,mlp.fc2]",
    "blocks.*.ls.gamma": "blocks.*.branch.0.gamma",
}


def tower_keys(block: ViTBlockConfig, *, packed: bool) -> dict[str, str]:
    """The key table of towers with these blocks; packed = gate and up of a gated MLP are one matrix."""
    if block.order == "parallel":
        return _KEYS | _PARALLEL
    gated = block.activation == "swiglu"
    last = "down_proj" if gated else "fc2"
    first = {"blocks.*.mlp.fc1": "blocks.*.mlp.fc1"}
    if gated:
        first = {"blocks.*.mlp." + ("fc1" if packed else "fc1_[g,x]"): "blocks.*.mlp.[gate,up]_proj"}
    return (
        _KEYS
        | first
        | {
            "blocks.*.attn.qkv": "blocks.*.attn.[q,k,v]_proj",
            "blocks.*.attn.[q,k]_norm": "blocks.*.attn.[q,k]_norm",
            "blocks.*.attn.norm": "blocks.*.attn.out_proj.0",
            "blocks.*.attn.proj": "blocks.*.attn.out_proj" + ".1" * block.attn_norm,
            "blocks.*.mlp.norm": f"blocks.*.mlp.{last}.0",
            "blocks.*.mlp.fc2": f"blocks.*.mlp.{last}" + ".1" * block.mlp_norm,
        }
    )


def norm_eps_of(model: nn.Module, context: str) -> float:
    """The one eps of a model's norms.

    Raises:
        ValueError: if they have several.
    """
    every = (getattr(module, "eps", None) for module in model.modules())
    found = {eps for eps in every if isinstance(eps, float)}
    if len(found) != 1:
        raise ValueError(f"{context} has norms with eps {sorted(found)}: ViT's have one")
    return found.pop()
