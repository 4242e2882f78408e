"""How far a number would move on other samples of the same kind: the bootstrap (Efron 1979).

Samples are drawn with replacement, as often as there are; a draw says how often each stands in it. Draws depend on
the number of samples alone, so that two networks measured on the same pictures are measured on the same draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

DRAWS = 1000
FEWEST = 20  # samples: draws of fewer say little of other samples
Floats = NDArray[np.float64]


def draws(count: int, number: int = DRAWS) -> Iterator[Floats]:
    """`number` draws of `count` samples: how often each stands in it, [count]."""
    draw = np.random.default_rng(count)
    for _ in range(number):
        yield np.bincount(draw.integers(0, count, count), minlength=count).astype(np.float64)


def spread(of: Callable[[Floats], dict[str, float]], count: int, number: int = DRAWS) -> dict[str, Floats]:
    """What each number comes to on each draw; `of` gives the numbers for weights [count]. Nothing of a few samples."""
    if count < FEWEST:
        return {}
    found = [of(weight) for weight in draws(count, number)]
    return {name: np.array([each[name] for each in found]) for name in found[0]}


def interval(value: float, values: Floats) -> tuple[float, float]:
    """The 95 % interval of a number from its values over draws: their middle, less twice their bias.

    What draws are off the number, the number is off the truth, on average (Efron and Tibshirani 1993, ch. 10): much for
    a calibration error, hardly for anything else. Without that, 0 to 90 of 100 intervals of a calibration error held
    the truth in simulations, with it 87. What is a share in every draw stays one.
    """
    low, high = np.quantile(values - 2 * (np.median(values) - value), (0.025, 0.975))
    low = max(0.0, low) if values.min() >= 0 else low
    return float(low), float(min(1.0, high) if values.max() <= 1 else high)


def wilson(right_N: NDArray[np.bool_]) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927), which has a width even where all are right."""
    count, share, z = len(right_N), float(right_N.mean()), 1.959964
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def intervals(
    numbers: Mapping[str, float], spread: Mapping[str, Floats], right: Mapping[str, NDArray[np.bool_]]
) -> dict[str, list[float]]:
    """The 95 % interval of each number: of shares of the pictures Wilson's, of others the bootstrap's."""
    return {
        name: list(wilson(right[name]) if name in right else interval(numbers[name], values))
        for name, values in spread.items()
    }
