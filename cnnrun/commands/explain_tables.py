"""What the explain commands print for people."""

from __future__ import annotations

from typing import Any

from cnnrun.base.console import console, table
from cnnrun.base.errors import printable

_MOST_ROWS = 40


def explained(data: dict[str, Any]) -> None:
    """What was seen in one line, its numbers where they are few, and where the picture is."""
    out = console()
    rows = data[data["table"]] if data["table"] else []
    if rows:
        shown = [row for row in rows if isinstance(row, dict)][:_MOST_ROWS]
        plain = [name for row in shown for name, value in row.items() if not isinstance(value, list | dict)]
        columns = list(dict.fromkeys(plain))
        out.print(table(columns, [[_cell(row.get(name, "")) for name in columns] for row in shown]))
        if len(rows) > len(shown):
            out.print(f"and {len(rows) - len(shown):,} more (--json has them all)")
    out.print(printable(data["caption"]))
    for key in ("path", "features"):
        if key in data:
            out.print(printable(data[key]))


def _cell(value: object) -> str:
    return "n/a" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
