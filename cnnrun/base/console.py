"""How results look on a terminal; rich is imported only once something is printed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cnnrun.base.errors import escape

if TYPE_CHECKING:
    from rich.table import Table

_WIDE = 10_000  # a table's width when its reader is a program or a file: nothing is cut


class Output:
    """Stdout for people: text as it is, nothing in it read as markup, control characters escaped."""

    def __init__(self) -> None:
        from rich.console import Console

        terminal = Console(highlight=False, markup=False, emoji=False)
        if not terminal.is_terminal:
            terminal = Console(highlight=False, markup=False, emoji=False, width=_WIDE)
        self._console = terminal

    def print(self, *objects: Any, end: str = "\n") -> None:
        """Print texts and tables."""
        self._console.print(*(_escaped(each) if isinstance(each, str) else each for each in objects), end=end)


def _escaped(text: str) -> str:
    return "\n".join(map(escape, text.split("\n")))


def build_table(columns: list[str], rows: list[list[str]], text_columns: int = 1) -> Table:
    """A table whose first columns are words, the others numbers."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        made.add_column(escape(column), justify="left" if number < text_columns else "right", no_wrap=True)
    for row in rows:
        made.add_row(*(escape(cell) for cell in row))
    return made
