"""Signals that ask a training to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from cnnrun import torchrun
from cnnrun.errors import Interrupted


class Stop:
    """Which signal asked to stop, 0 while none has."""

    signal = 0


@contextmanager
def leaving() -> Iterator[None]:
    """SIGINT and SIGTERM end a command, which puts away what it had begun. Raises Interrupted wherever it is."""

    def leave(number: int, frame: object) -> None:
        raise Interrupted(number, "stopped")

    before = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # the last is what SLURM sends before the time is over
_ECHO_SECONDS = 3.0


@contextmanager
def stopping() -> Iterator[Stop]:
    """These signals ask for a stop at the next step; a second one leaves at once.

    Where torchrun may pass a signal on that came already, what follows within three seconds is no second one.
    """
    stop, asked, echoed = Stop(), 0.0, torchrun.echoes()

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if stop.signal:
            if not echoed or time.monotonic() - asked > _ECHO_SECONDS:
                os._exit(128 + number)
            return
        stop.signal, asked = number, time.monotonic()
        if not torchrun.rank():
            with contextlib.suppress(OSError):  # not `print`, in the middle of which the signal may have come
                os.write(2, b"stopping after this step (once more to leave at once) ...\n")

    before = {number: signal.signal(number, ask) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
