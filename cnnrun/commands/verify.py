"""`cnnrun verify`: check whether two images show the same person."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cnnrun.base.console import Output
from cnnrun.commands.options import Device, FalseAccepts, Finder, FindFaces, Json, RunOption, Runs, Threshold, show


def verify(
    first: Annotated[Path, typer.Argument(help="An image.", metavar="A")],
    second: Annotated[Path, typer.Argument(help="Another image.", metavar="B")],
    run: RunOption = None,
    threshold: Threshold = None,
    far: FalseAccepts = None,
    find: FindFaces = None,
    finder: Finder = None,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Check whether two images or photos show the same person. Example: cnnrun verify a.jpg b.jpg"""
    from cnnrun.base.device import choose_device
    from cnnrun.results.people.embeddings import IdentityOptions, PhotoOptions
    from cnnrun.results.people.verification import verify_pair

    options = IdentityOptions(run, runs, choose_device(device), threshold, far, PhotoOptions(find, finder))
    show(verify_pair(options, first, second), as_json, _print_verdict)


def _print_verdict(data: dict[str, Any], out: Output) -> None:
    """Print whether two images show the same person."""
    verdict = "the same" if data["same"] else "not the same"
    measure = "distance" if "distance" in data else "similarity"
    out.print(f"{verdict}: {measure} {data[measure]:.4f}, threshold {data['threshold']:.4f}{_operating_point(data)}")


def _operating_point(data: dict[str, Any]) -> str:
    """The false accept rate for which the threshold was chosen, or nothing."""
    return "" if data["far"] is None else f" (for FAR {data['far']:g} on val)"
