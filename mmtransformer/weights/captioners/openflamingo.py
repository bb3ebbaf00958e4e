"""OpenFlamingo's resampler and gated layers -> `Flamingo`, and back. Language models and towers come from elsewhere.

A checkpoint holds what was trained: `perceiver.*`, `lang_encoder.<layers>.N.gated_cross_attn_layer.*` and, context the
language model got new tokens, its embedding (and head, where it has one of its own).
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor

from mmtransformer.backbones.base import Decoder
from mmtransformer.backbones.vit import ViT
from mmtransformer.batch import CaptionBatch
from mmtransformer.captioners.flamingo import Flamingo, GatedBlockConfig
from mmtransformer.captioners.image_attention_mask import VisibleImages
from mmtransformer.connectors.resampler import PerceiverResampler
from mmtransformer.images import ImageTransform
from mmtransformer.layers.lora import refuse_lora
from mmtransformer.serialization.folder_config import folder_config
from mmtransformer.serialization.hub import HubOptions
from mmtransformer.serialization.pretrained import CONFIG, find_folder
from mmtransformer.serialization.untrusted import built_from
from mmtransformer.text.tokenizer import Tokenizer
from mmtransformer.weights.processors.pixels import MEAN, STD
from mmtransformer.weights.processors.processor import Processor
from mmtransformer.weights.processors.tokens import PromptTokenizer
from mmtransformer.weights.shared.configs import only_these
from mmtransformer.weights.shared.folders import read_state, read_tensors, write_folder
from mmtransformer.weights.shared.keys import export, fill
from mmtransformer.weights.text.replaced_embeddings import EMBEDDINGS, HEADS, decoder_with_tables, table_of
from mmtransformer.weights.vision.load import load_vit

_GATED = re.compile(r"^(?:.*\.)?(\d+)\.gated_cross_attn_layer\.(.+)$")
_PLACE = re.compile(r"^lang_encoder\.(.+)\.\d+\.gated_cross_attn_layer\.")
_HEAD_DIM = 64  # The peer's, whatever the widths.
_LANGUAGE_MODEL, _TOWER, _CLIP = "lang_encoder_path", "clip_vision_encoder_path", "openai/clip-vit-large-patch14"
END, IMAGE = "<|endofchunk|>", "<image>"
PUBLISHED = {
    "OpenFlamingo-3B-vitl-mpt1b": "anas-awadalla/mpt-1b-redpajama-200b",
    "OpenFlamingo-3B-vitl-mpt1b-langinstruct": "anas-awadalla/mpt-1b-redpajama-200b-dolly",
    "OpenFlamingo-4B-vitl-rpj3b": "togethercomputer/RedPajama-INCITE-Base-3B-v1",
    "OpenFlamingo-4B-vitl-rpj3b-langinstruct": "togethercomputer/RedPajama-INCITE-Instruct-3B-v1",
    "OpenFlamingo-9B-vitl-mpt7b": "anas-awadalla/mpt-7b",
}
"""The language models of the released checkpoints, by their names; the tower of all is OpenAI's CLIP ViT-L/14."""

_RESAMPLER = {
    "perceiver.latents": "latents",
    "perceiver.[frame,media_time]_embs": "[frame,image]_embed",
    "perceiver.layers.*.0.norm_[media,latents]": "blocks.*.[norm_context,norm1]",
    "perceiver.layers.*.0.to_q": "blocks.*.attn.q_proj",
    "perceiver.layers.*.0.to_kv": "blocks.*.attn.[k,v]_proj",
    "perceiver.layers.*.0.to_out": "blocks.*.attn.out_proj",
    "perceiver.layers.*.1.[0,1,3]": "blocks.*.[norm2,mlp.fc1,mlp.fc2]",
    "perceiver.norm": "last_norm",
}
_BLOCKS = {
    "*.[attn,ff]_gate": "*.[attn,mlp]_gate",
    "*.attn.norm": "*.norm1",
    "*.attn.to_q": "*.attn.q_proj",
    "*.attn.to_kv": "*.attn.[k,v]_proj",
    "*.attn.to_out": "*.attn.out_proj",
    "*.ff.[0,1,3]": "*.[norm2,mlp.fc1,mlp.fc2]",
}


def from_openflamingo(
    state: dict[str, Tensor],
    vision: ViT,
    decoder: Decoder,
    *,
    visible_images: VisibleImages = "last",
    context: str = "the state dict",
) -> Flamingo:
    """A `Flamingo` with OpenFlamingo's trained weights between a vision tower and a language model, both frozen.

    Args:
        state: its tensors by name, with or without those of the towers, which are not read.
        vision: the vision tower, of CLIP for the released weights; its class token is left out, as there.
        decoder: the language model, its vocabulary already with the added tokens.
        visible_images: which pictures a token sees.
        context: what the tensors come from, for errors.

    Raises:
        ValueError: if tensors are missing, or do not fit the towers.
    """
    perceiver = {name: tensor for name, tensor in state.items() if name.startswith("perceiver.")}
    gated: dict[str, Tensor] = {}
    for name, tensor in state.items():
        found = _GATED.match(name)
        if found and "old_decoder_blocks" not in name:
            gated[f"{found[1]}.{found[2]}"] = tensor
    for name in ("perceiver.latents", "perceiver.layers.0.0.to_q.weight", "perceiver.layers.0.1.1.weight"):
        if name not in perceiver:
            raise ValueError(f'{context} has no tensor "{name}", so it is not OpenFlamingo\'s')
    layers = sorted({int(name.split(".")[0]) for name in gated})
    if not layers:
        raise ValueError(f"{context} has no gated_cross_attn_layer, so it is not OpenFlamingo's")
    latents, queries = perceiver["perceiver.latents"], perceiver["perceiver.layers.0.0.to_q.weight"]
    times = perceiver.get("perceiver.media_time_embs")
    frames = perceiver.get("perceiver.frame_embs")
    resampler = PerceiverResampler(
        latents.shape[1],
        1 + max(int(name.split(".")[2]) for name in perceiver if name.startswith("perceiver.layers.")),
        queries.shape[0] // _HEAD_DIM,
        _HEAD_DIM,
        latents.shape[0],
        mlp_dim=perceiver["perceiver.layers.0.1.1.weight"].shape[0],
        max_frames=None if frames is None else frames.shape[0],
        max_images=None if times is None else times.shape[0],
    )
    if times is not None:
        perceiver["perceiver.media_time_embs"] = times.flatten(0, 1)
    fill(resampler, _RESAMPLER, perceiver, context)
    first = layers[0]
    model = Flamingo(
        vision,
        decoder,
        connector=resampler,
        cross_layers=layers,
        gated=GatedBlockConfig(
            num_heads=gated[f"{first}.attn.to_q.weight"].shape[0] // _HEAD_DIM,
            head_dim=_HEAD_DIM,
            mlp_dim=gated[f"{first}.ff.1.weight"].shape[0],
            mlp_without_image=True,
        ),
        visible_images=visible_images,
        keep_prefix_tokens=False,
    )
    fill(model.gated_blocks, _block_keys(layers), gated, context)
    return model.eval()


def to_openflamingo(model: Flamingo, layers: str = "model.layers") -> dict[str, Tensor]:
    """OpenFlamingo's trained tensors, by the names in its checkpoints.

    Args:
        model: a captioner of OpenFlamingo's kind.
        layers: where the language model keeps its list of layers there: "transformer.blocks" for MPT, "model.layers"
            for Llama, "gpt_neox.layers", "model.decoder.layers" for OPT, "transformer.h" for GPT-2.

    Raises:
        ValueError: if it is of another kind.
    """
    resampler = model.connector
    if not isinstance(resampler, PerceiverResampler):
        raise ValueError(
            "OpenFlamingo always has a resampler, a PerceiverResampler; this captioner has "
            + ("none" if resampler is None else f"a {type(resampler).__name__}")
        )
    only_these(
        "OpenFlamingo",
        {
            "connector.activation": (resampler.activation, "gelu"),
            "connector.qk_norm": (resampler.qk_norm, None),
            "connector.head_dim": (resampler.head_dim, _HEAD_DIM),
            "connector.norm_eps": (resampler.norm_eps, 1e-5),
            "gated.head_dim": (model.gated.head_dim, _HEAD_DIM),
            "gated.activation": (model.gated.activation, "gelu"),
            "gated.norm": (model.gated.norm, "layer"),
            "gated.norm_eps": (model.gated.norm_eps, 1e-5),
            "gated.qk_norm": (model.gated.qk_norm, None),
            "gated.per_channel": (model.gated.per_channel, False),
        },
    )
    source = export(resampler, _RESAMPLER, "OpenFlamingo")
    if "perceiver.media_time_embs" in source:
        source["perceiver.media_time_embs"] = source["perceiver.media_time_embs"][:, None]
    gated = export(model.gated_blocks, _block_keys(model.cross_layers), "OpenFlamingo")
    for name, tensor in gated.items():
        number, _, rest = name.partition(".")
        source[f"lang_encoder.{layers}.{number}.gated_cross_attn_layer.{rest}"] = tensor
    return source


def _block_keys(layers: Sequence[int]) -> dict[str, str]:
    """The gated blocks' table: there, they are numbered as the layers that they stand in."""
    return {
        key.replace("*", str(number)): value.replace("*", str(block))
        for block, number in enumerate(layers)
        for key, value in _BLOCKS.items()
    }


def load_openflamingo(
    source: str | Path,
    vision: ViT | None = None,
    decoder: Decoder | None = None,
    *,
    visible_images: VisibleImages = "last",
    options: HubOptions = HubOptions(),  # noqa: B008 (frozen)
) -> Flamingo:
    """A `Flamingo` from OpenFlamingo's `checkpoint.pt`, or what `save_openflamingo` wrote, around two models of others.

    Args:
        source: a folder with `checkpoint.pt` (read as tensors alone) or `model.safetensors`, a `.safetensors` file, or
            the name of a hub's repository.
        vision: the vision tower; None = as `openflamingo_config` says.
        decoder: the language model, its vocabulary already with the added tokens; None = as `openflamingo_config` says,
            with the checkpoint's embedding in place of its own.
        visible_images: which pictures a token sees.
        options: how language model and tower are looked up, where they are names on the hub.

    Raises:
        ValueError: naming what is missing or does not fit.
    """
    state, context = read_state(source)
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if vision is None or decoder is None:
        config = openflamingo_config(folder := find_folder(source))
        vision = vision or load_vit(_beside(folder, config[_TOWER], options), freeze=True)
        decoder = decoder or _language_model(_beside(folder, config[_LANGUAGE_MODEL], options), state, context)
    with built_from(state, context, filled=True):
        return from_openflamingo(state, vision, decoder, visible_images=visible_images, context=context)


def openflamingo_config(folder: Path) -> dict[str, Any]:
    """What a folder says of the models around its checkpoint, by the names of open_flamingo's arguments.

    Those are `lang_encoder_path`, `tokenizer_path` (the same unless told) and `clip_vision_encoder_path` in its
    config.json: folders, beside it or anywhere, or names on the hub. Published checkpoints have no config.json; those
    in `PUBLISHED` are known by the folder's name.

    Raises:
        ValueError: if the language model is named nowhere.
    """
    config = {_TOWER: _CLIP, **folder_config(folder)}
    names = {folder.name, *(part.rpartition("--")[2] for part in folder.parts if part.startswith("models--"))}
    known = next((PUBLISHED[name] for name in sorted(names & PUBLISHED.keys())), None)
    if (model := config.get(_LANGUAGE_MODEL, known)) is None:
        raise ValueError(
            f"{folder} is an OpenFlamingo without its language model: name it in {folder / CONFIG}, as "
            f'{{"{_LANGUAGE_MODEL}": FOLDER_OR_NAME}}, or call the folder as it was published ({", ".join(PUBLISHED)})'
        )
    config = {"tokenizer_path": model, **config, _LANGUAGE_MODEL: model}
    for key in (_LANGUAGE_MODEL, "tokenizer_path", _TOWER):
        if not isinstance(config[key], str):
            raise ValueError(f"{folder / CONFIG}: {key} is {config[key]!r:.80}, not a folder or a name on the hub")
    return config


def _beside(folder: Path, name: str, options: HubOptions) -> Path:
    """A folder that is named in another, or on the hub."""
    return here if (here := folder / name).is_dir() else find_folder(name, options)


def _language_model(folder: Path, state: dict[str, Tensor], context: str) -> Decoder:
    tables = {name: tensor for name, tensor in state.items() if name.startswith("lang_encoder.")}
    embedding, head = table_of(tables, EMBEDDINGS), table_of(tables, HEADS)
    if embedding is None:
        raise ValueError(f"{context} has no embedding of {IMAGE} and {END} (lang_encoder.*.wte.weight or the like)")
    return decoder_with_tables(folder, tables[embedding], None if head is None else tables[head])


class OpenFlamingoProcessor(Processor):
    """Prompts of OpenFlamingo: <image> and the words, which "Output:" is unless told, as in its own evaluation.

    A text ends with <|endofchunk|>. Pixels are open_clip's, for OpenAI's mean and std.

    Args:
        folder: the folder of the checkpoint.
        options: how the tokenizer and the tower's sizes are looked up, where they are names on the hub.

    Raises:
        ValueError: if a file is missing or damaged.
    """

    def __init__(self, folder: Path, options: HubOptions = HubOptions()) -> None:  # noqa: B008 (frozen)
        config = openflamingo_config(folder)
        words, tower = (_beside(folder, config[key], options) for key in ("tokenizer_path", _TOWER))
        tokenizer = Tokenizer.from_pretrained(words).with_special_tokens(tokens=[END, IMAGE])
        self.encode = PromptTokenizer(words)
        self.encode.backend.add_special_tokens([AddedToken(token, special=True) for token in (END, IMAGE)])
        (self.image_token_id,), ends = (self.encode(token, special=False) for token in (IMAGE, END))
        said = folder_config(tower)
        side = said.get("vision_config", said).get("image_size", 224)
        pixels = ImageTransform(side, "crop", MEAN, STD, "bicubic", backend="timm")
        super().__init__(tokenizer, pixels, eos_ids=ends, prompt="Output:")

    def prompt_ids(self, text: str | None, batch: CaptionBatch, sample: int) -> list[int]:
        """<image> and the words; see `Processor`.

        Raises:
            ValueError: for words that have more than one <image> in them.
        """
        whole = text if text is not None and IMAGE in text else f"{IMAGE}{text or ''}"
        if (count := whole.count(IMAGE)) > 1:
            raise ValueError(f"a prompt has one {IMAGE} for its picture, this one has {count}: {whole!r:.200}")
        return self.encode(whole)

    def with_prompts(self, batch: CaptionBatch, texts: Sequence[str | None]) -> CaptionBatch:
        """The batch with prompts, and with which text comes after the picture; see `Processor`."""
        return self.complete(super().with_prompts(batch, texts))

    def complete(self, batch: CaptionBatch) -> CaptionBatch:
        """Rows with which text comes after the picture; see `Processor`."""
        return replace(batch, image_index=(batch.tokens == self.image_token_id).long().cumsum(1))


def save_openflamingo(
    model: Flamingo,
    folder: str | Path,
    *,
    layers: str = "model.layers",
    base: Path | None = None,
    options: HubOptions = HubOptions(),  # noqa: B008 (frozen)
) -> None:
    """Writes OpenFlamingo's trained tensors as `model.safetensors`, and how many layers stand between two of them.

    Args:
        model: a captioner of OpenFlamingo's kind; its towers are not written.
        folder: where to.
        layers: see `to_openflamingo`; of a base, its own.
        base: the folder that it came from, whose embedding and models around it are kept.
        options: how these are looked up, where they are names on the hub.

    Raises:
        ValueError: if it is of another kind, or what is not written is not the base's, before anything is written.
    """
    refuse_lora(model)
    first, *others = model.cross_layers
    config: dict[str, Any] = {"model_type": "openflamingo"}
    config["cross_attn_every_n_layers"] = others[0] - first if others else 1
    tables: dict[str, Tensor] = {}
    if base is not None:
        before = {name.removeprefix("module."): tensor for name, tensor in read_tensors(base).items()}
        places = [found[1] for name in before if (found := _PLACE.match(name))]
        layers = places[0] if places else layers
        said = openflamingo_config(base)
        for key in (_LANGUAGE_MODEL, "tokenizer_path", _TOWER):
            config[key] = str((base / said[key]).resolve()) if (base / said[key]).is_dir() else said[key]
        original = load_openflamingo(base, options=options)
        for part in ("vision", "decoder"):
            own, there = (getattr(x, part).state_dict() for x in (model, original))
            if changed := [
                name for name in there if name not in own or not torch.equal(own[name].float(), there[name])
            ]:
                raise ValueError(
                    f"OpenFlamingo's file has no place for the {part}, which was changed ({changed[0]} the first of "
                    f"{len(changed)}): keep the adapter, or train with --model.tuning.parts [connector]"
                )
        tables = {name: before[name] for ends in (EMBEDDINGS, HEADS) if (name := table_of(before, ends) or "")}
    write_folder(folder, config, to_openflamingo(model, layers) | tables)
