"""`cnnrun sweep`: search for the best settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cnnrun.base.console import Output, build_table
from cnnrun.base.errors import escape
from cnnrun.commands.options import Config, Device, Json, Runs, refuse_ranks, show


def sweep(
    config: Config,
    settings: Annotated[
        list[str],
        typer.Argument(
            help="Settings to search: low..high, log:low..high or a|b|c; or fixed values.", metavar="KEY.PATH=RANGE"
        ),
    ],
    trials: Annotated[int, typer.Option(min=1, help="Number of trials, over all processes.")] = 20,
    storage: Annotated[
        str | None,
        typer.Option(help="A file or database URL for the trials; by default study.log in the sweep's folder."),
    ] = None,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Search for the best settings with Optuna. Example: cnnrun sweep c.yaml train.optimizer.sgd.lr=log:0.001..0.3"""
    refuse_ranks("sweep")
    from cnnrun.base.device import choose_device
    from cnnrun.results.studies.sweep import run_sweep

    result = run_sweep(config, settings, trials, runs, choose_device(device), storage)
    show(result, as_json, _print_trials)


def _print_trials(data: dict[str, Any], out: Output) -> None:
    """Print a row for each trial, and the best trial."""
    rows = [
        [
            str(row["trial"]),
            row["state"],
            "" if row["value"] is None else f"{row['value']:.5g}",
            "  ".join(
                f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
                for name, value in row["settings"].items()
            ),
        ]
        for row in data["trials"]
    ]
    out.print(build_table(["trial", "", data["monitor"], "settings"], rows, text_columns=2))
    best = data["best"]
    out.print(f"best: trial {best['trial']}, {data['monitor']} {best['value']:.5g}: {escape(best['config'])}")
