"""The families of public models that are read and written here: one line each.

A new family is a file with its key table, a `load_` and a `save_`, and a line in this table.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmtransformer.backbones.decoder import TextDecoder
from mmtransformer.backbones.diffusion_transformer import DiffusionTransformer
from mmtransformer.backbones.encoder import TextEncoder
from mmtransformer.backbones.vit import ViT
from mmtransformer.captioners.blip2 import Blip2
from mmtransformer.captioners.blip2_qformer import Blip2QFormer
from mmtransformer.captioners.flamingo import Flamingo
from mmtransformer.captioners.llava import Llava
from mmtransformer.captioners.published.blip import BlipITM, BlipVQA
from mmtransformer.captioners.published.git import Git
from mmtransformer.captioners.published.hf_captioner import HFCaptioner
from mmtransformer.captioners.published.open_coca import OpenCoCa
from mmtransformer.captioners.published.paligemma import PaliGemma
from mmtransformer.captioners.vision_encoder_decoder import VisionEncoderDecoder
from mmtransformer.serialization.folder_config import OPEN_CLIP
from mmtransformer.serialization.hub import HubOptions
from mmtransformer.serialization.pretrained import CONFIG, WEIGHTS
from mmtransformer.weights.captioners.blip import BlipProcessor, blip_from_state, load_blip, save_blip
from mmtransformer.weights.captioners.blip2 import Blip2Processor, blip2_from_state, load_blip2, save_blip2
from mmtransformer.weights.captioners.git import GitProcessor, git_from_state, load_git, save_git
from mmtransformer.weights.captioners.hf import HFProcessor, load_hf, save_hf
from mmtransformer.weights.captioners.idefics import IdeficsProcessor, idefics_from_state, load_idefics, save_idefics
from mmtransformer.weights.captioners.idefics3 import (
    Idefics3Processor,
    idefics3_from_state,
    load_idefics3,
    save_idefics3,
)
from mmtransformer.weights.captioners.lavis import load_lavis, save_lavis
from mmtransformer.weights.captioners.llava import LlavaProcessor, llava_from_state, load_llava, save_llava
from mmtransformer.weights.captioners.open_coca import WEIGHTS as OPEN_CLIP_WEIGHTS
from mmtransformer.weights.captioners.open_coca import OpenCocaProcessor, load_open_coca, save_open_coca
from mmtransformer.weights.captioners.openflamingo import OpenFlamingoProcessor, load_openflamingo, save_openflamingo
from mmtransformer.weights.captioners.paligemma import (
    PaliGemmaProcessor,
    load_paligemma,
    paligemma_from_state,
    save_paligemma,
)
from mmtransformer.weights.captioners.vision_encoder_decoder import (
    VisionEncoderDecoderProcessor,
    load_vision_encoder_decoder,
    save_vision_encoder_decoder,
    vision_encoder_decoder_from_state,
)
from mmtransformer.weights.diffusion.diffusers import DIT, PIXART, load_dit, save_dit
from mmtransformer.weights.dual_encoders.transformers import DUAL_ENCODER_TYPES, clip_from_transformers, save_clip
from mmtransformer.weights.processors.processor import Processor
from mmtransformer.weights.text.bert import encoder_from_bert, load_bert, save_bert
from mmtransformer.weights.text.gemma import GEMMAS
from mmtransformer.weights.text.llama import LLAMAS
from mmtransformer.weights.text.lm import decoder_from_state, load_lm, save_lm
from mmtransformer.weights.vision.clip import CLIP_TYPES, SIGLIP_TYPES
from mmtransformer.weights.vision.dino import DINO_TYPES, save_dino
from mmtransformer.weights.vision.load import load_vit, save_timm
from mmtransformer.weights.vision.siglip2 import SIGLIP2_TYPES, save_siglip2
from mmtransformer.weights.vision.transformers import vision_from_transformers
from mmtransformer.weights.vision.vit import VIT_TYPES, save_vit


def _ids(
    config: dict[str, Any], base: Path, *, names: tuple[str, ...], part: str, usual: str | None = None
) -> dict[str, Any]:
    """The ids of these names that a config.json says at its top, else in a part of it; else the `usual` one's."""
    inner = config.get(part, {})
    if usual == "eos_token_id" and config.get("decoder_start_token_id") is None:
        config = {**config, "decoder_start_token_id": inner.get("decoder_start_token_id") or inner.get("bos_token_id")}
    said = {name: config[name] if config.get(name) is not None else inner.get(name) for name in (*names, usual or "")}
    found = {name: said[name] if said[name] is not None else said[usual or ""] for name in names}
    return {name: value for name, value in found.items() if value is not None}


def _tower_of(config: dict[str, Any]) -> Any:
    """The type of vision encoder that a captioner's config.json names; None where it is the family's usual one."""
    return (config.get("vision_config") or {}).get("model_type")


@dataclass(frozen=True)
class Family:
    """How models of a family come in and go out.

    Attributes:
        load: a folder, or the name of a hub's repository, -> a model; what it needs besides are keywords.
        save: a model and a folder -> nothing; refuses what is not of the family before anything is written.
        makes: the classes of its models here.
        model_types: what `config.json` says under `model_type`; nothing where it names the family otherwise.
        save_options: what `save` needs besides, from the config and the folder that the model came with.
        read: config.json, all tensors, and what they come from (for errors) -> a model, for `from_transformers`.
        processor: a folder -> its pictures and prompts, for captioners that `ImageCaptioner.from_pretrained` takes.
        reader: who reads what is written.
        config: the file that says what a folder holds.
        weights: the file that its tensors are written to.
        holds: whether a folder's config is of a kind that is built here; where not, transformers runs the captioner.
        looks_up: whether its folders name models around them, which are looked up too: `load`, `save` and `processor`
            then take `options`.
    """

    load: Callable[..., nn.Module]
    save: Callable[..., None]
    makes: tuple[type[nn.Module], ...]
    model_types: tuple[str, ...] = ()
    read: Callable[[dict[str, Any], dict[str, Tensor], str], nn.Module] | None = None
    processor: Callable[..., Processor] | None = None
    save_options: Callable[[dict[str, Any], Path], dict[str, Any]] = lambda config, base: {}
    reader: str = "transformers"
    config: str = CONFIG
    weights: str = WEIGHTS
    holds: Callable[[dict[str, Any]], bool] = lambda config: True
    looks_up: bool = False

    def options(self, options: HubOptions) -> dict[str, HubOptions]:
        """How the models around one are looked up: as itself, but for the revision, which is of its own repository."""
        return {"options": replace(options, revision=None)} if self.looks_up else {}

    def kept(self, config: dict[str, Any]) -> dict[str, Any]:
        """What of a base's config is written again: all but a `model_type` that no file says."""
        return config if self.config == CONFIG else {key: x for key, x in config.items() if key != "model_type"}


FAMILIES: dict[str, Family] = {
    "dit": Family(load_dit, save_dit, (DiffusionTransformer,)),
    "timm": Family(load_vit, save_timm, (ViT,)),
    "clip": Family(load_vit, save_clip, (ViT,), CLIP_TYPES + SIGLIP_TYPES, vision_from_transformers),
    "siglip2": Family(load_vit, save_siglip2, (ViT,), SIGLIP2_TYPES, vision_from_transformers),
    "dino": Family(load_vit, save_dino, (ViT,), DINO_TYPES, vision_from_transformers),
    "vit": Family(load_vit, save_vit, (ViT,), VIT_TYPES, vision_from_transformers),
    **{
        name: Family(load_lm, partial(save_lm, family=name), (TextDecoder,), (name,), decoder_from_state)
        for name in ("gpt2", "opt", *LLAMAS, *GEMMAS)
    },
    "bert": Family(load_bert, save_bert, (TextEncoder,), ("bert",), encoder_from_bert),
    "blip": Family(
        load_blip,
        save_blip,
        (VisionEncoderDecoder, BlipVQA, BlipITM),
        ("blip",),
        blip_from_state,
        processor=BlipProcessor,
        save_options=partial(_ids, names=("bos_token_id", "sep_token_id", "pad_token_id"), part="text_config"),
    ),
    "vision-encoder-decoder": Family(
        load_vision_encoder_decoder,
        save_vision_encoder_decoder,
        (VisionEncoderDecoder,),
        ("vision-encoder-decoder",),
        vision_encoder_decoder_from_state,
        processor=VisionEncoderDecoderProcessor,
        save_options=partial(
            _ids, names=("decoder_start_token_id", "eos_token_id", "pad_token_id"), part="decoder", usual="eos_token_id"
        ),
    ),
    "blip2": Family(
        load_blip2,
        save_blip2,
        (Blip2, Blip2QFormer),
        ("blip-2", "instructblip"),
        blip2_from_state,
        processor=Blip2Processor,
        save_options=lambda config, base: {"image_token_id": config.get("image_token_index")},
    ),
    "lavis": Family(load_lavis, save_lavis, (Blip2, Blip2QFormer), ("lavis",)),
    "git": Family(load_git, save_git, (Git,), ("git",), git_from_state, GitProcessor),
    "idefics": Family(load_idefics, save_idefics, (Flamingo,), ("idefics",), idefics_from_state, IdeficsProcessor),
    **{
        name: Family(
            load_idefics3,
            partial(save_idefics3, family=name),
            (Llava,),
            (name,),
            idefics3_from_state,
            Idefics3Processor,
        )
        for name in ("smolvlm", "idefics3")
    },
    "llava": Family(
        load_llava,
        save_llava,
        (Llava,),
        ("llava", "llava_next", "llava_onevision"),
        llava_from_state,
        processor=LlavaProcessor,
        holds=lambda config: _tower_of(config) in (None, *CLIP_TYPES, *SIGLIP_TYPES),
    ),
    "paligemma": Family(
        load_paligemma, save_paligemma, (PaliGemma,), ("paligemma",), paligemma_from_state, PaliGemmaProcessor
    ),
    "hf": Family(load_hf, save_hf, (HFCaptioner,), processor=HFProcessor),
    "open_coca": Family(
        load_open_coca,
        save_open_coca,
        (OpenCoCa,),
        ("open_clip",),
        processor=OpenCocaProcessor,
        save_options=lambda config, base: {"pixels": config.get("preprocess_cfg")},
        reader="open_clip",
        config=OPEN_CLIP,
        weights=OPEN_CLIP_WEIGHTS,
    ),
    "openflamingo": Family(
        load_openflamingo,
        save_openflamingo,
        (Flamingo,),
        ("openflamingo",),
        processor=OpenFlamingoProcessor,
        save_options=lambda config, base: {"base": base},
        reader="open_flamingo",
        looks_up=True,
    ),
}


def family_of(config: dict[str, Any]) -> str | None:
    """The family that a folder's `config.json` names; None = none of them."""
    if isinstance(config.get("architecture"), str):
        return "timm"
    if config.get("_class_name") in (DIT, PIXART):
        return "dit"
    kind = config.get("model_type")
    if kind == "open_clip" and "multimodal_cfg" not in (config.get("model_cfg") or {}):
        return None  # a dual encoder's
    return next((name for name, family in FAMILIES.items() if kind in family.model_types), None)


def families_for(model: nn.Module) -> list[str]:
    """The families that a model of this class may be written as; `save` says whether this one can."""
    return [name for name, family in FAMILIES.items() if isinstance(model, family.makes)]


def from_transformers(model: nn.Module) -> Any:
    """The model here that holds the weights of one of transformers, in memory; equal to 1e-4 in float32.

    It is what `load_...` makes of the model's folder, by `config.model_type`: a captioner, a `TextDecoder`, a
    `TextEncoder`, a `CLIP`, and of a vision encoder a `ViT`, without a classifier. Any other language model runs here
    as it is by `HFDecoder.from_model` or `HFSeq2Seq.from_model`, any other captioner by `HFCaptioner`.

    Raises:
        ValueError: if it is of no family of `FAMILIES` and no dual encoder, or has a part that is not here.
    """
    config: Any = getattr(model, "config", None)
    kind, name = getattr(config, "model_type", None), type(model).__name__
    readers = {kind: family.read for family in FAMILIES.values() if family.read for kind in family.model_types}
    readers |= dict.fromkeys(DUAL_ENCODER_TYPES, clip_from_transformers)  # CLIP's own type is both towers'
    if kind not in readers:
        raise ValueError(
            f'{name} is not a model of transformers that is read here: its model_type is "{kind}", and known are '
            f"{', '.join(readers)}; HFDecoder, HFSeq2Seq and HFCaptioner run others as they are"
        )
    return readers[kind](config.to_dict(), model.state_dict(), f"transformers' {name}")
