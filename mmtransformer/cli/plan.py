"""`mmt plan`: what a recipe will need of memory and disk, before it is run."""

import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtransformer.serialization.printable import say

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningCLI

    from mmtransformer.training.callbacks.memory_estimate import Needs, Watch

HELP = """usage: mmt plan RECIPE.yaml [--config OVERLAY.yaml] [--KEY=VALUE ...]

Says what a recipe needs to train: bytes of weights, gradients, optimizer, moving average, activations, checkpoint and
feature cache; on a CPU also of what it keeps for matrix products, and of Python with its libraries. A few steps are run
with a quarter and with half of the recipe's batch, on this machine, and nothing is written.
All keys of `mmt fit` can be given; so one sees at once what --data.batch_size, --activation_checkpointing=true or
--trainer.precision change.
"""


def run(name: str, words: Sequence[str]) -> int:
    """Plans a recipe."""
    if not words or any(word in ("-h", "--help") for word in words):
        say(HELP)
        return 0
    from mmtransformer.cli.recipes import with_files

    words = list(words)
    if not words[0].startswith("-"):
        words = ["--config", *words]
    say("a few steps of small batches are computed, which takes up to a minute", file=sys.stderr)
    needs, samples, unit = plan(with_files(words))
    say(needs.table(samples, unit))
    return 0


def plan(words: list[str]) -> tuple["Needs", int, str]:
    """Runs a few steps of two sizes.

    Args:
        words: The words of `mmt fit`.

    Returns:
        What the recipe needs; the samples of its batch, and what they are called.

    Raises:
        ValueError: If the recipe's data has no batch_size.
    """
    from mmtransformer.training.callbacks.memory_estimate import cache_bytes, extended
    from mmtransformer.training.engine.run import refuse_unsaved_parts

    with tempfile.TemporaryDirectory() as folder:
        first = _cli(words, [], folder)
        refuse_unsaved_parts(first.model)
        batch = getattr(first.datamodule, "batch_size", None)
        cached = getattr(first.datamodule, "cache_features", None)
        if not isinstance(batch, int):
            raise ValueError(f"{type(first.datamodule).__name__} has no batch_size that could be planned with")
        del first  # Its weights are not what a run needs.
        sizes = sorted({max(batch // 4, 1), max(batch // 2, 1)})
        with redirect_stdout(io.StringIO()):  # what is said of the recipe was said of the first
            watches = [_watch(words, size, folder)[0] for size in sizes[:-1]]
            watch, cli = _watch(words, sizes[-1], folder)
        watches.append(watch)
        samples = batch * watch.samples // sizes[-1]
        needs = extended(watches[0], watch, samples)
        if cached:
            needs.cache = cache_bytes(cli.model, cli.datamodule, cached)
    return needs, samples, getattr(cli.model, "unit", "samples")


def _cli(words: list[str], more: list[str], folder: str) -> "LightningCLI":
    from mmtransformer.cli.fit import recipe_cli

    quiet = ["--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.accumulate_grad_batches=1"]
    quiet += ["--trainer.enable_progress_bar=false", "--trainer.limit_val_batches=0", "--resume=false"]
    return recipe_cli([*words, *quiet, *more, f"--trainer.default_root_dir={folder}"], Path(folder))


def longest(data: Any) -> None:
    """Lets the batch with the longest sample come third in the training data."""
    from mmtransformer.training.callbacks.memory_estimate import longest_soon

    make = data.train_dataloader

    def loader() -> Any:
        found = make()
        if place := getattr(found, "place", None):
            longest_soon(place)
        return found

    data.train_dataloader = loader


def _watch(words: list[str], size: int, folder: str) -> tuple["Watch", "LightningCLI"]:
    """A few steps with batches of `size`."""
    from mmtransformer.training.callbacks.memory_estimate import STEPS, Watch
    from mmtransformer.training.engine.recompute_and_compile import checkpoint_activations

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    cli = _cli(words, [f"--data.batch_size={size}", f"--trainer.max_steps={STEPS}"], folder)
    if hasattr(cli.datamodule, "cache_features"):
        cli.datamodule.cache_features = None  # All pictures would be computed; its reading needs nothing.
    if cli.config.get("activation_checkpointing"):
        checkpoint_activations(cli.model)
    longest(cli.datamodule)
    watch = Watch()
    cli.trainer.callbacks.append(watch)  # pyright: ignore[reportAttributeAccessIssue]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    return watch, cli
