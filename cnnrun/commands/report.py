"""`cnnrun report`: the HTML page about runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cnnrun.base.console import Output
from cnnrun.base.errors import escape
from cnnrun.commands.options import Device, Json, Runs, refuse_ranks, show


def report(
    targets: Annotated[
        list[Path] | None,
        typer.Argument(help="Runs, checkpoints or configs; by default the newest run.", metavar="RUN"),
    ] = None,
    split: Annotated[str, typer.Option(help="The split to measure on; val keeps test unseen.")] = "val",
    out: Annotated[Path | None, typer.Option(help="The file; by default report.html in the run.")] = None,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Write one page about a run, or several side by side, for a browser. Example: cnnrun report runs/digits/1"""
    refuse_ranks("report")
    from cnnrun.base.device import choose_device
    from cnnrun.results.report import write as reporting

    show(reporting.write_report(targets or [], runs, choose_device(device), split, out), as_json, _print_page)


def _print_page(data: dict[str, Any], out: Output) -> None:
    """Print where a page is."""
    count = f"{len(data['runs'])} runs" if len(data["runs"]) > 1 else data["runs"][0]
    out.print(escape(f"{data['path']}: {count}, measured on {data['split']}, {data['bytes'] / 2**20:.1f} MiB"))
