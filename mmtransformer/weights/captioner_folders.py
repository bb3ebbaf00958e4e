"""Public captioners: from a folder as hubs have it to all that captions a picture."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtransformer.backbones.vit import ViT
from mmtransformer.captioners.base import Captioner
from mmtransformer.generation.config import GenerationConfig
from mmtransformer.images import ImageTransform
from mmtransformer.serialization.folder_config import OPEN_CLIP, folder_config
from mmtransformer.serialization.hub import HubOptions
from mmtransformer.serialization.model_kinds import with_article
from mmtransformer.serialization.pretrained import CONFIG, open_weights, read_json
from mmtransformer.serialization.printable import json_text, markup
from mmtransformer.serialization.untrusted import built_from, check_plain
from mmtransformer.serialization.weight_files import read_safetensors, write_weights
from mmtransformer.text.tokenizer import Tokenizer
from mmtransformer.weights.adapters import Adapter, is_adapter
from mmtransformer.weights.captioners.hf import hf_types
from mmtransformer.weights.dual_encoders.transformers import DUAL_ENCODER_TYPES
from mmtransformer.weights.families import FAMILIES, Family, families_for, family_of
from mmtransformer.weights.processors.generation_config import read_search
from mmtransformer.weights.processors.pixels import to_preprocess_cfg, to_preprocessor
from mmtransformer.weights.processors.processor import Processor
from mmtransformer.weights.shared.folders import read_tensors

_CARD = "README.md"
HF = "hf"
"""The family of all that transformers alone holds."""
_BESIDE = (".json", ".txt", ".jinja", ".model")


def captioner_family(folder: Path) -> Family | None:
    """The family whose captioner a folder holds, by its config.json; None = a model of this library, or an adapter.

    Raises:
        ValueError: saying what it holds instead.
    """
    config = folder_config(folder)
    if "class" in config or is_adapter(config):
        return None
    name = family_of(config)
    family = FAMILIES.get(name or "")
    held = family is not None and family.processor is not None and family.holds(config)
    if not held and config.get("model_type") in hf_types():
        return FAMILIES[HF]
    if family is not None and family.processor is not None:
        return family
    known = ", ".join(name for name, family in FAMILIES.items() if family.processor is not None and name != HF)
    kind = config.get("model_type") or config.get("architecture")
    if kind in (*DUAL_ENCODER_TYPES, "open_clip"):
        file = OPEN_CLIP if kind == "open_clip" else CONFIG
        raise ValueError(
            f"{folder / file}: a dual encoder ({kind}), which does not caption: use `mmt search`, or ImageTextEmbedder"
        )
    if family is None:
        what = f'model_type "{kind}" is of no family known here'
    elif any(issubclass(made, Captioner) for made in family.makes):
        what = f"the captioners of {name} have no processor here"
    else:
        what = f"a {'vision encoder' if ViT in family.makes else 'text model'} alone ({kind}), which does not caption"
    raise ValueError(f"{folder / CONFIG}: {what}; captioners are {known}, and transformers' others")


def readers_of(folder: Path) -> list[str]:
    """What reads the public model that a folder holds, by its config.json; nothing where it is of no known kind."""
    config = folder_config(folder)
    kind, family = config.get("model_type"), FAMILIES.get(family_of(config) or "")
    found = []
    if kind in DUAL_ENCODER_TYPES or (kind == "open_clip" and family is None):
        found.append("ImageTextEmbedder (`mmt search`), whose classify(images, labels) takes classes by their names")
    if is_adapter(config) or kind in hf_types() or (family is not None and family.processor is not None):
        found.append("ImageCaptioner (`mmt caption`)")
    elif family is not None:
        found.append(f"{family.load.__name__} of mmtransformer.weights")
    return found


def open_captioner(
    folder: Path,
    options: HubOptions = HubOptions(),  # noqa: B008 (frozen)
) -> tuple[Captioner, Processor, GenerationConfig]:
    """A folder's captioner, with its pixels and prompts, and how it searches; of an adapter, its base with it merged.

    Args:
        folder: the folder.
        options: how the base of an adapter is looked up, if it is a name, and models that a folder names.

    Raises:
        ValueError: naming the file, for what is missing, damaged or not known here.
    """
    if is_adapter(folder_config(folder)):
        adapter = Adapter.read(folder)
        captioner, processor, generation = open_captioner(adapter.find_base(folder, options), options)
        adapter.apply(captioner, str(folder / CONFIG))
        processor.adapted = True
        return captioner, processor, generation
    family = captioner_family(folder)
    assert family is not None
    assert family.processor is not None
    with built_from({}, str(folder)):
        processor = family.processor(folder, **family.options(options))
        generation = read_search(folder, prompt_len=processor.prompt_len, usual=processor.usual_search)
    captioner = family.load(folder, **family.options(options))
    processor.folder, processor.options = folder, options
    if not isinstance(captioner, Captioner):
        raise ValueError(f"{folder} holds {with_article(type(captioner).__name__)}, which does not caption")
    return captioner, processor, generation


def save_captioner(
    captioner: Captioner,
    base: Path,
    folder: Path,
    *,
    note: str = "",
    options: HubOptions = HubOptions(),  # noqa: B008 (frozen)
) -> None:
    """Writes a public captioner as transformers reads it, with all else that stands in the folder it came from.

    What its config.json says beside the family's sizes stays; tensors keep the base's number format where that loses
    nothing. The card names the base and its licence.

    Args:
        captioner: the captioner, of the base's family.
        base: the folder that it was loaded from.
        folder: where to.
        note: for the card: how it was trained, its scores.
        options: how models that the base names are looked up.

    Raises:
        ValueError: if the family has no place for what was done to it, before anything is written.
    """
    family, config = captioner_family(base), folder_config(base)
    assert family is not None
    if folder.resolve() == base.resolve():
        raise ValueError(f"{folder} is the folder that the model came from: give another to write to")
    family.save(captioner, folder, **family.save_options(config, base), **family.options(options))
    for path in base.iterdir():
        if path.suffix in _BESIDE and path.name != family.config and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
        elif path.is_dir() and path.name == "qformer_tokenizer":
            shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
    written = read_json(folder / family.config) | _as_base(folder / family.weights, base, config)
    text = json.dumps(_joined(family.kept(config), written), indent=2, ensure_ascii=False)
    (folder / family.config).write_text(text + "\n", encoding="utf-8")
    _write_card(base, folder, note)


def save_adapter(adapter: Adapter, base: Path, folder: Path, *, note: str = "") -> None:
    """Writes an adapter, with a card that names the base and its licence.

    Args:
        adapter: the adapter.
        base: the folder of its base.
        folder: where to.
        note: for the card: how it was trained, its scores.
    """
    adapter.save(folder)
    usage = "An adapter: `ImageCaptioner.from_pretrained` of this folder finds the base, and `mmt export` merges both."
    _write_card(base, folder, f"{usage}\n\n{note}", name=adapter.base, library="mmtransformer")


def export_captioner(
    captioner: Captioner,
    tokenizer: Tokenizer,
    transform: ImageTransform,
    folder: Path,
    family: str | None = None,
    *,
    reader: str | None = None,
) -> str:
    """Writes a captioner of this library as one of a public family, with its tokenizer and image processor.

    Args:
        captioner: the captioner.
        tokenizer: its tokenizer.
        transform: its pixels.
        folder: where to.
        family: which family; None = the first that has a place for all of it.
        reader: who shall read it, such as "transformers"; None = anyone.

    Returns:
        The family.

    Raises:
        ValueError: if no family has, saying of each why, before anything is written.
    """
    pixels, why, fitting = to_preprocessor(transform), [], families_for(captioner)
    if family not in (None, *FAMILIES):
        raise ValueError(f'no family is called "{family}": {", ".join(FAMILIES)}')
    if family not in (None, *fitting):
        fit = ", ".join(fitting) or "none"
        raise ValueError(f"{family} is no family of a {type(captioner).__name__}, which fits {fit}")
    for name in fitting if family is None else [family]:
        if reader not in (None, FAMILIES[name].reader):
            why.append(f"{name}: {FAMILIES[name].reader} reads it, not {reader}")
            continue
        try:
            FAMILIES[name].save(captioner, folder, **_ids(tokenizer, transform, name))
        except (ValueError, TypeError) as error:
            why.append(f"{name}: {error}")
            continue
        tokenizer.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(pixels, indent=2) + "\n", encoding="utf-8")
        return name
    what = (
        f"{with_article(type(captioner).__name__)} with these parts cannot be written for {reader or 'other libraries'}"
    )
    raise ValueError(
        f"{what}: a public model can, or one trained on from it, or one with the parts of a public family. The folder "
        f"it is saved in can be shared as it is: mmtransformer reads it. {'; '.join(why) or 'No family is like it'}"
    )


def _ids(tokenizer: Tokenizer, transform: ImageTransform, family: str) -> dict[str, Any]:
    """What a family's `save` asks for: ids as the tokenizer has them, open_clip's words for the pixels."""
    start, end, pad = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
    ids: dict[str, dict[str, Any]] = {
        "blip": {"bos_token_id": start, "sep_token_id": end, "pad_token_id": pad},
        "blip2": {"image_token_id": tokenizer.image_token_id},
        "open_coca": {"pixels": to_preprocess_cfg(transform)},
        "vision-encoder-decoder": {"decoder_start_token_id": start, "eos_token_id": end, "pad_token_id": pad},
    }
    return ids.get(family, {})


def _as_base(weights: Path, base: Path, config: dict[str, Any]) -> dict[str, str]:
    """Writes as the base has it what is the same: number formats, and what was added up or left out when it was loaded.

    Those are the class token, to which its position was added, and OPT's rows of positions that no text has.

    Returns:
        What config.json says of the number format.
    """
    name = str(config.get("dtype", config.get("torch_dtype", "float32"))).removeprefix("torch.")
    half = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(name)
    state, before = read_safetensors(weights), read_tensors(base)
    for key in list(state):
        if key.endswith("model.decoder.embed_positions.weight") and key in before:
            state[key] = torch.cat((before[key][:2].to(state[key].dtype), state[key][2:]))
        if key.endswith((".class_embedding", ".cls_token")):
            prefix = key.rpartition(".")[0]
            ends = ("_embedding", "_embedding.weight", "_embeddings", "al_embedding")
            for positions in (f"{prefix}.position{end}" for end in ends):
                if positions in state and {key, positions} <= before.keys():
                    old, new = (
                        (x[key].float().flatten(), x[positions].float().flatten(0, -2)) for x in (before, state)
                    )
                    if old[1].shape == new[1].shape and torch.equal(old[0] + old[1][0], new[0] + new[1][0]):
                        state[key] = before[key].float()
                        rest = torch.cat((old[1][:1], new[1][1:])).view_as(state[positions])
                        state[positions] = rest
    kept: dict[str, Tensor] = {}
    if half is not None:
        kept = {key: tensor.to(half) for key, tensor in state.items() if torch.equal(tensor.to(half).float(), tensor)}
    write_weights(weights, state | kept)
    if (weights.parent / CONFIG).exists():
        open_weights(weights.parent, weights.name)
    return {"dtype": name} if half is not None and len(kept) == len(state) else {}


def _joined(base: dict[str, Any], written: dict[str, Any]) -> dict[str, Any]:
    """The base's config with what the family writes in place of its own values, part by part."""
    both = {key: _joined(base[key], value) for key, value in written.items() if _parts(base.get(key), value)}
    kept = {key: value for key, value in base.items() if key not in ("dtype", "torch_dtype", "auto_map")}
    return kept | written | both


def _parts(*values: Any) -> bool:
    return all(isinstance(value, dict) for value in values)


def _write_card(base: Path, folder: Path, note: str, *, name: str = "", library: str = "transformers") -> None:
    """README.md: the base and its licence in its head, as a hub shows it."""
    licence, name = "unknown", name or base_name(base)
    if (path := base / _CARD).exists():
        check_plain(path)
        found = re.search(r"^license:[ ]*([\w.-]+)[ ]*$", path.read_text("utf-8", "replace")[:20_000], re.MULTILINE)
        licence = found[1] if found else licence
    head = ["---", f"library_name: {library}", "pipeline_tag: image-to-text", f"license: {licence}"]
    head += [f"base_model: {json_text(name)}", "---"]
    lines = [*head, "", f"# {markup(folder.resolve().name)}", "", f"Made with mmtransformer from {markup(name)}, whose"]
    lines += [f"licence ({licence}) it has.", "", note]
    (folder / _CARD).write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def base_name(folder: Path) -> str:
    """What a folder is called: the repository's name where it lies in a hub's cache."""
    for part in folder.parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    return folder.resolve().name
