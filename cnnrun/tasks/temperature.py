"""Calibration of probabilities: the reliability diagram, and the temperature that calibrates them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from cnnrun.contracts.choices import Choices
from cnnrun.contracts.figure import Plot, Series

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0


def reliability_plot(rows: Sequence[dict[str, Any]]) -> Plot:
    """Reliability diagram (Guo et al. 2017, figure 1) of the rows of `classification_metrics.ReliabilityBins`."""
    confidence, accuracy = ([row[name] for row in rows] for name in ("confidence", "accuracy"))
    total = max(1, sum(row["pictures"] for row in rows))
    shares = [row["pictures"] / total for row in rows]
    series = (Series("share of the images", confidence, shares, "bars"), Series("accuracy", confidence, accuracy))
    labels = ("predicted probability", "share that is right")
    return Plot("Reliability", *labels, series, diagonal=True, table="reliability")


def temperature_metadata(choices: Choices) -> dict[str, Any]:
    """Metadata of an exported file: the temperature that its graph applies; empty if none was fitted."""
    return {} if choices.temperature is None else {"temperature": choices.temperature}


def fit_temperature(nll: Callable[[float], float]) -> float | None:
    """Find the temperature with the lowest negative log-likelihood.

    `nll` is convex in the inverse of the temperature, so it has at most one minimum. None if it has none between the
    bounds, as where a classifier is nearly always right, or nearly always wrong.
    """
    from scipy.optimize import minimize_scalar

    bounds = (math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE))
    minimum = minimize_scalar(lambda log: nll(math.exp(log)), bounds=bounds, method="bounded", options={"xatol": 1e-4})
    temperature = math.exp(float(minimum.x))
    is_minimum = all(nll(temperature * factor) > nll(temperature) for factor in (1 / 1.01, 1.01))
    return temperature if is_minimum else None
