"""A figure as data: what a meter or a command wants drawn, whoever draws it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Style = Literal["points", "line", "bars", "spans"]
MAX_POINTS = 3000  # of a series; of more, some at equal distances are shown


@dataclass(frozen=True)
class Series:
    """Points of one kind. `low` and `high`, where given, are the ends of the spans around y."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: Style = "line"
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Plot:
    """A figure with its axes' names; `diagonal` draws where x equals y; `ticks` names the places 0, 1, ... of y."""

    title: str
    x: str
    y: str
    series: tuple[Series, ...]
    diagonal: bool = False
    log_x: bool = False
    ticks: tuple[str, ...] = ()
