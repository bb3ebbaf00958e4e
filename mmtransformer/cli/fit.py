"""`mmt fit`, `validate` and `test`: recipes in Lightning's YAML, with overrides from the command line."""

import io
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtransformer.cli.guards.errors import cause_of, check_checkpoint, explain
from mmtransformer.cli.guards.own_modules import look_here, with_imports
from mmtransformer.cli.guards.trust import check_names, check_recipe, checked_files, paths_as_texts
from mmtransformer.cli.many import told_when_stopped
from mmtransformer.cli.recipes import cap_sizes, check_whole, with_files, with_tower
from mmtransformer.serialization.printable import counted, say

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.cli import LightningCLI

HELP = """usage: mmt {name} --config RECIPE.yaml [--config OVERLAY.yaml] [--KEY=VALUE ...]

{text}

The most used keys (any key of a recipe can be given like this; --help=all lists the Trainer's too):

  --config FILE                        a recipe, or the name of one (mmt recipes); keys of a second one override it
  --resume                             resume the run in this folder, or start it
  --ckpt_path last|FILE                resume from a checkpoint
  --seed_everything N                  seed of weights and data
  --trainer.max_epochs N               length of the run
  --trainer.max_steps N                or in optimizer steps
  --trainer.default_root_dir DIR       the run's folder (runs/NAME_OF_RECIPE)
  --trainer.accelerator cpu|gpu        where to compute (a GPU if there is one)
  --trainer.devices N                  how many GPUs, or processes on a CPU
  --process_timeout SECONDS            how long a process of several may be silent before the others end (600)
  --trainer.strategy ddp|fsdp          how they share a run: the batches, or the weights as well
  --trainer.precision P                bf16-mixed, 32-true, ... (what the machine is fast at)
  --trainer.accumulate_grad_batches N  batches per optimizer step
  --trainer.gradient_clip_val X        clip the gradient's norm
  --activation_checkpointing=true      less memory for a third more work
  --compile=true                       compiled blocks
  --max_scenes N                       at most N pictures per split of drawn data, for a trial
  --model.optim.lr X                   peak learning rate
  --model.optim.ema_decay X            moving average of the weights (0.999)
  --model.label_smoothing X            share of probability spread over the vocabulary
  --model.captioner.decoder.depth N    any argument of any part
  --model.captioner.vision.source X    a public vision encoder: a folder, or a name of timm's (docs/towers.md);
                                       model.model.vision.source of a CLIP
  --model.init DIR                     finetune: the model to start from
  --data.source DIR                    your own pairs (data.read.* names columns, if they must be)
  --data.batch_size N                  pictures per batch
  --data.loader.num_workers N          processes that load pictures

  --model.help CLASS, --data.help CLASS    the arguments of a class, with their meaning (Captioning, CaptionData)
  --model.captioner.vision.help CLASS      the same of a part, behind --config RECIPE (ViT)
  --print_config                           the whole configuration, resolved
  --import MODULE                          import a module of yours first, for a model.init with classes of it
  --debug                                  show the traceback of an error
"""


def run(name: str, words: Sequence[str]) -> int:
    """Runs a recipe.

    Args:
        name: "fit", "validate" or "test".
        words: The words after the command.
    """
    from mmtransformer.cli import COMMANDS

    if not words or any(word in ("-h", "--help") for word in words):
        say(HELP.format(name=name, text=COMMANDS[name][1]))
        return 0
    spelt = {"--help=all": "--help", "--resume": "--resume=true"}
    words = with_tower(with_files([spelt.get(word, word) for word in words]))
    configs = list(config_files(words))
    if not configs and not any(w == "--help" or ".help" in w or "print_config" in w for w in words):
        raise ValueError(f"mmt {name} needs a recipe: --config caption_scenes; mmt recipes lists them")
    folder = Path("runs") / (Path(configs[0]).stem if configs else "run")
    if name != "fit":  # The log in the folder is that of the training.
        words = ["--trainer.logger=false", *words]
    cli = recipe_cli(list(words), folder)
    if name == "fit":
        fit(cli)
        return 0
    # Lightning's table has a column for each split, and every number in all of them
    found = getattr(cli.trainer, name)(
        cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint(cli, scored=True), verbose=False
    )
    metrics = {key: value for some in found for key, value in some.items()}
    width = max(map(len, metrics), default=0)
    if metrics and cli.trainer.is_global_zero:
        say("\n".join(f"{key:<{width}}  {value:.6g}" for key, value in metrics.items()))
    return 0


def config_files(words: Sequence[str]) -> list[str]:
    """The values of --config, in their order."""
    found = [word.partition("=")[2] for word in words if word.startswith(("--config=", "-c="))]
    return [value for word, value in pairwise(words) if word in ("--config", "-c")] + found


@paths_as_texts()
def recipe_cli(words: list[str], folder: Path) -> "LightningCLI":
    """Parses a configuration and builds trainer, model and data; nothing is run yet.

    Args:
        words: The command line, without the command.
        folder: The run's folder, unless the configuration names one.
    """
    import lightning.pytorch as pl
    from jsonargparse import ActionConfigFile, ArgumentError  # pyright: ignore[reportPrivateImportUsage]
    from lightning.fabric.plugins import CheckpointIO
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    from mmtransformer.cli.guards.parser import RecipeParser
    from mmtransformer.pipelines.base import check_cores
    from mmtransformer.pipelines.image_text_embedder import ImageTextEmbedder
    from mmtransformer.training import Captioning, ContrastiveLearning, Progress, SamplePrinter
    from mmtransformer.training.callbacks.limits import Limits
    from mmtransformer.training.callbacks.saving import LastCheckpoint
    from mmtransformer.training.callbacks.throughput import Throughput
    from mmtransformer.training.engine.checkpoints import AtomicCheckpointIO
    from mmtransformer.training.engine.log import MetricsLog
    from mmtransformer.training.engine.precision import asked_for, pick_precision, set_up_process
    from mmtransformer.training.engine.sharded import Sharded, number_format
    from mmtransformer.training.tasks.towers import fit_widths, use_transform

    words = with_imports(words)
    _quiet()
    set_up_process()  # Before a model of the user's computes anything, too.

    class RecipeCLI(LightningCLI):
        def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
            parser = RecipeParser(**kwargs)
            parser.add_argument("-c", "--config", action=ActionConfigFile, help="a recipe")
            return parser

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_argument("--ckpt_path", type=str | None, default=None, help="checkpoint to go on from")
            text = "go on from the newest whole checkpoint, if any"
            parser.add_argument("--resume", type=bool, default=False, help=text)
            text = "compute blocks again in the backward pass, in place of keeping what is in them"
            parser.add_argument("--activation_checkpointing", type=bool, default=False, help=text)
            parser.add_argument("--compile", type=bool, default=False, help="compile the blocks")
            text = "most seconds that another process of the run may give no sign of life; 0 waits for ever"
            parser.add_argument("--process_timeout", type=float, default=600.0, help=text)
            text = "most pictures of each split where they are drawn in the run: for a trial"
            parser.add_argument("--max_scenes", type=int | None, default=None, help=text)

        def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
            for file in config_files(args):
                check_recipe(file)
            check_whole(config_files(args), args)
            look_here("\n".join(args))
            try:
                with checked_files():
                    self.config = parser.parse_args(args)
            except ArgumentError as error:
                raise ValueError(explain(str(error), keys_of(parser))) from error
            check_names(self.config)
            if (most := self.config.max_scenes) is not None:
                cap_sizes(self.config.data, most)

        def instantiate_classes(self) -> None:
            if hasattr(self.config, "model"):
                for line in fit_widths(self.config.model):
                    say(line)
            try:
                super().instantiate_classes()
            except ModuleNotFoundError as error:
                raise ValueError(f"{error}; what the recipe names needs it") from error
            except ValueError as error:
                raise cause_of(error) from error

        def after_instantiate_classes(self) -> None:
            start = self.model.start if isinstance(self.model, Captioning | ContrastiveLearning) else None
            if start is not None:
                processor = None if isinstance(start, ImageTextEmbedder) else start.processor
                self.datamodule.continue_from(start.tokenizer, start.transform, processor, start.model.max_len)
            elif line := use_transform(self.model, self.datamodule):
                say(line)
            if describe := getattr(getattr(self.datamodule, "source", None), "describe", None):
                say(describe())

        def instantiate_trainer(self, **kwargs: Any) -> "Trainer":
            config = self.config_init["trainer"]
            if config is None:
                raise ValueError("trainer: null: give its keys (trainer.max_epochs), or leave it out")
            if (clip := config.gradient_clip_val) is not None and clip < 0:  # it would turn the gradient round
                raise ValueError(f"trainer.gradient_clip_val ({clip}) must be at least 0; null clips nothing")
            if config.default_root_dir is None:
                config.default_root_dir = self.config.trainer.default_root_dir = str(folder)
            root = Path(config.default_root_dir)
            if config.precision is None:
                config.precision, reason = pick_precision(config.accelerator)
            else:
                reason = asked_for(config.precision, config.accelerator)
            if config.barebones:  # Lightning refuses whatever would be said or kept.
                config.logger = config.enable_progress_bar = config.enable_checkpointing = False
                config.log_every_n_steps = 0
            if config.logger is None:
                config.logger = MetricsLog(root)
            plugins = config.plugins or []
            plugins = list(plugins) if isinstance(plugins, list) else [plugins]
            if config.strategy == "fsdp":
                config.strategy = Sharded()
                config.precision, more = number_format(config.precision)
                plugins += more
            extra: list[pl.Callback] = [Limits()]
            if config.logger is not False:
                extra.append(Throughput())  # First: what it counts with must be gone before a sample is made.
            if config.enable_progress_bar is not False:
                extra += [Progress(), SamplePrinter()]
            if config.enable_checkpointing is not False and not config.fast_dev_run:
                extra.append(LastCheckpoint())
            mine = {type(callback) for callback in config.callbacks or []}
            files = [plugin for plugin in plugins if isinstance(plugin, CheckpointIO)]
            if other := [type(plugin).__name__ for plugin in files if not isinstance(plugin, AtomicCheckpointIO)]:
                raise ValueError(
                    f"trainer.plugins: {other[0]} is no AtomicCheckpointIO: others neither survive being killed nor "
                    f"look a file through before they read it; derive yours from it"
                )
            plugins += [] if files else [AtomicCheckpointIO()]
            config.plugins = plugins
            extra = [callback for callback in extra if type(callback) not in mine]
            trainer = self._instantiate_trainer({**config, **kwargs}, extra)
            if trainer.strategy.root_device.type == "cpu":
                check_cores("trainer.devices", trainer.num_devices)
            say(f"precision: {trainer.precision}, as {reason}")  # On a CPU float16 becomes bfloat16.
            return trainer

    return RecipeCLI(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        run=False,
        args=words,
        save_config_callback=None,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        parser_kwargs={"exit_on_error": False},
        trainer_defaults={
            "num_sanity_val_steps": 0,
            "enable_model_summary": False,
            "use_distributed_sampler": False,  # The data share themselves out, the same for any number of processes.
        },
    )


def checkpoint(cli: "LightningCLI", *, scored: bool = False) -> str | None:
    """The checkpoint to go on from: the one that is named, or the newest whole one of the run's folder.

    Args:
        cli: The run.
        scored: Whether its weights are scored: then the run's own is taken unasked, and said.

    Raises:
        ValueError: If a checkpoint is asked for and there is none.
    """
    from mmtransformer.training.engine.checkpoints import newest

    named, resume = cli.config.get("ckpt_path"), cli.config.get("resume")
    if named not in (None, "last"):
        return str(check_checkpoint(named))
    if not (named or resume or scored):
        return None
    folder = Path(cli.trainer.default_root_dir) / "checkpoints"
    found, problems = newest(folder)
    for problem in problems:
        say(f"passed over {problem}")
    if found is None and (problems or named):
        way = "name another by --ckpt_path FILE" if scored else "without --ckpt_path the run starts anew"
        raise ValueError(f"{folder}: no whole checkpoint to go on from; {way}")
    anew = "the weights are those that the recipe starts with" if scored else "the run starts anew"
    there = f"{'the weights are of' if scored else 'going on from'} {found}"
    say(there if found else f"{folder}: no checkpoint, {anew}")
    return str(found) if found else None


def keys_of(parser: Any) -> list[str]:
    """All keys that a parser knows by itself."""
    return [action.dest for action in parser._actions if action.dest not in ("help", "==SUPPRESS==")]


def fit(cli: "LightningCLI") -> None:
    """Trains, and lets the task finish: evaluate, and write the run's folder.

    Raises:
        ValueError: If another run is writing there, or one has been there and is not gone on with.
    """
    from mmtransformer.training.engine.run import locked, refuse_begun, refuse_unsaved_parts

    refuse_unsaved_parts(cli.model)
    folder = Path(cli.trainer.default_root_dir)
    if not cli.trainer.is_global_zero:
        return _fit(cli, folder)
    with locked(folder):
        if not (cli.config.get("resume") or cli.config.get("ckpt_path")):
            refuse_begun(folder)
        return _fit(cli, folder)


def _fit(cli: "LightningCLI", folder: Path) -> None:
    import torch

    from mmtransformer.training import Run, Task
    from mmtransformer.training.callbacks.config_file import ConfigFile
    from mmtransformer.training.callbacks.heartbeats import watched
    from mmtransformer.training.callbacks.saving import LastCheckpoint
    from mmtransformer.training.engine.checkpoints import SUFFIX, written_to
    from mmtransformer.training.engine.parameters import trainable_parameters
    from mmtransformer.training.engine.recompute_and_compile import checkpoint_activations, compile_blocks
    from mmtransformer.training.engine.run import device_name
    from mmtransformer.training.engine.sharded import Sharded

    trainer, module, data = cli.trainer, cli.model, cli.datamodule
    if cli.config.get("activation_checkpointing"):
        say(
            f"activations of {counted(checkpoint_activations(module), 'block')} are computed again in the backward pass"
        )
    if cli.config.get("compile"):
        say(f"compiled at their first use: {counted(compile_blocks(module), 'block')}")
    device = trainer.strategy.root_device
    if trainer.is_global_zero:
        with paths_as_texts():
            trainer.callbacks.append(ConfigFile(folder, cli.parser.dump(cli.config, skip_none=False)))  # pyright: ignore[reportAttributeAccessIssue]
    size = f"{trainable_parameters(module) / 1e6:.2f} million trainable parameters"
    say(f"run folder: {folder}; {size}; {device_name(device)}")
    said = [f"the gradient is clipped at {clip:g}"] if (clip := trainer.gradient_clip_val) else []
    if isinstance(module, Task) and (decay := module.optim.ema_decay):
        said.append(f"a moving average of the weights ({decay:g}) is validated, and kept")
    if (world := trainer.world_size) > 1:
        how = "share the weights" if isinstance(trainer.strategy, Sharded) else "have the weights whole"
        said.append(f"{counted(world, 'process', 'processes')} {how}")
    if said:
        say("; ".join(said))
    began = time.monotonic()
    trainer.ckpt_path = checkpoint(cli)  # Not an argument of fit: data ask in setup already whether a run goes on.
    last_checkpoint = next((c for c in trainer.callbacks if isinstance(c, LastCheckpoint)), None)  # pyright: ignore[reportAttributeAccessIssue]

    try:
        with watched(trainer, folder, cli.config.get("process_timeout", 600.0), last_checkpoint):
            trainer.fit(module, datamodule=data)
    except SystemExit as stop:  # what Lightning makes of an interrupt
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    trainer.ckpt_path = None
    if isinstance(module, Task) and trainer.is_global_zero:
        half = torch.bfloat16 if device.type == "cuda" and trainer.precision == "bf16-mixed" else None
        limit = trainer.limit_val_batches
        if limit == 0:  # no validation on the way; a model is saved with its scores all the same
            say("scored on one batch of each split, as limit_val_batches is 0")
            limit = 1
        elif isinstance(limit, float):  # a share of each split: as many batches as of the largest
            limit = None if limit == 1.0 else int(max(trainer.num_val_batches, default=1))
        earlier = 0.0 if last_checkpoint is None else last_checkpoint.earlier
        run = Run(folder, earlier + time.monotonic() - began, device, limit, half)
        last = folder / "checkpoints" / f"last{SUFFIX}"
        said = "after the training, which is complete: --resume finishes the scores"
        eager = torch.compiler.set_stance("force_eager")  # for caches of every length it would compile anew
        with eager, written_to(folder, last), told_when_stopped(lambda: said * last.is_file()):
            module.finish(run)


def _quiet() -> None:
    """Lightning's advertisements and advice on workers stay out of the way."""
    import lightning.pytorch  # noqa: F401 (it sets the level of its loggers when it is imported)

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for text in (
        "does not have many workers",
        "(Checkpoint|Experiment logs) directory .* exists and is not empty",
        "is smaller than the logging interval",
        "in eval mode at the start of training",  # frozen towers are
        "LeafSpec.*is deprecated",
        "It is recommended to use .self.log.*sync_dist=True",  # sums over all processes are logged
    ):
        warnings.filterwarnings("ignore", message=f".*{text}")
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    if getattr(rank_zero_only, "rank", 0):  # Of many processes one speaks.
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
