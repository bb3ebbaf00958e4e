"""What a folder says of the model in it, also where others keep that in a file of another name."""

from pathlib import Path
from typing import Any

from mmtransformer.serialization.pretrained import CONFIG, read_json

OPEN_CLIP = "open_clip_config.json"
CHECKPOINT = "checkpoint.pt"


def folder_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json, with the `model_type` that its other files tell: open_clip's, OpenFlamingo's.

    Raises:
        ValueError: naming the file, if there is none or it is damaged.
    """
    here = (folder / CONFIG).exists()
    if not here and (folder / OPEN_CLIP).exists():
        return {"model_type": "open_clip", **read_json(folder / OPEN_CLIP)}
    config = read_json(folder / CONFIG) if here or not (folder / CHECKPOINT).exists() else {}
    told = config.keys() & {"model_type", "class", "architecture", "adapter"}
    return config if told or not (folder / CHECKPOINT).exists() else {"model_type": "openflamingo", **config}
