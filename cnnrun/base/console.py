"""Printed text and tables; rich is imported only once something is printed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cnnrun.base.errors import escape

if TYPE_CHECKING:
    from rich.table import Table

_UNLIMITED_WIDTH = 10_000  # of a table in a file or pipe: no cell may be cut there


class Output:
    """Standard output for people: text without markup, with control characters escaped."""

    def __init__(self) -> None:
        from rich.console import Console

        console = Console(highlight=False, markup=False, emoji=False)
        if not console.is_terminal:
            console = Console(highlight=False, markup=False, emoji=False, width=_UNLIMITED_WIDTH)
        self._console = console

    def print(self, *objects: Any, end: str = "\n") -> None:
        """Print texts and tables."""
        self._console.print(*(_escape_lines(part) if isinstance(part, str) else part for part in objects), end=end)


def _escape_lines(text: str) -> str:
    return "\n".join(map(escape, text.split("\n")))


def build_table(columns: list[str], rows: list[list[str]], text_columns: int = 1) -> Table:
    """A table whose first `text_columns` columns are words; the others are numbers and aligned on the right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(escape(column), justify="left" if index < text_columns else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table
