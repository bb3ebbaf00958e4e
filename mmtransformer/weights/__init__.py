"""Weights of other projects, in both directions: one key table a family."""

from typing import TYPE_CHECKING

from mmtransformer.lazy import lazy

if TYPE_CHECKING:
    from mmtransformer.weights.captioners.blip import load_blip as load_blip
    from mmtransformer.weights.captioners.blip import save_blip as save_blip
    from mmtransformer.weights.captioners.blip2 import load_blip2 as load_blip2
    from mmtransformer.weights.captioners.blip2 import save_blip2 as save_blip2
    from mmtransformer.weights.captioners.git import load_git as load_git
    from mmtransformer.weights.captioners.git import save_git as save_git
    from mmtransformer.weights.captioners.hf import load_hf as load_hf
    from mmtransformer.weights.captioners.hf import save_hf as save_hf
    from mmtransformer.weights.captioners.idefics import load_idefics as load_idefics
    from mmtransformer.weights.captioners.idefics import save_idefics as save_idefics
    from mmtransformer.weights.captioners.idefics3 import load_idefics3 as load_idefics3
    from mmtransformer.weights.captioners.idefics3 import save_idefics3 as save_idefics3
    from mmtransformer.weights.captioners.lavis import load_lavis as load_lavis
    from mmtransformer.weights.captioners.lavis import save_lavis as save_lavis
    from mmtransformer.weights.captioners.llava import load_llava as load_llava
    from mmtransformer.weights.captioners.llava import save_llava as save_llava
    from mmtransformer.weights.captioners.open_coca import load_open_coca as load_open_coca
    from mmtransformer.weights.captioners.open_coca import save_open_coca as save_open_coca
    from mmtransformer.weights.captioners.openflamingo import load_openflamingo as load_openflamingo
    from mmtransformer.weights.captioners.openflamingo import save_openflamingo as save_openflamingo
    from mmtransformer.weights.captioners.paligemma import load_paligemma as load_paligemma
    from mmtransformer.weights.captioners.paligemma import save_paligemma as save_paligemma
    from mmtransformer.weights.captioners.parts.qformer import init_from_bert as init_from_bert
    from mmtransformer.weights.captioners.parts.qformer import load_qformer_from_bert as load_qformer_from_bert
    from mmtransformer.weights.captioners.vision_encoder_decoder import (
        load_vision_encoder_decoder as load_vision_encoder_decoder,
    )
    from mmtransformer.weights.captioners.vision_encoder_decoder import (
        save_vision_encoder_decoder as save_vision_encoder_decoder,
    )
    from mmtransformer.weights.diffusion.diffusers import dit_from_diffusers as dit_from_diffusers
    from mmtransformer.weights.diffusion.diffusers import dit_to_diffusers as dit_to_diffusers
    from mmtransformer.weights.diffusion.diffusers import load_autoencoder as load_autoencoder
    from mmtransformer.weights.diffusion.diffusers import load_dit as load_dit
    from mmtransformer.weights.diffusion.diffusers import save_dit as save_dit
    from mmtransformer.weights.dual_encoders.open_clip import save_open_clip as save_open_clip
    from mmtransformer.weights.dual_encoders.transformers import load_clip as load_clip
    from mmtransformer.weights.dual_encoders.transformers import save_clip as save_clip
    from mmtransformer.weights.families import FAMILIES as FAMILIES
    from mmtransformer.weights.families import from_transformers as from_transformers
    from mmtransformer.weights.text.bert import load_bert as load_bert
    from mmtransformer.weights.text.bert import save_bert as save_bert
    from mmtransformer.weights.text.lm import load_lm as load_lm
    from mmtransformer.weights.text.lm import load_tokenizer as load_tokenizer
    from mmtransformer.weights.text.lm import save_lm as save_lm
    from mmtransformer.weights.vision.dino import save_dino as save_dino
    from mmtransformer.weights.vision.load import load_vit as load_vit
    from mmtransformer.weights.vision.load import save_timm as save_timm
    from mmtransformer.weights.vision.siglip2 import save_siglip2 as save_siglip2
    from mmtransformer.weights.vision.timm import ViTSettings as ViTSettings
    from mmtransformer.weights.vision.timm import from_timm as from_timm
    from mmtransformer.weights.vision.timm import to_timm as to_timm
    from mmtransformer.weights.vision.vit import save_vit as save_vit

__getattr__, __dir__, __all__ = lazy(__name__, __file__)  # pyright: ignore[reportUnsupportedDunderAll]
