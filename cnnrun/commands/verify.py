"""`cnnrun verify`: are two images of the same person?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cnnrun.base.console import Output
from cnnrun.commands.options import Device, FalseAccepts, Json, RunOption, Runs, Threshold, show


def verify(
    one: Annotated[Path, typer.Argument(help="An image.", metavar="A")],
    other: Annotated[Path, typer.Argument(help="Another.", metavar="B")],
    run: RunOption = None,
    threshold: Threshold = None,
    far: FalseAccepts = None,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Say if two images show the same person. Example: cnnrun verify a.jpg b.jpg"""
    from cnnrun.base.device import choose_device
    from cnnrun.results import people

    show(
        people.verify_pair(people.IdentityOptions(run, runs, choose_device(device), threshold, far), one, other),
        as_json,
        _print_verdict,
    )


def _print_verdict(data: dict[str, Any], out: Output) -> None:
    """Print if two images show the same person."""
    verdict = "the same" if data["same"] else "not the same"
    out.print(f"{verdict}: similarity {data['similarity']:.4f}, threshold {data['threshold']:.4f}{_chosen_for(data)}")


def _chosen_for(data: dict[str, Any]) -> str:
    return "" if data["far"] is None else f" (for FAR {data['far']:g} on val)"
