"""`cnnrun cache`: decoded images that are kept on the disk."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cnnrun.base.errors import printable
from cnnrun.commands.options import Json, show
from cnnrun.commands.tables import shape_text

if TYPE_CHECKING:
    from rich.console import Console

cache_app = typer.Typer(help="Decoded pictures that are kept on the disk.", no_args_is_help=True)


CacheDir = Annotated[str | None, typer.Option("--dir", help="The folder; by default cnnrun's under the user's cache.")]


@cache_app.command("list")
def cache_list(folder: CacheDir = None, as_json: Json = False) -> None:
    """Data sets decoded so far, the one used last first. Example: cnnrun cache list"""
    from cnnrun.data.cache import list_cache

    show(list_cache(folder), as_json, _print_entries)


@cache_app.command("clear")
def cache_clear(
    keys: Annotated[list[str] | None, typer.Argument(help="Keys, or how they begin, from `cnnrun cache list`.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove all.")] = False,
    folder: CacheDir = None,
    as_json: Json = False,
) -> None:
    """Remove decoded pictures; they are decoded again when needed. Example: cnnrun cache clear --all"""
    from cnnrun.data.cache import clear_cache

    show(clear_cache(folder, keys or [], everything), as_json, _print_cleared)


def _print_entries(data: dict[str, Any], out: Console) -> None:
    """Print a row for each data set."""
    from cnnrun.base.console import table

    rows = [
        [
            entry["key"][:12],
            entry["source"],
            f"{entry['count']:,}",
            shape_text(entry["shape"]),
            f"{entry['bytes'] / 2**20:,.1f}",
            "" if entry["complete"] else "unfinished",
            time.strftime("%Y-%m-%d %H:%M", time.localtime(entry["used"])),
        ]
        for entry in data["entries"]
    ]
    out.print(table(["key", "source", "pictures", "shape", "MiB", "", "used"], rows, left=2))
    out.print(f"{printable(data['folder'])}: {data['bytes'] / 2**30:,.2f} GiB")


def _print_cleared(data: dict[str, Any], out: Console) -> None:
    """Print what was removed."""
    out.print(f"{len(data['removed'])} removed, {data['bytes'] / 2**30:,.2f} GiB freed")
    for key in data["in_use"]:
        out.print(f"{key}: in use, left")
