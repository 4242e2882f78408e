"""Lists of names and mistakes as a few lines of a message."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

from cnnrun.base.errors import DataError, escape

MAX_PROBLEMS = 10_000  # that are gathered


MAX_LINES = 20  # of mistakes of one kind that are told


def join_names(names: Sequence[str], most: int = MAX_LINES) -> str:
    """Names for a message; of more than `most` the first, and how many more there are."""
    shown = ", ".join(map(escape, names[:most]))
    return shown + (f" and {len(names) - most:,} more" if len(names) > most else "")


def truncate_lines(lines: Sequence[str], what: str) -> list[str]:
    """The first lines for a message, and how many more `what` there are."""
    more = [f"... and {len(lines) - MAX_LINES:,} more {what}"] if len(lines) > MAX_LINES else []
    return [*lines[:MAX_LINES], *more]


def refuse_problems(problems: Iterable[str]) -> None:
    """Raise a DataError of these lines, the first of them where they are many; nothing where there are none.

    No more of them are gathered than a message needs to say how many there are, roughly.
    """
    if problems := list(islice(problems, MAX_PROBLEMS)):
        left = f"{len(problems) - MAX_LINES:,}" + (" or" if len(problems) >= MAX_PROBLEMS else "")
        more = [f"... and {left} more mistakes"] if len(problems) > MAX_LINES else []
        raise DataError(*problems[:MAX_LINES], *more)
