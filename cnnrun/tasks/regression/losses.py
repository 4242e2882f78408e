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
from cnnrun.contracts.facts import Number
from cnnrun.contracts.task import Criterion

LEAST = 1e-6  # of a variance, in standard units: a network that is never wrong would divide by zero


@dataclass(frozen=True)
class Units:
    """Which outputs are which number, and in what unit: plain numbers first, then angles."""

    mean: list[float]
    std: list[float]
    period: list[float]
    start: list[float]
    """The lowest value of each angle as it is given: 0, or less half a period."""
    order: list[int]
    """Where each number, in the data's order, stands among them."""
    place: list[int]
    """Which columns of the data's numbers they are."""


class Numbers(nn.Module):
    """Raw outputs -> `values` [B, T] in the data's own units and order."""

    def __init__(
        self, mean: list[float], std: list[float], period: list[float], start: list[float], order: list[int]
    ) -> None:
        super().__init__()
        self.mean, self.std, self.period, self.start, self.order = mean, std, period, start, order

    def parts(self, outputs: Tensor, each: int = 1) -> tuple[Tensor, Tensor]:
        """[B, L, each] and [B, A, 2]."""
        ends = len(self.mean) * each
        return outputs[:, :ends].unflatten(1, (-1, each)), outputs[:, ends:].unflatten(1, (-1, 2))

    def together(self, plain_BL: Tensor, angle_BA: Tensor) -> Tensor:
        """Plain numbers and angles in the data's order."""
        return torch.cat([plain_BL, angle_BA], 1)[:, self.order]

    def scaled(self, standard_BL: Tensor) -> Tensor:
        """Standard units in the data's own, but for the mean."""
        return standard_BL * torch.tensor(self.std, device=standard_BL.device)

    def values(self, standard_BL: Tensor, turn_BA2: Tensor) -> Tensor:
        """Standard numbers and directions -> numbers."""
        mean, period, start = (
            torch.tensor(each, device=standard_BL.device) for each in (self.mean, self.period, self.start)
        )
        angle = torch.atan2(turn_BA2[:, :, 1], turn_BA2[:, :, 0]) / (2 * math.pi) * period
        angle = torch.where(angle < start, angle + period, angle)
        # A hair below 0 becomes the whole period by rounding.
        angle = torch.where(angle >= start + period, start, angle)
        return self.together(self.scaled(standard_BL) + mean, angle)

    def forward(self, outputs: Tensor) -> dict[str, Tensor]:
        plain, angle = self.parts(outputs)
        return {"values": self.values(plain[:, :, 0], angle)}


class Deviated(Numbers):
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
        plain, angle = self.parts(outputs, 2)
        period = torch.tensor(self.period, device=outputs.device)
        spread = (F.softplus(plain[:, :, 1]) + LEAST).sqrt()
        # The variance of von Mises for a large concentration, which the vector's length is, is its inverse.
        circular = (angle.square().sum(2) + LEAST).pow(-0.25) / (2 * math.pi) * period
        deviations = self.together(self.scaled(spread), circular) * self.temperature
        return {"values": self.values(plain[:, :, 0], angle), "deviations": deviations}


class Quantiled(Numbers):
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
        plain, angle = self.parts(outputs, len(self.quantiles))
        found = rising(plain)
        columns = [self.values(found[:, :, place], angle) for place in range(len(self.quantiles))]
        return {"values": columns[self.quantiles.index(0.5)], "quantiles": torch.stack(columns, 2)}


def rising(raw_BLQ: Tensor) -> Tensor:
    """Numbers none of which is below the one before, so that quantiles do not cross."""
    return torch.cat([raw_BLQ[:, :, :1], F.softplus(raw_BLQ[:, :, 1:])], 2).cumsum(2)


class FitSpec(Kind):
    """A loss over numbers in standard units and over directions."""

    each: ClassVar[int] = 1
    """Raw outputs of a plain number."""
    turns: ClassVar[bool] = True
    """Whether it can be asked of angles."""
    likelihood: ClassVar[bool] = False
    """Whether it is a likelihood, which a temperature can make truer."""

    @property
    def outputs(self) -> int:
        """Raw outputs of a plain number."""
        return self.each

    def plain(self, raw_BLk: Tensor, truth_BL: Tensor) -> Tensor:
        """The loss of each number, [B, L]."""
        raise NotImplementedError

    def angle(self, raw_BA2: Tensor, unit_BA2: Tensor) -> Tensor:
        """The loss of each angle, whose direction is `unit`: [B, A]. Of two coordinates, as of two numbers."""
        each: Tensor = self.plain(raw_BA2.flatten(1)[:, :, None], unit_BA2.flatten(1)).unflatten(1, (-1, 2)).sum(2)
        return each

    def decoder(self, units: Units, temperature: float) -> Numbers:
        """What reads the raw outputs."""
        return Numbers(units.mean, units.std, units.period, units.start, units.order)


class Mse(FitSpec):
    """The squared difference: gives the mean."""

    kind = "mse"

    def plain(self, raw_BLk: Tensor, truth_BL: Tensor) -> Tensor:
        return F.mse_loss(raw_BLk[:, :, 0], truth_BL, reduction="none")


class Mae(FitSpec):
    """The absolute difference: gives the median, and minds outliers less."""

    kind = "mae"

    def plain(self, raw_BLk: Tensor, truth_BL: Tensor) -> Tensor:
        return F.l1_loss(raw_BLk[:, :, 0], truth_BL, reduction="none")


class Huber(FitSpec):
    """Squared where small, absolute where large (Huber 1964)."""

    kind = "huber"
    main = "delta"

    delta: float = Field(1.0, gt=0)
    """The difference, in deviations of the training numbers, from which it is absolute."""

    def plain(self, raw_BLk: Tensor, truth_BL: Tensor) -> Tensor:
        return F.huber_loss(raw_BLk[:, :, 0], truth_BL, reduction="none", delta=self.delta)


Part = Annotated[float, Field(gt=0, lt=1)]


class Quantile(FitSpec):
    """Several quantiles of each number (Koenker and Bassett 1978), which never cross."""

    kind = "quantile"
    main = "quantiles"
    turns = False

    quantiles: list[Part] = Field([0.05, 0.5, 0.95], min_length=1, max_length=99)
    """Rising, 0.5 among them."""

    @field_validator("quantiles")
    @classmethod
    def _rising(cls, quantiles: list[float]) -> list[float]:
        if sorted(set(quantiles)) != quantiles or 0.5 not in quantiles:
            raise ValueError("give rising numbers, 0.5 among them")
        return quantiles

    @property
    def outputs(self) -> int:
        return len(self.quantiles)

    def plain(self, raw_BLk: Tensor, truth_BL: Tensor) -> Tensor:
        off = truth_BL[:, :, None] - rising(raw_BLk)
        part = tensor_on(off.device, self.quantiles, off.dtype)
        return torch.maximum(part * off, (part - 1) * off).mean(2)

    def decoder(self, units: Units, temperature: float) -> Numbers:
        return Quantiled(units.mean, units.std, units.period, units.start, units.order, self.quantiles)


class Gaussian(FitSpec):
    """The negative log-likelihood of a normal distribution whose mean and variance are learned (Nix and Weigend 1994).

    Of an angle that of von Mises: the vector's direction is the mean, its length the concentration.
    """

    kind = "gaussian"
    each = 2
    likelihood = True

    def plain(self, raw_BLk: Tensor, truth_BL: Tensor) -> Tensor:
        return normal(raw_BLk, truth_BL, 1.0)

    def angle(self, raw_BA2: Tensor, unit_BA2: Tensor) -> Tensor:
        return von_mises(raw_BA2, unit_BA2, 1.0)

    def decoder(self, units: Units, temperature: float) -> Numbers:
        return Deviated(units.mean, units.std, units.period, units.start, units.order, temperature)


def normal(raw_BL2: Tensor, truth_BL: Tensor, temperature: float) -> Tensor:
    """-log p of each number; deviations are `temperature` times what was learned."""
    variance = (F.softplus(raw_BL2[:, :, 1]) + LEAST) * temperature**2
    off = truth_BL - raw_BL2[:, :, 0]
    return 0.5 * (variance.log() + off.square() / variance + math.log(2 * math.pi))


def von_mises(raw_BA2: Tensor, unit_BA2: Tensor, temperature: float) -> Tensor:
    """-log p of each angle, in radians."""
    vector = raw_BA2 / temperature**2
    kappa = (vector.square().sum(2) + LEAST).sqrt()
    # I0 grows like e^kappa; torch's i0e is I0(kappa) e^-kappa.
    loss: Tensor = torch.special.i0e(kappa).log() + kappa - (vector * unit_BA2).sum(2) + math.log(2 * math.pi)
    return loss


class Fitted(Criterion):
    """A loss over the numbers chosen, a mean over pictures and numbers."""

    mean: Tensor
    std: Tensor
    period: Tensor

    def __init__(self, fit: FitSpec, units: Units) -> None:
        super().__init__()
        self.fit, self.units = fit, units
        for name, values in (("mean", units.mean), ("std", units.std), ("period", units.period)):
            self.register_buffer(name, torch.tensor(values), persistent=False)

    def forward(self, outputs: Tensor, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        plain, plain_truth, angle, unit = self.parts(outputs, targets["numbers"])
        each = torch.cat([self.fit.plain(plain, plain_truth), self.fit.angle(angle, unit)], 1)
        return {self.fit.kind: each.mean()}

    def parts(self, outputs: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Raw outputs and the truth in standard units [B, L, k] and [B, L]; vectors and directions [B, A, 2] each."""
        count = len(self.mean)
        ends = count * self.fit.outputs
        truth = numbers[:, self.units.place]
        turn = truth[:, count:] / self.period * (2 * math.pi)
        unit = torch.stack([turn.cos(), turn.sin()], 2)
        plain = outputs[:, :ends].unflatten(1, (-1, self.fit.outputs))
        return plain, (truth[:, :count] - self.mean) / self.std, outputs[:, ends:].unflatten(1, (-1, 2)), unit


Fit = Mse | Mae | Huber | Quantile | Gaussian


def units(numbers: Sequence[Number], columns: Sequence[int], angles: Mapping[str, float]) -> Units:
    """The units of these numbers, which are those columns of the data's; `angles` has the periods of some."""
    turning = [each.name in angles for each in numbers]
    stands = sorted(range(len(numbers)), key=lambda t: turning[t])  # plain numbers first
    plain, angle = ([numbers[t] for t in stands if turning[t] == kind] for kind in (False, True))
    return Units(
        mean=[each.mean for each in plain],
        std=[each.std or 1.0 for each in plain],
        period=[angles[each.name] for each in angle],
        start=[-angles[each.name] / 2 if each.least < 0 else 0.0 for each in angle],
        order=[stands.index(t) for t in range(len(numbers))],
        place=[columns[t] for t in stands],
    )
