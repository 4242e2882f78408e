"""Plots as PNG files, drawn by matplotlib."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cnnrun.base.atomic_files import make_folder, write_file
from cnnrun.base.errors import escape
from cnnrun.contracts.figure import Plot, Series


def write_plots(plots: Sequence[Plot], folder: Path) -> list[str]:
    """Write each plot into the folder, named by its title; returns the paths. Raises StorageError."""
    make_folder(folder)
    names = [_file_name(plot.title) for plot in plots]
    repeats = [names[:index].count(name) for index, name in enumerate(names)]  # titles such as x+ and x- give one name
    paths = [
        folder / f"{name}{f'-{repeat + 1}' if repeat else ''}.png" for name, repeat in zip(names, repeats, strict=True)
    ]
    for plot, path in zip(plots, paths, strict=True):
        write_file(path, render_png(plot))
    return [str(path) for path in paths]


def render_png(plot: Plot) -> bytes:
    """Draw a plot as PNG."""
    from matplotlib.figure import Figure

    max_length = max((len(tick) for tick in plot.ticks), default=0)
    size = (6.4 + min(8.0, 0.07 * max_length), max(4.8, 0.25 * len(plot.ticks)))  # inches
    figure = Figure(figsize=size, layout="constrained")
    axes: Any = figure.add_subplot()
    for series in plot.series:
        _draw_series(axes, series)
    if plot.diagonal:
        axes.axline((0, 0), slope=1, color="grey", linewidth=0.8, linestyle="--", zorder=0)
    if plot.log_x:
        axes.set_xscale("log")
    if plot.ticks:
        axes.set_yticks(range(len(plot.ticks)), [_escape_mathtext(tick) for tick in plot.ticks])
    axes.set(
        title=_escape_mathtext(plot.title), xlabel=_escape_mathtext(plot.x_label), ylabel=_escape_mathtext(plot.y_label)
    )
    if len(plot.series) > 1:
        axes.legend([_escape_mathtext(series.name) for series in plot.series])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _draw_series(axes: Any, series: Series) -> None:
    name = _escape_mathtext(series.name)
    if series.style == "points":
        axes.plot(series.x, series.y, ".", markersize=4, alpha=0.5, label=name)
    elif series.style == "bars":
        width = 0.8 * min((b - a for a, b in zip(series.x, series.x[1:], strict=False)), default=0.1)
        axes.bar(series.x, series.y, width=width, alpha=0.3, label=name)
    elif series.style == "spans":
        errors = [[x - low for x, low in zip(series.x, series.low, strict=True)],
                [high - x for x, high in zip(series.x, series.high, strict=True)]]  # fmt: skip
        axes.errorbar(series.x, series.y, xerr=errors, fmt="o", capsize=3, label=name)
    else:
        axes.plot(series.x, series.y, marker="." if len(series.x) <= 50 else "", label=name)


def _escape_mathtext(text: str) -> str:
    """Escape dollars, between which matplotlib would read formulas."""
    return escape(text).replace("$", r"\$")


def _file_name(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")[:100] or "figure"
