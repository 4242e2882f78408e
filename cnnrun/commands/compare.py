"""`cnnrun compare`: what trained networks differ in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cnnrun.commands.options import Device, Json, Plots, Runs, SplitName, refuse_ranks, show


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
    refuse_ranks("compare")
    from cnnrun.base.device import choose
    from cnnrun.commands import study_tables
    from cnnrun.results import compare as comparing

    made = comparing.compare(targets, runs, choose(device), split, plots, unfinished)
    show(made, as_json, study_tables.compared)
