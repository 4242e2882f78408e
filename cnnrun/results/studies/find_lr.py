"""`cnnrun find-lr`: the loss over a range of learning rates, from a short trial training (Smith 2017)."""

from __future__ import annotations

import math
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from cnnrun.base.errors import ConfigError
from cnnrun.base.progress import progress_bar
from cnnrun.contracts.figure import Plot, Series
from cnnrun.experiment.assemble import load_initial_weights
from cnnrun.experiment.preparation import prepare_training
from cnnrun.experiment.schema import Experiment
from cnnrun.explain.figures.png import write_plots
from cnnrun.training.determinism import deterministic_kernels
from cnnrun.training.learner import Learner
from cnnrun.training.setup import TrainingSetup

_SMOOTHING = 0.9  # decay of the moving mean of the losses
_DIVERGENCE_FACTOR = 4.0  # training has diverged, and the range ends, at this many times the lowest loss
_WARMUP_DIVISOR = 10  # the first tenth of the range is ignored, since its mean rests on too few losses
_LOWEST_LOSS_DIVISOR = 10.0  # a common choice is a tenth of the rate with the lowest loss


def find_learning_rate(
    experiment: Experiment, device: torch.device, low: float, high: float, steps: int, plots: Path | None
) -> dict[str, Any]:
    """Measure the smoothed loss at rates from `low` to `high`; returns it with two rates that are commonly chosen."""
    if not 0 < low < high < math.inf:
        raise ConfigError("--low and --high: give two finite rates above 0, with --low below --high")
    training = prepare_training(experiment, load_initial_weights(experiment), device)
    with deterministic_kernels(device, experiment.train.deterministic):
        rows = _sweep_rates(training.build_setup(device), low, high, steps)
    if len(rows) < 3:
        raise ConfigError(f"the loss diverges from a rate of {low:g} on; give a lower --low")
    result = {
        "name": experiment.name,
        "now": experiment.train.optimizer.lr,
        "rates": rows,
        **suggest_learning_rates(rows),
    }
    return {**result, **({"plots": write_plots([_figure(rows)], plots)} if plots else {})}


def _sweep_rates(setup: TrainingSetup, low: float, high: float, steps: int) -> list[dict[str, float]]:
    """Train a step at each of the rising rates; a row for each with its loss and the moving mean of the losses."""
    learner, batches = Learner(setup), setup.batches(setup.spec.accumulate)
    base_rate, running_mean, lowest_loss, rows = setup.spec.optimizer.lr, 0.0, math.inf, list[dict[str, float]]()
    try:
        with progress_bar("rates", steps) as advance:
            for step in range(steps):
                rate = low * (high / low) ** (step / (steps - 1))
                loss = float(learner.backward(batches.at(step), step))
                running_mean = _SMOOTHING * running_mean + (1 - _SMOOTHING) * loss
                smoothed = running_mean / (1 - _SMOOTHING ** (step + 1))
                lowest_loss = min(lowest_loss, smoothed)
                if not math.isfinite(loss) or smoothed > _DIVERGENCE_FACTOR * lowest_loss > 0:
                    break
                rows.append({"lr": rate, "loss": loss, "smoothed": smoothed})
                learner.update_weights(step, rate / base_rate)
                advance(1)
    finally:
        batches.close()
    return rows


def suggest_learning_rates(rows: list[dict[str, float]]) -> dict[str, float]:
    """Suggest the rate at which the smoothed loss falls fastest, and a tenth of the rate at which it is lowest.

    Only rates up to the lowest loss count, since the loss diverges beyond. Empty if the loss falls by no more than half
    of the median distance between a step's loss and the mean.
    """
    losses = [row["smoothed"] for row in rows]
    start = min(len(rows) // _WARMUP_DIVISOR, len(rows) - 2)  # at least two rows remain
    lowest = max(start + 1, min(range(start, len(rows)), key=losses.__getitem__))
    noise = statistics.median(abs(row["loss"] - row["smoothed"]) for row in rows)
    if losses[start] - losses[lowest] <= noise / 2:
        return {}
    changes = [next_loss - loss for loss, next_loss in pairwise(losses[start : lowest + 1])]
    fastest = rows[start + changes.index(min(changes))]["lr"]
    return {"steepest": fastest, "lowest_tenth": rows[lowest]["lr"] / _LOWEST_LOSS_DIVISOR}


def _figure(rows: list[dict[str, float]]) -> Plot:
    rates = [row["lr"] for row in rows]
    step_series = Series("a step's loss", rates, [row["loss"] for row in rows], "points")
    smoothed_series = Series("smoothed", rates, [row["smoothed"] for row in rows])
    return Plot("Learning rates", "learning rate", "loss", (step_series, smoothed_series), log_x=True)
