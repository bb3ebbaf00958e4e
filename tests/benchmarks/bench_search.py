"""Indexing JPEG photographs beside plain loops over transformers, timm and Pillow with the same towers; queries.

The loops are what people write: a picture is opened, goes through the library's own processor and then, alone or in
batches of 32, through the model. Ours does more: it names damaged files, hashes their bytes and writes the index. The
vectors must agree.

python tests/benchmarks/bench_search.py [--threads N] [--pairs N] [--only NAME] [--photos FOLDER_OR_ZIP] [--count 1000]

Without `--photos` they are drawn scenes; all are saved as JPEGs of 640 x 480 px, quality 90.
"""

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from harness import compare, start, timed
from PIL import Image
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from mmtransformer import ImageIndex, ImageTransform, ViT
from mmtransformer.data.image_files import ImageFiles
from mmtransformer.data.scenes.scenes import Scenes
from mmtransformer.images import load
from mmtransformer.layers.weight_prepacking import for_inference
from mmtransformer.pipelines.search.nearest import nearest
from mmtransformer.weights import from_timm, from_transformers

SIZE, BATCH = (640, 480), 32
CLIP_COLOURS: dict[str, Any] = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
DEIT_COLOURS: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


class Tower:
    """What `ImageIndex` asks of an `ImageTextEmbedder`, of the vision tower alone; prepacked like it."""

    def __init__(self, model: nn.Module, encode: Callable[[Tensor], Tensor], transform: ImageTransform) -> None:
        self.model, self.encode, self.transform = for_inference(model.eval()), encode, transform

    @torch.inference_mode()
    def encode_images(self, images: list[Any], *, batch_size: int = 64) -> Tensor:
        pixels = torch.stack([x if isinstance(x, Tensor) else self.transform(load(x)) for x in images])
        return F.normalize(self.encode(pixels), dim=-1)

    def encode_texts(self, texts: list[str]) -> Tensor:
        raise NotImplementedError


def photographs(folder: Path, source: str, count: int) -> list[Path]:
    """So many JPEGs of one size in a folder, out of real pictures (more than once if need be) or drawn ones."""
    files = ImageFiles([source]) if source else None
    scenes = Scenes(image_size=96, train_size=count).split("train")
    paths = []
    for i in range(count):
        image = scenes.image(i) if files is None else files.image(i % len(files))
        image = image.resize(SIZE, Image.Resampling.BICUBIC)
        if files is not None and i >= len(files):  # no two of the same bytes, which would be computed once
            image.putpixel((0, 0), (i % 256, i // 256 % 256, 7))
        paths.append(folder / f"{i:05}.jpg")
        image.save(paths[-1], quality=90)
    return paths


@torch.inference_mode()
def plain_loop(
    paths: Sequence[Path], pixels: Callable[[Image.Image], Tensor], encode: Callable[[Tensor], Tensor], batch: int
) -> Tensor:
    """What people write."""
    found = []
    for at in range(0, len(paths), batch):
        images = [pixels(Image.open(path).convert("RGB")) for path in paths[at : at + batch]]
        found.append(F.normalize(encode(torch.stack(images)), dim=-1))
    return torch.cat(found)


def transformers_clip() -> tuple[Callable[[Image.Image], Tensor], Callable[[Tensor], Tensor], Tower]:
    """CLIP ViT-B/32's shape, random weights: the peer's pixels and vectors, and ours."""
    peer: Any = CLIPModel(CLIPConfig(text_config={"num_hidden_layers": 1})).eval()
    processor: Any = CLIPImageProcessor()

    def pixels(image: Image.Image) -> Tensor:
        return processor(images=image, return_tensors="pt")["pixel_values"][0]

    def encode(batch: Tensor) -> Tensor:
        return peer.visual_projection(peer.vision_model(pixel_values=batch).pooler_output)

    model = from_transformers(peer)
    ours = ImageTransform(224, resize="crop", backend="torchvision", **CLIP_COLOURS)
    return pixels, encode, Tower(model, model.encode_image, ours)


def timm_deit() -> tuple[Callable[[Image.Image], Tensor], Callable[[Tensor], Tensor], Tower]:
    """DeiT-tiny's shape, random weights."""
    peer = timm.create_model("deit_tiny_patch16_224", num_classes=0).eval()
    vit: ViT = from_timm(peer)
    config = resolve_model_data_config(peer)
    transform: Any = create_transform(**config)
    cropped = {"resize": "crop", "crop_fraction": config["crop_pct"], "backend": "timm"}
    tower = Tower(vit, lambda pixels: vit.forward_head(vit.forward_features(pixels), pre_logits=True),
                  ImageTransform(224, **cropped, **DEIT_COLOURS))  # fmt: skip
    return lambda image: transform(image), peer, tower


TOWERS = {"CLIP ViT-B/32, transformers": transformers_clip, "DeiT-tiny, timm": timm_deit}


def index_lines(paths: Sequence[Path], names: Sequence[str], args: Any) -> None:
    for name in names:
        make = TOWERS[name]
        pixels, encode, tower = make()
        kept = paths[0].parent / "index.safetensors"

        def ours(tower: Tower = tower, kept: Path = kept) -> ImageIndex:
            kept.unlink(missing_ok=True)
            return ImageIndex.build(tower, paths, path=kept)

        few = paths[:8]
        told, found = plain_loop(few, pixels, encode, 8), ImageIndex.build(tower, few).contents.embeddings.float()
        print(f"{name}: largest difference of a vector's numbers {float((told - found).abs().max()):.1e} (half: 2e-4)")
        for batch in (1, BATCH):
            peer = partial(plain_loop, paths, pixels, encode, batch)
            unit = (len(paths), "pictures")
            compare(f"{name}, loop of {batch}", ours, peer, target=1.5, pairs=args.pairs, unit=unit)


def query_line(args: Any) -> None:
    vectors = F.normalize(torch.randn(100_000, 512), dim=-1)
    half, query = vectors.half(), F.normalize(torch.randn(1, 512), dim=-1)
    plain = vectors.numpy()

    def numpy_top() -> np.ndarray:
        scores = plain @ query[0].numpy()
        best = np.argpartition(-scores, 20)[:20]
        return best[np.argsort(-scores[best])]

    shared = len({*nearest(query, half, 20)[1][0].tolist()} & {*numpy_top().tolist()})
    print(f"{shared} of the 20 nearest of float32 are those of float16 (random vectors)")
    compare("100,000 x 512, top 20, beside numpy", lambda: nearest(query, half, 20), numpy_top, pairs=5 * args.pairs)
    times = sorted(timed(lambda: nearest(query, half, 20)).wall for _ in range(5 * args.pairs))
    print(f"one query: {1e3 * times[0]:.1f} ms at best, {1e3 * times[len(times) // 2]:.1f} ms in the middle (goal 50)")


def main() -> None:
    args = start(str(__doc__).partition("\n")[0], photos="", count=1000)
    if args.only in "query":
        query_line(args)
    if asked := [name for name in TOWERS if args.only in name]:
        with tempfile.TemporaryDirectory() as temporary:
            index_lines(photographs(Path(temporary), args.photos, args.count), asked, args)


if __name__ == "__main__":
    main()
