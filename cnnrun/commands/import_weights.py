"""`cnnrun import`: PyTorch's weights as a weights file."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cnnrun.base.console import Output
from cnnrun.commands.options import Json, show


class Match(StrEnum):
    """How `import` matches tensors."""

    order = "order"
    name = "name"


def import_weights(
    file: Annotated[Path, typer.Argument(help="A state dict: .pth, .pt or .safetensors.")],
    like: Annotated[str, typer.Option(help="The network it is of: one of `cnnrun zoo list`, or a config.")],
    match: Annotated[Match, typer.Option(help="Match tensors by their order or by their names.")] = Match.order,
    classes: Annotated[str | None, typer.Option(help="A file with a class name a line, or `imagenet`.")] = None,
    drop: Annotated[list[str] | None, typer.Option(help="Tensors to leave out, such as 'AuxLogits.*'.")] = None,
    out: Annotated[Path | None, typer.Option(help="The file; by default the network's name here.")] = None,
    as_json: Json = False,
) -> None:
    """PyTorch weights as a weights file. Example: cnnrun import resnet50.pth --like resnet50 --classes imagenet"""
    from cnnrun.experiment import import_weights as conversion

    show(conversion.import_weights(file, like, match.value, classes, drop or [], out), as_json, _print_weights)


def _print_weights(data: dict[str, Any], out: Output) -> None:
    """Print what the weights file holds, and how it is used."""
    out.print(
        f"{data['path']}: {data['parameters']:,} parameters, {data['tensors']} tensors, {len(data['classes'])} classes"
    )
    out.print(f"use it: cnnrun predict PICTURES --run {data['path']}, or model.weights={data['path']} in a config")
