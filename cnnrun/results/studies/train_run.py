"""Training as the commands run it: with result images in TensorBoard, and compared with a plan if there is one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cnnrun.experiment import run
from cnnrun.experiment.schema import Experiment
from cnnrun.explain.figures.panels import results_panel
from cnnrun.results.studies.plan import compare_with_plan


def train_run(
    experiment: Experiment,
    runs: Path,
    device: torch.device,
    resume: run.Resume,
    should_stop: Callable[[int, float], bool] | None = None,
    extend: Path | None = None,
) -> dict[str, Any]:
    """Train an experiment to its end in a run folder, as `run.train` does.

    `should_stop(epoch, monitored value)` is called after each epoch; training ends early once it returns True.
    """
    hooks = run.RunHooks(should_stop, results_panel, record=partial(compare_with_plan, runs))
    return run.train(experiment, runs, device, resume, hooks, extend)
