"""The commands that say what a result is worth and where a better one lies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cnnrun.base import torchrun
from cnnrun.base.errors import ConfigError
from cnnrun.commands.options import Config, Device, Json, Overrides, Runs, SplitName, Target, show


def _alone(command: str) -> None:
    """Raises ConfigError under torchrun, whose ranks would all do the same and write the same files."""
    if torchrun.size() > 1:
        raise ConfigError(f"{command} is for one process; start it without torchrun")


Plots = Annotated[Path | None, typer.Option(help="A folder for figures.")]


def calibrate(target: Target = None, device: Device = "auto", runs: Runs = Path("runs"), as_json: Json = False) -> None:
    """Fit a temperature on val, so that probabilities are what they say. Example: cnnrun calibrate runs/digits/1"""
    _alone("calibrate")
    from cnnrun.base.device import choose
    from cnnrun.commands import report_study
    from cnnrun.results import calibrate as calibrating

    show(calibrating.calibrate(target, runs, choose(device)), as_json, report_study.calibrated)


def compare(
    targets: Annotated[list[Path], typer.Argument(help="Runs, checkpoints or configs; each against the first.")],
    split: SplitName = None,
    plots: Plots = None,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Compare runs whose training has not ended, by what they reached.")
    ] = False,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """What trained networks differ in, and if it may be chance. Example: cnnrun compare runs/digits/1 runs/digits/2"""
    _alone("compare")
    from cnnrun.base.device import choose
    from cnnrun.commands import report_study
    from cnnrun.results import compare as comparing

    made = comparing.compare(targets, runs, choose(device), split, plots, unfinished)
    show(made, as_json, report_study.compared)


def sweep(
    config: Config,
    settings: Annotated[
        list[str],
        typer.Argument(
            help="What to look for, low..high, log:low..high or a|b|c; and plain settings.", metavar="KEY.PATH=RANGE..."
        ),
    ],
    trials: Annotated[int, typer.Option(min=1, help="Trials of the study, all processes together.")] = 20,
    storage: Annotated[
        str | None, typer.Option(help="A file or a database URL; by default study.log in the sweep's folder.")
    ] = None,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Look for settings with Optuna. Example: cnnrun sweep c.yaml train.optimizer.sgd.lr=log:0.001..0.3"""
    _alone("sweep")
    from cnnrun.base.device import choose, keep_freed_memory
    from cnnrun.commands import report_study
    from cnnrun.results.studies import sweep as sweeping

    keep_freed_memory()
    result = sweeping.sweep(config, settings, trials, runs, choose(device), storage)
    show(result, as_json, report_study.swept)


def find_lr(
    config: Config,
    overrides: Overrides = None,
    low: Annotated[float, typer.Option(help="The lowest rate.")] = 1e-5,
    high: Annotated[float, typer.Option(help="The highest rate.")] = 10.0,
    steps: Annotated[int, typer.Option(min=10, max=100_000, help="Training steps from one to the other.")] = 100,
    plots: Plots = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """The loss over a range of learning rates; nothing is kept. Example: cnnrun find-lr c.yaml --plots figures"""
    _alone("find-lr")
    from cnnrun.base.device import choose, keep_freed_memory
    from cnnrun.experiment.schema import load

    experiment, chosen = load(config, overrides or []), choose(device)
    from cnnrun.commands import report_study
    from cnnrun.results.studies import find_lr as finding

    keep_freed_memory()
    show(finding.find(experiment, chosen, low, high, steps, plots), as_json, report_study.found_lr)


def plan(
    config: Config,
    overrides: Overrides = None,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """How long a training will take, and how much memory. Example: cnnrun plan configs/digits.yaml"""
    _alone("plan")
    from cnnrun.base.device import choose, keep_freed_memory
    from cnnrun.experiment.schema import load

    experiment, chosen = load(config, overrides or []), choose(device)
    from cnnrun.commands import report_study
    from cnnrun.results.studies import plan as planning

    keep_freed_memory()
    show(planning.plan(experiment, chosen, runs), as_json, report_study.planned)


def page(
    targets: Annotated[
        list[Path] | None, typer.Argument(help="Runs, checkpoints or configs; by default the newest run.")
    ] = None,
    split: Annotated[str, typer.Option(help="The split to measure on; val keeps test unseen.")] = "val",
    out: Annotated[Path | None, typer.Option(help="The file; by default report.html in the run.")] = None,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """One page about a run, or several side by side, for a browser. Example: cnnrun report runs/digits/1"""
    _alone("report")
    from cnnrun.base.device import choose
    from cnnrun.commands import report
    from cnnrun.results.report import write as reporting

    show(reporting.report(targets or [], runs, choose(device), split, out), as_json, report.page)
