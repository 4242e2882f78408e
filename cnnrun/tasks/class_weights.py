"""Check of weights per class, of which `balanced` means the inverse of each class's frequency."""

from __future__ import annotations

from collections.abc import Sequence

from cnnrun.base.errors import ConfigError, DataError
from cnnrun.contracts.facts import DataFacts


def check_class_weights(setting: str, weights: str | Sequence[float] | None, facts: DataFacts) -> None:
    """Raise ConfigError if the weights are not one per class, or DataError if a class to balance has no images."""
    if isinstance(weights, list) and len(weights) != len(facts.classes):
        numbers, classes = len(weights), len(facts.classes)
        raise ConfigError(f"task: {setting} has {numbers} numbers; the data has {classes} classes")
    if weights == "balanced" and 0 in facts.class_counts:
        missing = facts.classes[facts.class_counts.index(0)]
        raise DataError(f"task: {setting}: balanced needs images of every class; {missing!r} has none")
