"""Weights of other projects, in both directions: one key table a family."""

from mmtransformer.weights.bert import bert_table, encoder_to_bert, from_bert, load_encoder
from mmtransformer.weights.gpt2 import decoder_to_gpt2
from mmtransformer.weights.idefics import from_idefics, to_idefics
from mmtransformer.weights.lm import from_transformers, load_lm, save_as_hub, to_transformers
from mmtransformer.weights.openflamingo import from_openflamingo, to_openflamingo
from mmtransformer.weights.timm import from_timm, load_vit, to_timm, vit_from_state

__all__ = [
    "bert_table",
    "decoder_to_gpt2",
    "encoder_to_bert",
    "from_bert",
    "from_idefics",
    "from_openflamingo",
    "from_timm",
    "from_transformers",
    "load_encoder",
    "load_lm",
    "load_vit",
    "save_as_hub",
    "to_idefics",
    "to_openflamingo",
    "to_timm",
    "to_transformers",
    "vit_from_state",
]
