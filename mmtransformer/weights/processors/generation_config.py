"""generation_config.json -> how a public captioner's texts are searched for, and the ids that end them."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmtransformer.generation.config import GenerationConfig
from mmtransformer.serialization.pretrained import CONFIG, read_json

GENERATION = "generation_config.json"
_SEARCH = ("num_beams", "length_penalty", "repetition_penalty", "no_repeat_ngram_size", "do_sample", "temperature",
           "top_k", "top_p")  # fmt: skip
_UNSUPPORTED = {
    "num_beam_groups": 1, "diversity_penalty": 0.0, "num_return_sequences": 1, "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0, "typical_p": 1.0, "min_p": 0.0,
    "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "guidance_scale": 1.0, "renormalize_logits": False,
    "token_healing": False,
}  # fmt: skip
"""Settings that would change a text and have no counterpart here, with the values at which they do nothing."""
_OF_NO_EFFECT = {
    "max_length", "min_length", "max_new_tokens", "min_new_tokens", "pad_token_id", "bos_token_id", "eos_token_id",
    "decoder_start_token_id", "transformers_version", "_from_model_config", "use_cache", "cache_implementation",
    "cache_config", "max_cache_len", "return_legacy_cache", "compile_config", "disable_compile", "low_memory",
    "continuous_batching_config", "prefill_chunk_size", "return_dict_in_generate", "remove_invalid_values", "use_mtp",
    "is_assistant", "prompt_lookup_num_tokens", "max_matching_ngram_size", "speculation_type", "target_lookbehind",
}  # fmt: skip
"""What is read elsewhere here, or says how a text is computed and not which; all else is named where it is set."""
_NO_EFFECT_BEFORE = ("output_", "assistant_", "num_assistant_")
_DRAWN_FROM = 50
"""Likeliest tokens that are drawn from where nobody says how many: transformers' silent limit."""
_USUAL_NEW = 20
"""New tokens where nobody says how many: transformers' silent limit."""


def read_search(folder: Path, *, prompt_len: int = 0, usual: Mapping[str, Any] | None = None) -> GenerationConfig:
    """The search of a folder's generation_config.json; greedy, 20 new tokens, where it has none.

    It is followed for every family, also where transformers' own `generate` ignores it (BLIP, BLIP-2, InstructBLIP).
    Settings that have no counterpart here, or are not known, are named in a warning.

    Args:
        folder: the folder.
        prompt_len: tokens of a prompt without words, which transformers counts in max_length and min_length.
        usual: what the family takes for granted where the folder has no such file.

    Raises:
        ValueError: naming a setting that makes no sense.
    """
    path = folder / GENERATION
    found = read_json(path) if path.exists() else usual or {}
    said = {key: value for key, value in found.items() if value is not None}
    for key in ("num_beams", "max_length", "min_length"):
        if type(said.get(key, 1)) is not int:
            raise ValueError(f"{path}: {key} must be a whole number, not {said[key]!r:.80}")
    others = [key for key in said if not _does_nothing(key, said[key])]
    if said.get("num_beams", 1) > 1 and said.get("do_sample"):
        others.append("do_sample among beams")
    if others:
        warnings.warn(
            f"{path}: {', '.join(others)}: not supported here, so texts may differ from transformers'", stacklevel=3
        )
    values = {key: said[key] for key in _SEARCH if key in said}
    if values.get("num_beams", 1) > 1:
        values.pop("do_sample", None)
    if not values.get("do_sample"):
        for name in ("temperature", "top_k", "top_p"):  # of no effect there
            values.pop(name, None)
    elif not values.setdefault("top_k", _DRAWN_FROM):
        values["top_k"] = None  # 0 = all
    for least, silent in (("max", _USUAL_NEW + prompt_len), ("min", 0)):
        counted = max(said.get(f"{least}_length", silent) - prompt_len, 0)
        values[f"{least}_new_tokens"] = said.get(f"{least}_new_tokens", counted)
    try:
        return GenerationConfig(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _does_nothing(key: str, value: Any) -> bool:
    """Whether a setting is followed here, or changes no text."""
    known = key in _SEARCH or key in _OF_NO_EFFECT or key.startswith(_NO_EFFECT_BEFORE)
    return known or value == [] or (key in _UNSUPPORTED and value == _UNSUPPORTED[key])


def read_ends(folder: Path, *places: str) -> tuple[int, ...]:
    """The ids that end a text: `eos_token_id` of generation_config.json, else of config.json.

    Args:
        folder: the folder.
        places: parts of config.json where it may stand besides its top, such as "text_config".

    Raises:
        ValueError: if no file says.
    """
    for values in _said(folder, places):
        ends = values.get("eos_token_id")
        ends = [ends] if isinstance(ends, int) else ends
        if isinstance(ends, list) and ends and all(isinstance(end, int) for end in ends):
            return tuple(ends)
        if ends is not None:
            raise ValueError(f"{folder}: eos_token_id is {ends!r:.80}, not an id or a list of ids")
    raise ValueError(f"{folder}: neither {GENERATION} nor {CONFIG} says eos_token_id, the id that ends a text")


def read_start(folder: Path, *places: str) -> int:
    """The id that an encoder-decoder's text begins with: `decoder_start_token_id`, else `bos_token_id`.

    Args:
        folder: the folder.
        places: see `read_ends`.

    Raises:
        ValueError: if no file says.
    """
    for key in ("decoder_start_token_id", "bos_token_id"):
        for values in _said(folder, places):
            if isinstance(start := values.get(key), int):
                return start
    raise ValueError(
        f"{folder}: neither {GENERATION} nor {CONFIG} says decoder_start_token_id, the id that a text begins with"
    )


def _said(folder: Path, places: tuple[str, ...]) -> list[dict[str, Any]]:
    """What a folder says of generation, first the file that it is for."""
    path, config = folder / GENERATION, read_json(folder / CONFIG)
    return [*([read_json(path)] if path.exists() else []), config, *(config.get(place, {}) for place in places)]
