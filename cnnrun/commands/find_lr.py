"""`cnnrun find-lr`: the loss over a range of learning rates."""

from __future__ import annotations

from typing import Annotated

import typer

from cnnrun.commands.options import Config, Device, Json, Overrides, Plots, refuse_ranks, show


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
    refuse_ranks("find-lr")
    from cnnrun.base.device import choose, keep_freed_memory
    from cnnrun.experiment.schema import load

    experiment, chosen = load(config, overrides or []), choose(device)
    from cnnrun.commands import study_tables
    from cnnrun.results.studies import find_lr as finding

    keep_freed_memory()
    show(finding.find(experiment, chosen, low, high, steps, plots), as_json, study_tables.found_lr)
