"""`mmt`, the command line: a thin, lazy entry point. Nothing heavy is imported before it is known what is asked for."""

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from mmtransformer.serialization.printable import say

COMMANDS = {
    "fit": ("fit", "Train a recipe, score it, and leave model, metrics and galleries in the run's folder."),
    "validate": ("fit", "Compute the losses of a recipe's validation splits."),
    "test": ("fit", "Compute the losses of a recipe's test splits."),
    "caption": ("caption", "Caption pictures with a trained model."),
    "translate": ("model_commands", "Translate texts with a trained Transformer."),
    "classify": ("model_commands", "Classify pictures with a trained ViT."),
    "search": ("search", "Find pictures by words, by other pictures, and those that are nearly the same."),
    "draw": ("draw", "Draw pictures of what texts say with a trained diffusion transformer."),
    "evaluate": ("evaluate", "Caption a split of a data set with a trained model, and score it."),
    "export": ("model_commands", "Write a captioner as transformers reads it."),
    "parity": ("model_commands", "Set a public captioner beside transformers: pixels, prompts, logits and ids."),
    "rehash": ("model_commands", "Take a model's weights as another tool has rewritten them."),
    "ablate": ("ablate", "Train several captioners on the towers and data of one recipe, and compare them."),
    "check": ("check", "Look at image-text pairs, or classes of pictures, before training on them."),
    "recipes": ("recipes", "List the recipes that come with the library; show or copy one."),
    "plan": ("plan", "Say what a recipe needs of memory and disk, before it is run."),
}
"""Of each command the module whose `run(name, words)` does it, given the words after the name, and its line of help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: The words after `mmt`; those of the process unless given.

    Returns:
        The exit code: 0, 1 where `mmt check` found faults or pictures could not be used, 2 for what the user can put
        right (a picture that alone was named, too), 130 for an interrupt, 141 where nobody reads on.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not words or words[0] in ("-h", "--help", "help"):
        say(usage())
        return 0
    if words[0] in ("-V", "--version"):
        import mmtransformer

        say(f"mmtransformer {mmtransformer.__version__}")
        return 0
    name, *rest = words
    if name not in COMMANDS:
        from mmtransformer.cli.guards.errors import suggest

        say(f'mmt: error: no command "{name}"{suggest(name, COMMANDS)}; see mmt --help', file=sys.stderr)
        return 2
    try:
        with _warnings_in_a_line():
            module = import_module(f"mmtransformer.cli.{COMMANDS[name][0]}")
            code = module.run(name, rest)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE, as a shell has it
    except KeyboardInterrupt as stop:
        say(f"mmt: interrupted {stop}".rstrip(), file=sys.stderr)
        return 130
    except Exception as error:
        from mmtransformer.cli.guards.errors import one_line

        line = one_line(error)
        if debug or line is None:
            raise
        say(f"mmt {name}: error: {line}", file=sys.stderr)
        return 2


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Warnings without the place in a library that they came from (Lightning, once imported, formats its own)."""
    before = warnings.showwarning
    warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}", file=sys.stderr)
    try:
        yield
    finally:
        warnings.showwarning = before


def usage() -> str:
    """The help of `mmt` itself."""
    lines = ["usage: mmt COMMAND ...", "", "Multimodal Transformers: train them, and caption pictures.", ""]
    lines += [f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items()]
    lines += [
        "",
        "  mmt fit --config caption_scenes",
        "  mmt caption cat.jpg --model runs/caption_scenes/model --language ko",
        "",
        "mmt COMMAND --help says more; --debug shows the traceback of an error.",
    ]
    return "\n".join(lines)
