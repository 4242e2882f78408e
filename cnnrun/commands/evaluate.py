"""`cnnrun eval`: a trained network measured on a split."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cnnrun.commands.options import Device, Json, Runs, SplitName, Target, show


def evaluate(
    target: Target = None,
    split: SplitName = None,
    plots: Annotated[Path | None, typer.Option(help="A folder for figures, such as the reliability diagram.")] = None,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Measure a trained network on a split. Example: cnnrun eval runs/digits/1 --split val"""
    from cnnrun.base.device import choose
    from cnnrun.commands import tables
    from cnnrun.results.evaluate import evaluate_run

    show(evaluate_run(target, runs, choose(device), split, plots), as_json, tables.evaluation)
