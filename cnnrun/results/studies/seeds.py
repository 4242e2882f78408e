"""`cnnrun train --seeds N`: trainings of one config with several seeds, and the mean of their metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cnnrun.base import torchrun
from cnnrun.base.atomic_files import write_json
from cnnrun.base.errors import ConfigError, DataError
from cnnrun.base.extras import require_package
from cnnrun.base.progress import say
from cnnrun.experiment.schema import Experiment
from cnnrun.results.evaluate import evaluate_run
from cnnrun.results.report import write as report_writer
from cnnrun.results.studies.train_run import train_run
from cnnrun.tasks.intervals import metric_bounds
from cnnrun.training.run_records import read_facts


@dataclass(frozen=True)
class RunSettings:
    """Where and how runs are trained: their folder, the device, and whether they resume, strictly or not."""

    runs: Path
    device: torch.device
    resume: bool = False
    strict: bool = False


def train_seeds(experiment: Experiment, count: int, settings: RunSettings, with_report: bool = False) -> dict[str, Any]:
    """Train with `count` consecutive seeds, starting at the config's; write and return a summary of the metrics.

    When resuming, finished runs of the same config and seed are not trained again. Raises DataError if the data changed
    between the runs.
    """
    if torchrun.world_size() > 1:
        raise ConfigError("--seeds cannot run under torchrun; start it without, or train each seed with torchrun")
    if experiment.seed + count > 2**63:
        raise ConfigError(f"--seeds {count}: seeds must stay below 2^63, and the config's is {experiment.seed}")
    require_package("scipy", "stats", "--seeds")
    runs, device = settings.runs, settings.device
    seeds = range(experiment.seed, experiment.seed + count)
    rows = []
    for number, seed in enumerate(seeds, 1):
        seed_experiment = experiment.model_copy(update={"seed": seed})
        say(f"seed {seed} ({number} of {count})")
        result = train_run(seed_experiment, runs, device, settings.resume, settings.strict)
        run = Path(result["run"])
        if with_report:
            report_writer.report_after_training(run, runs, device, overwrite="already_finished" not in result)
        evaluation = evaluate_run(run, runs, device, None)
        rows.append({"seed": seed, "run": str(run), "split": evaluation["split"], "numbers": evaluation["numbers"]})
    _refuse_different_data([Path(row["run"]) for row in rows])
    summary = {
        "name": experiment.name,
        "split": rows[0]["split"],
        "seeds": list(seeds),
        "runs": rows,
        "summary": {
            name: mean_with_interval([row["numbers"][name] for row in rows], name) for name in rows[0]["numbers"]
        },
    }
    path = runs / experiment.name / f"seeds-{seeds[0]}-{seeds[-1]}.json"
    write_json(path, summary)
    return {"path": str(path), **summary}


def mean_with_interval(values: Sequence[float | None], name: str) -> dict[str, float | None]:
    """Mean, standard deviation and Student's 95 % confidence interval of the mean; only the mean for a single value.

    The interval is clipped to the bounds of the metric called `name`. The mean is None if any value is None.
    """
    from scipy.stats import t

    defined = [value for value in values if value is not None]
    if len(defined) < len(values):
        return {"mean": None}
    mean = math.fsum(defined) / len(defined)
    if len(defined) == 1:
        return {"mean": mean}
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in defined) / (len(defined) - 1))
    half_width = float(t.ppf(0.975, len(defined) - 1)) * deviation / math.sqrt(len(defined))
    min_value, max_value = metric_bounds(name, mean)
    return {
        "mean": mean,
        "deviation": deviation,
        "from": max(min_value, mean - half_width),
        "to": min(max_value, mean + half_width),
    }


def _refuse_different_data(runs: Sequence[Path]) -> None:
    """Raise DataError if the runs were not all trained on the same data."""
    run_by_fingerprint = {facts.fingerprint: run for run in runs if (facts := read_facts(run))}
    if len(run_by_fingerprint) > 1:
        first_run, second_run, *_ = run_by_fingerprint.values()
        runs_text = f"{first_run} and {second_run}"
        raise DataError(f"{runs_text} were trained on different data; train all seeds again, without --resume")
