"""`cnnrun calibrate`: probabilities that are what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cnnrun.base.console import Output
from cnnrun.base.errors import escape
from cnnrun.commands.options import Device, Json, Run, Runs, refuse_ranks, show


def calibrate(run: Run = None, device: Device = "auto", runs: Runs = Path("runs"), as_json: Json = False) -> None:
    """Fit a temperature on val, so that probabilities are what they say. Example: cnnrun calibrate runs/digits/1"""
    refuse_ranks("calibrate")
    from cnnrun.base.device import choose_device
    from cnnrun.results import calibrate as calibrating

    show(calibrating.calibrate_run(run, runs, choose_device(device)), as_json, _print_calibration)


def _print_calibration(data: dict[str, Any], out: Output) -> None:
    """Print a temperature, and what it changes on the images that it was fitted on."""
    run = escape(data["run"])
    out.print(f"temperature {data['temperature']:.4f}, kept in {run}: eval, predict and export use it")
    changes = {"negative log-likelihood": data["nll"], **({"ece": data["ece"]} if "ece" in data else {})}
    shown = "  ".join(f"{name} {before:.4f} -> {after:.4f}" for name, (before, after) in changes.items())
    out.print(f"on the {data['samples']:,} pictures of {data['split']} that it was fitted on: {shown}")
