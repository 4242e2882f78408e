"""The meter of detection: COCO's metrics, AP of each class, and precision-recall curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cnnrun.contracts.figure import Plot, Series
from cnnrun.contracts.results import Measurement, Results
from cnnrun.contracts.task_parts import Targets
from cnnrun.tasks.detection.average_precision import (
    AveragePrecision,
    coco_metrics,
    per_class_rows,
    precision_recall_rows,
)

_MAX_CURVES, _FREQUENT_CURVES = 30, 10  # classes in a figure; if there are more, only the most frequent ones


class DetectMeter:
    """Meter of COCO's metrics, AP of each class, and precision-recall curves."""

    def __init__(self, classes: tuple[str, ...]) -> None:
        self._classes, self._average_precision = classes, AveragePrecision(classes)

    def update(self, results: Results, targets: Targets) -> None:
        self._average_precision.add(results, targets)

    def compute(self, tables: bool = True) -> Measurement:
        evaluation = self._average_precision.evaluate()
        metrics = coco_metrics(evaluation)
        if not tables:
            return Measurement(metrics)
        counts = self._average_precision.object_counts()
        rows = {
            "per_class": per_class_rows(evaluation, self._classes, counts),
            "precision_recall": precision_recall_rows(evaluation, self._classes),
        }
        plot = _precision_recall_plot(rows["precision_recall"], dict(zip(self._classes, counts, strict=True)))
        draws = self._average_precision.bootstrap_metrics(evaluation)
        return Measurement(metrics, rows, plots=(plot,), bootstrap_draws=draws)


def _precision_recall_plot(rows: Sequence[dict[str, Any]], counts: dict[str, int]) -> Plot:
    """Precision-recall curve of each class; of many classes only the most frequent ones, and the title says so."""
    names, scope = list(counts), ""
    if len(names) > _MAX_CURVES:
        names = sorted(names, key=lambda name: -counts[name])[:_FREQUENT_CURVES]
        scope = f" of the {_FREQUENT_CURVES} most frequent of {len(counts):,} classes"
    curves: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for row in rows:
        if row["class"] in curves:
            curves[row["class"]].append((row["recall"], row["precision"]))
    series = [Series(name, [x for x, _ in curve], [y for _, y in curve]) for name, curve in curves.items() if curve]
    return Plot(f"Precision and recall{scope}", "recall", "precision", tuple(series), table="precision_recall")
