"""`cnnrun calibrate`: probabilities that match how often predictions are right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cnnrun.base.console import Output
from cnnrun.base.counts import format_count
from cnnrun.base.errors import escape
from cnnrun.commands.options import Device, Json, Run, Runs, refuse_ranks, show


def calibrate(run: Run = None, device: Device = "auto", runs: Runs = Path("runs"), as_json: Json = False) -> None:
    """Fit a temperature on val, so that probabilities match accuracy. Example: cnnrun calibrate runs/digits/1"""
    refuse_ranks("calibrate")
    from cnnrun.base.device import choose_device
    from cnnrun.results.calibrate import calibrate_run

    show(calibrate_run(run, runs, choose_device(device)), as_json, _print_calibration)


def _print_calibration(data: dict[str, Any], out: Output) -> None:
    """Print the temperature, and the metrics before and after on the images that it was fitted on."""
    run = escape(data["run"])
    out.print(f"temperature {data['temperature']:.4f}, saved in {run}; eval, predict and export use it")
    errors = {name: value for name, value in data.items() if isinstance(value, list) and name != "nll"}
    metrics = {"negative log-likelihood": data["nll"], **errors}
    changes = "  ".join(f"{name} {before:.4f} -> {after:.4f}" for name, (before, after) in metrics.items())
    out.print(f"on the {format_count(data['samples'], 'image')} of {data['split']} that it was fitted on: {changes}")
