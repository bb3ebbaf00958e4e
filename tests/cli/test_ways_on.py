"""What a beginner is told leads on: the commands that messages name are there, and fit what was typed."""

import inspect
import io
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.trainer.connectors import checkpoint_connector
from PIL import Image

from mmtransformer import ImageCaptioner, ImageTransform, TextDecoder, Tokenizer, VisionEncoderDecoder, ViT
from mmtransformer.cli import main
from mmtransformer.cli.guards.errors import one_line
from mmtransformer.data.captions import CaptionData
from mmtransformer.data.files.read_options import ReadOptions
from mmtransformer.data.loading.module import LoaderConfig
from mmtransformer.data.scenes.scenes import Scenes
from mmtransformer.images.files import _check_size
from mmtransformer.serialization.printable import program
from support.cli import mmt


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt nothing."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    tokenizer = Tokenizer.train(["a red dog"], 300, ("en", "ko"))
    decoder = TextDecoder(300, 16, 1, 2, max_len=64, context_dim=16)
    captioner = VisionEncoderDecoder(ViT(32, 8, 16, 1, 2, class_token=False, pool="mean"), decoder)
    ImageCaptioner(captioner, tokenizer, ImageTransform(32), device="cpu").save_pretrained(folder)
    return folder


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Six pictures with captions, one of them empty."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    split = Scenes(image_size=32, train_size=6).split("train")
    for i in range(6):
        split.image(i).save(folder / f"그림 {i}.png")
        (folder / f"그림 {i}.txt").write_text(["빨간 원", "a red circle"][i % 2] if i < 5 else " ", "utf-8")
    (folder / "그림 0.txt").write_text("빨간 원\n", "utf-8")
    (folder / "그림 없음.txt").write_text("없음", "utf-8")
    return folder


def test_what_fit_may_leave_out_evaluate_may_too(model: Path, pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "--model", str(model), "--data", str(pairs), "--split", "train", "--limit", "2"]
    code, _, err = mmt(capsys, *words)
    assert code == 2
    share = err.partition("`--max-bad-fraction ")[2].partition("`")[0]
    code, _, err = mmt(capsys, *words, "--max-bad-fraction", share)
    assert code == 0, err


@pytest.mark.parametrize("limit", ["0", "-3"])
def test_a_limit_leaves_something(limit: str, model: Path, pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = mmt(capsys, "evaluate", "--model", str(model), "--data", str(pairs), "--limit", limit)
    assert (code, err) == (
        2,
        f"mmt evaluate: error: --limit must be at least 1 picture, not {limit}; leave it out for all\n",
    )


def test_an_overlay_is_called_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    _, out, _ = mmt(capsys, "recipes", "copy", "tiny")
    assert out == f"tiny.yaml; lay it over a recipe: {program()} fit --config caption_scenes --config tiny.yaml\n"
    code, _, err = mmt(capsys, "fit", "--config", "tiny.yaml")
    assert code == 2
    way = f"it can be laid over one: {program()} fit --config caption_scenes --config tiny.yaml"
    assert err == f"mmt fit: error: tiny.yaml names no model, so it is no recipe; {way}\n"
    code, out, err = mmt(capsys, *shlex.split(way.partition(f"{program()} ")[2]), "--print_config")
    assert (code, "class_path: " in out) == (0, True), err
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").touch()
    for folder in ("run", "run/model"):
        code, _, err = mmt(capsys, "fit", "--config", folder)
        assert err == f"mmt fit: error: {folder}: a folder; the run's is run/config.yaml: name that\n"
    (tmp_path / "run" / "config.yaml").unlink()
    code, _, err = mmt(capsys, "fit", "--config", "run")
    assert err == "mmt fit: error: run: a folder, not a recipe; mmt recipes lists the library's\n"
    code, _, err = mmt(capsys, "fit", "--config", "translate_scenes", "--data.source", "run")
    assert err == "mmt fit: error: run: a folder; name a table in it\n"
    code, _, err = mmt(capsys, "fit", "--config", "nosuch.yaml")
    assert err == "mmt fit: error: nosuch.yaml: no such recipe; mmt recipes lists the library's\n"


def test_a_misspelt_section_of_a_recipe_has_a_suggestion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mmt(capsys, "recipes", "copy", "caption_scenes", str(tmp_path / "own.yaml"))
    text = (tmp_path / "own.yaml").read_text("utf-8")
    (tmp_path / "own.yaml").write_text(text.replace("\ntrainer:", "\ntrainr:"), "utf-8")
    code, _, err = mmt(capsys, "fit", "--config", str(tmp_path / "own.yaml"))
    assert (code, err.startswith("mmt fit: error: no such key: trainr.")) == (2, True)
    assert '; did you mean "trainer.' in err
    assert "has none" not in err


def test_what_the_trainer_cannot_have_here_is_said_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["fit", "--config", "caption_scenes", "--config", "tiny"]
    for name, text in (
        ("empty", ""),
        ("null", "trainer: null\n"),
        ("word", "trainer\n"),
        ("tab", "trainer:\n\tmax_epochs: 1\n"),
    ):
        Path(f"{name}.yaml").write_text(text, "utf-8")
    for key, line in (
        ("--trainer.accelerator=tpu", "torch_xla"),
        ("--config=null.yaml", "trainer: null: give its keys"),
        ("--trainer.gradient_clip_val=-1", "trainer.gradient_clip_val (-1) must be at least 0"),
        ("--data.loader.num_workers=-1", "loader.num_workers (-1) must be at least 0"),
        ("--config=empty.yaml", "empty.yaml is no recipe: it must hold keys with values"),
        ("--config=word.yaml", "word.yaml is no recipe: it must hold keys with values"),
        ("--config=tab.yaml", "spaces, not tabs"),
        ("--trainer.devices=999", "trainer.devices (999): a CPU takes a process for each of its cores"),
        ("--trainer.devices=0", "trainer.devices must be at least 1 (on a CPU the number of processes"),
        (
            "--trainer.val_check_interval=99",
            "trainer.val_check_interval (99) is more than the 3 batches of an epoch: give",
        ),
        *(
            (f"--trainer.check_val_every_n_epoch={none}", "trainer.val_check_interval is a share of an epoch, while")
            for none in ("null", "None")
        ),
        ("--trainer.devices=none", "trainer.devices must be at least 1 (on a CPU the number of processes"),
    ):
        code, _, err = mmt(capsys, *words, key)
        assert (code, err.startswith("mmt fit: error: "), line in err) == (2, True, True), err
        assert err.count("\n") == 1


def test_letters_that_the_output_has_not_are_told_the_setting(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    words = ("caption", str(tmp_path / "a.png"), "--model", str(model), "--language", "ko", "--prefix", "사진")
    monkeypatch.delenv("PYTHONIOENCODING", raising=False)
    for codec, way in (("ascii", "set PYTHONUTF8=1"), ("cp1252", "set PYTHONUTF8=1"), ("latin-1", "unset PYTHONIO")):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), codec))
            if codec == "latin-1":
                patch.setenv("PYTHONIOENCODING", codec)
            code, _, err = mmt(capsys, *words)
        told = f'mmt caption: error: the output goes out as {codec}, which has no "사진": {way}'
        assert (code, err.startswith(told), err.count("\n")) == (2, True, 1), err
    lost = UnicodeEncodeError("utf-8", "\udc80", 0, 1, "surrogates not allowed")  # of no output: it writes them out
    assert one_line(lost) == str(lost)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("draw 'a cat' ' '", "a text is empty, and says nothing to draw: leave it out"),
        ("translate '' --language ko", "a text is empty, and there is nothing to translate: leave it out"),
        ("caption ''", 'an empty name in the place of a picture or folder; of all that is here, write "."'),
        ("classify ''", 'an empty name in the place of a picture or folder; of all that is here, write "."'),
    ],
)
def test_an_empty_word_is_refused(words: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As of a shell's variable that is not set; before a model is read."""
    code, out, err = mmt(capsys, *shlex.split(words), "--model", "nowhere")
    assert (code, out, err) == (2, "", f"mmt {words.split()[0]}: error: {told}\n")


def test_of_a_run_that_stopped_the_way_to_its_model_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path("runs/끊긴 것")
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints/last.ckpt").touch()
    (run / "config.yaml").touch()
    way = (
        f"`{program()} fit --config '{run}/config.yaml' --ckpt_path '{run}/checkpoints/last.ckpt' "
        f"--trainer.max_steps 1` writes its model without training on"
    )
    for named in (run, run / "checkpoints", run / "checkpoints/last.ckpt"):
        code, _, err = mmt(capsys, "caption", "a.png", "--model", str(named))
        assert (code, err.endswith(f"{way}\n")) == (2, True), err
    assert "--resume` goes on with it" in mmt(capsys, "caption", "a.png", "--model", str(run))[2]


def test_a_folder_in_the_place_of_a_checkpoint_names_the_runs(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path("runs/mine")
    (run / "checkpoints").mkdir(parents=True)
    shutil.copytree(model, run / "model")
    last = run / "checkpoints/last.ckpt"
    words = ("fit", "--config", "caption_scenes", "--config", "tiny", "--ckpt_path")
    way = ", and a checkpoint is a file, runs/NAME/checkpoints/last.ckpt\n"
    assert mmt(capsys, *words, str(run / "model"))[2].endswith(f"{run}/model is a model's folder{way}")
    last.touch()
    for named, kind in (
        (run / "model", "a model's folder"),
        (run / "model/model.safetensors", "a model's weights"),
        (run, "a run's folder"),
        (run / "checkpoints", "a folder"),
    ):
        code, _, err = mmt(capsys, *words, str(named))
        assert (code, err.endswith(f"{named} is {kind}; the checkpoint is {last}\n")) == (2, True), err
    assert mmt(capsys, *words, str(run / "modell"))[2].endswith("no such checkpoint\n")


def test_a_file_in_the_place_of_a_model_names_its_folder(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("model.safetensors", "config.json"):
        _, _, err = mmt(capsys, "caption", "a.png", "--model", str(model / name))
        assert err == f"mmt caption: error: {model / name} is a file, and a model is a folder: name {model}\n"


def test_an_archive_in_the_place_of_a_model_is_to_be_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("model.tgz", "model.zip", "model.tar.gz", "모델.TAR", "model.7z"):
        Path(name).write_bytes(b"packed")
        _, _, err = mmt(capsys, "caption", "a.png", "--model", name)
        said = (
            f"{name} is an archive, and a model is a folder: unpack it, and name the folder that then holds config.json"
        )
        assert err == f"mmt caption: error: {said}\n"
    Path("weights.pt").write_bytes(b"weights")
    _, _, err = mmt(capsys, "caption", "a.png", "--model", "weights.pt")
    assert "a model is a folder that holds its config.json beside its weights: there is none in ." in err


def test_languages_without_tags_can_be_made_one(model: Path, pairs: Path) -> None:
    plain = Tokenizer.train(["a red dog"], 300)
    plain.save_pretrained(model.parent / "plain")

    def data(**read: Any) -> CaptionData:
        options: dict[str, Any] = {
            "tokenizer": str(model.parent / "plain"),
            "loader": LoaderConfig(max_bad_fraction=0.5),
        }
        return CaptionData(str(pairs), read=ReadOptions(**read), transform=ImageTransform(32), batch_size=2, **options)

    with pytest.raises(ValueError, match=r"no language tags\. .* --data\.read\.default_language ko; ") as caught:
        data().loader("train", training=True)
    language = str(caught.value).partition("--data.read.default_language ")[2][:2]
    assert len(data(default_language=language).loader("train", training=True))
    alone = str(caught.value).partition("--data.read.languages ")[2][:2]
    assert len(data(languages=alone).loader("train", training=True))
    assert data(languages=alone).source.languages == (alone,)


def test_of_too_many_pixels_no_option_is_named_that_no_command_has() -> None:
    from mmtransformer.images import ImageError, load

    with pytest.raises(ImageError, match=r"make it smaller \(in Python, mmtransformer\.images\.load\(file, max_pix"):
        _check_size(Image.new("L", (3, 3)), "큰.png", 8)
    assert load(Image.new("L", (3, 3)), max_pixels=9).size == (3, 3)


def test_lists_of_korean_windows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmtransformer.data.image_files import listed

    monkeypatch.chdir(tmp_path)
    names = ["사진/여름 1.jpg", "사진/여름 2.jpg"]
    assert list(listed("\r\n".join(names).encode("cp949"), "목록.txt")) == names
    assert list(listed("\r\n".join(f'"{name}"' for name in names).encode("cp949"), "목록.txt")) == names
    assert list(listed("\n".join(f'"{name}"' for name in names).encode("utf-8"), "목록.txt")) == names
    Path('"quoted"').touch()
    assert list(listed(b'"quoted"\n', "목록.txt")) == ['"quoted"']
    raw = b"caf\xe9.jpg"
    Path(raw.decode("utf-8", "surrogateescape")).touch()
    assert list(listed(raw, "목록.txt")) == [raw.decode("utf-8", "surrogateescape")]


def test_a_list_without_its_mark_is_told_of_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("목록.txt").write_text("a.jpg\n", "utf-8")
    code, _, err = mmt(capsys, "caption", "목록.txt", "--model", str(model))
    wanted = "mmt caption: error: 목록.txt: not a picture but a text; if it lists pictures, write @목록.txt\n"
    assert (code, err) == (2, wanted)


def test_an_empty_recipe_is_said_to_be_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, said in (
        ("{}\n", "names no model, so it is no recipe"),
        ("- a\n", "is no recipe: it must hold keys"),
        ("\n", "hold keys"),
    ):
        (tmp_path / "a.yaml").write_text(text, "utf-8")
        code, _, err = mmt(capsys, "fit", "--config", str(tmp_path / "a.yaml"))
        assert (code, said in err) == (2, True), err


def test_a_path_that_climbs_says_from_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    way = f"; a relative path begins where the command runs, here {tmp_path}\n"
    _, _, err = mmt(capsys, "caption", "a.png", "--model", "../saved")
    assert err == f"mmt caption: error: ../saved: no such folder{way}"
    _, _, err = mmt(capsys, "check", "../photos")
    assert err == f"mmt check: error: ../photos does not exist{way}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
@pytest.mark.parametrize("kind", ["gpu", "cuda"], ids=["any", "nvidia"])
def test_a_gpu_that_is_not_there(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = mmt(capsys, "fit", "--config", "caption_scenes", "--trainer.accelerator", kind)
    told = "mmt fit: error: trainer.accelerator: torch finds no such device here; leave it out to use what there is"
    assert (code, err.splitlines()[-1]) == (2, told)


def test_data_without_anything_usable_are_not_to_be_allowed(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "captions.csv").write_text("image,caption\nnone.png,a\nnor.png,b\n", "utf-8")
    code, _, err = mmt(capsys, "evaluate", "--model", str(model), "--data", str(tmp_path))
    assert (code, "without them nothing is left" in err, "--max-bad-fraction" in err) == (2, True, False)


def test_fewer_epochs_than_a_run_has_done() -> None:
    said = "You restored a checkpoint with current_epoch=30, but you have set Trainer(max_epochs=12)."
    assert "but you have set Trainer(max_epochs={" in inspect.getsource(checkpoint_connector)  # Lightning's words still
    told = "trainer.max_epochs (12) is less than the 30 that the run has done: give at least as many, or begin another"
    assert (one_line(ValueError(said)) or "").startswith(told)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--model.help ViT", 'model.help: "ViT" is no class that can stand there; of a part: --config RECIPE --model.'),
        (
            "--config caption_scenes --data.cache_features true",
            'data.cache_features: "true" is no class that can stand there, and no settings: --data.cache_features.KEY',
        ),
        ("--config caption_scenes --trainer.logger tensorboard", 'trainer.logger: "tensorboard" is no class that can '),
    ],
)
def test_a_word_in_the_place_of_a_class(
    words: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = mmt(capsys, "fit", *words.split())
    assert (code, told in err, "Expected" in err) == (2, True, False), err


def test_what_the_help_names_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ways = {
        "--model.help Captioning": "label_smoothing",
        "--config caption_scenes --model.captioner.vision.help ViT": "dim",
    }
    for words, argument in ways.items():
        with pytest.raises(SystemExit):
            main(["fit", *words.split()])
        assert f".{argument} " in capsys.readouterr().out
