"""`mmt ablate`: several captioners on the same towers, data and steps, of one size; one table and one picture."""

import gc
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmtransformer.cli.options import command_parser
from mmtransformer.serialization.printable import say


def run(name: str, words: Sequence[str]) -> int:
    """Trains the captioners one after the other."""
    parser = command_parser(name)
    parser.description = (
        "Train several captioners of the vision tower and the language model of a recipe, with the same number of "
        "parameters between the two, steps and pictures, and compare them. Further words are keys of `mmt fit`."
    )
    text = "a captioning recipe; of several, later ones override earlier ones, as in mmt fit"
    parser.add_argument("--config", metavar="FILE", action="append", required=True, help=text)
    parser.add_argument("--captioners", default="cross,flamingo,qformer,prefix", help="which ones (all four)")
    parser.add_argument("--parameters", type=int, metavar="N", help="between the two (as many as the recipe's has)")
    parser.add_argument("--out", metavar="DIR", help="folder (runs/ablate_NAME_OF_RECIPE)")
    args, rest = parser.parse_known_args(list(words))
    captioners = args.captioners.split(",")

    from mmtransformer.cli.guards.errors import OTHER_NAMES
    from mmtransformer.cli.recipes import recipe_file
    from mmtransformer.training.evaluation.ablation import check_captioners

    own = parser._option_string_actions
    if other := [word for word in rest if OTHER_NAMES.get(word.partition("=")[0]) in own]:
        parser.error(f"unrecognized arguments: {other[0]}")
    check_captioners(captioners)
    files = [recipe_file(file) for file in args.config]
    out = Path(args.out or Path("runs") / f"ablate_{Path(args.config[0]).stem}")
    configs = [word for file in files for word in ("--config", file)]
    parameters, rows = args.parameters, {}
    for captioner in captioners:
        say(f"\n== {captioner} ==")
        rows[captioner], parameters = train(captioner, [*configs, *rest], out / captioner, parameters)
        gc.collect()  # Trainer and model hold each other: without it the next captioner would find them in memory.
    report(out, rows, parameters)
    return 0


def train(captioner: str, words: list[str], folder: Path, parameters: int | None) -> tuple[dict[str, Any], int]:
    """Trains one captioner in the place of the recipe's own.

    Args:
        captioner: Its name.
        words: The recipe and its overrides, as words of `mmt fit`.
        folder: Where its run goes.
        parameters: How many numbers it learns between its towers; None = as many as the recipe's own.

    Returns:
        What the run's metrics.json says, and the number asked for.

    Raises:
        ValueError: If the recipe trains no captioner with a vision tower and a language model.
    """
    from mmtransformer.cli.fit import fit, recipe_cli
    from mmtransformer.training import Captioning
    from mmtransformer.training.evaluation.ablation import connector_parameters, with_towers_of

    cli = recipe_cli([*words, f"--trainer.default_root_dir={folder}"], folder)
    module = cli.model
    if not isinstance(module, Captioning):
        raise ValueError("ablate needs a recipe of mmtransformer.training.Captioning with a language model")
    parameters = connector_parameters(module.captioner) if parameters is None else parameters
    module.captioner = with_towers_of(module.captioner, captioner, parameters)
    learned = connector_parameters(module.captioner)
    say(f"{learned:,} parameters in the connector ({learned / parameters - 1:+.1%} of {parameters:,})")
    fit(cli)
    metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
    return metrics | {"connector_parameters": learned}, parameters


def report(out: Path, rows: Mapping[str, Mapping[str, Any]], parameters: int) -> None:
    """Prints the table, and writes it as ablation.json and ablation.png."""
    from mmtransformer.pipelines.base import write_json
    from mmtransformer.plots.comparison import save_comparison
    from mmtransformer.training.evaluation.ablation import headline, scores_of

    table = {captioner: scores_of(metrics) for captioner, metrics in rows.items()}
    names = list(dict.fromkeys(name for row in table.values() for name in row))
    lines = [f"{'':<32}" + "".join(f"{captioner:>12}" for captioner in table)]
    for name in names:
        cells = (row.get(name) for row in table.values())
        lines.append(f"{name:<32}" + "".join(f"{'' if x is None else show(x):>12}" for x in cells))
    say("\n" + "\n".join(lines))
    write_json(out / "ablation.json", table)
    shown = headline(names)
    bars = {name: {captioner: row[name] for captioner, row in table.items() if name in row} for name in shown}
    logs = {captioner: out / captioner / "metrics.csv" for captioner in rows}
    title = f"Captioners with {parameters / 1e6:.2f} million parameters between their towers"
    path = save_comparison(bars, logs, out / "ablation.png", title=title)
    say(f"\ntable     {out / 'ablation.json'}\npicture   {path}")


def show(x: float) -> str:
    """A number with three or four digits that matter."""
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3f}" if abs(x) < 10 else f"{x:.1f}"
