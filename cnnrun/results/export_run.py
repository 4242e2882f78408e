"""Export of a run's network into a file for other programs."""

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


def export_run(
    export_format: Format, run: Path | None, runs: Path, split: str | None, out: Path | None
) -> dict[str, Any]:
    """Write the network of a run in a format, by default into the run's folder.

    Returns the file's path and how its outputs compare with the network's. Raises ConfigError if `out` does not fit
    the format.
    """
    experiment, trained = open_trained(run, runs, torch.device("cpu"))
    split_name, data = prepare_eval_data(experiment, trained, split, min_images=MIN_SAMPLES)
    path = out or trained.run / EXPORTS / f"model{export_format.suffix}"
    if path.suffix != export_format.suffix or path.is_dir():
        raise ConfigError(f"--out {path}: give a file that ends in {export_format.suffix}")
    names = [split_name, *(name for name in data.splits if name != split_name)]
    splits = {name: data.splits[name] for name in names}
    return {"path": str(path), **export_network(export_format, trained, splits, path, experiment.train.batch)}
