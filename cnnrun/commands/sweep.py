"""`cnnrun sweep`: a search for settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cnnrun.commands.options import Config, Device, Json, Runs, refuse_ranks, show


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
    refuse_ranks("sweep")
    from cnnrun.base.device import choose, keep_freed_memory
    from cnnrun.commands import study_tables
    from cnnrun.results.studies import sweep as sweeping

    keep_freed_memory()
    result = sweeping.sweep(config, settings, trials, runs, choose(device), storage)
    show(result, as_json, study_tables.swept)
