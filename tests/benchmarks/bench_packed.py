"""Pictures of native size and shape: packed in one row, against timm's NaFlexVit, which pads them. Same weights.

python tests/benchmarks/bench_packed.py [--threads N] [--pairs N] [--only NAME] [--pictures FOLDER_OR_ZIP]

Rows hold eight pictures with at most 196 patches each; without --pictures their sizes are those of photographs as
people take them (4:3, 3:2, 16:9, upright too, and crops of 100 to 640 px). What padding costs is said beside the times.
"""

import argparse
import random
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from harness import compare, start
from PIL import Image
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from torch import Tensor

from mmtransformer import NativeSize, PackedImages, packed_forward
from mmtransformer.weights import from_timm

PATCH, MOST, COUNT = 16, 196, 8
SHAPES = ((640, 480), (480, 640), (640, 427), (427, 640), (640, 360), (500, 500))


def sizes_of(source: str | None) -> list[tuple[int, int]]:
    """Heights and widths of pictures: of those that were named, else drawn as photographs are."""
    if source is None:
        pick = random.Random(0)
        small = [(pick.randint(100, 640), pick.randint(100, 640)) for _ in range(100)]
        return [pick.choice(SHAPES) for _ in range(300)] + small
    path = Path(source)
    if path.suffix != ".zip":
        files: list[Any] = sorted(path.rglob("*.jpg"))[:1000]
    else:
        archive = zipfile.ZipFile(path)
        names = [name for name in archive.namelist() if name.lower().endswith((".jpg", ".png"))]
        files = [archive.open(name) for name in names[:1000]]
    pictures = map(Image.open, files)
    return [(picture.height, picture.width) for picture in pictures]


def padded(images: list[Tensor]) -> dict[str, Tensor]:
    """The same pictures as timm's loader makes them: rows of the longest's length."""
    rows = [rearrange(x, "c (gh y) (gw x) -> (gh gw) (y x c)", y=PATCH, x=PATCH) for x in images]
    patches = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    coord, valid = torch.zeros(*patches.shape[:2], 2, dtype=torch.long), torch.zeros(patches.shape[:2]).bool()
    for i, (row, image) in enumerate(zip(rows, images, strict=True)):
        grid = torch.cartesian_prod(*(torch.arange(side // PATCH) for side in image.shape[1:]))
        coord[i, : len(row)], valid[i, : len(row)] = grid, True
    return {"patches": patches, "patch_coord": coord, "patch_valid": valid}


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--pictures")
    mine, rest = parser.parse_known_args()
    sys.argv[1:] = rest
    args = start(__doc__ or "")
    sizes = sizes_of(mine.pictures)
    for enlarge in (True, False):
        native = NativeSize(PATCH, MOST, enlarge=enlarge)
        made = [native.size_for(*size) for size in sizes]
        lengths = [height * width // PATCH**2 for height, width in made]
        groups = [lengths[i : i + COUNT] for i in range(0, len(lengths) - COUNT + 1, COUNT)]
        real, held = sum(map(sum, groups)), sum(COUNT * max(group) for group in groups)
        kind = "enlarged" if enlarge else "as they are"
        wasted, most = 1 - real / held, 1 - real / (len(groups) * COUNT * MOST)
        print(f"{len(sizes)} pictures {kind}, {real / len(groups) / COUNT:.0f} patches each. Of tokens are padding:")
        print(f"{100 * wasted:.1f} % padded to the longest of {COUNT}, {100 * most:.1f} % padded to {MOST}")
        cfg = NaFlexVitCfg(
            patch_size=PATCH, embed_dim=384, depth=12, num_heads=6, global_pool="avg", fc_norm=True, reg_tokens=4,
            init_values=1e-5,
        )  # fmt: skip
        theirs: Any = NaFlexVit(cfg, num_classes=0).eval()
        ours = from_timm(theirs)
        images = [torch.randn(3, *size) for size in made[:COUNT]]
        for dtype in (torch.float32, torch.bfloat16):
            ours, theirs = ours.to(dtype), theirs.to(dtype)
            some = [image.to(dtype) for image in images]
            row, rows = PackedImages.of(some, PATCH), padded(some)
            name = f"S/16, {COUNT} pictures {kind}, {str(dtype)[6:]}"
            if args.only in name:
                compare(name, inference(packed_forward, ours, row), inference(theirs, rows), pairs=args.pairs)


def inference(function: Callable[..., Tensor], *given: Any) -> Callable[[], object]:
    def run() -> Tensor:
        with torch.inference_mode():
            return function(*given)

    return run


if __name__ == "__main__":
    main()
