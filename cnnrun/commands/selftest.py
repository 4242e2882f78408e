"""`cnnrun selftest`: checks that this machine trains as it must."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cnnrun.base.console import Output, build_table
from cnnrun.base.errors import escape
from cnnrun.commands.options import Device, Json, Overrides, show


def selftest(
    config: Annotated[
        Path | None, typer.Argument(help="The YAML file; by default a small one of cnnrun's own.", metavar="CONFIG")
    ] = None,
    overrides: Overrides = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Check that this machine trains a config as it must: repeats, resumes, learns. Example: cnnrun selftest c.yaml"""
    from cnnrun.base.device import choose_device, keep_freed_memory
    from cnnrun.experiment.config_file import read_config

    experiment, chosen = read_config(config, overrides or []) if config else None, choose_device(device)
    from cnnrun.results.studies import selftest as tests

    keep_freed_memory()
    result = tests.run_selftest(experiment, chosen)
    show(result, as_json, _print_checks)
    tests.refuse_failed_checks(result)


def _print_checks(data: dict[str, Any], out: Output) -> None:
    """Print a row for each check."""
    words = {True: "ok", False: "FAILED", None: "cannot tell"}
    rows = [[row["check"], words[row["passed"]], escape(row["found"])] for row in data["checks"]]
    out.print(build_table(["check", "verdict", "found"], rows, text_columns=3))
    verdict = "all is well" if data["passed"] else "not as it must be"
    out.print(f"{data['name']}: {verdict}, {data['seconds']:.0f} s")
