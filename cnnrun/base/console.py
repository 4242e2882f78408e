"""How results look on a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from cnnrun.base.errors import printable

_WIDE = 10_000  # a table's width when its reader is a program or a file: nothing is cut


def console() -> Console:
    """Where results are printed: as they are, nothing in them read as markup."""
    made = _Plain(highlight=False, markup=False, emoji=False)
    return made if made.is_terminal else _Plain(highlight=False, markup=False, emoji=False, width=_WIDE)


class _Plain(Console):
    """A console that escapes control characters in what it prints."""

    def print(self, *objects: Any, **settings: Any) -> None:
        super().print(*(_escaped(each) if isinstance(each, str) else each for each in objects), **settings)


def _escaped(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))


def table(columns: list[str], rows: list[list[str]], left: int = 1) -> Table:
    """A table whose first columns are words, the others numbers."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        made.add_column(printable(column), justify="left" if number < left else "right", no_wrap=True)
    for row in rows:
        made.add_row(*(printable(cell) for cell in row))
    return made
