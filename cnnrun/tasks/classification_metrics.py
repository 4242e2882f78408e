"""Metrics of classification with one label or a set of labels per image, for any weights of the images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cnnrun.contracts.results import RankedRows

Floats = NDArray[np.float64]
CALIBRATION_BINS = 15


class SingleLabelPredictions:
    """Predictions for N images: the class, its confidence, and whether the label is among the k most probable.

    Metrics for one set of weights take O(N + K) time and memory for K classes: a bootstrap needs them a thousand times.
    """

    def __init__(
        self,
        classes: int,
        labels: NDArray[np.int64],
        predicted: NDArray[np.int64],
        confidence: Floats,
        in_top_k: NDArray[np.bool_],
    ) -> None:
        self._labels, self._predicted, self._classes = labels, predicted, classes
        self.correct, self._in_top_k = labels == predicted, in_top_k
        self._bins = ReliabilityBins(confidence, self.correct)

    def __len__(self) -> int:
        return len(self.correct)

    def confusion_KK(self) -> NDArray[np.int64]:
        """Confusion matrix: a row per true class, a column per predicted class."""
        counts = np.bincount(self._labels * self._classes + self._predicted, minlength=self._classes**2)
        return counts.reshape(self._classes, self._classes)

    def _count_positives(self, weight_N: Floats | None) -> tuple[Floats, Floats, Floats]:
        """True positives, predicted positives and actual positives of each class."""
        weight = np.ones(len(self)) if weight_N is None else weight_N
        columns = ((self._labels, weight * self.correct), (self._predicted, weight), (self._labels, weight))
        hits_K, predicted_K, actual_K = (
            np.bincount(classes, weights, self._classes).astype(np.float64) for classes, weights in columns
        )
        return hits_K, predicted_K, actual_K

    def metrics(self, top_k: int, weight_N: Floats | None = None) -> dict[str, float]:
        """Accuracy, top-k accuracy, the means over classes of precision, recall and F1, and the calibration error."""
        hits_K, predicted_K, actual_K = self._count_positives(weight_N)
        macro = {name: float(values.mean()) for name, values in _class_metrics(hits_K, predicted_K, actual_K).items()}
        return {
            "accuracy": float(hits_K.sum() / actual_K.sum()),
            f"top_{top_k}": float(np.average(self._in_top_k, weights=weight_N)),
            **macro,
            "ece": self._bins.calibration_error(weight_N),
        }

    def per_class_rows(self, names: Sequence[str]) -> RankedRows:
        """Precision, recall, F1 and support of each class; 0 where the ratio's denominator is 0."""
        hits_K, predicted_K, actual_K = self._count_positives(None)
        columns = {name: values.tolist() for name, values in _class_metrics(hits_K, predicted_K, actual_K).items()}
        rows = (
            {"class": name, **{column: values[k] for column, values in columns.items()}, "support": int(actual_K[k])}
            for k, name in enumerate(names)
        )
        return RankedRows(rows, "f1", "support")

    def reliability_rows(self) -> list[dict[str, float]]:
        """Rows of the reliability diagram: see `ReliabilityBins.reliability_rows`."""
        return self._bins.reliability_rows()


def _class_metrics(hits_K: Floats, predicted_K: Floats, actual_K: Floats) -> dict[str, Floats]:
    return {
        "precision": _ratio(hits_K, predicted_K),
        "recall": _ratio(hits_K, actual_K),
        "f1": _ratio(2 * hits_K, predicted_K + actual_K),
    }


def largest_confusions(matrix: Sequence[Sequence[int]], count: int) -> tuple[list[tuple[int, int, int, int]], int]:
    """The `count` largest cells off the diagonal of a confusion matrix, and the number of nonzero ones.

    A cell is (true class, predicted class, images in the cell, images of the true class). Equal cells are in the order
    of the classes.
    """
    cells_KK = np.array(matrix, np.int64)
    totals_K = cells_KK.sum(1)
    np.fill_diagonal(cells_KK, 0)
    nonzero = np.flatnonzero(cells_KK)
    largest = nonzero[np.argsort(-cells_KK.ravel()[nonzero], kind="stable")[:count]]
    rows, columns = np.unravel_index(largest, cells_KK.shape)
    confusions = zip(
        rows.tolist(), columns.tolist(), cells_KK[rows, columns].tolist(), totals_K[rows].tolist(), strict=True
    )
    return list(confusions), len(nonzero)


def _ratio(part: Floats, whole: Floats) -> Floats:
    """Ratio part / whole; 0 where whole is 0."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


class ReliabilityBins:
    """Probabilities in equal bins (low, high], compared with how often they were right (Guo et al. 2017)."""

    def __init__(self, probability_N: Floats, true_N: NDArray[np.bool_]) -> None:
        self._bin = np.clip(np.ceil(probability_N * CALIBRATION_BINS).astype(np.int64) - 1, 0, CALIBRATION_BINS - 1)
        self._probability, self._true = probability_N, true_N.astype(np.float64)

    def _sum_bins(self, weight_N: Floats | None) -> tuple[Floats, Floats, Floats]:
        """Sums over each bin of the weights, of what is true, and of the probabilities."""
        weight = np.ones(len(self._bin)) if weight_N is None else weight_N
        columns = (weight, weight * self._true, weight * self._probability)
        count, true, probability = (
            np.bincount(self._bin, column, CALIBRATION_BINS).astype(np.float64) for column in columns
        )
        return count, true, probability

    def calibration_error(self, weight_N: Floats | None = None) -> float:
        """Expected calibration error: the mean gap between confidence and accuracy over the bins (eq. 3)."""
        count, true, probability = self._sum_bins(weight_N)
        return float(np.abs(true - probability).sum() / count.sum())

    def reliability_rows(self) -> list[dict[str, float]]:
        """The bins that are not empty: their ends, count, mean probability and accuracy."""
        columns = zip(*(column.tolist() for column in self._sum_bins(None)), strict=True)
        return [
            {
                "from": index / CALIBRATION_BINS,
                "to": (index + 1) / CALIBRATION_BINS,
                "pictures": int(count),
                "confidence": probability / count,
                "accuracy": true / count,
            }
            for index, (count, true, probability) in enumerate(columns)
            if count
        ]


class MultilabelPredictions:
    """Scores of K classes for N images, and which of the classes are present.

    Average precision is scikit-learn's: the sum over thresholds of precision times the increase in recall. A class
    that no image has is left out of the means. If no image has any class, the means are undefined (None).
    """

    def __init__(self, score_NK: Floats, present_NK: NDArray[np.bool_], threshold_K: Floats) -> None:
        self._order = np.argsort(-score_NK, axis=0, kind="stable")
        score = np.take_along_axis(score_NK, self._order, 0)
        self._sorted_present = np.take_along_axis(present_NK, self._order, 0)
        self._is_last_of_equal = np.r_[score[1:] != score[:-1], np.ones((1, score.shape[1]), bool)]
        self._sorted_score, self._present = score, present_NK
        self._predicted = score_NK >= threshold_K
        self.exact = (self._predicted == present_NK).all(1)
        self._bins = ReliabilityBins(score_NK.ravel(), present_NK.ravel())

    def __len__(self) -> int:
        return len(self._present)

    def metrics(self, weight_N: Floats | None = None) -> dict[str, float | None]:
        """mAP, macro and micro F1, the share of images whose predicted set is exact, and the calibration error."""
        weight = np.ones(len(self)) if weight_N is None else weight_N
        hits, predicted, actual = self._count_positives(weight)
        is_present = actual > 0
        precisions = np.array([self._average_precision(k, weight) for k in np.flatnonzero(is_present).tolist()])
        classes = self._present.shape[1]
        return {
            "mAP": float(precisions.mean()) if is_present.any() else None,
            "f1": float(_ratio(2 * hits, predicted + actual)[is_present].mean()) if is_present.any() else None,
            "micro_f1": float(_ratio(2 * hits.sum(keepdims=True), (predicted + actual).sum(keepdims=True))[0]),
            "exact": float(np.average(self.exact, weights=weight)),
            "ece": self._bins.calibration_error(np.repeat(weight, classes)),
        }

    def _count_positives(self, weight: Floats) -> tuple[Floats, Floats, Floats]:
        """True positives, predicted positives and actual positives of each class."""
        return weight @ (self._predicted & self._present), weight @ self._predicted, weight @ self._present

    def precision_recall_curve(self, k: int) -> tuple[Floats, Floats]:
        """Recall and precision at each threshold of class `k`, highest first; some image must have the class."""
        hits, predicted = self._cumulate_positives(k, np.ones(len(self)))
        return hits / hits[-1], _ratio(hits, predicted)

    def _average_precision(self, k: int, weight: Floats) -> float:
        hits, predicted = self._cumulate_positives(k, weight)
        return float(np.sum(_ratio(hits, predicted) * np.diff(hits, prepend=0.0)) / hits[-1])

    def _cumulate_positives(self, k: int, weight: Floats) -> tuple[Floats, Floats]:
        """True positives and predicted positives at each threshold of class `k`."""
        sorted_weight, last = weight[self._order[:, k]], self._is_last_of_equal[:, k]
        return np.cumsum(sorted_weight * self._sorted_present[:, k])[last], np.cumsum(sorted_weight)[last]

    def best_thresholds(self) -> list[float]:
        """The threshold of each class with the highest F1, halfway to the next score; 0.5 if no image has the class."""
        return [self._best_threshold(k) for k in range(self._present.shape[1])]

    def _best_threshold(self, k: int) -> float:
        last = self._is_last_of_equal[:, k]
        hits, predicted = np.cumsum(self._sorted_present[:, k])[last], np.flatnonzero(last) + 1
        if not hits[-1]:
            return 0.5
        best = int(np.argmax(2 * hits / (predicted + hits[-1])))
        scores = self._sorted_score[:, k][last]
        upper, lower = float(scores[best]), float(scores[best + 1]) if best + 1 < len(scores) else 0.0
        middle = (upper + lower) / 2
        return middle if lower < middle < upper else upper

    def per_class_rows(self, names: Sequence[str], threshold_K: Floats) -> RankedRows:
        """AP of each class, and its precision, recall and F1 at its threshold. The AP by chance is the prevalence."""
        weight = np.ones(len(self))
        hits, predicted, actual = self._count_positives(weight)
        columns = {
            **_class_metrics(hits, predicted, actual),
            "threshold": threshold_K,
            "prevalence": actual / len(self),
        }
        rows = (
            {
                "class": name,
                "AP": self._average_precision(k, weight) if actual[k] else None,
                **{column: float(values[k]) for column, values in columns.items()},
                "support": int(actual[k]),
            }
            for k, name in enumerate(names)
        )
        return RankedRows(rows, "AP", "support")

    def reliability_rows(self) -> list[dict[str, float]]:
        """Rows of the reliability diagram, in which every class of every image counts once."""
        return self._bins.reliability_rows()
