"""`cnnrun verify`: whether two images show the same person."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cnnrun.commands.options import Device, Json, Runs, show
from cnnrun.commands.people import FalseAccepts, Run, Threshold


def verify(
    one: Annotated[Path, typer.Argument(help="A picture.", metavar="A")],
    other: Annotated[Path, typer.Argument(help="Another.", metavar="B")],
    run: Run = None,
    threshold: Threshold = None,
    far: FalseAccepts = None,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Whether two pictures show the same person. Example: cnnrun verify a.jpg b.jpg"""
    from cnnrun.base.device import choose
    from cnnrun.commands import tables
    from cnnrun.results import people

    show(
        people.compared(people.Given(run, runs, choose(device), threshold, far), one, other),
        as_json,
        tables.compared,
    )
