"""`cnnrun check`: everything that training would refuse."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cnnrun.base.console import Output
from cnnrun.base.errors import escape
from cnnrun.commands.options import Config, Json, Overrides, show
from cnnrun.commands.tables import shape_text


def check(
    config: Config,
    overrides: Overrides = None,
    decode: Annotated[
        bool, typer.Option("--decode/--no-decode", help="Decode the images, which training then need not.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Check a config and its data as training would. Example: cnnrun check configs/digits.yaml"""
    from cnnrun.experiment.config_file import read_config

    experiment = read_config(config, overrides or [])
    from cnnrun.experiment import checks

    show(checks.check(experiment, decode), as_json, _print_check)


def _print_check(data: dict[str, Any], out: Output) -> None:
    """Print what a config that is fine comes to."""
    what = ", ".join(each["name"] for each in data["numbers"]) or f"{len(data['classes'])} classes"
    out.print(f"{data['name']}: fine. {escape(what)}; pictures {shape_text(data['image'])}")
    out.print("pictures: " + "  ".join(f"{name} {count:,}" for name, count in data["counts"].items()))
    out.print(
        f"{data['parameters']:,} parameters, {data['flops'] / 1e6:,.1f} MFLOPs a picture, {data['steps']:,} steps"
    )
    for line in data["remarks"]:
        out.print(line)
