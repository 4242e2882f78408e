"""The pace of a training: says once, with the reason, that steps take far longer than its first ones did."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cnnrun.base.machine_load import load_average, major_page_faults
from cnnrun.base.progress import Clock, say

_WARM_UP_STEPS = 3
_WINDOW = 20  # steps whose median time is compared with that of as many first ones
_SLOWDOWN = 3.0
_MIN_WAIT_SHARE = 0.5
_FAULTS_PER_STEP = 100


class Pace:
    """Times of the steps in windows of 20."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._step_count = 0
        self._window: list[float] = []
        self._first_median: float | None = None
        self._has_warned = False
        self._wait_seconds, self._faults = clock.wait_seconds, major_page_faults()

    @contextmanager
    def time_step(self) -> Iterator[None]:
        """Context of a step; prints the notice after the first step of a window that is three times as slow."""
        start = time.perf_counter()
        yield
        self._step_count += 1
        if self._step_count > _WARM_UP_STEPS and not self._has_warned:
            self._window.append(time.perf_counter() - start)
            if len(self._window) == _WINDOW:
                self._end_window()

    def _end_window(self) -> None:
        seconds, median = sum(self._window), statistics.median(self._window)
        wait_share = (self._clock.wait_seconds - self._wait_seconds) / seconds
        faults = major_page_faults() - self._faults
        if self._first_median is None:
            self._first_median = median
        elif (ratio := median / self._first_median) >= _SLOWDOWN:
            self._has_warned = True
            say(f"steps take {ratio:.1f} times as long as the first ones: {_describe_cause(wait_share, faults)}")
        self._window.clear()
        self._wait_seconds, self._faults = self._clock.wait_seconds, major_page_faults()


def _describe_cause(wait_share: float, faults: int) -> str:
    """Describe why steps are slow; `faults` are the pages read from the disk during a window."""
    if wait_share > _MIN_WAIT_SHARE:
        return "they wait for images; data.cache and data.workers may help"
    if faults > _FAULTS_PER_STEP * _WINDOW:
        return "memory is full and is read back from the disk; a larger train.accumulate needs less"
    load, processors = load_average(), os.cpu_count() or 1  # both of the whole machine
    if load is not None and load > processors + 0.5:
        fewer = "; OMP_NUM_THREADS=1 is faster beside them for a small network" if torch.get_num_threads() > 1 else ""
        return f"other programs use the processors (load {load:.1f} on {processors}){fewer}"
    return "the processor or GPU itself has become slower, by heat or a limit of power"
