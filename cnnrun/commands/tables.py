"""What several commands print alike."""

from __future__ import annotations

from typing import Any

from cnnrun.base.console import Output

MOST_ROWS, _EXAMPLES = 30, 3


def print_findings(found: list[dict[str, Any]], out: Output) -> None:
    """Print a line for each finding, and its examples below."""
    for each in found:
        out.print(f"{each['level']}: {each['count']:,} {each['what']}")
        for example in each["examples"][:_EXAMPLES]:
            out.print(f"    {' = '.join(example)}")
        if len(each["examples"]) > _EXAMPLES:
            out.print(f"    and {each['count'] - _EXAMPLES:,} more")
    if not found:
        out.print("nothing is wrong with it")


def number(value: float | None) -> str:
    """A number; one that is not defined, such as the AP of a size that no object has, is n/a."""
    return "n/a" if value is None else f"{value:.4f}"


def width_height(size: list[int]) -> str:
    return f"{size[1]}x{size[0]}"


def shape_text(shape: list[int] | tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
