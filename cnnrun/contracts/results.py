"""Results, measurements and scores that a task gives to the other packages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cnnrun.contracts.choices import Choices
from cnnrun.contracts.figure import Plot
from cnnrun.contracts.layer import HeightWidth

Results = dict[str, Tensor]  # by name; the first dimension is the batch


@dataclass(frozen=True)
class View:
    """Mapping from an original image of `size` to the network's input: x * scale_x + left, y * scale_y + top."""

    size: HeightWidth
    scale_x: float = 1.0
    scale_y: float = 1.0
    left: float = 0.0
    top: float = 0.0

    def as_tuple(self) -> tuple[float, ...]:
        """Scale, offset and size, each as x and y, for `average_precision.undo_view`."""
        return self.scale_x, self.scale_y, self.left, self.top, self.size[1], self.size[0]


class RankedRows(list[dict[str, Any]]):
    """A table with a row for each class or target, of which only the worst and the best rows are printed if it is long.

    `rank_column` names the metric that ranks the rows; higher is better. `count_column` names the number of a class's
    samples; rows without samples are not ranked.
    """

    def __init__(self, rows: Iterable[dict[str, Any]], rank_column: str, count_column: str | None = None) -> None:
        super().__init__(rows)
        self.rank_column, self.count_column = rank_column, count_column


@dataclass(frozen=True)
class Measurement:
    """Result of a meter: metrics, tables (name -> rows), and matrices of counts over the classes.

    A metric that is undefined for these samples, such as the AP of a size that no object has, is None.

    `choices` are settings chosen on this split, such as thresholds; those of val are stored with the network.
    `bootstrap_draws` are the values of a metric over the draws of a bootstrap, NaN where a draw leaves it undefined.
    `correct` says which images are predicted correctly, for metrics that are the share of correct images.
    """

    metrics: Mapping[str, float | None]
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    matrices: dict[str, list[list[int]]] = field(default_factory=dict)
    choices: Choices = field(default_factory=Choices)
    plots: tuple[Plot, ...] = ()
    # Arrays are left out of ==, which compares them element by element.
    bootstrap_draws: dict[str, NDArray[np.float64]] = field(default_factory=dict, compare=False)
    correct: dict[str, NDArray[np.bool_]] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class ClassScores:
    """Scores of K classes or outputs, computed from raw outputs, that explanations can explain.

    `raw_BK` are differentiable; `display_BK` are for people, in units of `quantity`. `default_B` is the index that is
    explained for each image by default. Without `names` the K values are a vector, of which the direction matters.
    `is_comparable` means that the K scores of an image can be ranked, `is_local` that each comes from one location.
    """

    names: tuple[str, ...]
    raw_BK: Tensor
    display_BK: Tensor
    quantity: str
    default_B: Tensor
    is_comparable: bool = True
    is_local: bool = False


class BatchTensors:
    """Collector of named tensors, batch by batch, which stay on their device until they are concatenated."""

    def __init__(self) -> None:
        self._batches: list[dict[str, Tensor]] = []

    def add(self, **values: Tensor) -> None:
        """Add one batch's tensors, by name."""
        self._batches.append(values)

    def concatenate(self) -> dict[str, NDArray[Any]]:
        """Concatenate the batches and return them as numpy arrays, by name."""
        return {name: torch.cat([batch[name] for batch in self._batches]).cpu().numpy() for name in self._batches[0]}
