"""Weights of other projects, in both directions: one key table a family."""

from mmtransformer.weights.gpt2 import decoder_to_gpt2, from_transformers
from mmtransformer.weights.timm import from_timm, load_vit, to_timm, vit_from_state

__all__ = ["decoder_to_gpt2", "from_timm", "from_transformers", "load_vit", "to_timm", "vit_from_state"]
