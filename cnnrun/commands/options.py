"""Arguments and options that commands share, and how a result is printed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from cnnrun.base import torchrun
from cnnrun.base.console import Output
from cnnrun.base.errors import ConfigError

Config = Annotated[Path, typer.Argument(help="The YAML file.", metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings that replace the file's.", metavar="KEY.PATH=VALUE")
]
Run = Annotated[
    Path | None,
    typer.Argument(help="A run folder, a checkpoint or a config; by default the newest run.", metavar="RUN"),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Runs = Annotated[Path, typer.Option(help="The folder that holds the runs.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Plots = Annotated[Path | None, typer.Option(help="A folder for figures.")]
SplitName = Annotated[str | None, typer.Option(help="The split to use; by default test where there is one, else val.")]
RunOption = Annotated[
    Path | None, typer.Option(help="A run, a checkpoint, a config or a weights file; by default the newest run.")
]
Threshold = Annotated[float | None, typer.Option(min=-1, max=1, help="The least similarity, instead of val's choice.")]
FalseAccepts = Annotated[
    float | None, typer.Option("--far", help="Go by the threshold that val chose for this false accept rate.")
]
Batch = Annotated[int, typer.Option(min=1, help="Images per batch.")]
GalleryFile = Annotated[Path, typer.Option("--gallery", help="The gallery, a .safetensors file.")]


def refuse_ranks(command: str) -> None:
    """Raise ConfigError under torchrun, whose ranks would all do the same and write the same files."""
    if torchrun.world_size() > 1:
        raise ConfigError(f"{command} is for one process; start it without torchrun")


def show(data: dict[str, Any], as_json: bool, print_text: Callable[[dict[str, Any], Output], None]) -> None:
    """Print a command's result on stdout: as JSON, or as text for people. Of several ranks the first one prints."""
    if torchrun.rank():
        return
    if as_json:
        typer.echo(json.dumps(data))
    else:
        print_text(data, Output())
