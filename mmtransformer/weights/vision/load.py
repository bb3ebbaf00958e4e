"""Vision towers from folders, files and timm's names, and into folders that timm reads."""

import difflib
import inspect
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtransformer.backbones.vit import ViT
from mmtransformer.captioners.base import Captioner
from mmtransformer.images import ImageTransform
from mmtransformer.layers.lora import add_lora
from mmtransformer.layers.modes import freeze as freeze_module
from mmtransformer.serialization.hub import HubOptions
from mmtransformer.serialization.model_kinds import with_article
from mmtransformer.serialization.pretrained import CONFIG, WEIGHTS, Pretrained, find_folder, load_strictly, read_json
from mmtransformer.serialization.untrusted import built_from, said, settings_of
from mmtransformer.serialization.weight_files import read_safetensors
from mmtransformer.weights.processors.transforms import take_transform
from mmtransformer.weights.shared.dtype import DType, cast_frozen
from mmtransformer.weights.shared.folders import read_tensors, write_folder
from mmtransformer.weights.vision.timm import ViTSettings, from_timm, timm_config, to_timm, vit_from_state
from mmtransformer.weights.vision.transformers import READERS, vision_from_transformers


def load_vit(
    source: str | Path,
    *,
    settings: ViTSettings | None = None,
    image_size: int | tuple[int, int] | None = None,
    freeze: bool = False,
    keep_head: bool = False,
    dtype: DType = "float32",
    lora_rank: int = 0,
    lora_target_modules: Sequence[str] = ("q_proj", "v_proj"),
) -> ViT:
    """A pretrained ViT, from what is there: for recipes (`class_path: mmtransformer.weights.load_vit`).

    Its `transform` is how its pictures become pixels, by timm's data config or the folder's preprocessor_config.json.

    Args:
        source: a folder (a ViT saved by this library, a captioner, whose tower is taken, `config.json` and
            `model.safetensors` as timm and `save_timm` write them, or transformers' ViT, DeiT, DINOv2, DINOv3, CLIP,
            SigLIP or SigLIP 2, of dual encoders the vision tower alone), a `.safetensors` file with timm's names, the
            name of a timm model, or that of a hub's repository (org/name, as timm has it hf-hub:org/name@revision).
        settings: what a bare file does not say; needed for one, and for nothing else.
        image_size: picture size to resize the positions to, px; None = as trained, or as the folder's
            preprocessor_config.json says.
        freeze: whether the tower is taken out of training.
        keep_head: whether a classifier is kept; captioners do not read it.
        dtype: "bfloat16" keeps a tower that stays frozen in half the memory.
        lora_rank: width of low-rank products that learn beside the frozen weights, see `add_lora`; 0 = none. A
            captioner must then not freeze the tower itself (freeze_vision: false).
        lora_target_modules: ends of the names of the layers that get them.

    Raises:
        ValueError: naming what is missing or does not fit.
    """
    if lora_rank and (freeze or dtype != "float32"):
        raise ValueError(
            f"lora_rank ({lora_rank}) needs freeze false and dtype float32, not {str(freeze).lower()} and {dtype}: the "
            f"products learn, and are added to the weights in the end"
        )
    path = Path(source)
    is_file = not path.is_dir() and (path.suffix == ".safetensors" or path.exists())
    if is_file:
        vit = _from_file(path, settings)
    elif settings is not None:
        raise ValueError(f"{source} is no file: a folder and a name say by themselves what settings are for")
    elif path.is_dir():
        vit = _from_folder(path, keep_head=keep_head)
    elif "/" in (name := str(source)):
        repository, _, revision = name.removeprefix("hf-hub:").partition("@")
        folder = find_folder(repository, HubOptions(revision or None), look=_refuse_other)
        vit = _from_folder(folder, keep_head=keep_head)
    else:
        vit = _from_name(name)
    if not keep_head and vit.num_classes:
        vit.reset_classifier(0)
    if image_size is not None:
        vit.set_input_size(image_size)
    if lora_rank:
        add_lora(vit, lora_target_modules, rank=lora_rank, alpha=2.0 * lora_rank)
    cast_frozen(vit, dtype)
    return freeze_module(vit) if freeze else vit


def save_timm(vit: ViT, folder: str | Path) -> None:
    """Writes a folder that timm reads (`timm.create_model("local-dir:FOLDER")`), and `load_vit`.

    Raises:
        ValueError: if timm has no such tower, before anything is written.
    """
    write_folder(folder, timm_config(vit), to_timm(vit))


def _from_file(path: Path, settings: ViTSettings | None) -> ViT:
    state = read_safetensors(path)
    if settings is None:
        raise ValueError(
            f"{path}: tensors do not say how many heads they are for, which grid, activation, norm_eps and pooling: "
            f"give settings (ViTSettings), or a folder with the {CONFIG} that timm writes"
        )
    if not isinstance(settings, ViTSettings):
        names = ", ".join(field.name for field in fields(ViTSettings))
        raise TypeError(f"settings are a mmtransformer.weights.ViTSettings({names}), not a {type(settings).__name__}")
    with built_from(state, str(path)):
        return vit_from_state(state, settings, str(path))


def _from_folder(folder: Path, *, keep_head: bool) -> ViT:
    config = read_json(folder / CONFIG)
    if "class" in config:
        if config["class"] == ViT.__name__:
            vit = ViT.from_pretrained(folder)
        else:
            model = Pretrained.from_pretrained(folder)
            if not isinstance(model, Captioner):
                raise ValueError(
                    f"{folder} holds {with_article(type(model).__name__)}, neither a ViT nor a captioner that has one"
                )
            vit = model.vision
        if (path := folder / "preprocessor.json").exists():  # of a pipeline's folder
            vit.transform = settings_of(ImageTransform, read_json(path), str(path))
        return vit
    if isinstance(kind := config.get("model_type"), str) and kind in READERS:
        state = read_tensors(folder)
        with built_from(state, str(folder)):
            vit = vision_from_transformers(config, state, str(folder), keep_head=keep_head)
        take_transform(vit, folder, kind)
        return vit
    if "architecture" not in config:
        raise ValueError(
            f'{folder / CONFIG} has neither "class" (a model of this library) nor "architecture" (one of timm), and '
            f'its "model_type" is {config.get("model_type")!r:.40}, not one of '
            f"{', '.join(READERS)} (transformers); of tensors with timm's names alone, give the file "
            f"itself, with settings"
        )
    state = read_safetensors(folder / WEIGHTS)
    with built_from(state, str(folder / CONFIG)):
        return _as_timm_wrote(folder, config, state)


def _as_timm_wrote(folder: Path, config: dict[str, Any], state: dict[str, Tensor]) -> ViT:
    import timm
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.eva import Eva
    from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
    from timm.models.vision_transformer import VisionTransformer

    name, classes = config["architecture"], state.get("head.bias", torch.empty(0)).shape[0]
    if not isinstance(name, str) or not timm.is_model(name):
        raise ValueError(f'{folder / CONFIG}: timm has no model "{name}"')
    given = config.get("model_args", {})
    # timm's own arguments would read other files (checkpoint_path) and fetch some (pretrained_cfg).
    allowed = {name for kind in (VisionTransformer, Eva, NaFlexVitCfg) for name in inspect.signature(kind).parameters}
    if other := sorted(set(given) - allowed):
        raise ValueError(f"{folder / CONFIG}: model_args {', '.join(other)} are no sizes of a Vision Transformer")
    model = timm.create_model(name, pretrained=False, **{"num_classes": classes} | given)
    if type(model) not in (VisionTransformer, VisionTransformerDistilled, Eva, NaFlexVit):
        raise ValueError(
            f"{folder / CONFIG}: {name} is timm's {type(model).__name__}, which is not a ViT that loads; "
            f"docs/towers.md lists the names that do"
        )
    load_strictly(model, state, str(folder / WEIGHTS))
    if isinstance(data := config.get("pretrained_cfg"), dict):
        own: Any = model.pretrained_cfg
        model.__dict__["pretrained_cfg"] = {**own, **data}
    try:
        return from_timm(model)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}; docs/towers.md lists the names that load") from error


def _refuse_other(folder: Path) -> None:
    """Refuses a folder whose config.json names no tower, before its weights are fetched."""
    config = read_json(folder / CONFIG)
    if "class" not in config and "architecture" not in config and config.get("model_type") not in READERS:
        _from_folder(folder, keep_head=False)


def _from_name(name: str) -> ViT:
    import timm

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, _loading(), n=3)
        raise ValueError(
            f'"{name}" is no folder, no file and no timm model' + (f"; did you mean {', '.join(near)}?" if near else "")
        )
    try:
        with torch.device("meta"):  # Whether it fits is known before its weights are fetched.
            from_timm(timm.create_model(name))
    except ValueError as error:
        raise ValueError(f"{name}: {error}; docs/towers.md lists the names that load") from error
    known = timm.get_pretrained_cfg(name)
    if known is None or not (known.hf_hub_id or known.url):
        raise ValueError(f"{name}: timm has no weights of that name; docs/towers.md lists the names that load")
    try:
        # timm asks the hub six times for each of two files before it gives up.
        given = {"state_dict": read_tensors(find_folder(known.hf_hub_id))} if known.hf_hub_id else None
        return from_timm(timm.create_model(name, pretrained=True, pretrained_cfg_overlay=given))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    except (OSError, RuntimeError) as error:
        raise ValueError(f"timm could not load {name}: {said(error)}. Without a network, give a folder") from error


def _loading() -> list[str]:
    """Timm's names of the kinds that load."""
    import timm

    kinds = ("vision_transformer", "deit", "eva", "beit", "naflexvit")
    other = ("vit_relpos", "vit_srelpos", "samvit")  # of other classes in these files
    return [name for kind in kinds for name in timm.list_models(module=kind) if not name.startswith(other)]


def tower_width(source: str | Path) -> int | None:
    """The width of the tokens of what `load_vit` would load; None = only loading it will tell."""
    folder = Path(source)
    if not folder.is_dir():
        return None if folder.exists() else _timm_width(str(source), {})
    if not (folder / CONFIG).is_file():
        return None
    config = read_json(folder / CONFIG)
    if isinstance(name := config.get("architecture"), str):
        return _timm_width(name, config.get("model_args") or {})
    inner: Any = config.get("args") or config.get("vision_config") or config
    inner = (inner.get("vision") or {}).get("args") or inner if isinstance(inner, dict) else {}
    width = inner.get("dim", inner.get("hidden_size"))
    return width if isinstance(width, int) else None


def _timm_width(name: str, arguments: dict[str, Any]) -> int | None:
    import timm

    if isinstance(width := arguments.get("embed_dim"), int):
        return width
    if not timm.is_model(name):
        return None
    with torch.device("meta"):
        return getattr(timm.create_model(name), "embed_dim", None)
