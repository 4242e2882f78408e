"""A trained network measured on a split, with intervals and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cnnrun.base.ranks import join_ranks
from cnnrun.experiment.open_run import open_trained, prepare_eval_data
from cnnrun.explain.figures.png import write_plots
from cnnrun.tasks.intervals import confidence_intervals
from cnnrun.training.evaluation import measure_split


def evaluate_run(
    target: Path | None, root: Path, device: torch.device, split: str | None, plots: Path | None = None
) -> dict[str, Any]:
    """A trained network's numbers on a split, with figures in a folder `plots`; of several ranks all come here."""
    experiment, given = open_trained(target, root, device)
    name, data = prepare_eval_data(experiment, given, split)
    examples, batch = data.splits[name], experiment.train.batch
    with join_ranks(device, experiment.train.timeout) as ranks:
        ranks.barrier(long_timeout=True)
        criterion = None if given.task.is_open_set else given.criterion
        measured = measure_split(given.network, criterion, given.task, given.facts, examples, batch, device, ranks)
    return {
        "run": str(given.run),
        "step": given.step,
        "split": name,
        "samples": len(data.splits[name]),
        "numbers": measured.metrics,
        "intervals": confidence_intervals(measured.metrics, measured.bootstrap_draws, measured.correct),
        "tables": measured.tables,
        "matrices": measured.matrices,
        **({"plots": write_plots(measured.plots, plots)} if plots else {}),
    }
