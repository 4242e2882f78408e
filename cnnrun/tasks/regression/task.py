"""One or more numbers a picture."""

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

_LEVELS = {0.5: 0.674490, 0.8: 1.281552, 0.95: 1.959964}  # the middle part of a normal, and its deviations either way
_FINEST = 1e-4  # of the mean: a finer deviation loses digits that matter in float32
_CLOSE = 1e-3  # of a deviation of the training numbers: how near an exported file must come

Period = Annotated[float, Field(gt=0)]


class RegressMeter:
    """MAE, RMSE, R2 and what is gained on the constant mean, as means over the targets and for each of them."""

    def __init__(self, task: Regress, facts: Facts) -> None:
        self._task, self._numbers, self._kept = task, task.learned_numbers(facts), BatchTensors()
        self._places = task.column_indices(facts)

    def update(self, results: Results, targets: dict[str, Tensor]) -> None:
        self._kept.add(truth=targets["numbers"][:, self._places], **results)

    def compute(self, tables: bool = True) -> Measurement:
        kept = {name: values.astype(np.float64) for name, values in self._kept.concatenate().items()}
        names = [number.name for number in self._numbers]
        periods = [self._task.angles.get(name) for name in names]
        found = Residuals(kept["values"], kept["truth"], periods, [number.mean for number in self._numbers])
        numbers = found.metrics()
        if not tables:
            return Measurement(numbers)
        rows = {"per_target": found.per_target_rows(names), "intervals_said": self._held(kept, found)}
        plots = [_against(name, kept["truth"][:, t], kept["values"][:, t]) for t, name in enumerate(names)]
        plots += [_left(name, kept["values"][:, t], found.errors[t]) for t, name in enumerate(names)]
        return Measurement(
            numbers,
            {name: of for name, of in rows.items() if of},
            plots=tuple(plots),
            bootstrap_draws=bootstrap(found.metrics, len(found)),
        )

    def _held(self, kept: dict[str, NDArray[np.float64]], found: Residuals) -> list[dict[str, Any]]:
        """For each target, how many of the pictures lie within what was said they would."""
        rows: list[dict[str, Any]] = []
        for t, number in enumerate(self._numbers):
            off = np.abs(found.errors[t])
            if "deviations" in kept:
                inside = {f"inside {level:.0%}": (off <= far * kept["deviations"][:, t]).mean() for level, far in
                          _LEVELS.items()}  # fmt: skip
                rows.append({"target": number.name, **{name: float(part) for name, part in inside.items()}})
            if "quantiles" in kept:
                below = (kept["truth"][:, t, None] <= kept["quantiles"][:, t]).mean(0).tolist()
                parts = zip(self._task.quantiles(), below, strict=True)
                rows.append({"target": number.name, **{f"below {part:g}": share for part, share in parts}})
        return rows


def _shown(count: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, count - 1, min(count, MAX_POINTS)).astype(np.int64))


def _against(name: str, truth: NDArray[np.float64], value: NDArray[np.float64]) -> Plot:
    at = _shown(len(truth))
    series = Series("a picture each", truth[at].tolist(), value[at].tolist(), "points")
    return Plot(f"{name}: said against true", "true", "said", (series,), diagonal=True)


def _left(name: str, value: NDArray[np.float64], off: NDArray[np.float64]) -> Plot:
    at = _shown(len(value))
    series = Series("a picture each", value[at].tolist(), off[at].tolist(), "points")
    return Plot(f"{name}: residuals", "said", "said - true", (series,))


class Regress(TaskSpec):
    """One or more numbers a picture: learned in standard units, given in their own; angles wrap around."""

    kind = "regress"
    target_kind = "numbers"

    columns: list[str] = []
    """Which of the data's numbers are learned; by default all."""
    angles: dict[str, Period] = {}
    """Which of them are angles, each with its period, such as 360."""
    turns: bool = True
    """Whether the angles are of what is in the picture, so that flip, rotate and shear would make them untrue: then \
these are refused."""
    loss: Annotated[RegressionLoss, Kinds()] = Mse()
    """What it learns by; `gaussian` and `quantile` also say how far off it may be."""

    @model_validator(mode="after")
    def _angles_are_learned(self) -> Self:
        if len(set(self.columns)) < len(self.columns):
            raise ValueError("columns names one twice")
        if self.columns and (other := [name for name in self.angles if name not in self.columns]):
            raise ValueError(f"angles names {other[0]!r}, which is not among columns")
        if self.angles and not self.loss.can_learn_angles:
            raise ValueError(f"{self.loss.kind} has no meaning for angles; take gaussian, which says how sure it is")
        return self

    def learned_numbers(self, facts: Facts) -> list[NumberStatistics]:
        """The numbers that are learned, in order."""
        known = {number.name: number for number in facts.numbers}
        return [known.get(name, NumberStatistics(name)) for name in self.columns or known]

    def column_indices(self, facts: Facts) -> list[int]:
        """Which of the data's numbers they are."""
        known = [number.name for number in facts.numbers]
        return [known.index(number.name) if number.name in known else 0 for number in self.learned_numbers(facts)]

    def quantiles(self) -> list[float]:
        """Those that are learned."""
        return getattr(self.loss, "quantiles", [])

    def metrics(self) -> dict[str, Direction]:
        return {"mae": "min", "rmse": "min", "r2": "max", "gain": "max"}

    def data_problem(self, facts: Facts) -> str | None:
        known = [number.name for number in facts.numbers]
        for name in (*self.columns, *self.angles):
            if name not in known:
                return f"there is no number {name!r}{did_you_mean(name, known)}"
        for number in self.learned_numbers(facts):
            if number.std < _FINEST * abs(number.mean):
                text = f"{number.name} varies by {number.std:.3g} around {number.mean:.6g}, too finely for float32"
                return (
                    f"{text}; take the mean off it"
                    if number.std
                    else f"{number.name} is {number.least:g} in every \
training picture; there is nothing to learn"
                )
            if not number.std:
                return f"{number.name} is {number.least:g} in every training picture; there is nothing to learn"
        return None

    def comparison_key(self, facts: Facts) -> list[Any]:
        return [(each.name, self.angles.get(each.name)) for each in self.learned_numbers(facts)]

    def data_notes(self, facts: Facts) -> list[str]:
        return [
            f"{each.name}: {each.least:.6g} to {each.most:.6g}, mean {each.mean:.6g}, deviation {each.std:.6g}"
            for each in self.learned_numbers(facts)
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
        each = torch.cat([normal_nll(plain, truth, temperature), von_mises_nll(angle, unit, temperature)], 1)
        return float(each.double().mean())

    def _units(self, facts: Facts) -> TargetUnits:
        return losses.build_units(self.learned_numbers(facts), self.column_indices(facts), self.angles)

    def result_shapes(self, facts: Facts) -> dict[str, Shape]:
        count = len(self.learned_numbers(facts))
        made: dict[str, Shape] = {"values": (count,)}
        if self.loss.has_likelihood:
            made["deviations"] = (count,)
        if self.quantiles():
            made["quantiles"] = (count, len(self.quantiles()))
        return made

    def metadata(self, facts: Facts) -> dict[str, Any]:
        return {
            "values": [number.name for number in self.learned_numbers(facts)],
            **({"angles": self.angles} if self.angles else {}),
            **({"quantiles": self.quantiles()} if self.quantiles() else {}),
            **({"deviations": "of each value, in its unit"} if self.loss.has_likelihood else {}),
            **temperature_metadata(facts),
        }

    def largest_difference(self, ours: Results, theirs: Results, facts: Facts) -> float:
        """In deviations of the training numbers; of angles the short way round."""
        numbers, found = self.learned_numbers(facts), []
        for name in ours:
            for t, number in enumerate(numbers):
                apart = (ours[name][:, t] - theirs[name][:, t]).double().cpu().numpy()
                period = self.angles.get(number.name) if name == "values" else None
                found.append(float(np.abs(wrap_difference(apart, period)).max()) / (number.std or 1.0))
        return float(np.max(found))

    def find_disagreement(self, ours: Results, theirs: Results, facts: Facts) -> str | None:
        gap = self.largest_difference(ours, theirs, facts)
        return None if gap <= _CLOSE else f"numbers differ by up to {gap:.2e} deviations (allowed {_CLOSE:g})"

    def result_rows(self, results: Results, facts: Facts, views: Sequence[View]) -> list[dict[str, Any]]:
        names = [number.name for number in self.learned_numbers(facts)]
        made: list[dict[str, Any]] = [
            {"values": dict(zip(names, row, strict=True))} for row in results["values"].tolist()
        ]
        if "deviations" in results:
            for row, deviations in zip(made, results["deviations"].tolist(), strict=True):
                row["deviations"] = dict(zip(names, deviations, strict=True))
        if "quantiles" in results:
            parts = [f"{part:g}" for part in self.quantiles()]
            for row, of_row in zip(made, results["quantiles"].tolist(), strict=True):
                row["quantiles"] = {
                    name: dict(zip(parts, values, strict=True)) for name, values in zip(names, of_row, strict=True)
                }
        return made
