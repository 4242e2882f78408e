"""What is shown while something runs: a live bar on a terminal, nothing that a log file would have to unpick."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Advance = Callable[..., None]


@contextmanager
def bar(what: str, total: int, done: int = 0) -> Iterator[Advance]:
    """A bar on stderr while a terminal is there; gives `advance(count, note="")`."""
    console = Console(stderr=True)
    if not console.is_terminal:
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
    """A line for people, on stderr, so that stdout stays the command's result."""
    print(line, file=sys.stderr, flush=True)  # noqa: T201
