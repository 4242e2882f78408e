"""Losses of regression, and decoders of raw outputs to numbers.

Raw outputs are [B, L * k + A * 2]. Each of the L plain numbers has k outputs in standard units: minus the training
mean, divided by the standard deviation. Each of the A angles has a vector in the plane whose direction is the angle, so
that 359 and 1 degrees are near.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from cnnrun.base.device import tensor_on
from cnnrun.config.spec import Kind
from cnnrun.contracts.facts import NumberStatistics
from cnnrun.contracts.task_parts import Criterion

MIN_VARIANCE = 1e-6  # in standard units; a network without errors would divide by zero


@dataclass(frozen=True)
class TargetUnits:
    """Units and order of the numbers in the raw outputs: first the plain numbers, then the angles."""

    mean: list[float]
    std: list[float]
    period: list[float]
    start: list[float]
    """The lowest value of each angle: 0, or minus half a period."""
    order: list[int]
    """For each learned number, its index in the raw outputs' order."""
    columns: list[int]
    """For each number in the raw outputs' order, its column among the data's numbers."""


class NumberDecoder(nn.Module):
    """Raw outputs -> `values` [B, T] in the data's own units and order."""

    def __init__(
        self, mean: list[float], std: list[float], period: list[float], start: list[float], order: list[int]
    ) -> None:
        super().__init__()
        self.mean, self.std, self.period, self.start, self.order = mean, std, period, start, order

    def split_outputs(self, outputs: Tensor, outputs_per_number: int = 1) -> tuple[Tensor, Tensor]:
        """Split raw outputs into those of plain numbers [B, L, outputs_per_number] and of angles [B, A, 2]."""
        end = len(self.mean) * outputs_per_number
        return outputs[:, :end].unflatten(1, (-1, outputs_per_number)), outputs[:, end:].unflatten(1, (-1, 2))

    def restore_order(self, plain_BL: Tensor, angle_BA: Tensor) -> Tensor:
        """Put plain numbers and angles in the data's order."""
        return torch.cat([plain_BL, angle_BA], 1)[:, self.order]

    def unscale(self, standard_BL: Tensor) -> Tensor:
        """Multiply by the standard deviations; the means are not added."""
        return standard_BL * torch.tensor(self.std, device=standard_BL.device)

    def decode_values(self, standard_BL: Tensor, vector_BA2: Tensor) -> Tensor:
        """Decode standard units and the angles' vectors to the data's units and order."""
        mean, period, start = (
            torch.tensor(values, device=standard_BL.device) for values in (self.mean, self.period, self.start)
        )
        angle = torch.atan2(vector_BA2[:, :, 1], vector_BA2[:, :, 0]) / (2 * math.pi) * period
        angle = torch.where(angle < start, angle + period, angle)
        # An angle just below `start` becomes `start + period` by rounding.
        angle = torch.where(angle >= start + period, start, angle)
        return self.restore_order(self.unscale(standard_BL) + mean, angle)

    def forward(self, outputs: Tensor) -> dict[str, Tensor]:
        plain, angle = self.split_outputs(outputs)
        return {"values": self.decode_values(plain[:, :, 0], angle)}


class GaussianDecoder(NumberDecoder):
    """Raw outputs -> `values` and their standard `deviations` [B, T]; for an angle, an approximation for small ones."""

    def __init__(
        self,
        mean: list[float],
        std: list[float],
        period: list[float],
        start: list[float],
        order: list[int],
        temperature: float = 1.0,
    ) -> None:
        super().__init__(mean, std, period, start, order)
        self.temperature = temperature

    def forward(self, outputs: Tensor) -> dict[str, Tensor]:
        plain, angle = self.split_outputs(outputs, 2)
        period = torch.tensor(self.period, device=outputs.device)
        plain_deviation = (F.softplus(plain[:, :, 1]) + MIN_VARIANCE).sqrt()
        # The vector's length is the concentration of von Mises. For a large one the variance is its inverse.
        angle_deviation = (angle.square().sum(2) + MIN_VARIANCE).pow(-0.25) / (2 * math.pi) * period
        deviations = self.restore_order(self.unscale(plain_deviation), angle_deviation) * self.temperature
        return {"values": self.decode_values(plain[:, :, 0], angle), "deviations": deviations}


class QuantileDecoder(NumberDecoder):
    """Raw outputs -> `quantiles` [B, T, Q], and `values` that are the medians."""

    def __init__(
        self,
        mean: list[float],
        std: list[float],
        period: list[float],
        start: list[float],
        order: list[int],
        quantiles: list[float],
    ) -> None:
        super().__init__(mean, std, period, start, order)
        self.quantiles = quantiles

    def forward(self, outputs: Tensor) -> dict[str, Tensor]:
        plain, angle = self.split_outputs(outputs, len(self.quantiles))
        quantile_BLQ = increasing_quantiles(plain)
        quantiles = [self.decode_values(quantile_BLQ[:, :, index], angle) for index in range(len(self.quantiles))]
        return {"values": quantiles[self.quantiles.index(0.5)], "quantiles": torch.stack(quantiles, 2)}


def increasing_quantiles(raw_BLQ: Tensor) -> Tensor:
    """Quantiles that do not cross: the first raw output, plus the sum of the softplus of those after it."""
    return torch.cat([raw_BLQ[:, :, :1], F.softplus(raw_BLQ[:, :, 1:])], 2).cumsum(2)


class RegressionLossSpec(Kind):
    """Base class of losses over numbers in standard units and over the directions of angles."""

    output_count: ClassVar[int] = 1
    """Raw outputs of a plain number, if that does not depend on settings."""
    can_learn_angles: ClassVar[bool] = True
    """True if the loss can be used for angles."""
    has_likelihood: ClassVar[bool] = False
    """True if the loss is a negative log-likelihood, which a temperature can calibrate."""

    @property
    def outputs_per_number(self) -> int:
        """Raw outputs of a plain number."""
        return self.output_count

    def loss_per_number(self, raw_BLk: Tensor, truth_BL: Tensor) -> Tensor:
        """Loss of each number, [B, L]."""
        raise NotImplementedError

    def loss_per_angle(self, raw_BA2: Tensor, unit_BA2: Tensor) -> Tensor:
        """Loss of each angle, [B, A]; `unit_BA2` is its true direction. By default the sum over both coordinates."""
        loss_per_coordinate = self.loss_per_number(raw_BA2.flatten(1)[:, :, None], unit_BA2.flatten(1))
        loss_BA: Tensor = loss_per_coordinate.unflatten(1, (-1, 2)).sum(2)
        return loss_BA

    def decoder(self, units: TargetUnits, temperature: float) -> NumberDecoder:
        """Build the module that decodes the raw outputs."""
        return NumberDecoder(units.mean, units.std, units.period, units.start, units.order)


class Mse(RegressionLossSpec):
    """Squared error: learns the mean."""

    kind = "mse"

    def loss_per_number(self, raw_BLk: Tensor, truth_BL: Tensor) -> Tensor:
        return F.mse_loss(raw_BLk[:, :, 0], truth_BL, reduction="none")


class Mae(RegressionLossSpec):
    """Absolute error: learns the median, and depends less on outliers."""

    kind = "mae"

    def loss_per_number(self, raw_BLk: Tensor, truth_BL: Tensor) -> Tensor:
        return F.l1_loss(raw_BLk[:, :, 0], truth_BL, reduction="none")


class Huber(RegressionLossSpec):
    """Huber loss: the error is squared where small, absolute where large (Huber 1964)."""

    kind = "huber"
    main = "delta"

    delta: float = Field(1.0, gt=0)
    """The error, in standard deviations of the training numbers, above which the loss is absolute."""

    def loss_per_number(self, raw_BLk: Tensor, truth_BL: Tensor) -> Tensor:
        return F.huber_loss(raw_BLk[:, :, 0], truth_BL, reduction="none", delta=self.delta)


QuantileLevel = Annotated[float, Field(gt=0, lt=1)]


class Quantile(RegressionLossSpec):
    """Several quantiles of each number (Koenker and Bassett 1978), which never cross."""

    kind = "quantile"
    main = "quantiles"
    can_learn_angles = False

    quantiles: list[QuantileLevel] = Field([0.05, 0.5, 0.95], min_length=1, max_length=99)
    """The quantiles to learn: rising, 0.5 among them."""

    @field_validator("quantiles")
    @classmethod
    def _check_rising(cls, quantiles: list[float]) -> list[float]:
        if sorted(set(quantiles)) != quantiles or 0.5 not in quantiles:
            raise ValueError("give rising numbers, 0.5 among them")
        return quantiles

    @property
    def outputs_per_number(self) -> int:
        return len(self.quantiles)

    def loss_per_number(self, raw_BLk: Tensor, truth_BL: Tensor) -> Tensor:
        error = truth_BL[:, :, None] - increasing_quantiles(raw_BLk)
        level = tensor_on(error.device, self.quantiles, error.dtype)
        return torch.maximum(level * error, (level - 1) * error).mean(2)

    def decoder(self, units: TargetUnits, temperature: float) -> NumberDecoder:
        return QuantileDecoder(units.mean, units.std, units.period, units.start, units.order, self.quantiles)


class Gaussian(RegressionLossSpec):
    """Negative log-likelihood of a normal distribution whose mean and variance are learned (Nix and Weigend 1994).

    For an angle, of a von Mises distribution: the vector's direction is the mean, its length the concentration.
    """

    kind = "gaussian"
    output_count = 2
    has_likelihood = True

    def loss_per_number(self, raw_BLk: Tensor, truth_BL: Tensor) -> Tensor:
        return normal_nll(raw_BLk, truth_BL, 1.0)

    def loss_per_angle(self, raw_BA2: Tensor, unit_BA2: Tensor) -> Tensor:
        return von_mises_nll(raw_BA2, unit_BA2, 1.0)

    def decoder(self, units: TargetUnits, temperature: float) -> NumberDecoder:
        return GaussianDecoder(units.mean, units.std, units.period, units.start, units.order, temperature)


def normal_nll(raw_BL2: Tensor, truth_BL: Tensor, temperature: float) -> Tensor:
    """Negative log-likelihood of each number [B, L]; deviations are `temperature` times the learned ones."""
    variance = (F.softplus(raw_BL2[:, :, 1]) + MIN_VARIANCE) * temperature**2
    error = truth_BL - raw_BL2[:, :, 0]
    return 0.5 * (variance.log() + error.square() / variance + math.log(2 * math.pi))


def von_mises_nll(raw_BA2: Tensor, unit_BA2: Tensor, temperature: float) -> Tensor:
    """Negative log-likelihood of each angle in radians [B, A], given its true direction `unit_BA2`."""
    vector = raw_BA2 / temperature**2
    kappa = (vector.square().sum(2) + MIN_VARIANCE).sqrt()
    # I0(kappa) grows like e^kappa and would overflow; `i0e` is I0(kappa) e^-kappa.
    loss: Tensor = torch.special.i0e(kappa).log() + kappa - (vector * unit_BA2).sum(2) + math.log(2 * math.pi)
    return loss


class RegressionCriterion(Criterion):
    """Mean of a regression loss over images and learned numbers."""

    mean: Tensor
    std: Tensor
    period: Tensor

    def __init__(self, loss: RegressionLossSpec, units: TargetUnits) -> None:
        super().__init__()
        self.loss, self.units = loss, units
        for name, values in (("mean", units.mean), ("std", units.std), ("period", units.period)):
            self.register_buffer(name, torch.tensor(values), persistent=False)

    def forward(self, outputs: Tensor, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        plain, plain_truth, angle, unit = self.split_and_standardize(outputs, targets["numbers"])
        loss_BT = torch.cat([self.loss.loss_per_number(plain, plain_truth), self.loss.loss_per_angle(angle, unit)], 1)
        return {self.loss.kind: loss_BT.mean()}

    def split_and_standardize(self, outputs: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Split raw outputs and true numbers into plain numbers and angles.

        Returns the plain numbers' outputs [B, L, k] and truth in standard units [B, L], then the angles' outputs
        [B, A, 2] and true directions as unit vectors [B, A, 2].
        """
        count = len(self.mean)
        end = count * self.loss.outputs_per_number
        truth = numbers[:, self.units.columns]
        radians = truth[:, count:] / self.period * (2 * math.pi)
        unit = torch.stack([radians.cos(), radians.sin()], 2)
        plain = outputs[:, :end].unflatten(1, (-1, self.loss.outputs_per_number))
        return plain, (truth[:, :count] - self.mean) / self.std, outputs[:, end:].unflatten(1, (-1, 2)), unit


RegressionLoss = Mse | Mae | Huber | Quantile | Gaussian


def build_units(
    numbers: Sequence[NumberStatistics], columns: Sequence[int], angles: Mapping[str, float]
) -> TargetUnits:
    """Build the units of the learned `numbers`: `columns` in the data, `angles` with the period of each angle."""
    is_angle = [number.name in angles for number in numbers]
    output_order = sorted(range(len(numbers)), key=lambda t: is_angle[t])  # plain numbers first
    plain_numbers, angle_numbers = (
        [numbers[t] for t in output_order if is_angle[t] == is_kind] for is_kind in (False, True)
    )
    return TargetUnits(
        mean=[number.mean for number in plain_numbers],
        std=[number.std or 1.0 for number in plain_numbers],
        period=[angles[number.name] for number in angle_numbers],
        start=[-angles[number.name] / 2 if number.minimum < 0 else 0.0 for number in angle_numbers],
        order=[output_order.index(t) for t in range(len(numbers))],
        columns=[columns[t] for t in output_order],
    )
