"""`cnnrun enroll`: create and change a gallery of known people."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cnnrun.base.console import Output, build_table
from cnnrun.base.counts import format_count
from cnnrun.base.errors import escape
from cnnrun.commands.options import Batch, Device, Finder, FindFaces, GalleryFile, Json, RunOption, Runs, show
from cnnrun.commands.tables import MAX_ROWS


def enroll(
    gallery: GalleryFile,
    folder: Annotated[
        Path | None, typer.Argument(help="A folder with one folder of images per person.", metavar="FOLDER")
    ] = None,
    add: Annotated[bool, typer.Option("--add", help="Add the people to an existing gallery.")] = False,
    remove: Annotated[list[str] | None, typer.Option(help="Remove this person; may be repeated.")] = None,
    run: RunOption = None,
    find: FindFaces = None,
    finder: Finder = None,
    batch: Batch = 64,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Create, change or show a gallery of known people. Example: cnnrun enroll staff/ --gallery staff.safetensors"""
    from cnnrun.base.device import choose_device
    from cnnrun.results.people.embeddings import IdentityOptions, PhotoOptions
    from cnnrun.results.people.enrolment import enroll_people

    options = IdentityOptions(run, runs, choose_device(device), photos=PhotoOptions(find, finder))
    show(enroll_people(options, folder, gallery, add, remove or [], batch), as_json, print_gallery)


def print_gallery(data: dict[str, Any], out: Output) -> None:
    """Print the people of a gallery, and what changed."""
    for change in ("added", "removed"):
        if names := data[change]:
            more = f" and {len(names) - MAX_ROWS:,} more" if len(names) > MAX_ROWS else ""
            out.print(f"{change}: {escape(', '.join(names[:MAX_ROWS]))}{more}")
    people = data["people"]
    shown = list(people.items())[:MAX_ROWS]
    out.print(build_table(["person", "images"], [[name, f"{count:,}"] for name, count in shown]))
    if len(people) > len(shown):
        out.print(f"and {len(people) - len(shown):,} more")
    totals = f"{format_count(len(people), 'person', 'people')}, {format_count(sum(people.values()), 'image')}"
    out.print(f"{escape(data['path'])}: {totals}")
