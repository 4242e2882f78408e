"""Numbers about classification, one label a picture or a set of them, for any weights of the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
CALIBRATION_BINS = 15


class SingleLabelPredictions:
    """What was said of N pictures: the class, how surely, and whether the label is among the k likeliest.

    Numbers for weights take O(N + K) time and memory for N pictures and K classes: a bootstrap asks for a thousand.
    """

    def __init__(
        self,
        classes: int,
        labels: NDArray[np.int64],
        predicted: NDArray[np.int64],
        confidence: Floats,
        among: NDArray[np.bool_],
    ) -> None:
        self._labels, self._predicted, self._classes = labels, predicted, classes
        self.correct, self._among = labels == predicted, among
        self._bins = ReliabilityBins(confidence, self.correct)

    def __len__(self) -> int:
        return len(self.correct)

    def confusion_KK(self) -> NDArray[np.int64]:
        """Rows are the true classes, columns the predicted ones."""
        counts = np.bincount(self._labels * self._classes + self._predicted, minlength=self._classes**2)
        return counts.reshape(self._classes, self._classes)

    def _sums(self, weight_N: Floats | None) -> tuple[Floats, Floats, Floats]:
        """True positives, predicted positives and actual positives of each class."""
        weight = np.ones(len(self)) if weight_N is None else weight_N
        columns = ((self._labels, weight * self.correct), (self._predicted, weight), (self._labels, weight))
        hits, predicted, support = (np.bincount(of, each, self._classes).astype(np.float64) for of, each in columns)
        return hits, predicted, support

    def metrics(self, top_k: int, weight_N: Floats | None = None) -> dict[str, float]:
        """Accuracy, top-k accuracy, the means of the classes' precision, recall and F1, and the calibration error."""
        hits, predicted, support = self._sums(weight_N)
        macro = {name: float(values.mean()) for name, values in _of_classes(hits, predicted, support).items()}
        return {
            "accuracy": float(hits.sum() / support.sum()),
            f"top_{top_k}": float(np.average(self._among, weights=weight_N)),
            **macro,
            "ece": self._bins.calibration_error(weight_N),
        }

    def per_class_rows(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Precision, recall, F1 and support of each class; 0 where nothing was predicted or nothing is there."""
        hits, predicted, support = self._sums(None)
        found = {name: values.tolist() for name, values in _of_classes(hits, predicted, support).items()}
        return [
            {"class": name, **{of: values[k] for of, values in found.items()}, "support": int(support[k])}
            for k, name in enumerate(names)
        ]

    def reliability_rows(self) -> list[dict[str, float]]:
        """See `Bins.rows`."""
        return self._bins.reliability_rows()


def _of_classes(hits_K: Floats, predicted_K: Floats, support_K: Floats) -> dict[str, Floats]:
    return {
        "precision": _ratio(hits_K, predicted_K),
        "recall": _ratio(hits_K, support_K),
        "f1": _ratio(2 * hits_K, predicted_K + support_K),
    }


def largest_confusions(matrix: Sequence[Sequence[int]], most: int) -> tuple[list[tuple[int, int, int, int]], int]:
    """The cells off the diagonal of a confusion matrix that hold most, and how many hold anything.

    A cell is (true class, class it was taken for, how often, of how many); equals stand in the order of the classes.
    """
    counts = np.array(matrix, np.int64)
    totals = counts.sum(1)
    np.fill_diagonal(counts, 0)
    cells = np.flatnonzero(counts)
    first = cells[np.argsort(-counts.ravel()[cells], kind="stable")[:most]]
    rows, columns = np.unravel_index(first, counts.shape)
    found = zip(rows.tolist(), columns.tolist(), counts[rows, columns].tolist(), totals[rows].tolist(), strict=True)
    return list(found), len(cells)


def _ratio(part: Floats, whole: Floats) -> Floats:
    """part / whole, and 0 of nothing."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


class ReliabilityBins:
    """Probabilities in equal bins (low, high], with what came true of them (Guo et al. 2017)."""

    def __init__(self, probability_N: Floats, true_N: NDArray[np.bool_]) -> None:
        self._place = np.clip(np.ceil(probability_N * CALIBRATION_BINS).astype(np.int64) - 1, 0, CALIBRATION_BINS - 1)
        self._probability, self._true = probability_N, true_N.astype(np.float64)

    def _sums(self, weight_N: Floats | None) -> tuple[Floats, Floats, Floats]:
        weight = np.ones(len(self._place)) if weight_N is None else weight_N
        columns = (weight, weight * self._true, weight * self._probability)
        count, true, probability = (
            np.bincount(self._place, each, CALIBRATION_BINS).astype(np.float64) for each in columns
        )
        return count, true, probability

    def calibration_error(self, weight_N: Floats | None = None) -> float:
        """The mean gap between what was said and what came true, over the bins by their counts (eq. 3)."""
        count, true, probability = self._sums(weight_N)
        return float(np.abs(true - probability).sum() / count.sum())

    def reliability_rows(self) -> list[dict[str, float]]:
        """The bins that hold something: their ends, their count, what was said and what came true, on average."""
        columns = zip(*(each.tolist() for each in self._sums(None)), strict=True)
        return [
            {
                "from": place / CALIBRATION_BINS,
                "to": (place + 1) / CALIBRATION_BINS,
                "pictures": int(count),
                "confidence": probability / count,
                "accuracy": true / count,
            }
            for place, (count, true, probability) in enumerate(columns)
            if count
        ]


class MultilabelPredictions:
    """Which of K classes were said to be in N pictures, and which are.

    Average precision is scikit-learn's: the sum over thresholds of precision times what recall gains. A class that no
    picture has is left out of the means; where no picture has any, these are not defined.
    """

    def __init__(self, score_NK: Floats, present_NK: NDArray[np.bool_], threshold_K: Floats) -> None:
        self._order = np.argsort(-score_NK, axis=0, kind="stable")
        score = np.take_along_axis(score_NK, self._order, 0)
        self._true = np.take_along_axis(present_NK, self._order, 0)
        self._last = np.r_[score[1:] != score[:-1], np.ones((1, score.shape[1]), bool)]
        self._score, self._present = score, present_NK
        self._said = score_NK >= threshold_K
        self.exact = (self._said == present_NK).all(1)
        self._bins = ReliabilityBins(score_NK.ravel(), present_NK.ravel())

    def __len__(self) -> int:
        return len(self._present)

    def metrics(self, weight_N: Floats | None = None) -> dict[str, float | None]:
        """mAP, F1 as the mean of the classes' and over all classes together, sets told exactly, calibration error."""
        weight = np.ones(len(self)) if weight_N is None else weight_N
        hits, said, there = self._counts(weight)
        known = there > 0
        precision = np.array([self._average_precision(k, weight) for k in np.flatnonzero(known).tolist()])
        classes = self._present.shape[1]
        return {
            "mAP": float(precision.mean()) if known.any() else None,
            "f1": float(_ratio(2 * hits, said + there)[known].mean()) if known.any() else None,
            "micro_f1": float(_ratio(2 * hits.sum(keepdims=True), (said + there).sum(keepdims=True))[0]),
            "exact": float(np.average(self.exact, weights=weight)),
            "ece": self._bins.calibration_error(np.repeat(weight, classes)),
        }

    def _counts(self, weight: Floats) -> tuple[Floats, Floats, Floats]:
        """Of each class: rightly said, said, there."""
        return weight @ (self._said & self._present), weight @ self._said, weight @ self._present

    def precision_recall_curve(self, k: int) -> tuple[Floats, Floats]:
        """Recall and precision of a class that some picture has, threshold by threshold, the highest first."""
        hits, said = self._rightly(k, np.ones(len(self)))
        return hits / hits[-1], _ratio(hits, said)

    def _average_precision(self, k: int, weight: Floats) -> float:
        hits, said = self._rightly(k, weight)
        return float(np.sum(_ratio(hits, said) * np.diff(hits, prepend=0.0)) / hits[-1])

    def _rightly(self, k: int, weight: Floats) -> tuple[Floats, Floats]:
        """At each threshold of a class, how many are rightly said and how many are said."""
        ordered, last = weight[self._order[:, k]], self._last[:, k]
        return np.cumsum(ordered * self._true[:, k])[last], np.cumsum(ordered)[last]

    def best_thresholds(self) -> list[float]:
        """The threshold of each class that gives the highest F1 here, halfway to the next score; 0.5 without any."""
        return [self._best_threshold(k) for k in range(self._present.shape[1])]

    def _best_threshold(self, k: int) -> float:
        last = self._last[:, k]
        hits, said = np.cumsum(self._true[:, k])[last], np.flatnonzero(last) + 1
        if not hits[-1]:
            return 0.5
        place = int(np.argmax(2 * hits / (said + hits[-1])))
        scores = self._score[:, k][last]
        upper, lower = float(scores[place]), float(scores[place + 1]) if place + 1 < len(scores) else 0.0
        middle = (upper + lower) / 2
        return middle if lower < middle < upper else upper

    def per_class_rows(self, names: Sequence[str], threshold_K: Floats) -> list[dict[str, Any]]:
        """AP and, at its threshold, precision, recall and F1 of each class; its AP by chance is its share."""
        weight = np.ones(len(self))
        hits, said, there = self._counts(weight)
        columns = {
            "precision": _ratio(hits, said),
            "recall": _ratio(hits, there),
            "f1": _ratio(2 * hits, said + there),
            "threshold": threshold_K,
            "prevalence": there / len(self),
        }
        return [
            {
                "class": name,
                "AP": self._average_precision(k, weight) if there[k] else 0.0,
                **{of: float(values[k]) for of, values in columns.items()},
                "support": int(there[k]),
            }
            for k, name in enumerate(names)
        ]

    def reliability_rows(self) -> list[dict[str, float]]:
        """See `Bins.rows`; every class of every picture counts once."""
        return self._bins.reliability_rows()
