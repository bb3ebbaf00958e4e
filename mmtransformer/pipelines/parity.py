"""How far a public captioner here is from transformers': pixels, prompts, logits and ids, picture by picture."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmtransformer.captioners.published.blip import BlipVQA
from mmtransformer.captioners.published.hf_captioner import HFCaptioner
from mmtransformer.generation.loop import generate
from mmtransformer.images import load
from mmtransformer.pipelines.base import ImageLike
from mmtransformer.pipelines.image_captioner import ImageCaptioner
from mmtransformer.serialization.folder_config import folder_config
from mmtransformer.serialization.pretrained import CONFIG, find_folder, read_json
from mmtransformer.serialization.untrusted import said
from mmtransformer.weights.adapters import is_adapter
from mmtransformer.weights.families import FAMILIES, family_of

TOLERANCE = 1e-4
"""Of logits, relative to the largest: what float32 loses in a large model; small ones are equal to 1e-6."""


@dataclass(frozen=True)
class Given:
    """What transformers is given for one picture.

    Attributes:
        pixels: its pixels.
        generate: arguments of its `generate`.
        prompt: what stands before the new ids in what it returns.
        forward: arguments of a pass whose last logits are those of the first new token; None = there is no such pass.
        read: all ids that are read, where they are not those of `prompt`, as by a T5, which has an encoder.
    """

    pixels: Tensor
    generate: dict[str, Any]
    prompt: list[int]
    forward: dict[str, Any] | None
    read: list[int] | None = None


@dataclass
class Parity:
    """The differences between the two, a line a picture and stage.

    Attributes:
        family: the model's family.
        rows: (picture, stage, difference, whether it is none).
    """

    family: str
    rows: list[tuple[str, str, str, bool]] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether there is no difference."""
        return all(equal for *_, equal in self.rows)

    def table(self) -> str:
        """As lines of text."""
        width = max(len(name) for name, *_ in self.rows)
        lines = [f"{name:<{width}}  {stage:<18}{'=' if same else '!'}  {said}" for name, stage, said, same in self.rows]
        bad = sum(not same for *_, same in self.rows)
        end = "no difference" if not bad else f"{bad} of {len(self.rows)} lines differ"
        return "\n".join([*lines, f"{self.family}: {end}"])


def compare(
    name_or_path: str | Path,
    images: Sequence[ImageLike] = (),
    *,
    prompt: str | None = None,
    max_new_tokens: int = 20,
    num_beams: int = 3,
) -> Parity:
    """Captions pictures with a public model here and in transformers, on a CPU in float32, and compares every stage.

    Args:
        name_or_path: the folder, or the name of a hub's repository; of an adapter, what `mmt export` would write.
        images: the pictures; three small ones that are drawn here unless told.
        prompt: the words; the family's own unless told.
        max_new_tokens: most new tokens.
        num_beams: of the second search; the first is greedy.

    Raises:
        ValueError: for a model that cannot be compared, saying why.
    """
    folder = find_folder(name_or_path)
    config = folder_config(folder)
    if "class" in config:
        raise ValueError(f"{folder} is a model of this library, and transformers has none to compare it with")
    if (name := family_of(config)) and (reader := FAMILIES[name].reader) != "transformers":
        raise ValueError(f"{folder} is a model that {reader} reads, and transformers has none to compare it with")
    ours = ImageCaptioner.from_pretrained(folder, device="cpu")
    if isinstance(ours.model, HFCaptioner):
        kind = config.get("model_type")
        raise ValueError(f"{folder}: {kind} runs in transformers itself, so there is nothing to compare")
    with tempfile.TemporaryDirectory() as written:
        if is_adapter(config):
            ours.save_pretrained(written)
            folder, config = Path(written), read_json(Path(written) / CONFIG)
        theirs = _theirs(folder, config)
    family = str(family_of(config))
    asked = _ASKED.get(config["model_type"], _asked_in_chat)
    report = Parity(str(config["model_type"]) if family == "llava" else family)
    named = [(str(image), load(image)) for image in images] or [*_drawn().items()]
    for name, image in named:
        with _there(f"{folder}: transformers cannot read this prompt and picture"):
            given = asked(theirs, image, prompt, ours)
        _stages(report, Path(name).name[-30:], ours, theirs[0], given, image, prompt, max_new_tokens, num_beams)
    return report


def _stages(
    report: Parity,
    name: str,
    ours: ImageCaptioner,
    model: Any,
    given: Given,
    image: Image.Image,
    prompt: str | None,
    max_new_tokens: int,
    num_beams: int,
) -> None:
    assert ours.processor is not None
    batch = ours.processor.with_prompts(ours.batch([image]), [prompt])
    assert batch.pixels is not None
    mine, want = batch.pixels.flatten(0, 1), given.pixels.reshape(-1, *given.pixels.shape[-3:])
    if mine.shape != want.shape:
        report.rows.append((name, "pixels", f"{tuple(mine.shape)} here, {tuple(want.shape)} there", False))
        return
    far = (mine - want).abs().max().item()
    report.rows.append((name, "pixels", f"largest difference {far:.2g}", far == 0.0))
    placeholder = getattr(model.config, "image_token_index", getattr(model.config, "image_token_id", None))
    shown = batch.tokens[0].tolist()
    told = given.prompt if given.read is None else given.read
    told = told if len(told) == len(shown) else [i for i in told if i != placeholder]
    report.rows.append((name, "prompt ids", _differ(shown, told), shown == told))
    with torch.no_grad():
        if given.forward is not None:
            found = ours.model.prefill(batch)[0][0]
            with _there("transformers' model cannot compute"):
                there = model(**given.forward).logits[0, -1]
            far = ((found - there).abs().max() / there.abs().max()).item()
            report.rows.append((name, "logits", f"largest difference {far:.2g} of the largest", far <= TOLERANCE))
        for search, beams in (("greedy ids", 1), (f"ids of {num_beams} beams", num_beams)):
            settings = ours.generation.updated(max_new_tokens=max_new_tokens, num_beams=beams, do_sample=False)
            best = generate(ours.model, batch, settings, eos_id=ours.tokenizer.eos_ids)[0][0].tokens
            same: dict[str, Any] = {
                key: getattr(settings, key)
                for key in ("min_new_tokens", "length_penalty", "repetition_penalty", "no_repeat_ngram_size")
            }
            if model.config.model_type != "blip":  # It gives its own ends by itself.
                same["eos_token_id"] = list(ours.tokenizer.eos_ids)
            more = {"max_new_tokens": max_new_tokens, "num_beams": beams, "do_sample": False, "early_stopping": False}
            with _there("transformers' model cannot generate"):
                row = model.generate(**given.generate, **more, **same)[0]
            new = row.tolist()[len(given.prompt) :]
            ends = [i for i, token in enumerate(new) if token in ours.tokenizer.eos_ids]
            new = new[: ends[0]] if ends else new
            report.rows.append((name, search, _differ([*best], new), [*best] == new))


def _differ(mine: list[int], theirs: list[int]) -> str:
    if mine == theirs:
        return f"{len(mine)}, all the same"
    at = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs)))
    here, there = (str(row[at]) if at < len(row) else "the end" for row in (mine, theirs))
    return f"{len(mine)} here and {len(theirs)} there; number {at + 1} is {here} here and {there} there"


def _theirs(folder: Path, config: dict[str, Any]) -> tuple[Any, Any]:
    """Their model and processor; no code of the folder's runs."""
    try:
        import transformers
    except ImportError as error:
        raise ValueError("mmt parity needs transformers: pip install transformers") from error
    name = (config.get("architectures") or [""])[0]
    kind: Any = getattr(transformers, name, None) or transformers.AutoModelForImageTextToText
    with _there(f"{folder}: transformers cannot load it"):
        model = kind.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False, local_files_only=True).eval()
        if config["model_type"] == "vision-encoder-decoder":
            pixels = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            return model, (pixels, tokenizer)
        return model, transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=False)


@contextmanager
def _there(what: str) -> Iterator[None]:
    """Where transformers works: almost any error comes out of a folder that it cannot read or run."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}, so there is nothing to compare: {said(error)}") from error


Theirs = tuple[Any, Any]
"""Their model and processor."""


def _asked_of_blip(theirs: Theirs, image: Image.Image, text: str | None, ours: ImageCaptioner) -> Given:
    model, processor = theirs
    given = processor(images=image, text=text, return_tensors="pt")
    if isinstance(ours.model, BlipVQA):  # Its question is encoded; no pass has the logits of an answer alone.
        start = int(model.decoder_start_token_id)
        return Given(given["pixel_values"], dict(given), [start], None)
    start = [int(model.config.text_config.bos_token_id)]
    ids = start if text is None else start + given["input_ids"][0, 1:-1].tolist()
    forward = {"pixel_values": given["pixel_values"], "input_ids": torch.tensor([ids])}
    return Given(given["pixel_values"], dict(given), ids, forward)


def _asked_of_ved(theirs: Theirs, image: Image.Image, text: str | None, ours: ImageCaptioner) -> Given:
    model, (pixels, tokenizer) = theirs
    shown = pixels(image, return_tensors="pt")["pixel_values"]
    said = model.generation_config.decoder_start_token_id
    ids = [int(model.config.decoder_start_token_id if said is None else said)]
    ids += [] if text is None else tokenizer(text, add_special_tokens=False).input_ids
    start = {"pixel_values": shown, "decoder_input_ids": torch.tensor([ids])}
    return Given(shown, start, ids, start)


def _asked_of_git(theirs: Theirs, image: Image.Image, text: str | None, ours: ImageCaptioner) -> Given:
    _, processor = theirs
    shown = processor(images=image, return_tensors="pt")["pixel_values"]
    said = [] if text is None else processor.tokenizer(text, add_special_tokens=False).input_ids
    ids = [int(processor.tokenizer.cls_token_id), *said]
    both = {"pixel_values": shown, "input_ids": torch.tensor([ids])}
    return Given(shown, both, ids, both)


def _asked_of_blip2(theirs: Theirs, image: Image.Image, text: str | None, ours: ImageCaptioner) -> Given:
    model, processor = theirs
    assert ours.processor is not None
    text = ours.processor.prompt if text is None else text
    given = processor(images=image, text=text, return_tensors="pt")
    shown = given["pixel_values"]
    if getattr(model.config.text_config, "is_encoder_decoder", False):
        start = [int(model.config.text_config.decoder_start_token_id)]
        if text is None:
            return Given(shown, dict(given), start, None, [*start, int(model.config.text_config.bos_token_id)])
        forward = {**given, "decoder_input_ids": torch.tensor([start])}
        return Given(shown, dict(given), start, forward, [*start, *given["input_ids"][0].tolist()])
    if text is not None:
        return Given(shown, dict(given), given["input_ids"][0].tolist(), dict(given))
    slots = [int(model.config.image_token_index)] * model.config.num_query_tokens
    ids = [*slots, int(model.config.text_config.bos_token_id)]
    forward = {"pixel_values": shown, "input_ids": torch.tensor([ids])}
    return Given(shown, {"pixel_values": shown}, ids, forward)


def _asked_of_paligemma(theirs: Theirs, image: Image.Image, text: str | None, ours: ImageCaptioner) -> Given:
    _, processor = theirs
    assert ours.processor is not None
    said = ours.processor.prompt if text is None else text
    given = dict(processor(images=image, text=f"{processor.image_token}{said or ''}", return_tensors="pt"))
    given.pop("labels", None)
    return Given(given["pixel_values"], given, given["input_ids"][0].tolist(), given)


def _asked_of_idefics(theirs: Theirs, image: Image.Image, text: str | None, ours: ImageCaptioner) -> Given:
    given = dict(theirs[1](images=[image], text=[text or ""], return_tensors="pt"))
    return Given(given["pixel_values"], given, given["input_ids"][0].tolist(), given)


def _asked_in_chat(theirs: Theirs, image: Image.Image, text: str | None, ours: ImageCaptioner) -> Given:
    """Of the families whose prompts are conversations with placeholders."""
    model, processor = theirs
    assert ours.processor is not None
    said = ours.processor.prompt if text is None else text
    if getattr(processor, "chat_template", None) is None:
        whole = ours.processor.conversation(said or "")  # pyright: ignore[reportAttributeAccessIssue]
    else:
        words = [{"type": "text", "text": said}] if said else []
        talk = [{"role": "user", "content": [{"type": "image"}, *words]}]
        whole = processor.apply_chat_template(talk, add_generation_prompt=True)
    bos = processor.tokenizer.bos_token
    nested: Any = [[image]] if model.config.model_type in ("idefics3", "smolvlm") else image
    again = bool(bos) and whole.startswith(bos)
    given = dict(processor(images=nested, text=whole, return_tensors="pt", add_special_tokens=not again))
    given.pop("batch_num_images", None)
    return Given(given["pixel_values"], given, given["input_ids"][0].tolist(), given)


_ASKED: dict[str, Callable[[Theirs, Image.Image, str | None, ImageCaptioner], Given]] = {
    "blip": _asked_of_blip,
    "vision-encoder-decoder": _asked_of_ved,
    "git": _asked_of_git,
    "blip-2": _asked_of_blip2,
    "instructblip": _asked_of_blip2,
    "paligemma": _asked_of_paligemma,
    "idefics": _asked_of_idefics,
}


def _drawn() -> dict[str, Image.Image]:
    """Three pictures of several shapes, with edges and smooth parts, the same every time."""
    found: dict[str, Image.Image] = {}
    for i, (name, height, width) in enumerate((("wide", 120, 200), ("tall", 180, 130), ("square", 160, 160))):
        y, x = np.mgrid[:height, :width]
        noise = np.random.default_rng(i).integers(0, 60, (height, width, 3))
        waves = np.stack([100 + 90 * np.sin(x / (7 + 3 * i)), 0.9 * y + 20, 0.7 * x + 0.3 * y], -1) + noise
        found[name] = Image.fromarray(waves.clip(0, 255).astype(np.uint8))
    return found
