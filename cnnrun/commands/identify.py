"""`cnnrun identify`: find the person in an image in a gallery."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cnnrun.commands.options import (
    Batch,
    Device,
    FalseAccepts,
    Finder,
    FindFaces,
    GalleryFile,
    Json,
    RunOption,
    Runs,
    Threshold,
)


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
    find: FindFaces = None,
    finder: Finder = None,
    draw: Annotated[
        Path | None, typer.Option(help="A folder for PNG files of the photos with the people's names drawn on.")
    ] = None,
    batch: Batch = 64,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Identify the people of a gallery in images or photos. Example: cnnrun identify party/ --gallery p.safetensors"""
    from cnnrun.base.device import choose_device
    from cnnrun.commands import prediction_output
    from cnnrun.results.people.embeddings import IdentityOptions, PhotoOptions
    from cnnrun.results.people.identification import GallerySearch, IdentifyRequest, identify_people

    options = IdentityOptions(run, runs, choose_device(device), threshold, far, PhotoOptions(find, finder))
    request = IdentifyRequest(paths, gallery, GallerySearch(top, search.value), draw)
    prediction_output.write_all(identify_people(options, request, batch), as_json, csv)
