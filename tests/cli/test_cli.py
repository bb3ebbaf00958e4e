import json
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from mmtransformer import (
    CLIP,
    ImageCaptioner,
    ImageTextEmbedder,
    ImageTransform,
    TextDecoder,
    TextTower,
    Tokenizer,
    VisionEncoderDecoder,
    ViT,
)
from mmtransformer.cli import COMMANDS, evaluate, fit, main
from mmtransformer.data.scenes.scenes import Scenes
from mmtransformer.data.scenes.world import SceneWorld
from mmtransformer.generation.config import GenerationConfig
from mmtransformer.training.evaluation.evaluation import Evaluation
from mmtransformer.training.evaluation.predictions import PredictionFile, save_scenes
from mmtransformer.training.evaluation.report import how_to
from support.cli import mmt

ROOT = Path(__file__).parents[2]
FINETUNE = ["fit", "--config", str(ROOT / "recipes/finetune_pairs.yaml"), "--config", str(ROOT / "recipes/tiny.yaml")]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven pictures beside their captions, some in Korean."""
    folder = tmp_path_factory.mktemp("pairs")
    split = Scenes(image_size=32, train_size=7).split("train")
    for i in range(7):
        split.image(i).save(folder / f"p{i}.png")
        (folder / f"p{i}.txt").write_text(split.captions(i)[i % 2].text, "utf-8")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt nothing, saved; it says at least three tokens."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    source = Scenes(image_size=32, train_size=20).split("train")
    texts = [caption.text for i in range(20) for caption in source.captions(i)]
    tokenizer = Tokenizer.train(texts, 300, ("en", "ko"))
    decoder = TextDecoder(300, 16, 1, 2, max_len=64, context_dim=16)
    captioner = VisionEncoderDecoder(ViT(32, 8, 16, 1, 2, class_token=False, pool="mean"), decoder)
    generation = GenerationConfig(min_new_tokens=3, max_new_tokens=6)
    ImageCaptioner(captioner, tokenizer, ImageTransform(32), generation=generation, device="cpu").save_pretrained(
        folder
    )
    return folder


def test_help_of_generation_is_whole_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["caption", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "arXiv:1610.02424)" in text
    assert " generation: how texts are searched for" in text
    assert text.count("(") == text.count(")")


@pytest.mark.parametrize(
    "words",
    ["export /no --to transformers out", "export --to transformers /no out", "export --model /no --to transformers out",
     "parity /no --prompt x a.png", "parity --model /no a.png --prompt x b.png"],
)  # fmt: skip
def test_options_may_stand_between_words(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert mmt(capsys, *words.split())[::2] == (2, f"mmt {words.split()[0]}: error: /no: no such folder\n")


def test_the_package_runs_as_the_command_does() -> None:
    for words, code in ((["--version"], 0), (["fti"], 2)):
        command = [sys.executable, "-m", "mmtransformer", *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        assert (done.returncode, bool(done.stdout), bool(done.stderr)) == (code, code == 0, code == 2)


def test_help_is_quick() -> None:
    script = "import sys; from mmtransformer.cli import main; main(['--help']); main(['fit', '--help']); "
    script += "print(sorted({'torch', 'lightning', 'numpy', 'PIL'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    *text, heavy = done.stdout.splitlines()
    assert heavy == "[]"
    assert all(any(line.startswith(f"  {name}") for line in text) for name in COMMANDS)
    assert sum(line.startswith("  --") for line in text) >= 15


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["fti"], 'mmt: error: no command "fti"; did you mean "fit"?; see mmt --help'),
        (["fit", "--trainer.max_steps=3"], "needs a recipe: --config"),
        (["fit", "--config", str(ROOT / "recipes/finetune_pair.yaml")], 'did you mean "finetune_pairs.yaml"?'),
        ([*FINETUNE], "needs --data.source"),
        ([*FINETUNE, "--data.source=PAIRS", "--model.lrr=3"], "no such key: model.lrr"),
        ([*FINETUNE, "--data.source=PAIRS", "--data.batchsize=3"], 'did you mean "batch_size"?'),
        ([*FINETUNE, "--data.source=PAIRS", "--data.image=x.yaml"], 'did you mean "transform"?'),
        ([*FINETUNE, "--trainer.max_stesp=3"], 'no such key: --trainer.max_stesp; did you mean "trainer.max_steps"?'),
        (
            [*FINETUNE, "--optim.lr=3"],
            "no such key: --optim.lr; keys begin with model., data. or trainer.: see mmt fit",
        ),
        (
            [*FINETUNE, "--data.source=PAIRS", "--model.optim.lr=abc"],
            "model.optim.lr: Expected a <class 'float'>. Got value: abc",
        ),
        ([*FINETUNE, "--data.source=NOWHERE", "--model.init=MODEL"], "NOWHERE does not exist"),
        ([*FINETUNE, "--data.source=PAIRS", "--model.init=NOWHERE"], "NOWHERE: no such folder"),
        ([*FINETUNE, "--data.source=PAIRS"], " fit --config caption_scenes`, or name another model"),
        (["caption", "NOWHERE.png", "--model", "MODEL"], "NOWHERE.png"),
        (["caption", "PAIRS/p0.txt", "--model", "MODEL"], "p0.txt: not a picture"),
        (["caption", "PAIRS/p0.png", "--model", "MODEL", "--language", "fr"], 'language "fr"; it knows en, ko'),
        (["caption", "PAIRS/p0.png", "--model", "PAIRS"], "config.json: no such file"),
        (["caption", "PAIRS/p0.png", "--model", "RUN"], "its model is RUN/model: name that"),
        (["caption", "PAIRS/p0.png", "--model", "RUN/last.ckpt"], "is a checkpoint, not a model"),
        (
            ["caption", "PAIRS/p0.png", "--model", "MODEL", "--device", "cuda:77"],
            "device cuda:77 is not available; leave device out",
        ),
        (["caption", "PAIRS/p0.png", "--model", "MODEL", "--device", "gpu"], "choose cpu, cuda or mps"),
        (["caption", "PAIRS/p0.png", "--model", "MODEL", "--temperature", "0.5"], "temperature changes how tokens"),
        (["caption", "PAIRS/p0.png", "--model", "MODEL", "--num-beams", "0"], "num_beams must be at least 1"),
        (["caption", "PAIRS/p0.png", "--model", "MODEL", "--num-bea", "3"], "unrecognized arguments: --num-bea"),
        (["caption", "PAIRS/p0.png", "--model", "MODEL", "--langauge", "ko"], 'did you mean "--language"?'),
        ([*FINETUNE, "--data.source=PAIRS", "--trainer.max_step=3"], 'did you mean "trainer.max_steps"?'),
        ([*FINETUNE, "--data.source=PAIRS", "--model.optim.learning_rate=3"], 'did you mean "model.optim.lr"?'),
        ([*FINETUNE, "--data.source=PAIRS", "--trainer.epochs=3"], 'did you mean "trainer.max_epochs"?'),
        (
            [*FINETUNE, "--data.source=PAIRS", "--model.tuning.how=lora"],
            "TuningConfig has none); it has parts, method, num_blocks, rank",
        ),
        (
            ["caption", "PAIRS/p0.png", "--model", "MODEL", "--stop-words", "a"],
            "--stop-words a; see mmt caption --help",
        ),
        (["check", "PAIRS", "--json", "found.json"], 'did you mean "--out"?'),
        (["check", "PAIRS", "--language", "de"], 'did you mean "--default-language"?'),
        (["caption", "x.jpg", "--model", "MODEL", "--question", "what?"], 'did you mean "--prompt"?'),
        (["draw", "a star", "--model", "MODEL", "--steps", "20"], 'did you mean "--num-inference-steps"?'),
        (["draw", "a star", "--model", "MODEL", "--cfg", "7"], 'did you mean "--guidance-scale"?'),
        (["check", "PAIRS/p0.png"], "p0.png is a picture, and pairs are pictures with captions: give the folder"),
        (["check", "PAIRS", "--images", "photos"], 'did you mean "--image-folder"?'),
        (["evaluate", "--model", "MODEL", "--data", "PAIRS", "--json", "x.json"], 'did you mean "--out"?'),
        (["ablate", "--recipe", "caption_scenes"], "required: --config"),
        (
            [*FINETUNE, "--data.source=PAIRS", "--model.init=MODEL", "--data.transform.image_size=224"],
            "data.transform would have no effect",
        ),
        ([*FINETUNE, "--data.source=PAIRS", "--model.init=MODEL", "--model.add_languages=[ko]"], "knows ko already"),
        (["evaluate", "--model", "MODEL", "--data", "PAIRS", "--split", "tset"], "no split 'tset'"),
    ],
)
def test_a_mistake_is_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    pairs: Path,
    model: Path,
    words: list[str],
    line: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, tmp_path / "RUN" / "model")
    (tmp_path / "RUN" / "last.ckpt").write_bytes(b"weights")
    places = {"PAIRS": str(pairs), "MODEL": str(model)}
    for name, place in places.items():
        words = [word.replace(name, place) for word in words]
    code, _, err = mmt(capsys, *words)
    last = err.strip().splitlines()[-1]
    assert code == 2
    assert line in last
    assert last.startswith("mmt")
    assert "Traceback" not in err
    assert "usage:" not in err


def test_nobody_reads_on(model: Path, pairs: Path) -> None:
    words = ["caption", str(pairs), "--model", str(model)]
    script = f"from mmtransformer.cli import main; raise SystemExit(main({words}))"
    done = subprocess.run(
        ["bash", "-c", '"$0" -c "$1" | true; echo ${PIPESTATUS[0]}', sys.executable, script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert done.stdout.strip() == "141"
    assert "rror" not in done.stderr


def test_the_next_command_is_one_that_a_shell_takes(tmp_path: Path) -> None:
    blind = nn.Module()
    blind.has_heatmaps = False  # pyright: ignore[reportAttributeAccessIssue]
    model: Any = SimpleNamespace(tokenizer=SimpleNamespace(languages=()), model=blind)
    words = shlex.split(how_to(tmp_path / "내 실행 1", model, Evaluation(GenerationConfig())))
    assert words[words.index("--model") + 1] == str(tmp_path / "내 실행 1" / "model")
    assert "--heatmap" not in words


def test_a_warning_is_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    before = warnings.showwarning

    def run(name: str, words: object) -> int:
        with monkeypatch.context() as patch:  # as Lightning does where it is imported
            patch.setattr(warnings, "formatwarning", lambda message, kind, file, line, *_: f"{file}:{line}: {message}")
            warnings.showwarning("data\x1b[2J have changed", UserWarning, "some/call.py", 199)
        return 0

    monkeypatch.setattr(fit, "run", run)
    assert mmt(capsys, "fit") == (0, "", "warning: data\\x1b[2J have changed\n")
    assert warnings.showwarning is before


def test_finetuning_adds_a_language_and_says_how_to_ask_for_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pairs: Path, model: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    german = tmp_path / "bilder"
    german.mkdir()
    for i in range(7):
        shutil.copy(pairs / f"p{i}.png", german)
        (german / f"p{i}.txt").write_text(f"ein roter Stern {i}", "utf-8")
    before = ImageCaptioner.from_pretrained(model, device="cpu")
    words = [f"--data.source={german}", f"--model.init={model}", "--data.read.default_language=de"]
    code, out, _ = mmt(capsys, *FINETUNE, *words, "--model.add_languages=[de]", "--model.freeze_vision=true")
    assert code == 0
    assert "--language de" in out.splitlines()[-1]
    after = ImageCaptioner.from_pretrained("runs/finetune_pairs/model", device="cpu")
    assert after.tokenizer.languages == ("de", "en", "ko")
    assert after.tokenizer.vocab_size == before.tokenizer.vocab_size + 1
    assert after.model.vocab_size >= after.tokenizer.vocab_size
    code, out, _ = mmt(
        capsys, "caption", str(german / "p0.png"), "--model", "runs/finetune_pairs/model", "--language", "de"
    )
    assert code == 0


def test_a_model_trained_on_in_one_language_captions_in_that_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pairs: Path, model: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("사진").mkdir()
    for i in range(7):
        shutil.copy(pairs / f"p{i}.png", "사진")
        Path(f"사진/p{i}.txt").write_text(f"빨간 별 {i}", "utf-8")
    code, _, err = mmt(capsys, "caption", "사진/p0.png", "--model", str(model), "--json")
    assert (code, err) == (0, "captions are in en; --language says another (ko)\n")
    assert mmt(capsys, *FINETUNE, "--data.source=사진", f"--model.init={model}")[0] == 0
    code, out, err = mmt(capsys, "caption", "사진/p0.png", "--model", "runs/finetune_pairs/model", "--json")
    assert (code, err, json.loads(out)["captions"][0]["language"]) == (
        0,
        "captions are in ko; --language says another (en)\n",
        "ko",
    )
    captioner = ImageCaptioner.from_pretrained("runs/finetune_pairs/model", device="cpu")
    assert captioner("사진/p0.png")[0][0].language == "ko"
    captioner.save_pretrained("again")
    assert ImageCaptioner.from_pretrained("again", device="cpu")("사진/p0.png")[0][0].language == "ko"


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ValueError, match="needs a recipe"):
        main(["fit", "--debug", "--trainer.max_steps=3"])


def test_caption(capsys: pytest.CaptureFixture[str], tmp_path: Path, pairs: Path, model: Path) -> None:
    images = [str(pairs / "p0.png"), str(pairs / "p1.png")]
    code, out, _ = mmt(
        capsys, "caption", *images, "--model", str(model), "--language", "ko", "--num-return-sequences", "2", "--json"
    )
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [row["image"] for row in rows] == images
    for row in rows:
        first, second = row["captions"]
        assert first["language"] == "ko"
        assert len(first["tokens"]) == len(first["token_log_probs"]) >= 3
        assert second["log_prob"] < 0
    captioner = ImageCaptioner.from_pretrained(model, device="cpu")
    assert rows[1]["captions"][0]["text"] == captioner(images[1], language="ko", num_return_sequences=2)[0][0].text

    heat = tmp_path / "words.png"
    code, out, err = mmt(capsys, "caption", images[0], "--model", str(model), "--heatmap", str(heat))
    assert code == 0
    assert heat.is_file() or "no word to draw" in err
    page = tmp_path / "words.html"
    must = ["--force-words", "star", "--max-new-tokens", "12"]
    code, out, err = mmt(capsys, "caption", *images, "--model", str(model), "--heatmap", str(page), *must)
    assert code == 0
    assert [("star" in line) for line in out.splitlines()] == [True, True]
    assert page.read_text("utf-8").count("data:image") >= 2
    assert f"{page}: where the model looked in 2 pictures" in err
    code, out, _ = mmt(capsys, "caption", images[0], "--model", str(model), "--do-sample")
    assert (code, len(out.splitlines())) == (0, 1)
    three = [
        "--num-return-sequences",
        "3",
        "--num-beam-groups",
        "3",
        "--diversity-penalty",
        "1",
        "--guidance-scale",
        "2",
    ]
    code, out, _ = mmt(capsys, "caption", images[0], "--model", str(model), *three)
    assert (code, len(set(out.splitlines()))) == (0, 3)
    for precision in ("bf16", "int8"):
        code, out, _ = mmt(capsys, "caption", *images, "--model", str(model), "--precision", precision)
        assert (code, len(out.splitlines())) == (0, 2)


def test_evaluate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pairs: Path, model: Path
) -> None:
    monkeypatch.setenv("PATH", "")  # without Java there is no METEOR, which would take most of the time
    monkeypatch.delenv("JAVA_HOME", raising=False)
    scores, said = tmp_path / "scores.json", tmp_path / "said.jsonl"
    words = ["--data", str(pairs), "--split", "train", "--out", str(scores), "--captions-out", str(said)]
    code, out, _ = mmt(capsys, "evaluate", "--model", str(model), *words)
    assert code == 0
    assert "BLEU-4" in out
    assert "not computed" in out
    captions = json.loads(scores.read_text("utf-8"))["captions"]["train"]
    rows = [json.loads(line) for line in said.read_text("utf-8").splitlines()]
    assert {row["language"] for row in rows} == set(captions)
    assert sum(c["images"] for c in captions.values()) == len(rows)
    limited = [*words, "--precision", "bf16", "--limit", "1"]
    code, out, err = mmt(capsys, "evaluate", "--model", str(model), *limited)
    assert (code, "of another model, of other data or settings of generation" in err) == (2, True)
    code, out, _ = mmt(capsys, "evaluate", "--model", str(model), *limited, "--overwrite")
    assert code == 0
    assert "BLEU-4" in out
    assert len(said.read_text("utf-8").splitlines()) == 1


def test_scores_are_written_though_what_is_printed_is_cut(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pairs: Path, model: Path
) -> None:
    def cut(*words: str, file: object = None) -> None:
        if file is None and "BLEU-4" in words[0]:
            raise BrokenPipeError

    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("mmtransformer.cli.evaluate.say", cut)
    words = ["--data", str(pairs), "--split", "train", "--limit", "1", "--out", str(tmp_path / "scores.json")]
    with pytest.raises(BrokenPipeError):
        evaluate.run("evaluate", ["--model", str(model), *words])
    assert json.loads((tmp_path / "scores.json").read_text("utf-8"))["captions"]


def test_evaluate_by_a_dual_encoder(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pairs: Path, model: Path
) -> None:
    monkeypatch.setenv("PATH", "")
    tokenizer = Tokenizer.train(["a red star", "빨간 별"], 300, ["en", "ko"])
    clip = CLIP(ViT(16, 8, 24, 1, 4), TextTower(300, 20, 1, 2), embed_dim=13)
    ImageTextEmbedder(clip, tokenizer, ImageTransform(16), device="cpu").save_pretrained(tmp_path / "clip")
    words = ["evaluate", "--model", str(model), "--data", str(pairs), "--split", "train", "--limit", "2"]
    code, out, _ = mmt(capsys, *words, "--clip-score", str(tmp_path / "clip"), "--out", str(tmp_path / "a.json"))
    assert code == 0
    assert "RefCLIPScore" in out
    found = json.loads((tmp_path / "a.json").read_text("utf-8"))
    assert set(found["clip_scores"]["train"]) == set(found["captions"]["train"])
    assert all(0 <= x["ref_clip_score"] <= 2.5 for x in found["clip_scores"]["train"].values())
    code, _, err = mmt(capsys, *words, "--clip-prefix", "A photo depicts")
    assert (code, "no model is named" in err) == (2, True)
    code, _, err = mmt(capsys, *words, "--clip-score", str(model))
    assert (code, "not a CLIP" in err) == (2, True)
    code, _, err = mmt(capsys, *words, "--clip-score", str(tmp_path / "none"))
    assert (code, "no such folder" in err) == (2, True)


def test_evaluate_goes_on_and_passes_over_bad_pictures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pairs: Path, model: Path
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pairs, "pairs")
    words = ["evaluate", "--model", str(model), "--data", "pairs", "--split", "train", "--batch-size", "2"]
    _, whole, _ = mmt(capsys, *words, "--captions-out", "whole.jsonl")
    lines = Path("whole.jsonl").read_bytes()
    Path("part.jsonl").write_bytes(lines[: len(lines) // 2])
    code, out, _ = mmt(capsys, *words, "--captions-out", "part.jsonl")
    assert (code, out) == (0, whole)
    assert Path("part.jsonl").read_bytes() == lines
    code, out, _ = mmt(capsys, *words, "--captions-out", "two.jsonl", "--device", "cpu", "--devices", "2")
    assert code == 0
    assert [json.loads(line)["name"] for line in Path("two.jsonl").read_text("utf-8").splitlines()] == [
        json.loads(line)["name"] for line in lines.splitlines()
    ]
    with monkeypatch.context() as patch:
        add = PredictionFile.add

        def stop(self: PredictionFile, predictions: Any) -> None:
            add(self, predictions)
            if len(Path("part.jsonl").read_bytes().splitlines()) > 2:
                raise KeyboardInterrupt

        patch.setattr(PredictionFile, "add", stop)
        for more, way in (([], "the same call"), (["--overwrite"], "the same call without --overwrite")):
            Path("part.jsonl").unlink()
            code, _, err = mmt(capsys, *words, "--captions-out", "part.jsonl", *more)
            said = rf"mmt: interrupted after [23] of 5 pictures: what is done is in part\.jsonl, and {way} goes on"
            assert (code, bool(re.fullmatch(said, err.splitlines()[-1]))) == (130, True), err
    Path("pairs/p3.png").write_bytes(b"broken")
    Path("part.jsonl").unlink()
    code, out, err = mmt(capsys, *words, "--captions-out", "part.jsonl")
    assert code == 1
    assert "1 of 5 pictures could not be used, and are in no score: bad_images_part.txt names them" in err
    assert Path("bad_images_part.txt").read_text("utf-8").splitlines()[1] == "p3.png"
    assert len(Path("part.jsonl").read_text("utf-8").splitlines()) == len(lines.splitlines()) - 1
    Path("part.jsonl").write_text("no predictions\n", "utf-8")
    code, _, err = mmt(capsys, *words, "--captions-out", "part.jsonl")
    assert (code, "holds no predictions" in err) == (2, True)


def test_evaluate_draws_the_scenes_that_the_model_was_scored_on(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    words = ["evaluate", "--model", str(folder), "--data", "scenes", "--limit", "3", "--captions-out"]
    code, _, err = mmt(capsys, *words, str(tmp_path / "default.jsonl"))
    assert (code, "it is not known which scenes it was scored on" in err) == (0, True)
    source = Scenes(image_size=32, seed=7, val_size=2, world=SceneWorld(group_shares=(1.0,), max_count=1))
    save_scenes(folder, source)
    code, _, err = mmt(capsys, *words, str(tmp_path / "own.jsonl"))
    assert (code, "not known" in err) == (0, False)
    rows = [json.loads(line) for line in (tmp_path / "own.jsonl").read_text("utf-8").splitlines()]
    want = source.split("val")
    assert [row["name"] for row in rows[::2]] == [want.name(0), want.name(1)]
    assert rows[0]["references"] == [c.text for c in want.captions(0) if c.language == rows[0]["language"]]
    for text, line in (
        ('{"seed": "x", "world": 3}', "world is 3"), ('{"sead": 1}', "sead"), ('{"world": {"colours": []}}', "colours"),
        ('{"val_size": 0}', "val_size"),
    ):  # fmt: skip
        (folder / "scenes.json").write_text(text, "utf-8")
        code, _, err = mmt(capsys, *words, str(tmp_path / "own.jsonl"))
        assert (code, "scenes.json: " in err, line in err) == (2, True, True), err


def test_check(capsys: pytest.CaptureFixture[str], tmp_path: Path, pairs: Path) -> None:
    code, out, _ = mmt(capsys, "check", str(pairs))
    assert code == 0
    assert "7 pictures" in out
    for i in range(3):
        (tmp_path / f"q{i}.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
        (tmp_path / f"q{i}.txt").write_text("a broken picture", "utf-8")
    code, out, _ = mmt(capsys, "check", str(tmp_path), "--out", str(tmp_path / "found.json"))
    assert code == 1
    assert "HURTS" in out
    assert json.loads((tmp_path / "found.json").read_text("utf-8"))["hurts"] is True


def test_strangers_names_and_captions_are_shown_as_escapes(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    split = Scenes(image_size=32, train_size=2).split("train")
    paths = [tmp_path / f"a\x1b[2J{i}.png" for i in range(2)]
    for i, path in enumerate(paths):
        split.image(i).save(path)
    code, out, err = mmt(capsys, "caption", *map(str, paths), "--model", str(model))
    assert (code, "\x1b" in out + err, "a\\x1b[2J1.png: " in out) == (0, False, True)
    code, out, err = mmt(capsys, "caption", str(tmp_path / "no\x1b[31m.png"), "--model", str(model))
    assert (code, "\x1b" in out + err, "no\\x1b[31m.png" in err) == (2, False, True)
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    ImageCaptioner.from_pretrained(model, device="cpu").save_pretrained(folder)
    assert "# &lt;img src=x onerror=alert(1)&gt;" in (folder / "README.md").read_text("utf-8")
