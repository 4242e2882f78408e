"""A trained network written in a format for other programs, beside its run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cnnrun.base.errors import ConfigError
from cnnrun.experiment.open_run import open_trained, prepare_eval_data
from cnnrun.export import Format
from cnnrun.export.parity import MIN_SAMPLES
from cnnrun.export.write import export_network
from cnnrun.training.run_records import EXPORTS


def export_run(form: Format, target: Path | None, root: Path, split: str | None, out: Path | None) -> dict[str, Any]:
    """Write a trained network in a format; returns how it compares."""
    experiment, given = open_trained(target, root, torch.device("cpu"))
    name, data = prepare_eval_data(experiment, given, split, min_images=MIN_SAMPLES)
    path = out or given.run / EXPORTS / f"model{form.suffix}"
    if path.suffix != form.suffix or path.is_dir():
        raise ConfigError(f"--out {path}: give a file that ends in {form.suffix}")
    ordered = [name, *(other for other in data.splits if other != name)]
    splits = {each: data.splits[each] for each in ordered}
    return {"path": str(path), **export_network(form, given, splits, path, experiment.train.batch)}
