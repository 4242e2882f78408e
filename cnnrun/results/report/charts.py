"""Figures as Vega-Lite specifications, with descriptions that a screen reader reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from cnnrun.contracts.figure import MAX_POINTS, Plot, Series

VegaSpec = dict[str, Any]
_WIDTH, _HEIGHT, _CELL = 250, 200, 22  # pixels
# Larger matrices are not drawn, and those in between have no counts in their cells.
MAX_MATRIX_CLASSES, _MAX_NUMBERED_CLASSES = 30, 20
_LEGEND = {"orient": "bottom", "columns": 2, "labelLimit": 300}


def vega_spec(plot: Plot) -> VegaSpec:
    """Specify the chart of a figure; its series differ by colour, and each point's tooltip names its series."""
    layers = [_series_layer(plot, series) for series in plot.series]
    if plot.diagonal:
        line = [{"x": end, "y": end} for end in _value_range(plot)]
        layers.append(
            {
                "data": {"values": line},
                "mark": {"type": "line", "strokeDash": [4, 4], "color": "gray", "aria": False},
                "encoding": {"x": {"field": "x", "type": "quantitative"}, "y": {"field": "y", "type": "quantitative"}},
            }
        )
    names = ", ".join(series.name for series in plot.series)
    return {
        "title": plot.title,
        "description": f"{plot.title}: {plot.y_label} by {plot.x_label}; {names}",
        "width": _WIDTH,
        "height": max(_HEIGHT, _CELL * len(plot.ticks)),
        "layer": layers,
    }


def _series_layer(plot: Plot, series: Series) -> VegaSpec:
    values = _point_values(series)
    if series.style == "spans":
        return _spans_layer(plot, values)
    marks: dict[str, VegaSpec] = {
        "points": {"type": "point", "filled": True, "size": 14, "opacity": 0.5},
        "line": {"type": "line", "point": len(values) <= 60},
        "bars": {"type": "bar", "opacity": 0.35, "width": _bar_width(series)},
    }
    legend = _LEGEND if len(plot.series) > 1 else None
    encoding = {
        "x": {
            "field": "x",
            "type": "quantitative",
            "title": plot.x_label,
            "scale": {"type": "log"} if plot.log_x else _axis_scale(plot),
        },
        "y": {"field": "y", "type": "quantitative", "title": plot.y_label, "scale": _axis_scale(plot)},
        "color": {"field": "series", "type": "nominal", "title": None, "legend": legend, "sort": None},
        "tooltip": [{"field": name, "type": kind} for name, kind in _TOOLTIP_FIELDS],
    }
    return {"data": {"values": values}, "mark": marks[series.style], "encoding": encoding}


def _point_values(series: Series) -> list[dict[str, Any]]:
    """The finite points of a series, thinned to about MAX_POINTS, with the ends of their spans if it has spans."""
    columns = {"x": series.x, "y": series.y}
    if series.style == "spans":
        columns |= {"low": series.low, "high": series.high}
    step = max(1, len(series.x) // MAX_POINTS)
    points = zip(*(column[::step] for column in columns.values()), strict=True)
    rows = [dict(zip(columns, map(float, point), strict=True)) for point in points]
    return [{**row, "series": series.name} for row in rows if all(map(math.isfinite, row.values()))]


def _axis_scale(plot: Plot) -> VegaSpec:
    """Scale of an axis. Both axes share one domain if the plot has a diagonal."""
    return {"zero": False} | ({"domain": _value_range(plot), "nice": False} if plot.diagonal else {})


def _value_range(plot: Plot) -> list[float]:
    values = [float(value) for series in plot.series for value in (*series.x, *series.y) if math.isfinite(value)]
    if any(series.style == "bars" for series in plot.series):
        values.append(0.0)  # bars start at 0
    return [min(values, default=0.0), max(values, default=1.0)]


_TOOLTIP_FIELDS = (("series", "nominal"), ("x", "quantitative"), ("y", "quantitative"))


def _bar_width(series: Series) -> float:
    positions = sorted({float(x) for x in series.x if math.isfinite(x)})
    if len(positions) < 2:
        return _WIDTH / 10
    spacing = min(b - a for a, b in pairwise(positions))
    return max(2.0, 0.8 * _WIDTH * spacing / (positions[-1] - positions[0] + spacing))


def _spans_layer(plot: Plot, values: list[dict[str, Any]]) -> VegaSpec:
    """Specify points with intervals along x, each in a row that is named by the plot's ticks."""
    rows = [value | {"name": plot.ticks[round(value["y"])] if plot.ticks else str(value["y"])} for value in values]
    y = {"field": "name", "type": "nominal", "title": plot.y_label or None, "sort": None}
    x = {"field": "low", "type": "quantitative", "title": plot.x_label}
    return {
        "data": {"values": rows},
        "layer": [
            {"mark": "rule", "encoding": {"x": x, "x2": {"field": "high"}, "y": y}},
            {
                "mark": {"type": "point", "filled": True},
                "encoding": {"x": {"field": "x", "type": "quantitative"}, "y": y},
            },
        ],
    }


def matrix_spec(title: str, counts: Sequence[Sequence[int]], classes: Sequence[str]) -> VegaSpec | None:
    """Specify a confusion matrix, shaded by the share of the row (the true class); None for too many classes."""
    if len(classes) > MAX_MATRIX_CLASSES:
        return None
    values = [
        {"row": row, "column": column, "count": count, "part": count / max(1, sum(row_counts))}
        for row, row_counts in enumerate(counts)
        for column, count in enumerate(row_counts)
    ]
    names = {"values": [{"number": number, "name": name} for number, name in enumerate(classes)]}
    name_lookups = [  # so that the page holds each class name once
        {"lookup": field, "from": {"data": names, "key": "number", "fields": ["name"]}, "as": [name_field]}
        for field, name_field in (("row", "true"), ("column", "predicted"))
    ]
    order = list(classes)
    x = {"field": "predicted", "type": "nominal", "sort": order, "axis": {"labelAngle": -40, "labelLimit": 90}}
    y = {"field": "true", "type": "nominal", "sort": order, "axis": {"labelLimit": 90}}
    shade = {
        "field": "part",
        "type": "quantitative",
        "title": "of the row",
        "scale": {"scheme": "blues", "domain": [0, 1]},
    }
    tooltip = [{"field": name} for name in ("true", "predicted", "count")]
    rectangles = {"mark": "rect", "encoding": {"x": x, "y": y, "color": shade | {"legend": None}, "tooltip": tooltip}}
    layers = [rectangles, _count_labels(x, y)] if len(classes) <= _MAX_NUMBERED_CLASSES else [rectangles]
    size = {"step": _CELL + 6} if len(classes) <= _MAX_NUMBERED_CLASSES else max(_WIDTH, 6 * len(classes))
    return {
        "title": title,
        "description": f"{title}: how often each true class (row) was predicted as each class (column)",
        "width": size,
        "height": size,
        "data": {"values": values},
        "transform": name_lookups,
        "layer": layers,
    }


def _count_labels(x: VegaSpec, y: VegaSpec) -> VegaSpec:
    """Specify the text of a matrix's cells: the counts that are not 0."""
    colour = {"condition": {"test": "datum.part > 0.5", "value": "white"}, "value": "#1b2733"}
    return {
        "transform": [{"filter": "datum.count > 0"}],
        "mark": {"type": "text", "fontSize": 10, "aria": False},
        "encoding": {"x": x, "y": y, "text": {"field": "count", "type": "quantitative"}, "color": colour},
    }
