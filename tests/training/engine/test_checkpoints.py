"""Checkpoint files: whole or not there, plain data only."""

import enum
import io
import math
import os
import random
import resource
import select
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch

from mmtransformer.training.engine import checkpoints
from mmtransformer.training.engine.checkpoints import (
    FORMAT_VERSION,
    AtomicCheckpointIO,
    CheckpointError,
    damage,
    newest,
    plain,
    read,
    remove_leftovers,
    tensor_bytes,
)
from mmtransformer.training.engine.log import MetricsLog
from support import tiny

FILES = AtomicCheckpointIO()


def checkpoint(step: int = 3, size: int = 1009) -> dict:
    return {"global_step": step, "state_dict": {"weight": torch.full((size,), float(step))}}


def in_child(job: Callable[[], object]) -> int:
    """Runs a job in a forked process (nothing is imported anew); its id."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            job()
            code = 0
        finally:
            os._exit(code)
    return pid


def test_what_is_written_is_read(tmp_path: Path) -> None:
    class Kind(enum.Enum):
        CAT = "cat"

    @dataclass
    class Point:
        x: float

    path = tmp_path / "new folder" / "a.ckpt"
    saved = checkpoint() | {
        "hyper_parameters": {"root": tmp_path, "kind": Kind.CAT, "at": Point(0.5), "n": np.float32(1.5)},
        "tuple": (1, [2.5, None], {"s"}),
        "array": np.arange(3),
        "dtype": torch.bfloat16,
    }
    FILES.save_checkpoint(saved, path)
    found = FILES.load_checkpoint(path)
    assert found["global_step"] == 3
    assert torch.equal(found["state_dict"]["weight"], torch.full((1009,), 3.0))
    assert found["hyper_parameters"] == {"root": str(tmp_path), "kind": "cat", "at": {"x": 0.5}, "n": 1.5}
    assert found["tuple"] == (1, [2.5, None], {"s"})
    assert found["array"].tolist() == [0, 1, 2]
    assert found["dtype"] is torch.bfloat16
    assert sorted(p.name for p in path.parent.iterdir()) == ["a.ckpt"]
    FILES.remove_checkpoint(path)
    assert not path.exists()


def test_what_users_keep_in_a_checkpoint_is_read_again(tmp_path: Path) -> None:
    kept = checkpoint() | {"EMA_decay": 0.99}
    kept["state_dict"] = {**kept["state_dict"], "part._extra_state": {"seen": 3}}
    FILES.save_checkpoint(kept, tmp_path / "a.ckpt")
    found = FILES.load_checkpoint(tmp_path / "a.ckpt")
    assert found["EMA_decay"] == 0.99
    assert found["state_dict"]["part._extra_state"] == {"seen": 3}


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, None])
def test_another_format_is_refused_in_a_line(tmp_path: Path, version: int | None) -> None:
    path = tmp_path / "a.ckpt"
    FILES.save_checkpoint(checkpoint(), path)
    found = read(path)
    assert found.pop("format_version") == FORMAT_VERSION
    torch.save(found | ({} if version is None else {"format_version": version}), path)
    with pytest.raises(CheckpointError, match=rf"a\.ckpt: of format {version}, .* start a new run") as caught:
        FILES.load_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [lambda: 0, socket, signal.getsignal, object()])
def test_what_cannot_be_read_back_is_not_written(tmp_path: Path, value: object) -> None:
    saved = checkpoint() | {"hyper_parameters": {"parts": [1, {"deep": value}]}}
    with pytest.raises(CheckpointError, match=r"hyper_parameters\.parts\[1\]\.deep is a .*keep tensors and plain"):
        FILES.save_checkpoint(saved, tmp_path / "a.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_shared_tensors_are_counted_and_kept_once(tmp_path: Path) -> None:
    weight = torch.randn(101, 7)
    assert tensor_bytes({"a": weight, "b": [weight.T, weight[3]]}) == 101 * 7 * 4
    FILES.save_checkpoint({"state_dict": {"a": weight, "b": weight}}, tmp_path / "a.ckpt")
    found = read(tmp_path / "a.ckpt")["state_dict"]
    assert found["a"].data_ptr() == found["b"].data_ptr()


class Saver:
    """A process that saves one checkpoint after the other, each when it is told to."""

    def __init__(self, path: Path, first: int, size: int) -> None:
        (told, self._tell), (self._hear, says) = os.pipe(), os.pipe()

        def job() -> None:
            for step in range(first, 10**6):
                os.read(told, 1)
                FILES.save_checkpoint(checkpoint(step, size), path)
                os.write(says, b".")

        self.pid = in_child(job)
        self._ends = told, says

    def save(self) -> float:
        """Has it save once; the seconds that took."""
        began = time.perf_counter()
        self.begin()
        os.read(self._hear, 1)
        return time.perf_counter() - began

    def begin(self) -> None:
        """Has it begin to save."""
        os.write(self._tell, b".")

    def is_done(self) -> bool:
        """Whether the save that was begun has ended."""
        return bool(select.select([self._hear], [], [], 0)[0])

    def kill(self) -> bool:
        """Kills it; whether the save that was begun had ended."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        done = self.is_done()
        for end in (*self._ends, self._tell, self._hear):
            os.close(end)
        return done


def kill_in_saves(folder: Path, times: int, size: int) -> tuple[int, int, int, list[int]]:
    """Kills a saving process with -9 so many times, each at another part of a save.

    The next save begins only when it is told to: the process is killed in the save that was meant, or after it.

    Returns:
        How often the checkpoint was whole and one of the two that it may be; how often the kill fell into the save, and
        left litter; the steps that were found.
    """
    path = folder / "last.ckpt"
    FILES.save_checkpoint(checkpoint(0, size), path)
    whole, inside, litter, steps = 0, 0, 0, [0]
    for i in range(times):
        saver, saves = Saver(path, steps[-1] + 1, size), 1 + i % 3
        seconds = min(saver.save() for _ in range(saves))
        saver.begin()
        part = path.with_name(f".{path.name}.{socket.gethostname()}-{saver.pid}.part")
        while i % 5 and not part.exists() and not saver.is_done():  # every fifth is killed before
            pass
        time.sleep(0.35 * seconds * i / times if i % 5 else 0)
        inside += not saver.kill()
        litter += len(list(folder.glob(".*.part")))
        found = read(path)
        weight, step = found["state_dict"]["weight"], found["global_step"]
        whole += bool((weight == step).all()) and step - steps[-1] - saves in (0, 1)
        steps.append(step)
        remove_leftovers(folder)
    assert [p.name for p in folder.iterdir()] == ["last.ckpt"]
    return whole, inside, litter, steps


def test_killed_at_any_moment_of_a_save_the_last_checkpoint_is_whole(tmp_path: Path) -> None:
    """50 of 50; and every kill finds another step, as there was at least one save between two of them."""
    whole, inside, litter, steps = kill_in_saves(tmp_path, 50, 200_003)
    assert whole == 50
    assert inside >= 10, "too few kills fell into a save"
    assert litter > 0
    assert len(set(steps)) == 51


@pytest.mark.parametrize("stage", ["open", "write", "fsync", "replace", "sync", "unlink"])
def test_killed_at_each_stage_of_a_save(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own hand, just before and just after each call that the disk sees; a write is cut in half."""
    path = tmp_path / "last.ckpt"
    where = {
        "open": (Path, "open"),
        "fsync": (os, "fsync"),
        "replace": (Path, "replace"),
        "sync": (checkpoints, "_sync_folder"),
        "unlink": (Path, "unlink"),
    }
    for before in (True, False):
        FILES.save_checkpoint(checkpoint(3), path)

        def die() -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        def job(before: bool = before) -> None:
            if stage == "write":  # the archive is half there
                save = torch.save

                def half(data: object, file: BinaryIO) -> None:
                    whole = io.BytesIO()
                    save(data, whole)
                    file.write(whole.getvalue()[: len(whole.getvalue()) // (2 if before else 1)])
                    file.flush()
                    die()

                torch.save = half
            else:
                owner, name = where[stage]
                true = getattr(owner, name)

                def call(*arguments: Any, **more: Any) -> Any:
                    if before:
                        die()
                    result = true(*arguments, **more)
                    die()
                    return result

                setattr(owner, name, call)
            FILES.save_checkpoint(checkpoint(4), path)

        assert os.waitstatus_to_exitcode(os.waitpid(in_child(job), 0)[1]) == -signal.SIGKILL
        renamed = stage in ("sync", "unlink") or (stage == "replace" and not before)
        found = read(path)
        assert found["global_step"] == (4 if renamed else 3)
        assert bool((found["state_dict"]["weight"] == found["global_step"]).all())
        remove_leftovers(tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_sweep_leaves_what_a_living_process_writes(tmp_path: Path) -> None:
    here = socket.gethostname()
    names = [f".last.ckpt.{here}-{os.getppid()}.part", f".last.ckpt.{here}-{os.getpid()}.part"]
    names += [".last.ckpt.an-other.host-17.part", "last.ckpt", "notes.part", f".last.ckpt.{here}-999999999.part"]
    for name in names:
        (tmp_path / name).touch()
    assert sorted(p.name for p in remove_leftovers(tmp_path)) == sorted([names[1], names[2], names[5]])
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([names[0], "last.ckpt", "notes.part"])
    assert remove_leftovers(tmp_path / "nowhere") == []


# ------------------------------------------------------------------------------------------------- full disks


def assert_kept(path: Path, size: int, reason: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        FILES.save_checkpoint(checkpoint(4, size), path)
    text = str(caught.value)
    assert str(path) in text
    assert f"cannot write about {4 * size + (1 << 20):,} bytes" in text
    assert reason in text
    assert "--resume" in text
    assert read(path)["global_step"] == 3
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_disk_that_fills_up_while_writing_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    FILES.save_checkpoint(checkpoint(3, 50_021), path)

    def write_too_much() -> None:  # the kernel refuses every byte past the limit
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        assert_kept(path, 200_003, "File too large")

    assert os.waitstatus_to_exitcode(os.waitpid(in_child(write_too_much), 0)[1]) == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    yield from tiny.disk(tmp_path / "disk", "4m")


def test_a_small_disk_is_found_too_full_before_anything_is_written(small_disk: Path) -> None:
    path = small_disk / "last.ckpt"
    FILES.save_checkpoint(checkpoint(3, 400_009), path)
    assert_kept(path, 500_009, "bytes are free there")
    for step in range(5, 9):  # and there is room for it again and again
        FILES.save_checkpoint(checkpoint(step, 300_007), path)
    assert read(path)["global_step"] == 8


def test_killed_in_saves_on_a_small_disk_that_fills_up(small_disk: Path) -> None:
    """Room for three files: the litter of two kills fills it; what is told to save next says so, or sweeps first."""
    path, size = small_disk / "last.ckpt", 300_007
    assert kill_in_saves(small_disk, 10, size)[0] == 10
    step = read(path)["global_step"]
    for i in range(2):
        litter = small_disk / f".last.ckpt.{socket.gethostname()}-99999999{i}.part"
        litter.write_bytes(bytes(4 * size))
    with pytest.raises(CheckpointError, match=r"cannot write about 2,248,604 bytes: only [\d,]+ bytes are free"):
        FILES.save_checkpoint(checkpoint(step + 1, size), path)
    assert read(path)["global_step"] == step
    assert len(remove_leftovers(small_disk)) == 2
    FILES.save_checkpoint(checkpoint(step + 1, size), path)
    assert read(path)["global_step"] == step + 1


def test_a_disk_that_others_fill_in_the_middle_of_a_save(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There was room when it began: the kernel says ENOSPC."""
    path = small_disk / "last.ckpt"
    FILES.save_checkpoint(checkpoint(3, 400_009), path)
    free = shutil.disk_usage(small_disk)._replace(free=10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    assert_kept(path, 900_007, "No space left on device")


def test_a_log_on_a_full_disk_names_path_and_bytes(small_disk: Path) -> None:
    log = MetricsLog(small_disk)
    log.log_metrics({"loss": 1.0}, 0)
    log.save()
    (small_disk / "others").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    for step in range(1, 500):
        log.log_metrics({"loss": 0.5}, step)
    with pytest.raises(CheckpointError, match=r"metrics\.csv: cannot add [\d,]+ bytes: No space left on device"):
        log.save()


def test_a_folder_without_the_right_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    FILES.save_checkpoint(checkpoint(3), path)

    def refuse(self: Path, *arguments: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        assert_kept(path, 1009, "Permission denied")
    with pytest.raises(CheckpointError, match="nothing was written"):
        FILES.save_checkpoint(checkpoint(), path / "below a file.ckpt")


# -------------------------------------------------------------------------------------------- damaged and hostile


def test_damage_is_found(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    FILES.save_checkpoint(checkpoint(), path)
    whole = path.read_bytes()
    assert damage(path) is None
    flipped = bytearray(whole)
    flipped[whole.index(torch.full((5,), 3.0).numpy().tobytes()) + 400] ^= 0x40
    for content, reason in (
        (bytes(flipped), "damaged: archive/data/0 is not what was written"),
        (whole[: len(whole) // 2], "not a whole checkpoint"),
        (b"", "not a whole checkpoint"),
        (b"PK\x03\x04" + os.urandom(997), "not a whole checkpoint"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=reason):
            read(path)
    with pytest.raises(CheckpointError, match=r"nowhere\.ckpt: no such checkpoint"):
        read(tmp_path / "nowhere.ckpt")
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="no state_dict"):
        read(path)
    with pytest.raises(CheckpointError, match="weights_only=True only"):
        FILES.load_checkpoint(path, weights_only=False)


def test_newest_is_the_newest_whole_one(tmp_path: Path) -> None:
    assert newest(tmp_path / "nowhere") == (None, [])
    for i, name in enumerate(("a", "c", "b")):
        FILES.save_checkpoint(checkpoint(i), tmp_path / f"{name}.ckpt")
        os.utime(tmp_path / f"{name}.ckpt", ns=(10**9 * i, 10**9 * i))
    (tmp_path / ".d.ckpt").touch()
    assert newest(tmp_path) == (tmp_path / "b.ckpt", [])
    (tmp_path / "b.ckpt").write_bytes((tmp_path / "b.ckpt").read_bytes()[:-30])
    found, faults = newest(tmp_path)
    assert found == tmp_path / "c.ckpt"
    assert len(faults) == 1
    assert "b.ckpt: not a whole checkpoint" in faults[0]


def test_a_time_in_the_future_makes_no_checkpoint_new(tmp_path: Path) -> None:
    for step, name in ((7, "late"), (3, "early")):
        FILES.save_checkpoint(checkpoint(step), tmp_path / f"{name}.ckpt")
    os.utime(tmp_path / "early.ckpt", (2**32, 2**32))
    assert newest(tmp_path) == (tmp_path / "late.ckpt", [])


def test_flipped_bits_in_the_directory_are_passed_over(tmp_path: Path) -> None:
    FILES.save_checkpoint(checkpoint(3), tmp_path / "a.ckpt")
    path = tmp_path / "b.ckpt"
    FILES.save_checkpoint(checkpoint(5), path)
    data, draw = path.read_bytes(), random.Random(5)
    start = data.index(b"PK\x01\x02")
    for _ in range(1000):
        changed = bytearray(data)
        changed[draw.randrange(start, len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        found, problems = newest(tmp_path)
        assert (found == path) == (not problems)
        if found == path:  # What was changed means nothing.
            assert read(path)["global_step"] == 5
    whole = bytearray(data)
    whole[data.index(b"PK\x01\x02") + 46] ^= 0x80  # a name that is no text
    path.write_bytes(whole)
    assert newest(tmp_path)[0] == tmp_path / "a.ckpt"


def test_numbers_stay_numbers() -> None:
    class Special(float):
        pass

    value = plain({"a": Special(math.pi), "b": True, "c": 2**70, 3: (np.int64(5),)})
    assert value == {"a": math.pi, "b": True, "c": 2**70, 3: (5,)}
    assert [type(x) for x in (value["a"], value["b"], value[3][0])] == [float, bool, int]
