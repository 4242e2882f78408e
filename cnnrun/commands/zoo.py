"""`cnnrun zoo`: list and print the built-in networks and blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cnnrun.base.console import Output, build_table
from cnnrun.base.counts import format_count
from cnnrun.base.errors import escape
from cnnrun.commands.options import Json, show
from cnnrun.commands.tables import shape_text

zoo_app = typer.Typer(help="List and print the built-in networks and blocks.", no_args_is_help=True)


@zoo_app.command("list")
def zoo_list(as_json: Json = False) -> None:
    """List the networks with their parameters and multiply-adds. Example: cnnrun zoo list"""
    from dataclasses import asdict

    from cnnrun.config import zoo

    show({"networks": [asdict(zoo.read_entry(name)) for name in zoo.network_names()]}, as_json, _print_networks)


@zoo_app.command("show")
def zoo_show(name: Annotated[str, typer.Argument(help="A name from `cnnrun zoo list`.", metavar="NAME")]) -> None:
    """Print a network's YAML, to copy and change. Example: cnnrun zoo show resnet18 > mine.yaml"""
    from cnnrun.config import zoo

    typer.echo(zoo.network_yaml(name), nl=False)


@zoo_app.command("weights")
def zoo_weights(
    name: Annotated[str, typer.Argument(help="A name from `cnnrun zoo list`.", metavar="NAME")],
    entry: Annotated[
        str | None, typer.Option(help="torchvision's name of the weights; by default the ones that it recommends.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--from", help="Use this published file instead of fetching it.", metavar="FILE")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The file to write; by default in the user's cache, where `init` finds it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Fetch torchvision's weights of a network. Example: cnnrun zoo weights mobilenet_v2"""
    from cnnrun.experiment.zoo_weights import fetch_weights

    show(fetch_weights(name, entry, file, out), as_json, _print_weights)


@zoo_app.command("blocks")
def zoo_blocks() -> None:
    """Print the blocks that every config may use. Example: cnnrun zoo blocks"""
    from cnnrun.config.blocks import BLOCKS_FILE

    typer.echo(BLOCKS_FILE.read_text(), nl=False)


def _print_weights(data: dict[str, Any], out: Output) -> None:
    """Print what the weights are, their licence, and how to use them."""
    path = escape(data["path"])
    size = format_count(data["parameters"], "parameter")
    accuracy = f"{data['accuracy']:.1%} of ImageNet's val right, as torchvision says"
    out.print(f"{path}: {data['network']}, {data['entry']}, {size}; {accuracy}")
    if data["bicubic"]:
        out.print("torchvision measured them on images resized bicubically; cnnrun resizes bilinearly")
    out.print(f"licence: {data['licence']}")
    out.print(f"use it: model: {{zoo: {data['network']}, weights: {path}}} in a config, or cnnrun init IMAGES")


def _print_networks(data: dict[str, Any], out: Output) -> None:
    """Print a row for each network."""
    columns = ["network", "input", "classes", "parameters", "GMACs", "paper"]
    rows = [
        [
            entry["name"],
            shape_text(entry["image"]),
            str(entry["classes"]),
            f"{entry['parameters']:,}",
            f"{entry['macs'] / 1e9:.3g}",
            entry["paper"].split(",")[0].split(" 20")[0].split(" 19")[0],
        ]
        for entry in data["networks"]
    ]
    out.print(build_table(columns, rows, text_columns=2))
    out.print("a multiply-add counts once, as in torchvision's GFLOPS; `cnnrun summary` counts it as two operations")
    out.print(
        "to use one, write `model: resnet18` in a config; to change one, copy the output of: cnnrun zoo show resnet18"
    )
