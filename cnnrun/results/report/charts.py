"""Figures as Vega-Lite specifications, for pages: what a browser draws, as text that a screen reader reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from cnnrun.contracts.figure import MAX_POINTS, Plot, Series

VegaSpec = dict[str, Any]
_WIDTH, _HEIGHT, _CELL = 250, 200, 22  # pixels
MAX_MATRIX_CLASSES, _MOST_NUMBERED = 30, 20  # of a matrix: those drawn, those with their counts written in
_LEGEND = {"orient": "bottom", "columns": 2, "labelLimit": 300}


def vega_spec(plot: Plot) -> VegaSpec:
    """A figure; its series are told apart by colour and, for lines, by their points' tooltips."""
    layers = [_layer(plot, series) for series in plot.series]
    if plot.diagonal:
        line = [{"x": end, "y": end} for end in _ends(plot)]
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
        "description": f"{plot.title}: {plot.y} by {plot.x}; {names}",
        "width": _WIDTH,
        "height": max(_HEIGHT, _CELL * len(plot.ticks)),
        "layer": layers,
    }


def _layer(plot: Plot, series: Series) -> VegaSpec:
    step = max(1, len(series.x) // MAX_POINTS)
    values: list[dict[str, Any]] = [
        {"x": float(x), "y": float(y), "series": series.name}
        for x, y in zip(series.x[::step], series.y[::step], strict=True)
        if math.isfinite(x) and math.isfinite(y)
    ]
    if series.style == "spans":
        return _spans(plot, series, values)
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
            "title": plot.x,
            "scale": {"type": "log"} if plot.log_x else _scale(plot),
        },
        "y": {"field": "y", "type": "quantitative", "title": plot.y, "scale": _scale(plot)},
        "color": {"field": "series", "type": "nominal", "title": None, "legend": legend, "sort": None},
        "tooltip": [{"field": name, "type": kind} for name, kind in _TOLD],
    }
    return {"data": {"values": values}, "mark": marks[series.style], "encoding": encoding}


def _scale(plot: Plot) -> VegaSpec:
    """The same along both axes where the diagonal means something."""
    return {"zero": False} | ({"domain": _ends(plot), "nice": False} if plot.diagonal else {})


def _ends(plot: Plot) -> list[float]:
    values = [float(value) for series in plot.series for value in (*series.x, *series.y) if math.isfinite(value)]
    if any(series.style == "bars" for series in plot.series):
        values.append(0.0)  # where bars begin
    return [min(values, default=0.0), max(values, default=1.0)]


_TOLD = (("series", "nominal"), ("x", "quantitative"), ("y", "quantitative"))


def _bar_width(series: Series) -> float:
    places = sorted({float(x) for x in series.x if math.isfinite(x)})
    if len(places) < 2:
        return _WIDTH / 10
    apart = min(b - a for a, b in pairwise(places))
    return max(2.0, 0.8 * _WIDTH * apart / (places[-1] - places[0] + apart))


def _spans(plot: Plot, series: Series, values: list[dict[str, Any]]) -> VegaSpec:
    """Points with spans around x, a row of the figure each, under the names of `ticks`."""
    rows = [
        value | {"low": low, "high": high, "name": plot.ticks[round(value["y"])] if plot.ticks else str(value["y"])}
        for value, low, high in zip(values, series.low, series.high, strict=True)
    ]
    y = {"field": "name", "type": "nominal", "title": plot.y or None, "sort": None}
    x = {"field": "low", "type": "quantitative", "title": plot.x}
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
    """A confusion matrix: rows are true classes, shade is the part of the row; None for too many classes to draw."""
    if len(classes) > MAX_MATRIX_CLASSES:
        return None
    values = [
        {"row": row, "column": column, "count": count, "part": count / max(1, sum(of_row))}
        for row, of_row in enumerate(counts)
        for column, count in enumerate(of_row)
    ]
    names = {"values": [{"number": number, "name": name} for number, name in enumerate(classes)]}
    looked_up = [  # so that long names stand once
        {"lookup": place, "from": {"data": names, "key": "number", "fields": ["name"]}, "as": [what]}
        for place, what in (("row", "true"), ("column", "predicted"))
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
    told = [{"field": name} for name in ("true", "predicted", "count")]
    rectangles = {"mark": "rect", "encoding": {"x": x, "y": y, "color": shade | {"legend": None}, "tooltip": told}}
    layers = [rectangles, _written(x, y)] if len(classes) <= _MOST_NUMBERED else [rectangles]
    side = {"step": _CELL + 6} if len(classes) <= _MOST_NUMBERED else max(_WIDTH, 6 * len(classes))
    return {
        "title": title,
        "description": f"{title}: how often each true class (row) was taken for each (column)",
        "width": side,
        "height": side,
        "data": {"values": values},
        "transform": looked_up,
        "layer": layers,
    }


def _written(x: VegaSpec, y: VegaSpec) -> VegaSpec:
    """The counts that are not 0, in the cells of a matrix."""
    dark = {"condition": {"test": "datum.part > 0.5", "value": "white"}, "value": "#1b2733"}
    return {
        "transform": [{"filter": "datum.count > 0"}],
        "mark": {"type": "text", "fontSize": 10, "aria": False},
        "encoding": {"x": x, "y": y, "text": {"field": "count", "type": "quantitative"}, "color": dark},
    }
