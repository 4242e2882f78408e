"""Signals that ask a training to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from cnnrun.base import torchrun
from cnnrun.base.errors import InterruptionError


class StopRequest:
    """The signal by which the training was asked to stop, if any."""

    def __init__(self) -> None:
        self.received_signal = 0

    @property
    def signal(self) -> int:
        """Number of the signal, or 0. If torchrun has ended, it is SIGTERM: nothing waits for this process."""
        return self.received_signal or (signal.SIGTERM if torchrun.is_orphan() else 0)


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """Raise InterruptionError at SIGINT or SIGTERM, wherever the command is, so that it can clean up and exit."""

    def interrupt(number: int, frame: object) -> None:
        raise InterruptionError(number, "stopped")

    previous_handlers = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # SLURM can send SIGUSR1 before the time limit
_REPEAT_SECONDS = 3.0  # in which torchrun repeats a signal


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn STOP_SIGNALS into a request to stop at the next step; a second signal exits at once.

    torchrun may repeat a signal that the process already got. Under torchrun a signal within three seconds of the
    first is therefore ignored.
    """
    stop, first_time, may_repeat = StopRequest(), 0.0, torchrun.can_repeat_signals()

    def request_stop(number: int, frame: object) -> None:
        nonlocal first_time
        if stop.received_signal:
            if not may_repeat or time.monotonic() - first_time > _REPEAT_SECONDS:
                os._exit(128 + number)
            return
        stop.received_signal, first_time = number, time.monotonic()
        if not torchrun.rank():
            with contextlib.suppress(OSError):  # `print` is not safe here: the signal may have interrupted one
                os.write(2, b"stopping after this step (send the signal again to exit at once) ...\n")

    previous_handlers = {number: signal.signal(number, request_stop) for number in STOP_SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
