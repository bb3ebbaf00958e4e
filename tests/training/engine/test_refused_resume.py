"""A run's folder is as it was where a command that would go on with it is refused."""

import json
from pathlib import Path

import pytest

from mmtransformer import ImageTransform, TextDecoder, Tokenizer, VisionEncoderDecoder, ViT
from mmtransformer.data.scenes.scenes import Scenes
from mmtransformer.pipelines.image_captioner import ImageCaptioner
from support.cli import mmt

RECIPES = Path(__file__).parents[3] / "recipes"


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_refused_resume_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")  # no Java
    split = Scenes(image_size=32, train_size=9).split("train")
    for i in range(9):
        folder = Path("data", "val" if i > 6 else "train")
        folder.mkdir(parents=True, exist_ok=True)
        split.image(i).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(split.captions(i)[i % 2].text, "utf-8")
    broken = Path("data/train/3.png").read_bytes()[:-99]
    Path("data/train/3.png").write_bytes(broken)
    captioner = VisionEncoderDecoder(
        ViT(32, 8, 16, 1, 2, class_token=False, pool="mean"), TextDecoder(300, 16, 1, 2, max_len=64, context_dim=16)
    )
    tokenizer = Tokenizer.train([c.text for i in range(9) for c in split.captions(i)], 300, ("en", "ko"))
    ImageCaptioner(captioner, tokenizer, ImageTransform(32), device="cpu").save_pretrained("model")
    words = ["fit", "--config", str(RECIPES / "finetune_pairs.yaml"), "--config", str(RECIPES / "tiny.yaml")]
    words += ["--data.source=data", "--model.init=model", "--trainer.default_root_dir=run"]
    words += ["--trainer.max_epochs=-1", "--data.batch_size=7"]
    assert mmt(capsys, *words, "--trainer.max_steps=2")[0] == 0
    with Path("run/bad_images_train.jsonl").open("a", encoding="utf-8") as report:
        report.write(json.dumps({"image": "train/1.png", "error": "was not there"}) + "\n")
    before = _contents(Path("run"))
    assert before["bad_images_train.jsonl"].count(b"\n") == 2
    for more, said in (
        (["--data.read.languages=[en]"], ": the run had 7 pictures in 'train', and there are now "),
        (["--data.loader.seed=3"], ": the data's seed was 0 and is now 3"),
        (["--model.optim.lr=1"], " with another optimizer: optim.lr was "),
        (["--model.freeze_decoder=true"], " with another model: "),
    ):
        code, _, err = mmt(capsys, *words, "--resume", "--trainer.max_steps=4", *more)
        assert (code, err.startswith(f"mmt fit: error: cannot resume{said}")) == (2, True), err
        assert (err.count("\n"), _contents(Path("run"))) == (1, before), more
    assert mmt(capsys, *words, "--resume", "--trainer.max_steps=4")[0] == 0
    after = _contents(Path("run"))
    assert b"max_steps: 4" in after["config.yaml"]
    assert [json.loads(line)["image"] for line in after["bad_images_train.jsonl"].splitlines()] == ["train/3.png"]
    assert after["metrics.csv"].startswith(before["metrics.csv"])

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mmtransformer.training.tasks.captioning.evaluate", interrupted)
    said = "mmt: interrupted after the training, which is complete: --resume finishes the scores\n"
    assert mmt(capsys, *words, "--resume", "--trainer.max_steps=4")[::2] == (130, said)
