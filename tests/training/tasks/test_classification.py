"""Classes of pictures: sources, batches, the task, its scores, and the saved classifier."""

import csv
import json
import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from mmtransformer import ImageClassifier, ImageTransform, TextDecoder, VisionEncoderDecoder, ViT, ViTBlockConfig
from mmtransformer.cli import main
from mmtransformer.data.class_sources import FileSplit, ImageFolder, SceneShapes
from mmtransformer.data.classes import ClassBatch, ClassData, ClassDataset, collate
from mmtransformer.data.loading.errors import BadImages, TooManyErrors
from mmtransformer.data.loading.module import Splits
from mmtransformer.data.loading.sampler import SampleIndex
from mmtransformer.data.scenes.scenes import Scenes
from mmtransformer.data.scenes.world import SceneWorld
from mmtransformer.images import Augment, ImageError
from mmtransformer.serialization.printable import program
from mmtransformer.training import Classification
from mmtransformer.training.tasks.classification import class_scores, make_cards, table

COLOURS = {"red": (200, 20, 20), "green": (20, 200, 20), "파랑": (20, 20, 200)}


def folder(root: Path, counts: dict[str, int], *, size: int = 24) -> str:
    """Plain pictures: ROOT/CLASS/3.png, or ROOT/SPLIT/CLASS/3.png for "SPLIT/CLASS"."""
    for place, count in counts.items():
        (root / place).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            colour = COLOURS[place.rsplit("/", maxsplit=1)[-1]]
            Image.new("RGB", (size + i, size), colour).save(root / place / f"{i}.png")
    return str(root)


def shapes(**options: Any) -> SceneShapes:
    world = SceneWorld(group_shares=[1.0])
    sizes = {"train_size": 30, "val_size": 11, "compositional_size": 7} | options
    return SceneShapes(Scenes(image_size=32, world=world, **sizes))


# --- sources


def test_a_folder_of_folders_is_divided_by_its_names(tmp_path: Path) -> None:
    root = folder(tmp_path, {"red": 40, "green": 30, "파랑": 5})
    (tmp_path / "red" / "notes.txt").write_text("no picture", "utf-8")
    (tmp_path / ".hidden").mkdir()
    source = ImageFolder(root, val_fraction=0.2)
    assert source.classes == ("green", "red", "파랑")
    assert (source.splits(), source.ignored) == (("train", "val"), 1)
    train, val = source.split("train"), source.split("val")
    names = [split.name(i) for split in (train, val) for i in range(len(split))]
    assert len(names) == len(set(names)) == 75
    assert 5 <= len(val) <= 30
    for split in (train, val):
        for i in range(len(split)):
            assert source.classes[split.label(i)] == split.name(i).split("/")[0]
            assert split.image(i).getpixel((0, 0)) == COLOURS[split.name(i).split("/")[0]]
    again = ImageFolder(root, val_fraction=0.2).split("val")
    assert [again.name(i) for i in range(len(again))] == [val.name(i) for i in range(len(val))]


def test_splits_of_its_own_are_kept(tmp_path: Path) -> None:
    counts = {"train/red": 3, "train/green": 2, "validation/red": 1, "validation/green": 2, "test/green": 1}
    source = ImageFolder(folder(tmp_path, counts))
    assert source.classes == ("green", "red")
    assert {name: len(source.split(name)) for name in source.splits()} == {"train": 5, "val": 3, "test": 1}
    with pytest.raises(ValueError, match=r"no split 'extra'; there are train, val, test"):
        source.split("extra")


def test_a_train_folder_alone_is_divided(tmp_path: Path) -> None:
    source = ImageFolder(folder(tmp_path, {"train/red": 30, "train/green": 30}), val_fraction=0.3)
    assert len(source.split("train")) + len(source.split("val")) == 60
    assert source.classes == ("green", "red")


def test_however_few_pictures_there_are_some_are_for_validation(tmp_path: Path) -> None:
    source = ImageFolder(folder(tmp_path, {"red": 3, "파랑": 3}), val_fraction=0.001)
    assert {name: len(source.split(name)) for name in source.splits()} == {"train": 5, "val": 1}


def test_a_recipe_of_the_scenes_takes_a_folder_without_their_splits(tmp_path: Path) -> None:
    root = folder(tmp_path, {"train/red": 3, "train/green": 3, "val/red": 2, "val/green": 1})
    data = ClassData(root, transform=ImageTransform(24), splits=Splits(val=["val", "compositional"]))
    with pytest.warns(UserWarning, match=r"no split 'compositional', which .* left out; they have: train, val$"):
        assert data.val_splits == ("val",)
    data.setup("fit")
    assert [len(batches.dataset) for batches in data.val_dataloader()] == [3]  # pyright: ignore[reportArgumentType]


def test_folders_that_do_not_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        ImageFolder(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"two at least; there are 1"):
        ImageFolder(folder(tmp_path / "one", {"red": 2}))
    with pytest.raises(ValueError, match=r"both need pictures, there are: train 4"):
        ImageFolder(folder(tmp_path / "two", {"red": 2, "green": 2}), val_fraction=0.0)
    with pytest.raises(ValueError, match=r"val_fraction \(1\.0\)"):
        ImageFolder(str(tmp_path), val_fraction=1.0)


def test_what_a_folder_holds_besides_its_classes_is_said(tmp_path: Path) -> None:
    root = folder(tmp_path, {"red": 3, "green": 3})
    for name in ("1.jpg", "2.PNG", ".3.jpg", "more.zip", "readme.txt", "red/old.tar.gz", "red/notes.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "leer").mkdir()
    (tmp_path / "__MACOSX").mkdir()
    said = "left out: 2 pictures outside class folders, 2 archives, 1 file that is no picture; leer has no pictures"
    module = data(root)
    assert module.classes == ("green", "red")
    assert module.describe().endswith(f"val 1; {said}")
    assert data(folder(tmp_path / "all", {"red": 3, "green": 3})).describe().endswith("val 1")
    splits = folder(tmp_path / "splits", {"train/red": 3, "train/green": 3, "val/red": 2})
    (tmp_path / "splits" / "train" / "1.jpg").write_bytes(b"")
    for place in ("val/green", "val/blue", "train/white"):
        (tmp_path / "splits" / place).mkdir()
    source = ImageFolder(splits)
    assert source.classes == ("green", "red")
    assert source.left_out == "left out: 1 picture outside class folders; blue, white have no pictures"
    (tmp_path / "none" / "a").mkdir(parents=True)
    (tmp_path / "none" / "cats.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=r"two at least; there are 0 \(left out: 1 archive; a has no pictures\)"):
        ImageFolder(str(tmp_path / "none"))


def test_shapes_of_scenes() -> None:
    source = shapes()
    assert source.classes[:3] == ("circle", "square", "triangle")
    for name in source.splits():
        images, scenes = source.split(name), source.scenes.split(name)
        for i in range(len(images)):
            (group,) = scenes.scene(i).groups
            assert source.classes[images.label(i)] == group.shape
            held_out = (group.color, group.shape) in source.scenes.world.held_out
            assert held_out == (name == "compositional")
    assert images.image(0).tobytes() == scenes.image(0).tobytes()
    with pytest.raises(ValueError, match=r"group_shares to \[1\], not \[0.35, 0.45, 0.2\]"):
        SceneShapes(Scenes())


# --- batches


def data(source: Any, **options: Any) -> ClassData:
    return ClassData(source, transform=ImageTransform(32), **{"batch_size": 4} | options)


def test_an_epoch_has_each_image_once_with_its_class(tmp_path: Path) -> None:
    source = shapes()
    module = data(source)
    module.report_dir = tmp_path
    images, seen = module.images("train"), {}
    for batch in module.train_dataloader():
        assert batch.pixels.shape[1:] == (3, 32, 32)
        assert batch.is_real.all()
        seen |= dict(zip(batch.names, batch.labels.tolist(), strict=True))
    assert seen == {images.name(i): images.label(i) for i in range(30)}
    assert "8 classes (circle, square" in module.describe()
    assert "train 30, val 11" in module.describe()


def test_augmentation_is_a_function_of_the_pick() -> None:
    images = shapes().split("train")
    dataset = ClassDataset(images, ImageTransform(32), augment=Augment((0.3, 0.5)), training=True, seed=1)
    assert torch.equal(dataset[SampleIndex(0, 3)].pixels, dataset[SampleIndex(0, 3)].pixels)
    assert not torch.equal(dataset[SampleIndex(0, 3)].pixels, dataset[SampleIndex(1, 3)].pixels)
    plain = data(shapes(), augment=Augment((0.3, 0.5))).dataset("val")
    assert torch.equal(plain[SampleIndex(0, 3)].pixels, plain[SampleIndex(1, 3)].pixels)


def test_a_broken_image_is_named_and_stood_in_for(tmp_path: Path) -> None:
    source = ImageFolder(folder(tmp_path / "data", {"train/red": 9, "train/green": 9, "val/red": 2, "val/green": 2}))
    held = source.split("val")
    assert isinstance(held, FileSplit)
    broken = held.files[1].path
    broken.write_bytes(broken.read_bytes()[:40])
    report = tmp_path / "bad.jsonl"
    images, picks = source.split("val"), [SampleIndex(0, i) for i in range(4)]
    for training, is_real in ((True, [True] * 4), (False, [True, False, True, True])):
        bad = BadImages(report, 4, 0.5)
        dataset = ClassDataset(images, ImageTransform(16), training=training, bad=bad)
        batch = collate([dataset[pick] for pick in picks])
        assert batch.is_real.tolist() == is_real
        assert batch.names[1] == batch.names[2]
    assert list(BadImages(report, 4).names()) == [images.name(1)]
    with pytest.raises(TooManyErrors, match="1 of 4 pictures"):
        ClassDataset(images, ImageTransform(16), bad=BadImages(tmp_path / "none", 4, 0.0))[picks[1]]
    with pytest.raises(ImageError, match=r"green/1\.png"):
        ClassDataset(images, ImageTransform(16))[picks[1]]


def test_only_the_same_classes_resume(tmp_path: Path) -> None:
    module = data(shapes())
    module.load_state_dict(module.state_dict())
    other = data(ImageFolder(folder(tmp_path, {"red": 20, "green": 20})))
    with pytest.raises(ValueError, match=r"the classes were circle, .* are now green, red"):
        other.load_state_dict(module.state_dict())
    with pytest.raises(ValueError, match=r"batch_size \(0\)"):
        data(shapes(), batch_size=0)
    with pytest.raises(ValueError, match=r"splits.val must be a list of splits: \[val\]"):
        data(shapes(), splits=Splits(val="val"))


# --- the task


def task(vit: ViT | None = None, source: Any = None, **options: Any) -> Classification:
    module = Classification(vit or ViT(32, 8, 16, 1, 2), **options)
    trainer: Any = SimpleNamespace(datamodule=data(source or shapes()))
    module._trainer = trainer
    module.setup("fit")
    return module


def test_a_vit_without_a_head_gets_one_for_the_data() -> None:
    module = task()
    assert isinstance(module.vit.head, nn.Linear)
    assert module.vit.head.weight.shape == (8, 16)
    assert module.vit.num_classes == 8
    assert torch.equal(module.vit.head.weight, task().vit.head.weight)  # the same in every process
    assert task(ViT(32, 8, 16, 1, 2, num_classes=8)).vit.num_classes == 8
    with pytest.raises(ValueError, match=r"tells 5 classes apart, but the data has 8"):
        task(ViT(32, 8, 16, 1, 2, num_classes=5))
    with pytest.raises(ValueError, match=r"32 x 32 px is not divisible into 12 px"):
        task(ViT(24, 12, 16, 1, 2))
    with pytest.raises(ValueError, match=r"label_smoothing \(-0\.1\)"):
        Classification(ViT(32, 8, 16, 1, 2), label_smoothing=-0.1)


def test_a_linear_probe_trains_the_head_alone() -> None:
    module = task(ViT(32, 8, 16, 1, 2, block=ViTBlockConfig(dropout=0.5)), freeze=True).train()
    module.set_modes()  # as a run does when it begins
    assert {name for name, p in module.vit.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(module.vit(pixels), module.vit(pixels))  # no dropout


@torch.no_grad()
def test_loss_counts_what_counts() -> None:
    module = task(label_smoothing=0.2)
    batch = ClassBatch(torch.randn(5, 3, 32, 32), torch.tensor([0, 3, 7, 3, 1]), torch.tensor([1, 1, 0, 1, 1]).bool())
    logs = module.vit(batch.pixels).log_softmax(-1)
    plain = [-float(logs[i, c]) for i, c in enumerate(batch.labels.tolist())]
    smooth = [0.8 * plain[i] - 0.2 * float(logs[i].mean()) for i in range(5)]
    loss = module.loss(batch)
    assert int(loss.count) == 4
    assert math.isclose(float(loss.sum), sum(smooth) - smooth[2], rel_tol=1e-5)
    bare = module._loss(module.vit(batch.pixels), batch, 0.0)
    assert math.isclose(float(bare.sum), sum(plain) - plain[2], rel_tol=1e-5)


def test_scores_of_a_confusion() -> None:
    matrix = torch.tensor([[3, 1, 0], [0, 2, 0], [0, 0, 0]])
    scores = class_scores(matrix, ("a", "b", "c"))
    assert scores["accuracy"] == pytest.approx(5 / 6)
    assert scores["classes"] == {"a": 0.75, "b": 1.0}  # c has no picture
    assert scores["mean_class_accuracy"] == pytest.approx(0.875)
    assert scores["images"] == 6
    assert "83.3%" in table({"val": scores})
    assert "a 75.0%, b 100.0%" in table({"val": scores})
    assert scores["confusion_by_true_class"] == {"a": {"a": 3, "b": 1}, "b": {"b": 2}}
    assert table({"val": scores}).splitlines()[-1] == "val: mistaken most often: a for b (1)"


def test_confusion_counts_true_classes_in_rows() -> None:
    module = task()
    held: Any = module._trainer
    matrix, wrong = module._confusion(held.datamodule, "val", torch.device("cpu"), None)
    images = held.datamodule.images("val")
    with torch.no_grad():
        said = [int(module.vit(ImageTransform(32)(images.image(i))[None]).argmax()) for i in range(11)]
    want = torch.zeros(8, 8, dtype=torch.long)
    for i in range(11):
        want[images.label(i), said[i]] += 1
    assert torch.equal(matrix, want)
    assert wrong == [images.name(i) for i in range(11) if said[i] != images.label(i)]
    assert int(module._confusion(held.datamodule, "val", torch.device("cpu"), 1)[0].sum()) == 4


# --- the saved classifier


def test_classifier_is_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(3)
    vit = ViT(32, 8, 16, 1, 2, num_classes=3)
    classifier = ImageClassifier(vit, tuple(COLOURS), ImageTransform(32), device="cpu")
    images = [Image.new("RGB", (40, 20), colour) for colour in COLOURS.values()]
    found = classifier(images, top_k=2, batch_size=2)
    assert [len(best) for best in found] == [2, 2, 2]
    with torch.no_grad():
        shares = vit(torch.stack([ImageTransform(32)(image) for image in images])).softmax(-1)
    for best, row in zip(found, shares, strict=True):
        assert best[0] == (list(COLOURS)[int(row.argmax())], pytest.approx(float(row.max()), rel=1e-5))
        assert best[0][1] >= best[1][1]
    assert [best[0] for best in found] == [pytest.approx(classifier(image)[0][0]) for image in images]
    classifier.save_pretrained(tmp_path / "model", card="all of it")
    again = ImageClassifier.from_pretrained(tmp_path / "model", device="cpu")
    assert (again.classes, again.transform) == (tuple(COLOURS), ImageTransform(32))
    for ours, theirs in zip(again(images, top_k=2), classifier(images, top_k=2), strict=True):  # prepacks.
        assert ours == [(name, pytest.approx(share, rel=1e-5)) for name, share in theirs]
    assert "all of it" in (tmp_path / "model" / "README.md").read_text("utf-8")
    with pytest.raises(ValueError, match="tells 3 classes apart, but there are 2 names"):
        ImageClassifier(vit, ["a", "b"], ImageTransform(32))
    (tmp_path / "model" / "classes.json").write_text("{}", "utf-8")
    with pytest.raises(ValueError, match=r'classes\.json: no list "classes"'):
        ImageClassifier.from_pretrained(tmp_path / "model")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classifier = ImageClassifier(ViT(32, 8, 16, 1, 2, num_classes=3), tuple(COLOURS), ImageTransform(32), device="cpu")
    classifier.save_pretrained(tmp_path / "model")
    paths = [str(tmp_path / f"{name}.png") for name in COLOURS]
    for path, colour in zip(paths, COLOURS.values(), strict=True):
        Image.new("RGB", (40, 20), colour).save(path)
    words = ["classify", "--model", str(tmp_path / "model"), "--device", "cpu"]
    (best,) = classifier(paths[2], top_k=3)
    assert main([*words, paths[2], "--top-k", "3", "--heatmap", str(tmp_path / "look.png")]) == 0
    assert capsys.readouterr().out.strip() == ", ".join(f"{name} {share:.1%}" for name, share in best)
    assert (tmp_path / "look.png").is_file()
    assert main([*words, *paths]) == 0
    assert [line.split(": ")[0] for line in capsys.readouterr().out.splitlines()] == paths
    assert main([*words, paths[2], "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["classes"][0]["class"] == best[0][0]
    assert main([*words, str(tmp_path / "none.png")]) == 2
    capsys.readouterr()


def test_a_folder_is_classified_and_what_is_no_picture_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classifier = ImageClassifier(ViT(32, 8, 16, 1, 2, num_classes=3), tuple(COLOURS), ImageTransform(32), device="cpu")
    classifier.save_pretrained(tmp_path / "model")
    root = Path(folder(tmp_path / "사진", {"red": 70, "파랑": 2}))
    (root / "red" / "00 broken.png").write_bytes(b"no picture")
    words = ["classify", "--model", str(tmp_path / "model"), "--device", "cpu"]
    assert main([*words, str(root), "--json", "--heatmap", str(tmp_path / "look.png")]) == 1
    out, err = capsys.readouterr()
    assert [Path(json.loads(line)["image"]).suffix for line in out.splitlines()] == [".png"] * 72
    assert err.startswith("mmt classify: ")
    assert "00 broken.png" in err
    assert err.splitlines()[1:] == ["72 pictures classified; 1 could not be used"]
    assert (tmp_path / "look.png").is_file()
    (tmp_path / "list.txt").write_text(f"{root / '파랑' / '1.png'}\n", "utf-8")
    assert main([*words, f"@{tmp_path / 'list.txt'}"]) == 0


@pytest.mark.parametrize("out", ["classes.jsonl", "classes.csv"])
def test_classes_are_written_to_a_file_that_a_second_call_goes_on_with(
    out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    classifier = ImageClassifier(ViT(32, 8, 16, 1, 2, num_classes=3), tuple(COLOURS), ImageTransform(32), device="cpu")
    classifier.save_pretrained("model")
    root = Path(folder(tmp_path / "사진", {"red": 3, "파랑": 2})).relative_to(tmp_path)
    (root / "red" / "00 broken.png").write_bytes(b"no picture")
    words = ["classify", str(root), "--model", "model", "--device", "cpu", "--top-k", "2", "--out", out]
    assert main(words) == 1
    printed, err = capsys.readouterr()
    again = f"{program()} classify @bad_images_classes.txt --model model --device cpu --top-k 2 --out {out}"
    bad = f"1 could not be used: bad_images_classes.txt names them (`{again}` tries them again)"
    assert (printed, err.splitlines()[1:]) == ("", [f"5 pictures classified in {out}; {bad}"])
    names = sorted(str(path) for path in root.rglob("*.png") if "broken" not in path.name)
    whole = Path(out).read_text("utf-8")
    if out.endswith("csv"):
        rows = [*csv.DictReader(whole.removeprefix("\ufeff").splitlines())]
        found = {name: [(r["class"], float(r["score"])) for r in rows if r["image"] == name] for name in names}
        want = [(label, pytest.approx(share, abs=1e-4)) for label, share in classifier(names[0], top_k=2)[0]]
        assert len(rows) == 10
    else:
        rows = [json.loads(line) for line in whole.splitlines()]
        found = {r["image"]: [(c["class"], c["score"]) for c in r["classes"]] for r in rows}
        want = [(label, pytest.approx(share)) for label, share in classifier(names[0], top_k=2)[0]]
        assert len(rows) == 5
    assert sorted(found) == names
    assert found[names[0]] == want
    Path(out).write_text(whole[: len(whole) // 2], "utf-8")
    Image.new("RGB", (9, 9)).save(root / "red" / "00 broken.png")
    assert main(words) == 0
    assert "had classes there already" in capsys.readouterr().err
    assert len(Path(out).read_text("utf-8").splitlines()) == (13 if out.endswith("csv") else 6)
    assert not Path("bad_images_classes.txt").exists()
    for more, line in (
        (["--json"], "--json prints classes, and --out writes them"),
        (["--out", "classes/"], "--out classes/: give FILE.jsonl or FILE.csv"),
        (["--out", "captions.jsonl"], "holds no classes to go on with (a line has no image or no classes)"),
        (["--out", "captions.csv"], "its first columns are image, caption, not image, class"),
    ):
        Path("captions.jsonl").write_text('{"image": "a.png", "captions": []}\n')
        Path("captions.csv").write_text("image,caption\na.png,a dog\n")
        assert main([*words, *more]) == 2
        assert line in capsys.readouterr().err


def test_what_is_no_classifier_says_what_it_is_for(tmp_path: Path) -> None:
    TextDecoder(97, 16, 1, 2).save_pretrained(tmp_path / "lm")
    VisionEncoderDecoder(ViT(32, 8, 16, 1, 2), TextDecoder(97, 16, 1, 2, context_dim=16)).save_pretrained(
        tmp_path / "cap"
    )
    ViT(32, 8, 16, 1, 2).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="lm holds a TextDecoder, not a ViT"):
        ImageClassifier.from_pretrained(tmp_path / "lm")
    with pytest.raises(ValueError, match="cap holds a VisionEncoderDecoder, not a ViT; it captions: `mmt caption`"):
        ImageClassifier.from_pretrained(tmp_path / "cap")
    with pytest.raises(ValueError, match=r"vit: a ViT without classes\.json, .* vit_classify"):
        ImageClassifier.from_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match=r"vit holds a ViT, not a VisionEncoderDecoder; .* `mmt classify`"):
        VisionEncoderDecoder.from_pretrained(tmp_path / "vit")


def test_the_recipe_fine_tunes_a_saved_vit_on_a_folder_of_ones_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the recipe's header says it."""
    recipes = Path(__file__).parents[3] / "recipes"
    root = folder(tmp_path / "data", {"train/red": 6, "train/green": 6, "val/red": 2, "val/green": 2})
    (tmp_path / "data" / "val" / "green" / "1.png").write_bytes(b"no picture")
    vit = ViT(32, 8, 16, 1, 2, num_classes=5)
    vit.save_pretrained(tmp_path / "vit")
    words = ["fit", "--config", str(recipes / "vit_classify.yaml"), "--config", str(recipes / "tiny.yaml")]
    words += [f"--data.source={root}"]
    words += ["--model.vit=mmtransformer.weights.load_vit", f"--model.vit.source={tmp_path / 'vit'}"]
    words += ["--data.transform.image_size=48", "--trainer.max_steps=1"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main([*words, f"--trainer.default_root_dir={tmp_path / 'run'}"]) == 0
    bad = tmp_path / "run" / "bad_images_val.jsonl"
    assert f"1 picture could not be read; they are named in {bad}" in capsys.readouterr().out
    tuned = ImageClassifier.from_pretrained(tmp_path / "run" / "model", device="cpu")
    assert tuned.classes == ("green", "red")
    assert tuned.transform.size == (48, 48)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text("utf-8"))
    assert metrics["classification"]["val"]["images"] == 3
    moved = (tuned.model.blocks[0].mlp.fc1.weight - vit.blocks[0].mlp.fc1.weight).abs().max()  # pyright: ignore
    assert 0 < float(moved.detach()) < 0.1


def test_cards_say_whether_it_is_right() -> None:
    module = data(shapes())
    vit = ViT(32, 8, 16, 1, 2, num_classes=8)
    nn.init.zeros_(vit.head.weight)  # pyright: ignore[reportArgumentType]
    vit.head.bias.data[2] = 9.0  # pyright: ignore[reportCallIssue, reportArgumentType, reportIndexIssue]
    classifier = ImageClassifier(vit, module.classes, ImageTransform(32), device="cpu")
    images = module.images("val")
    labels = {images.name(i): images.label(i) for i in range(len(images))}
    wrong = [name for name, label in labels.items() if label != 2][-2:]
    cards = make_cards(classifier, module, 7, wrong)
    assert {card.heading for card in cards[:2]} == set(wrong)
    assert len(cards) == 7
    others = [labels[card.heading] for card in cards[2:]]
    assert len(set(others)) == min(5, len({label for name, label in labels.items() if name not in wrong}))
    for card in cards:
        (said,) = card.captions
        true = module.classes[labels[card.heading]]
        assert said.text == "triangle 100%"
        assert list(said.references) == [true]
        assert said.correct == (true == "triangle")
        assert said.marks() == [("✓ right", "good") if true == "triangle" else ("✗ wrong", "bad")]
