"""Multimodal Transformers on one attention core."""

from mmtransformer.attention import Attention, KeyValue, KVCache, Rope, attend
from mmtransformer.captioner import CaptionBatch, Captioner, caption_loss, freeze
from mmtransformer.decoder import TextDecoder
from mmtransformer.encoder_decoder import EncoderDecoder, VisualAdapter
from mmtransformer.generate import Generated, generate
from mmtransformer.record import record_attention
from mmtransformer.vit import VIT_SIZES, PatchEmbed, ViT

__version__ = "0.1.0"

__all__ = [
    "VIT_SIZES",
    "Attention",
    "CaptionBatch",
    "Captioner",
    "EncoderDecoder",
    "Generated",
    "KVCache",
    "KeyValue",
    "PatchEmbed",
    "Rope",
    "TextDecoder",
    "ViT",
    "VisualAdapter",
    "attend",
    "caption_loss",
    "freeze",
    "generate",
    "record_attention",
]
