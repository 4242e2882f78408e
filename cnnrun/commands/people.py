"""`cnnrun enroll` and `identify`: who is known, and who is this."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cnnrun.base.console import Output, table
from cnnrun.base.errors import printable
from cnnrun.commands.options import Device, Json, Runs, show
from cnnrun.commands.tables import MOST_ROWS


class Searching(StrEnum):
    """How `identify` looks through a gallery."""

    exact = "exact"
    faiss = "faiss"


Run = Annotated[
    Path | None, typer.Option(help="A run, a checkpoint, a config or a weights file; by default the newest run.")
]
Threshold = Annotated[float | None, typer.Option(min=-1, max=1, help="The least similarity, instead of val's choice.")]
FalseAccepts = Annotated[
    float | None, typer.Option("--far", help="Go by the threshold that val chose for this false accept rate.")
]
Batch = Annotated[int, typer.Option(min=1, help="Images per batch.")]
GalleryFile = Annotated[Path, typer.Option("--gallery", help="The gallery, a .safetensors file.")]


def enroll(
    gallery: GalleryFile,
    folder: Annotated[Path | None, typer.Argument(help="A folder with a folder of images for each person.")] = None,
    add: Annotated[bool, typer.Option("--add", help="Add these people to an existing gallery.")] = False,
    remove: Annotated[list[str] | None, typer.Option(help="Remove this person.")] = None,
    run: Run = None,
    batch: Batch = 64,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Make a gallery of known people, change it, show it. Example: cnnrun enroll staff/ --gallery staff.safetensors"""
    from cnnrun.base.device import choose
    from cnnrun.results import people

    given = people.Given(run, runs, choose(device))
    show(people.enrolled(given, folder, gallery, add, remove or [], batch), as_json, print_gallery)


def identify(
    paths: Annotated[list[Path], typer.Argument(help="Image files and folders.")],
    gallery: GalleryFile,
    run: Run = None,
    top: Annotated[int, typer.Option(min=1, help="How many of the most similar people to show.")] = 3,
    threshold: Threshold = None,
    far: FalseAccepts = None,
    search: Annotated[
        Searching, typer.Option(help="The product with all, or faiss's (pip install faiss-cpu).")
    ] = Searching.exact,
    batch: Batch = 64,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Say who of a gallery is in each image, or nobody. Example: cnnrun identify photos/ --gallery staff.safetensors"""
    from cnnrun.base.device import choose
    from cnnrun.commands import prediction_output
    from cnnrun.results import people

    given = people.Given(run, runs, choose(device), threshold, far)
    prediction_output.write_all(people.identified(given, paths, gallery, top, search.value, batch), as_json, csv)


def print_gallery(data: dict[str, Any], out: Output) -> None:
    """Print who is in a gallery."""
    for what in ("added", "removed"):
        if names := data[what]:
            more = f" and {len(names) - MOST_ROWS:,} more" if len(names) > MOST_ROWS else ""
            out.print(f"{what}: {printable(', '.join(names[:MOST_ROWS]))}{more}")
    people = data["people"]
    shown = list(people.items())[:MOST_ROWS]
    out.print(table(["person", "pictures"], [[name, f"{count:,}"] for name, count in shown]))
    if len(people) > len(shown):
        out.print(f"and {len(people) - len(shown):,} more")
    out.print(f"{printable(data['path'])}: {len(people):,} people, {sum(people.values()):,} pictures")
