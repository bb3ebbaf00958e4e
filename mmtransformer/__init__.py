"""Multimodal Transformers on one attention core.

The names below are imported when they are first used, so that `mmt --help` need not wait for torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmtransformer.attention import Attention, KeyValue, KVCache, Rope, attend
    from mmtransformer.blip2 import Blip2, InstructBatch, from_stage1
    from mmtransformer.captioner import CaptionBatch, Captioner, caption_loss, freeze
    from mmtransformer.captured import Captured
    from mmtransformer.classifier import ImageClassifier
    from mmtransformer.coca import CoCa
    from mmtransformer.decoder import TextDecoder
    from mmtransformer.decoding import CaptionResult, Decoding
    from mmtransformer.encoder import TextEncoder
    from mmtransformer.encoder_decoder import EncoderDecoder, VisualAdapter
    from mmtransformer.few_shot import FewShot
    from mmtransformer.flamingo import Flamingo
    from mmtransformer.generate import Generated, generate, stream
    from mmtransformer.hard_pairs import hard_negatives
    from mmtransformer.hub import HubDecoder
    from mmtransformer.hub_seq2seq import HubSeq2Seq
    from mmtransformer.image_text import ImageText
    from mmtransformer.images import Augment, ImageError, ImageTransform
    from mmtransformer.language import Decoder, DecoderState
    from mmtransformer.linear_attention import LinearAttention
    from mmtransformer.media import media_mask, show_mask
    from mmtransformer.objectives import clip_loss, itc_loss, itg_loss, itm_loss
    from mmtransformer.pipeline import ImageCaptioner
    from mmtransformer.prefix import PrefixCaptioner
    from mmtransformer.qformer import QFormer
    from mmtransformer.record import record_attention
    from mmtransformer.resampler import PerceiverResampler
    from mmtransformer.seq2seq import TRANSFORMER_SIZES, TextPairs, Transformer
    from mmtransformer.tokenizer import Tokenizer
    from mmtransformer.translator import Translator
    from mmtransformer.vit import VIT_SIZES, ConvStem, PatchEmbed, ViT
    from mmtransformer.vocabulary import ExtendedVocabulary

__version__ = "0.1.0"

_HOMES = {
    "attention": "Attention KVCache KeyValue Rope attend",
    "blip2": "Blip2 InstructBatch from_stage1",
    "captioner": "CaptionBatch Captioner caption_loss freeze",
    "captured": "Captured",
    "classifier": "ImageClassifier",
    "coca": "CoCa",
    "decoder": "TextDecoder",
    "encoder": "TextEncoder",
    "encoder_decoder": "EncoderDecoder VisualAdapter",
    "few_shot": "FewShot",
    "flamingo": "Flamingo",
    "generate": "Generated generate stream",
    "hub_seq2seq": "HubSeq2Seq",
    "image_text": "ImageText",
    "hub": "HubDecoder",
    "images": "Augment ImageError ImageTransform",
    "linear_attention": "LinearAttention",
    "media": "media_mask show_mask",
    "hard_pairs": "hard_negatives",
    "objectives": "clip_loss itc_loss itg_loss itm_loss",
    "language": "Decoder DecoderState",
    "decoding": "CaptionResult Decoding",
    "pipeline": "ImageCaptioner",
    "qformer": "QFormer",
    "prefix": "PrefixCaptioner",
    "record": "record_attention",
    "resampler": "PerceiverResampler",
    "seq2seq": "TRANSFORMER_SIZES TextPairs Transformer",
    "tokenizer": "Tokenizer",
    "vocabulary": "ExtendedVocabulary",
    "translator": "Translator",
    "vit": "ConvStem PatchEmbed VIT_SIZES ViT",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = [
    "TRANSFORMER_SIZES",
    "VIT_SIZES",
    "Attention",
    "Augment",
    "Blip2",
    "CaptionBatch",
    "CaptionResult",
    "Captioner",
    "Captured",
    "CoCa",
    "ConvStem",
    "Decoder",
    "DecoderState",
    "Decoding",
    "EncoderDecoder",
    "ExtendedVocabulary",
    "FewShot",
    "Flamingo",
    "Generated",
    "HubDecoder",
    "HubSeq2Seq",
    "ImageCaptioner",
    "ImageClassifier",
    "ImageError",
    "ImageText",
    "ImageTransform",
    "InstructBatch",
    "KVCache",
    "KeyValue",
    "LinearAttention",
    "PatchEmbed",
    "PerceiverResampler",
    "PrefixCaptioner",
    "QFormer",
    "Rope",
    "TextDecoder",
    "TextEncoder",
    "TextPairs",
    "Tokenizer",
    "Transformer",
    "Translator",
    "ViT",
    "VisualAdapter",
    "attend",
    "caption_loss",
    "clip_loss",
    "freeze",
    "from_stage1",
    "generate",
    "hard_negatives",
    "itc_loss",
    "itg_loss",
    "itm_loss",
    "media_mask",
    "record_attention",
    "show_mask",
    "stream",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"mmtransformer.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


class _Package(ModuleType):
    """`mmtransformer.generate` is the function: importing the file of that name must not put the file in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
