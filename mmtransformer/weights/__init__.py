"""Weights of other projects, in both directions: one key table a family."""

from mmtransformer.weights.bert import bert_table, encoder_to_bert, from_bert, load_encoder
from mmtransformer.weights.gpt2 import decoder_to_gpt2, from_transformers
from mmtransformer.weights.timm import from_timm, load_vit, to_timm, vit_from_state

__all__ = [
    "bert_table",
    "decoder_to_gpt2",
    "encoder_to_bert",
    "from_bert",
    "from_timm",
    "from_transformers",
    "load_encoder",
    "load_vit",
    "to_timm",
    "vit_from_state",
]
