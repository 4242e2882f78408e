"""`cnnrun train --folds N`: cross-validation, with a run for each fold and the mean of their metrics."""

from __future__ import annotations

from typing import Any

from cnnrun.base.errors import ConfigError
from cnnrun.base.progress import say
from cnnrun.data.settings import Fold
from cnnrun.experiment.schema import Experiment
from cnnrun.results.studies.training_series import RunSettings, SeriesMeasurement, check_series_possible, train_series


def train_folds(experiment: Experiment, count: int, settings: RunSettings, with_report: bool = False) -> dict[str, Any]:
    """Train on all folds but one, `count` times, and measure each run on its own fold; write and return a summary.

    A fold is measured by the last checkpoint, because it chose the best one. Training sets overlap, so the variance of
    the mean is that of Nadeau and Bengio (2003, eq. 5): 1 / n + 1 / (n - 1) times the variance of the folds. Raises
    ConfigError if a fold would end its own training (`train.early_stop`).
    """
    check_series_possible("--folds")
    if experiment.train.early_stop:
        raise ConfigError("--folds: train.early_stop would let each fold choose the end of its training; remove it")
    split = experiment.data.split
    if isinstance(split.val, Fold):
        raise ConfigError("--folds: data.split.val names a fold itself; remove it, or leave --folds out")
    say(f"--folds {count}: data.split.val is a fold of {count} in each run, instead of {split.val}")
    experiments = {
        number: experiment.model_copy(
            update={
                "data": experiment.data.model_copy(
                    update={"split": split.model_copy(update={"val": Fold(fold=number, of=count)})}
                )
            }
        )
        for number in range(1, count + 1)
    }
    measurement = SeriesMeasurement("val", True, 1 / count + 1 / (count - 1))
    return train_series("fold", experiments, settings, measurement, with_report)
