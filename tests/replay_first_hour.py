"""Replays a new user's first hour: an empty folder, the installed package, messy data, many pictures.

    python tests/replay_first_hour.py [PYTHON]

PYTHON is an interpreter that has the package (`.ci/package` gives one that has the wheel alone); this one unless told.
Every step is a command as a user would type it, with the exit code and the words that its output must have.
"""

import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import pyarrow
from PIL import Image

NAMES = [f"{i:03d}" for i in range(24)]


def pictures(folder: Path, names: list[str] = NAMES, ending: str = ".jpg") -> None:
    """Pictures of plain colours with a stripe."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        image = Image.new("RGB", (48, 40), (9 * i % 255, 255 - 10 * i, 90))
        image.paste((255, 255, 255), (i, 5, i + 9, 30))
        image.save(folder / f"{name}{ending}")


def data() -> None:
    """Data sets as people have them."""
    for folder, table, text in (
        ("ids", "labels.csv", ["id,caption", *(f"{n},a dog {n}" for n in NAMES)]),
        ("german", "bilder.csv", ["Bild;Beschreibung", *(f"{n}.jpg;ein Hund {n}" for n in NAMES)]),
        ("odd", "labels.tsv", ["wer\twas", *(f"{n}.jpg\ta dog {n}" for n in NAMES)]),
        ("windows", "c.csv", ["image,caption", *(f"C:\\Users\\Kim\\{n}.jpg,a dog {n}" for n in NAMES)]),
    ):
        pictures(Path(folder))
        Path(folder, table).write_text("\n".join(text), "utf-8")
    pictures(Path("korean"))
    rows = ["파일,캡션", *(f"{n}.jpg,빨간 개 {n}" for n in NAMES)]
    Path("korean/c.csv").write_bytes("\n".join(rows).encode("cp949"))
    for split in ("train", "validation", "test"):
        pictures(Path("splits", split))
    names = [f"{split}/{n}.jpg" for split in ("train", "validation", "test") for n in NAMES]
    Path("splits/metadata.csv").write_text("\n".join(["file_name,text", *(f"{n},a dog in {n}" for n in names)]))
    pictures(Path("llava"))
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a dog ."}]
    Path("llava/llava.json").write_text(json.dumps([{"image": f"{n}.jpg", "conversations": turns} for n in NAMES]))
    pictures(Path("turns"))
    turns += [{"from": "human", "value": "And why?"}, {"from": "gpt", "value": "it barks ."}]
    Path("turns/llava.json").write_text(json.dumps([{"image": f"{n}.jpg", "conversations": turns} for n in NAMES]))
    pictures(Path("absolute"))
    rows = ["Nr,was,caption", *(f"{n},/content/data/{n}.jpg,a dog {n}" for n in NAMES)]
    Path("absolute/df.csv").write_text("\n".join(rows))
    Path("absolute/~$df.xlsx").write_bytes(b"of an open workbook")
    arrow(Path("arrow"))
    pictures(Path("photos/deep/서울"))
    pictures(Path("unnamed"), ["a"])
    shutil.copy(b"unnamed/a.jpg", b"unnamed/\xbb\xe7.jpg")
    Path("photos/deep/broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    with zipfile.ZipFile("photos.zip", "w") as archive:
        for path in Path("photos").rglob("*.jpg"):
            archive.write(path)


def more_data() -> None:
    """What the second fresh trial had."""
    for folder in ("lists", "html", "listed", "wrapped", "parallel", "packed", "comma", "quotes", "numbers", "frame"):
        pictures(Path(folder, "photos" if folder in ("listed", "parallel", "packed") else ""))
    rows = [f"{n}.jpg,\"['a dog {n}', 'an animal {n}']\"" for n in NAMES]
    Path("lists/df.csv").write_text("\n".join(["image,captions", *rows]))
    Path("html/df.csv").write_text("\n".join(["image,caption", *(f"{n}.jpg,Tom &amp; Jerry&#39;s {n}" for n in NAMES)]))
    Path("listed/list.txt").write_text("\n".join(f"{n}.jpg#0\ta dog {n}" for n in NAMES))
    pictures(Path("spaced"))
    Path("spaced/list.txt").write_text("\n".join(f"{n}.jpg a dog {n}" for n in NAMES))
    records = [{"image": f"{n}.jpg", "caption": f"a dog {n}"} for n in NAMES]
    Path("wrapped/result.json").write_text(json.dumps({"info": {"year": 2026}, "data": records}))
    columns = {key: {str(i): record[key] for i, record in enumerate(records)} for key in ("image", "caption")}
    Path("frame/df.json").write_text(json.dumps(columns))
    Path("parallel/captions").mkdir()
    for n in NAMES:
        Path(f"parallel/captions/{n}.txt").write_text(f"a dog {n}")
        Path(f"numbers/{n}.txt").write_text("0 0.5 0.5 0.25 0.25")
    pictures(Path("escaped"), [f"my dog {n}" for n in NAMES])
    Path("escaped/c.csv").write_text("\n".join(["image,caption", *(f"my%20dog%20{n}.jpg,a dog {n}" for n in NAMES)]))
    table = "\n".join(["image,caption", *(f"{n}.jpg,a dog {n}" for n in NAMES)])
    Path("packed/captions.csv.gz").write_bytes(gzip.compress(table.encode()))
    for name in ("more.rar", "more.7z", "more.alz", "more.zip.part0"):
        Path("packed", name).write_bytes(b"of another program")
    Path("comma/c.json").write_text(json.dumps(records, indent=1).replace("\n]", ",\n]"))
    Path("quotes/c.json").write_text(str(records))
    Path("bad").mkdir()
    Path("bad/broken.jpg").write_bytes(b"\xff\xd8\xff broken")


def classes_and_pairs() -> None:
    """What the fifth fresh trial had: folders that name classes, translations, a picture that is none."""
    for name in ("고양이", "개"):
        pictures(Path("classes", name))
    pictures(Path("mixed"), NAMES[:3])
    Path("mixed/broken.jpg").write_bytes(b"\xff\xd8 no picture")
    rows = ["한국어\t영어", *(f"빨간 별 {n}\ta red star {n}" for n in NAMES)]
    Path("pairs.tsv").write_text("\n".join(rows), "utf-8")


def own_layouts() -> None:
    """What the fourth fresh trial had: layouts that people make themselves."""
    for folder in ("byname/images", "bilingual", "doubled", "leftover", "half"):
        pictures(Path(folder))
    said = {f"{n}.jpg": {"ko": f"빨간 개 {n}", "en": f"a dog {n}"} for n in NAMES}
    Path("byname/labels.json").write_text(json.dumps(said), "utf-8")
    rows = ["파일,캡션,영어 캡션", *(f"{n}.jpg,빨간 개 {n},a dog {n}" for n in NAMES)]
    Path("bilingual/목록.csv").write_text("\n".join(rows), "utf-8-sig")
    rows = ["image,caption", *(f"{n}.jpg,a dog {n}" for n in NAMES), "000.jpg,a dog 000"]
    Path("doubled/c.csv").write_text("\n".join(rows))
    for i, n in enumerate(NAMES):
        Path(f"leftover/{n}.txt").write_text(f"a dog {n}")
        Path(f"half/{n}.txt").write_text(f"a dog {n}" if i % 2 else "")
    Path("leftover/원본.NEF").write_bytes(b"II*\0")
    Path("leftover/원본.txt").write_text("날것", "utf-8")
    Path("leftover/Thumbs.db").write_bytes(b"of Windows")
    seoul = ["photos/deep/서울/000.jpg", '"photos/deep/서울/001.jpg"']
    Path("목록.txt").write_bytes("\r\n".join(seoul).encode("cp949"))


def arrow(folder: Path) -> None:
    """A data set as `datasets.save_to_disk` writes it."""
    pictures(folder / "from")
    images = [(folder / "from" / f"{n}.jpg").read_bytes() for n in NAMES]
    table = pyarrow.table({"image": images, "text": [f"a dog {n}" for n in NAMES]})
    shutil.rmtree(folder / "from")
    path = str(folder / "data-00000-of-00001.arrow")
    with pyarrow.OSFile(path, "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (folder / "dataset_info.json").write_text("{}")


RUN = "fit --config caption_scenes --config tiny --data.source.train_size 64 --data.source.val_size 8 "
RUN += "--data.source.compositional_size 8 --trainer.default_root_dir runs/first"
MODEL = "--model runs/first/model"
TUNE = "fit --config finetune_pairs --config tiny --model.init runs/first/model --data.source"
ENGLISH = "--data.read.default_language en --trainer.default_root_dir runs/llava"
GERMAN = "--data.read.default_language de --model.add_languages [de] --trainer.default_root_dir runs/de"
CLIP = f"{RUN} ".replace("caption_scenes", "clip_scenes").replace("runs/first", "runs/clip").strip()
PYTHON = (
    "import mmtransformer as mm; print(mm.weights.__name__, 'generation' in dir(mm)); "
    "c = mm.ImageCaptioner.from_pretrained('runs/first/model'); print(repr(c)[:14], repr(c.tokenizer)[:9]); "
    "print(sum(map(len, c.stream(p for p in ['ids/000.jpg'] * 3))), 'streamed'); "
    "from importlib.resources import files; print((files(mm) / 'py.typed').is_file(), 'typed'); c(iter(['a.jpg']))"
)
MASKS = (
    "import torch; from mmtransformer import *; "
    "m = VisionEncoderDecoder(ViT(16, 8, 24, 1, 2), TextDecoder(50, 24, 1, 2, context_dim=24, max_len=20)); "
    "x, t = torch.rand(2, 3, 16, 16), torch.tensor([[5, 6, 0], [7, 8, 9]]); real = (t > 0).long(); "
    "b = CaptionBatch(t, real, real, x); print(b.loss_mask.dtype); generate(m, b, eos_id=2, max_new_tokens=5)"
)
STOPPED = "-c import shutil; shutil.copytree('runs/first', 'runs/stopped', ignore=lambda *_: ['model'])"
STEPS: list[tuple[str, int, tuple[str, ...]]] = [
    ("recipes", 0, ("caption_scenes", "time", "score")),
    ("recipes show caption_scenes", 0, ("class_path",)),
    ("fit --config caption_scene", 2, ('did you mean "caption_scenes"',)),
    (f"{RUN} --trainer.max_step 3", 2, ('did you mean "trainer.max_steps"',)),
    (f"{RUN} --model.optim.learning_rate 3", 2, ('did you mean "model.optim.lr"',)),
    (f"{RUN} --data.loader.num_worker 2", 2, ('did you mean "data.loader.num_workers"',)),
    (f"{RUN} --model.captioner.vision.source vit_tiny_patch16_224", 2, ("hf download timm/", "give FOLDER in place")),
    (RUN, 0, ("mmt", "caption YOUR_PICTURE.jpg")),
    (f"evaluate {MODEL} --data scenes --limit 4", 0, ("% of facts right",)),
    ("check ids", 0, ("24 pictures", "image=id")),
    ("check german", 0, ("24 pictures", "image=Bild")),
    ("check odd", 1, ("labels.tsv", "wer, was", "--image-column")),
    ("check odd --image-column wer --caption-column was", 0, ("24 pictures",)),
    ("check windows", 0, ("24 pictures", "Windows paths")),
    ("check korean", 2, ("CP949", "--encoding cp949")),
    ("check korean --encoding cp949", 0, ("ko 24",)),
    ("check splits", 1, ("splits by their folders: train 24, val 24, test 24",)),
    ("check llava", 0, ("24 pictures", "question=question")),
    ("check turns", 0, ("24 pictures, 48 captions",)),
    ("check absolute", 0, ("24 pictures", "image=was", "absolute paths")),
    ("check arrow", 0, ("Arrow data-00000-of-00001.arrow: 24 pictures",)),
    ("check lists", 0, ("24 pictures, 48 captions", "cells that hold a list as text, read as its captions: 24")),
    ("check html", 0, ("captions with HTML or marks in them", "24 of 24", "--normalize html")),
    ("check listed", 0, ("Flickr token file list.txt: 24 pictures",)),
    ("check spaced", 0, ("list of pictures list.txt: 24 pictures",)),
    ("check wrapped", 0, ("JSON result.json: 24 pictures",)),
    ("check frame", 0, ("JSON df.json: 24 pictures",)),
    ("check parallel", 0, ("24 pictures", "captions in a folder of their own: 24")),
    ("check numbers", 1, ("boxes or classes in the place of captions: 24",)),
    ("check escaped", 0, ("24 pictures", "names as URLs write them (%20): 24")),
    ("check packed", 0, ("CSV captions.csv.gz: 24", "packed by RAR", "7-Zip", "ALZip", "cat more.zip.part*")),
    ("check packed/more.rar", 2, ("packed by RAR", "unpack it")),
    ("check comma", 2, ("c.json:", "is not JSON", "column", "one comma too many")),
    ("check quotes", 2, ("c.json:1 is not JSON", "column 3", "double quotes")),
    ("check someone/photos.csv", 2, ("someone/photos.csv does not exist",)),
    (f"{TUNE} html {ENGLISH} --data.read.normalize html".replace("runs/llava", "runs/html"), 0, ("--language en",)),
    (f"{TUNE} llava {ENGLISH}", 0, ("left out, as the model is trained without prompts",)),
    (f"{TUNE} ids --data.read.default_language en", 0, ("--language en",)),
    (f"{TUNE} german {GERMAN}", 0, ("--language de",)),
    (f"{TUNE} ids --data.transform.image_size 224", 2, ("data.transform would have no effect",)),
    (f"caption photos {MODEL} --out captions.jsonl", 1, ("24 pictures captioned", "bad_images_captions.txt")),
    (f"caption photos {MODEL} --out captions.jsonl", 1, ("0 pictures captioned", "24 had captions")),
    (f"caption @bad_images_captions.txt {MODEL} --out captions.jsonl", 1, ("broken.jpg",)),
    (f"caption photos.zip {MODEL} --out captions.csv --prefix sks", 1, ("24 pictures captioned in captions.csv",)),
    (f"caption photos/**/*.jpg {MODEL} --out texts/", 1, ("24 pictures captioned",)),
    (f"caption packed/more.rar {MODEL}", 2, ("packed by RAR",)),
    (f"caption ids/000.jpg {MODEL} --force-words dog", 0, ("dog",)),
    (f"caption ids/000.jpg {MODEL} --temperature 0.5", 2, ("it needs do_sample",)),
    (f"caption ids/000.jpg {MODEL} --device cuda:99", 2, ("device cuda:99",)),
    ("caption ids/000.jpg --model runs/first", 2, ("its model is runs/first/model",)),
    (f"caption ids/000.jpg {MODEL} --do-sample --num-return-sequences 5", 0, ("(",)),
    (f"evaluate {MODEL} --data ids --split train --captions-out said.jsonl", 0, ("BLEU-4",)),
    (f"evaluate {MODEL} --data ids --split train --captions-out said.jsonl", 0, ("BLEU-4",)),
    (f"-c {PYTHON}", 1, ("mmtransformer.weights True", "ImageCaptioner Tokenizer", "3 streamed", "True typed",
                         "by a list_iterator: give a list of them, [*images], or captioner.stream(images)")),
    (CLIP, 0, (" search ",)),
    ("search red --images bad --model runs/clip/model", 2, ("broken.jpg", "error: not one of 1 picture can be used")),
    (f"evaluate {MODEL} --data turns --split train", 0, ("answers to later turns of conversations",)),
    ("fit --config tiny", 2, ("names no model", " fit --config caption_scenes --config")),
    ("recipes copy tiny", 0, ("lay it over a recipe: ", " fit --config caption_scenes --config tiny.yaml")),
    ("fit --config caption_scenes --config tiny.yaml --print_config", 0, ("class_path",)),
    ("check byname", 0, ("JSON labels.json: 24 pictures, 48 captions",)),
    ("check bilingual", 0, ("24 pictures, 48 captions", "caption=캡션+영어 캡션")),
    ("check doubled", 0, ("captions that a picture has several times",)),
    ("check leftover", 0, ("원본.NEF is of no kind that is read", "left out 1 of 25 rows")),
    (f"evaluate {MODEL} --data half --split train", 2, ("`--max-bad-fraction 0.5` in `mmt evaluate`",)),
    (f"evaluate {MODEL} --data half --split train --max-bad-fraction 0.5", 0, ("left out 12 of 24 rows", "BLEU-4")),
    (f"evaluate {MODEL} --data ids --limit 0", 2, ("--limit must be at least 1",)),
    (f"caption @목록.txt {MODEL}", 0, ("2 pictures captioned",)),
    (f"caption 목록.txt {MODEL}", 2, ("write @목록.txt",)),
    (f"caption ids/000.jpg {MODEL}/config.json", 2, ("a model is a folder: name runs/first/model",)),
    ("fit --config vit_classify --config tiny --data.source=classes --trainer.default_root_dir runs/classes", 0,
     ("model     runs/classes/model",)),
    ("classify mixed --model runs/classes/model", 1, ("mixed/002.jpg: ", "broken.jpg")),
    ("caption mixed/000.jpg --model runs/classes/model", 2, ("`mmt classify`",)),
    ("fit --config translate_scenes --config tiny --data.source=pairs.tsv --trainer.default_root_dir runs/pairs", 0,
     ("model     runs/pairs/model",)),
    (f"-c {MASKS}", 1, ("torch.bool", "row 0 of the prompts has padding behind its tokens")),
    (f"{RUN} --trainer.accelerator tpu", 2, ("torch_xla",)),
    (f"{RUN} --trainer.devices 999", 2, ("a CPU takes a process for each of its cores",)),
    (f"{RUN} --trainer.gradient_clip_val -1", 2, ("gradient_clip_val (-1) must be at least 0",)),
    ("export runs/first/model away --family gpt2", 2, ("gpt2 is no family of a VisionEncoderDecoder",)),
    (f"caption unnamed {MODEL} --out unnamed.jsonl", 1, ("not UTF-8: rename it", "1 picture captioned", "1 could not")),
    (STOPPED, 0, ()),
    ("caption ids/000.jpg --model runs/stopped", 2, ("--resume` goes on", "without training on")),
]  # fmt: skip


def main(python: str) -> int:
    """Runs the steps in an empty folder; the number of those that went otherwise."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # Names of the hub are answered the same wherever this runs.
    folder, wrong = Path(tempfile.mkdtemp(prefix="first-hour-")), 0
    here = Path.cwd()
    try:
        os.chdir(folder)
        data()
        more_data()
        own_layouts()
        classes_and_pairs()
        for words, code, wanted in STEPS:
            began = time.monotonic()
            own = words.startswith("-c ")
            command = [python, *(("-c", words[3:]) if own else ("-m", "mmtransformer.cli", *words.split(" ")))]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            said = done.stdout + done.stderr
            missing = [word for word in wanted if word not in said]
            right = done.returncode == code and not missing and (own or "Traceback" not in said)
            wrong += not right
            took, program = time.monotonic() - began, "python" if own else "mmt"
            print(f"{'ok   ' if right else 'WRONG'} {took:5.1f} s  {program} {words}", flush=True)
            if not right:
                print(f"      exit code {done.returncode}, not {code}; missing {missing}\n{said[-1500:]}", flush=True)
    finally:
        os.chdir(here)
        shutil.rmtree(folder)
    print(f"{len(STEPS) - wrong} of {len(STEPS)} steps went as they should")
    return wrong


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1] if len(sys.argv) > 1 else sys.executable), 1))
