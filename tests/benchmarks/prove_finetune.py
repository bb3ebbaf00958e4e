"""A small BLIP that has learned photos, fine-tuned on emoji pictures, beside the same one that has learned nothing.

Both have the frozen DeiT-tiny's features and the photos' words; of one the decoder was trained on photos (as in
prove_public.py), of the other it is random. Both are written as transformers has them, and then the same command trains
them, with the same steps: `mmt fit --config recipes/finetune_hub.yaml`, decoder and cross-attention whole.

python tests/benchmarks/prove_finetune.py PHOTOS WEIGHTS EMOJI [--photos N] [--steps N] [--epochs N]
                                          [--lr X] [--out FOLDER]

PHOTOS and WEIGHTS are as for prove_public.py, EMOJI a folder with images and captions.jsonl, of rows with image,
captions, skin_tone and split; pictures of one skin tone among several are left out.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from prove_public import MAX_LEN, blip, read_photos, seen, train, words_of_bert, write

from mmtransformer.cli import main as mmt
from mmtransformer.weights import ViTSettings, load_vit

RECIPE = Path(__file__).parents[2] / "recipes" / "finetune_hub.yaml"


def emoji(source: Path, folder: Path) -> None:
    """The pictures with their English names alone, as a folder of pairs."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in (source / "captions.jsonl").read_text("utf-8").splitlines()]
    kept = [{key: row[key] for key in ("image", "captions", "split")} for row in rows if row["skin_tone"] is None]
    (folder / "captions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in kept), "utf-8")
    (folder / "images").mkdir(exist_ok=True)
    for row in kept:
        shutil.copyfile(source / row["image"], folder / row["image"])


def fit(model: Path, data: Path, run: Path, epochs: int, lr: float) -> dict[str, Any]:
    """What a run of the recipe comes to."""
    code = mmt(
        [
            "fit", f"--config={RECIPE}", f"--model.init={model}", f"--data.source={data}/captions.jsonl",
            "--data.splits.val=[val]", "--model.tuning.method=full", "--model.tuning.parts=[connector,decoder]",
            f"--model.optim.lr={lr}", f"--trainer.max_epochs={epochs}", f"--data.max_len={MAX_LEN}",
            f"--data.cache_features.folder={run.parent}/features", f"--trainer.default_root_dir={run}",
            "--trainer.precision=32-true", "--trainer.accelerator=cpu",
        ]
    )  # fmt: skip
    assert not code, code
    return json.loads((run / "metrics.json").read_text("utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, metavar in (("photos_folder", "PHOTOS"), ("weights", "WEIGHTS"), ("emoji", "EMOJI")):
        parser.add_argument(name, type=Path, metavar=metavar)
    for name, number in (("photos", 2000), ("steps", 500), ("epochs", 8)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "prove_finetune")
    args = parser.parse_args()
    photos = read_photos(args.photos_folder, "train", args.photos)
    texts = words_of_bert([text for photo in photos for text in photo.captions])
    settings = ViTSettings(3, (14, 14), "gelu", 1e-6, "class")
    emoji(args.emoji, args.out / "emoji")
    found = {}
    for name in ("nothing", "photos"):
        torch.manual_seed(0)  # the same random weights to begin with
        model = blip(load_vit(args.weights, settings=settings), texts)
        if name == "photos":
            train(model, texts, photos, seen(model, photos), args.steps)
        write(model, texts, args.out / name)
        found[name] = fit(args.out / name, args.out / "emoji", args.out / f"run_{name}", args.epochs, args.lr)
    for name, metrics in found.items():
        print(f"from {name}: {json.dumps({key: metrics[key] for key in ('captions', 'image_ablation')})}")


if __name__ == "__main__":
    main()
