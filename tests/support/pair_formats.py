"""The same pairs in every format that is detected."""

import json
from collections.abc import Callable
from pathlib import Path

from support.pair_files import NAMES, caption, draw, rows_jsonl


def make_folder(root: Path) -> None:
    draw(root)
    for name in NAMES:
        (root / name).with_suffix(".txt").write_text("\n".join(caption(name, k) for k in range(3)) + "\n\n")
    (root / "README.txt").write_text("not a caption")


def make_csv(root: Path) -> None:
    draw(root)
    lines = ["filepath,title"] + [f'{n},"{caption(n, k)}"' for n in NAMES for k in range(3)]
    (root / "captions.csv").write_text("\n".join(lines), "utf-8-sig")


def make_tsv(root: Path) -> None:
    draw(root)
    lines = ["title\tother\tfilepath"] + [f"{caption(n, k)}\tx\t{n}" for n in NAMES for k in range(3)]
    (root / "captions.tsv").write_text("\r\n".join(lines) + "\r\n")


def make_bars(root: Path) -> None:  # as the results.csv of Flickr30k
    draw(root)
    lines = ["image_name| comment_number| comment"]
    lines += [f"{n}| {k}| {caption(n, k)}" for n in NAMES for k in range(3)]
    (root / "results.csv").write_text("\n".join(lines))


def make_text_table(root: Path) -> None:  # a CSV called .txt, with bare commas in its captions
    draw(root / "Images")
    lines = ["image,caption"] + [f"{n},{caption(n, k)}" for n in NAMES for k in range(3)]
    (root / "captions.txt").write_text("\n".join(lines))


def make_no_header(root: Path) -> None:
    draw(root)
    (root / "x.csv").write_text("\n".join(f'{n},"{caption(n, k)}"' for n in NAMES for k in range(3)))


def make_jsonl(root: Path) -> None:
    draw(root / "images")
    (root / "captions.jsonl").write_text(rows_jsonl(folder="images/"))


def make_json_list(root: Path) -> None:
    draw(root)
    rows = [{"image_id": i, "image": n, "caption": caption(n, k)} for i, n in enumerate(NAMES) for k in range(3)]
    (root / "train.json").write_text(json.dumps(rows))


def make_json_mapping(root: Path) -> None:
    draw(root)
    (root / "c.json").write_text(json.dumps({n: [caption(n, k) for k in range(3)] for n in NAMES}))


def make_coco(root: Path) -> None:
    draw(root / "val2017")
    images = [{"id": 100 + i, "file_name": name} for i, name in enumerate(NAMES)]
    notes = [
        {"id": 3 * i + k, "image_id": 100 + i, "caption": caption(n, k)} for k in range(3) for i, n in enumerate(NAMES)
    ]
    (root / "annotations").mkdir()
    (root / "annotations" / "captions_val2017.json").write_text(json.dumps({"images": images, "annotations": notes}))
    (root / "annotations" / "instances_val2017.json").write_text('{"images": [], "annotations": [{"bbox": [1]}]}')


def make_karpathy(root: Path) -> None:
    draw(root / "val2014")
    rows = [
        {
            "filepath": "val2014",
            "filename": name,
            "split": ("train", "restval", "val", "test")[i % 4],
            "sentences": [{"raw": caption(name, k), "tokens": ["x"]} for k in range(3)],
        }
        for i, name in enumerate(NAMES)
    ]
    (root / "dataset_coco.json").write_text(json.dumps({"images": rows, "dataset": "coco"}))


def make_flickr(root: Path) -> None:
    draw(root / "Flicker8k_Dataset")
    lines = [f"{n}#{k}\t{caption(n, k)}" for n in NAMES for k in range(3)]
    lines = [line.replace("p07.png#", "p07.png.1#") for line in lines]  # an oddity of the original
    (root / "Flickr8k.token.txt").write_text("\n".join(lines) + "\n")
    (root / "Flickr8k.lemma.token.txt").write_text("\n".join(line.lower() for line in lines))
    (root / "ExpertAnnotations.txt").write_text("p00.png\tp01.png#2\t1\t1\t1\n")
    (root / "readme.txt").write_text("If you publish work based on the data, cite.\n")
    for word, part in (("train", NAMES[:13]), ("dev", NAMES[13:18]), ("test", NAMES[18:])):
        (root / f"Flickr_8k.{word}Images.txt").write_text("\n".join(part) + "\n")


MAKERS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "folder": (make_folder, "", r"pictures with text files: 23 pictures, 69 captions"),
    "csv": (make_csv, "", r"CSV captions.csv: 23 pictures, 69 captions; columns image=filepath caption=title"),
    "tsv": (make_tsv, "", r"TSV captions.tsv: 23 .* image=filepath caption=title"),
    "bars": (make_bars, "", r"CSV results.csv: 23 .* image=image_name caption=comment;"),
    "text table": (make_text_table, "", r"CSV captions.txt: 23 .* image=image caption=caption"),
    "no header": (make_no_header, "", r"CSV x.csv: 23"),
    "jsonl": (make_jsonl, "images/", r"JSONL captions.jsonl: 23 .* image=image caption=captions"),
    "json list": (make_json_list, "", r"JSON train.json: 23 .* caption=caption"),
    "json mapping": (make_json_mapping, "", r"JSON c.json: 23"),
    "coco": (make_coco, "", r"COCO captions annotations/captions_val2017.json: 23"),
    "karpathy": (make_karpathy, "val2014/", r"Karpathy JSON dataset_coco.json: 23"),
    "flickr": (make_flickr, "", r"Flickr token file Flickr8k.token.txt: 23"),
}
