"""Formats that several commands share: findings, metrics, sizes and shapes."""

from __future__ import annotations

from typing import Any

from cnnrun.base.console import Output

MAX_ROWS, _MAX_EXAMPLES = 30, 3
_SINGULARS = {"classes without": "class without", "images of one": "image of one"}


def print_findings(findings: list[dict[str, Any]], out: Output, error: str = "error") -> None:
    """Print a line for each finding, and some examples below it; `error` is the word for what stops a training."""
    for finding in findings:
        what, level = finding["what"], error if finding["level"] == "error" else finding["level"]
        for plural, singular in _SINGULARS.items() if finding["count"] == 1 else ():
            what = what.replace(plural, singular)
        out.print(f"{level}: {finding['count']:,} {what}")
        for example in finding["examples"][:_MAX_EXAMPLES]:
            out.print(f"    {' = '.join(example)}")
        if len(finding["examples"]) > _MAX_EXAMPLES:
            out.print(f"    and {finding['count'] - _MAX_EXAMPLES:,} more")
    if not findings:
        out.print("no problems found")


def format_metric(value: float | None) -> str:
    """Format a metric; an undefined one, such as the AP of a size that no object has, is n/a."""
    return "n/a" if value is None else f"{value:.4f}"


def width_height(size: list[int]) -> str:
    """Format a size given as (height, width)."""
    return f"{size[1]}x{size[0]}"


def shape_text(shape: list[int] | tuple[int, ...]) -> str:
    """Format a shape, such as 3x32x32."""
    return "x".join(map(str, shape))
