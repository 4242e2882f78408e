"""Progress for people: a bar on a terminal, messages on stderr, and a clock for throughput."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cnnrun.base import torchrun
from cnnrun.base.errors import escape, shorten

Advance = Callable[..., None]


@contextmanager
def progress_bar(description: str, total: int, completed: int = 0) -> Iterator[Advance]:
    """Show a bar on stderr if it is a terminal, and give the function `advance(count, note="")`."""
    console = Console(stderr=True)
    if not console.is_terminal or torchrun.rank():
        yield lambda count, note="": None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True, refresh_per_second=4) as progress:
        task = progress.add_task(description, total=total, completed=completed, note="")

        def advance(count: int, note: str = "") -> None:
            progress.update(task, advance=count, note=note) if note else progress.update(task, advance=count)

        yield advance


def say(line: str) -> None:
    """Print a line for people on stderr, so that stdout holds only the command's result. Only rank 0 prints.

    Control characters are escaped. If stderr is closed or full, the line is lost and nothing fails.
    """
    if not torchrun.rank():
        with contextlib.suppress(OSError, ValueError, AttributeError):
            print(shorten(escape(line)), file=sys.stderr, flush=True)  # noqa: T201


class Clock:
    """Elapsed time, images and time spent waiting for data; nothing that is computed depends on it.

    Evaluation and saving count in `seconds`, but not in `images_per_second`. `now` gives the time in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now, self._start = now, now()
        self._excluded_seconds = 0.0
        self._wait_seconds = 0.0
        self.images = 0

    @property
    def seconds(self) -> float:
        """Time since the clock was created."""
        return self._now() - self._start

    @property
    def images_per_second(self) -> float:
        """Speed of training, without the time in `exclude_time`."""
        return self.images / (self.seconds - self._excluded_seconds)

    @property
    def wait_seconds(self) -> float:
        """Time that was spent waiting for data."""
        return self._wait_seconds

    @property
    def data_wait_share(self) -> float:
        """Share of the training time that was spent waiting for data."""
        return self._wait_seconds / (self.seconds - self._excluded_seconds)

    @contextmanager
    def record_wait(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        start = self._now()
        yield
        self._wait_seconds += self._now() - start

    @contextmanager
    def exclude_time(self) -> Iterator[None]:
        """Leave the time inside out of the training speed."""
        start = self._now()
        yield
        self._excluded_seconds += self._now() - start

    def __str__(self) -> str:
        return f"{self.images_per_second:,.0f} images/s  data {self.data_wait_share:.0%}"
