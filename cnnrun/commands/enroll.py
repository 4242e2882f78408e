"""`cnnrun enroll`: who is known."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cnnrun.base.console import Output, build_table
from cnnrun.base.errors import escape
from cnnrun.commands.options import Batch, Device, GalleryFile, Json, RunOption, Runs, show
from cnnrun.commands.tables import MOST_ROWS


def enroll(
    gallery: GalleryFile,
    folder: Annotated[Path | None, typer.Argument(help="A folder with a folder of images for each person.")] = None,
    add: Annotated[bool, typer.Option("--add", help="Add these people to an existing gallery.")] = False,
    remove: Annotated[list[str] | None, typer.Option(help="Remove this person.")] = None,
    run: RunOption = None,
    batch: Batch = 64,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Make a gallery of known people, change it, show it. Example: cnnrun enroll staff/ --gallery staff.safetensors"""
    from cnnrun.base.device import choose_device
    from cnnrun.results import people

    given = people.IdentityOptions(run, runs, choose_device(device))
    show(people.enroll_people(given, folder, gallery, add, remove or [], batch), as_json, print_gallery)


def print_gallery(data: dict[str, Any], out: Output) -> None:
    """Print who is in a gallery."""
    for what in ("added", "removed"):
        if names := data[what]:
            more = f" and {len(names) - MOST_ROWS:,} more" if len(names) > MOST_ROWS else ""
            out.print(f"{what}: {escape(', '.join(names[:MOST_ROWS]))}{more}")
    people = data["people"]
    shown = list(people.items())[:MOST_ROWS]
    out.print(build_table(["person", "pictures"], [[name, f"{count:,}"] for name, count in shown]))
    if len(people) > len(shown):
        out.print(f"and {len(people) - len(shown):,} more")
    out.print(f"{escape(data['path'])}: {len(people):,} people, {sum(people.values()):,} pictures")
