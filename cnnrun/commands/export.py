"""`cnnrun export`: write a trained network as a file for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cnnrun.base.console import Output
from cnnrun.base.counts import format_count
from cnnrun.commands.options import Json, Run, Runs, SplitName, show
from cnnrun.commands.tables import format_metric

export_app = typer.Typer(help="Write a trained network as a file for other programs.", no_args_is_help=True)


@export_app.command("onnx")
def export_onnx(
    run: Run = None,
    out: Annotated[Path | None, typer.Option(help="The file to write; by default RUN/exports/model.onnx.")] = None,
    split: SplitName = None,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Write ONNX with pre-processing included, and compare it with the network. Example: cnnrun export onnx"""
    from cnnrun.export.onnx import Onnx
    from cnnrun.results.export_run import export_run

    show(export_run(Onnx(), run, runs, split, out), as_json, print_parity)


@export_app.command("code")
def export_code(
    run: Run = None,
    out: Annotated[Path | None, typer.Option(help="The file to write; by default RUN/exports/model.py.")] = None,
    split: SplitName = None,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Write a Python file and its weights, which need only torch to run. Example: cnnrun export code"""
    from cnnrun.export.python_file import Code
    from cnnrun.results.export_run import export_run

    show(export_run(Code(), run, runs, split, out), as_json, print_parity)


def print_parity(data: dict[str, Any], out: Output) -> None:
    """Print how close an exported file is to the network, and its metrics."""
    images = format_count(data["samples_compared"], "image")
    out.print(f"{data['path']}: equal to the network on {images} of split {data['split']}")
    out.print(f"largest difference {data['largest_difference']:.1e} at batch sizes {data['batch_sizes']}")
    artefact = data["metrics"]["artefact"]
    out.print(
        "measured on the file: " + "  ".join(f"{name} {format_metric(value)}" for name, value in artefact.items())
    )
