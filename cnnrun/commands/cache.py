"""`cnnrun cache`: decoded images that are kept on the disk."""

from __future__ import annotations

from typing import Annotated

import typer

from cnnrun.commands.options import Json, show

cache_app = typer.Typer(help="Decoded pictures that are kept on the disk.", no_args_is_help=True)


CacheDir = Annotated[str | None, typer.Option("--dir", help="The folder; by default cnnrun's under the user's cache.")]


@cache_app.command("list")
def cache_list(folder: CacheDir = None, as_json: Json = False) -> None:
    """Data sets decoded so far, the one used last first. Example: cnnrun cache list"""
    from cnnrun.commands import data_work, tables

    show(data_work.cached(folder), as_json, tables.cached)


@cache_app.command("clear")
def cache_clear(
    keys: Annotated[list[str] | None, typer.Argument(help="Keys, or how they begin, from `cnnrun cache list`.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove all.")] = False,
    folder: CacheDir = None,
    as_json: Json = False,
) -> None:
    """Remove decoded pictures; they are decoded again when needed. Example: cnnrun cache clear --all"""
    from cnnrun.commands import data_work, tables

    show(data_work.cleared(folder, keys or [], everything), as_json, tables.cleared)
