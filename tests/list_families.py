"""Writes the tables of families in docs, from weights/families.py: python tests/list_families.py."""

import re
from functools import partial
from pathlib import Path

from mmtransformer.serialization.pretrained import CONFIG
from mmtransformer.weights.families import FAMILIES
from support.hub_models import MODELS
from support.hub_odd import FAMILIES as HUB_FAMILIES

DOCS = Path(__file__).parents[1] / "docs"
PAGES = (DOCS / "weights.md", DOCS / "public-models.md")
MARKS = "<!-- families: written by tests/list_families.py -->", "<!-- end of families -->"
CAPTIONERS = "<!-- captioners: written by tests/list_families.py -->", "<!-- end of captioners -->"

EXAMPLES = {
    "blip": "Salesforce/blip-image-captioning-base, -large; blip-vqa-base",
    "vision-encoder-decoder": "nlpconnect/vit-gpt2-image-captioning",
    "blip2": "Salesforce/blip2-opt-2.7b, blip2-flan-t5-xl; instructblip-vicuna-7b",
    "smolvlm": "HuggingFaceTB/SmolVLM-256M-Instruct, -500M, -2.2B",
    "idefics3": "HuggingFaceM4/Idefics3-8B-Llama3",
    "llava": "llava-hf/llava-1.5-7b-hf, llava-v1.6-mistral-7b-hf, llava-onevision-qwen2-0.5b-ov-hf",
    "git": "microsoft/git-base-coco, git-large-coco",
    "hf": "Qwen/Qwen2.5-VL-3B-Instruct, OpenGVLab/InternVL3-1B-hf, google/gemma-3-4b-it, ...",
    "idefics": "HuggingFaceM4/idefics-9b, idefics-9b-instruct",
    "open_coca": "laion/CoCa-ViT-B-32-laion2B-s13B-b90k, mscoco_finetuned_CoCa-ViT-L-14-laion2B-s13B-b90k",
    "openflamingo": "openflamingo/OpenFlamingo-3B-vitl-mpt1b, -4B-vitl-rpj3b, -9B-vitl-mpt7b, -langinstruct ones",
    "paligemma": "google/paligemma-3b-pt-224, paligemma2-3b-pt-224",
}
"""Names on the hub that people use, beside the families; not fetched by any test."""


SPEEDS = {
    "blip": "Zen 5 x1.80, x2.19 (auto x3.08, x3.68); Zen 4 x1.10, x1.52; Zen 3 x1.12",
    "vision-encoder-decoder": "Zen 5 x2.54, x2.85 (auto x4.92, x5.56); Zen 4 x1.93, x1.93; Zen 3 x1.59",
    "blip2": "Zen 5 x1.57, x1.96",
    "smolvlm": "Zen 5 x1.74, x2.04",
    "llava": "x1.45, x1.58; Zen 5 x1.61, x1.52",
    "git": "Zen 5 x1.94, x2.10 (auto x4.35, x4.07); Zen 4 x1.14, x1.34; Zen 3 x1.07",
    "idefics": "Zen 5 x1.27, x2.17",
    "paligemma": "Zen 5 x1.43, x1.83",
    "hf": "transformers' own",
    "open_coca": "not measured: open_clip's `generate` does not run beside transformers 5",
    "openflamingo": "not measured",
}
"""transformers' CPU time by ours, one picture and eight, float32 (and `dtype="auto"` beside float32): see
tests/benchmarks/README.md."""


HEAT_MAPS = {"hf": "no", "blip2": "yes, but of a T5"}
"""Those of which there are none: language models that run in transformers do not say where they look."""


def name(function: object) -> str:
    """A function's name, also where some of its arguments are given."""
    return name(function.func) if isinstance(function, partial) else getattr(function, "__name__", "?")


def table() -> str:
    """The table, between its marks: one line for the families that come in and go out by the same two functions."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for family, way in FAMILIES.items():
        makes = " or ".join(f"`{kind.__name__}`" for kind in way.makes)
        rows.setdefault((f"`{name(way.load)}`", f"`{name(way.save)}`", f"a {makes}"), []).append(f"`{family}`")
    lines = ["| families | in | out | here it is |", "|---|---|---|---|"]
    lines += [f"| {', '.join(families)} | {' | '.join(row)} |" for row, families in rows.items()]
    return "\n".join([MARKS[0], *lines, MARKS[1]])


def captioners() -> str:
    """The table of the families that are captioned with by a name or folder, between its marks."""
    heads = "family", "`model_type`", "here it is", "heat maps", "fine-tuned", "speed", "written back by, for", "names"
    lines = [f"| {' | '.join(heads)} on the hub |", "|---" * len(heads) + "|"]
    for family, way in FAMILIES.items():
        if way.processor is not None:
            if family == "hf":
                same = ", ".join(f"`{kind}`" for kind in sorted({*MODELS, *HUB_FAMILIES}))
                types, made = f"all others that transformers has; compared: {same}", f"`{way.makes[0].__name__}`"
            else:
                said = way.model_types if way.config == CONFIG else [way.config]
                types, made = (", ".join(f"`{x}`" for x in some) for some in (said, [way.makes[0].__name__]))
            heat = HEAT_MAPS.get(family, "yes")
            written = f"`{name(way.save)}`, {way.reader}"
            row = (f"`{family}`", types, made, heat, "yes", SPEEDS.get(family, ""), written, EXAMPLES.get(family, ""))
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join([CAPTIONERS[0], *lines, CAPTIONERS[1]])


def with_families(text: str) -> str:
    """A page's text with its tables of families written anew."""
    for marks, made in ((MARKS, table), (CAPTIONERS, captioners)):
        text = re.sub(f"{marks[0]}.*{marks[1]}", lambda _, made=made: made(), text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_families(page.read_text("utf-8")), "utf-8")
