"""How wide a public tower's tokens are, before its weights are read."""

from pathlib import Path
from typing import Any

import torch

from mmtransformer.serialization.pretrained import CONFIG, read_json


def tower_width(source: str | Path) -> int | None:
    """The width of the tokens of what `load_vit` would load; None = only loading it will tell."""
    folder = Path(source)
    if not folder.is_dir():
        return None if folder.exists() else _of_timm(str(source), {})
    if not (folder / CONFIG).is_file():
        return None
    config = read_json(folder / CONFIG)
    if isinstance(name := config.get("architecture"), str):
        return _of_timm(name, config.get("model_args") or {})
    inner: Any = config.get("args") or config.get("vision_config") or config
    inner = (inner.get("vision") or {}).get("args") or inner if isinstance(inner, dict) else {}
    width = inner.get("dim", inner.get("hidden_size"))
    return width if isinstance(width, int) else None


def _of_timm(name: str, arguments: dict[str, Any]) -> int | None:
    import timm

    if isinstance(width := arguments.get("embed_dim"), int):
        return width
    if not timm.is_model(name):
        return None
    with torch.device("meta"):
        return getattr(timm.create_model(name), "embed_dim", None)
