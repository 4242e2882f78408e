"""What is shown while something runs: a live bar on a terminal, nothing that a log file would have to unpick."""

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
def progress_bar(what: str, total: int, done: int = 0) -> Iterator[Advance]:
    """A bar on stderr while a terminal is there; gives `advance(count, note="")`."""
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
        task = progress.add_task(what, total=total, completed=done, note="")

        def advance(count: int, note: str = "") -> None:
            progress.update(task, advance=count, note=note) if note else progress.update(task, advance=count)

        yield advance


def say(line: str) -> None:
    """Print a line for people on stderr, so that stdout stays the command's result. Of several ranks the first speaks.

    Control characters are escaped. A stderr that is closed or full costs the line alone.
    """
    if not torchrun.rank():
        with contextlib.suppress(OSError, ValueError, AttributeError):
            print(shorten(escape(line)), file=sys.stderr, flush=True)  # noqa: T201


class Clock:
    """Seconds, pictures and waiting, for people; nothing that is computed depends on it.

    Evaluation and saving count to `seconds`, but not to the speed of training.
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._aside = 0.0
        self._waited = 0.0
        self.images = 0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    @property
    def images_per_second(self) -> float:
        return self.images / (self.seconds - self._aside)

    @property
    def data_wait_share(self) -> float:
        return self._waited / (self.seconds - self._aside)

    @contextmanager
    def record_wait(self) -> Iterator[None]:
        """Time spent waiting for data."""
        before = time.perf_counter()
        yield
        self._waited += time.perf_counter() - before

    @contextmanager
    def exclude_time(self) -> Iterator[None]:
        """Time spent on something else than training."""
        before = time.perf_counter()
        yield
        self._aside += time.perf_counter() - before

    def __str__(self) -> str:
        return f"{self.images_per_second:,.0f} images/s  data {self.data_wait_share:.0%}"
