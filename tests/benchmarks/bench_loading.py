"""From file to pixels, and from data to batches.

Pictures: bytes of a JPEG to a normalised tensor (3 224 224), beside Pillow with torchvision's v2 transforms and beside
torchvision's own decoder with v2 on tensors. The limit is Pillow's (libjpeg-turbo's) decoding alone.

Loading: 32 pictures a batch with a random crop, in 1, 2 and 4 processes, from a folder, a zip, a tar and Parquet,
beside torchvision's ImageFolder on the same folder, and beside webdataset on the same tar where that is installed. Wall
time decides.

Start: how long a manifest of many pairs takes to open (`--manifest 5000000`), and the first batch; the first time, when
its index is made, and the second, when it is there.

python tests/benchmarks/bench_loading.py [--pairs N] [--only NAME] [--images N] [--manifest N]
"""

import io
import os
import shutil
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import compare, note, start, timed
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.io import decode_jpeg
from torchvision.transforms import v2

from mmtransformer.data.captions import CaptionData
from mmtransformer.data.files.read_options import ReadOptions
from mmtransformer.data.loading.module import LoaderConfig
from mmtransformer.images import Augment, ImageTransform, load
from mmtransformer.text.tokenizer import Tokenizer

SIDE, BATCH, SHARDS = 224, 32, 4
END = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.5,) * 3, (0.5,) * 3)]
BICUBIC = v2.InterpolationMode.BICUBIC
Transform = Callable[[Any], Tensor]


@cache
def photo(height: int, width: int, seed: int) -> bytes:
    """A JPEG whose detail falls off with the frequency as a photograph's does, 55 KB at 640 x 480."""
    chance, values = np.random.default_rng(seed), np.zeros((height, width, 3), np.float32)
    for cells in (3, 6, 12, 24, 48, 96, 192, 384):
        noise = Image.fromarray(chance.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        values += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), np.float32) * cells**-0.6
    file = io.BytesIO()
    Image.fromarray((255 * (values - values.min()) / np.ptp(values)).astype(np.uint8)).save(file, "JPEG", quality=92)
    return file.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def in_training(transform: ImageTransform, augment: Augment, data: bytes) -> Tensor:
    """As the datasets do it."""
    image = load(data, at_least=transform.decode_size(augment, torch.Generator().manual_seed(3)))
    return transform(augment(image, torch.Generator().manual_seed(3)))


def bench_images(args: Any) -> None:
    squash, middle = ImageTransform(SIDE), ImageTransform(SIDE, "crop", crop_fraction=SIDE / 256)
    crop = [v2.RandomResizedCrop(SIDE, (0.8, 1.0), interpolation=BICUBIC)]
    theirs = {
        "squash": [v2.Resize((SIDE, SIDE), BICUBIC)],
        "middle": [v2.Resize(256, BICUBIC), v2.CenterCrop(SIDE)],
        "training": crop,
    }
    for (height, width), kinds in (((480, 640), tuple(theirs)), ((3000, 4000), ("training",))):
        data = photo(height, width, 1)
        coded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        alone = min(timed(lambda data=data: opened(data)).cpu for _ in range(9))
        ours = {"squash": lambda data=data: squash(load(data)), "middle": lambda data=data: middle(load(data)),
                "training": partial(in_training, squash, Augment((0.8, 1.0)), data)}  # fmt: skip
        for kind in kinds:
            name = f"pictures, {width} x {height}, {kind}"
            if args.only not in name:
                continue
            peer = v2.Compose(theirs[kind] + END)
            tensors = v2.Compose(theirs[kind] + END[1:])
            small = height < 1000
            many = 10 if small else 1  # calls of a timing
            decode = (many * alone, "decoding") if small else None
            compare(f"{name}, beside Pillow + v2", repeated(ours[kind], many),
                    repeated(lambda data=data, peer=peer: peer(opened(data)), many), target=2.5 if small else 4.0,
                    pairs=args.pairs, unit=(many, "pictures"), limit=decode)  # fmt: skip
            compare(f"{name}, beside torchvision's decoder", repeated(ours[kind], many),
                    repeated(lambda coded=coded, peer=tensors: peer(decode_jpeg(coded)), many), pairs=args.pairs,
                    unit=(many, "pictures"), limit=decode)  # fmt: skip


def repeated(run: Callable[[], object], count: int) -> Callable[[], object]:
    return lambda: [run() for _ in range(count)]


def write(folder: Path, count: int) -> dict[str, Path]:
    """The same pictures with a caption each, as a folder, a zip and four tars; and Parquet where pyarrow is."""
    places = {"folder": folder / "files", "zip": folder / "pairs.zip", "tar": folder / "tars"}
    (inner := places["folder"] / "a").mkdir(parents=True)
    for i in range(count):
        (inner / f"{i:05}.jpg").write_bytes(photo(480, 640, i % 16))
        (inner / f"{i:05}.txt").write_text(f"picture number {i}\n")
    files = sorted(inner.iterdir())
    with zipfile.ZipFile(places["zip"], "w") as archive:
        for path in files:
            archive.write(path, path.name)
    places["tar"].mkdir()
    for shard in range(SHARDS):
        with tarfile.open(places["tar"] / f"{shard}.tar", "w") as tar:
            for path in files[shard * len(files) // SHARDS : (shard + 1) * len(files) // SHARDS]:
                tar.add(path, path.name)
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        return places
    places["Parquet"] = folder / "pairs.parquet"
    rows = [{"image": {"bytes": path.read_bytes(), "path": path.name}, "caption": path.with_suffix(".txt").read_text()}
            for path in sorted(inner.glob("*.jpg"))]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), places["Parquet"], row_group_size=64)
    return places


def epoch(batches: Iterable[Any]) -> int:
    return sum(1 for _ in batches)


def our_loader(place: Path, workers: int) -> Iterable[Any]:
    data = CaptionData(
        str(place), read=ReadOptions(val_fraction=0.0), transform=ImageTransform(SIDE), augment=Augment((0.8, 1.0)),
        batch_size=BATCH, max_len=32, tokenizer=Tokenizer.train(["picture number 12"], 300),
        loader=LoaderConfig(num_workers=workers),
    )  # fmt: skip
    return data.loader("train", training=True)


def their_loader(place: Path, workers: int) -> Iterable[Any]:
    crop = v2.RandomResizedCrop(SIDE, (0.8, 1.0), interpolation=BICUBIC)
    images = ImageFolder(str(place), v2.Compose([crop, *END]))
    return DataLoader(images, BATCH, shuffle=True, num_workers=workers)


def webdataset_loader(place: Path, workers: int) -> Iterable[Any]:
    import webdataset  # pyright: ignore[reportMissingImports]

    crop = v2.Compose([v2.RandomResizedCrop(SIDE, (0.8, 1.0), interpolation=BICUBIC), *END])
    shards = [str(path) for path in sorted(place.glob("*.tar"))]
    rows = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).shuffle(1000).decode("pil")
    return DataLoader(rows.to_tuple("jpg", "txt").map_tuple(crop, str).batched(BATCH), None, num_workers=workers)


def bench_loaders(args: Any) -> None:
    kinds = ("folder", "zip", "tar", "Parquet")
    if not any(args.only in f"loading, {kind}, {workers} workers" for kind in kinds for workers in (1, 2, 4)):
        return
    folder = Path(tempfile.mkdtemp(prefix="loading"))
    try:
        places = write(folder, args.images)
        for workers in (1, 2, 4):
            for kind, place in places.items():
                name = f"loading, {kind}, {workers} workers"
                if args.only not in name:
                    continue
                ours, theirs = our_loader(place, workers), their_loader(places["folder"], workers)
                compare(f"{name}, beside ImageFolder", lambda ours=ours: epoch(ours), lambda peer=theirs: epoch(peer),
                        target=1.5, pairs=args.pairs, unit=(args.images, "pictures"), by_clock=True)  # fmt: skip
                if kind == "tar":
                    try:
                        web = webdataset_loader(place, workers)
                    except ImportError:
                        continue
                    compare(f"{name}, beside webdataset", lambda ours=ours: epoch(ours), lambda peer=web: epoch(peer),
                            target=1.5, pairs=args.pairs, unit=(args.images, "pictures"), by_clock=True)  # fmt: skip
    finally:
        shutil.rmtree(folder)


def bench_manifest(args: Any) -> None:
    """A manifest of many pairs beside a zip of as many tiny pictures: the first start makes an index, others have it.

    Each start is a process of its own, which has imported the library before it counts.
    """
    name = f"start, a manifest of {args.manifest:,} pairs"
    if args.only not in name or not args.manifest:
        return
    folder = Path(tempfile.mkdtemp(prefix="manifest"))
    try:
        write_manifest(folder / "pairs", args.manifest)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        for which in ("first", "second"):
            process = get_context("spawn").Process(target=start_pairs, args=(folder / "pairs", f"{name}, {which} time"))
            process.start()
            process.join()
            assert process.exitcode == 0
    finally:
        shutil.rmtree(folder)


def write_manifest(folder: Path, count: int) -> None:
    """A zip of tiny pictures (632 bytes each) beside captions.jsonl."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(file, "JPEG")
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "a.zip", "w") as archive, (folder / "captions.jsonl").open("w") as lines:
        for i in range(count):
            archive.writestr(f"{i}.jpg", file.getvalue())
            lines.write(f'{{"image": "a.zip/{i}.jpg", "caption": "picture number {i}"}}\n')


def start_pairs(folder: Path, name: str) -> None:
    """Opens pairs and loads a batch, in this process."""
    torch.set_num_threads(1)
    tokenizer = Tokenizer.train(["picture number 12"], 300)
    before, begin, cpu = memory(), time.perf_counter(), time.process_time()
    data = CaptionData(str(folder), transform=ImageTransform(SIDE), batch_size=BATCH, max_len=32, tokenizer=tokenizer)
    assert len(data.pairs("train"))
    note(f"{name}: open", time.perf_counter() - begin, "s")
    note(f"{name}: open, CPU", time.process_time() - cpu, "s")
    note(f"{name}: memory", memory() - before, "MB")
    begin, cpu = time.perf_counter(), time.process_time()
    next(iter(data.loader("train", training=True)))
    note(f"{name}: first batch", time.perf_counter() - begin, "s")
    note(f"{name}: first batch, CPU", time.process_time() - cpu, "s")
    note(f"{name}: memory with it", memory() - before, "MB")
    note(f"{name}: most memory", memory("VmHWM") - before, "MB")


def memory(kind: str = "VmRSS") -> float:
    """Megabytes of this process in memory; "VmHWM" = at most so far."""
    found = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(found.split()[1]) / 1024


def main() -> None:
    args = start(__doc__ or "", images=256, manifest=0)
    bench_images(args)
    bench_loaders(args)
    bench_manifest(args)


if __name__ == "__main__":
    main()
