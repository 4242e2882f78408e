"""Functions that a caller adds to a training."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cnnrun.contracts.batch import Batch
from cnnrun.contracts.results import Results
from cnnrun.contracts.task import Task

# Draws a batch's images with their targets and results: (task, batch, results, names) -> uint8 [H, W, 3].
DrawFunction = Callable[[Task, Batch, Results, Sequence[str]], NDArray[np.uint8]]


@dataclass(frozen=True)
class TrainingHooks:
    """Functions that a caller adds to a training."""

    should_stop: Callable[[int, float], bool] | None = None
    """Called after each epoch with the epoch and the monitored metric; the training ends if it returns True."""
    draw: DrawFunction | None = None
    """Draws images with their targets and results for TensorBoard."""
    now: Callable[[], float] = time.perf_counter
    """The time, in seconds, by which the training's duration and speed are measured."""


NO_HOOKS = TrainingHooks()
