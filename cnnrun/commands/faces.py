"""`cnnrun faces`: find the faces in photos, and write each as an aligned image."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cnnrun.commands.options import Device, Finder, Json, Runs


def faces(
    photos: Annotated[list[Path], typer.Argument(help="Photos, and folders of photos.", metavar="PHOTOS")],
    out: Annotated[Path, typer.Option(help="A new folder for the faces, and for their table faces.csv.")],
    run: Annotated[
        Path | None,
        typer.Option(help="Align for this run, weights file or config of task verify; by default for --size."),
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=16, max=1024, help="Height and width of the faces in pixels; by default 150.")
    ] = None,
    min_face: Annotated[int, typer.Option(min=12, help="Side of the smallest face to find, in pixels.")] = 20,
    enlarge: Annotated[int, typer.Option(min=1, max=8, help="Enlarge photos first, if a face fills them.")] = 1,
    margin: Annotated[
        float,
        typer.Option(min=0, max=2, help="Add a border of this fraction of each side first, if a face fills them."),
    ] = 0.0,
    largest: Annotated[bool, typer.Option("--largest", help="Keep only the largest face of each photo.")] = False,
    finder: Finder = None,
    draw: Annotated[Path | None, typer.Option(help="A folder for PNG files of the photos with faces drawn on.")] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Find the faces in photos and write them, aligned by the eyes. Example: cnnrun faces photos/ --out faces/"""
    from cnnrun.base.device import choose_device
    from cnnrun.commands import prediction_output
    from cnnrun.results.people.face_crops import CropOptions, cut_faces
    from cnnrun.results.people.face_photos import PhotoSettings

    settings = PhotoSettings(enlarge, margin, largest, min_face)
    reader = CropOptions(run, runs, choose_device(device), size, finder, settings).open_reader()
    prediction_output.write_all(cut_faces(reader, photos, out, draw), as_json, csv)
