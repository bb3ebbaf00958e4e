"""Public captioners: from a folder as hubs have it to all that captions a picture."""

from pathlib import Path

from mmtransformer.backbones.vit import ViT
from mmtransformer.captioners.base import Captioner
from mmtransformer.generation.config import GenerationConfig
from mmtransformer.serialization.pretrained import CONFIG, read_json
from mmtransformer.weights.families import FAMILIES, Family, family_of
from mmtransformer.weights.processors.processor import Processor
from mmtransformer.weights.processors.settings import read_search


def captioner_family(folder: Path) -> Family | None:
    """The family whose captioner a folder holds, by its config.json alone; None = a model of this library.

    Raises:
        ValueError: saying what it holds instead.
    """
    config = read_json(folder / CONFIG)
    if "class" in config:
        return None
    name = family_of(config)
    family = FAMILIES.get(name or "")
    if family is not None and family.processor is not None:
        return family
    known = ", ".join(name for name, family in FAMILIES.items() if family.processor is not None)
    kind = config.get("model_type") or config.get("architecture")
    if family is None:
        what = f'model_type "{kind}" is of no family known here'
    elif any(issubclass(made, Captioner) for made in family.makes):
        what = f"the captioners of {name} have no processor here"
    else:
        what = f"a {'vision encoder' if ViT in family.makes else 'text model'} alone ({kind}), which does not caption"
    raise ValueError(f"{folder / CONFIG}: {what}; captioners are {known}")


def open_captioner(folder: Path) -> tuple[Captioner, Processor, GenerationConfig]:
    """A folder's captioner, with its pixels and prompts, and how it searches.

    Raises:
        ValueError: naming the file, for what is missing, damaged or not known here.
    """
    family = captioner_family(folder)
    assert family is not None
    assert family.processor is not None
    processor = family.processor(folder)
    generation, captioner = read_search(folder, prompt_len=processor.prompt_len), family.load(folder)
    if not isinstance(captioner, Captioner):
        raise ValueError(f"{folder} holds a {type(captioner).__name__}, which does not caption")
    return captioner, processor, generation
