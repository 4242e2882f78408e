"""Several trainings of one config that differ in a number, such as the seed, and the mean of their metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cnnrun.base import torchrun
from cnnrun.base.atomic_files import write_json
from cnnrun.base.errors import ConfigError, DataError
from cnnrun.base.extras import require_package
from cnnrun.base.progress import say
from cnnrun.experiment.run import Resume
from cnnrun.experiment.schema import Experiment
from cnnrun.results.evaluate import evaluate_run
from cnnrun.results.report import writer as report_writer
from cnnrun.results.studies.train_run import train_run
from cnnrun.tasks.intervals import metric_bounds
from cnnrun.training.checkpoint_pointers import LATEST
from cnnrun.training.run_records import CHECKPOINTS, read_facts


@dataclass(frozen=True)
class RunSettings:
    """Settings of all runs: their folder, the device, and whether they resume, strictly or not."""

    runs: Path
    device: torch.device
    resume: Resume = False


@dataclass(frozen=True)
class SeriesMeasurement:
    """The measurement of each run: on a split (by default test, or else val), by its best or its last checkpoint.

    `variance_factor` times the variance of the runs' metrics is that of their mean; by default one over their number.
    """

    split: str | None = None
    by_last_checkpoint: bool = False
    variance_factor: float | None = None


def check_series_possible(option: str) -> None:
    """Raise ConfigError under torchrun, or without the package that computes the intervals."""
    if torchrun.world_size() > 1:
        word = option.removeprefix("--").removesuffix("s")
        raise ConfigError(f"{option} cannot run under torchrun; start it without, or train each {word} with torchrun")
    require_package("scipy", "stats", option)


def train_series(
    word: str,
    experiments: Mapping[int, Experiment],
    settings: RunSettings,
    measurement: SeriesMeasurement,
    with_report: bool = False,
) -> dict[str, Any]:
    """Train the experiments, which `word` and their numbers tell apart; write and return a summary of the metrics.

    When resuming, finished runs are not trained again. Raises DataError if the data changed between the runs.
    """
    runs, device, rows = settings.runs, settings.device, []
    for count, (number, experiment) in enumerate(experiments.items(), 1):
        say(f"{word} {number} ({count} of {len(experiments)})")
        result = train_run(experiment, runs, device, settings.resume)
        run = Path(result["run"])
        if with_report:
            report_writer.report_after_training(run, runs, device, overwrite="already_finished" not in result)
        measured = run / CHECKPOINTS / LATEST if measurement.by_last_checkpoint else run
        evaluation = evaluate_run(measured, runs, device, measurement.split)
        rows.append({word: number, "run": str(run), "split": evaluation["split"], "numbers": evaluation["numbers"]})
    _refuse_different_data([Path(row["run"]) for row in rows], word)
    numbers, name = list(experiments), next(iter(experiments.values())).name
    factor = measurement.variance_factor
    summary = {
        "name": name,
        "split": rows[0]["split"],
        f"{word}s": numbers,
        "runs": rows,
        "summary": {
            metric: mean_with_interval([row["numbers"][metric] for row in rows], metric, factor)
            for metric in rows[0]["numbers"]
        },
    }
    path = runs / name / f"{word}s-{numbers[0]}-{numbers[-1]}.json"
    write_json(path, summary)
    return {"path": str(path), **summary}


def mean_with_interval(
    values: Sequence[float | None], name: str, variance_factor: float | None = None
) -> dict[str, float | None]:
    """Mean, standard deviation and Student's 95 % confidence interval of the mean; only the mean for a single value.

    The variance of the mean is `variance_factor` times that of the values, by default one over their number. The
    interval is clipped to the bounds of the metric called `name`. The mean is None if any value is None.
    """
    from scipy.stats import t

    defined = [value for value in values if value is not None]
    if len(defined) < len(values):
        return {"mean": None}
    mean = math.fsum(defined) / len(defined)
    if len(defined) == 1:
        return {"mean": mean}
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in defined) / (len(defined) - 1))
    factor = 1 / len(defined) if variance_factor is None else variance_factor
    half_width = float(t.ppf(0.975, len(defined) - 1)) * deviation * math.sqrt(factor)
    min_value, max_value = metric_bounds(name, mean)
    return {
        "mean": mean,
        "deviation": deviation,
        "from": max(min_value, mean - half_width),
        "to": min(max_value, mean + half_width),
    }


def _refuse_different_data(runs: Sequence[Path], word: str) -> None:
    """Raise DataError if the runs were not all trained on the same data."""
    run_by_fingerprint = {facts.fingerprint: run for run in runs if (facts := read_facts(run))}
    if len(run_by_fingerprint) > 1:
        first_run, second_run, *_ = run_by_fingerprint.values()
        runs_text = f"{first_run} and {second_run}"
        raise DataError(f"{runs_text} were trained on different data; train all {word}s again, without --resume")
