"""`cnnrun export`: write a trained network as a file for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cnnrun.base.console import Output
from cnnrun.base.counts import format_count
from cnnrun.commands.options import Finder, Json, Runs, SplitName, show
from cnnrun.commands.tables import format_metric

RunOrWeights = Annotated[
    Path | None,
    typer.Argument(help="A run, a checkpoint, a config or a weights file; by default the newest run.", metavar="RUN"),
]
ParityImages = Annotated[
    list[Path] | None, typer.Option("--images", help="Images to compare the results of a weights file on; repeatable.")
]

export_app = typer.Typer(help="Write a trained network as a file for other programs.", no_args_is_help=True)


@export_app.command("onnx")
def export_onnx(
    run: RunOrWeights = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The file to write; by default RUN/exports/model.onnx, or WEIGHTS_exported.onnx."),
    ] = None,
    split: SplitName = None,
    images: ParityImages = None,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Write ONNX with pre-processing included, and compare it with the network. Example: cnnrun export onnx"""
    from cnnrun.export.onnx import Onnx
    from cnnrun.results.export_run import export_run

    show(export_run(Onnx(), run, runs, split, out, images or []), as_json, print_parity)


@export_app.command("code")
def export_code(
    run: RunOrWeights = None,
    out: Annotated[
        Path | None, typer.Option(help="The file to write; by default RUN/exports/model.py, or WEIGHTS_exported.py.")
    ] = None,
    split: SplitName = None,
    images: ParityImages = None,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Write a Python file and its weights, which need only torch to run. Example: cnnrun export code"""
    from cnnrun.export.python_file import Code
    from cnnrun.results.export_run import export_run

    show(export_run(Code(), run, runs, split, out, images or []), as_json, print_parity)


@export_app.command("finder")
def export_finder(
    images: Annotated[list[Path], typer.Argument(help="Photos to compare results on.", metavar="PHOTOS")],
    finder: Finder = None,
    out: Annotated[Path, typer.Option(help="The folder for the files.")] = Path("face-finder"),
    as_json: Json = False,
) -> None:
    """Write the face finder's three networks as ONNX, and compare them. Example: cnnrun export finder photos/"""
    from cnnrun.results.people.export_finder import write_finder_networks

    show(write_finder_networks(finder, images, out), as_json, print_finder)


def print_parity(data: dict[str, Any], out: Output) -> None:
    """Print how close an exported file is to the network, and its metrics."""
    images = format_count(data["samples_compared"], "image")
    origin = f" of split {data['split']}" if "split" in data else ""
    out.print(f"{data['path']}: equal to the network on {images}{origin}")
    out.print(f"largest difference {data['largest_difference']:.1e} at batch sizes {data['batch_sizes']}")
    if "metrics" not in data:
        return
    artefact = data["metrics"]["artefact"]
    out.print(
        "measured on the file: " + "  ".join(f"{name} {format_metric(value)}" for name, value in artefact.items())
    )


def print_finder(data: dict[str, Any], out: Output) -> None:
    """Print how close each exported network of the face finder is to the original."""
    for network in data["networks"]:
        inputs = format_count(network["inputs_compared"], "input")
        out.print(f"{network['path']}: equal on {inputs}, largest difference {network['largest_difference']:.1e}")
