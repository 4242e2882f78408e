"""`cnnrun train`: a training, several seeds, or an earlier one resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cnnrun.base import torchrun
from cnnrun.base.console import Output, build_table
from cnnrun.base.errors import escape
from cnnrun.commands.options import Config, Device, Json, Overrides, Runs, show


def train(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Resume this config's newest unfinished run; complete a finished one."),
    ] = False,
    strict_resume: Annotated[
        bool,
        typer.Option(
            "--strict-resume", help="Like --resume, but fail if the result could differ from an uninterrupted run."
        ),
    ] = False,
    seeds: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Train this many seeds, a run for each, and summarize them.")
    ] = None,
    page: Annotated[
        bool, typer.Option("--report/--no-report", help="Write report.html into the run at the end.")
    ] = True,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Train a network. Example: cnnrun train configs/digits.yaml train.epochs=3"""
    from cnnrun.base.device import choose_device, keep_freed_memory
    from cnnrun.experiment.config_file import read_config

    experiment, chosen = read_config(config, overrides or []), choose_device(device)
    # Imported only now: a bad config should be answered sooner.
    from cnnrun.results.report import write as reporting
    from cnnrun.results.studies.seeds import train_seeds
    from cnnrun.results.train_run import train_run

    keep_freed_memory()
    if seeds:
        summary = train_seeds(experiment, seeds, runs, chosen, resume or strict_resume, strict_resume, page)
        show(summary, as_json, print_seeds)
        return
    result = train_run(experiment, runs, chosen, resume or strict_resume, strict_resume)
    if page and not torchrun.rank():
        reporting.report_after_training(Path(result["run"]), runs, chosen, overwrite="already_finished" not in result)
    show(result, as_json, _print_training)


def _print_training(data: dict[str, Any], out: Output) -> None:
    """Print what a training reached."""
    best = "  ".join(f"{name} {value:.4f}" for name, value in data["best"].items())
    out.print(f"best at step {data['best_step']} of {data['steps']}: {best}")
    out.print(
        f"{data['seconds']:.1f} s, {data['images_per_second']:,.0f} images/s, "
        f"waiting for data {data['data_wait_share']:.1%}"
    )
    out.print(f"run: {data['run']}")


def print_seeds(data: dict[str, Any], out: Output) -> None:
    """Print a row for each number: its mean over the seeds, how it varies, and the mean's interval."""
    from cnnrun.results.report.class_tables import format_cell

    count = len(data["seeds"])
    out.print(f"{data['name']}: {count} seeds, measured on {data['split']}")
    columns = ("mean", "deviation", "from", "to")
    rows = [
        [name, *(format_cell(of[column]) if column in of else "" for column in columns)]
        for name, of in data["summary"].items()
    ]
    out.print(build_table(["number", "mean", "deviation", "from", "to (95 % of the mean)"], rows))
    for row in data["runs"]:
        out.print(f"seed {row['seed']}: {escape(row['run'])}")
    out.print(escape(data["path"]))
