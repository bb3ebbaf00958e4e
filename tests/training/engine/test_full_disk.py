"""The end of a run on a disk that is full or may not be written: path, bytes, and not a weight is lost."""

import errno
import os
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from mmtransformer.cli import main
from mmtransformer.pipelines.image_captioner import ImageCaptioner
from mmtransformer.serialization import weight_files
from mmtransformer.training import Captioning
from mmtransformer.training.engine.checkpoints import CheckpointError, read, written_to
from mmtransformer.training.evaluation import report
from support import tiny

ROOT = Path(__file__).parents[3]
RESULTS = ("metrics.json", "predictions_val.jsonl", "model/model.safetensors", "model/config.json", "gallery.png",
           "gallery.html", "curves.png")  # fmt: skip


def fit(folder: Path, *more: str) -> int:
    words = ["fit", "--config", str(ROOT / "recipes/caption_scenes.yaml"), "--config", str(ROOT / "recipes/tiny.yaml")]
    words += ["--data.source.train_size=16", "--data.source.val_size=4", "--data.batch_size=8"]
    words += ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return main([*words, f"--trainer.default_root_dir={folder}", *more])


def check_told(told: str, folder: Path, file: str, reason: str) -> None:
    """One line that names file and bytes, and where the weights are."""
    pattern = (
        rf"mmt fit: error: {re.escape(str(folder / file))}: cannot be written: {reason}; [\d,]+ bytes of it are "
        rf"there, [\d,]+ bytes are free. The trained weights are whole in {re.escape(str(folder))}/checkpoints/"
        rf"last.ckpt: free some space, and --resume finishes\n"
    )
    assert re.fullmatch(pattern, told), told
    assert read(folder / "checkpoints" / "last.ckpt")["global_step"] == 2


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_results_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run; it ends at one writer after the other, and goes on from its checkpoint each time."""
    write: Callable[..., None] = report.write_json

    def spoilt(path: Path, *args: Any) -> None:
        if path.name == "metrics.json":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        write(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(report, "write_json", spoilt)
        assert fit(tmp_path, "--resume") == 2
    check_told(capsys.readouterr().err, tmp_path, "metrics.json", "Permission denied")

    def no_room(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(weight_files, "save_file", no_room)
        assert fit(tmp_path, "--resume") == 2
    check_told(capsys.readouterr().err, tmp_path, "model/model.safetensors", "No space left on device")
    make, begun = tempfile.mkstemp, [""]

    def noted(*args: Any, **more: Any) -> tuple[int, str]:
        begun.append(more.get("prefix") or "")
        return make(*args, **more)

    fdopen = os.fdopen
    with monkeypatch.context() as patch:
        patch.setattr("mmtransformer.serialization.writing.tempfile.mkstemp", noted)
        patch.setattr(
            "mmtransformer.serialization.writing.os.fdopen",
            lambda *args, **more: full() if "gallery.png" in begun[-1] else fdopen(*args, **more),
        )
        assert fit(tmp_path, "--resume") == 2
    check_told(capsys.readouterr().err, tmp_path, "gallery.png", "No space left on device")
    assert fit(tmp_path, "--resume") == 0
    assert all((tmp_path / file).stat().st_size for file in RESULTS)
    ImageCaptioner.from_pretrained(tmp_path / "model")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    yield from tiny.disk(tmp_path / "disk", "200m")


@pytest.mark.slow
def test_a_disk_that_fills_up_or_is_locked_when_the_training_ends(
    small_disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    finish, folder, filler = Captioning.finish, small_disk / "run", small_disk / "others"

    def after(change: Callable[[], object]) -> int:
        def changed(task: Captioning, run: Any) -> None:
            change()
            finish(task, run)

        with monkeypatch.context() as patch:
            patch.setattr(Captioning, "finish", changed)
            return fit(folder, "--resume")

    def fill(left: int) -> None:
        filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - left))

    def mount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(small_disk)], check=True)

    for left, file in ((0, "metrics.json"), (1 << 20, "model/model.safetensors"), (16_400_000, "gallery.png")):
        assert after(lambda left=left: fill(left)) == 2
        filler.unlink()
        check_told(capsys.readouterr().err, folder, file, "No space left on device")
    assert after(lambda: mount("ro")) == 2
    mount("rw")
    told = re.sub("/run/[a-z_]+.jsonl:", "/run/metrics.json:", capsys.readouterr().err)  # whatever is first
    check_told(told, folder, "metrics.json", "Read-only file system")
    assert fit(folder, "--resume") == 0
    assert all((folder / file).stat().st_size for file in RESULTS)


def test_what_is_no_fault_of_the_disk_is_left_as_it_is(tmp_path: Path) -> None:
    for other in (
        OSError("broken picture"),
        FileNotFoundError(2, "No such file or directory", "/data/pictures/1.jpg"),
        PermissionError(13, "Permission denied", "/data/pictures/1.jpg"),
        ConnectionResetError(104, "Connection reset by peer"),
    ):
        with pytest.raises(type(other)) as left, written_to(tmp_path):
            raise other
        assert left.value is other
    (tmp_path / "a").mkdir()
    with pytest.raises(CheckpointError, match="/a: cannot be written: Is a directory") as caught, written_to(tmp_path):
        (tmp_path / "a").write_text("x")
    assert "--resume" not in str(caught.value)  # nothing to go on from
