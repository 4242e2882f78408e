"""What was foretold of a training, kept under its name; and beside it, in the run, what came of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from cnnrun.base.atomic_files import Folder, json_bytes, make_folder, storage_errors, write_json
from cnnrun.base.bounded_files import read_bytes
from cnnrun.base.errors import CheckpointError
from cnnrun.base.progress import say
from cnnrun.experiment.schema import Experiment
from cnnrun.training.run_folder import environment
from cnnrun.training.run_records import MAX_JSON_BYTES, PLAN

_TOLD = ("seconds", "peak_memory_mib", "data_wait_share")  # what both know


def keep(experiment: Experiment, root: Path, device: torch.device, planned: dict[str, Any]) -> None:
    """Keep a plan for the training of this config that may follow."""
    make_folder(root / experiment.name)
    write_json(root / experiment.name / PLAN, {**planned, "for": _settings(experiment, environment(device))})


def compare_with_plan(
    root: Path, experiment: Experiment, run: Folder, where: dict[str, Any], result: dict[str, Any]
) -> None:
    """Write and say what was foretold and what it came to, where there is a plan of the same config and machine.

    `where` is the run's `run_folder.environment`. A plan that cannot be read is none.
    """
    try:
        planned = json.loads(read_bytes(root / experiment.name / PLAN, CheckpointError, MAX_JSON_BYTES))
        if planned.pop("for") != _settings(experiment, where):
            return
        pairs = {name: [float(planned[name]), float(result[name])] for name in _TOLD}
    except (CheckpointError, ValueError, KeyError, TypeError, AttributeError):
        return
    with storage_errors(run.path / PLAN, 4096):
        run.replace(PLAN, json_bytes({"planned": planned, "measured": {name: result[name] for name in _TOLD}}))
    seconds, memory = pairs["seconds"], pairs["peak_memory_mib"]
    say(f"planned {seconds[0]:.0f} s and {memory[0]:,.0f} MiB; it took {seconds[1]:.0f} s and {memory[1]:,.0f} MiB")


def _settings(experiment: Experiment, where: dict[str, Any]) -> dict[str, Any]:
    """The config, but for the statistics of the pictures, which a run writes into its own; and the machine."""
    made: dict[str, Any] = experiment.model_dump(mode="json", by_alias=True)
    for name in ("mean", "std"):
        made["data"]["image"].pop(name, None)
    return {"config": made, "machine": where}
