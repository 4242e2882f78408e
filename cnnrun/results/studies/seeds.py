"""`cnnrun train --seeds N`: trainings of one config with several seeds, and the mean of their metrics."""

from __future__ import annotations

from typing import Any

from cnnrun.base.errors import ConfigError
from cnnrun.experiment.schema import Experiment
from cnnrun.results.studies.training_series import RunSettings, SeriesMeasurement, check_series_possible, train_series


def train_seeds(experiment: Experiment, count: int, settings: RunSettings, with_report: bool = False) -> dict[str, Any]:
    """Train with `count` consecutive seeds, starting at the config's; write and return a summary of the metrics."""
    check_series_possible("--seeds")
    if experiment.seed + count > 2**63:
        raise ConfigError(f"--seeds {count}: seeds must stay below 2^63, and the config's is {experiment.seed}")
    seeds = range(experiment.seed, experiment.seed + count)
    experiments = {seed: experiment.model_copy(update={"seed": seed}) for seed in seeds}
    return train_series("seed", experiments, settings, SeriesMeasurement(), with_report)
