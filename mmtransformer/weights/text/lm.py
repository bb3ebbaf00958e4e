"""Language models of transformers -> our decoders, from memory, a folder or the hub, and back into a folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mmtransformer.backbones.base import Decoder
from mmtransformer.backbones.decoder import TextDecoder
from mmtransformer.backbones.extended_vocabulary import ExtendedDecoder
from mmtransformer.backbones.hf.decoder import HFDecoder
from mmtransformer.layers.lora import add_lora
from mmtransformer.serialization.pretrained import CONFIG, Pretrained, find_folder, read_json
from mmtransformer.serialization.untrusted import built_from
from mmtransformer.text.tokenizer import Tokenizer
from mmtransformer.weights.shared.configs import UnsupportedModel
from mmtransformer.weights.shared.dtype import DType, cast_frozen
from mmtransformer.weights.shared.folders import read_tensors, write_folder
from mmtransformer.weights.text.gemma import GEMMAS, decoder_from_gemma, decoder_to_gemma, gemma_of
from mmtransformer.weights.text.gpt2 import decoder_from_gpt2, decoder_to_gpt2, gpt2_config, is_gpt2
from mmtransformer.weights.text.llama import LLAMAS, decoder_from_llama, decoder_to_llama, llama_config, llamas_of
from mmtransformer.weights.text.opt import decoder_from_opt, decoder_to_opt, is_opt, opt_config

READERS = {"gpt2": decoder_from_gpt2, "opt": decoder_from_opt} | dict.fromkeys(LLAMAS, decoder_from_llama)
READERS |= dict.fromkeys(GEMMAS, decoder_from_gemma)


def decoder_from_state(config: dict[str, Any], state: dict[str, Tensor], context: str) -> TextDecoder:
    """A `TextDecoder` from what a hub folder holds: its config.json, and all of its tensors; equal to 1e-4 in float32.

    Raises:
        ValueError: if it is of none of the families, or a variant that `TextDecoder` cannot be.
    """
    family = config.get("model_type")
    if family not in READERS:
        raise UnsupportedModel(
            f'{context}: the family "{family}" is not one of TextDecoder\'s ({", ".join(READERS)}); HFDecoder takes '
            "any language model of transformers (extra: hf)"
        )
    with built_from(state, context, filled=True):
        return READERS[family](config, state, context)


def lm_to_transformers(decoder: TextDecoder, family: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What transformers needs to hold this decoder: its config.json, and its tensors by their names there.

    Args:
        decoder: the decoder.
        family: the `model_type` wanted, where several fit; None = the plainest.

    Raises:
        ValueError: if the decoder is of none of the families, or not of that one.
    """
    opt = ["opt"] * is_opt(decoder)
    fits = llamas_of(decoder) + opt * (decoder.mlp.activation == "relu") + ["gpt2"] * is_gpt2(decoder) + opt
    fits += gemma_of(decoder)
    if family is not None and family not in fits:
        also = f"; it can be as {', '.join(dict.fromkeys(fits))}" if fits else ""
        raise ValueError(f'this decoder cannot be written as "{family}"{also}')
    family = family or (fits[0] if fits else None)
    if family == "opt":
        return opt_config(decoder), decoder_to_opt(decoder)
    if family == "gpt2":
        return gpt2_config(decoder), decoder_to_gpt2(decoder)
    if family in GEMMAS:
        return decoder_to_gemma(decoder, family)
    tensors = decoder_to_llama(decoder)  # Says what a decoder has that is of no family.
    assert family is not None
    return llama_config(decoder, family), tensors


def save_lm(
    decoder: TextDecoder, folder: str | Path, family: str | None = None, *, tokenizer: Tokenizer | None = None
) -> None:
    """Writes a folder that transformers reads: `config.json` and `model.safetensors`, tied tensors once.

    Args:
        decoder: the decoder.
        folder: where to; made if it is not there.
        family: see `lm_to_transformers`.
        tokenizer: is saved beside the model, and its special ids noted in the config.

    Raises:
        ValueError: as `lm_to_transformers`, before anything is written.
    """
    config, tensors = lm_to_transformers(decoder, family)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    roles = {f"{role}_token_id": getattr(tokenizer, f"{role}_id", None) for role in ("pad", "bos", "eos")}
    if tokenizer is not None and tokenizer.more_eos_tokens:
        roles["eos_token_id"] = list(tokenizer.eos_ids)
    write_folder(folder, config | roles, tensors)


def load_lm(
    source: str | Path,
    *,
    new_tokens: int = 0,
    first: int | None = None,
    dtype: DType = "float32",
    lora_rank: int = 0,
    lora_target_modules: Sequence[str] = ("q_proj", "v_proj"),
) -> Decoder:
    """A language model in evaluation mode, from what is there: for recipes (`mmtransformer.weights.load_lm`).

    It is a `TextDecoder` where that can be the model (transformers is then not needed), else an `HFDecoder`. Only
    safetensors are read, never a pickle, and no code that comes with a model is run.

    Args:
        source: a folder saved by this library, a folder as hubs have it (`config.json` with `model.safetensors`, or
            with shards and their `model.safetensors.index.json`), or the name of a hub's repository, to be fetched.
        new_tokens: ids that are added to the model's, see `ExtendedDecoder`; what `load_tokenizer` adds.
        first: the first of them; None = the model's vocab_size. A hub's tokenizer may have fewer tokens.
        dtype: "bfloat16" keeps a model that stays frozen in half the memory, and takes an eighth off a training step in
            bf16-mixed (BLIP-2's stage 2 on a CPU); "nf4" in an eighth, by bitsandbytes on a GPU. What is new,
            the tokens, stays in float32.
        lora_rank: width of low-rank products that learn beside the frozen weights, see `add_lora`; 0 = none. A
            captioner must then not freeze the model itself (freeze_decoder: false).
        lora_target_modules: ends of the names of the layers that get them.

    Raises:
        ValueError: naming what is missing or does not fit.
    """
    if lora_rank and dtype != "float32":
        raise ValueError(
            f"lora_rank ({lora_rank}) needs dtype float32, not {dtype}: what is learned is added to the weights, and "
            f"would be rounded away"
        )
    decoder = _load(find_folder(source))
    if lora_rank:
        add_lora(decoder, lora_target_modules, rank=lora_rank, alpha=2.0 * lora_rank)
    whole = ExtendedDecoder(decoder, new_tokens, first=first).eval() if new_tokens else decoder
    cast_frozen(decoder, dtype)
    return whole


def _load(folder: Path) -> Decoder:
    config = read_json(folder / CONFIG)
    if "class" in config:
        model = Pretrained.from_pretrained(folder)
        if not isinstance(model, Decoder):
            raise ValueError(f"{folder} holds a {type(model).__name__}, not a language model")
        return model
    if not isinstance(config.get("model_type"), str):
        raise ValueError(
            f'{folder / CONFIG} has neither "class" (a model of this library) nor "model_type" (one of transformers)'
        )
    try:
        known = config["model_type"] in READERS
        return decoder_from_state(config, read_tensors(folder) if known else {}, str(folder))
    except UnsupportedModel as reason:
        return HFDecoder.from_folder(folder, reason=str(reason))


def load_tokenizer(
    source: str | Path, *, image_token: bool = False, languages: Sequence[str] = (), tokens: Sequence[str] = ()
) -> Tokenizer:
    """A tokenizer with the special tokens that a captioner needs: for recipes (`mmtransformer.weights.load_tokenizer`).

    Args:
        source: a folder, or the name of a hub's repository.
        image_token: see `Tokenizer.with_special_tokens`, as all that follow.
        languages: codes of languages.
        tokens: others.

    Raises:
        ValueError: if there is no tokenizer, or it cannot get these tokens.
    """
    tokenizer = Tokenizer.from_pretrained(find_folder(source, weights=False))
    return tokenizer.with_special_tokens(image_token=image_token, languages=languages, tokens=tokens)
