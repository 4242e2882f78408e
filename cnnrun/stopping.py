"""Signals that ask a training to stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from cnnrun.progress import say


class Stop:
    """Which signal asked to stop, 0 while none has."""

    signal = 0


@contextmanager
def stopping() -> Iterator[Stop]:
    """SIGINT and SIGTERM ask for a stop at the next step; a second one leaves at once."""
    stop = Stop()

    def ask(number: int, frame: object) -> None:
        if stop.signal:
            os._exit(128 + number)
        stop.signal = number
        say("stopping after this step (once more to leave at once) ...")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
