"""timm's `NaFlexVit` (NaFlex, SigLIP 2, C-RADIO) as a `VisionTransformer`'s tensors: one table of positions for all.

Pictures of native size and shape go through `packed_forward`; here it reads the same images of one size.
"""

from typing import Any

from torch import Tensor

from mmtransformer.layers.positions import ViTPosEmbedConfig
from mmtransformer.weights.shared.configs import only_these


def naflex_parts(model: Any) -> tuple[tuple[int, int], ViTPosEmbedConfig, dict[str, Tensor]]:
    """The grid of the images that it was made for, how its table is resized, and its tensors by timm's usual names.

    A table of rows and one of columns (`parfac`) become one, their sum, which is resized bilinearly: the same numbers.

    Raises:
        ValueError: naming what it has and `ViT` has not.
    """
    embeds = model.embeds
    (patch, width), pool = embeds.patch_size, model.attn_pool
    factors, (rows, columns) = embeds.pos_embed_type == "factorized", embeds.pos_embed_grid_size
    only_these(
        "ViT",
        {
            "pos_embed": (embeds.pos_embed_type in ("learned", "factorized"), True),
            "rope": (model.rope is None, True),
            "square patches": (patch == width, True),
            "norm of pixels": (embeds.norm_input is None, True),
            "padding of images": (embeds.dynamic_img_pad, False),
            "sampled positions": (embeds.pos_embed_use_grid_sample, False),
            "square table": (not factors or not embeds.pos_embed_ar_preserving or rows == columns, True),
            "heads of pooling": (pool is None or pool.num_heads == model.blocks[0].attn.num_heads, True),
        },
    )
    names = {"embeds.proj.": "patch_embed.proj.", "embeds.norm.": "patch_embed.norm.", "embeds.": ""}
    state = {}
    for name, tensor in model.state_dict().items():
        old = next((old for old in names if name.startswith(old)), "")
        state[names.get(old, "") + name.removeprefix(old)] = tensor
    if embeds.is_linear:
        last, weight = embeds.channels_last, state["patch_embed.proj.weight"]
        weight = weight.unflatten(1, (patch, patch, -1) if last else (-1, patch, patch))
        state["patch_embed.proj.weight"] = weight.permute(0, 3, 1, 2) if last else weight
    if factors:
        state["pos_embed"] = state.pop("pos_embed_y")[:, :, None] + state.pop("pos_embed_x")[:, None]
    grid = tuple(state["pos_embed"].shape[1:3])
    state["pos_embed"] = state["pos_embed"].flatten(1, 2)
    table = ViTPosEmbedConfig(
        grid,
        "bilinear" if factors else embeds.pos_embed_interp_mode,
        antialias=not factors and embeds.pos_embed_antialias,
        align_corners=not factors and embeds.pos_embed_align_corners,
        square=embeds.pos_embed_ar_preserving,
    )
    _, height, width = (getattr(model, "pretrained_cfg", None) or {}).get("input_size") or (0, 0, 0)
    fits = height and not height % patch and not width % patch
    return ((height // patch, width // patch) if fits else grid), table, state
