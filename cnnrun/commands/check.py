"""`cnnrun check`: report every problem that would stop a training."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cnnrun.base.console import Output
from cnnrun.base.counts import format_count
from cnnrun.base.errors import escape
from cnnrun.commands.options import Config, Json, Overrides, show
from cnnrun.commands.tables import shape_text


def check(
    config: Config,
    overrides: Overrides = None,
    decode: Annotated[
        bool, typer.Option("--decode/--no-decode", help="Decode the images, which saves training the time.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Check a config and its data without training. Example: cnnrun check configs/digits.yaml"""
    from cnnrun.experiment.config_file import read_config

    experiment = read_config(config, overrides or [])
    from cnnrun.experiment import checks

    show(checks.check(experiment, decode), as_json, _print_check)


def _print_check(data: dict[str, Any], out: Output) -> None:
    """Print the sizes of a valid config: classes, images, parameters, steps."""
    columns = ", ".join(number["name"] for number in data["numbers"])
    targets = columns or format_count(len(data["classes"]), "class", "classes")
    out.print(f"{data['name']}: no problems. {escape(targets)}; images of {shape_text(data['image'])}")
    out.print("images: " + "  ".join(f"{name} {count:,}" for name, count in data["counts"].items()))
    out.print(
        f"{data['parameters']:,} parameters, {data['flops'] / 1e6:,.1f} MFLOPs per image, "
        f"{format_count(data['steps'], 'step')}"
    )
    for line in data["remarks"]:
        out.print(line)
