"""`cnnrun calibrate`: probabilities that are what they say."""

from __future__ import annotations

from pathlib import Path

from cnnrun.commands.options import Device, Json, Runs, Target, refuse_ranks, show


def calibrate(target: Target = None, device: Device = "auto", runs: Runs = Path("runs"), as_json: Json = False) -> None:
    """Fit a temperature on val, so that probabilities are what they say. Example: cnnrun calibrate runs/digits/1"""
    refuse_ranks("calibrate")
    from cnnrun.base.device import choose
    from cnnrun.commands import study_tables
    from cnnrun.results import calibrate as calibrating

    show(calibrating.calibrate(target, runs, choose(device)), as_json, study_tables.calibrated)
