"""What passes between a task and the rest: results, measured metrics, scores to explain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cnnrun.contracts.figure import Plot
from cnnrun.contracts.layer import Pair

Results = dict[str, Tensor]  # by name; the first dimension is the batch


@dataclass(frozen=True)
class View:
    """How a picture of any size became the network's: x * scale_x + left, y * scale_y + top. `size` is its own."""

    size: Pair
    scale_x: float = 1.0
    scale_y: float = 1.0
    left: float = 0.0
    top: float = 0.0

    def numbers(self) -> tuple[float, ...]:
        """Scale, offset and size, each in x and y: what `average_precision.given_back` takes."""
        return self.scale_x, self.scale_y, self.left, self.top, self.size[1], self.size[0]


@dataclass(frozen=True)
class Measured:
    """A meter's verdict: headline numbers, tables (name -> rows), and matrices of counts over the classes.

    A number that is not defined for these samples, such as the AP of a size that no object has, is None.

    `chosen` are thresholds and the like that this split would choose: those of val are kept with the model. `spread`
    is what the numbers come to over the draws of a bootstrap, NaN where a draw leaves one undefined; `right` says, for
    numbers that are the share of the pictures which are right, of which pictures that is so.
    """

    numbers: Mapping[str, float | None]
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    matrices: dict[str, list[list[int]]] = field(default_factory=dict)
    chosen: dict[str, float] = field(default_factory=dict)
    plots: tuple[Plot, ...] = ()
    spread: dict[str, NDArray[np.float64]] = field(default_factory=dict, compare=False)  # arrays compare one by one
    right: dict[str, NDArray[np.bool_]] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Said:
    """How strongly raw outputs say each of K things: `raw_BK` to take slopes of, `shown_BK` for people, as `what`.

    `meant_B` is what each picture is said to be where nobody asks for another. Without `names` the K numbers are a
    direction: what counts is how far two agree. `comparable` says whether one of the K can be larger than another,
    `local` whether each comes from one place of the picture alone.
    """

    names: tuple[str, ...]
    raw_BK: Tensor
    shown_BK: Tensor
    what: str
    meant_B: Tensor
    comparable: bool = True
    local: bool = False


class Kept:
    """Tensors of each batch, on their device until they are asked for."""

    def __init__(self) -> None:
        self._parts: list[dict[str, Tensor]] = []

    def add(self, **values: Tensor) -> None:
        """A batch's, by name."""
        self._parts.append(values)

    def all(self) -> dict[str, NDArray[Any]]:
        """Every batch's, one after the other, on the host."""
        return {name: torch.cat([part[name] for part in self._parts]).cpu().numpy() for name in self._parts[0]}
