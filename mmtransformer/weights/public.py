"""Public captioners: from a folder as hubs have it to all that captions a picture."""

from pathlib import Path

from mmtransformer.captioners.base import Captioner
from mmtransformer.generation.config import GenerationConfig
from mmtransformer.serialization.pretrained import CONFIG, read_json
from mmtransformer.weights.families import FAMILIES, Family, family_of
from mmtransformer.weights.processors.processor import Processor
from mmtransformer.weights.processors.settings import read_search


def captioner_family(folder: Path) -> Family:
    """The family whose captioner a folder holds, by its config.json alone.

    Raises:
        ValueError: saying what it holds instead.
    """
    config = read_json(folder / CONFIG)
    name = family_of(config)
    family = FAMILIES.get(name or "")
    if family is not None and family.processor is not None:
        return family
    known = [name for name, family in FAMILIES.items() if family.processor is not None]
    kind = config.get("model_type") or config.get("architecture")
    what = f'a model of the family "{name}", which does not caption' if name else f'model_type "{kind}"'
    raise ValueError(f"{folder / CONFIG}: {what}; the captioners known here are {', '.join(known)}")


def open_captioner(folder: Path) -> tuple[Captioner, Processor, GenerationConfig]:
    """A folder's captioner, with its pixels and prompts, and how it searches.

    Raises:
        ValueError: naming the file, for what is missing, damaged or not known here.
    """
    family = captioner_family(folder)
    assert family.processor is not None
    processor, generation = family.processor(folder), read_search(folder)
    captioner = family.load(folder)
    if not isinstance(captioner, Captioner):
        raise ValueError(f"{folder} holds a {type(captioner).__name__}, which does not caption")
    return captioner, processor, generation
