"""Evaluation of a trained network on a split, with confidence intervals and figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cnnrun.base.ranks import join_ranks
from cnnrun.experiment.open_run import open_trained, prepare_eval_data
from cnnrun.explain.figures.png import write_plots
from cnnrun.results.inference import InferenceNetwork
from cnnrun.tasks.intervals import confidence_intervals
from cnnrun.training.evaluation import measure_split


def evaluate_run(
    run: Path | None,
    runs: Path,
    device: torch.device,
    split: str | None,
    plots: Path | None = None,
    fast: bool = False,
) -> dict[str, Any]:
    """Measure a run's network on a split: metrics, confidence intervals, tables and matrices.

    Figures are written into the folder `plots`, if given. `fast` measures it as `predict --fast` computes, in bfloat16.
    With several ranks, every rank must call this.
    """
    experiment, trained = open_trained(run, runs, device)
    split_name, data = prepare_eval_data(experiment, trained, split)
    examples, batch, measured = data.splits[split_name], experiment.train.batch, trained.to_measure()
    if fast:
        measured = replace(measured, forward=InferenceNetwork(trained, fast).outputs)
    with join_ranks(device, experiment.train.timeout) as ranks:
        ranks.barrier(long_timeout=True)
        measurement = measure_split(measured, examples, batch, ranks)
    return {
        "run": str(trained.run),
        "step": trained.step,
        **({"precision": "bfloat16"} if fast else {}),
        "split": split_name,
        "samples": len(data.splits[split_name]),
        "numbers": measurement.metrics,
        "intervals": confidence_intervals(measurement.metrics, measurement.bootstrap_draws, measurement.correct),
        "tables": measurement.tables,
        "matrices": measurement.matrices,
        **({"plots": write_plots(measurement.plots, plots)} if plots else {}),
    }
