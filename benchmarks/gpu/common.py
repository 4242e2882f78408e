"""Helpers of the steps: results as lines of JSON, options, time limits, and a training that can be run step by step."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
_MARGIN = 3.0  # seconds between the time when a step should be done and the time when it is killed
_TRACE_LINES = 15
_SHORTEST = 0.001  # seconds; a timer of 0 would never end the block

# Has everything that may differ between devices or processes: dropout, augmentation, batch norm, averages, momentum.
RICH = """
task: classify
data: {source: digits, split: {val: 0.2, test: 0.2}, augment: {shift: 0.2, rotate: 8}}
model:
  - conv: {out_channels: 16, norm: batch, activation: relu}
  - max_pool
  - conv: {out_channels: 32, norm: batch, activation: relu}
  - flatten
  - dropout: 0.2
  - linear: {out_features: 32, activation: relu}
train:
  epochs: 3
  batch: 64
  clip: 1.0
  ema: {decay: 0.9}
  optimizer: {sgd: {lr: 0.05, momentum: 0.9, nesterov: true}}
  monitor: val/accuracy
"""


class TimeIsUpError(BaseException):
    """A time limit was exceeded. Not an Exception, so that code that handles errors does not handle this one."""


@dataclass(frozen=True)
class Options:
    """The device of a step, its size, and its end."""

    device: torch.device
    is_small: bool
    until: float

    @property
    def seconds_left(self) -> float:
        """Seconds until the step should be done."""
        return self.until - time.monotonic()


def parse_options(doc: str | None) -> Options:
    """Return a step's options, from its command line or from gpu_check."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=os.environ.get("CNNRUN_GPU_CHECK_DEVICE", "cuda"))
    parser.add_argument("--small", action="store_true", default=bool(os.environ.get("CNNRUN_GPU_CHECK_SMALL")))
    parser.add_argument("--seconds", type=float, default=float(os.environ.get("CNNRUN_GPU_CHECK_SECONDS", "600")))
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds - _MARGIN
    return Options(choose_step_device(arguments.device), arguments.small, end)


def choose_step_device(name: str) -> torch.device:
    """Return the device that cnnrun would choose; without cnnrun's dependencies, the device of that name."""
    try:
        from cnnrun.base.device import choose_device
    except ImportError:
        return torch.device(name)
    return choose_device(name)


def emit(what: str, **figures: Any) -> None:
    """Print a result as a line of JSON. A failure has `ok=False` and a `reason`; `ok=True` drops the reason."""
    if figures.get("ok") is True:
        figures.pop("reason", None)
    print(json.dumps({"what": what, **{key: _plain(value) for key, value in figures.items()}}, default=str), flush=True)


def _plain(value: Any) -> Any:
    """Return a value for JSON: floats with six digits, values that are not finite as text."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


@contextmanager
def attempt(what: str, seconds: float = math.inf, **about: Any) -> Iterator[None]:
    """Emit an error in the block as a failed result and continue. A block that takes `seconds` is ended and skipped."""
    try:
        with within(seconds):
            yield
    except TimeIsUpError:
        emit(what, **about, skipped=f"not done after {max(seconds, 0):.0f} s")
    except Exception as error:
        lines = traceback.format_exc().splitlines()[-_TRACE_LINES:]
        first = (str(error).splitlines() or [""])[0]
        emit(what, **about, ok=False, reason=f"{type(error).__name__}: {first}", lines=lines)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise TimeIsUpError in the block once it has taken `seconds`; at once if that is not more than 0."""
    if math.isinf(seconds):
        yield
        return

    def leave(number: int, frame: object) -> None:
        raise TimeIsUpError

    before = signal.signal(signal.SIGALRM, leave)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, _SHORTEST))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def write_arrays(path: Path, count: int, side: int, channels: int = 1, classes: int = 10) -> Path:
    """Write random images and labels as a .npz file, with a quarter as many for val."""
    generator = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for name, size in (("train", count), ("val", max(classes, count // 4))):
        shape = (size, side, side, channels) if channels > 1 else (size, side, side)
        arrays[f"x_{name}"] = generator.integers(0, 256, shape, dtype=np.uint8)
        arrays[f"y_{name}"] = np.arange(size) % classes
    np.savez(path, **arrays)
    return path


@contextmanager
def start_training(setup: Any) -> Iterator[Any]:
    """Yield a `TrainingLoop` as `loop.fit` builds it, before its first step."""
    from cnnrun.training.hooks import NO_HOOKS
    from cnnrun.training.learner import Learner
    from cnnrun.training.loop import TrainingLoop
    from cnnrun.training.metrics_log import NoMetricsLog
    from cnnrun.training.state import TrainingState

    learner, state = Learner(setup), TrainingState(accumulate=setup.spec.accumulate)
    learner.precompute_frozen_features()
    with closing(learner.setup.batches(state.accumulate)) as batches:
        yield TrainingLoop(learner, batches, state, NoMetricsLog(), NO_HOOKS)
