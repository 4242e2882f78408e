"""Metrics of verification: do two images show the same person?

A pair is accepted if its similarity is at least the threshold. FAR is the share of the pairs of two people that is
accepted, TAR the share of the pairs of one person. Both are exact; pairs of equal similarity are accepted together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnnrun.base.similarity import COSINE, Similarity

# If a split has more than twice as many pairs, this many of each kind (one person, two people) are sampled.
MAX_PAIRS = 2_000_000
FOLDS = 10
MIN_PEOPLE = 5  # for a confidence interval
_MIN_FALSE_ACCEPTS = 10  # a threshold for a FAR means little if fewer are expected
_BOOTSTRAP_PAIRS = 500_000  # at most; if there are more, a random sample of them
_DRAWS_FEW_PAIRS, _DRAWS_MANY_PAIRS = 1000, 200  # many: more than a tenth of _BOOTSTRAP_PAIRS

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Pairs:
    """Pairs of images: the index of both in their split, whether they show one person, and a fold for each pair."""

    first_M: NDArray[np.int64]
    second_M: NDArray[np.int64]
    same_M: NDArray[np.bool_]
    fold_M: NDArray[np.int64]
    total: tuple[int, int]
    """How many pairs of one person and of two people the split has; more than are here if these are a sample."""

    def similarities(self, embeddings_ND: NDArray[np.float32], similarity: Similarity = COSINE) -> Floats:
        """Similarity of each pair's embeddings."""
        similarities_M = np.empty(len(self.first_M))
        for start in range(0, len(similarities_M), 100_000):
            part = slice(start, start + 100_000)
            first, second = embeddings_ND[self.first_M[part]], embeddings_ND[self.second_M[part]]
            similarities_M[part] = similarity.compare_pairs(first, second)
        return similarities_M


def all_pairs(labels_N: NDArray[np.int64]) -> Pairs:
    """Every pair of a split if there are at most 2 * MAX_PAIRS, else at most MAX_PAIRS of each kind; in random folds.

    Each fold has the same number of pairs of each kind, give or take one.
    """
    generator = np.random.default_rng(0)
    counts = np.unique(labels_N, return_counts=True)[1]
    genuine, total = int((counts * (counts - 1) // 2).sum()), len(labels_N) * (len(labels_N) - 1) // 2
    if total <= 2 * MAX_PAIRS:
        first, second = np.triu_indices(len(labels_N), 1)
    else:
        order = np.argsort(labels_N, kind="stable")
        genuine_pairs = _genuine_pairs(counts, genuine, generator)
        impostor_pairs = _impostor_pairs(counts, total - genuine, generator)
        first, second = order[np.concatenate([genuine_pairs, impostor_pairs])].T
    same = labels_N[first] == labels_N[second]
    fold, folds = np.empty(len(first), np.int64), min(FOLDS, int(same.sum()), int((~same).sum()))
    for is_kind in (same, ~same):
        fold[is_kind] = generator.permutation(int(is_kind.sum())) % max(1, folds)
    return Pairs(first, second, same, fold, (genuine, total - genuine))


def _genuine_pairs(counts_P: NDArray[np.int64], total: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Pairs of one person [M, 2], as indices into the images sorted by person; `counts_P` are the people's images."""
    pair = _sample_pair_numbers(total, generator)
    pairs_P = counts_P * (counts_P - 1) // 2
    ends_P = np.cumsum(pairs_P)
    person = np.searchsorted(ends_P, pair, side="right")
    pair_in_person = pair - (ends_P - pairs_P)[person]
    # Pair k of a person is (row, column) of a triangle, column < row: k = row (row - 1) / 2 + column.
    row = ((1 + np.sqrt(1 + 8 * pair_in_person)) // 2).astype(np.int64)
    row -= row * (row - 1) // 2 > pair_in_person  # where the root was rounded up
    start = (np.cumsum(counts_P) - counts_P)[person]
    return np.stack([start + pair_in_person - row * (row - 1) // 2, start + row], 1)


def _impostor_pairs(counts_P: NDArray[np.int64], total: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Pairs of two people [M, 2], as indices into the images sorted by person; `counts_P` are the people's images."""
    images, person_ends_P = int(counts_P.sum()), np.cumsum(counts_P)
    partners_N = np.repeat(images - person_ends_P, counts_P)  # each image pairs with those of all later people
    pair = _sample_pair_numbers(total, generator)
    ends_N = np.cumsum(partners_N)
    first = np.searchsorted(ends_N, pair, side="right")
    return np.stack([first, np.repeat(person_ends_P, counts_P)[first] + pair - (ends_N - partners_N)[first]], 1)


def _sample_pair_numbers(total: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Numbers 0 to `total` - 1, or MAX_PAIRS distinct ones of them at random; sorted."""
    if total <= MAX_PAIRS:
        return np.arange(total)
    distinct = np.unique(generator.integers(0, total, 2 * MAX_PAIRS))
    return np.sort(generator.permutation(distinct)[:MAX_PAIRS])


@dataclass(frozen=True)
class RocCurve:
    """FAR and TAR at every threshold that changes them; thresholds fall, and the first accepts nothing."""

    threshold: Floats
    far: Floats
    tar: Floats

    def index_at(self, far: float) -> int:
        """Index of the lowest threshold whose FAR is at most `far`."""
        return int(np.searchsorted(self.far, far * (1 + 1e-12), side="right")) - 1

    def midpoint_threshold(self, index: int) -> float:
        """Threshold halfway from the one at `index` to the next lower one, so that rounding does not decide.

        It accepts the same pairs as the threshold at `index`.
        """
        upper = float(self.threshold[index])
        lower = float(self.threshold[index + 1]) if index + 1 < len(self.threshold) else upper
        middle = (upper + lower) / 2
        return middle if middle > lower else upper

    def eer(self) -> float:
        """Equal error rate: the FAR that equals 1 - TAR, interpolated linearly between thresholds."""
        difference = self.far - (1 - self.tar)
        index = int(np.argmax(difference >= 0))
        assert index  # the first threshold accepts nothing: FAR and TAR are 0
        before, after = difference[index - 1], difference[index]
        part = before / (before - after)
        return float(self.far[index - 1] + part * (self.far[index] - self.far[index - 1]))

    def auc(self) -> float:
        """Area under the curve of TAR over FAR."""
        return float(np.trapezoid(self.tar, self.far))


class RankedPairs:
    """Pairs sorted by similarity, so that ROC curves for any weights need no more sorting.

    `largest` is the similarity of equal embeddings.
    """

    def __init__(self, scores_M: Floats, same_M: NDArray[np.bool_], largest: float = COSINE.largest) -> None:
        self.order = np.argsort(-scores_M, kind="stable")
        scores, self.same = scores_M[self.order], same_M[self.order]
        self._last_of_equal = np.flatnonzero(np.r_[scores[1:] != scores[:-1], True])
        # The threshold that accepts nothing lies halfway from the highest similarity to the largest possible one.
        accepts_nothing = max(np.nextafter(scores[0], np.inf), (scores[0] + largest) / 2)
        self._threshold = np.r_[accepts_nothing, scores[self._last_of_equal]]

    def roc_curve(self, weight_M: Floats | None = None) -> RocCurve:
        """ROC curve with a weight for each pair, in the order of the constructor's `scores_M`."""
        weight = np.ones(len(self.order)) if weight_M is None else weight_M[self.order]
        genuine, impostors = (
            np.r_[0.0, np.cumsum(weight * is_kind)[self._last_of_equal]] for is_kind in (self.same, ~self.same)
        )
        has_weight = np.r_[True, np.diff(genuine + impostors) > 0]  # pairs of weight 0 make no threshold
        return RocCurve(
            self._threshold[has_weight], impostors[has_weight] / impostors[-1], genuine[has_weight] / genuine[-1]
        )


def fold_accuracies(ranked: RankedPairs, scores_M: Floats, pairs: Pairs) -> list[dict[str, Any]]:
    """Accuracy of each fold at the threshold that is best on all other folds.

    Accuracy is the mean of TAR and 1 - FAR, which is LFW's accuracy if there are as many pairs of each kind. A fold
    without pairs of both kinds has no row.
    """
    rows = []
    for fold in np.unique(pairs.fold_M).tolist():
        in_fold = pairs.fold_M == fold
        if len(set(pairs.same_M[in_fold].tolist())) < 2:  # pairs with an image that could not be read are left out
            continue
        curve = ranked.roc_curve((~in_fold).astype(np.float64))
        threshold = curve.midpoint_threshold(int(np.argmax(curve.tar - curve.far)))
        same = pairs.same_M[in_fold]
        is_right = (scores_M[in_fold] >= threshold) == same
        accuracy = (is_right[same].mean() + is_right[~same].mean()) / 2
        rows.append(
            {"fold": fold + 1, "pairs": int(in_fold.sum()), "threshold": threshold, "accuracy": float(accuracy)}
        )
    return rows


def bootstrap_over_people(
    scores_M: Floats,
    pairs: Pairs,
    labels_N: NDArray[np.int64],
    compute_metrics: Callable[[RocCurve], dict[str, float]],
) -> dict[str, Floats]:
    """Values of each metric over bootstrap draws of the people; empty if there are fewer than MIN_PEOPLE.

    People are drawn, not pairs, because pairs that share a person are not independent (Bolle, Ratha and Pankanti 2004).
    """
    people, person_N = np.unique(labels_N, return_inverse=True)
    if len(people) < MIN_PEOPLE:
        return {}
    generator = np.random.default_rng(1)
    kinds = [np.flatnonzero(is_kind) for is_kind in (pairs.same_M, ~pairs.same_M)]
    sample = np.concatenate([generator.permutation(kind)[: _BOOTSTRAP_PAIRS // 2] for kind in kinds])
    first_person, second_person = person_N[pairs.first_M[sample]], person_N[pairs.second_M[sample]]
    same = pairs.same_M[sample]
    ranked = RankedPairs(scores_M[sample], same)
    generator, metrics_per_draw = np.random.default_rng(2), []
    for _ in range(_DRAWS_MANY_PAIRS if len(sample) > _BOOTSTRAP_PAIRS // 10 else _DRAWS_FEW_PAIRS):
        draw = generator.integers(0, len(people), len(people))
        times_P = np.bincount(draw, minlength=len(people)).astype(np.float64)
        weight = np.where(same, times_P[first_person], times_P[first_person] * times_P[second_person])
        if weight[same].any() and weight[~same].any():
            metrics_per_draw.append(compute_metrics(ranked.roc_curve(weight)))
    return {name: np.array([metrics[name] for metrics in metrics_per_draw]) for name in metrics_per_draw[0]}


def far_note(impostors: int, far: float) -> str:
    """Warning that `impostors` pairs of two people are too few to measure this FAR; empty if they are enough."""
    if impostors * far >= _MIN_FALSE_ACCEPTS:
        return ""
    needed = f"{_MIN_FALSE_ACCEPTS / far:,.0f} give {_MIN_FALSE_ACCEPTS} false accepts"
    return f"too few pairs of two people: {impostors:,}; {needed}"
