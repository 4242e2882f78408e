"""`cnnrun import`: convert PyTorch weights to a weights file."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cnnrun.base.console import Output
from cnnrun.base.counts import format_count
from cnnrun.commands.options import Json, show


class Match(StrEnum):
    """Rules by which `import` matches tensors."""

    order = "order"
    name = "name"


def import_weights(
    file: Annotated[Path, typer.Argument(help="A state dict: .pth, .pt or .safetensors.", metavar="FILE")],
    like: Annotated[
        str, typer.Option(help="The network of these weights: a name from `cnnrun zoo list`, or a config.")
    ],
    match: Annotated[Match, typer.Option(help="Match tensors by order or by name.")] = Match.order,
    classes: Annotated[str | None, typer.Option(help="A file with one class name per line, or `imagenet`.")] = None,
    drop: Annotated[list[str] | None, typer.Option(help="Tensors to leave out, such as 'AuxLogits.*'.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="The file to write; by default the network's name in the current folder.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert PyTorch weights for cnnrun. Example: cnnrun import resnet50.pth --like resnet50 --classes imagenet"""
    from cnnrun.experiment import import_weights as converter

    show(converter.import_weights(file, like, match.value, classes, drop or [], out), as_json, _print_weights)


def _print_weights(data: dict[str, Any], out: Output) -> None:
    """Print the contents of the weights file, and how to use it."""
    contents = (
        format_count(data["parameters"], "parameter"),
        format_count(data["tensors"], "tensor"),
        format_count(len(data["classes"]), "class", "classes"),
    )
    out.print(f"{data['path']}: {', '.join(contents)}")
    out.print(f"use it: cnnrun predict IMAGES --run {data['path']}, or model.weights={data['path']} in a config")
