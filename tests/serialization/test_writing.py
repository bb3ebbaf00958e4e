"""What is written whole or not at all leaves nothing half done where the program is ended."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from mmtransformer.serialization import weight_files
from mmtransformer.serialization.weight_files import write_weights
from mmtransformer.serialization.writing import whole_folder
from support.tiny import in_child


def fill(folder: Path, number: int) -> None:
    with whole_folder(folder) as inside:
        (inside / "config.json").write_text("{}")
        os.kill(os.getpid(), number)
        time.sleep(5)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 99)])  # 99: KeyboardInterrupt
def test_a_folder_whose_writer_is_ended_leaves_nothing(number: int, code: int, tmp_path: Path) -> None:
    assert in_child(lambda: fill(tmp_path / "out", number)) == code
    assert not [*tmp_path.iterdir()]


def test_what_a_killed_writer_left_is_cleared_away(tmp_path: Path) -> None:
    assert in_child(lambda: fill(tmp_path / "out [1]", signal.SIGKILL)) == -signal.SIGKILL
    (litter,) = tmp_path.iterdir()
    own = tmp_path / litter.name.replace(f"{litter.name.split('.')[-3].rpartition('-')[2]}.", f"{os.getppid()}.")
    own.mkdir()  # of a process that lives
    with whole_folder(tmp_path / "another") as inside:
        (inside / "a").touch()
    assert litter.exists()
    with whole_folder(tmp_path / "out [1]") as inside:
        (inside / "a").touch()
    assert sorted(tmp_path.iterdir()) == sorted([own, tmp_path / "another", tmp_path / "out [1]"])


def test_weights_whose_writer_is_ended_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = weight_files.save_file

    def killed(*args: object, **more: object) -> None:
        save(*args, **more)  # pyright: ignore[reportArgumentType]
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(weight_files, "save_file", killed)
    before = signal.getsignal(signal.SIGTERM)
    assert in_child(lambda: write_weights(tmp_path / "model.safetensors", {"a": torch.zeros(3)})) == 143
    assert not [*tmp_path.iterdir()]
    with pytest.raises(SystemExit):
        write_weights(tmp_path / "model.safetensors", {"a": torch.zeros(3)})
    assert signal.getsignal(signal.SIGTERM) == before


def test_whoever_handles_the_end_already_goes_on_doing_so(tmp_path: Path) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        with whole_folder(tmp_path / "out") as inside:
            os.kill(os.getpid(), signal.SIGTERM)
            (inside / "a").touch()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]
    assert (tmp_path / "out" / "a").exists()
