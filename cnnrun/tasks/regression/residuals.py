"""Metrics of regression, for any weights of the images. Differences of angles go the short way round the circle."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cnnrun.contracts.results import RankedRows

Floats = NDArray[np.float64]


def wrap_difference(difference: Floats, period: float | None) -> Floats:
    """Wrap a difference of angles to [-period / 2, period / 2); return it unchanged if `period` is None."""
    if period is None:
        return difference
    wrapped: Floats = (difference + period / 2) % period - period / 2
    return wrapped


def circular_mean(values_N: Floats, period: float, weight_N: Floats | None = None) -> float:
    """Mean of angles: the direction of the mean of their unit vectors."""
    mean_vector = np.average(np.exp(2j * np.pi * values_N / period), weights=weight_N)
    return float(np.angle(mean_vector) * period / (2 * np.pi))


class Residuals:
    """Predicted minus true values of T targets for N images, and their metrics.

    `periods` has the period of each angle, and None for other numbers. The metrics compare with a constant prediction:
    `mean_T`, the means over the training images, and for angles the circular mean of these images.
    """

    def __init__(
        self, value_NT: Floats, truth_NT: Floats, periods: Sequence[float | None], mean_T: Sequence[float]
    ) -> None:
        self._truth, self._periods = truth_NT, periods
        self._errors = [wrap_difference(value_NT[:, t] - truth_NT[:, t], period) for t, period in enumerate(periods)]
        constants = [
            mean if period is None else circular_mean(truth_NT[:, t], period)
            for t, (period, mean) in enumerate(zip(periods, mean_T, strict=True))
        ]
        self._constant_errors = [
            np.abs(wrap_difference(truth_NT[:, t] - constants[t], period)).astype(np.float64)
            for t, period in enumerate(periods)
        ]

    def __len__(self) -> int:
        return len(self._truth)

    def metrics(self, weight_N: Floats | None = None) -> dict[str, float]:
        """Means over the targets of `target_metrics`."""
        rows = [self.target_metrics(t, weight_N) for t in range(len(self._periods))]
        return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}

    def target_metrics(self, t: int, weight_N: Floats | None = None) -> dict[str, float]:
        """Metrics of target `t`: MAE and RMSE in its unit, R2, and the gain, 1 - MAE / MAE of the constant prediction.

        R2 is scikit-learn's, against the mean of these images. If all true values are equal it is 1 for perfect
        predictions and 0 for others.
        """
        mse = float(np.average(self._errors[t] ** 2, weights=weight_N))
        variance = float(np.average(self._deviations(t, weight_N) ** 2, weights=weight_N))
        mae, constant_mae = (
            float(np.average(np.abs(errors), weights=weight_N))
            for errors in (self._errors[t], self._constant_errors[t])
        )
        return {
            "mae": mae,
            "rmse": mse**0.5,
            "r2": 1 - mse / variance if variance else float(mse == 0),
            "gain": 1 - mae / constant_mae if constant_mae else 0.0,
        }

    def _deviations(self, t: int, weight_N: Floats | None) -> Floats:
        """Differences of the true values of target `t` from their mean."""
        truth, period = self._truth[:, t], self._periods[t]
        if period is not None:
            return wrap_difference(truth - circular_mean(truth, period, weight_N), period)
        deviations: Floats = truth - np.average(truth, weights=weight_N)
        return deviations

    def per_target_rows(self, names: Sequence[str]) -> RankedRows:
        """Metrics of each target by name, with the MAE of the constant prediction."""
        notes = ["" if np.ptp(truth) else "one value in all images: r2 means nothing" for truth in self._truth.T]
        constant_mae = [float(errors.mean()) for errors in self._constant_errors]
        rows = (
            {"target": name, **self.target_metrics(t), "constant's mae": constant_mae[t], "note": notes[t]}
            for t, name in enumerate(names)
        )
        return RankedRows(rows, "gain")

    @property
    def errors(self) -> list[Floats]:
        """Predicted minus true values of each target."""
        return self._errors
