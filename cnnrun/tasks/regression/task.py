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
from cnnrun.contracts.facts import Facts, Number
from cnnrun.contracts.figure import MOST_POINTS, Plot, Series
from cnnrun.contracts.layer import Shape, need_vector
from cnnrun.contracts.results import Kept, Measured, Results, Said, View
from cnnrun.contracts.task import Better, Criterion, TaskSpec
from cnnrun.tasks.intervals import spread
from cnnrun.tasks.regression import losses
from cnnrun.tasks.regression.losses import Fit, Fitted, Mse, Units, normal, von_mises
from cnnrun.tasks.regression.residuals import Residuals, wrapped
from cnnrun.tasks.temperature import TEMPERATURE, told_temperature

_LEVELS = {0.5: 0.674490, 0.8: 1.281552, 0.95: 1.959964}  # the middle part of a normal, and its deviations either way
_FINEST = 1e-4  # of the mean: a finer deviation loses digits that matter in float32
_CLOSE = 1e-3  # of a deviation of the training numbers: how near an exported file must come

Period = Annotated[float, Field(gt=0)]


class RegressMeter:
    """MAE, RMSE, R2 and what is gained on the constant mean, as means over the targets and for each of them."""

    def __init__(self, task: Regress, facts: Facts) -> None:
        self._task, self._numbers, self._kept = task, task.chosen(facts), Kept()
        self._places = task.places(facts)

    def update(self, results: Results, targets: dict[str, Tensor]) -> None:
        self._kept.add(truth=targets["numbers"][:, self._places], **results)

    def compute(self, tables: bool = True) -> Measured:
        kept = {name: values.astype(np.float64) for name, values in self._kept.all().items()}
        names = [number.name for number in self._numbers]
        periods = [self._task.angles.get(name) for name in names]
        found = Residuals(kept["values"], kept["truth"], periods, [number.mean for number in self._numbers])
        numbers = found.numbers()
        if not tables:
            return Measured(numbers)
        rows = {"per_target": found.rows(names), "intervals_said": self._held(kept, found)}
        plots = [_against(name, kept["truth"][:, t], kept["values"][:, t]) for t, name in enumerate(names)]
        plots += [_left(name, kept["values"][:, t], found.off[t]) for t, name in enumerate(names)]
        return Measured(
            numbers,
            {name: of for name, of in rows.items() if of},
            plots=tuple(plots),
            spread=spread(found.numbers, len(found)),
        )

    def _held(self, kept: dict[str, NDArray[np.float64]], found: Residuals) -> list[dict[str, Any]]:
        """For each target, how many of the pictures lie within what was said they would."""
        rows: list[dict[str, Any]] = []
        for t, number in enumerate(self._numbers):
            off = np.abs(found.off[t])
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
    return np.unique(np.linspace(0, count - 1, min(count, MOST_POINTS)).astype(np.int64))


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
    targets = "numbers"

    columns: list[str] = []
    """Which of the data's numbers are learned; by default all."""
    angles: dict[str, Period] = {}
    """Which of them are angles, each with its period, such as 360."""
    turns: bool = True
    """Whether the angles are of what is in the picture, so that flip, rotate and shear would make them untrue: then \
these are refused."""
    loss: Annotated[Fit, Kinds()] = Mse()
    """What it learns by; `gaussian` and `quantile` also say how far off it may be."""

    @model_validator(mode="after")
    def _angles_are_learned(self) -> Self:
        if len(set(self.columns)) < len(self.columns):
            raise ValueError("columns names one twice")
        if self.columns and (other := [name for name in self.angles if name not in self.columns]):
            raise ValueError(f"angles names {other[0]!r}, which is not among columns")
        if self.angles and not self.loss.turns:
            raise ValueError(f"{self.loss.kind} has no meaning for angles; take gaussian, which says how sure it is")
        return self

    def chosen(self, facts: Facts) -> list[Number]:
        """The numbers that are learned, in order."""
        known = {number.name: number for number in facts.numbers}
        return [known.get(name, Number(name)) for name in self.columns or known]

    def places(self, facts: Facts) -> list[int]:
        """Which of the data's numbers they are."""
        known = [number.name for number in facts.numbers]
        return [known.index(number.name) if number.name in known else 0 for number in self.chosen(facts)]

    def quantiles(self) -> list[float]:
        """Those that are learned."""
        return getattr(self.loss, "quantiles", [])

    def numbers(self) -> dict[str, Better]:
        return {"mae": "min", "rmse": "min", "r2": "max", "gain": "max"}

    def problem(self, facts: Facts) -> str | None:
        known = [number.name for number in facts.numbers]
        for name in (*self.columns, *self.angles):
            if name not in known:
                return f"there is no number {name!r}{did_you_mean(name, known)}"
        for number in self.chosen(facts):
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

    def about(self, facts: Facts) -> list[Any]:
        return [(each.name, self.angles.get(each.name)) for each in self.chosen(facts)]

    def notes(self, facts: Facts) -> list[str]:
        return [
            f"{each.name}: {each.least:.6g} to {each.most:.6g}, mean {each.mean:.6g}, deviation {each.std:.6g}"
            for each in self.chosen(facts)
        ]

    def spoilt_by(self) -> Sequence[str]:
        return ("flip", "rotate", "shear", "policy") if self.angles and self.turns else ()

    def head(self, in_shapes: Sequence[Shape], facts: Facts) -> nn.Module:
        (in_shape,) = in_shapes
        units = self._units(facts)
        outputs = len(units.mean) * self.loss.outputs + 2 * len(units.period)
        return nn.Linear(need_vector("its linear layer", in_shape), outputs)

    def criterion(self, facts: Facts) -> Criterion:
        return Fitted(self.loss, self._units(facts))

    def words(self, targets: dict[str, Tensor], facts: Facts) -> list[str]:
        numbers = self.chosen(facts)
        rows = targets["numbers"][:, self.places(facts)].tolist()
        return [
            "  ".join(f"{number.name} {value:.4g}" for number, value in zip(numbers, row, strict=True)) for row in rows
        ]

    def decoder(self, facts: Facts) -> nn.Module:
        return self.loss.decoder(self._units(facts), facts.chosen.get(TEMPERATURE, 1.0))

    def meter(self, facts: Facts) -> RegressMeter:
        return RegressMeter(self, facts)

    def said(self, outputs: Tensor, facts: Facts) -> Said:
        values = self.decoder(facts).to(outputs.device)(outputs)["values"]
        first = torch.zeros(len(outputs), dtype=torch.int64, device=outputs.device)
        return Said(tuple(number.name for number in self.chosen(facts)), values, values, "value", first, False)

    def nll(self, outputs: Tensor, targets: dict[str, Tensor], facts: Facts, temperature: float) -> float | None:
        if not self.loss.likelihood:
            return None
        criterion = Fitted(self.loss, self._units(facts)).to(outputs.device)
        plain, truth, angle, unit = criterion.parts(outputs, targets["numbers"])
        each = torch.cat([normal(plain, truth, temperature), von_mises(angle, unit, temperature)], 1)
        return float(each.double().mean())

    def _units(self, facts: Facts) -> Units:
        return losses.units(self.chosen(facts), self.places(facts), self.angles)

    def signature(self, facts: Facts) -> dict[str, Shape]:
        count = len(self.chosen(facts))
        made: dict[str, Shape] = {"values": (count,)}
        if self.loss.likelihood:
            made["deviations"] = (count,)
        if self.quantiles():
            made["quantiles"] = (count, len(self.quantiles()))
        return made

    def meaning(self, facts: Facts) -> dict[str, Any]:
        return {
            "values": [number.name for number in self.chosen(facts)],
            **({"angles": self.angles} if self.angles else {}),
            **({"quantiles": self.quantiles()} if self.quantiles() else {}),
            **({"deviations": "of each value, in its unit"} if self.loss.likelihood else {}),
            **told_temperature(facts),
        }

    def gap(self, ours: Results, theirs: Results, facts: Facts) -> float:
        """In deviations of the training numbers; of angles the short way round."""
        numbers, found = self.chosen(facts), []
        for name in ours:
            for t, number in enumerate(numbers):
                apart = (ours[name][:, t] - theirs[name][:, t]).double().cpu().numpy()
                period = self.angles.get(number.name) if name == "values" else None
                found.append(float(np.abs(wrapped(apart, period)).max()) / (number.std or 1.0))
        return float(np.max(found))

    def agree(self, ours: Results, theirs: Results, facts: Facts) -> str | None:
        gap = self.gap(ours, theirs, facts)
        return None if gap <= _CLOSE else f"numbers differ by up to {gap:.2e} deviations (allowed {_CLOSE:g})"

    def rows(self, results: Results, facts: Facts, views: Sequence[View]) -> list[dict[str, Any]]:
        names = [number.name for number in self.chosen(facts)]
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
