"""`cnnrun cache`: the cache of decoded images on disk."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from cnnrun.base.console import Output, build_table
from cnnrun.base.counts import format_count
from cnnrun.base.errors import escape
from cnnrun.commands.options import Json, show
from cnnrun.commands.tables import shape_text

cache_app = typer.Typer(help="List and clear the cache of decoded images.", no_args_is_help=True)


CacheDir = Annotated[
    str | None, typer.Option("--dir", help="The folder of the cache; by default cnnrun's folder in the user's cache.")
]


@cache_app.command("list")
def cache_list(folder: CacheDir = None, as_json: Json = False) -> None:
    """List the decoded data sets, the most recently used first. Example: cnnrun cache list"""
    from cnnrun.data.cache import list_cache

    show(list_cache(folder), as_json, _print_entries)


@cache_app.command("clear")
def cache_clear(
    keys: Annotated[
        list[str] | None,
        typer.Argument(help="Keys shown by `cnnrun cache list`, or their first characters.", metavar="KEY"),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove everything in the cache.")] = False,
    folder: CacheDir = None,
    as_json: Json = False,
) -> None:
    """Remove decoded images, which are decoded again when needed. Example: cnnrun cache clear --all"""
    from cnnrun.data.cache import clear_cache

    show(clear_cache(folder, keys or [], everything), as_json, _print_cleared)


def _print_entries(data: dict[str, Any], out: Output) -> None:
    """Print the cached data sets (key, source, size, last use), and the size of the whole cache."""
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
    out.print(build_table(["key", "source", "images", "shape", "MiB", "", "last use"], rows, text_columns=2))
    out.print(f"{escape(data['folder'])}: {data['bytes'] / 2**30:,.2f} GiB")


def _print_cleared(data: dict[str, Any], out: Output) -> None:
    """Print what was removed, and what was not because it is in use."""
    out.print(f"{format_count(len(data['removed']), 'data set')} removed, {data['bytes'] / 2**30:,.2f} GiB freed")
    for key in data["in_use"]:
        out.print(f"{key}: in use, not removed")
