"""Arguments and options that commands share, and the printing of results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from cnnrun.base import torchrun
from cnnrun.base.console import Output
from cnnrun.base.errors import ConfigError

Config = Annotated[Path, typer.Argument(help="The config, a YAML file.", metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings that override the config's.", metavar="KEY.PATH=VALUE")
]
Run = Annotated[
    Path | None,
    typer.Argument(help="A run folder, a checkpoint or a config; by default the newest run.", metavar="RUN"),
]
Device = Annotated[str, typer.Option(help="The device to use: auto, cpu, cuda or cuda:N.")]
Runs = Annotated[Path, typer.Option(help="The folder that holds the runs.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Plots = Annotated[Path | None, typer.Option(help="Write figures to this folder.")]
SplitName = Annotated[str | None, typer.Option(help="The split to use; by default test if there is one, else val.")]
RunOption = Annotated[
    Path | None, typer.Option(help="A run, a checkpoint, a config or a weights file; by default the newest run.")
]
Threshold = Annotated[
    float | None,
    typer.Option(
        min=-1, help="The minimum similarity (or maximum distance) of a match, instead of the threshold chosen on val."
    ),
]
FindFaces = Annotated[
    bool | None,
    typer.Option(
        "--find/--no-find",
        help="Look for faces in photos and align them; by default if the network takes aligned faces.",
    ),
]
Finder = Annotated[
    Path | None,
    typer.Option(help="The face finder's file; by default the one beside the network's, or in data/face-models."),
]
FalseAccepts = Annotated[
    float | None, typer.Option("--far", help="Use the threshold chosen on val for this false accept rate.")
]
Batch = Annotated[int, typer.Option(min=1, help="Number of images per batch.")]
GalleryFile = Annotated[Path, typer.Option("--gallery", help="The gallery file (.safetensors).")]


def refuse_ranks(command: str) -> None:
    """Raise ConfigError under torchrun, because all ranks would do the same work and write the same files."""
    if torchrun.world_size() > 1:
        raise ConfigError(f"{command} runs in one process; start it without torchrun")


def show(data: dict[str, Any], as_json: bool, print_text: Callable[[dict[str, Any], Output], None]) -> None:
    """Print a command's result on stdout, as JSON or as text; only rank 0 prints."""
    if torchrun.rank():
        return
    if as_json:
        typer.echo(json.dumps(data))
    else:
        print_text(data, Output())
