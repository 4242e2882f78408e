"""`cnnrun export`: a trained network as a file for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cnnrun.commands.options import Json, Runs, SplitName, Target, show

export_app = typer.Typer(help="Write a trained network as a file for other programs.", no_args_is_help=True)


@export_app.command("onnx")
def export_onnx(
    target: Target = None,
    out: Annotated[Path | None, typer.Option(help="The file; by default exports/model.onnx in the run.")] = None,
    split: SplitName = None,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """ONNX with pre-processing inside, compared with the network before it is kept. Example: cnnrun export onnx"""
    from cnnrun.commands import tables
    from cnnrun.export.onnx import Onnx
    from cnnrun.results.export_run import export_run

    show(export_run(Onnx(), target, runs, split, out), as_json, tables.parity)


@export_app.command("code")
def export_code(
    target: Target = None,
    out: Annotated[Path | None, typer.Option(help="The file; by default exports/model.py in the run.")] = None,
    split: SplitName = None,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """A Python file and its weights, which need torch alone. Example: cnnrun export code"""
    from cnnrun.commands import tables
    from cnnrun.export.python_file import Code
    from cnnrun.results.export_run import export_run

    show(export_run(Code(), target, runs, split, out), as_json, tables.parity)
