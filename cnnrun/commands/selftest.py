"""`cnnrun selftest`: whether this machine trains as it must."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cnnrun.commands.options import Device, Json, Overrides, show


def selftest(
    config: Annotated[
        Path | None, typer.Argument(help="The YAML file; without, a small one of cnnrun's own.", metavar="[CONFIG]")
    ] = None,
    overrides: Overrides = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Whether this machine trains a config as it must: repeats, resumes, learns. Example: cnnrun selftest c.yaml"""
    from cnnrun.base.device import choose, keep_freed_memory
    from cnnrun.experiment.schema import load

    experiment, chosen = load(config, overrides or []) if config else None, choose(device)
    from cnnrun.commands import tables
    from cnnrun.results.studies import selftest as tests

    keep_freed_memory()
    result = tests.selftest(experiment, chosen)
    show(result, as_json, tables.selftest)
    tests.refuse(result)
