"""`cnnrun init`: a config for data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cnnrun.commands.options import Json, show


def init(
    data: Annotated[str, typer.Argument(help="A folder, a table, a .npz file, tar shards, or `digits`.")],
    task: Annotated[str, typer.Option(help="What the network is for.")] = "classify",
    out: Annotated[Path | None, typer.Option(help="The config to write; by default named after the data.")] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="How long the training may take on this machine.")] = 10.0,
    as_json: Json = False,
) -> None:
    """Look at data and write a config that trains well on it. Example: cnnrun init photos/ --out photos.yaml"""
    from cnnrun.commands import tables
    from cnnrun.experiment import init_config

    show(init_config.start(data, task, out, minutes), as_json, tables.started)
