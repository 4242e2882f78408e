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
    """Whether, and by which signal, the training was asked to stop."""

    def __init__(self) -> None:
        self.signal_number = 0

    @property
    def signal(self) -> int:
        """The signal's number, 0 while there is none. That torchrun is gone counts as SIGTERM: nobody waits for us."""
        return self.signal_number or (signal.SIGTERM if torchrun.is_orphan() else 0)


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """SIGINT and SIGTERM end a command, which puts away what it had begun. Raises Interrupted wherever it is."""

    def leave(number: int, frame: object) -> None:
        raise InterruptionError(number, "stopped")

    before = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # the last is what SLURM sends before the time is over
_ECHO_SECONDS = 3.0


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """These signals ask for a stop at the next step; a second one leaves at once.

    Where torchrun may pass a signal on that came already, what follows within three seconds is no second one.
    """
    stop, asked, echoed = StopRequest(), 0.0, torchrun.can_repeat_signals()

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if stop.signal_number:
            if not echoed or time.monotonic() - asked > _ECHO_SECONDS:
                os._exit(128 + number)
            return
        stop.signal_number, asked = number, time.monotonic()
        if not torchrun.rank():
            with contextlib.suppress(OSError):  # not `print`, in the middle of which the signal may have come
                os.write(2, b"stopping after this step (once more to leave at once) ...\n")

    before = {number: signal.signal(number, ask) for number in STOP_SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
