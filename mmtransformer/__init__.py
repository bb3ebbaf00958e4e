"""Multimodal Transformers on one attention core.

The names below are imported when they are first used, so that `mmt --help` need not wait for torch.

Shapes are written in einops letters, the same in all files; a file's own "Shapes:" names only what differs there:
b rows, i images of a row, n all images, q and k query and key positions, d width, h heads, c head width, p patches,
l latents or queries, v vocabulary. "(b q d)" has three dimensions; "(... d)" any number before the last.
"""

from typing import TYPE_CHECKING

from mmtransformer.lazy import lazy

if TYPE_CHECKING:
    from mmtransformer.backbones.base import Decoder as Decoder
    from mmtransformer.backbones.base import DecoderState as DecoderState
    from mmtransformer.backbones.decoder import TextDecoder as TextDecoder
    from mmtransformer.backbones.diffusion_transformer import DiffusionTransformer as DiffusionTransformer
    from mmtransformer.backbones.encoder import TextEncoder as TextEncoder
    from mmtransformer.backbones.extended_vocabulary import ExtendedDecoder as ExtendedDecoder
    from mmtransformer.backbones.grid_rope import ViTRopeConfig as ViTRopeConfig
    from mmtransformer.backbones.hf.autoencoder import HFAutoencoder as HFAutoencoder
    from mmtransformer.backbones.hf.decoder import HFDecoder as HFDecoder
    from mmtransformer.backbones.hf.seq2seq import HFSeq2Seq as HFSeq2Seq
    from mmtransformer.backbones.patches import ConvStem as ConvStem
    from mmtransformer.backbones.patches import PatchEmbed as PatchEmbed
    from mmtransformer.backbones.patches import ViTPatchConfig as ViTPatchConfig
    from mmtransformer.backbones.seq2seq import Transformer as Transformer
    from mmtransformer.backbones.vit import ViT as ViT
    from mmtransformer.backbones.vit_blocks import ViTBlockConfig as ViTBlockConfig
    from mmtransformer.backbones.vit_blocks import ViTOutputConfig as ViTOutputConfig
    from mmtransformer.backbones.vit_variants.concat import ConcatViT as ConcatViT
    from mmtransformer.backbones.vit_variants.packed import packed_features as packed_features
    from mmtransformer.backbones.vit_variants.packed import packed_forward as packed_forward
    from mmtransformer.batch.captions import CaptionBatch as CaptionBatch
    from mmtransformer.batch.images import PackedImages as PackedImages
    from mmtransformer.batch.output import ModelOutput as ModelOutput
    from mmtransformer.batch.output import SumAndCount as SumAndCount
    from mmtransformer.batch.seq2seq import Seq2SeqBatch as Seq2SeqBatch
    from mmtransformer.captioners.base import Captioner as Captioner
    from mmtransformer.captioners.base import caption_loss as caption_loss
    from mmtransformer.captioners.blip2 import Blip2 as Blip2
    from mmtransformer.captioners.blip2 import InstructBatch as InstructBatch
    from mmtransformer.captioners.blip2 import blip2_from_stage1 as blip2_from_stage1
    from mmtransformer.captioners.blip2_qformer import Blip2QFormer as Blip2QFormer
    from mmtransformer.captioners.coca import CoCa as CoCa
    from mmtransformer.captioners.flamingo import Flamingo as Flamingo
    from mmtransformer.captioners.flamingo import GatedBlockConfig as GatedBlockConfig
    from mmtransformer.captioners.image_attention_mask import image_attention_mask as image_attention_mask
    from mmtransformer.captioners.image_attention_mask import show_mask as show_mask
    from mmtransformer.captioners.llava import Llava as Llava
    from mmtransformer.captioners.prefix import PrefixCaptioner as PrefixCaptioner
    from mmtransformer.captioners.published.blip import BlipITM as BlipITM
    from mmtransformer.captioners.published.blip import BlipVQA as BlipVQA
    from mmtransformer.captioners.published.git import Git as Git
    from mmtransformer.captioners.published.open_coca import OpenCoCa as OpenCoCa
    from mmtransformer.captioners.published.paligemma import PaliGemma as PaliGemma
    from mmtransformer.captioners.tiles import TileConfig as TileConfig
    from mmtransformer.captioners.tiles import TiledBatch as TiledBatch
    from mmtransformer.captioners.vision_encoder_decoder import VisionEncoderDecoder as VisionEncoderDecoder
    from mmtransformer.connectors.base import Connector as Connector
    from mmtransformer.connectors.linear import LinearConnector as LinearConnector
    from mmtransformer.connectors.projector import LinearProjector as LinearProjector
    from mmtransformer.connectors.projector import MLPProjector as MLPProjector
    from mmtransformer.connectors.qformer import QFormer as QFormer
    from mmtransformer.connectors.resampler import PerceiverResampler as PerceiverResampler
    from mmtransformer.connectors.transformer import TransformerConnector as TransformerConnector
    from mmtransformer.diffusion.image_generation import ImageGenerationConfig as ImageGenerationConfig
    from mmtransformer.diffusion.paths import DiffusionConfig as DiffusionConfig
    from mmtransformer.diffusion.text_to_image import TextToImageModel as TextToImageModel
    from mmtransformer.dual_encoders.clip import CLIP as CLIP
    from mmtransformer.dual_encoders.text_encoder_tower import TextEncoderTower as TextEncoderTower
    from mmtransformer.dual_encoders.text_tower import TextTower as TextTower
    from mmtransformer.generation.base import GenerationResult as GenerationResult
    from mmtransformer.generation.captions import CaptionResult as CaptionResult
    from mmtransformer.generation.config import GenerationConfig as GenerationConfig
    from mmtransformer.generation.cuda_graph import CudaGraphRunner as CudaGraphRunner
    from mmtransformer.generation.loop import generate as generate
    from mmtransformer.generation.loop import stream as stream
    from mmtransformer.images import Augment as Augment
    from mmtransformer.images import ImageError as ImageError
    from mmtransformer.images import ImageTransform as ImageTransform
    from mmtransformer.images import NativeSize as NativeSize
    from mmtransformer.images.native import packed_rows as packed_rows
    from mmtransformer.layers.attention import Attention as Attention
    from mmtransformer.layers.attention import attend as attend
    from mmtransformer.layers.cache import KeyValue as KeyValue
    from mmtransformer.layers.cache import KVCache as KVCache
    from mmtransformer.layers.config import AttentionConfig as AttentionConfig
    from mmtransformer.layers.config import MLPConfig as MLPConfig
    from mmtransformer.layers.config import NormConfig as NormConfig
    from mmtransformer.layers.config import PositionConfig as PositionConfig
    from mmtransformer.layers.linear_attention import LinearAttention as LinearAttention
    from mmtransformer.layers.modes import freeze as freeze
    from mmtransformer.layers.positions import RotaryAngles as RotaryAngles
    from mmtransformer.layers.positions import ViTPosEmbedConfig as ViTPosEmbedConfig
    from mmtransformer.layers.record import record_attention as record_attention
    from mmtransformer.losses.contrastive import clip_loss as clip_loss
    from mmtransformer.losses.contrastive import itc_loss as itc_loss
    from mmtransformer.losses.contrastive import itg_loss as itg_loss
    from mmtransformer.losses.contrastive import itm_loss as itm_loss
    from mmtransformer.losses.hard_negatives import hard_negatives as hard_negatives
    from mmtransformer.losses.sigmoid import siglip_loss as siglip_loss
    from mmtransformer.pipelines.classifier import ImageClassifier as ImageClassifier
    from mmtransformer.pipelines.few_shot import FewShotPromptBuilder as FewShotPromptBuilder
    from mmtransformer.pipelines.image_captioner import ImageCaptioner as ImageCaptioner
    from mmtransformer.pipelines.image_generator import ImageGenerator as ImageGenerator
    from mmtransformer.pipelines.image_text_embedder import ImageTextEmbedder as ImageTextEmbedder
    from mmtransformer.pipelines.search.image_index import ImageIndex as ImageIndex
    from mmtransformer.pipelines.translator import Translator as Translator
    from mmtransformer.pipelines.vocabulary import restrict_vocabulary as restrict_vocabulary
    from mmtransformer.serialization.hub import HubOptions as HubOptions
    from mmtransformer.text.tokenizer import Tokenizer as Tokenizer

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy(__name__, __file__)  # pyright: ignore[reportUnsupportedDunderAll]
