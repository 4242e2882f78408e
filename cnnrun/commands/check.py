"""`cnnrun check`: everything that training would refuse."""

from __future__ import annotations

from typing import Annotated

import typer

from cnnrun.commands.options import Config, Json, Overrides, show


def check(
    config: Config,
    overrides: Overrides = None,
    decode: Annotated[
        bool, typer.Option("--decode/--no-decode", help="Decode the pictures, which training then finds done.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Check a config and its data as training would. Example: cnnrun check configs/digits.yaml"""
    from cnnrun.experiment.schema import load

    experiment = load(config, overrides or [])
    from cnnrun.commands import tables
    from cnnrun.experiment import checks

    show(checks.check(experiment, decode), as_json, tables.checked)
