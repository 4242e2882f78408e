"""`cnnrun selftest`: check that training works correctly on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cnnrun.base.console import Output, build_table
from cnnrun.base.durations import format_duration
from cnnrun.base.errors import escape
from cnnrun.commands.options import Device, Json, Overrides, show


def selftest(
    config: Annotated[
        Path | None, typer.Argument(help="The config, a YAML file; by default a small built-in one.", metavar="CONFIG")
    ] = None,
    overrides: Overrides = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Check that training repeats, resumes and learns here. Example: cnnrun selftest c.yaml"""
    from cnnrun.base.device import choose_device
    from cnnrun.experiment.config_file import read_config

    experiment, torch_device = read_config(config, overrides or []) if config else None, choose_device(device)
    from cnnrun.results.studies.selftest import refuse_failed_checks, run_selftest

    result = run_selftest(experiment, torch_device)
    show(result, as_json, _print_checks)
    refuse_failed_checks(result)


def _print_checks(data: dict[str, Any], out: Output) -> None:
    """Print a row for each check."""
    verdicts = {True: "ok", False: "FAILED", None: "cannot tell"}
    rows = [[row["check"], verdicts[row["passed"]], escape(row["found"])] for row in data["checks"]]
    out.print(build_table(["check", "verdict", "details"], rows, text_columns=3))
    verdict = "all checks passed" if data["passed"] else "some checks failed"
    out.print(f"{data['name']}: {verdict}, {format_duration(data['seconds'])}")
