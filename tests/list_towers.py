"""Writes docs/towers.md: which of timm's pretrained ViT-like names load, and how far from timm's they are.

python tests/list_towers.py

Every name is built small (three heads of 16 channels, two blocks), by timm's own arguments, with random weights; tokens
and outputs are compared in float32. The page keeps each group's largest difference, relative to the largest number.
"""

import re
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch

from mmtransformer.weights import from_timm

PAGE = Path(__file__).parents[1] / "docs" / "towers.md"
MODULES = ("vision_transformer", "vision_transformer_hybrid", "deit", "eva", "beit", "naflexvit")
ELSE = ("vit_relpos", "vit_srelpos", "samvit")
"""Beginnings of names of other classes in these modules."""

GROUPS = {  # The first that is found in a name, in this order.
    "BEiT": r"^beitv?2?_",
    "Sapiens 2": r"sapiens2",
    "behind a convolutional network": r"_r26_|_r50_|_r_s16_|_mci_",
    "differential attention": r"_d(little|pwee|wee)_",
    "NaFlexViT: SigLIP 2, C-RADIO": r"^naflexvit",
    "DINOv3, LingBot": r"dinov3|lingbot",
    "DINOv2": r"dinov2",
    "Perception Encoder": r"_pe_",
    "SigLIP, SigLIP 2": r"siglip",
    "EVA": r"^eva",
    "CLIP": r"clip",
    "AIMv2": r"^aimv2",
    "BEiT-3": r"^beit3",
    "RADIO": r"radio",
    "InternViT": r"intern",
    "rotary positions": r"rope",
    "DeiT": r"^deit",
    "FlexiViT": r"^flexivit",
    "registers, averages, other blocks": r"reg\d|_gap_|_rpn_|pwee|wee|little|betwixt|so150m|mediumd",
    "the paper's, and others like it": r"",
}
REFUSED = {
    "BEiT": "every block adds learned biases of relative positions to its scores; the attention core takes masks alone",
    "Sapiens 2": "LayerScale stands on attention alone, and heads of queries share keys",
    "behind a convolutional network": "a ResNet or another network of convolutions makes the patches",
    "differential attention": "scores are the difference of two softmaxes",
}
HEAD = """# Vision towers

> timm의 사전 학습된 ViT 계열 이름 가운데 무엇을 불러올 수 있는지, timm의 결과와 얼마나 다른지 보여 줍니다. 이 쪽은
> `python tests/list_towers.py`가 씁니다.

Of timm {version}'s {total} pretrained names of Vision Transformers {loaded} load (`load_vit("NAME")`, or
`from_timm(model)` in memory). Each was built small by timm's own arguments, with random weights, and compared in
float32 on a CPU: the largest difference of any token or output, relative to the largest number. This page is written
by `python tests/list_towers.py`. transformers' folders are in [weights](weights.md).

| group | largest difference | names |
|---|---|---|
"""
MIDDLE = """
## Refused

| group | why | names |
|---|---|---|
"""


@cache
def names() -> tuple[str, ...]:
    """timm's pretrained names of Vision Transformers and their like."""
    from timm.models._registry import _model_entrypoints

    every = sorted({name.split(".")[0] for name in timm.list_models(pretrained=True)})
    some = [name for name in every if _model_entrypoints[name].__module__.rsplit(".", 1)[1] in MODULES]
    return tuple(name for name in some if not name.startswith(ELSE))


def group_of(name: str) -> str:
    """The group that a name belongs to."""
    return next(group for group, pattern in GROUPS.items() if re.search(pattern, name))


def small(name: str) -> Any:
    """The model of that name with three narrow heads and two blocks, its numbers drawn at random."""
    sizes: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
    if group_of(name) in REFUSED:
        sizes = {"num_classes": 5}
        if not name.startswith("beit"):
            with torch.device("meta"):
                return timm.create_model(name, **sizes)
    torch.manual_seed(0)
    model: Any = timm.create_model(name, **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def difference(name: str) -> float:
    """How far our outputs are from timm's, relative to the largest number.

    Raises:
        ValueError: if the tower is refused.
    """
    theirs = small(name)
    ours = from_timm(theirs)
    height, width = ours.image_size
    size = getattr(getattr(theirs, "patch_embed", None), "img_size", None) or ours.image_size
    pixels, found = torch.randn(1, 3, *size), 0.0  # 384 px are 27 patches of 14, and 6 px that timm's patches pass over
    seen, tokens = pixels[:, :, :height, :width], theirs.forward_features(pixels)
    for one, two in ((ours.forward_features(seen), tokens), (ours(seen), theirs(pixels))):
        found = max(found, float((one - two).abs().max() / two.abs().max().clamp(min=1)))
    return found


def measured() -> dict[str, float | None]:
    """Each name's difference; None = it is refused."""
    found: dict[str, float | None] = {}
    for name in names():
        try:
            found[name] = difference(name)
        except ValueError as error:
            found[name] = None
            print(name, str(error)[:100], flush=True)
    return found


def page(found: Mapping[str, float | None]) -> str:
    """The page for these differences."""
    groups: dict[str, list[str]] = {}
    for name in sorted(found):
        groups.setdefault(group_of(name), []).append(name)
    loaded, refused = [], []
    for group in GROUPS:
        inside = groups.get(group, [])
        for rows, some in (
            (loaded, [name for name in inside if found[name] is not None]),
            (refused, [name for name in inside if found[name] is None]),
        ):
            if some:
                said = REFUSED.get(group, "")
                if rows is loaded:
                    said = f"{max(found[name] or 0.0 for name in some):.1e}"
                rows.append(f"| {group} ({len(some)}) | {said} | {' '.join(f'`{name}`' for name in some)} |")
    count = sum(value is not None for value in found.values())
    head = HEAD.format(version=timm.__version__, total=len(found), loaded=count)
    return head + "\n".join(loaded) + "\n" + MIDDLE + "\n".join(refused) + "\n"


def read(text: str) -> dict[str, float | None]:
    """What a page says: of each name the difference of its group."""
    found: dict[str, float | None] = {}
    for row in re.findall(r"^\| [^|]+ \(\d+\) \| ([^|]+) \| (.+) \|$", text, re.MULTILINE):
        value = float(row[0]) if re.fullmatch(r"[\d.]+e[+-]\d+", row[0]) else None
        found |= dict.fromkeys(re.findall(r"`([^`]+)`", row[1]), value)
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    PAGE.write_text(page(measured()), "utf-8")
