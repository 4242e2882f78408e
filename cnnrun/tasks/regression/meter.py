"""The meter of regression: errors, intervals that deviations and quantiles promise, and plots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnnrun.contracts.facts import NumberStatistics
from cnnrun.contracts.figure import MAX_POINTS, Plot, Series
from cnnrun.contracts.results import BatchTensors, Measurement, Results
from cnnrun.contracts.task_parts import Targets
from cnnrun.tasks.intervals import bootstrap
from cnnrun.tasks.regression.residuals import Residuals

# Central share of a normal distribution -> how many standard deviations from the mean it reaches.
_DEVIATIONS_OF_LEVEL = {0.5: 0.674490, 0.8: 1.281552, 0.95: 1.959964}


class RegressMeter:
    """Meter of MAE, RMSE, R2 and the gain on a constant prediction: means over the targets, and for each target."""

    def __init__(
        self,
        numbers: Sequence[NumberStatistics],
        columns: Sequence[int],
        periods: Sequence[float | None],
        quantiles: Sequence[float],
    ) -> None:
        self._numbers, self._columns, self._periods = numbers, list(columns), list(periods)
        self._quantiles, self._batches = quantiles, BatchTensors()

    def update(self, results: Results, targets: Targets) -> None:
        self._batches.add(truth=targets["numbers"][:, self._columns], **results)

    def compute(self, tables: bool = True) -> Measurement:
        arrays = {name: values.astype(np.float64) for name, values in self._batches.concatenate().items()}
        names = [number.name for number in self._numbers]
        truth_NT, value_NT = arrays["truth"], arrays["values"]
        residuals = Residuals(value_NT, truth_NT, self._periods, [number.mean for number in self._numbers])
        metrics = residuals.metrics()
        if not tables:
            return Measurement(metrics)
        rows = {
            "per_target": residuals.per_target_rows(names),
            "intervals_said": self._interval_rows(arrays, residuals.errors),
        }
        plots = [_prediction_plot(name, truth_NT[:, t], value_NT[:, t]) for t, name in enumerate(names)]
        plots += [_residual_plot(name, value_NT[:, t], residuals.errors[t]) for t, name in enumerate(names)]
        return Measurement(
            metrics,
            {name: table for name, table in rows.items() if table},
            plots=tuple(plots),
            bootstrap_draws=bootstrap(residuals.metrics, len(residuals)),
        )

    def _interval_rows(
        self, arrays: dict[str, NDArray[np.float64]], errors: Sequence[NDArray[np.float64]]
    ) -> list[dict[str, Any]]:
        """Share of the images within predicted deviations, or below predicted quantiles, for each target."""
        rows: list[dict[str, Any]] = []
        for t, number in enumerate(self._numbers):
            if "deviations" in arrays:
                error, deviation = np.abs(errors[t]), arrays["deviations"][:, t]
                inside = {
                    f"inside {level:.0%}": float((error <= reach * deviation).mean())
                    for level, reach in _DEVIATIONS_OF_LEVEL.items()
                }
                rows.append({"target": number.name, **inside})
            if "quantiles" in arrays:
                below = (arrays["truth"][:, t, None] <= arrays["quantiles"][:, t]).mean(0).tolist()
                levels = zip(self._quantiles, below, strict=True)
                rows.append({"target": number.name, **{f"below {level:g}": share for level, share in levels}})
        return rows


def _plot_points(count: int) -> NDArray[np.int64]:
    """Indices of at most MAX_POINTS of `count` images, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, MAX_POINTS)).astype(np.int64))


def _prediction_plot(name: str, truth: NDArray[np.float64], value: NDArray[np.float64]) -> Plot:
    points = _plot_points(len(truth))
    series = Series("one point per image", truth[points].tolist(), value[points].tolist(), "points")
    return Plot(f"{name}: predicted against true", "true", "predicted", (series,), diagonal=True)


def _residual_plot(name: str, value: NDArray[np.float64], error: NDArray[np.float64]) -> Plot:
    points = _plot_points(len(value))
    series = Series("one point per image", value[points].tolist(), error[points].tolist(), "points")
    return Plot(f"{name}: residuals", "predicted", "predicted - true", (series,))
