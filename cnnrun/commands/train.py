"""`cnnrun train`: a training, several seeds, going on with one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cnnrun.base import torchrun
from cnnrun.commands.options import Config, Device, Json, Overrides, Runs, show


def train(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Resume this config's newest unfinished run; complete a finished one."),
    ] = False,
    strict_resume: Annotated[
        bool, typer.Option("--strict-resume", help="So, but only if the result is that of an uninterrupted run.")
    ] = False,
    seeds: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Train so many seeds, a run each; sum them up.")
    ] = None,
    page: Annotated[
        bool, typer.Option("--report/--no-report", help="Write report.html into the run at the end.")
    ] = True,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Train a network. Example: cnnrun train configs/digits.yaml train.epochs=3"""
    from cnnrun.base.device import choose, keep_freed_memory
    from cnnrun.experiment.schema import load

    experiment, chosen = load(config, overrides or []), choose(device)
    # Imported only now: a bad config should be answered sooner.
    from cnnrun.commands import study_tables, tables
    from cnnrun.results.report import write as reporting
    from cnnrun.results.studies.seeds import train_seeds
    from cnnrun.results.train_run import train_run

    keep_freed_memory()
    if seeds:
        summary = train_seeds(experiment, seeds, runs, chosen, resume or strict_resume, strict_resume, page)
        show(summary, as_json, study_tables.seeds)
        return
    result = train_run(experiment, runs, chosen, resume or strict_resume, strict_resume)
    if page and not torchrun.rank():
        reporting.after(Path(result["run"]), runs, chosen, anew="already_finished" not in result)
    show(result, as_json, tables.training)
