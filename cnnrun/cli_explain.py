"""The commands that show what a network sees."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cnnrun.arguments import Device, Json, Runs, SplitName, Target, show

explain_app = typer.Typer(help="See what a trained network finds, and how it learns.", no_args_is_help=True)

Out = Annotated[Path, typer.Option(help="The PNG file to write.")]


@explain_app.command("found")
def found(
    target: Target = None,
    split: SplitName = None,
    pictures: Annotated[int, typer.Option(min=1, max=100, help="How many, the split's first.")] = 8,
    out: Out = Path("found.png"),
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Draw what is in pictures beside what the network finds. Example: cnnrun explain found runs/bccd/1 --split val"""
    from cnnrun import commands, report
    from cnnrun.device import choose

    show(commands.drawn(target, runs, choose(device), split, pictures, out), as_json, report.picture)


@explain_app.command("assign")
def assign(
    target: Target = None,
    split: SplitName = None,
    picture: Annotated[int, typer.Option(min=0, help="The sample's number in the split.")] = 0,
    out: Out = Path("assign.png"),
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Draw which cells of which level learn which object. Example: cnnrun explain assign --split train --picture 3"""
    from cnnrun import commands, report
    from cnnrun.device import choose

    show(commands.assigned(target, runs, choose(device), split, picture, out), as_json, report.assigned)
