"""`cnnrun plan`: the time and memory of a training."""

from __future__ import annotations

from pathlib import Path

from cnnrun.commands.options import Config, Device, Json, Overrides, Runs, refuse_ranks, show


def plan(
    config: Config,
    overrides: Overrides = None,
    device: Device = "auto",
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """How long a training will take, and how much memory. Example: cnnrun plan configs/digits.yaml"""
    refuse_ranks("plan")
    from cnnrun.base.device import choose, keep_freed_memory
    from cnnrun.experiment.schema import load

    experiment, chosen = load(config, overrides or []), choose(device)
    from cnnrun.commands import study_tables
    from cnnrun.results.studies import plan as planning

    keep_freed_memory()
    show(planning.plan(experiment, chosen, runs), as_json, study_tables.planned)
