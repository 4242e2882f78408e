"""`cnnrun predict`: predictions for image files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cnnrun.commands.options import Batch, Device, Json, RunOption, Runs


def predict(
    paths: Annotated[list[Path], typer.Argument(help="Image files and folders.")],
    run: RunOption = None,
    batch: Batch = 64,
    score: Annotated[
        list[str] | None, typer.Option(help="Show objects from this score: 0.4 for all, or cat=0.6 for a class.")
    ] = None,
    draw: Annotated[Path | None, typer.Option(help="A folder for the pictures with what was found drawn on.")] = None,
    coco: Annotated[
        Path | None, typer.Option(help="A file for what is shown, in COCO's results format; with --score 0 for all.")
    ] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Predict images, a line each as they come. Example: cnnrun predict photos/ --json"""
    from cnnrun.base.device import choose_device
    from cnnrun.commands import prediction_output
    from cnnrun.experiment.open_run import open_network
    from cnnrun.results.predict import BoxOutput, predict_paths

    trained, boxes = open_network(run, runs, choose_device(device)), BoxOutput(score or [], draw, coco)
    prediction_output.write_all(predict_paths(trained, paths, batch, boxes), as_json, csv)
