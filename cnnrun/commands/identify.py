"""`cnnrun identify`: find the person in an image in a gallery."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cnnrun.commands.options import Batch, Device, FalseAccepts, GalleryFile, Json, RunOption, Runs, Threshold


class SearchMethod(StrEnum):
    """Methods of searching a gallery."""

    exact = "exact"
    faiss = "faiss"


def identify(
    paths: Annotated[list[Path], typer.Argument(help="Image files and folders.", metavar="IMAGES")],
    gallery: GalleryFile,
    run: RunOption = None,
    top: Annotated[int, typer.Option(min=1, help="Number of most similar people to show.")] = 3,
    threshold: Threshold = None,
    far: FalseAccepts = None,
    search: Annotated[
        SearchMethod,
        typer.Option(help="Compare with each image of the gallery (exact), or use faiss (pip install faiss-cpu)."),
    ] = SearchMethod.exact,
    batch: Batch = 64,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Identify the people of a gallery in images. Example: cnnrun identify photos/ --gallery staff.safetensors"""
    from cnnrun.base.device import choose_device
    from cnnrun.commands import prediction_output
    from cnnrun.results.people.embeddings import IdentityOptions
    from cnnrun.results.people.identification import GallerySearch, identify_people

    options = IdentityOptions(run, runs, choose_device(device), threshold, far)
    search_settings = GallerySearch(top, search.value)
    prediction_output.write_all(identify_people(options, paths, gallery, search_settings, batch), as_json, csv)
