"""Weights of other projects, in both directions: one key table a family."""

from mmtransformer.weights.bert import bert_table, encoder_to_bert, from_bert, load_encoder
from mmtransformer.weights.blip2 import from_blip2, load_blip2, save_blip2_as_hub, to_blip2
from mmtransformer.weights.eva import vision_from_blip2, vision_to_blip2
from mmtransformer.weights.gpt2 import decoder_to_gpt2
from mmtransformer.weights.idefics import from_idefics, to_idefics
from mmtransformer.weights.lavis import blip2_from_lavis, image_text_from_lavis, to_lavis
from mmtransformer.weights.lm import (
    from_transformers,
    load_lm,
    load_tokenizer,
    save_as_hub,
    to_transformers,
)
from mmtransformer.weights.openflamingo import from_openflamingo, to_openflamingo
from mmtransformer.weights.qformer import init_from_bert, qformer_from_bert
from mmtransformer.weights.timm import from_timm, load_vit, to_timm, vit_from_state

__all__ = [
    "bert_table",
    "blip2_from_lavis",
    "decoder_to_gpt2",
    "encoder_to_bert",
    "from_bert",
    "from_blip2",
    "from_idefics",
    "from_openflamingo",
    "from_timm",
    "from_transformers",
    "image_text_from_lavis",
    "init_from_bert",
    "load_blip2",
    "load_encoder",
    "load_lm",
    "load_tokenizer",
    "load_vit",
    "qformer_from_bert",
    "save_as_hub",
    "save_blip2_as_hub",
    "to_blip2",
    "to_idefics",
    "to_lavis",
    "to_openflamingo",
    "to_timm",
    "to_transformers",
    "vision_from_blip2",
    "vision_to_blip2",
    "vit_from_state",
]
