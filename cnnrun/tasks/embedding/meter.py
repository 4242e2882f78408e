"""The meter of verification: pairs, identification against a gallery, and the thresholds that it chooses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnnrun.base.errors import DataError, NonFiniteError
from cnnrun.base.similarity import COSINE, Similarity
from cnnrun.contracts.choices import Choices, OperatingPoint
from cnnrun.contracts.figure import Plot, Series
from cnnrun.contracts.results import BatchTensors, Measurement, Results
from cnnrun.contracts.task_parts import Targets
from cnnrun.tasks.embedding import gallery_metrics, pair_metrics
from cnnrun.tasks.embedding.pair_metrics import Pairs, RankedPairs, RocCurve, all_pairs
from cnnrun.tasks.intervals import bootstrap_interval, metric_bounds


class VerifyMeter:
    """Meter of verification over pairs and identification against a gallery; chooses a threshold for each FAR.

    Raises NonFiniteError if an embedding is not finite, and DataError if the pairs that can be read are too few.
    """

    def __init__(
        self, fars: Sequence[float], gallery: int, chosen: Sequence[OperatingPoint], similarity: Similarity = COSINE
    ) -> None:
        self._fars, self._gallery, self._batches = fars, gallery, BatchTensors()
        self._chosen_points, self._similarity = chosen, similarity

    def update(self, results: Results, targets: Targets) -> None:
        self._batches.add(embedding=results["embedding"].float(), **targets)

    def compute(self, tables: bool = True) -> Measurement:
        arrays = self._batches.concatenate()
        embeddings, labels = arrays["embedding"], arrays["labels"]
        if not np.isfinite(embeddings).all():
            raise NonFiniteError("an embedding is not finite; there is no similarity to measure")
        pairs = listed_or_all_pairs(arrays)
        if pairs.same_M.all() or not pairs.same_M.any():
            line = "pairs of one person and pairs of two people are both needed"
            raise DataError(f"{line}; the readable images have only one kind")
        scores = pairs.similarities(embeddings, self._similarity)
        ranked = RankedPairs(scores, pairs.same_M, self._similarity.largest)
        folds = pair_metrics.fold_accuracies(ranked, scores, pairs)
        if len(folds) < 2:
            raise DataError("fewer than two folds have readable pairs of both kinds: of one person, and of two people")
        gallery = gallery_metrics.enrol_first(labels, self._gallery)
        ranks = gallery_metrics.identification_ranks(embeddings, labels, gallery, self._similarity)
        curve = ranked.roc_curve()
        metrics = {
            **self._curve_metrics(curve),
            "accuracy": float(np.mean([fold["accuracy"] for fold in folds])),
            **{f"rank_{k}": float((ranks <= k).mean()) for k in (1, 5)},
        }
        impostors = int((~pairs.same_M).sum())
        points = tuple(
            OperatingPoint(far, curve.midpoint_threshold(curve.index_at(far)), impostors) for far in self._fars
        )
        measurement = Measurement(metrics, choices=Choices(operating_points=points))
        if not tables:
            return measurement
        draws = pair_metrics.bootstrap_over_people(scores, pairs, labels, self._curve_metrics)
        rows = {
            **self._interval_rows(measurement, pairs, draws),
            "folds": [{**fold, "threshold": self._similarity.to_display(fold["threshold"])} for fold in folds],
            "at_the_models_thresholds": self._chosen_threshold_rows(scores, pairs),
            "identification": gallery_metrics.cumulative_match_rows(ranks, len(np.unique(labels[gallery.enrolled_G]))),
            "open_set": gallery_metrics.open_set_rows(embeddings, labels, gallery, self._similarity),
        }
        nonempty = {name: table for name, table in rows.items() if table}
        return replace(measurement, tables=nonempty, bootstrap_draws=draws, plots=(_roc_plot(curve),))

    def _curve_metrics(self, curve: RocCurve) -> dict[str, float]:
        tars = {f"tar_{far:g}": float(curve.tar[curve.index_at(far)]) for far in self._fars}
        return {"eer": curve.eer(), "auc": curve.auc(), **tars}

    def _interval_rows(
        self, measurement: Measurement, pairs: Pairs, draws: dict[str, NDArray[np.float64]]
    ) -> dict[str, list[dict[str, Any]]]:
        """Tables of EER, AUC and the TAR at each FAR, with 95 % intervals over people and the number of pairs."""
        metrics = {name: value for name, value in measurement.metrics.items() if value is not None}
        impostors = int((~pairs.same_M).sum())
        counts = {"pairs of one person": f"{len(pairs.same_M) - impostors:,}", "pairs of two people": f"{impostors:,}"}
        counts |= {"of": f"{pairs.total[0]:,} and {pairs.total[1]:,}"}
        if not draws:
            counts["note"] = f"no intervals: people are fewer than {pair_metrics.MIN_PEOPLE}"
        ends = {}
        for name, values in draws.items():
            low, high = bootstrap_interval(metrics[name], values, metric_bounds(name, metrics[name]))
            ends[name] = {"from": low, "to": high}
        headlines = [
            {"number": name, "value": metrics[name], **ends.get(name, {}), **counts} for name in ("eer", "auc")
        ]
        points = [
            {
                "FAR": f"{point.far:g}",
                "TAR": metrics[f"tar_{point.far:g}"],
                **ends.get(f"tar_{point.far:g}", {}),
                "threshold here": self._similarity.to_display(point.threshold),
                "note": pair_metrics.far_note(impostors, point.far),
            }
            for point in measurement.choices.operating_points
        ]
        return {"verification": headlines, "operating_points": points}

    def _chosen_threshold_rows(self, scores: NDArray[np.float64], pairs: Pairs) -> list[dict[str, Any]]:
        """FAR and TAR here at the thresholds that were chosen on val; empty before they are chosen."""
        rows = []
        for far in self._fars:
            point = next((point for point in self._chosen_points if point.is_for(far)), None)
            if point is None:
                continue
            is_accepted = scores >= point.threshold
            rows.append(
                {
                    "FAR wanted": f"{far:g}",
                    "threshold": self._similarity.to_display(point.threshold),
                    "FAR": float(is_accepted[~pairs.same_M].mean()),
                    "TAR": float(is_accepted[pairs.same_M].mean()),
                    "note": pair_metrics.far_note(point.impostor_pairs, far),
                }
            )
        return rows


def _roc_plot(curve: RocCurve) -> Plot:
    """Plot of TAR over FAR with at most 1000 points."""
    points = np.unique(np.linspace(0, len(curve.far) - 1, 1000).astype(int))
    return Plot("Verification", "FAR", "TAR", (Series("ROC", curve.far[points].tolist(), curve.tar[points].tolist()),))


def listed_or_all_pairs(arrays: dict[str, NDArray[np.int64]]) -> Pairs:
    """The pairs that the data lists, without those of images that could not be read; all pairs if it lists none."""
    labels = arrays["labels"]
    if "pairs" not in arrays:
        return all_pairs(labels)
    index_of_number = {number: index for index, number in enumerate(arrays["number"].tolist())}
    first, column = (arrays["pairs"][:, :, 0] >= 0).nonzero()
    second_number, fold = arrays["pairs"][first, column].T
    second = np.array([index_of_number.get(number, -1) for number in second_number.tolist()], np.int64)
    is_readable = second >= 0
    first, second, fold = first[is_readable], second[is_readable], fold[is_readable]
    same = labels[first] == labels[second]
    return Pairs(first, second, same, fold, (int(same.sum()), int((~same).sum())))
