"""What a run leaves beside its model, named in the model's place: which way leads to the model."""

from pathlib import Path
from shlex import quote

from mmtransformer.serialization.printable import program, seen_from

_MODEL = "config.json"
_PACKED = frozenset((".zip", ".tar", ".tgz", ".tbz2", ".txz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar"))


def refuse_run(folder: Path) -> None:
    """Refuses the folder of a run, or of its checkpoints, in the place of its model's.

    Args:
        folder: What was named; it holds no model itself.

    Raises:
        ValueError: Naming the model's folder, or what makes one of a run that left none yet.
    """
    if (folder / "model" / _MODEL).exists():
        raise ValueError(f"{folder} is a run's folder, and its model is {folder / 'model'}: name that")
    run = folder.parent if folder.name == "checkpoints" else folder
    if not ((run / "checkpoints").is_dir() and (run / "config.yaml").exists()):
        return
    if (run / "model" / _MODEL).exists():
        raise ValueError(f"{folder} holds checkpoints, and the run's model is {run / 'model'}: name that")
    raise ValueError(
        f"{folder} is of a run that left no model yet: `{program()} fit --config {quote(str(run / 'config.yaml'))} "
        f"--resume` goes on with it, and {_written_out(run / 'checkpoints' / 'last.ckpt')}"
    )


def refuse_no_checkpoint(path: Path) -> None:
    """Refuses the folder of a model, or of its run, or the model's weights, in the place of a checkpoint.

    Raises:
        ValueError: Naming the run's checkpoint, where it has one.
    """
    weights = path.suffix == ".safetensors" and path.is_file()
    if not (weights or path.is_dir()):
        return
    folder = path.parent if weights else path
    kind = "a run's folder" if (folder / "checkpoints").is_dir() else "a folder"
    kind = "a model's weights" if weights else "a model's folder" if (folder / _MODEL).exists() else kind
    lasts = (run / "last.ckpt" for run in (folder, folder / "checkpoints", folder.parent / "checkpoints"))
    last = next(filter(Path.is_file, lasts), None)
    way = f"; the checkpoint is {last}" if last else ", and a checkpoint is a file, runs/NAME/checkpoints/last.ckpt"
    raise ValueError(f"{path} is {kind}{way}")


def maker(folder: Path) -> str:
    """Of a folder that is not there and is called as a recipe's model is, what makes it, behind "no such folder"."""
    match folder.parts:
        case (*_, "runs", name, "model"):
            return (
                f"; where {name} is a recipe (`mmt recipes`), `{program()} fit --config {quote(name)}` leaves it there"
            )
    return seen_from(folder)


def refuse_file(file: Path) -> None:
    """Refuses a file in the place of a model's folder.

    Raises:
        ValueError: Always, naming the folder, or what makes one of a checkpoint or an archive.
    """
    if file.suffix == ".ckpt":
        raise ValueError(
            f"{file} is a checkpoint, not a model. A run that ends leaves its model in runs/NAME/model; of another, "
            f"{_written_out(file)}"
        )
    if file.suffix.lower() in _PACKED:
        raise ValueError(
            f"{file} is an archive, and a model is a folder: unpack it, and name the folder that then holds {_MODEL}"
        )
    if not any(file.parent.glob("*config.json")):
        raise ValueError(
            f"{file} is a file, and a model is a folder that holds its {_MODEL} beside its weights: there is none in "
            f"{file.parent}"
        )
    raise ValueError(f"{file} is a file, and a model is a folder: name {file.parent}")


def _written_out(checkpoint: Path) -> str:
    """What makes a model's folder of a checkpoint."""
    own = checkpoint.parent.parent / "config.yaml"
    config = quote(str(own)) if own.exists() else "runs/NAME/config.yaml"
    return (
        f"`{program()} fit --config {config} --ckpt_path {quote(str(checkpoint))} --trainer.max_steps 1` writes its "
        f"model without training on"
    )
