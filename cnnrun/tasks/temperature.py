"""Whether probabilities are what they say: the reliability diagram, and a temperature that makes them so."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from cnnrun.contracts.facts import Facts
from cnnrun.contracts.figure import Plot, Series

TEMPERATURE = "temperature"  # what `Facts.chosen` calls it
MIN_TEMPERATURE, MAX_TEMPERATURE = (
    0.05,
    20.0,
)  # a temperature beyond is none: so few are wrong, or so few right, that there is no minimum


def reliability_plot(rows: Sequence[dict[str, Any]]) -> Plot:
    """Reliability diagram (Guo et al. 2017, figure 1) from rows of `classification_metrics.ReliabilityBins`."""
    confidence, accuracy = ([row[name] for row in rows] for name in ("confidence", "accuracy"))
    counts = [row["pictures"] / max(1, sum(each["pictures"] for each in rows)) for row in rows]
    series = (Series("share of the pictures", confidence, counts, "bars"), Series("came true", confidence, accuracy))
    return Plot("Reliability", "probability said", "part that came true", series, diagonal=True)


def temperature_metadata(facts: Facts) -> dict[str, Any]:
    """For an export's metadata: the temperature that is in the file already; nothing where none was fitted."""
    return {TEMPERATURE: facts.chosen[TEMPERATURE]} if TEMPERATURE in facts.chosen else {}


def fit_temperature(nll: Callable[[float], float]) -> float:
    """The temperature of the lowest negative log-likelihood; convex in its inverse, so there is one minimum."""
    from scipy.optimize import minimize_scalar

    bounds = (math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE))
    found = minimize_scalar(lambda log: nll(math.exp(log)), bounds=bounds, method="bounded", options={"xatol": 1e-4})
    return math.exp(float(found.x))
