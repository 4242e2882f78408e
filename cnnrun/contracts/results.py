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
from cnnrun.contracts.layer import HeightWidth

Results = dict[str, Tensor]  # by name; the first dimension is the batch


@dataclass(frozen=True)
class View:
    """How a picture of any size became the network's: x * scale_x + left, y * scale_y + top. `size` is its own."""

    size: HeightWidth
    scale_x: float = 1.0
    scale_y: float = 1.0
    left: float = 0.0
    top: float = 0.0

    def as_tuple(self) -> tuple[float, ...]:
        """Scale, offset and size, each in x and y: what `average_precision.undo_view` takes."""
        return self.scale_x, self.scale_y, self.left, self.top, self.size[1], self.size[0]


@dataclass(frozen=True)
class Measurement:
    """A meter's verdict: headline numbers, tables (name -> rows), and matrices of counts over the classes.

    A number that is not defined for these samples, such as the AP of a size that no object has, is None.

    `chosen` are thresholds and the like that this split would choose: those of val are kept with the model. `spread`
    is what the numbers come to over the draws of a bootstrap, NaN where a draw leaves one undefined; `right` says, for
    numbers that are the share of the pictures which are right, of which pictures that is so.
    """

    metrics: Mapping[str, float | None]
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    matrices: dict[str, list[list[int]]] = field(default_factory=dict)
    choices: dict[str, float] = field(default_factory=dict)
    plots: tuple[Plot, ...] = ()
    bootstrap_draws: dict[str, NDArray[np.float64]] = field(
        default_factory=dict, compare=False
    )  # arrays compare one by one
    correct: dict[str, NDArray[np.bool_]] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class ClassScores:
    """How strongly raw outputs say each of K things: `raw_BK` to take slopes of, `display_BK` for people, as `what`.

    `default_B` is what each picture is said to be where nobody asks for another. Without `names` the K numbers are a
    direction: what counts is how far two agree. `comparable` says whether one of the K can be larger than another,
    `local` whether each comes from one place of the picture alone.
    """

    names: tuple[str, ...]
    raw_BK: Tensor
    display_BK: Tensor
    quantity: str
    default_B: Tensor
    is_comparable: bool = True
    is_local: bool = False


class BatchTensors:
    """Tensors of each batch, on their device until they are asked for."""

    def __init__(self) -> None:
        self._parts: list[dict[str, Tensor]] = []

    def add(self, **values: Tensor) -> None:
        """A batch's, by name."""
        self._parts.append(values)

    def concatenate(self) -> dict[str, NDArray[Any]]:
        """Every batch's, one after the other, on the host."""
        return {name: torch.cat([part[name] for part in self._parts]).cpu().numpy() for name in self._parts[0]}
