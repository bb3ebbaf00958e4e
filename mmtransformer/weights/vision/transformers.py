"""Vision towers in transformers' folders -> `ViT`: which reader a folder's `model_type` has, and classifiers."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from mmtransformer.backbones.vit import ViT
from mmtransformer.layers.linear import Linear
from mmtransformer.weights.vision.clip import CLIP_TYPES, SIGLIP_TYPES, vision_from_clip
from mmtransformer.weights.vision.dino import DINO_TYPES, vision_from_dino
from mmtransformer.weights.vision.siglip2 import SIGLIP2_TYPES, vision_from_siglip2
from mmtransformer.weights.vision.vit import VIT_TYPES, vision_from_vit

READERS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Tensor], str], ViT]] = {
    **dict.fromkeys(CLIP_TYPES + SIGLIP_TYPES, vision_from_clip),
    **dict.fromkeys(SIGLIP2_TYPES, vision_from_siglip2),
    **dict.fromkeys(DINO_TYPES, vision_from_dino),
    **dict.fromkeys(VIT_TYPES, vision_from_vit),
}
"""By `model_type`."""

_CLASSIFIERS = ("classifier.", "cls_classifier.", "distillation_classifier.")


def vision_from_transformers(
    config: Mapping[str, Any], state: Mapping[str, Tensor], context: str, *, keep_head: bool = False
) -> ViT:
    """A vision tower of transformers as a `ViT`.

    Args:
        config: the folder's config.json, whose `model_type` is one of `READERS`.
        state: its tensors.
        context: what they come from, for errors.
        keep_head: whether a classifier comes along; `ViT` has room for that of a ViT's class token.

    Raises:
        ValueError: for a tower that `ViT` cannot be, or a classifier to be kept that is another.
    """
    heads = {name: tensor for name, tensor in state.items() if name.startswith(_CLASSIFIERS)}
    vit = READERS[config["model_type"]](config, {n: t for n, t in state.items() if n not in heads}, context)
    if not (keep_head and heads):
        return vit
    weight = heads.get("classifier.weight")
    if config["model_type"] not in VIT_TYPES or weight is None or weight.shape[1] != vit.dim or len(heads) != 2:
        raise ValueError(
            f"{context} classifies by {', '.join(sorted(heads))}, and ViT by its class token: load it without keep_head"
        )
    vit.head, vit.num_classes = Linear(vit.dim, len(weight)), len(weight)
    vit.head.load_state_dict({name.removeprefix("classifier."): tensor for name, tensor in heads.items()})
    return vit.eval()
