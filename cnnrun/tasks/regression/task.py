"""Regression: one or more numbers or angles per image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn

from cnnrun.config.messages import did_you_mean
from cnnrun.config.spec import Kinds
from cnnrun.contracts.facts import Facts, NumberStatistics
from cnnrun.contracts.figure import MAX_POINTS, Plot, Series
from cnnrun.contracts.layer import Shape, require_vector
from cnnrun.contracts.results import BatchTensors, ClassScores, Measurement, Results, View
from cnnrun.contracts.task import Criterion, Direction, TaskSpec
from cnnrun.tasks.intervals import bootstrap
from cnnrun.tasks.regression import losses
from cnnrun.tasks.regression.losses import (
    Mse,
    RegressionCriterion,
    RegressionLoss,
    TargetUnits,
    normal_nll,
    von_mises_nll,
)
from cnnrun.tasks.regression.residuals import Residuals, wrap_difference
from cnnrun.tasks.temperature import TEMPERATURE, temperature_metadata

# Central share of a normal distribution -> how many standard deviations from the mean it reaches.
_REACH = {0.5: 0.674490, 0.8: 1.281552, 0.95: 1.959964}
_MIN_RELATIVE_DEVIATION = 1e-4  # of the mean: float32 loses digits that matter of numbers that vary less
_TOLERANCE = 1e-3  # of an exported file, in standard deviations of the training numbers

Period = Annotated[float, Field(gt=0)]


class RegressMeter:
    """Meter of MAE, RMSE, R2 and the gain on a constant prediction: means over the targets, and for each target."""

    def __init__(self, task: Regress, facts: Facts) -> None:
        self._task, self._numbers, self._batches = task, task.learned_numbers(facts), BatchTensors()
        self._columns = task.column_indices(facts)

    def update(self, results: Results, targets: dict[str, Tensor]) -> None:
        self._batches.add(truth=targets["numbers"][:, self._columns], **results)

    def compute(self, tables: bool = True) -> Measurement:
        arrays = {name: values.astype(np.float64) for name, values in self._batches.concatenate().items()}
        names = [number.name for number in self._numbers]
        periods = [self._task.angles.get(name) for name in names]
        truth_NT, value_NT = arrays["truth"], arrays["values"]
        residuals = Residuals(value_NT, truth_NT, periods, [number.mean for number in self._numbers])
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
                    f"inside {level:.0%}": float((error <= reach * deviation).mean()) for level, reach in _REACH.items()
                }
                rows.append({"target": number.name, **inside})
            if "quantiles" in arrays:
                below = (arrays["truth"][:, t, None] <= arrays["quantiles"][:, t]).mean(0).tolist()
                levels = zip(self._task.quantiles(), below, strict=True)
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


class Regress(TaskSpec):
    """One or more numbers per image, learned in standard units and returned in their own; angles wrap around."""

    kind = "regress"
    target_kind = "numbers"

    columns: list[str] = []
    """Names of the data's numbers to learn; by default all."""
    angles: dict[str, Period] = {}
    """The numbers that are angles, each with its period, such as 360."""
    turns: bool = True
    """If true, the angles turn with the image, and flip, rotate, shear and policy are refused because they would make \
them wrong."""
    loss: Annotated[RegressionLoss, Kinds()] = Mse()
    """The loss; `gaussian` and `quantile` also predict how large the error may be."""

    @model_validator(mode="after")
    def _check_columns_and_angles(self) -> Self:
        if len(set(self.columns)) < len(self.columns):
            raise ValueError("columns lists a number twice")
        if self.columns and (unlearned := [name for name in self.angles if name not in self.columns]):
            raise ValueError(f"angles names {unlearned[0]!r}, which is not among columns")
        if self.angles and not self.loss.can_learn_angles:
            raise ValueError(f"loss {self.loss.kind} cannot learn angles; use gaussian, which also predicts deviations")
        return self

    def learned_numbers(self, facts: Facts) -> list[NumberStatistics]:
        """Statistics of the numbers that are learned, in the order of `columns`."""
        known = {number.name: number for number in facts.numbers}
        return [known.get(name, NumberStatistics(name)) for name in self.columns or known]

    def column_indices(self, facts: Facts) -> list[int]:
        """Index of each learned number among the data's numbers."""
        known = [number.name for number in facts.numbers]
        return [known.index(number.name) if number.name in known else 0 for number in self.learned_numbers(facts)]

    def quantiles(self) -> list[float]:
        """The quantiles that are learned; empty if the loss has none."""
        return getattr(self.loss, "quantiles", [])

    def metrics(self) -> dict[str, Direction]:
        return {"mae": "min", "rmse": "min", "r2": "max", "gain": "max"}

    def data_problem(self, facts: Facts) -> str | None:
        known = [number.name for number in facts.numbers]
        for name in (*self.columns, *self.angles):
            if name not in known:
                return f"there is no number {name!r}{did_you_mean(name, known)}"
        for number in self.learned_numbers(facts):
            if not number.std:
                return f"{number.name} is {number.least:g} in every training image; there is nothing to learn"
            if number.std < _MIN_RELATIVE_DEVIATION * abs(number.mean):
                spread = f"{number.name} varies by {number.std:.3g} around {number.mean:.6g}"
                return f"{spread}, too finely for float32; subtract the mean from it"
        return None

    def comparison_key(self, facts: Facts) -> list[Any]:
        return [(number.name, self.angles.get(number.name)) for number in self.learned_numbers(facts)]

    def data_notes(self, facts: Facts) -> list[str]:
        return [
            f"{number.name}: {number.least:.6g} to {number.most:.6g}, "
            f"mean {number.mean:.6g}, deviation {number.std:.6g}"
            for number in self.learned_numbers(facts)
        ]

    def harmful_augmentations(self) -> Sequence[str]:
        return ("flip", "rotate", "shear", "policy") if self.angles and self.turns else ()

    def head(self, in_shapes: Sequence[Shape], facts: Facts) -> nn.Module:
        (in_shape,) = in_shapes
        units = self._units(facts)
        outputs = len(units.mean) * self.loss.outputs_per_number + 2 * len(units.period)
        return nn.Linear(require_vector("its linear layer", in_shape), outputs)

    def criterion(self, facts: Facts) -> Criterion:
        return RegressionCriterion(self.loss, self._units(facts))

    def describe_targets(self, targets: dict[str, Tensor], facts: Facts) -> list[str]:
        numbers = self.learned_numbers(facts)
        rows = targets["numbers"][:, self.column_indices(facts)].tolist()
        return [
            "  ".join(f"{number.name} {value:.4g}" for number, value in zip(numbers, row, strict=True)) for row in rows
        ]

    def decoder(self, facts: Facts) -> nn.Module:
        return self.loss.decoder(self._units(facts), facts.chosen.get(TEMPERATURE, 1.0))

    def meter(self, facts: Facts) -> RegressMeter:
        return RegressMeter(self, facts)

    def class_scores(self, outputs: Tensor, facts: Facts) -> ClassScores:
        values = self.decoder(facts).to(outputs.device)(outputs)["values"]
        first = torch.zeros(len(outputs), dtype=torch.int64, device=outputs.device)
        return ClassScores(
            tuple(number.name for number in self.learned_numbers(facts)), values, values, "value", first, False
        )

    def negative_log_likelihood(
        self, outputs: Tensor, targets: dict[str, Tensor], facts: Facts, temperature: float
    ) -> float | None:
        if not self.loss.has_likelihood:
            return None
        criterion = RegressionCriterion(self.loss, self._units(facts)).to(outputs.device)
        plain, truth, angle, unit = criterion.split_and_standardize(outputs, targets["numbers"])
        nll_BT = torch.cat([normal_nll(plain, truth, temperature), von_mises_nll(angle, unit, temperature)], 1)
        return float(nll_BT.double().mean())

    def _units(self, facts: Facts) -> TargetUnits:
        return losses.build_units(self.learned_numbers(facts), self.column_indices(facts), self.angles)

    def result_shapes(self, facts: Facts) -> dict[str, Shape]:
        count = len(self.learned_numbers(facts))
        shapes: dict[str, Shape] = {"values": (count,)}
        if self.loss.has_likelihood:
            shapes["deviations"] = (count,)
        if self.quantiles():
            shapes["quantiles"] = (count, len(self.quantiles()))
        return shapes

    def metadata(self, facts: Facts) -> dict[str, Any]:
        return {
            "values": [number.name for number in self.learned_numbers(facts)],
            **({"angles": self.angles} if self.angles else {}),
            **({"quantiles": self.quantiles()} if self.quantiles() else {}),
            **({"deviations": "of each value, in its unit"} if self.loss.has_likelihood else {}),
            **temperature_metadata(facts),
        }

    def largest_difference(self, expected: Results, actual: Results, facts: Facts) -> float:
        """The largest difference, in standard deviations of the training numbers; angles go the short way round."""
        numbers, gaps = self.learned_numbers(facts), []
        for name in expected:
            for t, number in enumerate(numbers):
                difference = (expected[name][:, t] - actual[name][:, t]).double().cpu().numpy()
                period = self.angles.get(number.name) if name == "values" else None
                gaps.append(float(np.abs(wrap_difference(difference, period)).max()) / (number.std or 1.0))
        return float(np.max(gaps))

    def find_disagreement(self, expected: Results, actual: Results, facts: Facts) -> str | None:
        gap = self.largest_difference(expected, actual, facts)
        if gap <= _TOLERANCE:
            return None
        return f"numbers differ by up to {gap:.2e} standard deviations (allowed {_TOLERANCE:g})"

    def result_rows(self, results: Results, facts: Facts, views: Sequence[View]) -> list[dict[str, Any]]:
        names = [number.name for number in self.learned_numbers(facts)]
        rows: list[dict[str, Any]] = [
            {"values": dict(zip(names, values, strict=True))} for values in results["values"].tolist()
        ]
        if "deviations" in results:
            for row, deviations in zip(rows, results["deviations"].tolist(), strict=True):
                row["deviations"] = dict(zip(names, deviations, strict=True))
        if "quantiles" in results:
            levels = [f"{level:g}" for level in self.quantiles()]
            for row, quantiles_TQ in zip(rows, results["quantiles"].tolist(), strict=True):
                row["quantiles"] = {
                    name: dict(zip(levels, quantiles, strict=True))
                    for name, quantiles in zip(names, quantiles_TQ, strict=True)
                }
        return rows
