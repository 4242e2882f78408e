"""`cnnrun sweep`: a search for settings."""

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
            help="What to look for, low..high, log:low..high or a|b|c; and plain settings.", metavar="KEY.PATH=RANGE"
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
    from cnnrun.base.device import choose_device, keep_freed_memory
    from cnnrun.results.studies import sweep as sweeping

    keep_freed_memory()
    result = sweeping.run_sweep(config, settings, trials, runs, choose_device(device), storage)
    show(result, as_json, _print_trials)


def _print_trials(data: dict[str, Any], out: Output) -> None:
    """Print a row for each trial, and the best one."""
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
