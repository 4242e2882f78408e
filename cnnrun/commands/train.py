"""`cnnrun train`: train a network, train several seeds, or resume a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cnnrun.base import torchrun
from cnnrun.base.console import Output, build_table
from cnnrun.base.counts import format_count
from cnnrun.base.durations import format_duration
from cnnrun.base.errors import ConfigError, escape
from cnnrun.commands.options import Config, Device, Json, Overrides, Runs, show

Resume = Annotated[bool, typer.Option("--resume", help="Resume this config's newest unfinished run.")]
StrictResume = Annotated[
    bool,
    typer.Option(
        "--strict-resume", help="Like --resume, but fail if the result could differ from an uninterrupted run."
    ),
]
Extend = Annotated[
    Path | None, typer.Option(help="Go on from this finished run, with more train.epochs.", metavar="RUN")
]
Seeds = Annotated[
    int | None, typer.Option(min=1, max=1000, help="Train this many runs with different seeds, and summarize them.")
]
Folds = Annotated[
    int | None,
    typer.Option(min=2, max=100, help="Cross-validate: train this many runs, each measured on another fold."),
]
Report = Annotated[bool, typer.Option("--report/--no-report", help="Write report.html into the run after training.")]


def train(
    config: Config,
    overrides: Overrides = None,
    resume: Resume = False,
    strict_resume: StrictResume = False,
    extend: Extend = None,
    seeds: Seeds = None,
    folds: Folds = None,
    page: Report = True,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Train a network. Example: cnnrun train configs/digits.yaml train.epochs=3"""
    from cnnrun.base.device import choose_device
    from cnnrun.experiment.config_file import read_config

    if (extend is not None) + (seeds is not None) + (folds is not None) > 1:
        raise ConfigError("--extend, --seeds and --folds cannot be combined: extend each run by itself, without them")
    experiment, torch_device = read_config(config, overrides or []), choose_device(device)
    # Imported after the config is read, so that a mistake in it is reported quickly.
    from cnnrun.results.report.writer import report_after_training
    from cnnrun.results.studies.folds import train_folds
    from cnnrun.results.studies.seeds import train_seeds
    from cnnrun.results.studies.train_run import train_run
    from cnnrun.results.studies.training_series import RunSettings

    how: bool | Literal["strict"] = "strict" if strict_resume else resume
    settings = RunSettings(runs, torch_device, how)
    if seeds:
        show(train_seeds(experiment, seeds, settings, page), as_json, print_series)
        return
    if folds:
        show(train_folds(experiment, folds, settings, page), as_json, print_series)
        return
    result = train_run(experiment, runs, torch_device, how, extend=extend)
    if page and not torchrun.rank():
        report_after_training(Path(result["run"]), runs, torch_device, overwrite="already_finished" not in result)
    show(result, as_json, _print_training)


def _print_training(data: dict[str, Any], out: Output) -> None:
    """Print the best metrics, the speed and the folder of a training."""
    best = "  ".join(f"{name} {value:.4f}" for name, value in data["best"].items())
    out.print(f"best at step {data['best_step']:,} of {data['steps']:,}: {best}")
    out.print(
        f"{format_duration(data['seconds'])}, {data['images_per_second']:,.0f} images/s, "
        f"waiting for data {data['data_wait_share']:.1%}"
    )
    out.print(f"run: {data['run']}")


def print_series(data: dict[str, Any], out: Output) -> None:
    """Print for each metric its mean and deviation over the seeds or folds, and the mean's confidence interval."""
    from cnnrun.results.report.class_tables import format_cell

    word = "fold" if "folds" in data else "seed"
    count = len(data["runs"])
    place = "each on its own fold by the last checkpoint" if word == "fold" else f"on {data['split']}"
    out.print(f"{data['name']}: {format_count(count, word)}, measured {place}")
    columns = ("mean", "deviation", "from", "to")
    rows = [
        [name, *(format_cell(statistics[column]) if column in statistics else "" for column in columns)]
        for name, statistics in data["summary"].items()
    ]
    out.print(build_table(["metric", "mean", "deviation", "from", "to (95 % of the mean)"], rows))
    for row in data["runs"]:
        out.print(f"{word} {row[word]}: {escape(row['run'])}")
    out.print(escape(data["path"]))
