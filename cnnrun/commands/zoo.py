"""`cnnrun zoo`: the networks and blocks that are shipped as YAML."""

from __future__ import annotations

from typing import Annotated

import typer

from cnnrun.commands.options import Json, show

zoo_app = typer.Typer(help="Networks that are shipped as YAML.", no_args_is_help=True)


@zoo_app.command("list")
def zoo_list(as_json: Json = False) -> None:
    """Every network with its parameters and multiply-adds. Example: cnnrun zoo list"""
    from dataclasses import asdict

    from cnnrun.commands import tables
    from cnnrun.config import zoo

    show({"networks": [asdict(zoo.entry(name)) for name in zoo.names()]}, as_json, tables.zoo)


@zoo_app.command("show")
def zoo_show(name: Annotated[str, typer.Argument(help="One of `cnnrun zoo list`.")]) -> None:
    """A network's file, to copy and change. Example: cnnrun zoo show resnet18 > mine.yaml"""
    from cnnrun.config import zoo

    typer.echo(zoo.text(name), nl=False)


@zoo_app.command("blocks")
def zoo_blocks() -> None:
    """The blocks that every config may use. Example: cnnrun zoo blocks"""
    from cnnrun.config.blocks import SHIPPED

    typer.echo(SHIPPED.read_text(), nl=False)
