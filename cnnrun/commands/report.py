"""`cnnrun report`: write an HTML page about runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cnnrun.base.console import Output
from cnnrun.base.errors import escape
from cnnrun.commands.options import Device, Json, Runs, refuse_ranks, show


def report(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(help="Runs, checkpoints or configs; by default the newest run.", metavar="RUN"),
    ] = None,
    split: Annotated[str, typer.Option(help="The split to measure on; with val, test stays unseen.")] = "val",
    out: Annotated[Path | None, typer.Option(help="The file to write; by default RUN/report.html.")] = None,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Write an HTML page about one run, or several side by side. Example: cnnrun report runs/digits/1"""
    refuse_ranks("report")
    from cnnrun.base.device import choose_device
    from cnnrun.results.report.writer import write_report

    show(write_report(paths or [], runs, choose_device(device), split, out), as_json, _print_page)


def _print_page(data: dict[str, Any], out: Output) -> None:
    """Print the path, contents and size of the page."""
    contents = f"{len(data['runs'])} runs" if len(data["runs"]) > 1 else data["runs"][0]
    out.print(escape(f"{data['path']}: {contents}, measured on {data['split']}, {data['bytes'] / 2**20:.1f} MiB"))
