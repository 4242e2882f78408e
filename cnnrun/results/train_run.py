"""A training as the commands do it: with drawings in TensorBoard and, where there is a plan, what came of it."""

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
    root: Path,
    device: torch.device,
    resume: bool,
    strict: bool = False,
    should_stop: Callable[[int, float], bool] | None = None,
) -> dict[str, Any]:
    """Train to the end in a run folder: see `run.train`. `enough` is asked after each epoch if training may end."""
    hooks = run.Hooks(should_stop, results_panel, partial(compare_with_plan, root))
    return run.train(experiment, root, device, resume, strict, hooks)
