"""Numbers about regression, for any weights of the pictures; of angles, differences are the short way round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def wrap_difference(difference: Floats, period: float | None) -> Floats:
    """A difference of angles of that period, in [-period / 2, period / 2); any other as it is."""
    if period is None:
        return difference
    made: Floats = (difference + period / 2) % period - period / 2
    return made


def circular_mean(values_N: Floats, period: float, weight_N: Floats | None = None) -> float:
    """The direction of the mean of the unit vectors."""
    turn = np.average(np.exp(2j * np.pi * values_N / period), weights=weight_N)
    return float(np.angle(turn) * period / (2 * np.pi))


class Residuals:
    """What was said of T numbers of N pictures, and what they are. `period` is an angle's, None for other numbers.

    `constant_T` is what one would say without looking: the training pictures' mean. Of an angle it is the circular mean
    of these pictures themselves.
    """

    def __init__(
        self, value_NT: Floats, truth_NT: Floats, periods: Sequence[float | None], constant_T: Sequence[float]
    ) -> None:
        self._truth, self._periods = truth_NT, periods
        self._of = [wrap_difference(value_NT[:, t] - truth_NT[:, t], period) for t, period in enumerate(periods)]
        constants = [
            mean if period is None else circular_mean(truth_NT[:, t], period)
            for t, (period, mean) in enumerate(zip(periods, constant_T, strict=True))
        ]
        self._blind = [
            np.abs(wrap_difference(truth_NT[:, t] - constants[t], period)).astype(np.float64)
            for t, period in enumerate(periods)
        ]

    def __len__(self) -> int:
        return len(self._truth)

    def metrics(self, weight_N: Floats | None = None) -> dict[str, float]:
        """The means over the targets of what `of_target` says."""
        rows = [self.target_metrics(t, weight_N) for t in range(len(self._periods))]
        return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}

    def target_metrics(self, t: int, weight_N: Floats | None = None) -> dict[str, float]:
        """MAE and RMSE in the target's unit; R2 against these pictures' mean; `gain`, the part of the constant's MAE
        that is saved.

        R2 is scikit-learn's; where all are one it is 1 for a perfect answer and else 0.
        """
        off, blind = self._of[t], self._blind[t]
        squares = float(np.average(off**2, weights=weight_N))
        around = float(np.average(self._deviation(t, weight_N) ** 2, weights=weight_N))
        mae, constant = (float(np.average(np.abs(each), weights=weight_N)) for each in (off, blind))
        return {
            "mae": mae,
            "rmse": squares**0.5,
            "r2": 1 - squares / around if around else float(squares == 0),
            "gain": 1 - mae / constant if constant else 0.0,
        }

    def _deviation(self, t: int, weight_N: Floats | None) -> Floats:
        """From the mean of these pictures."""
        truth, period = self._truth[:, t], self._periods[t]
        if period is not None:
            return wrap_difference(truth - circular_mean(truth, period, weight_N), period)
        made: Floats = truth - np.average(truth, weights=weight_N)
        return made

    def per_target_rows(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Each target by name, with the constant's MAE."""
        notes = ["" if np.ptp(each) else "one value in all pictures: r2 means nothing" for each in self._truth.T]
        return [
            {"target": name, **self.target_metrics(t), "constant's mae": float(self._blind[t].mean()), "note": notes[t]}
            for t, name in enumerate(names)
        ]

    @property
    def errors(self) -> list[Floats]:
        """What was said less the truth, for each target."""
        return self._of
