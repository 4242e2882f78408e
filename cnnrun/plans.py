"""What was foretold of a training, kept under its name; and beside it, in the run, what came of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from cnnrun.experiment import Experiment
from cnnrun.progress import say
from cnnrun.runs import PLAN, environment, write_json

_TOLD = ("seconds", "peak_memory_mib", "data_wait_share")  # what both know


def keep(experiment: Experiment, root: Path, device: torch.device, planned: dict[str, Any]) -> None:
    """Keep a plan for the training of this config that may follow."""
    (root / experiment.name).mkdir(parents=True, exist_ok=True)
    write_json(root / experiment.name / PLAN, {**planned, "for": _settings(experiment, environment(device))})


def beside_the_plan(
    experiment: Experiment, root: Path, run: Path, where: dict[str, Any], result: dict[str, Any]
) -> None:
    """Write and say what was foretold and what it came to, where there is a plan of the same config and machine.

    `where` is the run's `runs.environment`.
    """
    try:
        planned = json.loads((root / experiment.name / PLAN).read_text())
        if planned.pop("for") != _settings(experiment, where):
            return
        pairs = {name: [float(planned[name]), float(result[name])] for name in _TOLD}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    write_json(run / PLAN, {"planned": planned, "measured": {name: result[name] for name in _TOLD}})
    seconds, memory = pairs["seconds"], pairs["peak_memory_mib"]
    say(f"planned {seconds[0]:.0f} s and {memory[0]:,.0f} MiB; it took {seconds[1]:.0f} s and {memory[1]:,.0f} MiB")


def _settings(experiment: Experiment, where: dict[str, Any]) -> dict[str, Any]:
    """The config, but for the statistics of the pictures, which a run writes into its own; and the machine."""
    made: dict[str, Any] = experiment.model_dump(mode="json", by_alias=True)
    for name in ("mean", "std"):
        made["data"]["image"].pop(name, None)
    return {"config": made, "machine": where}
