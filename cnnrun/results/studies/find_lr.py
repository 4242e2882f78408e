"""`cnnrun find-lr`: the loss over a range of learning rates, of a network that is thrown away (Smith 2017)."""

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
from cnnrun.experiment.assemble import assemble_job
from cnnrun.experiment.schema import Experiment
from cnnrun.experiment.training_checks import prepare_training
from cnnrun.explain.figures.png import write_plots
from cnnrun.training.determinism import deterministic_kernels
from cnnrun.training.learner import Job, Learner
from cnnrun.training.step import backward, update_weights

_SMOOTH = 0.9  # of the moving mean of the losses
_WORSE = 4.0  # times the lowest loss: it diverges, and the range ends
_UNSETTLED = 10  # a tenth of the range is not looked at
_BELOW = 10.0  # what is usual: a tenth of the rate with the lowest loss


def find_learning_rate(
    experiment: Experiment, device: torch.device, low: float, high: float, steps: int, plots: Path | None
) -> dict[str, Any]:
    """The smoothed loss at rates from `low` to `high`, and two rates that are usual to take from it."""
    if not 0 < low < high < math.inf:
        raise ConfigError("--low and --high: give a range of rates above 0, the lower one first")
    experiment, given, data = prepare_training(experiment)
    with deterministic_kernels(device, experiment.train.deterministic):
        rows = _range(assemble_job(experiment, data, given, None, device), low, high, steps)
    if len(rows) < 3:
        raise ConfigError(f"the loss is not finite from a rate of {low:g} on; give a lower --low")
    made = {
        "name": experiment.name,
        "now": experiment.train.optimizer.lr,
        "rates": rows,
        **suggest_learning_rates(rows),
    }
    return {**made, **({"plots": write_plots([_figure(rows)], plots)} if plots else {})}


def _range(made: Job, low: float, high: float, steps: int) -> list[dict[str, float]]:
    """Steps at rising rates: each with its loss and the moving mean of the losses up to there."""
    learner = Learner(made)
    batches = made.batches(made.dataset.splits["train"], made.spec.accumulate)
    base, mean, lowest, rows = made.spec.optimizer.lr, 0.0, math.inf, list[dict[str, float]]()
    try:
        with progress_bar("rates", steps) as advance:
            for step in range(steps):
                rate = low * (high / low) ** (step / (steps - 1))
                value = float(backward(learner, made, batches.at(step), step))
                mean = _SMOOTH * mean + (1 - _SMOOTH) * value
                smoothed = mean / (1 - _SMOOTH ** (step + 1))
                lowest = min(lowest, smoothed)
                if not math.isfinite(value) or smoothed > _WORSE * lowest > 0:
                    break
                rows.append({"lr": rate, "loss": value, "smoothed": smoothed})
                update_weights(learner, made, step, rate / base)
                advance(1)
    finally:
        batches.close()
    return rows


def suggest_learning_rates(rows: list[dict[str, float]]) -> dict[str, float]:
    """Where the smoothed loss falls fastest over the logarithm of the rate, and a tenth of where it is lowest.

    Both on the way down to its valley: what happens beyond, where it diverges, says nothing. Nothing where it does not
    fall by more than half of what a step's loss is off the mean.
    """
    losses = [row["smoothed"] for row in rows]
    settled = min(len(rows) // _UNSETTLED, len(rows) - 2)  # a mean of few losses is none yet
    valley = max(settled + 1, min(range(settled, len(rows)), key=losses.__getitem__))
    noise = statistics.median(abs(row["loss"] - row["smoothed"]) for row in rows)
    if losses[settled] - losses[valley] <= noise / 2:
        return {}
    falls = [later - sooner for sooner, later in pairwise(losses[settled : valley + 1])]
    fastest = rows[settled + falls.index(min(falls))]["lr"]
    return {"steepest": fastest, "lowest_tenth": rows[valley]["lr"] / _BELOW}


def _figure(rows: list[dict[str, float]]) -> Plot:
    rates = [row["lr"] for row in rows]
    raw = Series("a step's loss", rates, [row["loss"] for row in rows], "points")
    smooth = Series("smoothed", rates, [row["smoothed"] for row in rows])
    return Plot("Learning rates", "learning rate", "loss", (raw, smooth), log_x=True)
