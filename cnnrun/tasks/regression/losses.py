"""What a network learns numbers by, and how its raw outputs become them.

Raw outputs are [B, L * k + A * 2]: k of each of the L plain numbers, in standard units (less the training mean, divided
by the deviation), and of each of the A angles a vector in the plane, whose direction is the angle: no angle is far from
its neighbour across the turn.
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
from cnnrun.contracts.task import Criterion

MIN_VARIANCE = 1e-6  # of a variance, in standard units: a network that is never wrong would divide by zero


@dataclass(frozen=True)
class TargetUnits:
    """Which outputs are which number, and in what unit: plain numbers first, then angles."""

    mean: list[float]
    std: list[float]
    period: list[float]
    start: list[float]
    """The lowest value of each angle as it is given: 0, or less half a period."""
    order: list[int]
    """Where each number, in the data's order, stands among them."""
    columns: list[int]
    """Which columns of the data's numbers they are."""


class NumberDecoder(nn.Module):
    """Raw outputs -> `values` [B, T] in the data's own units and order."""

    def __init__(
        self, mean: list[float], std: list[float], period: list[float], start: list[float], order: list[int]
    ) -> None:
        super().__init__()
        self.mean, self.std, self.period, self.start, self.order = mean, std, period, start, order

    def split_outputs(self, outputs: Tensor, each: int = 1) -> tuple[Tensor, Tensor]:
        """[B, L, each] and [B, A, 2]."""
        ends = len(self.mean) * each
        return outputs[:, :ends].unflatten(1, (-1, each)), outputs[:, ends:].unflatten(1, (-1, 2))

    def restore_order(self, plain_BL: Tensor, angle_BA: Tensor) -> Tensor:
        """Plain numbers and angles in the data's order."""
        return torch.cat([plain_BL, angle_BA], 1)[:, self.order]

    def unscale(self, standard_BL: Tensor) -> Tensor:
        """Standard units in the data's own, but for the mean."""
        return standard_BL * torch.tensor(self.std, device=standard_BL.device)

    def decode_values(self, standard_BL: Tensor, turn_BA2: Tensor) -> Tensor:
        """Standard numbers and directions -> numbers."""
        mean, period, start = (
            torch.tensor(each, device=standard_BL.device) for each in (self.mean, self.period, self.start)
        )
        angle = torch.atan2(turn_BA2[:, :, 1], turn_BA2[:, :, 0]) / (2 * math.pi) * period
        angle = torch.where(angle < start, angle + period, angle)
        # A hair below 0 becomes the whole period by rounding.
        angle = torch.where(angle >= start + period, start, angle)
        return self.restore_order(self.unscale(standard_BL) + mean, angle)

    def forward(self, outputs: Tensor) -> dict[str, Tensor]:
        plain, angle = self.split_outputs(outputs)
        return {"values": self.decode_values(plain[:, :, 0], angle)}


class GaussianDecoder(NumberDecoder):
    """Also `deviations` [B, T]: how far off it may be; of an angle the circular deviation of small spreads."""

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
        spread = (F.softplus(plain[:, :, 1]) + MIN_VARIANCE).sqrt()
        # The variance of von Mises for a large concentration, which the vector's length is, is its inverse.
        circular = (angle.square().sum(2) + MIN_VARIANCE).pow(-0.25) / (2 * math.pi) * period
        deviations = self.restore_order(self.unscale(spread), circular) * self.temperature
        return {"values": self.decode_values(plain[:, :, 0], angle), "deviations": deviations}


class QuantileDecoder(NumberDecoder):
    """Also `quantiles` [B, T, Q]; the value is the median."""

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
        found = increasing_quantiles(plain)
        columns = [self.decode_values(found[:, :, place], angle) for place in range(len(self.quantiles))]
        return {"values": columns[self.quantiles.index(0.5)], "quantiles": torch.stack(columns, 2)}


def increasing_quantiles(raw_BLQ: Tensor) -> Tensor:
    """Numbers none of which is below the one before, so that quantiles do not cross."""
    return torch.cat([raw_BLQ[:, :, :1], F.softplus(raw_BLQ[:, :, 1:])], 2).cumsum(2)


class RegressionLossSpec(Kind):
    """A loss over numbers in standard units and over directions."""

    output_count: ClassVar[int] = 1
    """Raw outputs of a plain number."""
    can_learn_angles: ClassVar[bool] = True
    """Whether it can be asked of angles."""
    has_likelihood: ClassVar[bool] = False
    """Whether it is a likelihood, which a temperature can make truer."""

    @property
    def outputs_per_number(self) -> int:
        """Raw outputs of a plain number."""
        return self.output_count

    def loss_per_number(self, raw_BLk: Tensor, truth_BL: Tensor) -> Tensor:
        """The loss of each number, [B, L]."""
        raise NotImplementedError

    def loss_per_angle(self, raw_BA2: Tensor, unit_BA2: Tensor) -> Tensor:
        """The loss of each angle, whose direction is `unit`: [B, A]. Of two coordinates, as of two numbers."""
        each: Tensor = (
            self.loss_per_number(raw_BA2.flatten(1)[:, :, None], unit_BA2.flatten(1)).unflatten(1, (-1, 2)).sum(2)
        )
        return each

    def decoder(self, units: TargetUnits, temperature: float) -> NumberDecoder:
        """What reads the raw outputs."""
        return NumberDecoder(units.mean, units.std, units.period, units.start, units.order)


class Mse(RegressionLossSpec):
    """The squared difference: gives the mean."""

    kind = "mse"

    def loss_per_number(self, raw_BLk: Tensor, truth_BL: Tensor) -> Tensor:
        return F.mse_loss(raw_BLk[:, :, 0], truth_BL, reduction="none")


class Mae(RegressionLossSpec):
    """The absolute difference: gives the median, and minds outliers less."""

    kind = "mae"

    def loss_per_number(self, raw_BLk: Tensor, truth_BL: Tensor) -> Tensor:
        return F.l1_loss(raw_BLk[:, :, 0], truth_BL, reduction="none")


class Huber(RegressionLossSpec):
    """Squared where small, absolute where large (Huber 1964)."""

    kind = "huber"
    main = "delta"

    delta: float = Field(1.0, gt=0)
    """The difference, in deviations of the training numbers, from which it is absolute."""

    def loss_per_number(self, raw_BLk: Tensor, truth_BL: Tensor) -> Tensor:
        return F.huber_loss(raw_BLk[:, :, 0], truth_BL, reduction="none", delta=self.delta)


QuantileLevel = Annotated[float, Field(gt=0, lt=1)]


class Quantile(RegressionLossSpec):
    """Several quantiles of each number (Koenker and Bassett 1978), which never cross."""

    kind = "quantile"
    main = "quantiles"
    can_learn_angles = False

    quantiles: list[QuantileLevel] = Field([0.05, 0.5, 0.95], min_length=1, max_length=99)
    """Rising, 0.5 among them."""

    @field_validator("quantiles")
    @classmethod
    def _rising(cls, quantiles: list[float]) -> list[float]:
        if sorted(set(quantiles)) != quantiles or 0.5 not in quantiles:
            raise ValueError("give rising numbers, 0.5 among them")
        return quantiles

    @property
    def outputs_per_number(self) -> int:
        return len(self.quantiles)

    def loss_per_number(self, raw_BLk: Tensor, truth_BL: Tensor) -> Tensor:
        off = truth_BL[:, :, None] - increasing_quantiles(raw_BLk)
        part = tensor_on(off.device, self.quantiles, off.dtype)
        return torch.maximum(part * off, (part - 1) * off).mean(2)

    def decoder(self, units: TargetUnits, temperature: float) -> NumberDecoder:
        return QuantileDecoder(units.mean, units.std, units.period, units.start, units.order, self.quantiles)


class Gaussian(RegressionLossSpec):
    """The negative log-likelihood of a normal distribution whose mean and variance are learned (Nix and Weigend 1994).

    Of an angle that of von Mises: the vector's direction is the mean, its length the concentration.
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
    """-log p of each number; deviations are `temperature` times what was learned."""
    variance = (F.softplus(raw_BL2[:, :, 1]) + MIN_VARIANCE) * temperature**2
    off = truth_BL - raw_BL2[:, :, 0]
    return 0.5 * (variance.log() + off.square() / variance + math.log(2 * math.pi))


def von_mises_nll(raw_BA2: Tensor, unit_BA2: Tensor, temperature: float) -> Tensor:
    """-log p of each angle, in radians."""
    vector = raw_BA2 / temperature**2
    kappa = (vector.square().sum(2) + MIN_VARIANCE).sqrt()
    # I0 grows like e^kappa; torch's i0e is I0(kappa) e^-kappa.
    loss: Tensor = torch.special.i0e(kappa).log() + kappa - (vector * unit_BA2).sum(2) + math.log(2 * math.pi)
    return loss


class RegressionCriterion(Criterion):
    """A loss over the numbers chosen, a mean over pictures and numbers."""

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
        each = torch.cat([self.loss.loss_per_number(plain, plain_truth), self.loss.loss_per_angle(angle, unit)], 1)
        return {self.loss.kind: each.mean()}

    def split_and_standardize(self, outputs: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Raw outputs and the truth in standard units [B, L, k] and [B, L]; vectors and directions [B, A, 2] each."""
        count = len(self.mean)
        ends = count * self.loss.outputs_per_number
        truth = numbers[:, self.units.columns]
        turn = truth[:, count:] / self.period * (2 * math.pi)
        unit = torch.stack([turn.cos(), turn.sin()], 2)
        plain = outputs[:, :ends].unflatten(1, (-1, self.loss.outputs_per_number))
        return plain, (truth[:, :count] - self.mean) / self.std, outputs[:, ends:].unflatten(1, (-1, 2)), unit


RegressionLoss = Mse | Mae | Huber | Quantile | Gaussian


def build_units(
    numbers: Sequence[NumberStatistics], columns: Sequence[int], angles: Mapping[str, float]
) -> TargetUnits:
    """The units of these numbers, which are those columns of the data's; `angles` has the periods of some."""
    turning = [each.name in angles for each in numbers]
    stands = sorted(range(len(numbers)), key=lambda t: turning[t])  # plain numbers first
    plain, angle = ([numbers[t] for t in stands if turning[t] == kind] for kind in (False, True))
    return TargetUnits(
        mean=[each.mean for each in plain],
        std=[each.std or 1.0 for each in plain],
        period=[angles[each.name] for each in angle],
        start=[-angles[each.name] / 2 if each.least < 0 else 0.0 for each in angle],
        order=[stands.index(t) for t in range(len(numbers))],
        columns=[columns[t] for t in stands],
    )
