"""A figure as plain data, independent of the library that draws it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Style = Literal["points", "line", "bars", "spans"]
MAX_POINTS = 3000  # of a series; a longer one is thinned to points at equal distances


@dataclass(frozen=True)
class Series:
    """Points of one kind. `low` and `high`, if they are not empty, are the ends of the spans along x."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: Style = "line"
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Plot:
    """A figure; `diagonal` draws the line x = y, `ticks` label y at 0, 1, ...

    `table` is the name of the measurement's table that the figure shows, so that a report need not print it.
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    diagonal: bool = False
    log_x: bool = False
    ticks: tuple[str, ...] = ()
    table: str = ""
