"""What only Unix has is not needed: a run trains, saves and captions where those modules are hidden."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

SCRIPT = """
import signal, sys
for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[name] = None
for name in ("pthread_sigmask", "sigwaitinfo", "SIGHUP"):
    delattr(signal, name)
import importlib, pkgutil
import mmtransformer
from mmtransformer.cli import main
for module in pkgutil.walk_packages(mmtransformer.__path__, "mmtransformer."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
sizes = [f"--data.source.{split}_size=4" for split in ("train", "val", "compositional")]
assert main(["fit", "--config", "caption_scenes", "--config", "tiny", "--data.vocab_size=300", *sizes]) == 0
assert main(["caption", "runs/caption_scenes/gallery.png", "--model", "runs/caption_scenes/model"]) == 0
"""


def test_runs_without_what_only_unix_has(tmp_path: Path) -> None:
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{SCRIPT}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert " GB  " not in done.stdout
