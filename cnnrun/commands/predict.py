"""`cnnrun predict`: print predictions for image files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cnnrun.commands.options import Batch, Device, Json, RunOption, Runs


def predict(
    paths: Annotated[list[Path], typer.Argument(help="Image files and folders.", metavar="IMAGES")],
    run: RunOption = None,
    batch: Batch = 64,
    score: Annotated[
        list[str] | None, typer.Option(help="Show objects with at least this score: 0.4, or cat=0.6 for one class.")
    ] = None,
    draw: Annotated[
        Path | None, typer.Option(help="Write the images with their predictions drawn on them to this folder.")
    ] = None,
    coco: Annotated[
        Path | None,
        typer.Option(help="Also write the shown objects to this file in COCO's results format; --score 0 shows all."),
    ] = None,
    masks: Annotated[
        Path | None, typer.Option(help="Write the class of each pixel as grey PNG files to this folder.")
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Compute in bfloat16, and print what that changes.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Print the prediction for each image, a line each. Example: cnnrun predict photos/ --json"""
    from cnnrun.base.device import choose_device
    from cnnrun.commands import prediction_output
    from cnnrun.experiment.open_run import open_network
    from cnnrun.results.predict import OutputFiles, predict_paths

    trained, output = open_network(run, runs, choose_device(device)), OutputFiles(score or [], draw, coco, masks)
    prediction_output.write_all(predict_paths(trained, paths, batch, output, fast), as_json, csv)
