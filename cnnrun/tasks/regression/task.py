"""Regression: one or more numbers or angles per image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from cnnrun.base.errors import ConfigError, DataError
from cnnrun.config.messages import did_you_mean
from cnnrun.config.spec import Kinds
from cnnrun.contracts.choices import Choices
from cnnrun.contracts.facts import DataFacts, NumberStatistics
from cnnrun.contracts.layer import Shape, require_vector
from cnnrun.contracts.prediction import Prediction
from cnnrun.contracts.results import ClassScores, Results, View
from cnnrun.contracts.target_kind import TargetKind
from cnnrun.contracts.task import Requirements, Task, TaskSpec
from cnnrun.contracts.task_parts import (
    Calibration,
    Criterion,
    Direction,
    Learning,
    Measuring,
    Predicting,
    Showing,
    Targets,
)
from cnnrun.tasks.regression import losses
from cnnrun.tasks.regression.losses import (
    Mse,
    RegressionCriterion,
    RegressionLoss,
    TargetUnits,
    normal_nll,
    von_mises_nll,
)
from cnnrun.tasks.regression.meter import RegressMeter
from cnnrun.tasks.regression.residuals import wrap_difference
from cnnrun.tasks.temperature import temperature_metadata

# Fraction of the mean. Numbers that vary less than this lose significant digits in float32.
_MIN_RELATIVE_DEVIATION = 1e-4
_TOLERANCE = 1e-3  # of an exported file, in standard deviations of the training numbers

Period = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class NumberPrediction(Prediction):
    """Predicted numbers by name, with their deviations and quantiles if the loss predicts them."""

    values: dict[str, float]
    deviations: dict[str, float] = field(default_factory=dict)
    quantiles: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        optional = {"deviations": self.deviations, "quantiles": self.quantiles}
        return {"values": self.values, **{name: values for name, values in optional.items() if values}}

    def to_text(self) -> str:
        return "  ".join(f"{name} {value:.4g}" for name, value in self._all_values().items())

    def csv_columns(self) -> list[str]:
        return list(self._all_values())

    def csv_rows(self) -> list[list[Any]]:
        return [list(self._all_values().values())]

    def _all_values(self) -> dict[str, float]:
        """The numbers by name, followed by their deviations and quantiles."""
        deviations = {f"{name} deviation": value for name, value in self.deviations.items()}
        quantiles = {
            f"{name} {quantile}": value
            for name, by_quantile in self.quantiles.items()
            for quantile, value in by_quantile.items()
        }
        return {**self.values, **deviations, **quantiles}


class Regress(TaskSpec):
    """One or more numbers per image, learned in standard units and returned in their own; angles wrap around."""

    kind = "regress"
    target_kind = TargetKind.NUMBERS

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

    def requirements(self) -> Requirements:
        turns = self.angles and self.turns
        return Requirements(invalid_transforms=("flip", "rotate", "shear", "policy") if turns else ())

    def metrics(self) -> dict[str, Direction]:
        return {"mae": "min", "rmse": "min", "r2": "max", "gain": "max"}

    def check_data(self, facts: DataFacts) -> None:
        known = [number.name for number in facts.numbers]
        for name in (*self.columns, *self.angles):
            if name not in known:
                raise ConfigError(f"task: there is no number {name!r}{did_you_mean(name, known)}")
        for number in self.learned_numbers(facts):
            if not number.std:
                line = f"{number.name} is {number.minimum:g} in every training image; there is nothing to learn"
                raise DataError(f"task: {line}")
            if number.std < _MIN_RELATIVE_DEVIATION * abs(number.mean):
                spread = f"{number.name} varies by {number.std:.3g} around {number.mean:.6g}"
                raise DataError(f"task: {spread}, too finely for float32; subtract the mean from it")

    def assemble(self, facts: DataFacts) -> Task:
        return Task(
            self,
            facts,
            RegressLearning(self, facts),
            RegressMeasuring(self, facts),
            RegressPredicting(self, facts),
            RegressShowing(self, facts),
            RegressCalibration(self, facts) if self.loss.has_likelihood else None,
        )

    def learned_numbers(self, facts: DataFacts) -> list[NumberStatistics]:
        """Statistics of the numbers that are learned, in the order of `columns`."""
        known = {number.name: number for number in facts.numbers}
        return [known.get(name, NumberStatistics(name)) for name in self.columns or known]

    def column_indices(self, facts: DataFacts) -> list[int]:
        """Index of each learned number among the data's numbers."""
        known = [number.name for number in facts.numbers]
        return [known.index(number.name) if number.name in known else 0 for number in self.learned_numbers(facts)]

    def quantiles(self) -> list[float]:
        """The quantiles that are learned; empty if the loss has none."""
        return getattr(self.loss, "quantiles", [])

    def units(self, facts: DataFacts) -> TargetUnits:
        """Units and order of the learned numbers in the raw outputs."""
        return losses.build_units(self.learned_numbers(facts), self.column_indices(facts), self.angles)


@dataclass(frozen=True)
class RegressLearning(Learning):
    """A linear layer, and a loss in standard units."""

    spec: Regress
    facts: DataFacts

    def build_head(self, in_shapes: Sequence[Shape]) -> nn.Module:
        (in_shape,) = in_shapes
        units = self.spec.units(self.facts)
        outputs = len(units.mean) * self.spec.loss.outputs_per_number + 2 * len(units.period)
        return nn.Linear(require_vector("its linear layer", in_shape), outputs)

    def build_criterion(self) -> Criterion:
        return RegressionCriterion(self.spec.loss, self.spec.units(self.facts))


@dataclass(frozen=True)
class RegressMeasuring(Measuring):
    """Errors in the numbers' own units."""

    spec: Regress
    facts: DataFacts

    def build_meter(self, choices: Choices) -> RegressMeter:
        numbers = self.spec.learned_numbers(self.facts)
        periods = [self.spec.angles.get(number.name) for number in numbers]
        return RegressMeter(numbers, self.spec.column_indices(self.facts), periods, self.spec.quantiles())

    def comparison_key(self) -> list[Any]:
        return [(number.name, self.spec.angles.get(number.name)) for number in self.spec.learned_numbers(self.facts)]


@dataclass(frozen=True)
class RegressPredicting(Predicting):
    """Numbers in their own units."""

    spec: Regress
    facts: DataFacts

    def build_decoder(self, choices: Choices) -> nn.Module:
        return self.spec.loss.decoder(self.spec.units(self.facts), choices.temperature or 1.0)

    def result_shapes(self) -> dict[str, Shape]:
        count = len(self._names())
        shapes: dict[str, Shape] = {"values": (count,)}
        if self.spec.loss.has_likelihood:
            shapes["deviations"] = (count,)
        if self.spec.quantiles():
            shapes["quantiles"] = (count, len(self.spec.quantiles()))
        return shapes

    def metadata(self, choices: Choices) -> dict[str, Any]:
        spec = self.spec
        return {
            "values": self._names(),
            **({"angles": spec.angles} if spec.angles else {}),
            **({"quantiles": spec.quantiles()} if spec.quantiles() else {}),
            **({"deviations": "of each value, in its unit"} if spec.loss.has_likelihood else {}),
            **temperature_metadata(choices),
        }

    def predictions(
        self, results: Results, views: Sequence[View], thresholds: dict[str, float]
    ) -> list[NumberPrediction]:
        names, levels = self._names(), [f"{level:g}" for level in self.spec.quantiles()]
        rows = {name: values.tolist() for name, values in results.items()}
        blank: list[Any] = [()] * len(views)
        return [
            NumberPrediction(
                dict(zip(names, values, strict=True)),
                dict(zip(names, deviations, strict=False)),
                {
                    name: dict(zip(levels, quantiles, strict=True))
                    for name, quantiles in zip(names, quantiles_TQ, strict=False)
                },
            )
            for values, deviations, quantiles_TQ in zip(
                rows["values"], rows.get("deviations", blank), rows.get("quantiles", blank), strict=True
            )
        ]

    def largest_difference(self, expected: Results, actual: Results) -> float:
        """The largest difference, in standard deviations of the training numbers; angles go the short way round."""
        numbers, gaps = self.spec.learned_numbers(self.facts), []
        for name in expected:
            for t, number in enumerate(numbers):
                difference = (expected[name][:, t] - actual[name][:, t]).double().cpu().numpy()
                period = self.spec.angles.get(number.name) if name == "values" else None
                gaps.append(float(np.abs(wrap_difference(difference, period)).max()) / (number.std or 1.0))
        return float(np.max(gaps))

    def find_disagreement(self, expected: Results, actual: Results) -> str | None:
        gap = self.largest_difference(expected, actual)
        if gap <= _TOLERANCE:
            return None
        return f"numbers differ by up to {gap:.2e} standard deviations (allowed {_TOLERANCE:g})"

    def _names(self) -> list[str]:
        return [number.name for number in self.spec.learned_numbers(self.facts)]


@dataclass(frozen=True)
class RegressShowing(Showing):
    """Numbers with their names, and the predicted values to explain."""

    spec: Regress
    facts: DataFacts

    def describe_targets(self, targets: Targets) -> list[str]:
        numbers = self.spec.learned_numbers(self.facts)
        rows = targets["numbers"][:, self.spec.column_indices(self.facts)].tolist()
        return [
            "  ".join(f"{number.name} {value:.4g}" for number, value in zip(numbers, row, strict=True)) for row in rows
        ]

    def data_notes(self) -> list[str]:
        return [
            f"{number.name}: {number.minimum:.6g} to {number.maximum:.6g}, "
            f"mean {number.mean:.6g}, deviation {number.std:.6g}"
            for number in self.spec.learned_numbers(self.facts)
        ]

    def class_scores(self, outputs: Tensor, choices: Choices) -> ClassScores:
        decoder = self.spec.loss.decoder(self.spec.units(self.facts), choices.temperature or 1.0).to(outputs.device)
        values = decoder(outputs)["values"]
        first = torch.zeros(len(outputs), dtype=torch.int64, device=outputs.device)
        names = tuple(number.name for number in self.spec.learned_numbers(self.facts))
        return ClassScores(names, values, values, "value", first, is_comparable=False)


@dataclass(frozen=True)
class RegressCalibration(Calibration):
    """Calibration of the predicted deviations."""

    spec: Regress
    facts: DataFacts

    def negative_log_likelihood(self, outputs: Tensor, targets: Targets, temperature: float) -> float:
        criterion = RegressionCriterion(self.spec.loss, self.spec.units(self.facts)).to(outputs.device)
        plain, truth, angle, unit = criterion.split_and_standardize(outputs, targets["numbers"])
        nll_BT = torch.cat([normal_nll(plain, truth, temperature), von_mises_nll(angle, unit, temperature)], 1)
        return float(nll_BT.double().mean())
