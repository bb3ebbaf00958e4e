"""generation_config.json -> how a public captioner's texts are searched for, and the ids that end them."""

from pathlib import Path
from typing import Any

from mmtransformer.generation.config import GenerationConfig
from mmtransformer.serialization.pretrained import CONFIG, read_json

GENERATION = "generation_config.json"
_SEARCH = ("num_beams", "length_penalty", "repetition_penalty", "no_repeat_ngram_size", "do_sample", "temperature",
           "top_k", "top_p")  # fmt: skip
_USUAL_NEW = 20
"""New tokens where nobody says how many: transformers' silent limit."""


def read_search(folder: Path) -> GenerationConfig:
    """The search of a folder's generation_config.json; greedy, 20 new tokens, where it has none.

    It is heeded for every family, also where transformers' own `generate` passes it over (BLIP, BLIP-2, InstructBLIP,
    Kosmos-2).

    Raises:
        ValueError: naming a setting that makes no sense.
    """
    path = folder / GENERATION
    said = {key: value for key, value in (read_json(path) if path.exists() else {}).items() if value is not None}
    values = {key: said[key] for key in _SEARCH if key in said}
    if values.get("num_beams", 1) > 1:
        values.pop("do_sample", None)
    if not values.get("do_sample"):
        for name in ("temperature", "top_k", "top_p"):  # of no effect there
            values.pop(name, None)
    values["max_new_tokens"] = said.get("max_new_tokens", said.get("max_length", _USUAL_NEW))
    values["min_new_tokens"] = said.get("min_new_tokens", 0)
    try:
        return GenerationConfig(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_ends(folder: Path, *places: str) -> tuple[int, ...]:
    """The ids that end a text: `eos_token_id` of generation_config.json, else of config.json.

    Args:
        folder: the folder.
        places: parts of config.json where it may stand besides its top, such as "text_config".

    Raises:
        ValueError: if no file says.
    """
    path, config = folder / GENERATION, read_json(folder / CONFIG)
    tries: list[Any] = [read_json(path)] if path.exists() else []
    tries += [config, *(config.get(place, {}) for place in places)]
    for values in tries:
        ends = values.get("eos_token_id")
        ends = [ends] if isinstance(ends, int) else ends
        if isinstance(ends, list) and ends and all(isinstance(end, int) for end in ends):
            return tuple(ends)
    raise ValueError(f"{folder}: neither {GENERATION} nor {CONFIG} says eos_token_id, the id that ends a text")
