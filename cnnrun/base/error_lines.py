"""Long lists of names and problems, shortened for a message."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

from cnnrun.base.errors import DataError, escape

MAX_PROBLEMS = 10_000  # collected before the search stops
MAX_LINES = 20  # shown of one kind of problem


def join_names(names: Sequence[str], max_names: int = MAX_LINES) -> str:
    """The first `max_names` names separated by commas, and how many more there are."""
    shown = ", ".join(map(escape, names[:max_names]))
    return shown + (f" and {len(names) - max_names:,} more" if len(names) > max_names else "")


def truncate_lines(lines: Sequence[str], noun: str) -> list[str]:
    """The first lines, and a line that says how many more there are; `noun` is what they are about, such as "files"."""
    rest = [f"... and {len(lines) - MAX_LINES:,} more {noun}"] if len(lines) > MAX_LINES else []
    return [*lines[:MAX_LINES], *rest]


def check_problems(problems: Iterable[str]) -> None:
    """Raise DataError with the first problems and how many more there are; do nothing if there are none.

    At most MAX_PROBLEMS are collected. After that the count is a lower bound and the message says "or more".
    """
    if problems := list(islice(problems, MAX_PROBLEMS)):
        count = f"{len(problems) - MAX_LINES:,}" + (" or" if len(problems) >= MAX_PROBLEMS else "")
        rest = [f"... and {count} more mistakes"] if len(problems) > MAX_LINES else []
        raise DataError(*problems[:MAX_LINES], *rest)
